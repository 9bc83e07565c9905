"""Confusion matrices of vanilla in-context learning, without and with contextual calibration."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from anchors.figures.pieces import grid, groups, heat, is_left, span
from anchors.figures.style import plain


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure:
    """One column per task, one row per condition: shares of each true label in colour, counts written in."""
    shown, confusion = groups(tables["summary"]), tables["confusion"]
    conditions = list(dict.fromkeys(confusion["condition"]))
    most = max(group.of(confusion)["gold"].nunique() for group in shown)
    size = min(4.5, max(2.6, 1.2 + 0.35 * most))
    figure, columns = grid(len(shown), len(conditions), width=size, height=size)
    image = None
    for panels, group in zip(columns, shown, strict=True):
        for panel, condition in zip(panels, conditions, strict=True):
            own = group.of(confusion)
            own = own[own["condition"] == condition]
            if not len(own):
                panel.remove()
                continue
            image = _matrix(panel, own)
            accuracy = group.part.set_index(["condition", "metric"]).loc[condition, "accuracy"]
            how = f"{plain(condition)}: " if condition != "none" else ""
            title = f"{how}accuracy {span(accuracy)}"
            panel.set_title(f"{group.title}\n{title}" if panel is panels[0] else title, fontsize=9)
            if panel is panels[-1]:
                panel.set_xlabel("predicted")
            if is_left(panel):
                panel.set_ylabel("true")
    drawn = [panel for panels in columns for panel in panels if panel.figure is not None]
    if image is not None:
        figure.colorbar(image, ax=drawn, label="share of the true label", aspect=30, pad=0.02)
    figure.suptitle(f"Predictions of {plain(model)}", fontsize=10)
    return figure


def _matrix(panel: Axes, own: pd.DataFrame) -> AxesImage:
    labels = list(dict.fromkeys(own["gold"]))
    counts = own.pivot_table(index="gold", columns="predicted", values="prompts", aggfunc="sum")
    counts = counts.loc[labels, labels].to_numpy()
    total = counts.sum(1, keepdims=True)
    share = np.where(total > 0, counts / np.maximum(total, 1), np.nan)
    written = [[str(int(n)) for n in row] for row in counts]
    size = 8 if len(labels) <= 8 else 5
    return heat(panel, share, "Blues", (0, 1), written=written, rows=labels, columns=labels, size=size)
