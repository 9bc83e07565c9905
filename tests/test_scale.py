"""The study of scale: its order, its verdicts, its budget of seconds, and the three questions of critics."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import anchors
from anchors.cli import app
from anchors.errors import AnchorsError
from anchors.experiments import CATALOGUE, SUITES
from anchors.experiments.scale import FINDINGS, GROWN, MARKS, depth_table, depths, effects, table, verdict
from anchors.flow.metrics import evenness
from anchors.study.results import read_facts, read_table, write_table
from anchors.summaries.critiques import followed
from anchors.tasks.drawing import Draw, demonstrations

RESULTS = Path(__file__).parents[1] / "experiments" / "results"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_suite_and_the_findings_name_experiments_that_exist():
    assert set(SUITES["scale"]) <= set(CATALOGUE)
    assert {finding.experiment for finding in FINDINGS} <= set(SUITES["scale"])
    assert len({finding.name for finding in FINDINGS}) == len(FINDINGS)


@pytest.mark.parametrize(
    ("signs", "said"),
    [
        ((1, 1, 1), "at every size"),
        ((0, 1, 1), "from b on"),
        ((-1, 0, 1), "from c on"),
        ((0, -1, 0), "nowhere"),
        ((1, 0, 1), "mixed"),
        ((1, 1, 0), "mixed"),
        ((1,), ""),
    ],
)
def test_a_verdict_looks_at_every_size(signs, said):
    assert verdict(list(zip("abc", signs, strict=False))) == said


def test_evenness_is_one_where_all_give_alike_and_zero_where_one_gives_all():
    found = evenness(torch.tensor([[1.0, 1, 1, 1], [0, 5, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]))
    assert found[:2].tolist() == pytest.approx([1, 0])
    assert found[2].isnan()
    assert float(found[3]) == pytest.approx(0.5)
    assert evenness(torch.ones(2, 1)).isnan().all()


def test_one_set_of_demonstrations_in_an_order_of_each_seed():
    task = anchors.task("trec")
    data = anchors.read(task)
    shown = {
        seed: [e.text for e in demonstrations(task, data, Draw(2, seed, False, "order-only"))]
        for seed in range(6)
    }
    assert len({frozenset(texts) for texts in shown.values()}) == 1
    assert len({tuple(texts) for texts in shown.values()}) > 1


def test_answers_follow_permuted_labels_or_stay_true(gpt2):
    task = anchors.task("trec")
    data, how = anchors.read(task), anchors.Sample(seeds=(1, 2), examples=5, control="permuted-labels")
    rows = anchors.measure(gpt2, anchors.Classification(), task, data, how).rows
    for seed in how.seeds:
        true, shown = (
            demonstrations(task, data, Draw(1, seed, False, control))
            for control in ("none", "permuted-labels")
        )
        moved = {task.labels[a.label]: b.label for a, b in zip(true, shown, strict=True)}
        own = rows[(rows["seed"] == seed) & rows["metric"].str.startswith("shown_as/")]
        assert dict(zip(own["metric"].str.removeprefix("shown_as/"), own["value"], strict=True)) == moved
    wide = rows[rows["number"] >= 0].pivot(index=["seed", "number"], columns="metric", values="value")
    told = followed(rows).set_index("metric")["value"]
    assert told["true"] == pytest.approx((wide["gold"] == wide["predicted"]).mean())
    assert told[["shown", "true", "other"]].sum() == pytest.approx(1)
    with pytest.raises(AnchorsError, match="do not say which label word"):
        followed(rows[~rows["metric"].str.startswith("shown_as/")])


def test_a_budget_ends_with_whole_seeds_and_goes_on(model_directory, tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("anchors.study.prompted.time", SimpleNamespace(monotonic=lambda: next(clock)))
    command = [
        "run",
        "figure5",
        "--task",
        "sst2",
        "-n",
        "4",
        "--seeds",
        "1,2,3",
        "--batch-size",
        "1",
        "--rows",
    ]
    command += ["--model", str(model_directory), "--device", "cpu", "-o", str(tmp_path)]

    def seeds(*more: str) -> list[int]:
        result = CliRunner().invoke(app, [*command, *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        rows, facts = read_table(tmp_path / "figure5" / "readout.parquet")
        assert rows[rows["number"] >= 0].groupby("seed")["number"].nunique().eq(4).all()
        assert facts["parts"][0]["seeds"] == sorted(set(rows["seed"]))
        assert {p.suffix for p in (tmp_path / "figure5").iterdir()} == {".parquet", ".json"}
        return facts["parts"][0]["seeds"]

    first = seeds("--budget", "6")
    assert 1 <= len(first) < 3
    assert seeds() == [1, 2, 3]
    drawn = CliRunner().invoke(app, ["figures", "scale", "-o", str(tmp_path)], catch_exceptions=False)
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "figure5" / "figure5.png").is_file()


def test_the_committed_table_is_that_of_the_committed_rows():
    told = (RESULTS.parent / "RESULTS.md").read_text().split(MARKS[0])[1].split(MARKS[1])[0].strip()
    found, _ = read_table(RESULTS / "scale" / "scale.parquet")
    assert told == table(found)


def test_what_stands_beside_a_committed_table_is_what_it_says_of_itself():
    differ = [
        path
        for path in RESULTS.parent.rglob("*.json")
        if path.with_suffix(".parquet").exists()
        and {**json.loads(path.read_text(encoding="utf-8")), "files": None}
        != {**read_table(path.with_suffix(".parquet"))[1], "files": None}
    ]
    assert differ == []


def test_the_effects_are_those_of_the_tables(tmp_path):
    (tmp_path / "figure4").symlink_to(RESULTS / "figure4")
    found = effects(tmp_path).set_index(["model", "finding", "task"])
    assert set(found.index.get_level_values("finding")) == {
        "isolation, answer",
        "isolation, words",
        "isolation, skill",
    }
    for folder, model in (("", "SmolLM2 135M"), ("qwen2.5-coder-1.5b", "Qwen2.5-Coder 1.5B")):
        summary, _ = read_table(RESULTS / "figure4" / folder / "figure4_summary.parquet")
        own = summary[summary["metric"] == "accuracy"].pivot(
            index="task", columns="condition", values="value"
        )
        for task, row in own.iterrows():
            told = found.loc[(model, "isolation, skill", task), "value"]
            assert told == pytest.approx(row["none"] - row["first-5/label"], abs=2e-3)
    sizes = [
        found.loc[(f"Qwen2.5-Coder {size}", "isolation, skill", "mean"), "value"] for size in ("0.5B", "1.5B")
    ]
    grown = found.loc[(GROWN, "isolation, skill", "mean")]
    assert grown["value"] == pytest.approx(sizes[1] - sizes[0])
    assert grown["wide_low"] < grown["low"] < grown["value"] < grown["high"] < grown["wide_high"]


def test_where_things_happen_is_read_off_the_committed_rows():
    told = depths(RESULTS)
    summary, _ = read_table(RESULTS / "figure5" / "figure5_summary.parquet")
    mean = summary[(summary["task"] == "mean") & (summary["metric"] == "aucroc")].set_index("layer")["value"]
    assert told.set_index("model").loc["SmolLM2 135M", "peak"] == mean.idxmax()
    page = (RESULTS.parent / "RESULTS.md").read_text()
    assert depth_table(told) in page


def test_compact_rows_keep_what_tables_read(tmp_path):
    compact = benchmark("compact")
    values = np.random.default_rng(0).lognormal(size=1000)
    assert np.abs(compact.rounded(values) / values - 1).max() <= 2**-11
    one = pd.DataFrame({"value": [0.5], "low": [0.4], "high": [0.6]})
    held = values.round(3)
    assert not compact.has_few_bits(pd.DataFrame({"number": 0, "value": held}))
    assert compact.has_few_bits(pd.DataFrame({"number": 0, "value": compact.rounded(held)}))
    assert compact.farthest({"a": one}, {"a": one}) == 0
    assert compact.farthest({"a": one}, {"a": one + 0.02}) > 1
    with pytest.raises(ValueError, match="other rows"):
        compact.farthest({"a": one}, {"a": pd.concat([one, one])})


def test_a_table_in_fewer_bytes_is_the_same_one(tmp_path):
    compact = benchmark("compact")
    one = pd.DataFrame(
        {
            "number": np.tile(np.arange(500), 100),
            "layer": pd.array(np.repeat([None, 1], 25_000), dtype="Int32"),
            "value": np.repeat(np.float32([0.5, np.nan]), 25_000),
            "right": np.arange(50_000) % 3 == 0,
            "metric": "s",
        }
    )
    facts = {"model": "m", "elsewhere": []}
    for rows in (one, one.astype({"metric": "category"})):
        path = tmp_path / "rows.parquet"
        write_table(path, rows, facts)
        before = path.stat().st_size
        compact.shrink_table(path)
        assert path.stat().st_size < before
        assert json.loads(compact.facts_of(path)) == facts
        pd.testing.assert_frame_equal(read_table(path)[0], rows)


def test_rows_that_two_experiments_share_lie_in_one_of_them(tmp_path):
    columns = {"condition": "none", "layer": 0, "metric": "s"}
    shared = pd.DataFrame(
        {
            "task": "sst2",
            "shots": 1,
            "control": "none",
            "seed": [1, 1, 2],
            "number": [0, 1, 0],
            **columns,
            "value": [0.1, 0.2, 0.3],
        }
    )
    own = shared.assign(control="order-only", value=[0.4, 0.5, 0.6])
    facts = {"model": "m"}
    giver, taker = tmp_path / "figure5" / "readout.parquet", tmp_path / "order" / "readout.parquet"
    write_table(giver, shared, facts)
    compact = benchmark("compact")
    held = compact.Held(taker, "readout", pd.concat([own, shared], ignore_index=True), facts, [])
    left = compact.left(held, compact.Held(giver, "readout", shared, facts, []))
    taker.parent.mkdir()
    taker.write_bytes(left.packed(24))
    assert len(pq.read_table(taker)) == len(own)
    rows, told = read_table(taker)
    assert told == read_facts(taker) == facts
    pd.testing.assert_frame_equal(rows, held.rows.astype({"value": rows["value"].dtype}), check_dtype=False)
    fewer = compact.Held(giver, "readout", shared[:2], facts, [])
    assert compact.left(held, fewer).others, "seed 1 is whole there"
    assert not compact.left(held, compact.Held(giver, "readout", shared[1:], facts, [])).others
    moved = compact.Held(giver, "readout", shared.assign(value=shared["value"] * 1.001), facts, [])
    assert not compact.left(held, moved).others
    write_table(taker, own, facts | {"elsewhere": [{"file": "../../../else.parquet", "only": {"seed": [1]}}]})
    with pytest.raises(AnchorsError, match="outside its results"):
        read_table(taker)
    write_table(
        taker, own, facts | {"elsewhere": [{"file": "../figure6/readout.parquet", "only": {"seed": [1]}}]}
    )
    with pytest.raises(AnchorsError, match="figure6"):
        read_table(taker)
    for wrong, said in (
        ([{"file": "../order/readout.parquet", "only": {"seed": [1]}}], "does not hold the rest"),
        ([{"file": "../figure5/readout.parquet", "only": {"colour": [1]}}], "does not hold the rest"),
        ([{"file": "../figure5/readout.parquet"}], "does not say where"),
        ("figure5", "does not say where"),
    ):
        write_table(taker, own, facts | {"elsewhere": wrong})
        with pytest.raises(AnchorsError, match=said):
            read_table(taker)


def test_no_committed_result_names_a_folder_of_a_machine() -> None:
    files = [path for path in RESULTS.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 300
    places = b"/tmp/", b"/root/", b"/home/", b"/work/"
    assert not [path for path in files if any(place in path.read_bytes() for place in places)]
