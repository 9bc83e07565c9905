"""Flow from images and text before and after injection, by layer and over λ; damage against flow; regret of rules for λ."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from anchors.figures.pieces import bars, curve, grid, is_left, is_right, legend
from anchors.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, plain

PATHS = {
    "s_ip": ("image → label word", BLUE, "o"),
    "s_tp": ("text → label word", SKY, "^"),
    "s_iq": ("image → target", VERMILION, "s"),
    "s_tq": ("text → target", ORANGE, "v"),
}
"""What is drawn: name, colour, marker."""
ROWS = (("into label words", ("s_ip", "s_tp")), ("into the target", ("s_iq", "s_tq")))
UNITS = {"loss": "flow of the loss", "odds": "flow of the log-odds", "share": "share of the flow"}
EXPERTS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)


def draw_all(tables: dict[str, pd.DataFrame], model: str) -> dict[str, Figure]:
    """The pictures of a flow, by name: by measure that of the experts on vision and on their own skills; damage; regret."""
    flow = tables["strengths"]
    after = min(flow.loc[flow["strength"] > 0, "strength"].unique(), key=lambda x: abs(np.log(x)))
    there = dict.fromkeys(flow.loc[flow["expert"] != "none", "expert"])
    asked = [name for name in tables["guessing"]["scenario"] if name in there]  # in their order
    experts = list(dict.fromkeys([*asked, *there]))
    vision = list(dict.fromkeys(flow.loc[flow["labels"] == "own", "scenario"]))
    panels = {
        "vision": [(scenario, expert) for scenario in vision for expert in experts],
        "skills": [(expert, expert) for expert in experts if (flow["scenario"] == expert).any()],
    }
    found = {
        f"{name}_{measure}": draw(tables, measure, own, model, after)
        for measure in UNITS
        for name, own in panels.items()
        if own
    }
    if "damage" in tables:
        found["damage"] = draw_damage(tables["damage"], tables["points"], model)
    if "regret" in tables:
        found["regret"] = draw_regret(tables["choices"], tables["regret"], model)
    return found


def draw(
    tables: dict[str, pd.DataFrame], measure: str, panels: list[tuple[str, str]], model: str, strength: float
) -> Figure:
    """By layer, before (line) and after (dashed) injection, and over λ with the accuracy.

    Args:
        tables: of `anchors.injection.image_flow.tables.tables`.
        measure: loss, odds or share.
        panels: scenario and expert of each column.
        model: for the title.
        strength: what is drawn as after.
    """
    layers = tables["layers"]
    own = layers[(layers["measure"] == measure) & (layers["labels"] == "gold")]
    rows = [row for row in ROWS if own["metric"].isin(row[1]).any()]
    figure, columns = grid(len(panels), len(rows) + 1, height=2.1, across=max(4, len(panels)))
    for column, (scenario, expert) in zip(columns, panels, strict=True):
        here = own[own["scenario"] == scenario]
        for axes, (name, metrics) in zip(column, rows, strict=False):
            for metric in metrics:
                label, colour, marker = PATHS[metric]
                part = here[here["metric"] == metric]
                part = part[part["value"] > 0]  # nothing flows into label words in the last layer
                before = part[part["expert"] == "none"]
                after = part[(part["expert"] == expert) & np.isclose(part["strength"], strength)]
                curve(axes, before, colour, marker, label)
                if len(after):
                    curve(axes, after, colour, marker, "", style="--")
            _scaled(axes, measure)
            axes.set(
                xlabel="layer", title=f"{plain(expert)} on {plain(scenario)}" if name == rows[0][0] else ""
            )
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if is_left(axes):
                axes.set_ylabel(f"{UNITS[measure]}\n{name}")
        _over_strengths(column[-1], tables, measure, scenario, expert)
    for axes in figure.axes:
        for line in axes.lines:
            if line.get_label() == "":
                line.set_label("_after")
    figure.axes[0].add_line(Line2D([], [], color=GREY, linestyle="--", label=f"after, λ = {strength:g}"))
    figure.suptitle(f"Flow before and after injection into {plain(model)}", fontsize=10)
    legend(figure, columns=6)
    return figure


def _scaled(axes: Axes, measure: str) -> None:
    if measure == "share":
        axes.set_ylim(0, 1)
    else:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,), numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _over_strengths(
    axes: Axes, tables: dict[str, pd.DataFrame], measure: str, scenario: str, expert: str
) -> None:
    """All four paths over λ, sums as multiples of what they were, and the accuracy."""
    table = tables["strengths"]
    part = table[
        (table["measure"] == measure) & (table["labels"] == "gold") & (table["scenario"] == scenario)
        & (table["part"] == "all") & table["expert"].isin(["none", expert])
    ]  # fmt: skip
    for metric, (name, colour, marker) in PATHS.items():
        own = part[part["metric"] == metric].sort_values("strength")
        columns = ("value", "low", "high") if measure == "share" else ("change", "change_low", "change_high")
        middle, low, high = (own[c].to_numpy() + (measure != "share") for c in columns)
        if not np.isfinite(middle).any():
            continue
        axes.plot(own["strength"], middle, color=colour, marker=marker, markersize=3, label=name)
        axes.fill_between(own["strength"], low, high, color=colour, alpha=0.12, linewidth=0)
    if measure != "share":
        axes.axhline(1, color=GREY, linewidth=0.7)
    _scaled(axes, measure)
    axes.set(xlabel="λ")
    right = tables["accuracy"]
    right = right[(right["scenario"] == scenario) & right["expert"].isin(["none", expert])]
    right = right.sort_values("strength")
    other = axes.twinx()
    other.plot(right["strength"], right["value"], color="black", linestyle=":", label="accuracy")
    other.fill_between(right["strength"], right["low"], right["high"], color="black", alpha=0.08, linewidth=0)
    other.set(ylim=(0, 1.02))
    other.spines["right"].set_visible(True)
    if is_left(axes):
        axes.set_ylabel("share, mean over layers" if measure == "share" else "flow, multiples of before")
    if is_right(axes):
        other.set_ylabel("accuracy (dotted)")


def draw_damage(correlations: pd.DataFrame, points: pd.DataFrame, model: str) -> Figure:
    """Drop of vision accuracy against what is left of the image flow, by measure and half of the layers."""
    measures = [m for m in UNITS if (points["measure"] == m).any()]
    halves = ("shallow", "deep")
    figure, columns = grid(len(measures), 2, height=2.4)
    experts = list(dict.fromkeys(points["expert"]))
    metrics = {m: PATHS[m] for m in ("s_ip", "s_iq") if (points["metric"] == m).any()}
    for column, measure in zip(columns, measures, strict=True):
        for axes, half in zip(column, halves, strict=True):
            lines = []
            for metric, (name, _, marker) in metrics.items():
                own = points[
                    (points["measure"] == measure) & (points["part"] == half) & (points["metric"] == metric)
                ]
                for expert, part in own.groupby("expert", sort=False):
                    colour = EXPERTS[experts.index(expert) % len(EXPERTS)]
                    axes.scatter(
                        1 - part["lost"],
                        part["drop"],
                        s=14,
                        color=colour,
                        marker=marker,
                        alpha=0.7,
                        linewidth=0,
                    )
                found = correlations[
                    (correlations["measure"] == measure)
                    & (correlations["part"] == half)
                    & (correlations["metric"] == metric)
                ]
                if len(found):
                    row = found.iloc[0]
                    lines.append(f"{name}: ρ of loss {row['rho']:+.2f}, beyond λ {row['within']:+.2f}")
            axes.axvline(1, color=GREY, linewidth=0.7)
            if measure != "share":
                axes.set_xscale("log")
            axes.set_title("\n".join(lines), fontsize=7)
            axes.set_xlabel(f"image flow, multiples of before ({half} layers)")
            if is_left(axes):
                axes.set_ylabel("drop of vision accuracy")
    for column, measure in zip(columns, measures, strict=True):
        column[0].annotate(UNITS[measure], (0.5, 1.25), xycoords="axes fraction", ha="center", fontsize=9)
    handles = [
        Line2D(
            [],
            [],
            color=EXPERTS[i % len(EXPERTS)],
            marker="o",
            linestyle="",
            markersize=4,
            label=plain(expert),
        )
        for i, expert in enumerate(experts)
    ]
    handles += [
        Line2D([], [], color=GREY, marker=m, linestyle="", markersize=4, label=n)
        for n, _, m in metrics.values()
    ]
    figure.suptitle(f"Vision damage and image flow in {plain(model)}", fontsize=10)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
    return figure


def draw_regret(choices: pd.DataFrame, regret: pd.DataFrame, model: str) -> Figure:
    """Mean regret of each rule with its interval, and that of every training and expert as a dot."""
    figure = Figure(figsize=(max(4.2, 0.8 * len(regret) + 1), 3.2), layout="constrained")
    axes = figure.subplots()
    colours = [BLUE if rule.startswith("flow") else GREY for rule in regret["rule"]]
    for x, (colour, row) in enumerate(zip(colours, regret.to_dict("records"), strict=True)):
        table = pd.DataFrame([{"value": row["regret"], "low": row["low"], "high": row["high"]}])
        bars(axes, [x], table, colour, "", width=0.7)
        own = choices.loc[choices["rule"] == row["rule"], "regret"].to_numpy()
        axes.scatter(x + np.linspace(-0.2, 0.2, len(own)), own, s=8, color="black", alpha=0.5, zorder=3)
    axes.set_xticks(range(len(regret)), [plain(rule) for rule in regret["rule"]], rotation=30, ha="right")
    axes.set(ylabel="regret (utility below the best λ)", title="ε and c fitted to the other experts")
    figure.suptitle(f"Choosing λ in {plain(model)}", fontsize=10)
    return figure
