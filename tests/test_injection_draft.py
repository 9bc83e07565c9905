"""A merge that is broken off, anywhere and anyhow: nothing half-written, and the same command goes on."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from injection_families import Saved
from injection_merging import copies, models, nothing_at, rewrite, run, same, weights  # noqa: F401 - a fixture among them
from safetensors.torch import load_file, save_file

from anchors.errors import AnchorsError
from anchors.injection.merging import draft as drafts
from anchors.injection.merging.checkpoint import SINGLE, Checkpoint
from anchors.injection.merging.draft import write_shard
from anchors.injection.merging.merge import merge
from anchors.injection.merging.recipe import Recipe


def killing(after: int):
    def report(done: int, total: int, name: str) -> None:
        if done == after:
            os.kill(os.getpid(), signal.SIGKILL)

    return report


@pytest.mark.parametrize("after", [1, 30, 73])
def test_a_killed_merge_goes_on(after: int, models: Saved, tmp_path: Path) -> None:
    recipe = Recipe("dare", 0.7, density=0.3)
    child = multiprocessing.get_context("fork").Process(
        target=run,
        args=(models, tmp_path / "out", recipe),
        kwargs={"shard_size": "5KB", "report": killing(after)},
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    draft = tmp_path / ".out.draft"
    there = len(list(draft.glob("*.safetensors")))
    seen = []
    report = run(
        models, tmp_path / "out", recipe, shard_size="5KB", report=lambda done, *_: seen.append(done)
    )
    assert bool(there) == (after > 1)
    assert any(f"after {there} finished" in note for note in report.notes) == bool(there)
    assert len(report.tensors) == seen[-1] == 73
    assert not draft.exists()
    run(models, tmp_path / "whole", recipe, shard_size="5KB")
    for path in (tmp_path / "whole").iterdir():
        if path.name != "injection.json":
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_finished_shards_are_not_made_again(models: Saved, tmp_path: Path) -> None:
    def stop(done: int, total: int, name: str) -> None:
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(models, tmp_path / "out", shard_size="5KB", report=stop)
    draft = tmp_path / ".out.draft"
    *whole, cut = sorted(draft.glob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-10])  # as after a power failure
    times = {path: path.stat().st_mtime_ns for path in whole}
    held = sum(len(load_file(path)) for path in times)
    assert 0 < held < 30
    assert not (draft / "shard.part").exists()
    seen = []
    run(models, tmp_path / "out", shard_size="5KB", report=lambda done, *_: seen.append(done))
    assert seen == list(range(held, 74))
    assert all((tmp_path / "out" / path.name).stat().st_mtime_ns == time for path, time in times.items())


def test_a_draft_of_another_configuration_is_thrown_away(models: Saved, tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(
        target=run, args=(models, tmp_path / "out"), kwargs={"shard_size": "5KB", "report": killing(30)}
    )
    child.start()
    child.join()
    report = run(models, tmp_path / "out", Recipe(strength=0.6), shard_size="5KB")
    assert report.notes == (
        "A draft of another configuration was thrown away (recipe.strength = 0.5, not 0.6).",
    )
    run(models, tmp_path / "whole", Recipe(strength=0.6))
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_out_that_exists(models: Saved, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # empty: fine
    first = run(models, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run(models, out)
    assert again.notes == ("Nothing left to compute: it was there already, from the same models and recipe.",)
    assert (again.changed, again.kept, again.seconds) == (
        first.changed,
        first.kept,
        pytest.approx(first.seconds, abs=1e-3),
    )
    assert again.by_module().equals(first.by_module())
    assert again.by_layer().equals(first.by_layer())
    with pytest.raises(AnchorsError, match=r"recipe.strength = 0.5, not 0.6"):
        run(models, out, Recipe(strength=0.6))
    with pytest.raises(AnchorsError, match=r"models\.expert"):
        merge(models.vlm, models.base, models.base, Recipe(strength=0.5), out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for taken in (other, other / "notes.txt", models.vlm):
        with pytest.raises(AnchorsError, match="overwritten"):
            run(models, taken)
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


def test_two_at_once(models: Saved, tmp_path: Path) -> None:
    def second(done: int, total: int, name: str) -> None:
        if done == 10:
            run(models, tmp_path / "out")

    with pytest.raises(AnchorsError, match="Another process"):
        run(models, tmp_path / "out", report=second)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up(small_disk: Path, models: Saved) -> None:
    def fill(done: int, total: int, name: str) -> None:
        if done == 30:
            with (small_disk / "filler").open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(b"x" * 4096)
                    except OSError:
                        return

    out = small_disk / "out"
    with pytest.raises(AnchorsError, match=r"No space left on device[^$]*finished shards are kept"):
        run(models, out, shard_size="5KB", report=fill)
    assert not out.exists()
    (small_disk / "filler").unlink()
    report = run(models, out, shard_size="5KB")  # the same command goes on
    assert "finished shards" in report.notes[0]
    assert len(weights(out)) == 73


def test_a_disk_that_is_too_small(small_disk: Path, models: Saved) -> None:
    (small_disk / "filler").write_bytes(b"x" * 180_000)
    with pytest.raises(AnchorsError, match="are free"):
        run(models, small_disk / "out")
    assert nothing_at(small_disk / "out")


def test_files_that_may_not_grow(models: Saved, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(AnchorsError, match="File too large"):
            run(models, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert nothing_at(tmp_path / "out")


def stopped(models: Saved, out: Path, at: int = 30) -> Path:
    """The draft of a merge that was broken off."""

    def stop(done: int, total: int, name: str) -> None:
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(models, out, shard_size="5KB", report=stop)
    return out.parent / f".{out.name}.draft"


def test_a_shards_numbers_are_on_the_disk_before_its_name(
    models: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    monkeypatch.setattr(drafts.os, "fsync", lambda handle: sizes.append(os.fstat(handle).st_size))
    model = Checkpoint.open(models.expert)
    write_shard(tmp_path / "shard", model.entries, model.tensor)
    assert sizes == [(tmp_path / "shard").stat().st_size]


def test_one_number_of_a_source_that_changed(copies: Saved, tmp_path: Path) -> None:
    """Where the sample of the fingerprint does not look."""
    name, extra = "vision_tower.extra.weight", torch.zeros(64, 64)
    rewrite(copies.vlm, lambda held: held | {name: extra})
    before = Checkpoint.open(copies.vlm).fingerprint
    run(copies, tmp_path / "out")
    extra.view(-1)[250] = 1
    rewrite(copies.vlm, lambda held: held | {name: extra})
    assert Checkpoint.open(copies.vlm).fingerprint == before
    with pytest.raises(AnchorsError, match=r"written\.vlm\.model\.safetensors"):
        run(copies, tmp_path / "out")


def test_a_model_that_is_no_longer_whole_is_not_reported(models: Saved, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(models, out, shard_size="20KB")
    last = sorted(out.glob("*.safetensors"))[-1]
    held = last.read_bytes()
    for spoil in (last.unlink, lambda: last.write_bytes(held[:-1])):
        spoil()
        with pytest.raises(AnchorsError, match="no longer whole") as error:
            run(models, out, shard_size="20KB")
        assert "Delete it" in error.value.remedy
    last.write_bytes(held)
    assert "already" in run(models, out, shard_size="20KB").notes[0]
    last.unlink()
    run(models, tmp_path / "wide", shard_size="20KB")
    (out / "model.safetensors.index.json").unlink()
    held = {name: tensor.float() for name, tensor in weights(tmp_path / "wide").items()}
    save_file(held, out / SINGLE)
    with pytest.raises(AnchorsError, match="no longer whole"):
        run(models, out, shard_size="20KB")


def test_interrupted_while_resuming(models: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> bool:
        raise KeyboardInterrupt

    draft = stopped(models, tmp_path / "out")
    there = sorted(draft.glob("*.safetensors"))
    with monkeypatch.context() as patched:
        patched.setattr(drafts, "_whole", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(models, tmp_path / "out", shard_size="5KB")
    assert there
    assert sorted(draft.glob("*.safetensors")) == there
    assert run(models, tmp_path / "out", shard_size="5KB").notes == (
        f"Went on after {len(there)} finished shards.",
    )


@pytest.mark.parametrize("shards", [[], ["model.safetensors"], None, "all", 3])
def test_a_journal_of_another_shape(shards: object, models: Saved, tmp_path: Path) -> None:
    draft = stopped(models, tmp_path / "out")
    journal = json.loads((draft / "journal.json").read_text())
    (draft / "journal.json").write_text(json.dumps(journal | {"shards": shards}))
    assert run(models, tmp_path / "out", shard_size="5KB").notes == ()
    assert len(weights(tmp_path / "out")) == 73


def test_something_is_put_into_out_meanwhile(models: Saved, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def put(done: int, total: int, name: str) -> None:
        if done == total:
            out.mkdir()
            (out / "notes.txt").write_text("mine")

    with pytest.raises(AnchorsError, match="was put into") as error:
        run(models, out, shard_size="5KB", report=put)
    assert "kept in .out.draft" in error.value.remedy
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    seen = []
    report = run(models, out, shard_size="5KB", report=lambda done, *_: seen.append(done))
    assert seen == [73]  # nothing is made again
    assert "Went on" in report.notes[0]
    assert not {"journal.json", "lock"} & {path.name for path in out.iterdir()}


def test_killed_between_its_last_two_steps(
    models: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(drafts, "_tidy", lambda out: None)
        run(models, out)
    assert {"journal.json", "lock"} <= {path.name for path in out.iterdir()}
    assert "already" in run(models, out).notes[0]
    assert not {"journal.json", "lock"} & {path.name for path in out.iterdir()}


@pytest.mark.parametrize("size", ["0KB", "0.0GB", "-1GB", "nanGB", "infGB", "GB", "", "5 apples"])
def test_sizes_that_are_none(size: str, models: Saved, tmp_path: Path) -> None:
    with pytest.raises(AnchorsError, match="is not a size of shards"):
        run(models, tmp_path / "out", shard_size=size)
    assert nothing_at(tmp_path / "out")
