"""Which results may take the place of which, and where the others go."""

import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from anchors.errors import AnchorsError
from anchors.study.results import provenance, read_table, write_table
from anchors.study.shelf import ASIDE, Shelf, contained

MADE = provenance(notes=[])


def facts(model="a", seeds=(1,), examples=5, tasks=("sst2",), **settings):
    parts = [
        {"kind": "flow", "model": f"print-{model}", "settings": settings, "task": task, "shots": 1}
        | {"seeds": list(seeds), "examples": examples, "data_source": "here"}
        for task in tasks
    ]
    return MADE | {"model": model, "fingerprint": f"print-{model}", "parts": parts}


def write(out, told, value=0.0, name="flow", extra=()):
    shelf = Shelf(out, name)
    shelf.table(name, pd.DataFrame({"value": [value]}), csv="csv" in extra)
    shelf.table(f"{name}_summary", pd.DataFrame({"value": [value]}))
    if "page" in extra:
        shelf.page(f"{name}_sst2", f"<p>{value}</p>")
    if "figure" in extra:
        shelf.figure(name, Figure())
    return shelf.write(told)


def names(folder):
    return {p.name for p in folder.iterdir() if p.is_file()}


def value(path):
    return float(read_table(path)[0]["value"][0])


PLAIN = {"flow.parquet", "flow.json", "flow_summary.parquet", "flow_summary.json"}


def test_the_same_again_and_more_of_it_take_the_place(tmp_path):
    write(tmp_path, facts())
    more = [
        facts(), facts(examples=6), facts(examples=6, seeds=(2, 1)), facts(examples=6, seeds=(1, 2), tasks=("trec", "sst2")),
    ]  # fmt: skip
    for number, told in enumerate(more, start=1):
        files, notes = write(tmp_path, told, number)
        assert notes == []
        assert value(tmp_path / "flow.parquet") == value(tmp_path / "flow_summary.parquet") == number
        assert files == [tmp_path / "flow.parquet", tmp_path / "flow_summary.parquet"]
    assert names(tmp_path) == PLAIN
    assert not (tmp_path / ASIDE).exists()


