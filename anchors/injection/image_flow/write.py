"""The flow of merged models as a study: what is kept beside its rows, and what a reader must know of its tables."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from anchors.injection.asking.guessing import guessing
from anchors.injection.asking.suite import Suite
from anchors.injection.image_flow.report import Wanted, measure, stretches
from anchors.injection.image_flow.rows import KIND, MeasuredFlow
from anchors.injection.suites import SuiteInquiry
from anchors.study.engine import Progress, Stretch
from anchors.study.report import Found, finish
from anchors.summaries import Tables


@dataclass(frozen=True)
class Flowing(SuiteInquiry):
    """Flow and accuracy of merged models over λ: see `anchors.injection.image_flow.report.measure`."""

    kind = KIND

    def measure(self, out: Path, progress: Progress) -> Found:
        """With ‖τ_v‖ / ‖τ_e‖ of every expert, and what guessing comes to."""
        found = measure(
            self.suites, self.wanted, out=out, device=self.device, precision=self.precision, progress=progress
        )
        return self.found(found)

    def found(self, measured: MeasuredFlow) -> Found:
        """Of a measurement, what is written."""
        suites, wanted = self.suites, self.wanted
        more = {
            "ratios": measured.ratios,
            "guessing": guessing(suites, wanted.of(suites[0])[0], "test", wanted.examples),
        }
        grid = sorted({f"{x:g}" for x in wanted.strengths})
        others = f" and {len(suites) - 1} more" if len(suites) > 1 else ""
        facts = {
            "model": suites[0].name + others,
            "suites": [s.name for s in suites],
            "parts": [part | {"grid": grid} for part in measured.configs],
        }
        return Found({KIND: measured.rows, **more}, facts, kept=measured)

    def stretches(self) -> Iterator[Stretch]:
        """See `anchors.injection.image_flow.report.stretches`."""
        return stretches(self.suites, self.wanted, [], device=self.device, precision=self.precision)

    def notes_on(self, found: Found, tables: Tables) -> list[str]:
        """How far the intervals and the flow of the loss can be trusted, and what was not judged."""
        notes = _notes(found.kept)
        if "damage" in tables and "regret" not in tables:
            notes.append("No rule for λ was judged: that needs the experts' own scenarios, too.")
        return notes


def write(
    measured: MeasuredFlow, suites: Sequence[Suite], wanted: Wanted, out: Path
) -> tuple[Tables, list[Path], list[str]]:
    """Write everything that can be said about the rows.

    Args:
        measured, suites, wanted: as in `anchors.injection.image_flow.report.measure`.
        out: results folder.

    Returns:
        Tables by name (layers, strengths, accuracy; damage, points; choices, regret), the files, and notes.
    """
    inquiry = Flowing(suites, wanted)
    done = finish(inquiry, inquiry.found(measured), out=out)
    return done.tables, done.files, done.notes


def _notes(measured: MeasuredFlow) -> list[str]:
    notes = list(measured.notes)
    rows = measured.rows
    seeds = rows["seed"].nunique()
    if seeds < 3:
        notes.append(f"{seeds} training{'s' * (seeds > 1)}: intervals say little about other trainings.")
    loss = rows[
        (rows["metric"] == "loss") & (rows["labels"] == "gold") & (rows["scenario"] == measured.vision)
    ]
    if len(loss):
        by = loss.groupby("strength")["value"].mean()
        notes.append(
            f"The loss on {measured.vision} goes from {by.iloc[0]:.3g} to {by.iloc[-1]:.3g} nats over λ, and its gradient with "
            "it: compare the flow of the loss between strengths only beside that of the log-odds."
        )
    return [re.sub(r"\s+", " ", note) for note in notes]
