"""Inject every expert of a suite with every setting of a grid, and ask what the VLM can do then and what it forgot.

One unit of work is one setting of one scenario and one suite: the VLM is asked the scenario's questions on the right
image, on a grey one and on another example's, and the questions of the vision scenario. Its rows are written at once;
running the same sweep again, or a larger one, computes only what no file holds yet.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from anchors.digest import file_digest, text_digest
from anchors.errors import AnchorsError, nearest
from anchors.injection.asking.evaluate import (
    Prepared,
    captions,
    demand_alone,
    evaluate,
    evaluate_text,
    prepare,
    score,
)
from anchors.injection.asking.suite import Example, Shown, Suite
from anchors.injection.asking.vlm import load_vlm
from anchors.injection.merging.checkpoint import Checkpoint
from anchors.injection.merging.memory import TaskVectors, inject
from anchors.injection.merging.recipe import Recipe
from anchors.injection.suites import SuiteModels, gap, require_siblings
from anchors.injection.sweeping.grid import Grid, facts_of, setting_of
from anchors.injection.sweeping.tables import ORACLE, REFERENCE, RETENTION, VLM, chosen_apart
from anchors.model.identity import software
from anchors.model.language import LanguageModel
from anchors.study.engine import Lot, Progress, Spent, Stretch, Unit, carry_out, demand_same, silent, told
from anchors.study.plan import held_bytes, sampled, spread
from anchors.study.results import Run

KIND = "inject-sweep"
VERSION = 1
IDENTITY = ("seed", "scenario", "setting", "mask")
ROWS = [*IDENTITY, "condition", "split", "kind", "number", "correct"]
CONTROLS: tuple[Shown, ...] = ("blank", "shuffled")
BASE, CASCADE, UPPER = "base text", "cascade", "upper bound"
REFERENCES = {
    VLM: "the VLM before injection",
    ORACLE: "the expert, told in words what the image shows",
    BASE: "the base LLM, told the same",
    CASCADE: "the VLM describes the image, the expert answers",
    UPPER: "the VLM, fine-tuned on the scenario",
}
"""What every setting is compared with, measured once."""


@dataclass(frozen=True)
class Sweep:
    """What is measured.

    Attributes:
        grid: the settings.
        scenarios: which skills; None is all that have an expert.
        split: on which results are reported; settings are chosen on `tune` where the scenario and vision both have one.
        limit: at most so many examples of each split.
        controls: blank and shuffled images at every setting, not only for the VLM alone.
        batch: prompts at once; None chooses by their length.
        retention: the share of the VLM's vision that a setting must keep to be chosen; the rows do not depend on it.
        portion: (i, n) is every n-th setting of a scenario from the i-th on: a cell of a sweep that is shared out.
    """

    grid: Grid = field(default_factory=Grid)
    scenarios: tuple[str, ...] | None = None
    split: str = "test"
    limit: int | None = None
    controls: bool = True
    batch: int | None = None
    retention: float = RETENTION
    portion: tuple[int, int] = (0, 1)

    def skills(self, suite: Suite) -> tuple[str, ...]:
        """The scenarios of a suite that are swept.

        Raises:
            AnchorsError: it has no expert for one of them.
        """
        if self.scenarios is not None and not self.scenarios:
            raise AnchorsError(
                "No scenario is named to be swept.",
                f"Leave it out for all, or name some of: {', '.join(suite.skills)}.",
                code="option-value",
            )
        if unknown := [s for s in self.scenarios or () if s not in suite.skills]:
            raise AnchorsError(
                f"The suite {suite.name!r} has no expert for {unknown[0]!r}.",
                nearest(unknown[0], suite.skills),
                code="unknown-name",
            )
        return self.scenarios or suite.skills

    def examples(self, suite: Suite, scenario: str) -> tuple[Example, ...]:
        """The examples of `tune`, where there are any, and of the split that is reported on.

        Raises:
            AnchorsError: there are none of that.
        """
        tune = any(e.split == "tune" for e in suite.scenarios[scenario])
        wanted = dict.fromkeys([*["tune"] * tune, self.split])
        return tuple(e for split in wanted for e in suite.examples(scenario, split, self.limit))


@dataclass(frozen=True)
class Swept:
    """What a sweep found.

    Attributes:
        rows: columns seed, scenario, setting, mask, condition, split, kind, number, correct: one per answer. Conditions
            are skill, blank and shuffled (the scenario's questions) and vision (those of the vision scenario).
        settings: one row per seed, scenario, setting and mask: its recipe, tensors changed, norm ‖m − v‖, `relative`
            (the norm over ‖v‖ of what changed) and `dose`: the norm over ‖τ_e‖, so that task arithmetic's is λ_e. ‖τ_e‖
            is without embedding and head, the norm is of all that changed: where embeddings are merged, too, the dose
            of task arithmetic is larger than λ_e.
        configs: what the rows depend on, one per suite and scenario.
        notes: what a reader must know.
    """

    rows: pd.DataFrame
    settings: pd.DataFrame
    configs: list[dict[str, Any]]
    notes: list[str]


def sweep(
    suites: Sequence[Suite],
    wanted: Sweep,
    *,
    out: Path,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress = silent,
) -> Swept:
    """Measure all settings on all suites.

    Args:
        suites: of one experiment; they differ in the seed of their training.
        wanted: what is measured.
        out: results folder; finished settings are kept under its `runs`.
        device, precision: as in `load_vlm`.
        progress: called with (settings done, settings in all).

    Raises:
        AnchorsError: suites that do not belong together, models that do not fit, no memory.
    """
    recipes: list[Recipe] = []
    _, notes = _shared_references(suites, wanted)
    work = stretches(suites, wanted, recipes, device=device, precision=precision)
    rows, runs = carry_out(work, out, progress)
    return _swept(rows, recipes, [run.config for run in runs], wanted.split, notes + told(runs))


def stretches(
    suites: Sequence[Suite], wanted: Sweep, recipes: list[Recipe], *, device: str, precision: str
) -> Iterator[Stretch]:
    """The work of a sweep, a suite and a scenario at a time; only one suite's VLM is held.

    Args:
        suites, wanted, device, precision: as in `sweep`.
        recipes: gets the settings of the grid once the first VLM is known.

    Raises:
        AnchorsError: suites that do not belong together, models that do not fit.
    """
    references, _ = _shared_references(suites, wanted)
    for suite in suites:
        world = SweepModels(suite, wanted, load_vlm(suite.model("vlm"), device=device, precision=precision))
        own = wanted.grid.recipes(world.vlm.n_layers)
        if recipes and tuple(recipes) != own:
            raise AnchorsError(
                "The suites' VLMs differ in their layers: they are not one experiment.", code="mixed"
            )
        recipes[:] = own
        total = len(suites) * sum(len(names) + len(own) for names in references.values())
        for skill in wanted.skills(suite):
            named = [(name, 0, name) for name in references[skill]]
            every = [*named, *((setting_of(r), r.seed, r) for r in own)]
            units = {
                (suite.seed, skill, setting, mask): what
                for setting, mask, what in every[wanted.portion[0] :: wanted.portion[1]]
            }
            if units:
                yield _stretch(world, skill, units, total)
        del world  # before the next VLM comes


def _stretch(world: "SweepModels", skill: str, units: dict[Unit, Recipe | str], total: int) -> Stretch:
    bench = Bench(world, skill, world.language_model("experts", skill))
    anew = partial(_lots_of, world.suite, world.wanted, world.vlm.precision, skill, units)
    return Stretch(
        bench.config(), list(units), lambda _: bench.lots(units), world.vlm.name, IDENTITY, anew=anew,
        certify=lambda: demand_alone(world.vlm, world.suite, bench.examples), total=total, task=skill,
        cost=lambda left: bench.cost([units[unit] for unit in left]),
        memory=lambda: sum(map(held_bytes, (world.vlm, world.base, bench.expert))),
    )  # fmt: skip


def _lots_of(
    suite: Suite,
    wanted: Sweep,
    precision: str,
    skill: str,
    units: dict[Unit, Recipe | str],
    run: Run,
    device: str,
) -> list[Lot]:
    """The lots of a stretch, in another process."""
    world = SweepModels(suite, wanted, load_vlm(suite.model("vlm"), device=device, precision=precision))
    bench = Bench(world, skill, world.language_model("experts", skill))
    demand_same(run, bench.config())
    return bench.lots(units)


def _too_large(unit: Unit | None) -> AnchorsError:
    return AnchorsError(
        "The prompts do not fit into memory.", "Use a smaller --batch, or --limit.", code="memory"
    )


@dataclass(frozen=True)
class SweepModels(SuiteModels):
    """A suite with its VLM, not on the seam; what is encoded is kept."""

    @cached_property
    def vision(self) -> Prepared:
        """The questions that the VLM could answer before."""
        return self.prepared(self.suite.vision, "own")

    def prepared(self, scenario: str, image: Shown) -> Prepared:
        """Prompts of a scenario with what the vision tower makes of their images."""
        examples = self.wanted.examples(self.suite, scenario)
        return prepare(self.vlm, self.suite, examples, image, self.wanted.batch, features=True)


@dataclass(frozen=True)
class Bench:
    """One scenario of a suite, with its expert.

    Attributes:
        world: of the suite.
        skill: the scenario.
        expert: the language model that has the skill.
    """

    world: SweepModels
    skill: str
    expert: LanguageModel

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        return self.world.wanted.examples(self.world.suite, self.skill)

    @cached_property
    def prepared(self) -> dict[str, Prepared]:
        """Prompts by condition."""
        shown: dict[str, Shown] = {"skill": "own", **{name: name for name in CONTROLS}}
        return {name: self.world.prepared(self.skill, image) for name, image in shown.items()}

    @cached_property
    def vectors(self) -> TaskVectors:
        return self.world.task_vectors(self.expert, self.skill)

    @cached_property
    def size(self) -> float:
        """‖τ_e‖ over the tower without embedding and head."""
        return gap(self.vectors, self.vectors.expert)

    def config(self) -> dict[str, Any]:
        """What the rows depend on, beside the setting."""
        world, suite = self.world, self.world.suite
        vision = world.wanted.examples(suite, suite.vision)
        return {
            "kind": KIND, "version": VERSION, "suite": suite.name, "seed": suite.seed, "scenario": self.skill,
            "vlm": dict(world.vlm.identity.parts), "base": dict(world.base.identity.parts),
            "expert": dict(self.expert.identity.parts), "software": software(),
            "upper": _upper(suite.model("upper", self.skill)) if suite.has("upper", self.skill) else None,
            "precision": world.vlm.precision, "controls": world.wanted.controls, "split": world.wanted.split,
            "examples": suite.fingerprint(self.examples), "vision": suite.fingerprint(vision),
        }  # fmt: skip

    def lots(self, units: dict[Unit, Recipe | str]) -> list[Lot]:
        """Settings and references as work."""

        def one(_: None, part: Sequence[Unit]) -> pd.DataFrame:
            (unit,) = part
            return self.measure(units[unit]).assign(**dict(zip(IDENTITY, unit, strict=True)))

        return [Lot(list(units), lambda: None, one, _too_large)]

    def measure(self, what: Recipe | str) -> pd.DataFrame:
        """The rows of one setting or reference, without the columns that name it."""
        if isinstance(what, str):
            return self._reference(what).assign(changed=0, norm=0.0, relative=0.0, dose=0.0)
        with inject(self.world.vlm.model, self.vectors, what) as injected:
            rows = self._answers(controls=self.world.wanted.controls)
        return rows.assign(
            changed=injected.changed,
            norm=injected.norm,
            relative=injected.relative,
            dose=injected.norm / self.size,
        )

    def cost(self, left: Sequence[Recipe | str]) -> Spent:
        """About what settings and references take, the merges themselves left out: of a few prompts it is measured."""
        world, batch = self.world, self.world.wanted.batch
        vlm, suite, named = world.vlm, world.suite, [what for what in left if isinstance(what, str)]
        vision = len(_different(suite, world.wanted.examples(suite, suite.vision)))
        own = _different(suite, self.examples)
        few = spread(own, lambda e: len(suite.prompt(e) + suite.written(e)))
        kept = prepare(vlm, suite, few, "own", batch, features=True)
        tokens = sum(int(b.inputs["attention_mask"].sum()) for b in kept.batches)
        texts = [vlm.tokenizer(suite.prompt(e, e.text) + suite.written(e))["input_ids"] for e in few]

        def each(run: Callable[[], object], size: int = tokens) -> Spent:
            return sampled(run, size, len(few), vlm)

        every = 2 * len(own) + len(_different(suite, self.examples, blank=True)) + vision
        once = every if world.wanted.controls else len(own) + vision
        asked = (len(left) - len(named)) * once + every * (VLM in named)
        cost = each(lambda: score(vlm, kept)) * asked if asked else Spent()
        # Images go through the vision tower once for all settings, and once for the fine-tuned VLM.
        if whole := every * (bool(asked) + (UPPER in named)):
            cost += each(lambda: evaluate(vlm, suite, few, batch=batch)) * whole
        if told := len({ORACLE, BASE, CASCADE} & {*named}):
            read = each(lambda: evaluate_text(world.base, suite, few, batch=batch), sum(map(len, texts)))
            cost += read * (told * len(own))
        if CASCADE in named:
            cost += each(lambda: captions(vlm, suite, few, batch)) * len({e.image for e in self.examples})
        return cost

    def _answers(self, controls: bool) -> pd.DataFrame:
        """What the VLM answers as it is now."""
        asked = {name: p for name, p in self.prepared.items() if controls or name not in CONTROLS}
        return self._rows(
            {name: score(self.world.vlm, p) for name, p in (asked | {"vision": self.world.vision}).items()}
        )

    def _reference(self, name: str) -> pd.DataFrame:
        suite, batch = self.world.suite, self.world.wanted.batch
        if name == VLM:
            return self._answers(controls=True)
        if name == UPPER:
            vlm = self.world.vlm
            upper = load_vlm(
                suite.model("upper", self.skill), device=str(vlm.device), precision=vlm.precision
            )
            shown: dict[str, Shown] = {"skill": "own", **{name: name for name in CONTROLS}}
            found = {key: evaluate(upper, suite, self.examples, image, batch) for key, image in shown.items()}
            vision = self.world.wanted.examples(suite, suite.vision)
            return self._rows(found | {"vision": evaluate(upper, suite, vision, batch=batch)})
        told = captions(self.world.vlm, suite, self.examples, batch) if name == CASCADE else None
        model = self.world.base if name == BASE else self.expert
        return self._rows({"skill": evaluate_text(model, suite, self.examples, told, batch)})

    def _rows(self, answers: dict[str, pd.DataFrame]) -> pd.DataFrame:
        parts = []
        for condition, table in answers.items():
            examples = self.world.vision.examples if condition == "vision" else self.examples
            parts.append(table.assign(condition=condition, split=[e.split for e in examples]))
        return pd.concat(parts, ignore_index=True)


def _different(suite: Suite, examples: Sequence[Example], blank: bool = False) -> list[Example]:
    """Those whose prompts are not the same to the model; blank images are all alike, where they are of one size."""
    return list({(not blank and e.image, suite.prompt(e), suite.written(e)): e for e in examples}.values())


def _references(suite: Suite, skill: str) -> list[str]:
    """The references that a suite has what they need for."""
    there = {CASCADE: suite.caption is not None, UPPER: suite.has("upper", skill)}
    return [name for name in REFERENCES if there.get(name, True)]


def _shared_references(suites: Sequence[Suite], wanted: Sweep) -> tuple[dict[str, list[str]], list[str]]:
    """By scenario the references that all suites have, and notes on those that only some have: over all trainings
    these have no accuracy."""
    require_siblings(suites, wanted.skills)
    found, notes = {}, []
    for skill in wanted.skills(suites[0]):
        own = [_references(suite, skill) for suite in suites]
        found[skill] = [name for name in own[0] if all(name in other for other in own)]
        notes += [
            f"{skill}: the reference {name!r} is left out, since not every suite has what it needs."
            for name in REFERENCES
            if name not in found[skill] and any(name in other for other in own)
        ]
    return found, notes


def _upper(source: str) -> str:
    """What an upper bound is, without loading it: the commit of a hub's model, else all bytes of its files but what is for
    readers."""
    model = Checkpoint.open(source)
    if model.commit is not None:
        return model.commit
    files = sorted(path for path in model.folder.iterdir() if path.is_file() and path.suffix != ".md")
    return text_digest({path.name: file_digest(path) for path in files})


def _swept(
    rows: pd.DataFrame, recipes: Sequence[Recipe], configs: list[dict[str, Any]], split: str, notes: list[str]
) -> Swept:
    facts = pd.DataFrame(
        [*({"setting": n, "mask": 0, "family": REFERENCE} for n in REFERENCES), *map(facts_of, recipes)]
    )
    numbers = ["changed", "norm", "relative", "dose"]
    measured = rows.drop_duplicates(list(IDENTITY))[[*IDENTITY, *numbers]]
    units = measured[["seed", "scenario"]].drop_duplicates()
    settings = units.merge(facts, how="cross").merge(measured, on=list(IDENTITY))
    rows = rows[ROWS].astype(dict.fromkeys(("scenario", "setting", "condition", "split", "kind"), "category"))
    notes = notes + [
        f"{scenario}: settings were chosen on the examples they are reported on ({split}), which flatters the best: the "
        "scenario and vision do not both have a split `tune` apart from it."
        for scenario, own in rows.groupby("scenario", sort=False, observed=True)
        if not chosen_apart(own, split)
    ]
    if (trainings := rows["seed"].nunique()) < 3:
        notes.append(
            f"{trainings} training{'s' * (trainings != 1)} only: the intervals hardly know how much trainings differ."
        )
    return Swept(rows, settings, configs, notes)
