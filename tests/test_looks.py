"""How figures look: no texts over each other or over bars, no axis without a name, every script."""

import logging
from functools import cache
from itertools import combinations
from pathlib import Path

import made_tables
import matplotlib as mpl
import numpy as np
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from PIL import Image

from anchors.figures import style


@cache
def figures() -> dict[str, Figure]:
    return made_tables.figures()


@cache
def seen(name: str) -> list[tuple[Text, np.ndarray]]:
    """The texts of a figure that are seen, each with its extent in pixels: left, bottom, right, top."""
    figure = figures()[name]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden: set[int] = set()
    for axes in figure.findobj(Axes):
        for axis in (axes.xaxis, axes.yaxis):
            drawn = {id(tick) for tick in axis._update_ticks()} if axes.axison and axis.get_visible() else ()
            ticks = [t for t in (*axis.majorTicks, *axis.minorTicks) if id(t) not in drawn]
            hidden |= {id(label) for tick in ticks for label in (tick.label1, tick.label2)}
            hidden |= set() if axes.axison else {id(axis.label), id(axis.offsetText)}
    shown = [
        t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in hidden
    ]
    return [(text, text.get_window_extent(canvas.get_renderer()).extents) for text in shown]


def overlap(one: np.ndarray, other: np.ndarray, slack: float = 1.0) -> bool:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width > slack and height > slack


def parallel(one: Text, other: Text) -> bool:
    """Turned texts beside each other: their boxes overlap, they need not."""
    angle = np.radians(one.get_rotation())
    if one.get_rotation() % 90 == 0 or one.get_rotation() != other.get_rotation():
        return False
    apart = abs(
        one.get_transform().transform(one.get_position())[0]
        - other.get_transform().transform(other.get_position())[0]
    )
    return apart * np.sin(angle) > 0.9 * one.get_fontsize() * one.figure.dpi / 72


def test_no_text_lies_over_another_or_over_a_bar_and_no_axis_of_numbers_is_without_a_name() -> None:
    """Every figure there is, drawn once."""
    every = figures()
    assert len(every) > 20
    assert all(len(seen(name)) > 4 for name in every)
    wrong = {name: [*overlapping(seen(name)), *on_bars(name), *nameless(name)] for name in every}
    assert {name: own for name, own in wrong.items() if own} == {}


def overlapping(found: list[tuple[Text, np.ndarray]]) -> list[tuple[str, ...]]:
    return [
        (a.get_text(), b.get_text())
        for (a, one), (b, other) in combinations(found, 2)
        if overlap(one, other) and not parallel(a, b)
    ]


def on_bars(name: str) -> list[str]:
    found = []
    for axes in figures()[name].findobj(Axes):
        bars = [
            p.get_window_extent().extents
            for c in axes.containers
            if isinstance(c, BarContainer)
            for p in c.patches
        ]
        found += [
            t.get_text()
            for t, box in seen(name)
            if t in axes.texts and any(overlap(box, bar) for bar in bars)
        ]
    return found


def nameless(name: str) -> list[tuple[str, list[str]]]:
    """Axes of numbers without a name, of their own or of their row or column."""
    figure, texts, found = figures()[name], seen(name), []
    for axes in figure.findobj(Axes):
        for axis, which in ((axes.xaxis, "x"), (axes.yaxis, "y")):
            labels = [
                t.get_text() for t, _ in texts if any(t in (k.label1, k.label2) for k in axis.majorTicks)
            ]
            if not axes.axison or not any(_number(label) for label in labels):
                continue
            row = [
                own
                for own in figure.findobj(Axes)
                if _beside(own, axes, which)
                and own.yaxis.get_label_position() == axes.yaxis.get_label_position()
            ]
            if not any(getattr(own, f"get_{which}label")() for own in row):
                found.append((which, labels))
    return found


def _number(label: str) -> bool:
    try:
        float(label.replace("−", "-").replace("%", ""))
    except ValueError:
        return "mathdefault" in label
    return True


def _beside(one: Axes, other: Axes, which: str) -> bool:
    """Panels in one row have one name of the y-axis, those in one column one of the x-axis."""
    a, b = one.get_position().extents, other.get_position().extents
    return (
        (abs(a[1] - b[1]) < 0.02 if which == "y" else abs(a[0] - b[0]) < 0.02)
        if one.figure is other.figure
        else False
    )


def test_other_scripts_are_drawn_with_a_font_of_the_machine_or_it_is_said(tmp_path, caplog, monkeypatch):
    """A font that has one character that DejaVu Sans lacks, made here."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((0, 900)), pen.lineTo((900, 900)), pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "han"])
    font.setupCharacterMap({0x6F22: "han"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "han": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (500, 0), "han": (1000, 0)})
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "Made Han", "styleName": "Regular"})
    font.setupOS2(), font.setupPost()
    font.save(tmp_path / "han.ttf")
    monkeypatch.setattr(fontManager, "ttflist", [f for f in fontManager.ttflist if "DejaVu" in f.name])
    monkeypatch.setattr(style, "_SAID", set())

    def ink(word: str) -> bytes:
        figure = Figure(figsize=(1, 1))
        figure.text(0.2, 0.2, word, size=30)
        style.save(figure, tmp_path / "drawn")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba()).tobytes()

    with caplog.at_level(logging.WARNING):
        boxed = ink("漢")
    assert "No font on this machine has 漢" in caplog.text
    caplog.clear()
    fontManager.addfont(tmp_path / "han.ttf")
    style._covered.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert ink("漢") != boxed
        assert caplog.text == ""
        ink("漢한हि"), ink("한")
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["No font on this machine has ह ि 한"]


def test_letters_of_a_pdf_stay_letters(tmp_path):
    figure = Figure(figsize=(1, 1))
    figure.text(0.2, 0.2, "flow")
    with mpl.rc_context({"pdf.fonttype": 42}):
        _, pdf = style.save(figure, tmp_path / "drawn")
    assert b"CIDFontType2" in pdf.read_bytes()
    # Elsewhere the tests take what is quicker, but it is what is set.
    assert '"pdf.fonttype": 42' in Path(style.__file__).read_text()


def test_a_figure_is_laid_out_once_and_as_matplotlib_does_it(tmp_path):
    def made() -> Figure:
        figure = Figure(figsize=(2, 1), layout="constrained")
        figure.subplots().set(title="a title that is wider than the figure is", ylabel="y")
        return figure

    made().savefig(tmp_path / "own.png")
    style.save(made(), tmp_path / "drawn")
    own, drawn = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("own", "drawn"))
    assert own.shape[1] > 500  # of the figure it would be 400
    assert np.array_equal(own, drawn)
