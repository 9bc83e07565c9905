"""Everything a verb leaves behind: rows, tables, figure, pages."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from anchors._names import forwarding, unknown
from anchors.check import arithmetic_error, demand
from anchors.identity import Identity
from anchors.models import LanguageModel
from anchors.results import plain, provenance
from anchors.runner import Analysis, Measured, Sample, measure
from anchors.shelf import Shelf, require_unread
from anchors.sight import hidden_labels
from anchors.summaries import Rows, Tables, marked, tables_of
from anchors.tasks.data import Data
from anchors.tasks.drawing import Draw, draw, within_context
from anchors.tasks.task import Task
from anchors.viewer import render_page
from anchors.viewer.payload import curves_payload, payload, prompt_payload

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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

    Results of something else that lie there under the same names are set aside, see `anchors.shelf`.

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
        AnchorsError: the data lie among the results under the name of one of them; see `anchors.runner.measure`.
    """
    kinds = {part.analysis.kind for part in parts}
    require_unread(out, kinds | {name or parts[0].analysis.kind}, [part.data.source for part in parts])
    error = certify(model, parts)
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
        arithmetic_error=error,
    )
    name, kind = name or parts[0].analysis.kind, parts[0].analysis.kind
    whole = {k: pd.concat(frames, ignore_index=True) for k, frames in rows.items()}
    made = marked(tables(whole), whole, facts["arithmetic_error"])
    shelf = Shelf(out, name)
    for key, table in (whole if runs else _own(whole, name)).items():
        shelf.table(key, table, csv=csv)
    for key, table in made.items():
        shelf.table(f"{name}_{key}", table)
    shelf.figure(name, drawn(figure or kind, made, model.name))
    if kind == "flow" and pages:
        for part, found in zip(parts, measured, strict=True):
            if page := _page(model, part.task, found, pages, layers or range(model.n_layers), facts):
                shelf.page(f"{name}_{part.task.name}", page)
    files, moved = shelf.write(facts)
    return Report(made, files, notes + moved, facts)


def certify(model: LanguageModel, parts: Sequence[Part]) -> float | None:
    """The quick form of `anchors check`, on all prompts of a run that fit.

    Returns:
        The arithmetic error of the shortest one's loss, see `anchors.check.arithmetic_error`; None where no prompt fits.

    Raises:
        CertificateError: it failed.
    """
    prompts = []
    for part in parts:
        for seed in part.how.seeds:
            how = Draw(part.how.shots, seed, part.analysis.fresh, part.how.control)
            drawn = draw(part.task, part.data, model.tokenizer, how, part.how.examples, context=model.context)
            prompts += [d.prompt for d in within_context(drawn, model.context, skip=True)[0]]
    if not prompts:
        return None
    demand(model, prompts)
    return arithmetic_error(model, min(prompts, key=lambda p: len(p.ids)))


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


def drawn(kind: str, tables: Tables, model: str) -> "Figure | None":
    """The picture of tables; None where a kind has none."""
    from anchors.figures import draw

    return draw(kind, tables, model)


def _page(
    model: LanguageModel,
    task: Task,
    found: Measured,
    pages: int,
    layers: Sequence[int],
    facts: dict[str, Any],
) -> str | None:
    shown = [
        prompt_payload(model, task, d.prompt, f"test example {d.example}", layers)
        for d in found.first[:pages]
    ]
    if not shown:
        return None
    curves = curves_payload(found.rows)
    return render_page(payload(f"Information flow: {task.name}", model, task, shown, facts, curves))


__getattr__ = forwarding(
    __name__,
    unknown(__name__),
    dict.fromkeys(("write_rows", "write_tables", "write_figure"), "anchors.formerly"),
)
