"""Table 1 of the paper: accuracy with and without re-weighted anchors, and the fitted β."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from anchors.figures.pieces import Group, bars, groups, heat
from anchors.figures.style import BLUE, GREY, SKY, plain

NAMES = {"none": "as it is", "reweighted": "re-weighted", "re-weighted, 1-shot": "re-weighted,\n1-shot"}
COLOURS = (GREY, SKY, BLUE)


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure:
    """One row per task: accuracy at the left, then β of each label as a heat map, layers by heads, on one scale."""
    shown, beta = groups(tables["summary"]), tables["beta"]
    labels = max((group.of(beta)["label"].nunique() for group in shown), default=0)
    size = (2.8 + 1.4 * labels + 0.7 * (labels > 0), 0.7 + 2.1 * len(shown))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(shown), 1 + labels, squeeze=False, width_ratios=[1.7] + [1] * labels)
    largest = float(beta["value"].abs().max()) if len(beta) else 1.0
    image, used = None, []
    for row, group in zip(panels, shown, strict=True):
        _accuracy(row[0], group)
        own = group.of(beta)
        names = list(dict.fromkeys(own["label"]))
        for panel in row[1 + len(names) :]:
            panel.remove()
        for panel, label in zip(row[1:], names, strict=False):
            image = _beta(panel, own[own["label"] == label], largest or 1.0)
            panel.set_title(plain(label, 14), fontsize=9)
            panel.tick_params(labelleft=panel is row[1])
            used.append(panel)
            panel.set_xlabel("head", fontsize=8)
        if names:
            row[1].set_ylabel("layer", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=used, label="β", aspect=30, pad=0.02)
    figure.suptitle(f"Anchor re-weighting in {plain(model)}", fontsize=10)
    return figure


def _accuracy(panel: Axes, group: Group) -> None:
    own = group.part[group.part["metric"] == "accuracy"]
    names = []
    order = sorted(dict.fromkeys(own["condition"]), key=lambda c: "weighted" in c)
    for x, condition in enumerate(order):
        one = own[own["condition"] == condition]
        colour = BLUE if "weighted" in condition else COLOURS[min(x, 1)]
        bars(panel, [x] * len(one), one, colour, condition, width=0.7)
        names.append(f"{NAMES.get(condition, plain(condition))}\n{one['value'].iloc[0]:.2f}")
    panel.set_xticks(range(len(order)), names, fontsize=7)
    panel.set(ylim=(0, 1.02), ylabel="accuracy", xlim=(-0.6, len(order) - 0.4))
    panel.set_title(group.title, fontsize=9)


def _beta(panel: Axes, own: pd.DataFrame, largest: float) -> AxesImage:
    matrix = own.pivot_table(index="layer", columns="head", values="value")
    image = heat(panel, matrix.to_numpy(), "RdBu_r", (-largest, largest))
    panel.set_yticks(*_few(matrix.index), fontsize=7)
    panel.set_xticks(*_few(matrix.columns), fontsize=7)
    return image


def _few(numbers: pd.Index) -> tuple[list[int], list[str]]:
    """At most five ticks: places and names."""
    step = -(-len(numbers) // 5)
    places = list(range(0, len(numbers), step))
    return places, [str(int(numbers[i])) for i in places]
