"""What flows into the last token of prompts without label words: how much by layer, and from which tokens."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from anchors.figures.pieces import curve, grid, groups, heat
from anchors.figures.style import COLOURS, PURPLE, plain, token

PROMPTS = 3
"""Prompts whose tokens are drawn: the first ones."""
BEST, ROWS = 3, 16
"""A token is drawn if it is among so many strongest ones of a layer; at most so many tokens of a prompt."""


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure:
    """Left S_tq and S_ww with 95 % bootstrap intervals; beside it, for each of the first prompts, the share of its strongest tokens in
    what flows into the target, layer by layer."""
    (group, *_) = groups(tables["summary"])
    prompts = tables["prompts"].head(PROMPTS)
    figure, panels = grid(1 + len(prompts), height=3.2, width=3.6)
    (first,), *others = panels
    for metric, name in (("s_tq", "$S_{tq}$  tokens → target"), ("s_ww", "$S_{ww}$  other")):
        own = group.part[group.part["metric"] == metric]
        curve(first, own, PURPLE if metric == "s_tq" else COLOURS[metric], "o", name)
    first.set(title=group.title, xlabel="layer", ylabel="mean flow", ylim=(0, None))
    first.xaxis.set_major_locator(MaxNLocator(integer=True))
    first.legend(fontsize=8)
    most = float(tables["sources"]["share"].max())
    for (panel,), facts in zip(others, prompts.to_dict("records"), strict=True):
        own = tables["sources"][tables["sources"]["number"] == facts["number"]]
        _tokens(panel, own, most)
        aim = token(facts["target"], 14)
        if pd.notna(facts["against"]):
            aim += f" against {token(facts['against'], 14)}"
        panel.set_title(f"prompt {facts['number'] + 1}: {aim}")
    figure.suptitle(f"Flow into the target in {plain(model)}", fontsize=10)
    bar = figure.colorbar(others[-1][0].images[0], ax=[panel for (panel,) in others], shrink=0.7)
    bar.set_label("share of the flow into the target")
    return figure


def _tokens(panel: Axes, sources: pd.DataFrame, most: float) -> None:
    """Tokens downwards in the order of the prompt, layers to the right; grey where a token is not among those that rows keep."""
    best = sources[sources["rank"] <= BEST].groupby("position")["share"].max().nlargest(ROWS)
    own = sources[sources["position"].isin(best.index)]
    wide = own.pivot_table(index="position", columns="layer", values="share").sort_index()
    words = own.drop_duplicates("position").set_index("position")["token"]
    heat(
        panel,
        wide.to_numpy(float),
        "viridis",
        (0, most),
        rows=[f"{token(words[p], 9)} {p}" for p in wide.index],
    )
    layers = [int(layer) for layer in wide.columns]
    step = -(-len(layers) // 8)
    panel.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    panel.set_xlabel("layer")
