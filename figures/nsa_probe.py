"""Label words under sparse attention: who carries them, whether they are selected, gates, and interventions."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from anchors.figures.pieces import legend
from anchors.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, plain

BRANCHES = {"cmp": (BLUE, "compressed"), "slc": (VERMILION, "selected"), "win": (GREEN, "window")}
PAIRS = {"wp": "$S_{wp}$  text → label words", "pq": "$S_{pq}$  label words → last position"}
WHICH = {"label": "all label words", "answer": "label words of the right class"}
PLACES = {"label": "-", "last": "--", "other": ":"}
MARKS = ("o", "s", "^", "v", "D", "P", "X", "*")
SIGNIFICANT = 0.05


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure:
    """Up to four rows of panels, each of a table that is there: branches, selection, gates, interventions."""
    rows = []
    if "branches" in tables:
        rows.append(_branches)
    if "selection" in tables:
        rows.append(_selection)
    if "gates" in tables:
        rows.append(_gates)
    if "summary" in tables:
        rows.append(_interventions)
    figure = Figure(figsize=(9.5, 0.8 + sum(_height(row, tables) for row in rows)), layout="constrained")
    parts = figure.subfigures(
        len(rows), 1, squeeze=False, height_ratios=[_height(row, tables) for row in rows]
    )
    for row, part in zip(rows, parts[:, 0], strict=True):
        row(part, tables)
        legend(part, columns=6)
    figure.suptitle(f"Label words under sparse attention in {plain(model)}", fontsize=10)
    return figure


def _height(row: object, tables: dict[str, pd.DataFrame]) -> float:
    if row is _interventions:
        return 1.1 + 0.19 * max(3, tables["summary"]["condition"].nunique())
    return 2.7


def _branches(figure: Figure | SubFigure, tables: dict[str, pd.DataFrame]) -> None:
    """Stacked shares of the branches; of full attention the sum itself."""
    table = tables["branches"]
    split = "share" in table and table["share"].notna().any()
    for axes, (pair, name) in zip(figure.subplots(1, 2, sharey=split), PAIRS.items(), strict=True):
        own = table[table["pair"] == pair]
        if split:
            below = np.zeros(own["layer"].nunique())
            for branch, (colour, label) in BRANCHES.items():
                part = own[own["branch"] == branch].sort_values("layer")
                share = part["share"].fillna(0).to_numpy()
                axes.bar(part["layer"], share, 0.75, bottom=below, color=colour, label=label)
                below = below + share
            axes.set(ylim=(0, 1), ylabel="share" if pair == "wp" else None)
        else:
            part = own[own["branch"] == "all"].sort_values("layer")
            axes.bar(part["layer"], part["value"], 0.75, color=GREY, label="full attention")
            axes.vlines(part["layer"], part["value_low"], part["value_high"], color="black", linewidth=1)
        axes.set(title=name, xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _selection(figure: Figure | SubFigure, tables: dict[str, pd.DataFrame]) -> None:
    """Selection rate by layer, a mark per group; filled where above what near-by blocks have (q < 0.05)."""
    table = tables["selection"]
    groups = sorted(table["group"].unique())
    offsets = np.linspace(-0.28, 0.28, len(groups)) if len(groups) > 1 else [0.0]
    for axes, (which, name) in zip(figure.subplots(1, 2, sharey=True), WHICH.items(), strict=True):
        own = table[table["which"] == which]
        for i, (group, offset) in enumerate(zip(groups, offsets, strict=True)):
            part = own[own["group"] == group].sort_values("layer")
            x = part["layer"].to_numpy() + offset
            axes.vlines(x, part["asr_low"], part["asr_high"], color=VERMILION, linewidth=1)
            above = (part["q"] < SIGNIFICANT).to_numpy()
            mark = MARKS[i % len(MARKS)]
            for mask, fill in ((above, VERMILION), (~above, "white")):
                axes.scatter(
                    x[mask], part["asr"][mask], s=18, marker=mark, color=fill, edgecolors=VERMILION, zorder=3
                )
            axes.scatter(x, part["control"], s=22, marker="_", color=BLUE, zorder=2)
        for layer, part in own.groupby("layer"):
            axes.hlines(part["chance"].mean(), layer - 0.42, layer + 0.42, color=GREY, linestyle=":")
        axes.set(title=name, xlabel="layer", ylim=(-0.03, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    first = figure.axes[0]
    first.set_ylabel("selected by the last position")
    _named(
        first,
        [("o", VERMILION, f"selected (filled: q < {SIGNIFICANT})"), ("_", BLUE, "nearest other blocks")],
    )
    first.plot([], [], color=GREY, linestyle=":", label="chance")


def _named(axes: Axes, marks: Sequence[tuple[str, str, str]]) -> None:
    for mark, colour, name in marks:
        axes.plot([], [], marker=mark, color=colour, linestyle="none", markersize=4.5, label=name)


def _gates(figure: Figure | SubFigure, tables: dict[str, pd.DataFrame]) -> None:
    """Mean over heads of each branch's gate, and every head as a faint line."""
    table = tables["gates"]
    for axes, (branch, (colour, name)) in zip(
        figure.subplots(1, 3, sharey=True), BRANCHES.items(), strict=True
    ):
        own = table[table["branch"] == branch]
        for where, style in PLACES.items():
            for _, part in own.groupby("head"):
                axes.plot(
                    part["layer"], part[where], color=colour, linestyle=style, linewidth=0.5, alpha=0.35
                )
            mean = own.groupby("layer")[where].mean()
            axes.plot(mean.index, mean, color=colour, linestyle=style, marker="o", markersize=3)
        axes.set(title=f"gate of the {name} branch", xlabel="layer", ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].set_ylabel("gate")
    for where, name in (("label", "label words"), ("last", "last position"), ("other", "elsewhere")):
        figure.axes[0].plot([], [], color=GREY, linestyle=PLACES[where], label=name)


def _interventions(figure: Figure | SubFigure, tables: dict[str, pd.DataFrame]) -> None:
    """Change of accuracy and of the right label's logit against the untouched run, with paired intervals."""
    table = tables["summary"]
    kinds = {"ban": VERMILION, "force": BLUE, "cut": PURPLE, "isolate": ORANGE}
    names = [n for n in table["condition"].unique() if n != "none"]
    shown = (("accuracy", "Δ accuracy"), ("logit", "Δ logit of the right label"))
    for axes, (metric, name) in zip(figure.subplots(1, 2, sharey=True), shown, strict=True):
        own = table[table["metric"] == metric].set_index("condition").reindex(names)
        for y, condition in enumerate(names):
            colour = kinds.get(condition.split("-")[0], GREY)
            row, control = own.loc[condition], condition.endswith("control")
            axes.hlines(y, row["difference_low"], row["difference_high"], color=colour, linewidth=1.2)
            axes.plot(
                row["difference"],
                y,
                "o",
                color=colour,
                markersize=4.5,
                markerfacecolor="white" if control else colour,
            )
        axes.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(names)), [plain(n) for n in names], fontsize=7)
        axes.set_xlabel(name)
    if names:
        figure.axes[0].invert_yaxis()
    value = table[(table["condition"] == "none") & (table["metric"] == "accuracy")]
    if len(value):
        figure.axes[0].set_title(f"untouched accuracy {float(value['value'].iloc[0]):.2f}")
