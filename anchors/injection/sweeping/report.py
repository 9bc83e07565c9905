"""A sweep as a study: what is kept beside its rows, and what a reader must know of its tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from anchors.injection.asking.guessing import guessing
from anchors.injection.asking.suite import Suite
from anchors.injection.suites import SuiteInquiry
from anchors.injection.sweeping.sweep import KIND, Sweep, stretches, sweep
from anchors.study.engine import Progress, Stretch
from anchors.study.report import Found, Report, conclude
from anchors.summaries import Tables

NAME = "inject_sweep"
SHARES = 8
"""Cells of a suite's scenario where a cluster measures: each loads the models and encodes the images again."""


@dataclass(frozen=True)
class Sweeping(SuiteInquiry):
    """A sweep over suites: see `anchors.injection.sweeping.sweep.sweep`."""

    kind = KIND

    def measure(self, out: Path, progress: Progress) -> Found:
        """With the settings, and what guessing comes to."""
        suites, wanted = self.suites, self.wanted
        found = sweep(
            suites, wanted, out=out, device=self.device, precision=self.precision, progress=progress
        )
        asked = dict.fromkeys([*wanted.skills(suites[0]), suites[0].vision])
        more = {
            "settings": found.settings,
            "guessing": guessing(suites, asked, wanted.split, wanted.limit),
        }
        grid = sorted(set(found.settings["setting"] + " " + found.settings["mask"].astype(str)))
        parts = [part | {"grid": grid, "retention": wanted.retention} for part in found.configs]
        facts = {"model": suites[0].name, "seeds": [s.seed for s in suites], "parts": parts}
        return Found({KIND: found.rows, **more}, facts, found.notes)

    def stretches(self) -> Iterator[Stretch]:
        """See `anchors.injection.sweeping.sweep.stretches`."""
        return stretches(self.suites, self.wanted, [], device=self.device, precision=self.precision)

    def shares(self) -> list["Sweeping"]:
        """Of every suite and scenario every `SHARES`-th setting."""
        return [
            replace(
                self, suites=[suite], wanted=replace(self.wanted, scenarios=(skill,), portion=(first, SHARES))
            )
            for suite in self.suites
            for skill in self.wanted.skills(suite)
            for first in range(SHARES)
        ]

    def notes_on(self, found: Found, tables: Tables) -> list[str]:
        """Of settings that were chosen: λ at the edge of the grid, vision that is not kept after all."""
        return _edges(tables["best"]) + _forgetful(tables["best"])


def report(
    suites: Sequence[Suite], wanted: Sweep, *, device: str = "auto", precision: str = "auto", **how: Any
) -> Report:
    """Sweep, and write rows, tables and pictures: see `anchors.study.report.conclude`.

    Args:
        suites, wanted, device, precision: as in `anchors.injection.sweeping.sweep.sweep`.
        how: what `conclude` takes, `out` among it.

    Raises:
        AnchorsError: see `anchors.injection.sweeping.sweep.sweep`.
    """
    return conclude(Sweeping(suites, wanted, device, precision), **how)


def _forgetful(best: pd.DataFrame) -> list[str]:
    """What was chosen for keeping vision, and does not keep it where results are reported."""
    found = best[~best["kept"] & (best["family"] != "any")]
    return [
        f"{row.scenario}: {row.setting} was chosen because it keeps {100 * row.retention:g} % of the VLM's vision on "
        f"{row.chosen_on}; on {row.split} it keeps {100 * row.vision_kept:.0f} %."
        for row in found.itertuples()
    ]


def _edges(best: pd.DataFrame) -> list[str]:
    found = best[best["edge"] & (best["family"] != "any")]
    return [
        f"{scenario}: the λ chosen for {', '.join(own['family'])} is the largest that was tried; larger ones may be better "
        "(--strengths)."
        for scenario, own in found.groupby("scenario", sort=False)
    ]
