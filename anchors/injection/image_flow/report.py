"""Information flow and accuracy of merged models over λ: measured, kept, summarised.

One unit of work is one strength of one expert on one scenario; its rows are written at once, and running the same command
again computes only what no file holds yet.
"""

import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from anchors.attention.layers import beside_attention
from anchors.errors import AnchorsError
from anchors.injection.asking.evaluate import Prepared, prepare, score
from anchors.injection.asking.suite import Suite
from anchors.injection.asking.vlm import VisionLanguageModel, load_vlm
from anchors.injection.image_flow.flow import ImageBatch, collate, demand, image_flow
from anchors.injection.image_flow.prompts import ImagePrompts, image_prompts, own_answers
from anchors.injection.image_flow.rows import GOLD, IDENTITY, KIND, NOBODY, OWN, ROWS, VERSION, MeasuredFlow
from anchors.injection.merging.memory import TaskVectors, inject
from anchors.injection.merging.recipe import Recipe
from anchors.injection.suites import SuiteModels, gap, require_siblings
from anchors.model.identity import software
from anchors.model.loading import Origin, configuration
from anchors.study.engine import Lot, Progress, Spent, Stretch, Unit, carry_out, demand_same, silent, told
from anchors.study.plan import PROMPTS, held_bytes, sampled
from anchors.study.results import Run

BATCH = {"cpu": 16, "cuda": 64}


