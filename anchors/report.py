"""Everything a verb leaves behind: rows, tables, figure, pages."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from anchors.check import check
from anchors.errors import CertificateError
from anchors.identity import Identity
from anchors.models import LanguageModel
from anchors.results import plain, provenance, write_atomic, write_table
from anchors.runner import Analysis, Measured, Sample, measure
from anchors.sight import hidden_labels
from anchors.summaries import Rows, Tables, tables_of
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
        tables = {name: plain(table) for name, table in self.tables.items()}
        return tables | {"files": [str(f) for f in self.files], "notes": self.notes} | self.facts


@dataclass(frozen=True)
class Part:
    """One analysis on one task: what a report is made of."""

    analysis: Analysis
    task: Task
    data: Data
    how: Sample


def report(
    model: LanguageModel,
    parts: Sequence[Part],
    *,
    out: Path,
    runs: Path | None = None,
    name: str | None = None,
    figure: str | None = None,
    tables: Callable[[Rows], Tables] = tables_of,
    layers: Sequence[int] | None = None,
    pages: int = 0,
    csv: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Certify the model, measure all parts, and write rows, tables, figure and pages under `out`.

    Args:
        model, parts: what is measured.
        out: folder of the results.
        runs: folder whose `runs` holds the finished batches, when `out` is this experiment's own; by default `out`.
        name: of the files; by default the first part's kind of analysis.
        figure: which kind of picture; by default that of the first part's analysis.
        tables: from the rows of each kind of analysis to tables.
        layers, pages: layers shown on the pages, and prompts on them (information flow only).
        csv: write the rows as CSV, too.
        progress: called with (prompts done, prompts in all).

    Raises:
        CertificateError: the quick form of `anchors check` failed on this model.
        AnchorsError: see `anchors.runner.measure`.
    """
    certify(model, parts[0].task, parts[0].data, parts[0].how)
    notes: list[str] = []
    measured: list[Measured] = []
    rows: dict[str, list[pd.DataFrame]] = {}
    finished = 0
    ahead = [len(p.how.seeds) * min(p.how.examples, len(p.data.test)) for p in parts]
    for number, part in enumerate(parts):
        after = sum(ahead[number + 1 :])
        found = measure(
            model,
            part.analysis,
            part.task,
            part.data,
            part.how,
            out=runs or out,
            progress=lambda done, total, before=finished, after=after: progress(
                before + done, before + total + after
            ),
        )
        finished += found.prompts
        measured.append(found)
        rows.setdefault(part.analysis.kind, []).append(found.rows)
        notes += [n for n in notes_on(model, part, found) if n not in notes]
    facts = provenance(
        model=model.name,
        revision=model.revision,
        fingerprint=Identity(measured[0].config["model"]).digest,
        precision=model.precision,
        device=str(model.device),
        parts=[
            m.config
            | {"data_source": p.data.source, "read": asdict(p.data.facts(p.task))}
            | {"seeds": list(p.how.seeds), "examples": p.how.examples}
            for p, m in zip(parts, measured, strict=True)
        ],
        notes=notes,
    )
    name, kind = name or parts[0].analysis.kind, parts[0].analysis.kind
    whole = {k: pd.concat(frames, ignore_index=True) for k, frames in rows.items()}
    files = write_rows(out, whole if runs else _own(whole, name), facts, csv=csv)
    made = tables(whole)
    files += write_tables(out, name, made, facts)
    files += write_figure(out, name, figure or kind, made, model.name)
    if kind == "flow" and pages:
        for part, found in zip(parts, measured, strict=True):
            path = out / f"{name}_{part.task.name}.html"
            files += _page(model, part.task, found, path, pages, layers or range(model.n_layers), facts)
    return Report(made, files, notes, facts)


def certify(model: LanguageModel, task: Task, data: Data, how: Sample) -> None:
    """The quick form of `anchors check`, on the first prompt that fits.

    Raises:
        CertificateError: it failed.
    """
    drawn = draw(
        task, data, model.tokenizer, Draw(shots=how.shots, seed=how.seeds[0]), 1, context=model.context
    )
    first, _ = within_context(drawn, model.context, skip=True)
    if first and (failed := [f for f in check(model, [first[0].prompt], [], quick=True) if not f.ok]):
        raise CertificateError(
            f"{model.name} failed: {failed[0].name}: {failed[0].detail}", "See `anchors check`."
        )


def notes_on(model: LanguageModel, part: Part, found: Measured) -> list[str]:
    """What a reader must know before believing the numbers of a part."""
    task, data, how = part.task, part.data, part.how
    notes = list(found.notes)
    if found.skipped:
        notes.append(f"{task.name}: {found.skipped} prompts longer than the context were left out.")
    if found.prompts + found.skipped < len(how.seeds) * how.examples:
        notes.append(f"{task.name}: the test part of {data.source} has only {len(data.test)} examples.")
    if caution := data.facts(task).caution():
        notes.append(f"{task.name}: {caution}")
    if hidden := hidden_labels(model, [d.prompt for d in found.first]):
        notes.append(f"{task.name}: {hidden}")
    return notes


def _own(rows: Rows, name: str) -> Rows:
    """Rows beside the main ones under names of their own, since verbs share a folder."""
    (main, own), *others = rows.items()
    return {main: own} | {f"{name}_{kind}_rows": more for kind, more in others}


def write_rows(out: Path, rows: Rows, facts: dict[str, Any], *, csv: bool = False) -> list[Path]:
    """Write rows as parquet, one file per kind of analysis; returns what was written."""
    files = []
    for kind, table in rows.items():
        files.append(out / f"{kind}.parquet")
        write_table(files[-1], table, facts)
        if csv:
            files.append(out / f"{kind}.csv")
            write_atomic(files[-1], lambda draft, table=table: table.to_csv(draft, index=False))
    return files


def write_tables(out: Path, name: str, tables: Tables, facts: dict[str, Any]) -> list[Path]:
    """Write tables as parquet; returns what was written."""
    for key, table in tables.items():
        write_table(out / f"{name}_{key}.parquet", table, facts)
    return [out / f"{name}_{key}.parquet" for key in tables]


def write_figure(out: Path, name: str, kind: str, tables: Tables, model: str) -> list[Path]:
    """Draw tables as PNG and PDF; nothing where a kind has no picture."""
    from anchors.figures import draw
    from anchors.figures.style import save

    drawn = draw(kind, tables, model)
    return [] if drawn is None else save(drawn, out / name)


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
