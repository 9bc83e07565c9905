"""`anchors report`: what lies under a folder as a page and a text, from rows alone."""

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from made_rows import classified, isolated, rows
from PIL import Image
from test_viewer import HOSTILE
from test_viewer_browser import viewer  # noqa: F401 - the browser is a fixture
from typer.testing import CliRunner

from anchors.cli import app
from anchors.collection import gather
from anchors.study.registry import STUDIES
from anchors.study.report import leave
from anchors.study.results import provenance, write_table

MODEL = "a <b>model<b> | `x`"


def facts(kind, model=MODEL, **more):
    task = {"template": "Review: {text}\n" + HOSTILE[0] + "{label}", "labels": ["x", "y"], "policy": "first"}
    part = {
        "kind": kind,
        "task": task,
        "shots": 1,
        "control": "none",
        "seeds": [1],
        "examples": 12,
        "data_source": "built in",
    }
    return (
        provenance(model=model, fingerprint="f" * 16, precision="float32", parts=[part], notes=[HOSTILE[1]])
        | more
    )


def lay(folder, kind, made, model=MODEL, figure=None, **more):
    own = rows(made).assign(model=model)
    line = STUDIES[kind]
    tables = line.tabulate(own)
    leave(
        folder,
        line.stems[kind],
        facts(kind, model, **more),
        tables,
        figure or kind,
        rows={line.stems[kind]: own},
    )
    return tables


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    lay(
        out / "classify",
        "classify",
        classified([*HOSTILE[:2], "z"]),
        command=f"anchors classify {HOSTILE[0]}",
    )
    lay(out / "isolate", "isolate", isolated(prompts=12), "b", command="anchors isolate -k 5")
    ran = CliRunner().invoke(app, ["report", str(out)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return out


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.images = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += [dict(attrs)["src"]] if tag == "img" else []
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_holds_the_pictures(results):
    page = Page((results / "report.html").read_text())
    assert page.open == []
    assert "script" not in page.tags
    assert page.tags.count("section") == 2
    assert len(page.images) == 2
    for source in page.images:
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert np.ptp(np.asarray(picture.convert("L"))) > 100


def test_the_text_links_the_pictures_and_keeps_its_tables(results):
    text = (results / "report.md").read_text()
    links = re.findall(r"!\[[^\n]*\]\(<([^>]+)>\)", text)
    assert sorted(links) == ["classify/classify.png", "isolate/isolate.png"]
    assert all((results / link).is_file() for link in links)
    for block in re.findall(
        r"(?:^\|.*\n)+", text, re.M
    ):  # every row of a table has as many cells as its head
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1
    assert "<img" not in text
    assert "anchors isolate -k 5" in text
    (results / "isolate" / "isolate.png").rename(results / "isolate" / "away.png")
    CliRunner().invoke(app, ["report", str(results)], catch_exceptions=False)
    assert (results / "report.md").read_text().count("data:image/png;base64,") == 1
    (results / "isolate" / "away.png").rename(results / "isolate" / "isolate.png")


def test_hostile_text_is_shown_and_never_run(results, viewer):
    path = results / "report.html"
    viewer.opened.append(path.as_uri())
    viewer.resize(900, 700)
    viewer.driver.get(path.as_uri())
    assert viewer.js("window.pwned === undefined")
    assert viewer.js("[document.images.length, document.scripts.length]") == [2, 0]
    assert all(viewer.each("img", "e.complete && e.naturalWidth > 200 && e.naturalWidth"))
    assert MODEL in viewer.text("section p")
    assert HOSTILE[0] in viewer.text("pre")
    said = viewer.each(".said")
    line = STUDIES["classify"]
    assert said[0] == line.say(line.tabulate(gather([results])[0].rows["classify"]))[0]
    heads = viewer.each("section:first-of-type details:nth-of-type(3) th")
    assert heads[-2:] == ["predicted", "prompts"]
    assert set(HOSTILE[:2]) <= set(viewer.each("#s0 td"))
    assert HOSTILE[1] in viewer.each("#s0 dd")
    viewer.click("a[href='#s1']")
    assert viewer.js("location.hash") == "#s1"
    assert viewer.js("document.documentElement.scrollWidth <= innerWidth")  # no sideways scrolling


def test_headings_name_the_task(results):
    text = (results / "report.md").read_text()
    assert {line[:15] for line in text.splitlines() if line.startswith("## ") and "repeat" not in line} == {
        "## classify on ", "## isolate on a",
    }  # fmt: skip
    for own in gather([results]):
        assert own.tasks == list(own.rows[own.kind]["task"].unique())


def test_numbers_are_those_of_the_rows(results):
    (own,) = (r for r in gather([results]) if r.name == "isolate")
    text = (results / "report.md").read_text()
    for row in own.made["summary"].dropna(subset=["low"]).to_dict("records"):
        assert f"{row['value']:.4g} \\[{row['low']:.4g}, {row['high']:.4g}\\]" in text


def test_what_cannot_be_read_is_left_out_and_said(results, tmp_path):
    out = tmp_path / "some"
    lay(out / "isolate", "isolate", isolated(), figure="none")
    (out / "classify").mkdir()
    (out / "classify" / "classify.parquet").write_text("no parquet")
    lay(out / "flow", "isolate", isolated(), figure="none")
    write_table(out / "flow" / "flow.parquet", rows([(0, "none", 1, "other", 1)]), facts("flow"))
    ran = CliRunner().invoke(app, ["report", str(out)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    said = " ".join(ran.stderr.split())
    assert said.count("left out") == 2
    page = (out / "report.html").read_text()
    assert "classify in " in page
    assert "flow cannot be drawn" in page


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_a_file_that_is_no_report_is_kept(name, tmp_path):
    lay(tmp_path / "isolate", "isolate", isolated(), figure="none")
    (tmp_path / name).write_text("mine")
    ran = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert ran.exit_code == 2
    assert "would-overwrite" in ran.stderr
    assert (tmp_path / name).read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"isolate", name}


def test_nothing_to_report(tmp_path):
    for folder, said in ((tmp_path, "holds no rows"), (tmp_path / "none", "is not a directory")):
        ran = CliRunner().invoke(app, ["report", str(folder)])
        assert ran.exit_code == 2
        assert said in " ".join(ran.stderr.split())


def test_no_torch(results):
    script = (
        "import sys\nfrom pathlib import Path\nfrom anchors.booklet import write_booklet\nfrom anchors.collection import gather\n"
        f"write_booklet(Path({str(results)!r}), gather([Path({str(results)!r})]), Path({str(results)!r}))\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