@dataclass(frozen=True)
class Wanted:
    """What is measured.

    Attributes:
        recipe: how experts are injected; its strength is replaced by each of `strengths`.
        strengths: λ_e, ascending; 0 is always measured, too.
        shots: demonstrations of a prompt.
        prompts: of each scenario, for the flow.
        examples: test examples of each scenario, at most, for the accuracy.
        scenarios: which; None is all. An expert is measured on its own scenario and on the vision scenario.
        experts: which; None is all.
        seed: of the drawing of demonstrations.
    """

    recipe: Recipe
    strengths: tuple[float, ...]
    shots: int = 2
    prompts: int = 100
    examples: int = 300
    scenarios: tuple[str, ...] | None = None
    experts: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        found = tuple(sorted({*self.strengths, 0.0}))
        if len(found) < 2 or found[0] < 0:
            raise AnchorsError(
                f"Strengths of {','.join(f'{x:g}' for x in self.strengths)}: there must be a λ above 0 and none below.",
                "For example: --strengths 0,0.5,1",
                code="option-value",
            )
        object.__setattr__(self, "strengths", found)

    def of(self, suite: Suite) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The scenarios and experts of a suite that are measured.

        Raises:
            AnchorsError: it lacks one of them.
        """
        scenarios = self.scenarios or tuple(suite.scenarios)
        experts = self.experts or suite.skills
        for what, names, there in (
            ("scenario", scenarios, tuple(suite.scenarios)),
            ("expert", experts, suite.skills),
        ):
            if unknown := [name for name in names if name not in there]:
                raise AnchorsError(
                    f"The suite {suite.name!r} has no {what} {unknown[0]!r}.",
                    f"It has: {', '.join(there)}.",
                    code="unknown-name",
                )
        return scenarios, experts

    def plan(self, suite: Suite) -> dict[str, list[tuple[str, str, float]]]:
        """By expert (or nobody): the scenarios, whose answers, and strengths to measure."""
        scenarios, experts = self.of(suite)
        found: dict[str, list[tuple[str, str, float]]] = {name: [] for name in (NOBODY, *experts)}
        for scenario in scenarios:
            for labels in (GOLD, OWN) if scenario == suite.vision else (GOLD,):
                found[NOBODY].append((scenario, labels, 0.0))
                for expert in experts:
                    if scenario in (suite.vision, expert):
                        found[expert] += [(scenario, labels, s) for s in self.strengths if s != 0]
        return found


def measure(
    suites: Sequence[Suite],
    wanted: Wanted,
    *,
    out: Path,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress = silent,
) -> MeasuredFlow:
    """Flow and accuracy of all suites, experts and strengths.

    Args:
        suites: of one experiment; they differ in the seed of their training.
        wanted: what is measured.
        out: results folder.
        device, precision: as in `load_vlm`.
        progress: called with (units done, units in all).

    Raises:
        AnchorsError: suites of one seed or with other scenarios, models that do not fit, prompts that cannot be drawn.
    """
    ratios: list[dict[str, Any]] = []
    rows, runs = carry_out(
        stretches(suites, wanted, ratios, device=device, precision=precision), out, progress
    )
    configs = [run.config for run in runs]
    towers = [
        configuration(Origin(str(suite.model("vlm")), suite.name)).get_text_config() for suite in suites
    ]
    notes = [*told(runs), *dict.fromkeys(filter(None, map(beside_attention, towers)))]
    return MeasuredFlow(rows, pd.DataFrame(ratios), suites[0].vision, configs, tuple(notes))


def stretches(
    suites: Sequence[Suite], wanted: Wanted, ratios: list[dict[str, Any]], *, device: str, precision: str
) -> Iterator[Stretch]:
    """The work, a suite and an expert at a time; only one suite's VLM and one expert are held.

    Args:
        suites, wanted, device, precision: as in `measure`.
        ratios: gets `norm_ratio` of every seed and expert.

    Raises:
        AnchorsError: see `measure`.
    """
    require_siblings(suites, wanted.of)
    total = sum(len(units) for suite in suites for units in wanted.plan(suite).values())
    for suite in suites:
        world = FlowModels(
            suite, wanted, load_vlm(suite.model("vlm"), device=device, precision=precision, routed=True)
        )
        for expert, units in wanted.plan(suite).items():
            vectors, prints = world.vectors(expert)
            if vectors is not None:
                ratios.append({"seed": suite.seed, "expert": expert, "ratio": norm_ratio(world.vlm, vectors)})
            keys = [(suite.seed, expert, *unit) for unit in units]
            lots = world.lots(vectors, keys)
            yield Stretch(
                world.config(expert, prints), keys, lambda _, lots=lots: lots, world.vlm.name, IDENTITY,
                anew=partial(_lots_of, suite, wanted, world.vlm.precision, expert, keys),
                certify=world.certify, total=total, task=expert, cost=world.cost,
                memory=lambda vlm=world.vlm, others=[] if vectors is None else 2 * [world.base]: sum(map(held_bytes, [vlm, *others])),
            )  # fmt: skip
            del vectors, lots
            gc.collect()


def _lots_of(
    suite: Suite, wanted: Wanted, precision: str, expert: str, units: list[Unit], run: Run, device: str
) -> list[Lot]:
    """The lots of a stretch, in another process."""
    vlm = load_vlm(suite.model("vlm"), device=device, precision=precision, routed=True)
    world = FlowModels(suite, wanted, vlm)
    vectors, prints = world.vectors(expert)
    demand_same(run, world.config(expert, prints))
    return world.lots(vectors, units)


def norm_ratio(vlm: VisionLanguageModel, vectors: TaskVectors) -> float:
    """‖τ_v‖ / ‖τ_e‖: how far the VLM went from the base, over how far the expert went."""
    own = dict(vlm.model.named_parameters(remove_duplicate=False))
    return gap(vectors, own) / gap(vectors, vectors.expert)


@dataclass(frozen=True)
class FlowModels(SuiteModels):
    """A suite with its VLM on the seam; what is encoded is kept."""

    @cached_property
    def _kept(self) -> dict[Any, Any]:
        return {}

    def vectors(self, expert: str) -> tuple[TaskVectors | None, dict[str, Any]]:
        """The task vectors of an expert, and the identities of the models they are made of."""
        if expert == NOBODY:
            return None, {}
        model = self.language_model("experts", expert)
        prints = {"base": dict(self.base.identity.parts), "expert": dict(model.identity.parts)}
        return self.task_vectors(model, expert), prints

    def config(self, expert: str, prints: dict[str, Any]) -> dict[str, Any]:
        """What the rows depend on, beside the unit."""
        suite, wanted = self.suite, self.wanted
        asked = {suite.vision, *([expert] if expert != NOBODY else wanted.of(suite)[0])}
        return {
            "kind": KIND, "version": VERSION, "suite": suite.name, "seed": suite.seed, "name": expert,
            "vlm": dict(self.vlm.identity.parts), "software": software(), "precision": self.vlm.precision, "shots": wanted.shots,
            "prompts": wanted.prompts, "examples": wanted.examples, "drawing": wanted.seed, "separator": suite.separator,
            "data": {name: suite.fingerprint(suite.examples(name, None)) for name in sorted(asked)},
            "label_words": {name: _labels(suite, name) for name in sorted(asked)},
            **prints, **({"recipe": replace(wanted.recipe, strength=1.0).as_dict()} if prints else {}),
        }  # fmt: skip

    def lots(self, vectors: TaskVectors | None, units: list[Unit]) -> list[Lot]:
        """Units of an expert as work."""
        return [Lot(units, lambda: vectors, self.kept, _too_large)]

    def kept(self, vectors: TaskVectors | None, units: Sequence[Unit]) -> pd.DataFrame:
        """The rows of one unit, with the columns that name it."""
        ((seed, expert, *unit),) = units
        named = dict(zip(IDENTITY, (seed, expert, *unit), strict=True))
        return self.measure(vectors, *unit).assign(**named)[ROWS]

    def measure(
        self, vectors: TaskVectors | None, scenario: str, labels: str, strength: float
    ) -> pd.DataFrame:
        """The rows of one unit: columns number, layer, metric, value."""
        # What the VLM says by itself must be known before it is injected.
        batches = self.batches(scenario, labels)
        asked = self.asked(scenario) if labels == GOLD else None
        held = nullcontext() if vectors is None else inject(
            self.vlm.model, vectors, self.wanted.recipe, strength
        )  # fmt: skip
        with held:
            parts = [_rows(self.vlm, batch, numbers) for batch, numbers in batches]
            if asked is not None:
                table = score(self.vlm, asked)
                parts.append(
                    pd.DataFrame(
                        {
                            "number": table["number"],
                            "layer": -1,
                            "metric": "accuracy",
                            "value": table["correct"] * 1.0,
                        }
                    )
                )
        return pd.concat(parts, ignore_index=True)

    def cost(self, units: Sequence[Unit]) -> Spent:
        """About what units take, the merges themselves left out: of a few prompts it is measured."""
        total = Spent()
        for _, _, scenario, labels, _ in units:
            prompt, question, ahead = self._each(scenario)
            tests = len(self.suite.examples(scenario, "test"))
            flow = prompt * min(tests, self.wanted.prompts)
            asked = min(tests, self.wanted.examples)
            total += flow + question * asked if labels == GOLD else flow
            if (new := ("foretold", scenario, labels)) not in self._kept:  # what all units of it share
                self._kept[new] = True
                total += ahead * asked if labels == GOLD else flow + self._saying(scenario)
        return total

    def _each(self, scenario: str) -> tuple[Spent, Spent, Spent]:
        """Of a scenario what a prompt takes, a question whose image is known, and a question."""
        key = ("each", scenario)
        if key not in self._kept:
            vlm, suite, wanted = self.vlm, self.suite, self.wanted
            drawn = image_prompts(
                vlm, suite, scenario, shots=wanted.shots, count=PROMPTS, seed=wanted.seed
            ).prompts
            batch, few = collate(vlm, drawn), suite.examples(scenario, "test", PROMPTS)
            kept = prepare(vlm, suite, few, features=True)
            tokens = sum(int(b.inputs["attention_mask"].sum()) for b in kept.batches)
            self._kept[key] = (
                sampled(lambda: image_flow(vlm, batch), int((batch.target + 1).sum()), len(drawn), vlm),
                sampled(lambda: score(vlm, kept), tokens, len(few), vlm),
                sampled(lambda: prepare(vlm, suite, few, features=True), tokens, len(few), vlm),
            )
        return self._kept[key]

    def _saying(self, scenario: str) -> Spent:
        """What it takes to have the VLM answer the demonstrations of a scenario itself."""
        if not self.wanted.shots:
            return Spent()
        vlm, suite = self.vlm, self.suite
        few = suite.examples(scenario, "demonstration", PROMPTS)
        said = sampled(lambda: own_answers(vlm, suite, scenario, limit=PROMPTS), 0, len(few), vlm)
        return said * len(suite.examples(scenario, "demonstration"))

    def asked(self, scenario: str) -> Prepared:
        """Test examples of a scenario without demonstrations, to be answered."""
        key = ("asked", scenario)
        if key not in self._kept:
            examples = self.suite.examples(scenario, "test", self.wanted.examples)
            self._kept[key] = prepare(self.vlm, self.suite, examples, features=True)
        return self._kept[key]

    def certify(self) -> None:
        """Hold the VLM against itself as it came, on the shortest and the longest prompt of every scenario; once.

        Raises:
            CertificateError: see `demand`.
        """
        if not self._kept.get("certified"):
            for scenario, labels, _ in self.wanted.plan(self.suite)[NOBODY]:
                by_length = sorted(self.drawn(scenario, labels).prompts, key=lambda prompt: len(prompt.text))
                demand(self.vlm, [by_length[0], by_length[-1]])
            self._kept["certified"] = True

    def drawn(self, scenario: str, labels: str) -> ImagePrompts:
        """Prompts of a scenario."""
        key = ("drawn", scenario, labels)
        if key not in self._kept:
            own = labels == OWN
            said = own_answers(self.vlm, self.suite, scenario) if own and self.wanted.shots else {}
            self._kept[key] = image_prompts(
                self.vlm, self.suite, scenario, shots=self.wanted.shots, count=self.wanted.prompts,
                seed=self.wanted.seed, said=said if own else None,
            )  # fmt: skip
        return self._kept[key]

    def batches(self, scenario: str, labels: str) -> list[tuple[ImageBatch, list[int]]]:
        """Encoded prompts of a scenario, and the numbers of their queries."""
        key = (scenario, labels)
        if key not in self._kept:
            self._kept[key] = [
                (self._answered(collate(self.vlm, part)), [p.number for p in part])
                for part in _parts(
                    self.drawn(scenario, labels), BATCH.get(self.vlm.device.type, BATCH["cpu"])
                )
            ]
        return self._kept[key]

    def _answered(self, batch: ImageBatch) -> ImageBatch:
        """With the VLM's own answer where nobody knows a better one."""
        if (batch.answer >= 0).all():
            return batch
        return replace(batch, answer=image_flow(self.vlm, batch).answer.to(batch.answer.device))


