"""Table 2 of the paper: accuracy and loyalties on compressed demonstrations, by method."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from anchors.figures.pieces import bars, grid, groups, is_left, legend
from anchors.figures.style import BLUE, GREEN, GREY, ORANGE, VERMILION, plain

METRICS = {"accuracy": "accuracy", "label_loyalty": "label\nloyalty", "word_loyalty": "word\nloyalty"}
METHODS = {
    "none": (GREY, "whole demonstrations"),
    "hidden_anchor": (BLUE, "hidden states of the anchors"),
    "text_anchor": (GREEN, "anchors as text"),
    "hidden_random": (ORANGE, "random tokens, mean"),
    "hidden_random_top": (VERMILION, "random tokens, best draw"),
}
"""Colour and name of each method, in the paper's order."""


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure:
    """One panel per task, a bar for each method; whole demonstrations have no loyalty (1 by definition)."""
    summary = tables["summary"]
    shown = groups(summary)
    methods = {name: look for name, look in METHODS.items() if name in set(summary["condition"])}
    width = 0.85 / len(methods)
    figure, panels = grid(len(shown), height=2.5, sharey=True)
    for (panel,), group in zip(panels, shown, strict=True):
        for place, (method, (colour, name)) in enumerate(methods.items()):
            own = group.part[group.part["condition"] == method].set_index("metric")
            metrics = [m for m in METRICS if m in own.index]
            x = np.array([list(METRICS).index(m) for m in metrics]) + (place - (len(methods) - 1) / 2) * width
            bars(panel, x, own.loc[metrics], colour, name, width=0.95 * width)
        panel.set_xticks(range(len(METRICS)), METRICS.values())
        panel.set(title=group.title, ylim=(0, 1.02))
        if is_left(panel):
            panel.set_ylabel("mean over prompts")
    figure.suptitle(f"Compressed demonstrations in {plain(model)}", fontsize=10)
    legend(figure, columns=3)
    return figure
