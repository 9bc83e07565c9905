"""Files that are no such files, and places that cannot be written: a sentence, its mend, and nothing half-written."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from anchors.cli import app, common
from anchors.errors import AnchorsError, errno_of, full, of_the_machine, parsed
from anchors.results import write_atomic, write_table, writing

TRAIN = (
    "nsa",
    "train",
    "--steps",
    1,
    "-T",
    64,
    "--layers",
    1,
    "--width",
    32,
    "--held-out",
    4,
    "--device",
    "cpu",
)


def said(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(result.output.split())


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """What a full disk does to a process, by the system's own limit on the size of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


# Writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 50_000])
def test_a_training_without_room_says_so(size: int, tmp_path: Path) -> None:
    with files_no_larger_than(size):
        code, text = said(*TRAIN, "--out", tmp_path / "out")
    assert code == 2, text
    assert "cannot be written" in text
    assert "Make room" in text
    assert not list(tmp_path.rglob("*.draft*"))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_maps_without_room_say_so(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(
        "Review: a\nSentiment: Positive\n\nReview: b\nSentiment: Negative\n\nReview: c\nSentiment:"
    )
    with files_no_larger_than(100):
        code, text = said("view", tmp_path / "p.txt", "-m", model_directory, "-o", tmp_path / "v.html")
    assert code == 2, text
    assert "Make room" in text
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


def test_the_writers_of_libraries_are_understood(tmp_path: Path, tokenizer) -> None:
    tensor = {"a": torch.zeros(100_000)}
    with files_no_larger_than(1000):
        with pytest.raises(AnchorsError, match="cannot be written"):
            write_atomic(tmp_path / "t.safetensors", lambda draft: save_file(tensor, draft))
        with pytest.raises(AnchorsError, match="cannot be written"), writing(tmp_path):
            tokenizer.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "link", "dangling link"])
def test_what_is_no_file_is_not_replaced(kind: str, model_directory: Path, tmp_path: Path) -> None:
    prompt, place, aim = tmp_path / "p.txt", tmp_path / "out.html", tmp_path / "aim"
    prompt.write_text("Review: a\nSentiment: Positive\n\nReview: c\nSentiment:")
    if kind == "pipe":
        os.mkfifo(place)
    else:
        if kind == "link":
            aim.write_text("mine")
        place.symlink_to(aim)
    before = place.lstat()
    with pytest.raises(AnchorsError, match="not a file"):
        write_atomic(place, lambda draft: draft.write_text("x"))
    for option in (("-o", place), ("-o", tmp_path / "v.html", "--maps", place)):
        code, text = said("view", prompt, "-m", model_directory, *option)
        assert code == 2, text
        assert "it would be replaced" in text
    assert (place.lstat().st_ino, stat.S_IFMT(place.lstat().st_mode)) == (
        before.st_ino,
        stat.S_IFMT(before.st_mode),
    )
    assert kind != "link" or aim.read_text() == "mine"


def test_a_cache_that_is_a_file_is_noticed_before_anything_is_converted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from anchors.gguf import cache

    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("ANCHORS_CACHE", str(tmp_path / "cache"))
    with (
        pytest.raises(AnchorsError, match="ANCHORS_CACHE"),
        cache._draft(cache.cache_directory() / "gguf" / "x", 10),
    ):
        pytest.fail("there is no place to convert to")


# Output -------------------------------------------------------------------------------------------


def test_json_is_a_whole_document_whatever_the_numbers_are(capsys: pytest.CaptureFixture[str]) -> None:
    common.print_json({"a": [1.5, float("inf")], "b": {"c": float("nan")}, "d": (1, -float("inf"))})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None], "b": {"c": None}, "d": [1, None]}


def test_a_merge_beyond_any_norm_is_refused() -> None:
    from anchors.injection.merge import _compared

    v = torch.ones(4, 4)
    with pytest.raises(AnchorsError, match="beyond float32"):
        _compared("q", torch.full((4, 4), 3e38), v)
    assert _compared("q", 2 * v, v)["change"] == 4


