"""Everything a verb leaves behind: rows, tables, figure, pages."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from anchors.check import check, hidden_labels
from anchors.errors import CertificateError
from anchors.models import LanguageModel
from anchors.results import provenance, write_atomic, write_table
from anchors.runner import Analysis, Measured, Sample, measure
from anchors.summaries import SUMMARIES
from anchors.tasks.data import Data
from anchors.tasks.drawing import Draw, draw, within_context
from anchors.tasks.task import Task
from anchors.viewer import render_page
from anchors.viewer.payload import curves_payload, payload, prompt_payload


@dataclass(frozen=True)
class Report:
    """What a run came to.

    Attributes:
        tables: what the rows come to, see `anchors.summaries`; the main one is `summary`.
        files: what was written.
        notes: what a reader must know before believing the numbers.
        facts: the provenance.
    """

    tables: dict[str, pd.DataFrame]
    files: list[Path]
    notes: list[str]
    facts: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The tables as plain data; missing values are null."""
        plain = {name: _plain(table) for name, table in self.tables.items()}
        return plain | {"files": [str(f) for f in self.files], "notes": self.notes} | self.facts


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = table.astype(object).to_dict(orient="records")
    return [
        {
            k: None if v is pd.NA or (isinstance(v, float) and not math.isfinite(v)) else v
            for k, v in row.items()
        }
        for row in rows
    ]


def report(
    model: LanguageModel,
    analysis: Analysis,
    tasks: Sequence[Task],
    sets: Sequence[Data],
    how: Sample,
    *,
    out: Path,
    layers: Sequence[int] | None = None,
    pages: int = 0,
    csv: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Certify the model, run an analysis on every task, and write rows, tables, figure and pages under `out`.

    Args:
        model, analysis, tasks, sets, how: what is measured.
        out: folder of the results.
        layers, pages: layers shown on the pages, and prompts on them (information flow only).
        csv: write the rows as CSV, too.
        progress: called with (prompts done, prompts in all).

    Raises:
        CertificateError: the quick form of `anchors check` failed on this model.
        AnchorsError: see `anchors.runner.measure`.
    """
    notes: list[str] = []
    measured: list[Measured] = []
    finished = 0
    for number, (task, data) in enumerate(zip(tasks, sets, strict=True)):
        if number == 0:
            certify(model, task, data, how)
        after = (len(tasks) - 1 - number) * len(how.seeds) * how.examples
        found = measure(
            model,
            analysis,
            task,
            data,
            how,
            out=out,
            progress=lambda done, total, before=finished, after=after: progress(
                before + done, before + total + after
            ),
        )
        finished += found.prompts
        measured.append(found)
        notes += notes_on(model, task, data, how, found)
    facts = provenance(
        model=model.name,
        revision=model.revision,
        fingerprint=model.fingerprint,
        precision=model.precision,
        device=str(model.device),
        shots=how.shots,
        seeds=list(how.seeds),
        examples=how.examples,
        control=how.control,
        tasks=[m.config | {"data_source": d.source} for m, d in zip(measured, sets, strict=True)],
        notes=notes,
    )
    rows = pd.concat([m.rows for m in measured], ignore_index=True)
    tables = SUMMARIES[analysis.kind](rows)
    files = write_report(out, analysis.kind, rows, tables, facts, csv=csv)
    if analysis.kind == "flow" and pages:
        for task, found in zip(tasks, measured, strict=True):
            path = out / f"flow_{task.name}.html"
            files += _page(model, task, found, path, pages, layers or range(model.n_layers), facts)
    return Report(tables, files, notes, facts)


def certify(model: LanguageModel, task: Task, data: Data, how: Sample) -> None:
    """The quick form of `anchors check`, on the first prompt that fits.

    Raises:
        CertificateError: it failed.
    """
    drawn = draw(task, data, model.tokenizer, Draw(shots=how.shots, seed=how.seeds[0]), 1)
    first, _ = within_context(drawn, model.context, skip=True)
    if first and (failed := [f for f in check(model, [first[0].prompt], [], quick=True) if not f.ok]):
        raise CertificateError(
            f"{model.name} failed: {failed[0].name}: {failed[0].detail}", "See `anchors check`."
        )


def notes_on(model: LanguageModel, task: Task, data: Data, how: Sample, found: Measured) -> list[str]:
    """What a reader must know before believing the numbers of a task."""
    notes = []
    if found.skipped:
        notes.append(f"{task.name}: {found.skipped} prompts longer than the context were left out.")
    if found.prompts + found.skipped < len(how.seeds) * how.examples:
        notes.append(f"{task.name}: the test part of {data.source} has only {len(data.test)} examples.")
    if hidden := hidden_labels(model, [d.prompt for d in found.first]):
        notes.append(f"{task.name}: {hidden}")
    return notes


def write_report(
    out: Path,
    stem: str,
    rows: pd.DataFrame,
    tables: dict[str, pd.DataFrame],
    facts: dict[str, Any],
    *,
    csv: bool = False,
    figure: str | None = None,
) -> list[Path]:
    """Write rows and tables as parquet, the figure as PNG and PDF; returns what was written."""
    from anchors.figures import draw as draw_figure
    from anchors.figures.style import save

    files = [out / f"{stem}.parquet"]
    write_table(files[0], rows, facts)
    for name, table in tables.items():
        files.append(out / f"{stem}_{name}.parquet")
        write_table(files[-1], table, facts)
    if csv:
        files.append(out / f"{stem}.csv")
        write_atomic(files[-1], lambda draft: rows.to_csv(draft, index=False))
    drawn = draw_figure(figure or stem, tables, facts["model"])
    return files + (save(drawn, out / stem) if drawn is not None else [])


def _page(
    model: LanguageModel,
    task: Task,
    found: Measured,
    path: Path,
    pages: int,
    layers: Sequence[int],
    facts: dict[str, Any],
) -> list[Path]:
    shown = [
        prompt_payload(model, task, d.prompt, f"test example {d.example}", layers)
        for d in found.first[:pages]
    ]
    if not shown:
        return []
    curves = curves_payload(found.rows)
    page = render_page(payload(f"Information flow: {task.name}", model, task, shown, facts, curves))
    write_atomic(path, lambda draft: draft.write_text(page, encoding="utf-8"))
    return [path]
