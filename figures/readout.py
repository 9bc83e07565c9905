"""Figures 5 and 11 of the paper: how well the attention to the label words tells the prediction, by layer."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from anchors.figures.pieces import curve, grid, groups, is_left, is_right, legend
from anchors.figures.style import BLUE, VERMILION, plain

AUCROC, R = "AUCROC$_l$ (left axis)", "$R_l$ (right axis)"
LIMITS = (-1.0, 2.0)
"""R_l is not drawn beyond: where little is read out in all layers together, its divisor is near 0."""


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure:
    """AUCROC_l against the left axis, R_l against the right one, with 95 % bootstrap intervals (a band; thin lines)."""
    shown = groups(tables["summary"])
    figure, panels = grid(len(shown), height=2.4)
    for (panel,), group in zip(panels, shown, strict=True):
        auc, r = (group.part[group.part["metric"] == name] for name in ("aucroc", "r"))
        right = panel.twinx()
        right.spines["right"].set_visible(True)
        panel.set(title=group.title, xlabel="layer", xlim=(-0.5, auc["layer"].max() + 0.5))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.axhline(0.5, color="0.6", linewidth=0.8, linestyle=":", label="chance")
        panel.tick_params(axis="y", colors=BLUE)
        right.tick_params(axis="y", colors=VERMILION)
        if is_left(panel):
            panel.set_ylabel("AUCROC$_l$", color=BLUE)
        if is_right(panel) or group is shown[-1]:
            right.set_ylabel("$R_l$", color=VERMILION)
        curve(panel, auc, BLUE, "o", AUCROC)
        curve(right, r, VERMILION, "s", R, band=False)
        panel.set_ylim(min(0.4, float(auc["low"].min()), float(auc["value"].min())) - 0.02, 1.02)
        if _limited(right, r["value"].astype(float)):
            panel.set_xlabel("layer ($R_l$ leaves the axis)")
        if auc["value"].isna().all():
            panel.set_ylim(0.4, 1.02)
            note = "the model predicts\none label only"
            panel.text(0.5, 0.6, note, ha="center", va="center", transform=panel.transAxes)
    figure.suptitle(f"Reading the prediction off the label words in {plain(model)}", fontsize=10)
    legend(figure, columns=3)
    return figure


def _limited(right: Axes, value: pd.Series) -> bool:
    """Set the axis of R_l; whether the curve leaves it."""
    low, high = min(0.0, value.min()), max(1.0, value.max())
    right.set_ylim(max(low, LIMITS[0]) - 0.05, min(high, LIMITS[1]) + 0.05)
    return low < LIMITS[0] or high > LIMITS[1]
