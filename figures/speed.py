"""Table 3 of the paper: speed-up by compressed demonstrations, beside the ratio of the numbers of tokens."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from anchors.figures.pieces import bars, groups, legend
from anchors.figures.style import BLUE, ORANGE, VERMILION, plain

SIDES = {"hidden_anchor": "anchors", "whole_cached": "whole, cached"}


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure:
    """A bar per task, for anchors and for whole demonstrations in a cache, with its interval, the ratio of tokens as a diamond, and a line where nothing is gained."""
    shown = groups(tables["summary"])
    entries = pd.concat(
        group.part.assign(name=group.title.replace(", ", "\n", 1) + "\n" + group.part["condition"].map(SIDES))
        for group in shown
    ).reset_index(drop=True)
    # In a cache no token is saved: the ratio is 1, which the line shows.
    entries["limit"] = entries["limit"].astype(float).where(entries["condition"] != "whole_cached")
    figure = Figure(figsize=(max(4.2, 1.2 + 1.25 * len(entries)), 3.2), layout="constrained")
    panel = figure.subplots()
    x = np.arange(len(entries))
    bars(panel, x, entries, BLUE, "measured", width=0.6)
    panel.plot(
        x, entries["limit"], "D", color=VERMILION, markersize=6, markeredgecolor="white",
        label="tokens: $(L_{demo} + L_x)/(L_x + anchors)$",
    )  # fmt: skip
    names: list[str] = []
    highest = float(np.nanmax(entries[["value", "high", "limit"]].astype(float)))
    for place, (value, low, high, limit) in enumerate(
        entries[["value", "low", "high", "limit"]].astype(float).itertuples(index=False)
    ):
        names.append(f"{value:.2f}×" + ("" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]"))
        if not np.isnan(limit):
            panel.text(place + 0.1, limit, f"{limit:.2f}×", ha="left", va="center", fontsize=8, color=ORANGE)
    panel.axhline(1, color="0.5", linewidth=0.8, linestyle=":")
    panel.set_xticks(
        x, [f"{own}\n{how}" for own, how in zip(names, entries["name"], strict=True)], fontsize=7
    )
    panel.set(ylabel="times faster than whole prompts", ylim=(0, 1.08 * highest), xlim=(-0.6, len(x) - 0.4))
    figure.suptitle(f"Speed-up by compressed demonstrations in {plain(model)}", fontsize=10)
    legend(figure)
    return figure
