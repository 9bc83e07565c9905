"""Nothing computed is lost, nothing is counted twice, nothing is half-written."""

import os
import shlex
import stat
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from anchors.analyses.flow import InformationFlow
from anchors.errors import AnchorsError
from anchors.flow import saliency as flow_analysis
from anchors.stats import SUMS, flow_summary, shares
from anchors.study.results import Run, clear_drafts, key_of, provenance, read_table, write_atomic, write_table
from anchors.study.runner import Sample, measure, outstanding
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


def test_out_of_memory_first_gives_back_what_recorded_steps_hold(gpt2, data, tmp_path, monkeypatch):
    """A batch that fits without them is not halved; one that does not is, and no batch is tried a third time."""
    from anchors.model.replay import replays_of

    whole, kind = measured(gpt2, data, tmp_path / "whole", batch_size=6), replays_of(gpt2.model)
    original, sizes, most = flow_analysis.flow, [], 6

    def beside_records(lm, prompts):
        sizes.append(len(prompts))
        if kind.recorded or len(prompts) > most:
            raise torch.OutOfMemoryError("out of memory")
        return original(lm, prompts)

    monkeypatch.setattr(flow_analysis, "flow", beside_records)
    kind._records["a step"] = None
    rows = measured(gpt2, data, tmp_path / "fits", batch_size=6)
    assert sizes == [6, 6]
    pd.testing.assert_frame_equal(rows, whole)
    kind._records["a step"], most = None, 3
    sizes.clear()
    measured(gpt2, data, tmp_path / "halved", batch_size=6)
    assert sizes == [6, 6, 3, 3]


def test_what_is_prepared_is_tried_again_without_records(gpt2):
    from anchors.model.replay import replays_of
    from anchors.study.engine import _within_memory

    kind, tries = replays_of(gpt2.model), []

    def prepare() -> str:
        tries.append(kind.recorded)
        if kind.recorded or len(tries) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return "prepared"

    def too_large(_: None) -> AnchorsError:
        return AnchorsError("too large", "less", code="memory")

    kind._records["a step"] = None
    assert _within_memory(prepare, too_large) == "prepared"
    assert tries == [1, 0]
    with pytest.raises(AnchorsError, match="too large"):
        _within_memory(prepare, too_large)
    assert tries == [1, 0, 0]


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


def cut(path):
    path.write_bytes(path.read_bytes()[:700])


def emptied(path):
    path.write_bytes(b"")


def flipped(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [cut, emptied, flipped])
def test_a_damaged_batch_is_set_aside_and_measured_anew(gpt2, data, tmp_path, monkeypatch, damage):
    how, calls, original = Sample(examples=4, batch_size=2), [], flow_analysis.flow
    whole = measure(gpt2, InformationFlow(), TASK, data, how, out=tmp_path)
    path = sorted(whole.folder.glob("batch-*.parquet"))[0]
    damage(path)
    left = path.read_bytes()
    monkeypatch.setattr(
        flow_analysis, "flow", lambda lm, prompts: calls.append(len(prompts)) or original(lm, prompts)
    )
    assert outstanding(gpt2, InformationFlow(), TASK, data, how, out=tmp_path)[:2] == (2, 4)
    assert path.read_bytes() == left  # asking what is left moves nothing
    again = measure(gpt2, InformationFlow(), TASK, data, how, out=tmp_path)
    assert calls == [2]
    pd.testing.assert_frame_equal(again.rows, whole.rows)
    kept = path.with_name(f"{path.name}.damaged-1")
    assert kept.read_bytes() == left
    assert again.notes == (f"{kept} was cut or changed; its prompts are measured anew.",)
    assert not measure(gpt2, InformationFlow(), TASK, data, how, out=tmp_path).notes


def test_a_cut_configuration_is_written_again(tmp_path):
    run = Run.open(tmp_path, "flow", {"a": 1})
    text = (run.folder / "config.json").read_text()
    cut(run.folder / "config.json")
    (run.folder / "config.json").write_text(text[:9])
    assert (Run.open(tmp_path, "flow", {"a": 1}).folder / "config.json").read_text() == text


