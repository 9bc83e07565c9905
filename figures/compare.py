"""Models or runs side by side."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from anchors.figures.generic import LOOKS
from anchors.figures.pieces import legend
from anchors.figures.style import plain
from anchors.stats import GROUP, parts_by


def draw(table: pd.DataFrame, title: str) -> Figure:
    """One panel per task and metric: every condition with its interval, the runs beside each other."""
    runs = {run: LOOKS[i % len(LOOKS)] for i, run in enumerate(dict.fromkeys(table["run"]))}
    cells = [
        (
            f"{task}"
            + (f", {shots} shots" if table["shots"].nunique() > 1 else "")
            + ("" if control == "none" else f", {control}"),
            metric,
            part,
        )
        for (task, shots, control, metric), part in parts_by(table, [*GROUP, "metric"])
    ]
    across = min(3, len(cells))
    down = -(-len(cells) // across)
    tall = 1.1 + 0.3 * max(part["condition"].nunique() for *_, part in cells) * max(1.0, len(runs) / 3)
    figure = Figure(figsize=(1.2 + 3.3 * across, 0.8 + tall * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for panel in panels.flat[len(cells) :]:
        panel.set_visible(False)
    for panel, (name, metric, part) in zip(panels.flat, cells, strict=False):
        conditions = list(dict.fromkeys(part["condition"]))
        for number, (run, (colour, marker)) in enumerate(runs.items()):
            own = part[part["run"] == run].set_index("condition").reindex(conditions)
            place = np.arange(len(conditions)) + 0.7 * ((number + 0.5) / len(runs) - 0.5)
            panel.hlines(place, own["low"].astype(float), own["high"].astype(float), color=colour)
            panel.plot(own["value"].astype(float), place, marker, color=colour, label=plain(run))
        panel.set_yticks(
            range(len(conditions)), [plain("untouched" if c == "none" else c) for c in conditions]
        )
        panel.set_ylim(len(conditions) - 0.5, -0.5)
        panel.set_xlabel(plain(metric))
        panel.set_title(plain(name))
    figure.suptitle(plain(title), fontsize=10)
    legend(figure, columns=min(3, len(runs)))
    return figure
