"""The table of all families: the package's file, the page and the sentences are those of the sweep's rows."""

import csv
import json
import runpy
from collections import defaultdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anchors.cli import app
from anchors.families import VERBS, families, known, summary

PAGE = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "families_page.py"))


def rows():
    found = defaultdict(list)
    for row in csv.DictReader(PAGE["TABLE"].open(newline="", encoding="utf-8")):
        found[row["kind"], row["family"]].append(row)
    return found


def test_all_is_written_from_the_rows():
    how = "uv run python docs/families_page.py"
    assert PAGE["KEPT"].read_text(encoding="utf-8") == PAGE["kept"](), how
    assert (PAGE["HERE"] / "families.md").read_text(encoding="utf-8") == PAGE["page"](), how
    for path, mark in PAGE["SENTENCES"].items():
        text = path.read_text(encoding="utf-8")
        assert text == PAGE["with_summary"](text, mark), how
        assert summary() in text


def test_a_verb_is_exact_where_all_its_numbers_are():
    by_name = rows()
    assert set(by_name) == {(f.kind, f.name) for f in families()}
    for family in families():
        verdict = {row["number"]: row["verdict"] for row in by_name[family.kind, family.name]}
        for verb, numbers in VERBS[family.kind].items():
            whole = all(verdict.get(n) == "exact" for n in numbers)
            assert (family.verbs[verb] == "exact") == whole, (family.name, verb)
        assert (family.verdict == "exact") == (set(family.verbs.values()) == {"exact"})
        assert (family.error is None) == all(v != "exact" for n, v in verdict.items() if n != "certificate")
        assert bool(family.reason) or set(verdict.values()) == {"exact"}


def test_nothing_that_is_listed_is_wrong():
    assert {v for f in families() for v in f.numbers.values()} <= {"exact", "refused", "not tried"}
    assert int(known("causal").split()[0]) > 100


@pytest.mark.parametrize("part", ["bart", "qwen2"])
def test_the_command_shows_them(part):
    shown = CliRunner().invoke(app, ["check", "--families", part])
    assert shown.exit_code == 0, shown.output
    wanted = {f.name: f for f in families() if part in f.name}
    assert all(name in shown.stdout for name in wanted)
    as_json = json.loads(CliRunner().invoke(app, ["check", "--families", part, "--json"]).stdout)
    assert {one["name"]: one["verdict"] for one in as_json} == {n: f.verdict for n, f in wanted.items()}


def test_a_family_that_is_not_there():
    refused = CliRunner().invoke(app, ["check", "--families", "qwenn2"])
    assert refused.exit_code == 2
    assert "Did you mean 'qwen2'" in " ".join(refused.output.split())
