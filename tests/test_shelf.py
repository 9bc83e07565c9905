"""Which results may take the place of which, and where the others stand."""

import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from anchors.errors import AnchorsError
from anchors.study.results import provenance, read_table, write_table
from anchors.study.shelf import Shelf, contained, run_name

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


def test_tables_whose_facts_were_taken_from_beside_them_tell_them_still(tmp_path):
    """As in a repository that keeps results small: what is drawn from them again takes their place."""
    write(tmp_path, facts(), 1, extra=("figure",))
    for path in tmp_path.glob("*.json"):
        path.unlink()
    assert write(tmp_path, facts(), 2, extra=("figure",))[1] == []
    assert value(tmp_path / "flow_summary.parquet") == 2
    assert names(tmp_path) == PLAIN | {"flow.png", "flow.pdf"}
    for path in tmp_path.glob("*.json"):
        path.unlink()
    (tmp_path / "flow_own.parquet").write_bytes(b"no table")
    assert len(write(tmp_path, facts(model="b"), 3)[1]) == 1
    assert value(tmp_path / "flow_summary.parquet") == 2


OTHERS = {
    "another model": facts(model="b"),
    "fewer examples": facts(examples=4),
    "other seeds": facts(seeds=(2, 3)),
    "another setting": facts(top=3),
    "another task": facts(tasks=("trec",)),
}


def folders(path):
    return sorted(p.name for p in path.iterdir() if p.is_dir())


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_contained_stands_beside_and_that_is_said(case, tmp_path):
    write(tmp_path, facts(seeds=(1, 2)), 1, extra=("csv", "page", "figure"))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == PLAIN | {"flow.csv", "flow_sst2.html", "flow.png", "flow.pdf"}
    told = OTHERS[case]
    files, notes = write(tmp_path, told, 2)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    (folder,) = folders(tmp_path)
    part = told["parts"][0]
    assert folder.startswith(f"{told['model']}-{part['examples']}x{len(part['seeds'])}-")
    assert names(tmp_path / folder) == PLAIN
    assert value(tmp_path / folder / "flow.parquet") == 2
    assert files[0] == tmp_path / folder / "flow.parquet"
    assert notes == [
        f"{str(tmp_path)!r} holds other results: these stand beside them in {str(tmp_path / folder)!r}."
    ]
    # Back and forth replaces each by itself alone.
    write(tmp_path, facts(seeds=(1, 2)), 3)
    write(tmp_path, told, 4)
    assert folders(tmp_path) == [folder]
    assert (value(tmp_path / "flow.parquet"), value(tmp_path / folder / "flow.parquet")) == (3, 4)


def test_another_name_of_the_same_task_stands_beside(tmp_path):
    def called(*names):
        told = facts()
        return told | {"parts": [part | {"called": [name]} for name in names for part in told["parts"]]}

    write(tmp_path, facts(), 1)  # from before names were kept
    assert write(tmp_path, called("mine"), 2, extra=("csv",))[1] == []
    assert write(tmp_path, called("yours"), 3)[1] != []
    assert [value(tmp_path / at / "flow.parquet") for at in ("", *folders(tmp_path))] == [2, 3]
    assert write(tmp_path, called("mine", "yours"), 4)[1] == []
    assert value(tmp_path / "flow.parquet") == 4
    assert "flow.csv" not in names(tmp_path)  # of one name only
    assert contained(called("mine"), called("yours", "mine"))
    assert not contained(called("mine", "yours"), called("mine"))


def test_a_third_run_stands_beside_both(tmp_path):
    for number, told in enumerate(
        (facts(), facts(model="b"), facts(model="b", examples=3), facts(model="b", examples=9))
    ):
        write(tmp_path, told, number)
    assert value(tmp_path / "flow.parquet") == 0
    assert sorted(value(tmp_path / f / "flow.parquet") for f in folders(tmp_path)) == [1, 2, 3]


