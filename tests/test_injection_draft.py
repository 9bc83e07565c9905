"""A merge that is broken off, anywhere and anyhow: nothing half-written, and the same command goes on."""

import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from injection_families import Saved
from injection_merging import models, nothing_at, run, same, weights  # noqa: F401 - a fixture among them
from safetensors.torch import load_file

from anchors.errors import AnchorsError
from anchors.injection.merge import merge
from anchors.injection.recipe import Recipe


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
    assert again.notes == ("It was there already, from the same models and recipe.",)
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
