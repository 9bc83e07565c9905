"""From an analysis to tidy rows: many prompts, in batches, resumable. Every measurement goes through here."""

import platform
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from anchors.errors import AnchorsError
from anchors.model.identity import Identity, held, software
from anchors.model.language import LanguageModel
from anchors.model.lengths import alike, numbers
from anchors.model.source import Source
from anchors.study.analysis import Analysis, Cell, Described, Record
from anchors.study.engine import Lot, Progress, Stretch, carry_out, demand_same, watched
from anchors.study.helpers import helpers
from anchors.study.report import pictured
from anchors.study.results import Run
from anchors.summaries import SUMMARIES
from anchors.tasks.data import Data
from anchors.tasks.drawing import Draw, Drawn, draw, within_context
from anchors.tasks.task import Control, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CPU_TOKENS = 512
"""Tokens per batch on the CPU: longer batches gain nothing there and hold more memory."""

Unit = tuple[int, int]
"""Seed and number of a prompt: one unit of work."""
Cells = dict[int, tuple[Cell, dict[Unit, Drawn]]]
"""By seed: what its prompts share, and its units of work."""


@dataclass(frozen=True)
class Measured:
    """Tidy rows, and what was left out.

    Attributes:
        rows: columns model, task, shots, control, seed, number, example, condition, layer, metric, value.
        skipped: prompts left out because they are longer than the model's context.
        config: what the rows depend on.
        folder: where the run keeps its batches and tensors.
        first: the prompts of the first seed.
        notes: what a reader must know of how the rows came to be: files that were damaged, rows of another identity.
    """

    rows: pd.DataFrame
    skipped: int
    config: dict
    folder: Path
    first: tuple[Drawn, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """What it is, in five lines."""
        first, seeds = self.rows.iloc[0], sorted(self.rows["seed"].unique().tolist())
        conditions = self.rows["condition"].nunique()
        return (
            f"Measured: {self.config['kind']} on {first['task']} by {first['model']}\n"
            f"  {self.prompts} prompts, {first['shots']} per class shown, seeds {seeds}, control {first['control']}; "
            f"{self.skipped} left out\n"
            f"  found.rows: {len(self.rows):,} rows of {conditions} condition{'s' * (conditions > 1)}\n"
            f'  found.tables()["summary"]: with intervals; found.plot(): the picture\n'
            f"  kept in {self.folder}"
        )

    def tables(self) -> dict[str, pd.DataFrame]:
        """What the rows come to, with intervals; the main table is `summary`. See `anchors.summaries`."""
        return SUMMARIES[self.config["kind"]](self.rows)

    def plot(self) -> "Figure | dict[str, Figure]":
        """The picture that the study's verb draws, or several by name; a notebook shows a figure that a cell ends in.

        Raises:
            AnchorsError: rows of this kind have no picture.
        """
        return pictured(self.config["kind"], self.tables(), str(self.rows["model"].iloc[0]))

    @property
    def prompts(self) -> int:
        """How many prompts the rows describe."""
        units = self.rows.loc[self.rows["number"] >= 0, ["seed", "number"]]
        return len(units.drop_duplicates())


@dataclass(frozen=True)
class Sample:
    """How many prompts are asked, and how they are drawn.

    Attributes:
        shots: demonstrations per class.
        seeds: one set of prompts each.
        examples: prompts per seed.
        control: see `Draw`.
        batch_size: prompts per batch; None chooses by memory. Out of memory halves it and goes on.
        skip_too_long: leave prompts out that exceed the model's context, instead of an error.
    """

    shots: int = 1
    seeds: tuple[int, ...] = (42,)
    examples: int = 100
    control: Control = "none"
    batch_size: int | None = None
    skip_too_long: bool = False


def config_of(
    model: LanguageModel, analysis: Analysis, task: Task, data: Data, how: Sample
) -> dict[str, Any]:
    """What the rows of an analysis depend on; its hash names the run.

    An analysis whose numbers hang on more than its fields (a file that one of them names) says so in `settings`.
    """
    own = getattr(analysis, "settings", None)
    config = {
        "kind": analysis.kind,
        "version": analysis.version,
        "settings": asdict(analysis) if own is None else own(),
        "model": dict(model.identity.parts),
        "software": software(),
        "precision": model.precision,
        "task": task.identity(),
        "data": data.fingerprint,
        "shots": how.shots,
        "fresh": analysis.fresh,
        "control": how.control,
    }
    # What may be shown was more in 0.4.0; other data keep their runs.
    drawn = {"left_out": data.left_out} if data.left_out else {}
    # Seconds depend on more than the numbers do.
    machine = {
        "device": str(model.device),
        "batch_size": how.batch_size,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    return config | drawn | ({"machine": machine} if getattr(analysis, "timed", False) else {})


def _cells(
    model: LanguageModel, analysis: Analysis, task: Task, data: Data, how: Sample, folder: Path
) -> tuple[Cells, int]:
    """The cells of all seeds, and how many prompts were left out as too long."""
    cells: Cells = {}
    skipped = 0
    for seed in how.seeds:
        drawing = Draw(how.shots, seed, analysis.fresh, how.control)
        drawn = draw(task, data, model.tokenizer, drawing, how.examples, context=model.context)
        numbers = {id(d): number for number, d in enumerate(drawn)}
        fitting, left_out = within_context(drawn, model.context, skip=how.skip_too_long)
        skipped += left_out
        units = {(seed, numbers[id(d)]): d for d in fitting}
        cells[seed] = Cell(task, data, drawing, tuple(fitting), folder), units
    return cells, skipped


def seed_level(units: Collection[Unit]) -> int:
    """The number of the rows that describe a seed as a whole: negative, and other for other numbers of prompts."""
    return -len(units)


def pending(
    model: LanguageModel, analysis: Analysis, task: Task, data: Data, how: Sample, *, out: Path
) -> list[tuple[dict[Unit, Drawn], list[Unit]]]:
    """Of every seed its prompts, and which of them are left to measure; writes nothing.

    Raises:
        AnchorsError: see `draw` and `within_context`.
    """
    done = Run.at(out, analysis.kind, config_of(model, analysis, task, data, how)).done()
    cells, _ = _cells(model, analysis, task, data, how, out)
    return [(units, [unit for unit in units if unit not in done]) for _, units in cells.values()]


def outstanding(
    model: LanguageModel, analysis: Analysis, task: Task, data: Data, how: Sample, *, out: Path
) -> tuple[int, int, int]:
    """Prompts left to measure, prompts in all, and the tokens that those left will run; writes nothing."""
    cells = pending(model, analysis, task, data, how, out=out)
    left = [units[unit] for units, own in cells for unit in own]
    return len(left), sum(len(units) for units, _ in cells), sum(width(analysis, drawn) for drawn in left)


def measure(
    model: LanguageModel,
    analysis: Analysis,
    task: Task,
    data: Data,
    how: Sample,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
    certify: Callable[[], object] = lambda: None,
) -> Measured:
    """Run an analysis on every prompt that the protocol draws, computing only what `out` does not hold.

    Args:
        model: of `anchors.load`.
        analysis: what is measured, such as `anchors.InformationFlow()`; `dir(anchors)` lists those that come along.
        task: label words and template, of `anchors.task`.
        data: of `anchors.read`.
        how: shots, seeds, examples, see `Sample`.
        out: results folder; finished batches are kept under its `runs`. None takes a new temporary folder.
        progress: called with (prompts done, prompts in all); None shows a bar on a terminal or in a notebook.
        certify: asked before the first prompt, see `anchors.study.engine.Stretch`.

    Raises:
        AnchorsError: see `draw`, `within_context` and the analysis.

    Example:
        >>> model, task = anchors.load(), anchors.task("sst2")
        >>> found = anchors.measure(model, anchors.Readout(), task, anchors.read(task), anchors.Sample(examples=20))
        >>> print(found)               # what was measured, and what to do with it
        >>> found.tables()["summary"]  # with intervals
        >>> found.plot()               # the study's picture
    """
    out = out or Path(tempfile.mkdtemp(prefix="anchors-"))
    with held(model.model, found := model.identity), watched(analysis.kind, progress) as told:
        return _measured(model, analysis, task, data, how, out, told, certify, unknown_code(found))


def unknown_code(found: Identity) -> tuple[str, ...]:
    """A note on code in a model by which it cannot be known again."""
    if not found.unknown:
        return ()
    more = f" and {len(found.unknown) - 1} more" if len(found.unknown) > 1 else ""
    return (
        f"The model runs code that cannot be known again: {found.unknown[0]}{more}. Its rows are kept apart, and never taken up.",
    )


def _measured(
    model: LanguageModel,
    analysis: Analysis,
    task: Task,
    data: Data,
    how: Sample,
    out: Path,
    progress: Progress,
    certify: Callable[[], object],
    notes: tuple[str, ...],
) -> Measured:
    config = config_of(model, analysis, task, data, how)
    folder = Run.at(out, analysis.kind, config).folder
    cells, skipped = _cells(model, analysis, task, data, how, folder)
    if not any(units for _, units in cells.values()):
        raise AnchorsError(
            "Every prompt is longer than the model's context.", "Use fewer --shots.", code="length"
        )
    lots = _lots(model, analysis, cells, how)
    units = [unit for lot in lots for unit in lot.units]
    crew, anew = helpers(), None
    if (
        crew and crew.source and "machine" not in config
    ):  # seconds would be those of a machine that does other things, too
        anew = partial(_lots_of, crew.source, analysis, task, data, how, cells)
    rows, (run,) = carry_out(
        [Stretch(config, units, lambda _: lots, model.name, certify=certify, anew=anew)], out, progress
    )
    for name, value in {
        "control": how.control,
        "shots": how.shots,
        "task": task.called,
        "model": model.name,
    }.items():
        rows.insert(0, name, value)
    rows = rows.sort_values(["seed", "number"], kind="stable", ignore_index=True)
    first = cells[how.seeds[0]][0].prompts
    return Measured(rows, skipped, config, run.folder, first, notes + run.notes)


def _lots(model: LanguageModel, analysis: Analysis, cells: Cells, how: Sample) -> list[Lot]:
    return [_lot(model, analysis, cell, units, how.batch_size) for cell, units in cells.values() if units]


def _lots_of(
    source: Source,
    analysis: Analysis,
    task: Task,
    data: Data,
    how: Sample,
    cells: Cells,
    run: Run,
    device: str,
) -> list[Lot]:
    """The lots of a measurement, in another process: prompts come along, to draw them takes longer."""
    model = source.on(device).load()
    demand_same(run, config_of(model, analysis, task, data, how))
    return _lots(model, analysis, cells, how)


def _lot(
    model: LanguageModel, analysis: Analysis, cell: Cell, units: dict[Unit, Drawn], size: int | None
) -> Lot:
    """The prompts of a seed, and what there is to say of the seed as a whole."""

    def measured(state: Any, part: Sequence[Unit]) -> pd.DataFrame:
        drawn = [units[unit] for unit in part]
        return frame(part, [d.example for d in drawn], analysis.measure(model, state, cell.task, drawn))

    def said(state: Any) -> pd.DataFrame:
        found = analysis.once(model, state, cell) or [Record("prompts", len(units))]
        return frame([whole], [-1], [found])

    def too_large(unit: Unit | None) -> AnchorsError:
        if unit is not None:
            return AnchorsError(
                f"One prompt of {len(units[unit].prompt.ids)} tokens does not fit into memory.",
                "Use fewer --shots, --precision bfloat16, another --device or --device-map auto.",
                code="memory",
            )
        return AnchorsError(
            f"What the prompts of seed {cell.how.seed} share does not fit into memory "
            f"({analysis.kind}, {cell.prompts[0].prompt.query} tokens of demonstrations).",
            "Use fewer --shots, fewer conditions or layers, --precision bfloat16 or another --device.",
            code="memory",
        )

    whole = (cell.how.seed, seed_level(units))
    return Lot(
        list(units),
        lambda: analysis.prepare(model, cell),
        measured,
        too_large,
        lambda left: batches(model, analysis, units, list(left), size),
        (whole, said),
    )


def frame(
    units: Sequence[Unit], examples: Sequence[int], records: Sequence[Sequence[Record]]
) -> pd.DataFrame:
    table = [
        (seed, number, example, r.condition, r.layer, r.metric, float(r.value))
        for (seed, number), example, own in zip(units, examples, records, strict=True)
        for r in own
    ]
    columns = ["seed", "number", "example", "condition", "layer", "metric", "value"]
    return pd.DataFrame(table, columns=columns).astype({"layer": "Int32"})


def width(analysis: Described, drawn: Drawn) -> int:
    """Tokens that are run for a prompt: all of them, or only those after the shared demonstrations."""
    return len(drawn.prompt.ids) - (0 if analysis.fresh else drawn.prompt.query)


def batches(
    model: LanguageModel, analysis: Described, units: dict[Unit, Drawn], pending: list[Unit], size: int | None
) -> Iterator[list[Unit]]:
    """Neighbours in length share a batch, within windows, so that little is padded and progress stays even.

    Prompts that the family would run otherwise beside each other never share one (see `anchors.model.lengths.alike`).
    """
    length = {unit: width(analysis, units[unit]) for unit in pending}
    longest = max(length.values(), default=1)
    context = 0 if analysis.fresh else max((units[u].prompt.query for u in pending), default=0)
    budget = size * longest if size else tokens_per_batch(model, context / longest)
    window = 16 * (size or max(1, budget // longest))
    sides = {unit: alike(model.changes, len(units[unit].prompt.ids)) for unit in pending}
    for start in range(0, len(pending), window):
        batch: list[Unit] = []
        for unit in sorted(pending[start : start + window], key=length.__getitem__):
            full = len(batch) == size if size else (len(batch) + 1) * length[unit] > budget
            if batch and (full or sides[unit] != sides[batch[-1]]):
                yield batch
                batch = []
            batch.append(unit)
        if batch:
            yield batch


def tokens_per_batch(model: LanguageModel, cached: float = 0.0) -> int:
    """How many tokens (with padding) to run at once, from the free memory and the model's width.

    Args:
        cached: keys and values held per token that is run.
    """
    if model.device.type != "cuda":
        return CPU_TOKENS
    config = model.model.config.get_text_config()
    inner = max(
        (n for name in ("intermediate_size", "n_inner") for n in numbers(config, name)),
        default=4 * config.hidden_size,
    )
    per_token = (
        model.n_layers * ((8 + 4 * cached) * config.hidden_size + 3 * inner) * model.model.dtype.itemsize
    )
    free, _ = torch.cuda.mem_get_info(model.device)
    return min(16384, max(1, int(0.5 * free / per_token)))
