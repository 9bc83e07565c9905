"""Everything a verb leaves behind: rows, tables, figure, pages."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from math import ceil, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from anchors.certificate.sight import hidden_labels
from anchors.check import demand
from anchors.errors import AnchorsError
from anchors.model.identity import Identity
from anchors.model.language import LanguageModel
from anchors.model.source import Source
from anchors.study.cluster import Cluster, Gathered
from anchors.study.engine import Progress, silent
from anchors.study.registry import study
from anchors.study.report import Found, Inquiry, Report, conclude, leave
from anchors.study.results import provenance
from anchors.study.runner import Analysis, Measured, Sample, measure
from anchors.study.shelf import require_unread
from anchors.tasks.data import Data
from anchors.tasks.drawing import Draw, draw, within_context
from anchors.tasks.task import Task
from anchors.viewer import render_page
from anchors.viewer.payload import curves_payload, payload, prompt_payload

if TYPE_CHECKING:
    from anchors.study.plan import Outlook


WHOLE = "{name} does not go on from its recurrent state with unchanged numbers: the demonstrations are run again with every query."


@dataclass(frozen=True)
class Part:
    """One analysis on one task: what a report is made of."""

    analysis: Analysis
    task: Task
    data: Data
    how: Sample


@dataclass(frozen=True)
class Prompted(Inquiry):
    """Analyses of the prompts of tasks.

    Attributes:
        model, parts: what is measured.
        runs: folder whose `runs` holds the finished batches; by default that of the results.
        names: what names of the results' files begin with, beside the kinds of analysis.
    """

    model: LanguageModel
    parts: Sequence[Part]
    runs: Path | None = None
    names: frozenset[str] = frozenset()

    @cached_property
    def certified(self) -> float | None:
        """The arithmetic error, asked once; see `certify`."""
        return certify(self.model, self.parts)

    def measure(self, out: Path, progress: Progress) -> Found:
        """See `anchors.study.runner.measure`.

        Raises:
            AnchorsError: the data lie among the results under the name of one of them.
        """
        model, parts = self.model, self.parts
        kinds = {part.analysis.kind for part in parts}
        require_unread(out, kinds | self.names, [part.data.source for part in parts])
        measured: list[Measured] = []
        notes: list[str] = []
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
                out=self.runs or out,
                progress=lambda done, total, before=finished, after=after: progress(
                    before + done, before + total + after
                ),
                certify=lambda: self.certified,
            )
            finished += found.prompts
            measured.append(found)
            rows.setdefault(part.analysis.kind, []).append(found.rows)
            notes += [n for n in notes_on(model, part, found) if n not in notes]
        facts = {
            "model": model.name,
            "revision": model.revision,
            "fingerprint": Identity(measured[0].config["model"]).digest,
            "precision": model.precision,
            "device": str(model.device),
            "parts": [
                m.config
                | {"data_source": p.data.source, "read": asdict(p.data.facts(p.task))}
                | {"seeds": list(p.how.seeds), "examples": p.how.examples, "called": [p.task.called]}
                for p, m in zip(parts, measured, strict=True)
            ],
            "arithmetic_error": self.certified,
        }
        whole = {kind: pd.concat(frames, ignore_index=True) for kind, frames in rows.items()}
        return Found(whole, facts, notes, measured)

    def outlook(self, out: Path) -> "list[Outlook]":
        """See `anchors.study.plan.outlook`."""
        from anchors.study.plan import outlook

        return outlook(self.model, self.parts, self.runs or out)

    def kept(self, found: Found) -> list[Path]:
        """What an analysis says that it keeps: fitted β."""
        return [
            file
            for part, own in zip(self.parts, found.kept, strict=True)
            for file in getattr(part.analysis, "kept", lambda *_: [])(own.folder, part.how.seeds)
        ]

    def pages(
        self, found: Found, facts: dict[str, Any], *, layers: Sequence[int] | None = None, pages: int = 0
    ) -> dict[str, str]:
        """Of every task the flow of some prompts, where the flow was measured."""
        if self.parts[0].analysis.kind != "flow" or not pages:
            return {}
        shown = layers or self.model.layers
        made = {
            part.task.name: _page(self.model, part.task, own, pages, shown, facts)
            for part, own in zip(self.parts, found.kept, strict=True)
        }
        return {name: page for name, page in made.items() if page}


def cell(source: Source, part: Part, out: Path) -> list[str]:
    """Measure a part by itself; gives the notes."""
    return Prompted(source.load(), [part]).measure(out, silent).notes


def whole(source: Source, parts: Sequence[Part], out: Path) -> Found:
    """What measuring all parts finds, where cells left them; files that are kept are named as below `out`."""
    inquiry = Prompted(source.load(), parts)
    found = inquiry.measure(out, silent)
    return replace(found, kept=[file.relative_to(out) for file in inquiry.kept(found)])


@dataclass(frozen=True)
class Far:
    """A model on the machines of a cluster, which can be asked what a `report` asks of one."""

    cluster: Cluster
    source: Source

    def inquiry(self, parts: Sequence[Part], runs: Path, names: frozenset[str]) -> Gathered:
        """As `Prompted`, a cell for every part and seed; see `anchors.study.cluster`."""
        kinds = frozenset(part.analysis.kind for part in parts)
        return Gathered(
            self.cluster,
            [
                partial(cell, self.source, replace(part, how=replace(part.how, seeds=(seed,))))
                for part in parts
                for seed in part.how.seeds
            ],
            partial(whole, self.source, parts),
            kinds,
            ask=lambda out: require_unread(out, kinds | names, [part.data.source for part in parts]),
            runs=runs,
            files=lambda found: [runs / file for file in found.kept],
        )


def until_narrow(inquiry: Prompted, width: float, out: Path, progress: Progress) -> tuple[Prompted, str]:
    """Ask more and more prompts per seed until the main interval of the first study is narrow enough, or there are no more.

    Intervals narrow with the root of n, so that each step takes as many as that foretells, and at most four times as many as the
    one before. Every step goes on where the last one was, and so does the same command later.

    Args:
        inquiry: whose parts say with how many examples to begin.
        width: that no main interval (`anchors.study.registry.Study.interval`) may exceed.
        out, progress: see `Prompted.measure`.

    Returns:
        The same inquiry of as many examples as it took, and how many these are, in words.
    """
    kind = inquiry.parts[0].analysis.kind
    line = study(kind)
    examples, most = _steps(inquiry)
    while True:
        parts = [replace(p, how=replace(p.how, examples=examples)) for p in inquiry.parts]
        main = replace(inquiry, parts=[p for p in parts if p.analysis.kind == kind])
        found = line.width(line.tabulate(main.measure(out, progress).rows[kind]))
        told = (
            "there is no interval"
            if isnan(found)
            else f"the widest interval of {line.main} is {found:.3g} wide"
        )
        if found <= width:
            return replace(
                inquiry, parts=parts
            ), f"{examples} examples per seed were enough for --until-width {width:g}: {told}."
        if examples >= most:
            return replace(inquiry, parts=parts), (
                f"--until-width {width:g} is not reached: {told} after all {examples} examples of the test set. More --seeds or "
                "--data would go on."
            )
        foretold = examples * (found / width) ** 2 if found == found else 2 * examples
        examples = min(most, ceil(min(4 * examples, max(1.25 * examples, foretold))))


class _Over(Exception):
    """Time is over, and a batch was kept."""


def in_time(
    model: LanguageModel, parts: Sequence[Part], budget: float, out: Path, progress: Progress
) -> tuple[list[Part], str]:
    """Measure seed by seed, all parts of one before the next, until time is over.

    Args:
        model, parts: what is measured; all parts of the same seeds.
        budget: seconds.
        out: folder whose `runs` holds the finished batches.
        progress: called with (prompts done, prompts in all).

    Returns:
        The parts with the seeds that are whole, and what is left, in words; nothing where nothing is.

    Raises:
        AnchorsError: not even one seed is whole; its finished batches are kept.
    """
    inquiry, seeds, began = Prompted(model, parts), parts[0].how.seeds, time.monotonic()
    each = [min(p.how.examples, len(p.data.test)) for p in parts]
    whole: list[int] = []
    try:
        for seed in seeds:
            for number, part in enumerate(parts):
                before = len(whole) * sum(each) + sum(each[:number])

                def told(done: int, total: int, before: int = before) -> None:
                    progress(before + done, len(seeds) * sum(each))
                    if done < total and time.monotonic() - began > budget:
                        raise _Over

                how = replace(part.how, seeds=(seed,))
                one = (part.analysis, part.task, part.data, how)
                measure(model, *one, out=out, progress=told, certify=lambda: inquiry.certified)
            whole.append(seed)
    except _Over:
        if not whole:
            raise AnchorsError(
                f"{budget:g} seconds were not enough for one seed; what is finished is kept.",
                "The same command goes on from there.",
                code="not-all-run",
            ) from None
        said = f"after {budget:g} seconds {len(whole)} of {len(seeds)} seeds are whole, which these results are of; the same command goes on."
    else:
        said = ""
    return [replace(part, how=replace(part.how, seeds=tuple(whole))) for part in parts], said


def kept_rows(
    model: LanguageModel | Far, parts: Sequence[Part], *, out: Path, runs: Path, name: str, progress: Progress
) -> Report:
    """Measure all parts, and write their rows alone: tables and pictures can be made of these without a model.

    Args:
        model, parts, runs: see `report`.
        out: folder of the rows, a file a kind of analysis.
        name: of the experiment.
        progress: called with (prompts done, prompts in all).
    """
    names = frozenset({name})
    inquiry = (
        model.inquiry(parts, runs, names) if isinstance(model, Far) else Prompted(model, parts, runs, names)
    )
    found = inquiry.measure(out, progress)
    facts = provenance(**found.facts, notes=found.notes)
    return leave(out, name, facts, {}, "none", rows=found.rows)


def steps_ahead(inquiry: Prompted, width: float) -> str:
    """Of `until_narrow`, what a plan can tell: with how many examples it begins, and with how many it ends at the latest."""
    first, most = _steps(inquiry)
    main = study(inquiry.parts[0].analysis.kind).main
    return f"--until-width {width:g} begins with {first} examples per seed, which this plan is of" + (
        f", and goes on until no interval of {main} is wider, with {most}, the whole test set, at the latest: {most / first:.3g} times "
        "the prompts."
        if first < most
        else ": they are the whole test set, and it ends there."
    )


def _steps(inquiry: Prompted) -> tuple[int, int]:
    """Examples per seed of the first step, and at most."""
    most = max(len(part.data.test) for part in inquiry.parts)
    return min(inquiry.parts[0].how.examples, most), most


def report(
    model: LanguageModel | Far,
    parts: Sequence[Part],
    *,
    runs: Path | None = None,
    name: str | None = None,
    **how: Any,
) -> Report:
    """Certify the model, measure all parts, and write rows, tables, figure and pages: see `anchors.study.report.conclude`.

    Args:
        model, parts: what is measured; of a model that is `Far`, by the machines of its cluster.
        runs: folder whose `runs` holds the finished batches, when `out` is this experiment's own; by default `out`.
        name: of the files; by default the first part's kind of analysis.
        how: what `conclude` takes, `out` among it; `layers` and `pages` are layers shown on the pages, and prompts on them
            (information flow only).

    Raises:
        CertificateError: the quick form of `anchors check` failed on this model.
        AnchorsError: the data lie among the results under the name of one of them; see `anchors.study.runner.measure`.
    """
    kinds = list(dict.fromkeys(part.analysis.kind for part in parts))
    if runs is not None:
        how |= {"files": {kind: kind for kind in kinds}}
    names = frozenset({name or kinds[0]})
    if isinstance(model, Far):
        return conclude(model.inquiry(parts, runs or how["out"], names), name=name, **how)
    return conclude(Prompted(model, parts, runs, names), name=name, **how)


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
    return demand(model, prompts)


def notes_on(model: LanguageModel, part: Part, found: Measured) -> list[str]:
    """What a reader must know before believing the numbers of a part."""
    task, data, how = part.task, part.data, part.how
    notes = list(found.notes)
    if found.skipped:
        notes.append(f"{task.name}: {found.skipped} prompts longer than the context were left out.")
    if found.prompts + found.skipped < len(how.seeds) * how.examples:
        notes.append(f"{task.name}: the test part of {data.source} has only {len(data.test)} examples.")
    facts = data.facts(task)
    notes += [f"{task.name}: {said}" for said in (facts.hint(), facts.caution()) if said]
    if beside := model.beside_attention:
        notes.append(beside)
    if not model.carries and not part.analysis.fresh:
        notes.append(WHOLE.format(name=type(model.model).__name__))
    notes += getattr(part.analysis, "notes", lambda _: [])(model)
    if hidden := hidden_labels(model, [d.prompt for d in found.first]):
        notes.append(f"{task.name}: {hidden}")
    return notes


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
    return render_page(payload(f"Information flow: {task.called}", model, task, shown, facts, curves))
