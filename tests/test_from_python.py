"""What a notebook sees: five lines that say what a thing is, a bar, a picture, a page."""

import fcntl
import io
import os
import struct
import sys
import termios
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

import anchors
from anchors.study.registry import BUILT_IN
from anchors.study.runner import Measured

SAMPLE = anchors.Sample(examples=3, batch_size=1)


@pytest.fixture(scope="module")
def found(gpt2, tmp_path_factory) -> Measured:
    task = anchors.task("sst2")
    out = tmp_path_factory.mktemp("python")
    return anchors.measure(gpt2, anchors.Readout(), task, anchors.read(task), SAMPLE, out=out)


def test_things_say_what_they_are_in_five_lines(gpt2, found, prompts) -> None:
    cache = anchors.AnchorCache.of(gpt2, prompts[0])
    said = [repr(thing).splitlines() for thing in (gpt2, found, cache)]
    assert [len(lines) for lines in said] == [5, 5, 5]
    assert max(len(line) for lines in said for line in lines if "kept in" not in line) < 120
    model, measured, kept = ("\n".join(lines) for lines in said)
    size = sum(p.numel() for p in gpt2.model.parameters()) / 1e6
    assert f"GPT2LMHeadModel: 3 layers, width 32, {size:,.1f} million parameters" in model
    assert f"readout on sst2 by {gpt2.name}" in measured
    assert f"{len(found.rows):,} rows" in measured
    assert "3 prompts, 1 per class shown, seeds [42], control none; 0 left out" in measured
    assert f"{len(cache.context.ids)} of {prompts[0].query} tokens, in 3 layers" in kept
    assert f"{cache.saved_bytes:,}" in kept
    assert list(found.folder.glob("batch-*.parquet"))
    assert measured.endswith(f"kept in {found.folder}")


def test_results_plot_themselves_as_their_verb_draws_them(gpt2, found) -> None:
    from anchors.figures import draw

    figure, theirs = found.plot(), draw("readout", found.tables(), gpt2.name)
    assert isinstance(figure, Figure)
    pixels = []
    for one in (figure, theirs):
        buffer = io.BytesIO()
        one.savefig(buffer, format="png", metadata={"Software": None})
        pixels.append(buffer.getvalue())
    assert pixels[0] == pixels[1]


class Frames(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append({"tag": tag, **dict(attrs)})


def test_a_page_shows_inline_and_nothing_of_it_leaves_its_frame(gpt2, prompts) -> None:
    page = anchors.page(gpt2, anchors.task("sst2"), prompts[:1], [0, 2])
    parser = Frames()
    parser.feed(page._repr_html_())
    (frame,) = parser.found
    assert frame["tag"] == "iframe"
    assert frame["srcdoc"] == page
    assert "</script>" in page
    assert "allow-same-origin" not in frame["sandbox"]
    assert '"' in page
    assert "'" in page


@pytest.mark.parametrize("seen", [True, False])
def test_a_bar_where_somebody_looks_and_nothing_elsewhere(gpt2, monkeypatch, capfd, seen) -> None:
    """On a real terminal (a pseudo-terminal), and into a pipe."""
    task = anchors.task("sst2")
    master, slave = os.openpty() if seen else os.pipe()
    if seen:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with os.fdopen(slave, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        anchors.measure(gpt2, anchors.Classification(), task, anchors.read(task), SAMPLE)
        stream.flush()
        os.set_blocking(master, False)
        try:
            said = os.read(master, 100_000).decode()
        except BlockingIOError:
            said = ""
    os.close(master)
    assert ("3/3" in said) is seen
    assert bool(said) is seen


def test_help_names_what_can_be_measured_and_how() -> None:
    assert anchors.__doc__ is not None
    studies = {line.settings.rpartition(":")[2] for line in BUILT_IN.values()} & set(dir(anchors))
    assert len(studies) == 8
    assert {name for name in studies if name not in anchors.__doc__} == set()
    for thing in (anchors.measure, anchors.load, anchors.page):
        assert ">>> " in thing.__doc__, thing
