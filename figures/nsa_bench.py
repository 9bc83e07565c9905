"""Time of NSA, full attention and peers over the length of the text."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from anchors.figures.pieces import legend
from anchors.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, plain

NAMES = {
    "ours": ("NSA", BLUE, "o"),
    "sdpa-flash": ("FlashAttention-2", ORANGE, "o"),
    "flash-3": ("FlashAttention-3", ORANGE, "s"),
    "flash-4": ("FlashAttention-4", ORANGE, "^"),
    "sdpa-cudnn": ("cuDNN", VERMILION, "o"),
    "cudnn-nsa": ("cuDNN", VERMILION, "s"),
    "fla": ("fla-core", GREEN, "o"),
    "xunhaolai": ("XunhaoLai", PURPLE, "o"),
    "scalable-flash-nsa": ("Scalable-Flash-NSA", GREEN, "s"),
    "flex": ("FlexAttention", SKY, "o"),
    "eager": ("eager", GREY, "o"),
}
"""By implementation, what it is called, its colour and its marker."""
WHOLE = {
    "all": "all of it",
    "all of one k and v": "all of it, one k and v",
    "full": "full attention",
}
SELECTED = {"slc": "selected branch"}


def draw(table: pd.DataFrame, model: str) -> Figure:
    """A panel for each direction; both axes are logarithmic.

    Solid are whole attentions, dashed the selected branch alone, on the same blocks.

    Args:
        table: rows of `anchors.nsa.speed.bench.bench`; of several shapes or patterns only the first are drawn.
        model: for the title; empty for none.
    """
    own = table[(table["shape"] == table["shape"].iloc[0]) & (table["pattern"] == table["pattern"].iloc[0])]
    own = own[own["ms"].notna()]
    directions = [d for d in ("forward", "backward") if (own["direction"] == d).any()]
    figure = Figure(figsize=(4.6 * len(directions), 3.4), layout="constrained")
    for axes, direction in zip(
        figure.subplots(1, len(directions), squeeze=False)[0], directions, strict=True
    ):
        _panel(axes, own[own["direction"] == direction])
        axes.set(title=direction, xlabel="tokens", ylabel="ms")
    if model:
        figure.suptitle(plain(model), fontsize=10)
    legend(figure)
    return figure


def _panel(axes: Axes, own: pd.DataFrame) -> None:
    for parts, line in ((WHOLE, "-"), (SELECTED, "--")):
        for name, (label, colour, marker) in NAMES.items():
            rows = own[(own["implementation"] == name) & own["part"].isin(parts)].sort_values("tokens")
            if len(rows):
                text = f"{label}, {parts[rows['part'].iloc[0]]}"
                axes.errorbar(
                    rows["tokens"], rows["ms"], rows["iqr"] / 2, fmt=line, marker=marker, markersize=3, color=colour, label=text
                )  # fmt: skip
    lengths = sorted(set(own["tokens"]))
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
