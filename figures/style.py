"""One look for all figures."""

import logging
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from matplotlib.transforms import Bbox

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


@cache
def _covered(path: str) -> frozenset[int]:
    """The characters that a font file has."""
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def fonts_for(characters: Iterable[str], own: Iterable[str]) -> tuple[list[str], set[str]]:
    """Fonts of this machine for characters that those named `own` lack, and the characters that none has."""
    left, found = set(characters), []
    for names, every in ((set(own), True), ({font.name for font in fontManager.ttflist} - set(own), False)):
        for font in sorted(
            (f for f in fontManager.ttflist if f.name in names), key=lambda f: (f.name, f.fname)
        ):
            if not left:
                return found, left
            if font.style == "normal" and (has := {c for c in left if ord(c) in _covered(font.fname)}):
                left -= has
                if not every and font.name not in found:
                    found.append(font.name)
    return found, left


_SAID: set[str] = set()


def scripts(figure: Figure) -> None:
    """Give texts of other scripts a font of this machine that has them; say which characters none has, once."""
    for text in figure.findobj(Text):
        if (shown := text.get_text()).isascii():
            continue
        more, lacking = fonts_for({c for c in shown if c > "\x7f"}, _families(text))
        if more:
            text.set_fontfamily([*_families(text), *more])
        if lacking - _SAID:
            _SAID.update(lacking)
            logging.getLogger(__name__).warning(
                "No font on this machine has %s: a figure shows boxes for them. Install one of their script (Noto has most).",
                " ".join(sorted(lacking)),
            )


def _families(text: Text) -> list[str]:
    """The names of a text's fonts; of a class of fonts the first that is there."""
    there = {font.name for font in fontManager.ttflist}
    found: list[str] = []
    for name in text.get_fontfamily():
        classed = mpl.rcParams.get(f"font.{name}")
        found += [own for own in classed if own in there][:1] if classed else [name]
    return found


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and PDF; returns the two paths."""
    box = settle(figure)
    paths = [stem.with_suffix(".png"), stem.with_suffix(".pdf")]
    for path in paths:
        write_figure(figure, path, box=box)
    return paths


def settle(figure: Figure) -> Bbox:
    """Lay a figure out once for all files of it: half the time of writing one is finding where things go.

    Returns:
        The box around all that is drawn, in inches.
    """
    scripts(figure)
    own, figure.dpi = figure.dpi, mpl.rcParams["savefig.dpi"]  # letters are a little wider in coarser pixels
    with _boxes_for_glyphs():
        figure.draw_without_rendering()
        box = figure.get_tightbbox().padded(mpl.rcParams["savefig.pad_inches"])
    figure.set_layout_engine("none")
    figure.dpi = own
    return box


def write_figure(figure: Figure, path: Path, about: str = "", *, box: Bbox | None = None) -> None:
    """Write a figure in the format that the path ends in.

    Args:
        figure: what is written.
        path: ends in ``.png`` or ``.pdf``.
        about: what it is about, in a line that is kept in the file.
        box: from `settle`, for several files of one figure.
    """
    key = {".png": "Description", ".pdf": "Subject"}[path.suffix]
    facts, cut = {key: about or None}, box or settle(figure)
    with _boxes_for_glyphs():
        write_atomic(
            path,
            lambda draft: figure.savefig(draft, format=draft.suffix[1:], metadata=facts, bbox_inches=cut),
        )


@contextmanager
def _boxes_for_glyphs() -> Generator[None]:
    """A character that no font has is drawn as a box; `scripts` has said so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield
