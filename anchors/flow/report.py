"""Everything `anchors flow` leaves behind: rows, summary, figure, pages."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from anchors.check import check, hidden_labels
from anchors.errors import CertificateError
from anchors.flow.run import measure
from anchors.models import LanguageModel
from anchors.results import provenance, write_atomic, write_table
from anchors.stats import flow_summary
from anchors.tasks.data import Data
from anchors.tasks.prompts import Draw, draw, within_context
from anchors.tasks.task import Task
from anchors.viewer import render_page
from anchors.viewer.payload import curves_payload, payload, prompt_payload


@dataclass(frozen=True)
class Report:
    """What a flow run came to.

    Attributes:
        summary: by task, layer and metric, see `anchors.stats.flow_summary`.
        files: what was written.
        notes: what a reader must know before believing the numbers.
        facts: the provenance.
    """

    summary: pd.DataFrame
    files: list[Path]
    notes: list[str]
    facts: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The summary as plain data; missing intervals are null."""
        rows = self.summary.astype(object).to_dict(orient="records")
        clean = [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows
        ]
        return {"summary": clean, "files": [str(f) for f in self.files], "notes": self.notes} | self.facts


def report(
    model: LanguageModel,
    tasks: Sequence[Task],
    sets: Sequence[Data],
    *,
    out: Path,
    shots: int = 1,
    seeds: Sequence[int] = (42,),
    examples: int = 100,
    batch_size: int | None = None,
    skip_too_long: bool = False,
    layers: Sequence[int] | None = None,
    pages: int = 3,
    csv: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Certify the model, measure the flow of every task, and write rows, figure and pages under `out`.

    Raises:
        CertificateError: the quick form of `anchors check` failed on this model.
        AnchorsError: see `anchors.flow.run.measure`.
    """
    layers = range(model.n_layers) if layers is None else layers
    notes: list[str] = []
    tables, configs, files = [], [], []
    finished = 0
    for number, (task, data) in enumerate(zip(tasks, sets, strict=True)):
        drawn = draw(task, data, model.tokenizer, Draw(shots=shots, seed=seeds[0]), examples)
        first, _ = within_context(drawn, model.context, skip=skip_too_long)
        if number == 0 and first:
            failed = [f for f in check(model, [first[0].prompt], [], quick=True) if not f.ok]
            if failed:
                raise CertificateError(
                    f"{model.name} failed: {failed[0].name}: {failed[0].detail}", "See `anchors check`."
                )
        after = (len(tasks) - 1 - number) * len(seeds) * examples
        measured = measure(
            model,
            task,
            data,
            out=out,
            shots=shots,
            seeds=seeds,
            examples=examples,
            batch_size=batch_size,
            skip_too_long=skip_too_long,
            progress=lambda done, total, before=finished, after=after: progress(
                before + done, before + total + after
            ),
        )
        count = measured.rows[["seed", "number"]].drop_duplicates().shape[0]
        finished += count
        if measured.skipped:
            notes.append(f"{task.name}: {measured.skipped} prompts longer than the context were left out.")
        if count + measured.skipped < len(seeds) * examples:
            notes.append(f"{task.name}: the test part of {data.source} has only {len(data.test)} examples.")
        if hidden := hidden_labels(model, [d.prompt for d in first]):
            notes.append(f"{task.name}: {hidden}")
        tables.append(measured.rows)
        configs.append(measured.config | {"data_source": data.source})
    facts = provenance(
        model=model.name,
        revision=model.revision,
        fingerprint=model.fingerprint,
        precision=model.precision,
        device=str(model.device),
        shots=shots,
        seeds=list(seeds),
        examples=examples,
        tasks=configs,
        notes=notes,
    )
    rows = pd.concat(tables, ignore_index=True)
    summary = flow_summary(rows)
    write_table(out / "flow.parquet", rows, facts)
    write_table(out / "flow_summary.parquet", summary, facts)
    files += [out / "flow.parquet", out / "flow_summary.parquet"]
    if csv:
        write_atomic(out / "flow.csv", lambda draft: rows.to_csv(draft, index=False))
        files.append(out / "flow.csv")
    from anchors.figures.flow import draw as draw_figure
    from anchors.figures.style import save

    files += save(draw_figure(summary, model.name), out / "flow")
    for task, data, table in zip(tasks, sets, tables, strict=True):
        if not pages:
            break
        drawn = draw(task, data, model.tokenizer, Draw(shots=shots, seed=seeds[0]), pages)
        fitting, _ = within_context(drawn, model.context, skip=True)
        shown = [prompt_payload(model, task, d.prompt, f"test example {d.example}", layers) for d in fitting]
        if not shown:
            continue
        page = render_page(
            payload(f"Information flow: {task.name}", model, task, shown, facts, curves_payload(table))
        )
        path = out / f"flow_{task.name}.html"
        write_atomic(path, lambda draft, page=page: draft.write_text(page, encoding="utf-8"))
        files.append(path)
    return Report(summary, files, notes, facts)
