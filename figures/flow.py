"""Figures 3, 7 and 9 of the paper: the share of S_wp, S_pq and S_ww by layer, one panel per task."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from anchors.figures.pieces import curve, grid, groups, is_left, legend
from anchors.figures.style import COLOURS, LABELS, MARKERS, plain
from anchors.stats import SUMS


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure:
    """Draw `anchors.stats.flow_summary`: shares with 95 % bootstrap bands, layers counted from 0."""
    shown = groups(tables["summary"])
    figure, panels = grid(len(shown), sharey=True, height=2.2)
    for (panel,), group in zip(panels, shown, strict=True):
        for metric in SUMS:
            own = group.part[group.part["metric"] == metric]
            share = ("share", "share_low", "share_high")
            curve(panel, own, COLOURS[metric], MARKERS[metric], LABELS[metric], columns=share)
        panel.set(title=group.title, xlabel="layer", ylim=(-0.03, 1.03))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if is_left(panel):
            panel.set_ylabel("share of the flow")
    figure.suptitle(f"Information flow in {plain(model)}", fontsize=10)
    legend(figure, columns=3)
    return figure
