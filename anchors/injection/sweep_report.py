"""A sweep's rows, tables and pictures, written with their provenance."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from anchors.injection.guessing import guessing
from anchors.injection.suite import Suite
from anchors.injection.sweep import Sweep, sweep
from anchors.injection.tables import tables
from anchors.report import Report
from anchors.results import provenance
from anchors.shelf import Shelf

NAME = "inject_sweep"


def report(
    suites: Sequence[Suite],
    wanted: Sweep,
    *,
    out: Path,
    device: str = "auto",
    precision: str = "auto",
    csv: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Sweep, and write rows, tables and pictures under `out`.

    Args:
        suites, wanted, device, precision, progress: as in `anchors.injection.sweep.sweep`.
        out: folder of the results.
        csv: write the rows as CSV, too.

    Raises:
        AnchorsError: see `anchors.injection.sweep.sweep`.
    """
    found = sweep(suites, wanted, out=out, device=device, precision=precision, progress=progress)
    made = tables(found.rows, found.settings, wanted.split, retention=wanted.retention)
    asked = dict.fromkeys([*wanted.skills(suites[0]), suites[0].vision])
    made["guessing"] = guessing(suites, asked, wanted.split, wanted.limit)
    notes = found.notes + _edges(made["best"]) + _forgetful(made["best"])
    grid = sorted(set(found.settings["setting"] + " " + found.settings["mask"].astype(str)))
    facts = provenance(
        model=suites[0].name,
        seeds=[s.seed for s in suites],
        parts=[part | {"grid": grid, "retention": wanted.retention} for part in found.configs],
        notes=notes,
    )
    from anchors.figures import inject_sweep

    shelf = Shelf(out, NAME)
    shelf.table(NAME, found.rows, csv=csv)
    for name, table in (made | {"settings": found.settings}).items():
        shelf.table(f"{NAME}_{name}", table)
    for name, figure in inject_sweep.draw(made, suites[0].name).items():
        shelf.figure(f"{NAME}_{name}", figure)
    files, moved = shelf.write(facts)
    return Report(made, files, notes + moved, facts)


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
