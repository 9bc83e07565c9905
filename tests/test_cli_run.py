"""The experiments as a user types them: `anchors run`, `ls` and `figures`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from shutil import copytree, rmtree

import numpy as np
import pandas as pd
import pytest
from families import CONFIGS, make
from PIL import Image
from transformers import GPT2Config
from typer.testing import CliRunner

from anchors.cli import app
from anchors.experiments import CATALOGUE

runner = CliRunner()

GRID = ["figure5", "table1", "-n", 6, "--seeds", "1,2", "--task", "sst2,trec"]
CELLS = {
    ("figure5", "readout", "sst2", 1), ("figure5", "readout", "trec", 1),
    ("table1", "reweight", "sst2", 1), ("table1", "reweight", "trec", 1),
    ("table1", "classify", "sst2", 1), ("table1", "classify", "trec", 1),
    ("table1", "classify", "sst2", 5), ("table1", "classify", "trec", 5),
}  # fmt: skip


def invoke(*arguments: object):
    return runner.invoke(app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "180"})


@pytest.fixture(scope="module")
def tiny(model_directory: Path) -> list[str]:
    return ["--model", str(model_directory), "--device", "cpu"]


@pytest.fixture(scope="module")
def wide(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny GPT-2 with GPT-2's context of 1024 tokens: TREC with 5 shots does not fit into the other one's."""
    folder = tmp_path_factory.mktemp("wide-gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "gpt2", GPT2Config(n_layer=3, n_head=4, n_embd=32, n_positions=1024))
        make("gpt2", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ["--model", str(folder), "--device", "cpu"]


@pytest.fixture(scope="module")
def results(wide, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Figure 5 and Table 1 as `anchors run … --compare` leaves and prints them."""
    folder = tmp_path_factory.mktemp("results")
    result = invoke("run", *GRID, *wide, "-o", folder, "--compare")
    assert result.exit_code == 0, result.output
    return folder, result.stdout, result.stderr


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """All files, and when each was written."""
    found = {str(p.relative_to(folder)): p.stat() for p in folder.rglob("*") if p.is_file()}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}


def test_a_run_leaves_each_experiment_in_a_folder(results):
    folder = results[0]
    assert {p.name for p in folder.iterdir()} == {"figure5", "table1", "runs"}
    for name, kinds, tables in (
        ("figure5", ["readout"], ["summary"]),
        ("table1", ["reweight", "classify"], ["summary", "beta"]),
    ):
        parquet = {f"{stem}.parquet" for stem in (*kinds, *(f"{name}_{table}" for table in tables))}
        assert {p.name for p in (folder / name).glob("*.parquet")} == parquet
        assert Image.open(folder / name / f"{name}.png").size[0] > 300
        assert (folder / name / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    rows = pd.read_parquet(folder / "table1" / "classify.parquet")
    units = rows[rows["number"] >= 0].groupby(["task", "shots", "seed"])["number"].nunique()
    assert units.to_dict() == {(t, s, seed): 6 for t in ("sst2", "trec") for s in (1, 5) for seed in (1, 2)}
    table = pd.read_parquet(folder / "table1" / "table1_summary.parquet")
    assert set(table["condition"]) == {"1-shot", "more-shot", "re-weighted, 1-shot"}
    own = rows[(rows["task"] == "trec") & (rows["shots"] == 5) & (rows["metric"] == "accuracy")]
    said = table[(table["task"] == "trec") & (table["condition"] == "more-shot")].set_index("metric")
    assert said.loc["accuracy", "value"] == pytest.approx(own["value"].mean())


def test_compare_prints_the_papers_numbers_beside_ours(results):
    folder, printed, errors = results
    assert "figure5: AUCROC_l and R_l by layer" in printed
    assert CATALOGUE["figure5"].finding in printed
    assert "the paper prints no numbers here" in " ".join(errors.split())
    beside = printed.split("ours beside the paper's")[1].splitlines()
    table = pd.read_parquet(folder / "table1" / "table1_summary.parquet")
    ours = table[table["metric"] == "accuracy"].set_index(["task", "condition"])["value"]
    printed_cells = {tuple(cells[:3]): cells[3:] for x in beside if (cells := re.split(r"\s{2,}", x.strip()))}
    for number in CATALOGUE["table1"].paper:
        paper, *own = printed_cells[number.task, number.condition, "accuracy"]
        assert paper == f"{number.value:.2f}".removeprefix("0")
        if (number.task, number.condition) in ours.index:
            assert own[0].split()[0] == f"{ours[number.task, number.condition]:.2f}".removeprefix("0")
        else:
            assert number.task in ("agnews", "emo")  # not measured
            assert not own


def test_a_second_run_computes_nothing_and_json_holds_every_experiment(results, wide, monkeypatch):
    monkeypatch.setattr("anchors.figures.draw", lambda *_: None)  # takes much of the time
    folder = results[0]
    before = contents(folder / "runs")
    assert sum(name.startswith("reweight") and name.endswith(".safetensors") for name in before) == 4
    result = invoke("run", *GRID, *wide, "-o", folder, "--json")
    assert result.exit_code == 0, result.output
    assert contents(folder / "runs") == before
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert list(found) == ["figure5", "table1"]
    assert {row["metric"] for row in found["figure5"]["summary"]} == {"aucroc", "r"}
    assert {row["task"] for row in found["figure5"]["summary"]} == {"sst2", "trec", "mean"}
    table = pd.read_parquet(folder / "table1" / "table1_summary.parquet")
    assert [row["value"] for row in found["table1"]["summary"]] == table["value"].tolist()
    assert len(found["table1"]["beta"]) == 3 * 4 * (2 + 6)
    assert [part["seeds"] for part in found["table1"]["parts"]] == [[1, 2]] * 6


def test_dry_run_tells_what_is_left_and_writes_nothing(results, wide, tmp_path, monkeypatch):
    monkeypatch.setattr("anchors.study.cost.Cost.seconds", lambda _, p: float(p.rows * p.tokens))
    result = invoke("run", *GRID, *wide, "-o", tmp_path, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert {(e, c["analysis"], c["task"], c["shots"]) for e, own in plan.items() for c in own} == CELLS
    assert {(c["left"], c["prompts"]) for own in plan.values() for c in own} == {(12, 12)}
    seconds = {(c["analysis"], c["task"], c["shots"]): c["seconds"] for own in plan.values() for c in own}
    assert seconds["classify", "trec", 1] > 12  # a token at least of every prompt
    assert (
        seconds["classify", "trec", 5] > seconds["classify", "trec", 1]
    )  # by the demonstrations, run once a seed
    assert seconds["reweight", "trec", 1] > 2 * seconds["classify", "trec", 1]
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]

    before = contents(results[0])
    result = invoke("run", *GRID, *wide, "-o", results[0], "--dry-run", "--json")
    left = [c for own in json.loads(result.stdout).values() for c in own]
    assert len(left) == len(CELLS)
    assert {(c["left"], c["prompts"], c["seconds"]) for c in left} == {(0, 12, 0)}
    more = invoke(
        "run", "figure5", "-n", 8, "--seeds", "1,2", "-t", "trec", *wide, "-o", results[0], "--dry-run"
    )
    assert more.exit_code == 0
    assert "What is left to do" in more.stdout
    line = next(line.split() for line in more.stdout.splitlines() if "trec" in line)
    assert line[:7] == ["figure5", "readout", "trec", "1", "none", "16", "4"]
    assert contents(results[0]) == before


def test_experiments_share_their_cells(tiny, tmp_path):
    """Tables 2 and 6 stand on the same prompts."""
    grid = ["-n", 2, "--seeds", "1", "-t", "sst2", *tiny, "-o", tmp_path]
    assert invoke("run", "table2", *grid).exit_code == 0
    before = contents(tmp_path / "runs")
    assert invoke("run", "table6", *grid).exit_code == 0
    assert contents(tmp_path / "runs") == before
    one, other = (pd.read_parquet(tmp_path / name / "compress.parquet") for name in ("table2", "table6"))
    pd.testing.assert_frame_equal(one, other)


def test_one_experiment_that_cannot_be_run_does_not_stop_the_others(tiny, tmp_path):
    grid = ["-n", 2, "--seeds", "1", "-t", "trec", *tiny, "-o", tmp_path, "--json"]
    result = invoke("run", "many-shot", "figure5", *grid)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert (
        "error: [length] many-shot: 2 of 2 prompts are longer than the model's context of 512 tokens" in said
    )
    assert "1 of 2 experiments could not be run: many-shot." in said
    assert list(json.loads(result.stdout)) == ["figure5"]
    assert (tmp_path / "figure5" / "figure5.png").is_file()
    assert not (tmp_path / "many-shot").exists()


BAD = {
    "unknown experiment": (["figure5", "figure99"], "figure99"),
    "no experiment": ([], "Missing argument"),
    "a task that the experiment lacks": (["figure6", "-t", "sst2"], "figure6 has none of the tasks ['sst2']"),
    "an unknown task beside a known one": (["figure5", "-t", "trec,nothing"], "nothing"),
    "seeds": (["figure5", "--seeds", "one"], "--seeds 'one'"),
    "no seeds": (["figure5", "--seeds", ""], "--seeds ''"),
    "no examples": (["figure5", "-n", 0], "--examples"),
    "no batch": (["figure5", "--batch-size", "none"], "--batch-size 'none'"),
    "data that is not there": (["figure5", "--data", "no/such/place"], "no/such/place"),
    "model that is not there": (["figure5", "--model", "./no-such-model"], "no-such-model"),
    "more components than queries": (["figure6", "-n", 2], "10 components"),
    "more layers than there are": (["figure8", "-n", 2, "-t", "sst2"], "5 layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_run_is_refused_by_name_and_nothing_is_written(case, tiny, tmp_path):
    options, said = BAD[case]
    result = invoke("run", *tiny, "-n", 2, *options, "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())
    assert not result.stdout
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "config.json"]


def test_ls_tells_which_experiments_have_rows(results, tmp_path):
    listed = json.loads(invoke("ls", "--json", "-o", results[0]).stdout)
    found = listed["experiments"]
    assert [own["name"] for own in listed["results"]] == ["figure5", "table1"]
    assert [e["name"] for e in found] == list(CATALOGUE)
    assert {e["name"] for e in found if e["rows"]} == {"figure5", "table1"}
    own = next(e for e in found if e["name"] == "table1")
    assert own["analyses"] == ["reweight", "classify"]
    assert own["tasks"] == ["agnews", "emo", "sst2", "trec"]
    assert (own["seeds"], own["examples"]) == ([42, 43, 44, 45, 46], 1000)
    assert not any(
        e["rows"] for e in json.loads(invoke("ls", "--json", "-o", tmp_path).stdout)["experiments"]
    )
    printed = invoke("ls", "-o", results[0]).stdout.splitlines()
    marked = [line.split()[1] for line in printed if line.split()[:1] == ["✓"] and "rows in" not in line]
    assert marked == ["figure5", "table1"]
    assert all(any(f" {name} " in line for line in printed) for name in CATALOGUE)


def test_figures_are_drawn_again_from_rows_alone(results, tmp_path):
    """Without torch, without the runs, without what was drawn and summed up before."""
    folder = copytree(results[0], tmp_path / "results")
    rmtree(folder / "runs")
    made = [p for p in (folder / "table1").iterdir() if p.name.startswith("table1")]
    assert len(made) > 4
    for path in made:
        path.unlink()
    code = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{{name}} is not to be loaded")

sys.meta_path.insert(0, Refuse())
sys.argv = ["anchors", "figures", "table1", "-o", {str(folder)!r}]
from anchors.cli import main

main()
"""
    environment = os.environ | {"COLUMNS": "500"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert str(folder / "table1" / "table1.png") in done.stderr
    for name in ("table1_summary", "table1_beta"):
        own, again = (pd.read_parquet(x / "table1" / f"{name}.parquet") for x in (results[0], folder))
        pd.testing.assert_frame_equal(own, again)
    own, again = (np.asarray(Image.open(x / "table1" / "table1.png")) for x in (results[0], folder))
    assert (own == again).all()


def test_figures_says_what_to_do_without_rows(results, tmp_path):
    folder = copytree(results[0] / "table1", tmp_path / "table1").parent
    (folder / "table1" / "classify.parquet").unlink()
    before = contents(folder)
    result = invoke("figures", "table1", "-o", folder)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "holds no rows of classify." in said
    assert "Run `anchors run table1` first." in said
    assert contents(folder) == before
    result = invoke("figures", "figure99", "-o", folder)
    assert result.exit_code == 2
    assert "figure99" in result.stderr


def test_figures_all_draws_what_has_rows(results, tmp_path):
    folder = copytree(results[0] / "figure5", tmp_path / "figure5").parent
    (folder / "figure5" / "figure5.png").unlink()
    assert invoke("figures", "all", "-o", folder).exit_code == 0
    assert (folder / "figure5" / "figure5.png").is_file()
    assert {p.name for p in folder.iterdir()} == {"figure5"}
