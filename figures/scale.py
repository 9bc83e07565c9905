"""Findings against the size of the model."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from anchors.figures.style import BLUE, GREY, VERMILION


def draw(effects: pd.DataFrame, findings: Sequence[str]) -> Figure:
    """A panel a finding: the effect with its interval against billions of parameters; thin lines are the intervals of all findings
    at once, colours what they come to: it holds (blue), is reversed (vermilion), or neither (grey).

    Args:
        effects: of `anchors.experiments.scale.effects`.
        findings: names, in order; those without a number have no panel.
    """
    own = effects[(effects["task"] == "mean") & effects["value"].notna() & effects["size"].notna()]
    findings = [name for name in findings if (own["finding"] == name).any()]
    columns = 6
    rows = -(-len(findings) // columns)
    figure = Figure(figsize=(2.1 * columns, 1.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).flat
    for name, axis in zip(findings, axes, strict=False):
        part = own[own["finding"] == name].sort_values("size")
        axis.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
        axis.plot(part["size"], part["value"], color=GREY, linewidth=0.8)
        for row in part.to_dict("records"):
            colour = {1: BLUE, -1: VERMILION, 0: GREY}[row["sign"]]
            axis.plot([row["size"]] * 2, [row["wide_low"], row["wide_high"]], color=colour, linewidth=0.8)
            axis.plot([row["size"]] * 2, [row["low"], row["high"]], color=colour, linewidth=2.4)
            axis.plot(row["size"], row["value"], "o", color=colour, markersize=4)
        axis.set_title(name, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(0.1, 2.2)
        axis.set_xticks([0.135, 0.5, 1.5], ["135M", "0.5B", "1.5B"], fontsize=7)
        axis.set_xticks([], minor=True)
        axis.tick_params(axis="y", labelsize=7)
    for axis in list(axes):
        axis.set_visible(False)
    return figure
