"""The causal check: where the effect of the label words leaves them, against where the saliency sees it flow."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from anchors.figures.pieces import groups
from anchors.figures.style import BLUE, COLOURS, LABELS, MARKERS, plain

CONDITIONS = {
    "label": ("#009E73", "o", "label words exchanged"),
    "random": ("#7A7A7A", "^", "as many random tokens"),
    "others": ("#CC79A7", "v", "all tokens but the label words"),
}
"""Colour (Okabe and Ito's), marker and name of each condition of `anchors.causal.Causal`."""


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure:
    """One column per task: above, how far the answer follows a patch before each layer; below, what each layer releases.

    Args:
        tables: `summary` of `anchors.summaries.causal_summary`; where it is there, `flow` of `anchors.stats.flow_summary` on the
            same tasks. Its S_pq is divided by its sum over layers, as `released` adds up to 1 over them, and added up between
            the patched layers when some were left out.
        model: its name, for the title.
    """
    summary, flows = tables["summary"], tables.get("flow")
    shown_groups = groups(summary)
    figure = Figure(figsize=(0.6 + 3.1 * len(shown_groups), 4.6), layout="constrained")
    grid = figure.subplots(2, len(shown_groups), sharex="col", sharey="row", squeeze=False)
    for (above, below), group in zip(grid.T, shown_groups, strict=True):
        part = group.part
        for condition, (colour, marker, name) in CONDITIONS.items():
            follow = part[(part["condition"] == condition) & (part["metric"] == "follow")]
            if len(follow):
                _curve(above, follow, colour, marker, name)
        released = part[part["metric"] == "released"]
        if len(released):
            _curve(below, released, BLUE, "D", "released by the label words")
        flow = None if flows is None else group.of(flows)
        s_pq = None if flow is None else flow[flow["metric"] == "s_pq"]
        if s_pq is not None and len(s_pq):
            share = _shares(s_pq, sorted(released["layer"].astype(int)))
            _curve(below, share, COLOURS["s_pq"], MARKERS["s_pq"], LABELS["s_pq"])
        above.set(title=group.title)
        below.set(xlabel="layer")
        below.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0][0].set_ylabel("answer follows the patch")
    grid[1][0].set_ylabel("share over layers")
    figure.suptitle(f"What the label words pass on in {plain(model)}", fontsize=10)
    shown = {}
    for axes in grid.flat:
        shown |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=2)
    return figure


def _shares(s_pq: pd.DataFrame, starts: list[int]) -> pd.DataFrame:
    """S_pq as shares over layers, added up between the layers that were patched, as `released` is.

    The spread of the total is left out: its error is the same factor in all layers.
    """
    layer = s_pq["layer"].astype(int)
    bins = np.searchsorted(starts, layer, side="right") - 1
    start = np.array(starts)[bins.clip(0)] if starts else layer
    share = s_pq[["mean", "low", "high"]].astype(float) / s_pq["mean"].sum()
    return share.rename(columns={"mean": "value"}).assign(layer=start).groupby("layer", as_index=False).sum()


def _curve(axes: Axes, table: pd.DataFrame, colour: str, marker: str, name: str) -> None:
    table = table.sort_values("layer")
    layers = table["layer"].astype(int)
    axes.plot(layers, table["value"], color=colour, marker=marker, markersize=3, label=name)
    axes.fill_between(
        layers,
        table["low"].astype(float),
        table["high"].astype(float),
        color=colour,
        alpha=0.2,
        linewidth=0,
    )