def test_an_output_that_cannot_hold_the_signs_gets_escapes() -> None:
    # A process of its own: the streams are those of the program, not of a runner.
    done = subprocess.run(
        [sys.executable, "-c", "from anchors.cli import main; main()", "inject", "--help"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\\u03c4" in done.stdout
    assert not any(byte > 127 for byte in done.stdout)


# What libraries raise -----------------------------------------------------------------------------


def test_errors_of_the_machine_are_no_defects() -> None:
    assert errno_of(OSError(28, "No space left on device")) == 28
    assert full(Exception("I/O error: No space left on device (os error 28)"))
    assert not full(Exception("something else"))
    assert "memory" in of_the_machine(MemoryError()).message
    assert (
        "memory"
        in of_the_machine(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")).message
    )
    assert "disk is full" in of_the_machine(OSError(28, "No space left on device")).message
    assert of_the_machine(ValueError("shapes differ")) is None
    assert of_the_machine(FileNotFoundError(2, "No such file")) is None


def test_json_that_is_nested_too_deep_is_no_json() -> None:
    assert parsed('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="nested too deep"):
        parsed("[" * 10**5)


# Tables -------------------------------------------------------------------------------------------


@pytest.fixture
def measured() -> tuple[pd.DataFrame, dict]:
    """Rows as an experiment leaves them."""
    rows = pd.DataFrame({"metric": ["s_wp", "s_pq", "s_ww", "loss"], "value": [0.1, 0.2, 0.3, 0.4]})
    unit = {"task": "sst2", "shots": 1, "control": "none", "seed": 1, "number": 0, "condition": "none"}
    return rows.assign(**unit, layer=pd.array([0, 0, 0, None], "Int32")), {"model": "m", "parts": [{}]}


@pytest.fixture
def logged() -> tuple[pd.DataFrame, dict]:
    """A log as a training leaves it."""
    log = pd.DataFrame(
        {"split": ["train", "held_out"], "metric": "label_loss", "bucket": "all", "value": [0.5, 0.4]}
    )
    return log.assign(step=1), {
        "model": {"attention": "nsa"},
        "recipe": {"seed": 0},
        "data": {"data": "episodes"},
    }


SPOILT = {
    "no facts": (lambda rows: rows, {}, "does not say 'model'"),
    "empty": (lambda rows: rows[:0], None, "is empty"),
    "all NaN": (lambda rows: rows.assign(value=np.nan), None, "all of its values are missing"),
    "infinite": (lambda rows: rows.assign(value=np.inf), None, "infinite"),
    "text for numbers": (lambda rows: rows.assign(value="abc"), None, "text for numbers"),
    "gaps": (lambda rows: rows.assign(metric=None), None, "gaps"),
    "no column": (lambda rows: rows.drop(columns="metric"), None, "no column 'metric'"),
    "no value": (lambda rows: rows.drop(columns="value"), None, "no column 'value'"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_rows_that_are_none_are_not_drawn(name: str, measured: tuple, logged: tuple, tmp_path: Path) -> None:
    spoil, facts, reason = SPOILT[name]
    table = tmp_path / "figure3" / "flow.parquet"
    write_table(table, spoil(measured[0]), measured[1] if facts is None else facts)
    write_table(
        tmp_path / "t" / "training" / "log.parquet", spoil(logged[0]), logged[1] if facts is None else facts
    )
    for command in (
        ("figures", "figure3", "-o", tmp_path),
        ("nsa", "curves", tmp_path / "t", "-o", tmp_path / "c"),
    ):
        code, text = said(*command)
        assert code == 2, text
        assert reason in text
    assert sorted(path.name for path in table.parent.iterdir()) == ["flow.json", "flow.parquet"]


def test_rows_of_something_else_are_not_drawn(measured: tuple, tmp_path: Path) -> None:
    write_table(tmp_path / "figure3" / "flow.parquet", measured[0].assign(metric="other"), measured[1])
    code, text = said("figures", "figure3", "-o", tmp_path)
    assert code == 2, text
    assert "lack what figure3 shows" in text


def test_a_truncated_model_to_begin_with_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    save_file({"a": torch.zeros(10)}, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-20])
    code, text = said(*TRAIN, "--from", folder, "--out", tmp_path / "out")
    assert code == 2, text
    assert "cut off" in text


@pytest.mark.parametrize("text", ['{"a":' * 10**5, "[1]"])
def test_a_training_that_does_not_say_what_it_is(text: str, tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "run.json").write_text(text)
    code, told = said(*TRAIN, "--out", tmp_path)
    assert code == 2, told
    assert "Delete its folder" in told
