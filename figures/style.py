"""One look for all figures."""

import warnings
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from anchors.study.results import write_atomic

COLOURS = {"s_wp": "#0072B2", "s_pq": "#D55E00", "s_ww": "#7A7A7A"}
"""Okabe and Ito's colour-blind-safe blue and vermilion, and a grey for the background flow."""
LABELS = {
    "s_wp": "$S_{wp}$  words → label words",
    "s_pq": "$S_{pq}$  label words → target",
    "s_ww": "$S_{ww}$  other",
}
MARKERS = {"s_wp": "o", "s_pq": "s", "s_ww": "^"}

BLUE, SKY, VERMILION, ORANGE = "#0072B2", "#56B4E9", "#D55E00", "#E69F00"
GREEN, PURPLE, GREY = "#009E73", "#CC79A7", "#7A7A7A"
"""More of Okabe and Ito's colours."""

mpl.rcParams.update(
    {
        "figure.dpi": 120,
        "savefig.dpi": 200,
        "savefig.bbox": "tight",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "legend.frameon": False,
        "pdf.fonttype": 42,
    }
)

_VISIBLE = {"\n": "↵", "\r": "↵", "\t": "⇥"}


def plain(text: object, most: int = 40) -> str:
    """Text from data as it can be drawn: no formula, no line break, nothing unprintable, not too long."""
    shown = "".join(
        c if c.isprintable() else _VISIBLE.get(c) or c.encode("unicode_escape").decode() for c in str(text)
    )
    if len(shown) > most:
        shown = shown[: most - 1] + "…"
    return shown.replace("$", r"\$")


def token(text: object, most: int = 24) -> str:
    """A token as it can be drawn, with its leading and trailing spaces as ␣."""
    text = str(text)
    bare = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    after = len(text) - len(bare) - before if bare else 0
    return plain("␣" * before + bare + "␣" * after, most)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and PDF; returns the two paths."""
    paths = [stem.with_suffix(".png"), stem.with_suffix(".pdf")]
    for path in paths:
        write_figure(figure, path)
    return paths


def write_figure(figure: Figure, path: Path, about: str = "") -> None:
    """Write a figure in the format that the path ends in; what it is about is kept in the file."""
    key = {".png": "Description", ".pdf": "Subject"}[path.suffix]
    with warnings.catch_warnings():
        # A character that no font has is drawn as a box; that is all there is to say.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        write_atomic(
            path, lambda draft: figure.savefig(draft, format=draft.suffix[1:], metadata={key: about or None})
        )
