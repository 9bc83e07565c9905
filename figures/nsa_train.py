"""Loss and in-context accuracy of trainings: by step, and by how many demonstrations stand before."""

import re

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from anchors.figures.pieces import legend
from anchors.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, plain

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
"""One for each run, in the order of the table; seeds of a run share it."""


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure:
    """Three panels, or one for a text; a run's line is the mean over its seeds, the band reaches from least to most.

    Args:
        tables: `log` with the columns of a training's log and `run`, `seed`.
        model: for the title; empty for none.
    """
    log = tables["log"]
    labelled = (log["metric"] == "label_loss").any()
    names = list(dict.fromkeys(log["run"]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    figure = Figure(figsize=(10.2 if labelled else 4.6, 3.4), layout="constrained")
    panels = figure.subplots(1, 3 if labelled else 1, squeeze=False)[0]
    metric = "label_loss" if labelled else "text_loss"
    for name in names:
        own = log[log["run"] == name]
        # The training loss itself shows how even the way was; the evaluation shows where it led.
        _curve(
            panels[0], _seeds(own, "train", metric), colours[name], None, width=0.7, alpha=0.55, band=False
        )
        _curve(panels[0], _seeds(own, "held_out", metric), colours[name], _name(own, name), marker="o")
    loss = "loss on label words" if labelled else "loss per token"
    panels[0].set(title="thin: training, dots: held out", xlabel="step", ylabel=f"{loss} (nats)")
    panels[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if labelled:
        _accuracy(panels[1], panels[2], log, names, colours)
    if model:
        figure.suptitle(plain(model), fontsize=10)
    legend(figure)
    return figure


def _accuracy(
    by_step: Axes, by_number: Axes, log: pd.DataFrame, names: list[str], colours: dict[str, str]
) -> None:
    ceiling = log[(log["metric"] == "knowable") & (log["split"] == "held_out")]
    every = ceiling[ceiling["bucket"] == "all"]["value"].mean()
    by_step.axhline(every, color=GREY, linestyle=":", linewidth=1, label="can be known")
    final = log[log["step"] == log.groupby(["run", "seed"])["step"].transform("max")]
    order = sorted((b for b in set(ceiling["bucket"]) if b[0].isdigit()), key=_first)
    known = ceiling.groupby("bucket")["value"].mean().reindex(order)
    by_number.plot(range(len(order)), known, color=GREY, linestyle=":", linewidth=1)
    for name in names:
        own = log[log["run"] == name]
        _curve(by_step, _seeds(own, "held_out", "accuracy"), colours[name], _name(own, name), marker="o")
        last = final[
            (final["run"] == name) & (final["metric"] == "accuracy") & (final["split"] == "held_out")
        ]
        wide = last.pivot_table(index="bucket", columns="seed", values="value").reindex(order)
        wide.index = range(len(order))
        _curve(by_number, wide, colours[name], None, marker="o")
    by_step.set(
        title="held out, all demonstrations", xlabel="step", ylabel="accuracy on label words", ylim=(0, 1.02)
    )
    by_step.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    by_number.set(
        title="held out, at the end", xlabel="number of the demonstration", ylabel="accuracy", ylim=(0, 1.02)
    )
    by_number.set_xticks(range(len(order)), order, fontsize=7, rotation=40 if len(order) > 6 else 0)


def _seeds(own: pd.DataFrame, split: str, metric: str) -> pd.DataFrame:
    """One row per step, one column per seed."""
    part = own[(own["split"] == split) & (own["metric"] == metric) & (own["bucket"] == "all")]
    return part.pivot_table(index="step", columns="seed", values="value")


def _curve(
    axes: Axes,
    wide: pd.DataFrame,
    colour: str,
    name: str | None,
    *,
    marker: str | None = None,
    width: float = 1.4,
    alpha: float = 1.0,
    band: bool = True,
) -> None:
    if wide.empty:
        return
    values = wide.to_numpy(float)
    x, middle = wide.index.to_numpy(), np.nanmean(values, axis=1)
    axes.plot(x, middle, color=colour, marker=marker, markersize=3, linewidth=width, alpha=alpha, label=name)
    if band and values.shape[1] > 1:
        axes.fill_between(
            x, np.nanmin(values, axis=1), np.nanmax(values, axis=1), color=colour, alpha=0.18, linewidth=0
        )


def _name(own: pd.DataFrame, name: str) -> str:
    seeds = own["seed"].nunique()
    return plain(name) + (f", {seeds} seeds" if seeds > 1 else "")


def _first(bucket: str) -> int:
    return int(re.split(r"\D", bucket)[0])
