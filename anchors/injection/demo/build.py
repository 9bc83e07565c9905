"""Build the demonstration stage by stage: a base, a vision-language model, experts, upper bounds, a suite.

The recipe is that of real models: the vision tower first, by itself; then the projector alone, with the language model
frozen; then all of the language tower at a low rate. A tower that is trained hard drifts away from its base, and then
nothing can be injected any more.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionModel,
)

from anchors.errors import AnchorsError
from anchors.injection.demo import models
from anchors.injection.demo.pictures import Pictures, pictures
from anchors.injection.demo.prompts import IGNORED, Encoder, Item, drawn_rows
from anchors.injection.demo.scales import Scale, Stage
from anchors.injection.demo.suite_files import HeldOut, examples, write_suite
from anchors.injection.demo.training import (
    Classifier,
    all_patches,
    answer_loss,
    batches,
    facts_of,
    fit,
    patches,
    right,
)
from anchors.injection.demo.world import SKILLS, QuestionKind, World, world
from anchors.pace import Interrupted
from anchors.study.results import provenance, require_writable, writing
from anchors.training import Team, claim, demand_own, described

Report = Callable[[str, int, int], None]
"""Told (stage, steps done, steps of all stages)."""

MARK = "stage.json"
Weighted = Sequence[tuple[QuestionKind, float]]


@dataclass(frozen=True)
class Built:
    """What a stage came to: its folder, and its facts (accuracies, seconds)."""

    folder: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class Builder:
    """One demonstration in one folder.

    Attributes:
        folder: where everything goes.
        scale: every size and count.
        seed: of data and weights.
        device: where training runs.
        base: directory or GGUF file of the language model; None for the scale's own.
        upper: whether the upper bounds are trained, too.
        questions: whether the base learns the caption and the vision questions, in text, before it gets eyes. Without,
            the projector has to teach them, and becomes a prompt that no injection can overrule.
        several: the processes that train it together, of which the first one writes; by default there is just this one.
    """

    folder: Path
    scale: Scale
    seed: int
    device: torch.device
    base: str | None = None
    upper: bool = True
    questions: bool = True
    several: Team | None = None

    @cached_property
    def team(self) -> Team:
        return self.several or Team(self.device)

    @cached_property
    def world(self) -> World:
        return world(self.scale.name)

    @cached_property
    def pictures(self) -> Pictures:
        return pictures(self.world, self.scale, self.seed)

    @cached_property
    def examples(self) -> dict[str, list[HeldOut]]:
        return examples(self.world, self.pictures, self.seed)

    @cached_property
    def features(self) -> Tensor:
        tower = SiglipVisionModel.from_pretrained(self.folder / "stages" / "vision").to(self.device).eval()
        return all_patches(tower, self.pictures, self.device)

    def stages(self) -> dict[str, tuple[int, Callable[[Path, Callable[[int], None]], dict[str, Any]]]]:
        """By folder: steps, and what makes it."""
        scale = self.scale
        found: dict[str, Any] = {
            "base": (scale.base.steps if self._lessons else 0, self._base),
            "stages/vision": (scale.classify.steps, self._vision),
            "stages/projector": (scale.project.steps, self._projector),
            "vlm": (scale.gentle.steps, self._vlm),
        }
        for skill in SKILLS:
            found[f"experts/{skill}"] = (
                scale.experts[skill].steps,
                lambda d, t, s=skill: self._expert(s, d, t),
            )
        if self.upper:
            for skill in SKILLS:
                found[f"upper/{skill}"] = (scale.upper.steps, lambda d, t, s=skill: self._upper(s, d, t))
        found["suite"] = (0, self._suite)
        return found

    def build(self, report: Report | None = None) -> dict[str, Built]:
        """Make what is missing.

        Raises:
            AnchorsError: the folder holds another demonstration, or cannot be written.
        """
        if self.team.main:
            require_writable(self.folder)
        demand_own(self.folder / "demo.json", self._identity)
        stages = self.stages()
        total, before = sum(steps for steps, _ in stages.values()), 0
        built = {}
        for name, (steps, make) in stages.items():

            def told(done: int, name: str = name, before: int = before) -> None:
                if report is not None:
                    report(name, before + done, total)

            told(0)
            built[name] = self._stage(name, make, told)
            told(steps)
            before += steps
        return built

    def _stage(self, name: str, make: Callable, told: Callable[[int], None]) -> Built:
        """A stage's folder appears whole, or not at all."""
        target = self.folder / name
        mark = target / MARK
        self.team.demand_same(int(mark.is_file()), f"stages of {str(self.folder)!r}")
        if mark.is_file():
            facts = described(mark)
            # A suite written before there were upper bounds does not name them.
            if facts.get("upper", True) or not self.upper:
                return Built(target, facts)
        elif target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise AnchorsError(
                f"{str(target)!r} is there, but no stage of a demonstration; it would be overwritten.",
                "Choose another --out.",
                code="would-overwrite",
            )
        if self.team.main:
            target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=target.parent if self.team.main else None, prefix=".draft-"))
        wall, cpu = time.perf_counter(), time.process_time()
        # A stage's random numbers are its own, whichever stages ran before it.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed(name))
            try:
                with writing(target):
                    facts = make(draft, told)
                    facts |= {
                        "seconds": round(time.perf_counter() - wall, 1),
                        "cpu_seconds": round(time.process_time() - cpu, 1),
                    }
                    if self.team.main:
                        self._publish(draft, target, facts)
            except Interrupted:
                self._claim()
                raise
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return Built(target, facts)

    def _publish(self, draft: Path, target: Path, facts: dict[str, Any]) -> None:
        """Give a stage its name."""
        (draft / MARK).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        self._claim()
        if target.exists():
            shutil.rmtree(target)
        draft.chmod(0o755)  # mkdtemp makes private folders
        draft.rename(target)
        # Of this stage, or of one that was made from another one of these.
        for path in self.folder.glob(self._unfinished("*").name):
            path.unlink()

    def _saved(self, draft: Path, facts: dict[str, Any], *parts: Any) -> dict[str, Any]:
        """Models and what belongs to them, as others load them; returns the facts."""
        for part in parts if self.team.main else ():
            part.save_pretrained(draft)
        return facts

    def _unfinished(self, name: str) -> Path:
        """What is kept of a stage that a signal ended."""
        return self.folder / f"unfinished-{name}.safetensors"

    @property
    def _identity(self) -> dict[str, Any]:
        return {
            "scale": asdict(self.scale), "seed": self.seed, "base": self.base,
            "questions": self.questions,
        }  # fmt: skip

    def _claim(self) -> None:
        """Write down what this demonstration is, once there is something of it."""
        if self.team.main:
            claim(self.folder / "demo.json", provenance(**self._identity))

    def _seed(self, *names: str) -> int:
        """A seed of its own for everything that is drawn."""
        return int(np.random.SeedSequence([self.seed, *"/".join(names).encode()]).generate_state(1)[0])

    def _taught(
        self,
        name: str,
        model: PreTrainedModel,
        encoder: Encoder,
        tasks: Weighted,
        groups: Sequence[tuple[list[nn.Parameter], float]],
        stage: Stage,
        told: Callable[[int], None],
        *scenarios: str,
    ) -> dict[str, Any]:
        """Train on questions about train pictures, or about all scenes in words; how it fell, and what is answered then."""
        seen = encoder.image_id is not None
        rng = np.random.default_rng(self._seed(name, "rows"))
        if seen:
            scenes = [(self.pictures.scenes[i], i) for i in self.pictures.of("train")]
        else:
            scenes = [(scene, None) for scene in self.world.scenes()]
        drawn = [
            drawn_rows(tasks, scenes, shots + 1, self.scale.rows, rng) for shots in self.scale.shots if tasks
        ]
        facts = {}
        if drawn:
            pools = [encoder.prompts(rows).to(self.device) for rows in drawn]
            chosen = {id(p) for own, _ in groups for p in own}
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in chosen)
            draw = batches(pools, stage, self._seed(name, "batches"), self.team)
            model.train()
            facts["loss"] = fit(
                groups,
                lambda step: answer_loss(model, draw(step), self.features if seen else None),
                stage,
                self.scale,
                told,
                self._unfinished(name),
                self.team,
                lambda step: (draw(step).targets != IGNORED).sum(),
            )
            model.eval()
        return {"seen" if seen else "text": self._accuracy(model, encoder, *scenarios)} | facts

    def _accuracy(self, model: PreTrainedModel, encoder: Encoder, *scenarios: str) -> dict[str, float]:
        """Exact match on the test examples; a language model is asked about the words."""
        found = {}
        seen = encoder.image_id is not None
        for scenario in scenarios:
            items = [e.item for e in self.examples[scenario] if e.split == "test"]
            if not seen:
                items = [Item(item.scene, item.asked) for item in items]
            prompts = encoder.prompts([[item] for item in items]).to(self.device)
            share = right(model, prompts, self.features if seen else None).float().mean()
            found[scenario] = round(float(share), 4)
        return found

    @property
    def _plain(self) -> list[tuple[QuestionKind, float]]:
        """The caption and the vision questions; the caption is asked as often as all others together."""
        own = self.world.vision
        return [(self.world.caption, float(len(own))), *((task, 1.0) for task in own)]

    def _load_base(self) -> tuple[PreTrainedModel, Any]:
        place = self.folder / "base"
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        return model.to(self.device), AutoTokenizer.from_pretrained(place)

    def _load_seeing(self) -> tuple[LlavaForConditionalGeneration, Any]:
        """The base, given eyes that have learnt to see, and a projector that has learnt nothing."""
        vision = SiglipVisionModel.from_pretrained(self.folder / "stages" / "vision")
        model, processor = models.with_eyes(self.scale, *self._load_base(), vision)
        return model.to(self.device), processor

    @property
    def _lessons(self) -> list[tuple[QuestionKind, float]]:
        """What the base is taught."""
        lore, plain = self.world.lore, self._plain
        words = [(task, len(plain) / len(lore)) for task in lore]
        return [*plain, *words] if self.questions else words

    def _base(self, draft: Path, told: Callable[[int], None]) -> dict[str, Any]:
        if self.scale.language is None:
            model, tokenizer = models.given_language_model(self.base)
        else:
            tokenizer = models.tiny_tokenizer(self.world)
            model = models.new_language_model(self.scale, tokenizer, context=256)
        model.to(self.device).eval()
        encoder, stage = Encoder(self.world, tokenizer), self.scale.base
        groups = [(list(model.parameters()), stage.lr)]
        facts = self._taught("base", model, encoder, self._lessons, groups, stage, told, "vision", *SKILLS)
        return self._saved(draft, facts, model, tokenizer)

    def _vision(self, draft: Path, told: Callable[[int], None]) -> dict[str, Any]:
        """The vision tower learns to tell number, shape and colour."""
        tower = SiglipVisionModel(models.vision_config(self.scale)).to(self.device)
        classes, sizes = facts_of(self.pictures)
        reader = Classifier(self.scale.vision.width, sizes).to(self.device)
        train = torch.tensor(self.pictures.of("train"))
        pixels = torch.from_numpy(self.pictures.pixels).to(self.device)
        classes, stage = classes.to(self.device), self.scale.classify
        generator = torch.Generator().manual_seed(self._seed("vision", "batches"))
        drawn = torch.randint(len(train), (stage.steps, stage.items), generator=generator)
        rows = train[drawn[:, self.team.share(stage.items)]].to(self.device)

        def loss(step: int) -> Tensor:
            read = reader(patches(tower, pixels[rows[step]]))
            wanted = classes[rows[step]]
            return reduce(
                torch.add, [F.cross_entropy(own.float(), wanted[:, i]) for i, own in enumerate(read)]
            )

        # The projector is given what stands before the last norm.
        reached = [p for name, p in tower.named_parameters() if "post_layernorm" not in name]
        groups, own = [([*reached, *reader.parameters()], stage.lr)], rows.shape[1]
        curve = fit(
            groups, loss, stage, self.scale, told, self._unfinished("vision"), self.team, lambda _: own
        )
        tower.eval()
        test = torch.tensor(self.pictures.of("test"), device=self.device)
        with torch.no_grad():
            read = reader(patches(tower, pixels[test]))
        hits = torch.stack([own.argmax(-1) == classes[test][:, i] for i, own in enumerate(read)])
        facts = {"classified": round(float(hits.all(0).float().mean()), 4), "loss": curve}
        return self._saved(draft, facts, tower)

    def _projector(self, draft: Path, told: Callable[[int], None]) -> dict[str, Any]:
        """The projector learns to speak to a language model that stays as it is."""
        model, processor = self._load_seeing()
        encoder, stage = self._seeing(model, processor), self.scale.project
        groups = [(list(model.model.multi_modal_projector.parameters()), stage.lr)]
        facts = self._taught("projector", model, encoder, self._plain, groups, stage, told, "vision")
        save_file(model.model.multi_modal_projector.state_dict(), draft / "projector.safetensors")
        return facts

    def _vlm(self, draft: Path, told: Callable[[int], None]) -> dict[str, Any]:
        """Projector and language tower together, gently."""
        model, processor = self._load_seeing()
        projector = load_file(self.folder / "stages" / "projector" / "projector.safetensors")
        model.model.multi_modal_projector.load_state_dict(projector)
        encoder, stage = self._seeing(model, processor), self.scale.gentle
        groups = self._both(model, stage)
        facts = self._taught("vlm", model, encoder, self._plain, groups, stage, told, "vision", *SKILLS)
        return self._saved(draft, facts, model, processor)

    def _expert(self, skill: str, draft: Path, told: Callable[[int], None]) -> dict[str, Any]:
        """A skill, from texts only."""
        model, tokenizer = self._load_base()
        encoder, stage = Encoder(self.world, tokenizer), self.scale.experts[skill]
        tasks, groups = self._mixed(skill, self.scale.replay), [(list(model.parameters()), stage.lr)]
        facts = self._taught(skill, model, encoder, tasks, groups, stage, told, skill, "vision")
        return self._saved(draft, facts, model, tokenizer)

    def _upper(self, skill: str, draft: Path, told: Callable[[int], None]) -> dict[str, Any]:
        """What training on pictures with the skill would reach."""
        place = self.folder / "vlm"
        model = LlavaForConditionalGeneration.from_pretrained(place, dtype=torch.float32).to(self.device)
        processor = AutoProcessor.from_pretrained(place)
        encoder, stage = self._seeing(model, processor), self.scale.upper
        tasks, groups = self._mixed(skill, self.scale.vision_replay), self._both(model, stage)
        facts = self._taught(f"upper-{skill}", model, encoder, tasks, groups, stage, told, skill, "vision")
        return self._saved(draft, facts, model, processor)

    def _suite(self, draft: Path, told: Callable[[int], None]) -> dict[str, Any]:
        found: dict[str, Any] = {
            "vlm": "../vlm",
            "base": "../base",
            "experts": {skill: f"../experts/{skill}" for skill in SKILLS},
        }
        if self.upper:
            found["upper"] = {skill: f"../upper/{skill}" for skill in SKILLS}
        name = f"{self.scale.name}-{self.seed}"
        write_suite(draft, name, self.world, self.pictures, self.examples, self.seed, found)
        return {"examples": sum(map(len, self.examples.values())), "upper": self.upper}

    def _seeing(self, model: LlavaForConditionalGeneration, processor: Any) -> Encoder:
        image_id = model.config.image_token_index
        return Encoder(self.world, processor.tokenizer, image_id, self.scale.tokens)

    def _mixed(self, skill: str, replay: float) -> list[tuple[QuestionKind, float]]:
        """A skill's questions, and plain ones as a share of all."""
        own = self.world.skills[skill]
        mixed = [(task, (1 - replay) / len(own)) for task in own]
        whole = sum(weight for _, weight in self._plain)
        return mixed + [(task, replay * weight / whole) for task, weight in self._plain if replay]

    @staticmethod
    def _both(model: LlavaForConditionalGeneration, stage: Stage) -> list[tuple[list[nn.Parameter], float]]:
        """Projector and language tower with their rates."""
        language = [*model.model.language_model.parameters()]
        if not model.config.tie_word_embeddings:
            language += model.lm_head.parameters()
        return [(list(model.model.multi_modal_projector.parameters()), stage.lr), (language, stage.lm_lr)]
