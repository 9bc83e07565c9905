"""What several figures are made of: panels by task, curves, bars, heat maps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from anchors.figures.style import plain
from anchors.stats import GROUP, parts_by


class Group(NamedTuple):
    """What belongs into one panel: a task with its number of shots and control.

    Attributes:
        title: task and number of examples; shots and control where the task has several of them.
        part: the rows of the table.
        key: task, shots and control.
    """

    title: str
    part: pd.DataFrame
    key: dict[str, Any]

    def of(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows of another table that belong here."""
        same = np.ones(len(table), bool)
        for column, value in self.key.items():
            same &= (table[column] == value).to_numpy(bool)
        return table[same]


def groups(summary: pd.DataFrame) -> list[Group]:
    """One group per task, shots and control, tasks in the order of the table."""
    columns = [c for c in GROUP if c in summary]
    found = []
    for values, part in parts_by(summary, columns):
        key = dict(zip(columns, values, strict=True))
        own = summary[summary["task"] == key["task"]]
        more = []
        if "shots" in key and own["shots"].nunique() > 1:
            more.append("1 shot" if key["shots"] == 1 else f"{key['shots']} shots")
        if "control" in key and own["control"].nunique() > 1:
            more.append("no control" if key["control"] == "none" else f"control {plain(key['control'])}")
        task, below = plain(key["task"]), ", ".join(more)
        title = f"{task}, {_examples(part)}" + (f"\n{below}" if more else "")
        found.append(Group(title, part, key))
    order = list(dict.fromkeys(summary["task"]))
    return sorted(found, key=lambda group: order.index(group.key["task"]))


def _examples(part: pd.DataFrame) -> str:
    examples = int(part["examples"].max())
    seeds = int(part["seeds"].max()) if "seeds" in part else 1
    if seeds > 1 and examples % seeds == 0:
        return f"{examples // seeds} examples × {seeds} seeds"
    return f"{examples} example{'s' * (examples != 1)}" + (f", {seeds} seeds" if seeds > 1 else "")


def grid(
    count: int, rows: int = 1, *, width: float = 3.1, height: float = 2.6, across: int = 4, **share: Any
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with `count` columns of `rows` panels, at most `across` beside each other; and the columns."""
    columns = min(count, across)
    blocks = -(-count // columns)
    figure = Figure(
        figsize=(max(4.2, 0.6 + width * columns), 0.7 + height * rows * blocks), layout="constrained"
    )
    axes = figure.subplots(blocks * rows, columns, squeeze=False, **share)
    found = []
    for i in range(blocks * columns):
        block, column = divmod(i, columns)
        own = list(axes[block * rows : (block + 1) * rows, column])
        if i < count:
            found.append(own)
        else:
            for panel in own:
                panel.remove()
    return figure, found


def is_left(axes: Axes) -> bool:
    """Whether a panel stands in the first column of its grid."""
    place = axes.get_subplotspec()
    return place is not None and place.is_first_col()


def is_right(axes: Axes) -> bool:
    """Whether a panel stands in the last column of its grid."""
    place = axes.get_subplotspec()
    return place is not None and place.is_last_col()


def legend(figure: Figure | SubFigure, columns: int = 4) -> None:
    """One legend below all panels, each name once."""
    shown = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(name, handle)
    if shown:
        figure.legend(
            shown.values(), shown.keys(), loc="outside lower center", ncols=min(columns, len(shown))
        )


def curve(
    axes: Axes,
    table: pd.DataFrame,
    colour: str,
    marker: str,
    name: str,
    *,
    by: str = "layer",
    columns: tuple[str, str, str] = ("value", "low", "high"),
    style: str = "-",
    band: bool = True,
) -> None:
    """A curve with its interval as a band, or as two thin lines.

    Over layers some of which were not measured (they do not attend), points that a thin line joins, each with its own interval: a
    curve would go on where there is nothing.
    """
    table = table.sort_values(by)
    x = table[by].astype(int).to_numpy()
    value, low, high = (table[c].astype(float).to_numpy() for c in columns)
    apart = by == "layer" and bool((np.diff(x) > 1).any())
    thin = {"linestyle": ":" if style == "-" else style, "linewidth": 0.8}
    joined: dict[str, Any] = thin if apart else {"linestyle": style}
    axes.plot(x, value, color=colour, marker=marker, markersize=3, label=name, **joined)
    if apart:
        axes.vlines(x, low, high, color=colour, alpha=0.6, linewidth=1.2)
    elif band:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    else:
        for bound in (low, high):
            axes.plot(x, bound, color=colour, alpha=0.8, linewidth=0.8, linestyle=":")


def bars(
    axes: Axes,
    x: Sequence[float] | np.ndarray,
    table: pd.DataFrame,
    colour: str,
    name: str,
    *,
    width: float,
    hatch: str | None = None,
) -> None:
    """Bars with their intervals as lines. An interval need not hold the estimate, so these are no error bars."""
    value, low, high = (table[c].astype(float).to_numpy() for c in ("value", "low", "high"))
    axes.bar(x, value, width, color=colour, label=name, hatch=hatch, edgecolor="white", linewidth=0.5)
    axes.vlines(x, low, high, color="black", linewidth=1)


def heat(
    axes: Axes,
    matrix: np.ndarray,
    colours: str,
    scale: tuple[float, float],
    *,
    written: Sequence[Sequence[str]] | None = None,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    size: float = 7,
) -> AxesImage:
    """A heat map with text in its cells and names at its sides; missing cells are light grey."""
    cmap = mpl.colormaps[colours].with_extremes(bad="0.93")
    image = axes.imshow(matrix, cmap=cmap, vmin=scale[0], vmax=scale[1], aspect="auto")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if rows:
        axes.set_yticks(range(len(rows)), [plain(r, 14) for r in rows], fontsize=8)
    if columns:
        long = max(len(c) for c in columns) * len(columns) > 24
        turn: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
        axes.set_xticks(range(len(columns)), [plain(c, 14) for c in columns], fontsize=8, **turn)
    if written is not None:
        shade = ScalarMappable(Normalize(*scale), cmap).to_rgba(np.ma.masked_invalid(matrix))[..., :3]
        dark = shade @ [0.299, 0.587, 0.114] < 0.55
        for (i, j), own in np.ndenumerate(np.array(written, dtype=object)):
            ink = "white" if dark[i, j] else "black"
            axes.text(j, i, own, ha="center", va="center", fontsize=size, color=ink, linespacing=1.3)
    return image


def span(found: pd.Series | dict[str, Any]) -> str:
    """A value with its interval, for a title."""
    value, low, high = (float(found[c]) for c in ("value", "low", "high"))
    return f"{value:.2f}" if np.isnan(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"