OTHERS = {
    "another model": facts(model="b"),
    "fewer examples": facts(examples=4),
    "other seeds": facts(seeds=(2, 3)),
    "another setting": facts(top=3),
    "another task": facts(tasks=("trec",)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_contained_is_set_aside_and_said(case, tmp_path):
    write(tmp_path, facts(seeds=(1, 2)), 1, extra=("csv", "page", "figure"))
    own = names(tmp_path)
    assert own == PLAIN | {"flow.csv", "flow_sst2.html", "flow.png", "flow.pdf"}
    told = OTHERS[case]
    _, notes = write(tmp_path, told, 2)
    (folder,) = (tmp_path / ASIDE).iterdir()
    assert folder.name.startswith("a-")
    assert names(folder) == own  # whole: nothing of one is left beside the other
    assert names(tmp_path) == PLAIN
    assert (value(folder / "flow.parquet"), value(tmp_path / "flow.parquet")) == (1, 2)
    assert notes == [f"8 earlier files of a that are no part of these results set aside in {folder}."]
    # Back and forth loses nothing and makes no third folder.
    write(tmp_path, facts(seeds=(1, 2)), 1)
    write(tmp_path, told, 2)
    assert {value(f / "flow.parquet") for f in (tmp_path / ASIDE).iterdir()} <= {1, 2}
    assert len(list((tmp_path / ASIDE).iterdir())) <= 2  # fewer of the same are no loss


def test_what_a_larger_run_does_not_write_again_is_set_aside(tmp_path):
    """A page of five prompts would stand beside tables of six."""
    write(tmp_path, facts(), extra=("page", "csv"))
    _, notes = write(tmp_path, facts(), extra=("csv",))
    assert notes == []
    assert "flow_sst2.html" in names(tmp_path)  # still of the same results
    _, notes = write(tmp_path, facts(examples=6))
    assert len(notes) == 1
    assert names(tmp_path) == PLAIN
    (folder,) = (tmp_path / ASIDE).iterdir()
    assert names(folder) == {"flow_sst2.html", "flow.csv"}


def test_other_reports_of_a_folder_are_left_alone(tmp_path):
    write(tmp_path, facts(), 1)
    write(tmp_path, facts(model="b"), 2, name="classify")
    assert value(tmp_path / "flow.parquet") == 1
    assert not (tmp_path / ASIDE).exists()
    # Unless they own a file that would be replaced: then they go, whole.
    shelf = Shelf(tmp_path, "table1")
    shelf.table("classify", pd.DataFrame({"value": [3.0]}))
    shelf.write(facts(model="c"))
    (folder,) = (tmp_path / ASIDE).iterdir()
    assert names(folder) == {f"classify{x}.{y}" for x in ("", "_summary") for y in ("parquet", "json")}
    assert value(tmp_path / "flow.parquet") == 1


def test_results_from_before_they_named_their_files(tmp_path):
    for name in ("flow", "flow_summary"):
        write_table(tmp_path / f"{name}.parquet", pd.DataFrame({"value": [1.0]}), facts())
    for name in ("flow.png", "flow_sst2.html", "flow.csv"):
        (tmp_path / name).write_text("old")
    (tmp_path / "flowers.png").write_text("mine")
    (tmp_path / "flow_notes.txt").write_text("mine")
    _, notes = write(tmp_path, facts(model="b"), 2, extra=("figure",))
    (folder,) = (tmp_path / ASIDE).iterdir()
    assert names(folder) == PLAIN | {"flow.png", "flow_sst2.html", "flow.csv"}
    assert len(notes) == 1
    assert names(tmp_path) == PLAIN | {"flow.png", "flow.pdf", "flowers.png", "flow_notes.txt"}


def test_a_file_of_unknown_origin_is_never_replaced(tmp_path):
    for content in ("one", "two"):
        (tmp_path / "flow.csv").write_text(content)
        _, notes = write(tmp_path, facts(), extra=("csv",))
        assert "1 earlier file of unknown origin set aside" in notes[0]
        for path in tmp_path.glob("flow*"):
            path.unlink()
    kept = [(tmp_path / ASIDE / f"unknown-{i}" / "flow.csv").read_text() for i in (1, 2)]
    assert kept == ["one", "two"]


def test_nothing_outside_the_folder_is_moved(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    write(out, facts())
    elsewhere.mkdir()
    (elsewhere / "precious.txt").write_text("mine")
    told = json.loads((out / "flow.json").read_text())
    told["files"] += ["../elsewhere/precious.txt", "..", str(elsewhere / "precious.txt")]
    for name in ("flow.json", "flow_summary.json"):
        (out / name).write_text(json.dumps(told))
    write(out, facts(model="b"))
    assert (elsewhere / "precious.txt").read_text() == "mine"
    (out / "linked").mkdir()
    (out / "linked" / ASIDE).symlink_to(elsewhere)
    write(out / "linked", facts())
    with pytest.raises(AnchorsError, match="is a link"):
        write(out / "linked", facts(model="b"))
    assert names(elsewhere) == {"precious.txt"}
    assert value(out / "linked" / "flow.parquet") == 0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": 3, "versions": 1, "command": 1, "written": 1}', "[" * 10**5]
)
def test_what_stands_beside_a_table_may_be_anything(text, tmp_path):
    (tmp_path / "flow.json").write_text(text)
    write(tmp_path, facts(), 2)
    assert value(tmp_path / "flow.parquet") == 2
    assert [p.read_text() for p in tmp_path.rglob(f"{ASIDE}/*/flow.json")] == [text]


def test_figures_say_what_they_are_of(tmp_path):
    write(tmp_path, facts(), extra=("figure",))
    said = Image.open(tmp_path / "flow.png").text["Description"]
    assert said.startswith("a, print-a, report ")
    assert b"print-a" in (tmp_path / "flow.pdf").read_bytes()


amounts = st.builds(
    facts,
    model=st.sampled_from("ab"),
    seeds=st.sets(st.integers(1, 3), min_size=1),
    examples=st.integers(1, 3),
    tasks=st.sets(st.sampled_from(["sst2", "trec"]), min_size=1).map(sorted),
)


@settings(max_examples=60, deadline=None)
@given(amounts, amounts, amounts)
def test_containment_is_an_order(one, two, three):
    assert contained(one, one)
    assert not (contained(one, two) and contained(two, three)) or contained(one, three)
    same = contained(one, two) and contained(two, one)
    key = [(p["model"], p["task"], sorted(p["seeds"]), p["examples"]) for p in one["parts"]]
    other = [(p["model"], p["task"], sorted(p["seeds"]), p["examples"]) for p in two["parts"]]
    assert same == (sorted(key) == sorted(other))