def _too_large(unit: Unit | None) -> AnchorsError:
    return AnchorsError(
        "The prompts and their gradients do not fit into memory.",
        "Use fewer --shots, or another --device.",
        code="memory",
    )


def _labels(suite: Suite, scenario: str) -> str:
    """Digest of the examples' labels: they say where label words stand, and a suite's fingerprint is without them."""
    labels = [e.label for e in suite.examples(scenario, None)]
    return hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:16]


def _parts(drawn: ImagePrompts, size: int) -> Iterator[list[Any]]:
    ordered = sorted(drawn.prompts, key=lambda prompt: len(prompt.text))
    yield from (ordered[i : i + size] for i in range(0, len(ordered), size))


def _rows(vlm: VisionLanguageModel, batch: ImageBatch, numbers: Sequence[int]) -> pd.DataFrame:
    found = image_flow(vlm, batch)
    layers = vlm.layers
    tables = [
        pd.DataFrame(x.numpy(), index=pd.Index(numbers, name="number"), columns=layers)
        .rename_axis(columns="layer")
        .stack()
        .rename("value")
        .reset_index()
        .assign(metric=name)
        for name, x in found.sums.items()
    ]
    whole = {
        "loss": found.loss, "surprise": found.surprise, "right": (found.predicted == found.answer).double(),
        "identity_error": found.identity_error.max().expand(len(numbers)),
    }  # fmt: skip
    tables += [
        pd.DataFrame({"number": numbers, "layer": -1, "metric": name, "value": x.double().numpy()})
        for name, x in whole.items()
    ]
    return pd.concat(tables, ignore_index=True)
