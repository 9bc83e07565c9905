"""Tables at the console: nothing is cut, however narrow the terminal is."""

import re
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path

import made_tables
import pytest
from rich.console import Console
from rich.text import Text
from typer import rich_utils
from typer.testing import CliRunner

from anchors.cli import app, common
from anchors.cli.tables import PROSE, Grid
from anchors.places import titled


@cache
def shown() -> dict[str, list]:
    return made_tables.shown()


def printed(part, width: int) -> list[str]:
    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as caught:
        console.print(part, markup=not isinstance(part, str))
    return caught.get().splitlines()


def words(texts: Iterable) -> set[str]:
    """What no line may cut: every word, and every interval as a whole."""
    plain = [Text.from_markup(t).plain if isinstance(t, str) else t.plain for t in texts]
    return {word for text in plain for word in glued(text)}


def glued(text: str) -> list[str]:
    """The words of a text; an interval is one."""
    return re.sub(r"(\[[^\],]*), ", r"\1,\0", text).split()


@pytest.mark.parametrize("width", [80, 120])
def test_no_cell_of_any_verb_is_cut(width):
    assert {
        "flow",
        "classify",
        "nsa probe",
        "inject sweep",
        "inject flow",
        "check",
        "ls",
        "run --compare",
    } <= set(shown())
    seen = 0
    for verb, parts in shown().items():
        for part in parts:
            lines = printed(part, width)
            assert max(map(len, lines)) <= width, verb
            if not isinstance(part, Grid):
                continue
            there = {word for line in lines for word in glued(line)}
            together = "".join("".join(lines).split())
            cells = [
                (column.no_wrap, text) for column in part.columns for text in (column.header, *column._cells)
            ]
            numbers = words(text for whole, text in cells if whole)
            assert numbers <= there, (verb, numbers - there)
            prose = {
                word for whole, text in cells if not whole for word in Text.from_markup(text).plain.split()
            }
            assert {word for word in prose if len(word) < PROSE} <= {
                word for line in lines for word in line.split()
            }, verb
            for text in (part.above, part.below):
                assert "".join(text.split()) in together, verb
            seen += 1
    assert seen > 30


def test_a_table_that_does_not_fit_is_set_in_parts_with_its_keys():
    table = Grid("title", caption="caption", keys=2)
    for name in ("name", "layer", *(f"the value of {i}" for i in range(9))):
        table.add_column(name)
    for layer in range(2):
        table.add_row("row", str(layer), *(f".{i}{layer} [.01, .99]" for i in range(9)))
    lines = printed(table, 60)
    assert lines[0].strip() == "title"
    assert lines[-1].strip() == "caption"
    assert sum(line.split()[:2] == ["row", "1"] for line in lines) == 5
    assert all(sum(f".{i}1 [.01, .99]" in line for line in lines) == 1 for i in range(9))
    narrow = printed(table, 30)
    assert max(map(len, narrow)) <= 30
    assert sum(line.count("[.01, .99]") for line in narrow) == 18
    wide = printed(table, 300)
    assert sum(line.split()[:1] == ["row"] for line in wide) == 2


HELPED = (
    "view",
    "check",
    "run",
    "ls",
    "figures",
    "flow",
    "reweight",
    "nsa train",
    "nsa bench",
    "nsa curves",
    "inject",
    "inject demo",
)


@pytest.mark.parametrize("verb", HELPED)
def test_help_is_broken_by_the_terminal_and_not_by_its_source(verb, monkeypatch):
    """Of a paragraph every line but the last is filled: the next line's first word would not have fitted."""
    monkeypatch.setattr(rich_utils, "MAX_WIDTH", 80)
    done = CliRunner().invoke(app, [*verb.split(), "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert done.exit_code == 0, done.output
    before = done.output.split("╭")[0].split("Usage:")[1].split("\n", 1)[1]
    for paragraph in re.split(r"\n\s*\n", before):
        lines = [line.strip() for line in paragraph.split("\n") if line.strip()]
        for line, after in pairwise(lines):
            assert after.startswith("- ") or len(line) + 1 + len(after.split()[0]) > 76, (line, after)


def test_the_file_to_open_first_is_said(capsys):
    files = [
        Path("out") / n
        for n in ("flow.parquet", "flow_summary.parquet", "flow.png", "flow.pdf", "flow_sst2.html")
    ]
    assert common.first_of(files) == Path("out/flow_sst2.html")
    assert common.first_of(files[:4]) == Path("out/flow.png")
    assert common.first_of([Path("out/model")]) is None
    common.print_files(files)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[-1] == "open first: out/flow_sst2.html"


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("/data/models/SmolLM2", "SmolLM2"),
        ("C:\\models\\mine", "mine"),
        ("org/SmolLM2-135M", "SmolLM2-135M"),
        ("./runs/mine/checkpoint-100/", "mine/checkpoint-100"),
        ("/hub/models--org--Qwen3-0.6B/snapshots/0123abcd", "Qwen3-0.6B"),
        ("/models/small.Q4_1.gguf", "small.Q4_1"),
        ("SmolLM2-135M-Instruct (Q4_1)", "SmolLM2-135M-Instruct (Q4_1)"),
        ("nsa/run-0 at step 40", "run-0 at step 40"),
        ("x" * 30 + "y" * 30, "x" * 19 + "…" + "y" * 19),
        ("/", "/"),
    ],
)
def test_a_path_is_no_title(name, title):
    assert titled(name) == title
