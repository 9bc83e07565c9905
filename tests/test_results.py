"""Nothing computed is lost, nothing is counted twice, nothing is half-written."""

from importlib.metadata import version as installed

import numpy as np
import pandas as pd
import pytest
import torch

from anchors.errors import AnchorsError
from anchors.flow import analysis as flow_analysis
from anchors.flow.analysis import InformationFlow
from anchors.results import Run, key_of, provenance, read_table, write_atomic, write_table
from anchors.runner import Sample, measure
from anchors.stats import SUMS, flow_summary, shares
from anchors.tasks.data import read
from anchors.tasks.task import TASKS

TASK = TASKS["sst2"]


@pytest.fixture(scope="module")
def data():
    return read(TASK)


def measured(lm, data, out, **options):
    """Rows of a small run; the certificate's error is left out, because it belongs to a batch, not to an example."""
    sample = Sample(**({"examples": 6} | options))
    rows = measure(lm, InformationFlow(), TASK, data, sample, out=out).rows
    return rows[rows["metric"] != "identity_error"].reset_index(drop=True)


def test_running_again_computes_nothing(gpt2, data, tmp_path, monkeypatch):
    first = measured(gpt2, data, tmp_path)
    monkeypatch.setattr(flow_analysis, "flow", lambda *_: pytest.fail("computed again"))
    pd.testing.assert_frame_equal(measured(gpt2, data, tmp_path), first)


def test_asking_for_more_computes_only_the_rest(gpt2, data, tmp_path, monkeypatch):
    measured(gpt2, data, tmp_path, examples=4)
    calls = []
    original = flow_analysis.flow
    monkeypatch.setattr(
        flow_analysis, "flow", lambda lm, prompts: calls.append(len(prompts)) or original(lm, prompts)
    )
    more = measured(gpt2, data, tmp_path, examples=6)
    assert sum(calls) == 2
    pd.testing.assert_frame_equal(more, measured(gpt2, data, tmp_path / "afresh", examples=6), rtol=1e-4)
    fewer = measured(gpt2, data, tmp_path, examples=4)
    pd.testing.assert_frame_equal(fewer, measured(gpt2, data, tmp_path / "few", examples=4), rtol=1e-4)


def test_an_interrupted_run_keeps_its_batches(gpt2, data, tmp_path, monkeypatch):
    whole = measured(gpt2, data, tmp_path / "whole", batch_size=2)
    original, calls = flow_analysis.flow, []

    def interrupted(lm, prompts):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(prompts))
        return original(lm, prompts)

    monkeypatch.setattr(flow_analysis, "flow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(gpt2, data, tmp_path / "cut", batch_size=2)
    monkeypatch.setattr(
        flow_analysis, "flow", lambda lm, prompts: calls.append(len(prompts)) or original(lm, prompts)
    )
    rows = measured(gpt2, data, tmp_path / "cut", batch_size=2)
    assert sum(calls) == 6
    pd.testing.assert_frame_equal(rows, whole)


def test_out_of_memory_halves_the_batch_and_goes_on(gpt2, data, tmp_path, monkeypatch):
    whole = measured(gpt2, data, tmp_path / "whole")
    original, sizes = flow_analysis.flow, []

    def small_memory(lm, prompts):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return original(lm, prompts)

    monkeypatch.setattr(flow_analysis, "flow", small_memory)
    rows = measured(gpt2, data, tmp_path / "small", batch_size=6)
    assert sizes[0] == 6
    assert max(sizes[2:]) <= 3
    pd.testing.assert_frame_equal(rows, whole, rtol=1e-4)


def test_a_prompt_that_never_fits_is_an_error(gpt2, data, tmp_path, monkeypatch):
    def no_memory(lm, prompts):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(flow_analysis, "flow", no_memory)
    with pytest.raises(AnchorsError, match="does not fit into memory"):
        measured(gpt2, data, tmp_path)


def test_other_errors_are_not_taken_for_a_lack_of_memory(gpt2, data, tmp_path, monkeypatch):
    def broken(lm, prompts):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(flow_analysis, "flow", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        measured(gpt2, data, tmp_path)


@pytest.mark.parametrize("change", ["shots", "policy", "template"])
def test_what_changes_the_numbers_changes_the_key(gpt2, data, tmp_path, change):
    from dataclasses import replace

    measured(gpt2, data, tmp_path, examples=1)
    other = {
        "policy": replace(TASK, policy="all"),
        "template": replace(TASK, template="Film: {text}\nSentiment:{label}"),
    }.get(change, TASK)
    sample = Sample(examples=1, shots=2 if change == "shots" else 1)
    measure(gpt2, InformationFlow(), other, data, sample, out=tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_units_that_two_processes_both_wrote_count_once(tmp_path):
    run = Run.open(tmp_path, "flow", {"a": 1})
    rows = pd.DataFrame({"seed": 1, "number": [0, 0, 1, 1], "metric": list("xyxy"), "value": range(4)})
    run.append(rows, [(1, 0), (1, 1)])
    run.append(rows[rows["number"] == 1], [(1, 1)])
    again = Run.open(tmp_path, "flow", {"a": 1})
    assert again.done() == {(1, 0), (1, 1)}
    assert len(again.rows()) == 4


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("old")

    def broken(draft):
        draft.write_text("half")
        raise ValueError("disk on fire")

    with pytest.raises(ValueError, match="disk on fire"):
        write_atomic(path, broken)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_carries_its_provenance(tmp_path):
    rows = pd.DataFrame({"layer": [0, 1], "value": [0.5, np.nan]})
    write_table(tmp_path / "t.parquet", rows, provenance(model="tiny"))
    found, facts = read_table(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(found, rows)
    assert facts["model"] == "tiny"
    assert facts["versions"]["torch"] == installed("torch")
    assert (tmp_path / "t.json").is_file()


def test_keys_do_not_depend_on_the_order_of_facts():
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 1, "b": [3]})


def rows_of(values: np.ndarray) -> pd.DataFrame:
    """values: sums, examples, layers."""
    return pd.DataFrame(
        [
            {
                "task": "t",
                "shots": 1,
                "control": "none",
                "seed": 1,
                "number": n,
                "layer": layer,
                "metric": name,
                "value": values[i, n, layer],
            }
            for i, name in enumerate(SUMS)
            for n in range(values.shape[1])
            for layer in range(values.shape[2])
        ]
    )


def test_summary_means_and_shares_by_hand():
    values = np.array([[[1.0, 0.0], [3.0, 0.0]], [[1.0, 4.0], [1.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]])
    table = flow_summary(rows_of(values)).set_index(["metric", "layer"])
    assert table.loc[("s_wp", 0), "mean"] == 2
    assert table.loc[("s_wp", 0), "share"] == 0.5
    assert table.loc[("s_pq", 1), "share"] == 0.75
    assert (table["low"] <= table["mean"]).all()
    assert (table["mean"] <= table["high"]).all()


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(60):
        values = rng.exponential(1.0, size=(3, 60, 1))
        table = flow_summary(rows_of(values), resamples=200).set_index("metric")
        hits.append(table.loc["s_wp", "low"] <= 1 <= table.loc["s_wp", "high"])
    assert 0.8 < np.mean(hits) <= 1


def test_one_example_has_no_interval():
    table = flow_summary(rows_of(np.ones((3, 1, 2))))
    assert table[["low", "high", "share_low", "share_high"]].isna().all(axis=None)
    assert (table["share"] == 1 / 3).all()


def test_shares_of_nothing_are_even():
    assert (shares(np.zeros((3, 2))) == 1 / 3).all()
