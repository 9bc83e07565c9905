"""Figures 3 and 7 of the paper: the share of S_wp, S_pq and S_ww by layer, one panel per task."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from anchors.figures.style import COLOURS, LABELS, MARKERS
from anchors.stats import SUMS


def draw(summary: pd.DataFrame, model: str) -> Figure:
    """Draw the summary of `anchors.stats.flow_summary`: shares with 95 % bootstrap bands, layers counted from 0."""
    tasks = list(dict.fromkeys(summary["task"]))
    figure = Figure(figsize=(0.6 + 3.1 * len(tasks), 2.9), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        part = summary[summary["task"] == task]
        for metric in SUMS:
            curve = part[part["metric"] == metric].sort_values("layer")
            layers = curve["layer"].astype(int)
            panel.plot(
                layers,
                curve["share"],
                color=COLOURS[metric],
                marker=MARKERS[metric],
                markersize=3,
                label=LABELS[metric],
            )
            panel.fill_between(
                layers,
                curve["share_low"].astype(float),
                curve["share_high"].astype(float),
                color=COLOURS[metric],
                alpha=0.2,
                linewidth=0,
            )
        panel.set(title=f"{task}, {part['examples'].iloc[0]} examples", xlabel="layer", ylim=(0, 1))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("share of the flow")
    figure.suptitle(f"Information flow in {model}", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
