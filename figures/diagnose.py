"""Figures 6 and 14 of the paper: confusion of labels foretold by the keys at the label words, and the actual one."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from anchors.figures.pieces import curve, groups, heat
from anchors.figures.style import BLUE, plain

PREFERRED = "components-10"


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure:
    """One row per task: foretold and actual confusion of each pair (small: confused); with several numbers of
    principal components, their rank correlation, too."""
    shown = groups(tables["summary"])
    several = any(group.part["condition"].nunique() > 1 for group in shown)
    labels = [_labels(group.of(tables["pairs"])) for group in shown]
    sizes = [min(6.0, max(2.3, 1.1 + 0.5 * len(own))) for own in labels]
    figure = Figure(
        figsize=(2 * max(sizes) + 1.6 + 2.8 * several, 0.5 + sum(sizes) + 0.35 * len(sizes)),
        layout="constrained",
    )
    rows = figure.subfigures(len(shown), 1, height_ratios=sizes, squeeze=False)[:, 0]
    for row, group, own in zip(rows, shown, labels, strict=True):
        conditions = list(dict.fromkeys(group.part["condition"]))
        condition = PREFERRED if PREFERRED in conditions else conditions[0]
        pairs = group.of(tables["pairs"])
        pairs = pairs[pairs["condition"] == condition]
        panels = row.subplots(1, 2 + several, width_ratios=[max(sizes)] * 2 + [2.4] * several)
        _map(
            panels[0],
            pairs,
            own,
            "predicted",
            f"predicted ({condition.removeprefix('components-')} components)",
        )
        _map(panels[1], pairs, own, "actual", "actual")
        if several:
            _over_components(panels[2], group.part)
        found = group.part[group.part["condition"] == condition].iloc[0]
        row.suptitle(f"{group.title.replace(chr(10), ', ')}: {_agreement(found, len(pairs))}", fontsize=9)
    figure.suptitle(f"Confused labels in {plain(model)}", fontsize=10)
    return figure


def _labels(pairs: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys([*pairs["one"], *pairs["other"]]))


def _map(panel: Axes, pairs: pd.DataFrame, labels: list[str], column: str, title: str) -> None:
    count = len(labels)
    matrix, written = np.full((count, count), np.nan), [["" for _ in labels] for _ in labels]
    for pair in pairs.to_dict("records"):
        i, j = labels.index(pair["one"]), labels.index(pair["other"])
        matrix[i, j] = matrix[j, i] = value = pair[column]
        text = "none" if np.isnan(value) else f"{value:.2f}"
        if column == "actual" and count <= 8 and not np.isnan(pair["low"]):
            text += f"\n{pair['low']:.2f}–{pair['high']:.2f}"
        written[i][j] = written[j][i] = text
    bottom = min([0.5, *matrix[~np.isnan(matrix)]]) if column == "actual" else 0.0
    image = heat(
        panel, matrix, "Blues_r", (bottom, 1), written=written, rows=labels, columns=labels,
        size=7 if count <= 8 else 5,
    )  # fmt: skip
    panel.set_title(title, fontsize=9)
    panel.set_aspect("equal")
    name = "AUC (small: confused)" if column == "actual" else "distance (small: confused)"
    panel.figure.colorbar(image, ax=panel, aspect=25, pad=0.02, label=name)


def _over_components(panel: Axes, summary: pd.DataFrame) -> None:
    numbers = summary["condition"].str.removeprefix("components-").astype(int)
    curve(
        panel, summary.assign(components=numbers), BLUE, "o", "rank correlation", by="components",
        columns=("correlation", "low", "high"),
    )  # fmt: skip
    panel.axhline(0, color="0.6", linewidth=0.8, linestyle=":")
    panel.set(ylim=(-1.05, 1.05), xlabel="components", ylabel="rank correlation")
    if len(numbers) <= 8:
        panel.set_xscale("log")
        panel.set_xticks(sorted(numbers), [str(n) for n in sorted(numbers)], fontsize=8)
        panel.minorticks_off()
    else:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _agreement(found: pd.Series, pairs: int) -> str:
    rho, low, high, p = (float(found[c]) for c in ("correlation", "low", "high", "p"))
    if np.isnan(rho):
        return f"rank correlation not defined ({pairs} pair{'s' * (pairs != 1)})"
    between = "" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]"
    return f"rank correlation {rho:.2f}{between}, p = {p:.3f}"