def test_what_a_larger_run_does_not_write_again_is_gone(tmp_path):
    """A page of five prompts would stand beside tables of six."""
    write(tmp_path, facts(), extra=("page", "csv"))
    (tmp_path / "flow_notes.txt").write_text("mine")
    _, notes = write(tmp_path, facts(), extra=("csv",))
    assert notes == []
    assert "flow_sst2.html" in names(tmp_path)  # still of the same results
    told = json.loads((tmp_path / "flow.json").read_text())
    assert "flow_sst2.html" in told["files"]
    for name in ("flow.json", "flow_summary.json"):  # whoever edits this may name anything
        (tmp_path / name).write_text(
            json.dumps(told | {"files": [*told["files"], "flow_notes.txt", "thesis.csv"]})
        )
    (tmp_path / "thesis.csv").write_text("mine")
    _, notes = write(tmp_path, facts(examples=6))
    assert notes == []
    assert names(tmp_path) == PLAIN | {"flow_notes.txt", "thesis.csv"}


def test_no_pages_leave_no_stale_page(tmp_path):
    write(tmp_path, facts(), extra=("page", "csv"))
    shelf = Shelf(tmp_path, "flow", whole=True)
    shelf.table("flow", pd.DataFrame({"value": [1.0]}))
    shelf.write(facts())
    assert names(tmp_path) == PLAIN | {"flow.csv"}
    assert "flow_sst2.html" not in json.loads((tmp_path / "flow.json").read_text())["files"]


def test_other_reports_of_a_folder_are_left_alone(tmp_path):
    write(tmp_path, facts(), 1)
    write(tmp_path, facts(model="b"), 2, name="classify")
    assert value(tmp_path / "flow.parquet") == 1
    assert folders(tmp_path) == []
    # A report that would replace a file of another one goes elsewhere.
    shelf = Shelf(tmp_path, "table1")
    shelf.table("classify", pd.DataFrame({"value": [3.0]}))
    shelf.write(facts(model="c"))
    (folder,) = folders(tmp_path)
    assert (value(tmp_path / "classify.parquet"), value(tmp_path / folder / "classify.parquet")) == (2, 3)


def test_results_from_before_they_named_their_files(tmp_path):
    for name in ("flow", "flow_summary"):
        write_table(tmp_path / f"{name}.parquet", pd.DataFrame({"value": [1.0]}), facts())
    for name in ("flow.png", "flow_sst2.html", "flow.csv", "flowers.png"):
        (tmp_path / name).write_text("old")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for number, told in enumerate((facts(model="b"), facts(examples=9))):  # nobody knows whose the page is
        write(tmp_path, told, number, extra=("figure",))
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
        assert len(folders(tmp_path)) == number + 1


def test_a_file_of_unknown_origin_is_never_replaced(tmp_path):
    (tmp_path / "flow.csv").write_text("one")
    write(tmp_path, facts(), extra=("csv",))
    (folder,) = folders(tmp_path)
    (tmp_path / folder / "flow.csv").write_text("two")
    for name in PLAIN:
        (tmp_path / folder / name).unlink()
    write(tmp_path, facts(), extra=("csv",))
    assert folders(tmp_path) == [folder, f"{folder}-2"]
    assert [p.read_text() for p in (tmp_path / "flow.csv", tmp_path / folder / "flow.csv")] == ["one", "two"]


def test_nothing_outside_the_folder_is_touched(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    write(out, facts())
    elsewhere.mkdir()
    (elsewhere / "flow_x.csv").write_text("mine")
    told = json.loads((out / "flow.json").read_text())
    told["files"] += ["../elsewhere/flow_x.csv", "..", str(elsewhere / "flow_x.csv")]
    for name in ("flow.json", "flow_summary.json"):
        (out / name).write_text(json.dumps(told))
    write(out, facts(examples=6))
    assert (elsewhere / "flow_x.csv").read_text() == "mine"
    (out / run_name(facts(model="b"))).symlink_to(elsewhere)
    with pytest.raises(AnchorsError, match="is a link"):
        write(out, facts(model="b"))
    assert names(elsewhere) == {"flow_x.csv"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": 3, "versions": 1, "command": 1, "written": 1}', "[" * 10**5]
)
def test_what_stands_beside_a_table_may_be_anything(text, tmp_path):
    (tmp_path / "flow.json").write_text(text)
    files, _ = write(tmp_path, facts(), 2)
    assert (tmp_path / "flow.json").read_text() == text
    assert value(files[0]) == 2


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