def test_rows_of_another_identity_are_told_of_and_left_alone(tmp_path):
    rows = pd.DataFrame({"seed": [1], "number": [0], "value": [0.5]})
    config = {
        "kind": "flow",
        "model": {"weights": "a", "tokenizer": "t"},
        "software": {"torch": "2.1"},
        "version": 1,
    }
    open_at = partial(Run.open, tmp_path, "flow", model="tiny")
    first = open_at(config)
    first.append(rows, [(1, 0)])
    before = {path: path.read_bytes() for path in first.folder.iterdir()}
    for change, said in (
        ({"model": {"weights": "b", "tokenizer": "t"}}, "(weights)"),
        ({"software": {"torch": "2.2"}}, "(torch 2.1, now 2.2)"),
        ({"version": 2}, "(version 1, now 2)"),
    ):
        run = open_at(config | change)
        assert run.done() == set()
        assert len(run.notes) == 1
        assert said in run.notes[0]
        assert str(first.folder) in run.notes[0]
    assert open_at(config).notes == ()
    assert {path: path.read_bytes() for path in first.folder.iterdir()} == before
    assert open_at(config | {"shots": 2}).notes == ()  # another measurement
    assert Run.open(tmp_path, "flow", config | {"version": 3}, model="other").notes == ()  # of another model
    old = tmp_path / "runs" / "flow-0123456789ab"  # as 0.4.0 left it
    old.mkdir()
    (old / "config.json").write_text('{"kind": "flow", "model": "0123456789abcdef", "version": 1}')
    rows.to_parquet(old / "batch-0123456789abcdef.parquet")
    assert "an earlier version of label-anchors" in " ".join(
        open_at(config | {"model": {"weights": "c"}}).notes
    )


def draft_beside(path, seconds):
    """What a process that was killed leaves of a file, so many seconds after its last write."""
    left = path.with_name(f".{path.stem}-a1b2c3_4.draft{path.suffix}")
    left.write_bytes(b"half")
    os.utime(left, (time.time() - seconds,) * 2)
    return left


def test_what_killed_writers_left_is_cleared(tmp_path):
    run = Run.open(tmp_path, "flow", {"a": 1})
    stale = [draft_beside(run.folder / name, 120) for name in ("batch-1.parquet", "beta-42.safetensors", "x")]
    fresh = draft_beside(run.folder / "config.json", 5)
    held = draft_beside(run.folder / "batch-2.parquet", 10_000)
    others = [
        run.folder / name for name in (".hidden", ".my-notes.draft", "batch.draft.parquet", ".out.draft")
    ]
    for path in others[:-1]:
        path.write_text("mine")
        os.utime(path, (0, 0))
    others[-1].mkdir()
    with held.open("rb") as file:
        pytest.importorskip("fcntl").flock(file, 2)  # as the process that writes it does
        Run.open(tmp_path, "flow", {"a": 1})
        assert [path.exists() for path in stale] == [False] * 3
        assert fresh.exists()
        assert held.exists()
    assert all(path.exists() for path in others)
    Run.open(tmp_path, "flow", {"a": 1})
    assert not held.exists()


def test_a_killed_writer_leaves_what_is_cleared(tmp_path):
    """The real thing: a process that dies while it writes, and one that is still writing."""
    script = """
import sys, time
from pathlib import Path
from anchors.study.results import write_atomic
def write(draft):
    draft.write_text("half")
    print(draft, flush=True)
    time.sleep(60)
write_atomic(Path(sys.argv[1]), write)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "t.parquet")], stdout=subprocess.PIPE, text=True
    )
    try:
        draft = Path(child.stdout.readline().strip())
        os.utime(draft, (0, 0))
        clear_drafts(tmp_path)
        assert draft.exists()
    finally:
        child.kill()
        child.communicate()
    clear_drafts(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """No power failure can be had here: that the calls are made, and in which order, is all that can be seen."""
    seen, sync = [], os.fsync

    def watched(handle):
        seen.append(
            (
                os.fstat(handle).st_size if not stat.S_ISDIR(os.fstat(handle).st_mode) else "folder",
                path.exists(),
            )
        )
        sync(handle)

    path = tmp_path / "t.txt"
    monkeypatch.setattr(os, "fsync", watched)
    write_atomic(path, lambda draft: draft.write_text("12345"))
    assert seen == [(5, False), ("folder", True)]


@pytest.mark.parametrize("writer", ["text", "tensors", "rows"])
def test_a_full_disk_is_a_sentence(tmp_path, writer):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    write = {
        "text": lambda draft: draft.write_text("x" * 200_000),
        "tensors": lambda draft: save_file({"x": torch.zeros(100_000)}, draft),
        "rows": lambda draft: pd.DataFrame({"x": np.random.default_rng(0).random(100_000)}).to_parquet(draft),
    }[writer]
    try:
        with pytest.raises(AnchorsError, match="No space left on device") as caught:
            write_atomic(folder / "t", write)
        assert "Make room there" in caught.value.remedy
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", folder], check=True)


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


def test_the_command_in_provenance_can_be_pasted_into_a_shell(monkeypatch):
    words = ["classify", "--template", r"Text: {text}\nTopic:{label}", "--labels", "it's,a b"]
    monkeypatch.setattr("sys.argv", ["/somewhere/anchors", *words])
    assert shlex.split(provenance()["command"]) == ["anchors", *words]
