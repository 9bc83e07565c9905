"""Tables, figures and provenance of a flow run."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from anchors.figures import inject_flow as figures
from anchors.injection.flow_choice import choices, damage
from anchors.injection.flow_report import Measured, Wanted
from anchors.injection.flow_tables import MEASURES, tables
from anchors.injection.guessing import guessing
from anchors.injection.suite import Suite
from anchors.results import provenance
from anchors.shelf import Shelf

NAME = "flow"


def write(
    measured: Measured,
    suites: Sequence[Suite],
    wanted: Wanted,
    out: Path,
    *,
    measures: Sequence[str] = MEASURES,
    resamples: int = 1000,
) -> tuple[dict[str, pd.DataFrame], list[Path], list[str]]:
    """Write everything that can be said about the rows.

    Args:
        measured, suites, wanted: as in `anchors.injection.flow_report.measure`.
        out: results folder.
        measures: which are drawn by layer; the tables hold all.
        resamples: of the bootstrap.

    Returns:
        Tables by name (layers, strengths, accuracy; damage, points; choices, regret), the files, and notes.
    """
    scenarios, experts = wanted.of(suites[0])
    found = tables(measured.rows, resamples)
    found["guessing"] = guessing(suites, scenarios, "test", wanted.examples)
    notes = _notes(measured)
    if measured.vision in scenarios:
        found["damage"], found["points"] = damage(measured)
        chosen, regret = choices(measured)
        if len(chosen):
            found |= {"choices": chosen, "regret": regret}
        else:
            notes.append("No rule for λ was judged: that needs the experts' own scenarios, too.")
    grid = sorted({f"{x:g}" for x in wanted.strengths})
    facts = provenance(
        model=suites[0].name,
        suites=[s.name for s in suites],
        parts=[part | {"grid": grid} for part in measured.configs],
    )
    shelf = Shelf(out, NAME)
    for name, table in {"rows": measured.rows, **found}.items():
        shelf.table(f"{NAME}-{name}", table, csv=name != "rows")
    after = min((s for s in wanted.strengths if s > 0), key=lambda s: abs(np.log(s)))
    model = f"{suites[0].name}" if len(suites) == 1 else f"{suites[0].name} and {len(suites) - 1} more"
    panels = {
        "vision": [(measured.vision, expert) for expert in experts if measured.vision in scenarios],
        "skills": [(expert, expert) for expert in experts if expert in scenarios],
    }
    for measure in measures:
        for name, own in panels.items():
            if own:
                shelf.figure(f"{NAME}-{name}-{measure}", figures.draw(found, measure, own, model, after))
    if "damage" in found:
        shelf.figure(f"{NAME}-damage", figures.draw_damage(found["damage"], found["points"], model))
    if "regret" in found:
        shelf.figure(f"{NAME}-regret", figures.draw_regret(found["choices"], found["regret"], model))
    files, moved = shelf.write(facts)
    return found, files, notes + moved


def _notes(measured: Measured) -> list[str]:
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
