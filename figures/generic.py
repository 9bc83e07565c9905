"""The picture of a study that brings none: every estimate of its summary with its interval, by layer or by condition."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from anchors.figures.pieces import bars, curve, grid, groups, is_left, legend
from anchors.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, plain

LOOKS = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), (ORANGE, "D"), (PURPLE, "v"), (SKY, "P"), (GREY, "X"))
NEEDED = {"task", "condition", "metric", "value", "low", "high", "examples"}
"""Columns of a summary that can be drawn."""


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure | None:
    """One column per task, one panel per metric: curves over the layers, or bars, one for each condition.

    None where there is no `summary` with one row per task, condition, metric and layer.
    """
    summary = tables.get("summary")
    if summary is None or not len(summary) or not set(summary) >= NEEDED:
        return None
    metrics = list(dict.fromkeys(summary["metric"]))
    looks = {c: LOOKS[i % len(LOOKS)] for i, c in enumerate(dict.fromkeys(summary["condition"]))}
    shown = groups(summary)
    figure, columns = grid(len(shown), len(metrics), height=2.1)
    for panels, group in zip(columns, shown, strict=True):
        for panel, metric in zip(panels, metrics, strict=True):
            own = group.part[group.part["metric"] == metric]
            layered = "layer" in own and own["layer"].notna().any()
            (_curves if layered else _bars)(panel, own.dropna(subset=["value"]), looks)
            if is_left(panel):
                panel.set_ylabel(plain(metric.replace("_", " ")))
        panels[0].set_title(group.title)
    figure.suptitle(plain(model), fontsize=10)
    if len(looks) > 1:
        legend(figure, columns=3)
    return figure


def _curves(panel: Axes, own: pd.DataFrame, looks: dict[str, tuple[str, str]]) -> None:
    own = own.dropna(subset=["layer"])
    for condition, part in own.groupby("condition", sort=False):
        curve(panel, part, *looks[str(condition)], plain(str(condition)))
    panel.set_xlabel("layer")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _bars(panel: Axes, own: pd.DataFrame, looks: dict[str, tuple[str, str]]) -> None:
    for x, (condition, part) in enumerate(own.groupby("condition", sort=False)):
        bars(panel, [x] * len(part), part, looks[str(condition)][0], plain(str(condition)), width=0.8)
    panel.set_xticks([])
