"""Figures 4, 8 and 10 of the paper: loyalties when label words, or random positions, are isolated."""

import re

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from anchors.figures.pieces import Group, bars, curve, grid, groups, is_left, legend
from anchors.figures.style import BLUE, ORANGE, SKY, VERMILION, plain

LOYALTIES = {"label_loyalty": "label loyalty", "word_loyalty": "word loyalty"}
SERIES = {
    ("first", "label"): (BLUE, "o", "-", None, "label words, first layers"),
    ("first", "random"): (SKY, "s", "--", "///", "random positions, first layers"),
    ("last", "label"): (VERMILION, "^", "-", None, "label words, last layers"),
    ("last", "random"): (ORANGE, "v", "--", "///", "random positions, last layers"),
}
"""Colour, marker, line, hatch and name of each series, by side and isolated positions."""

_CONDITION = re.compile(r"(first|last)-(\d+)/(label|random)")


def parts(condition: str) -> tuple[str, int, str] | None:
    """Side, number of layers and positions of a condition such as `first-5/label`; None for others."""
    found = _CONDITION.fullmatch(condition)
    return found and (found[1], int(found[2]), found[3])


def named(condition: str) -> str:
    """A condition in words."""
    if (found := parts(condition)) is None:
        return "untouched" if condition == "none" else plain(condition)
    side, k, target = found
    layers = f"{side} layer" if k == 1 else f"{side} {k} layers"
    return f"{layers}: {'label words' if target == 'label' else 'random positions'} isolated"


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure:
    """Label loyalty above word loyalty, per task: bars for one number of isolated layers, curves over several."""
    shown = [_parsed(group) for group in groups(tables["summary"])]
    figure, columns = grid(len(shown), 2, height=2.0, sharey=True)
    for panels, group in zip(columns, shown, strict=True):
        for panel, (metric, name) in zip(panels, LOYALTIES.items(), strict=True):
            own = group.part[group.part["metric"] == metric]
            numbers = sorted(set(own["k"]))
            (_curves if len(numbers) > 1 else _bars)(panel, own)
            panel.set(ylim=(0, 1.02))
            if is_left(panel):
                panel.set_ylabel(name)
        panels[0].set_title(group.title)
    figure.suptitle(f"Isolated label words in {plain(model)}", fontsize=10)
    legend(figure, columns=2)
    return figure


def _parsed(group: Group) -> Group:
    found = group.part["condition"].map(parts)
    own = group.part[found.notna()]
    facts = pd.DataFrame(found.dropna().tolist(), columns=["side", "k", "target"], index=own.index)
    return group._replace(part=own.join(facts))


def _curves(panel: Axes, own: pd.DataFrame) -> None:
    for (side, target), (colour, marker, line, _, name) in SERIES.items():
        series = own[(own["side"] == side) & (own["target"] == target)]
        if len(series):
            curve(panel, series, colour, marker, name, by="k", style=line)
    panel.set_xlabel("isolated layers")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _bars(panel: Axes, own: pd.DataFrame) -> None:
    sides = [s for s in ("first", "last") if s in set(own["side"])]
    for (side, target), (colour, _, _, hatch, name) in SERIES.items():
        series = own[(own["side"] == side) & (own["target"] == target)]
        if len(series):
            x = sides.index(side) + (-0.2 if target == "label" else 0.2)
            bars(panel, [x], series, colour, name, width=0.38, hatch=hatch)
    ticks = [
        f"{side} {k} layer{'s' * (k != 1)}"
        for side, k in dict(zip(own["side"], own["k"], strict=True)).items()
    ]
    panel.set_xticks(range(len(sides)), sorted(ticks))
