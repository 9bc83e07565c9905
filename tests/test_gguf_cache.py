"""Converted GGUF files in the cache: never half a one, never two writers, and whatever hinders is said before computing."""

import shutil
import signal
import threading

import gguf_files as made
import pytest
from filelock import FileLock

from anchors.errors import AnchorsError
from anchors.gguf import cache, converted, intact
from anchors.pace import Interrupted

WORDS = made.sentencepiece_keys(["the cat sat on the mat"] * 3)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("ANCHORS_CACHE", str(tmp_path / "cache"))
    model = made.model(made.CONFIGS["llama"])
    keys = made.stated("llama", model.config) | WORDS
    return made.write(tmp_path / "x.gguf", "llama", keys, made.laid_out("llama", model))


@pytest.fixture
def broken(path):
    """A file whose conversion fails as soon as it is tried: what is said instead was noticed before."""
    model = made.model(made.CONFIGS["llama"])
    tensors = made.laid_out("llama", model) | {"blk.0.ffn_up.weight": None}
    return made.write(path.parent / "b.gguf", "llama", made.stated("llama", model.config) | WORDS, tensors)


def test_it_is_converted_once_and_again_when_damaged(path):
    first = converted(path)
    weights = first / "model.safetensors"
    made_at = weights.stat().st_mtime_ns
    assert converted(path) == first
    assert weights.stat().st_mtime_ns == made_at
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert not intact(first)
    assert converted(path) == first
    assert intact(first)


def test_conversions_of_older_versions_are_not_taken(path, monkeypatch):
    now = converted(path)
    older = now.with_name(now.name.split("-")[0])  # what 0.4.0 called it, without factors of frequencies
    now.rename(older)
    assert intact(older)
    assert converted(path) == now
    monkeypatch.setattr(cache, "CONVERSION", cache.CONVERSION + 1)
    assert converted(path) not in (now, older)


def test_a_renamed_file_is_the_same_and_a_changed_one_another(path):
    first = converted(path)
    assert converted(path.rename(path.with_name("y.gguf"))) == first
    other = made.write(
        path, "llama", made.stated("llama", made.CONFIGS["llama"]) | WORDS | {"rope.freq_base": 123.0},
        made.laid_out("llama", made.model(made.CONFIGS["llama"])),
    )  # fmt: skip
    assert converted(other) != first


@pytest.mark.parametrize("inside", [False, True])
def test_a_cache_that_is_a_file(broken, tmp_path, inside):
    place = tmp_path / "cache"
    if inside:
        place.mkdir()
        place = place / "gguf"
    place.write_text("in the way")
    with pytest.raises(AnchorsError, match=r"The cache .* cannot be written.*\n.*ANCHORS_CACHE"):
        converted(broken)
    assert place.read_text() == "in the way"


def test_a_cache_that_may_not_be_written(broken, tmp_path):
    place = tmp_path / "cache"
    place.mkdir(mode=0o500)
    try:
        (place / "probe").touch()
        pytest.skip("this user may write everywhere")
    except PermissionError:
        pass
    with pytest.raises(AnchorsError, match=r"The cache .* cannot be written: Permission denied"):
        converted(broken)


def test_a_cache_without_room(broken, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: free)
    with pytest.raises(AnchorsError, match=r"has 0\.00 GB left"):
        converted(broken)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_nothing_is_left_of_a_conversion_that_failed(broken, tmp_path):
    with pytest.raises(AnchorsError, match="ffn_up"):
        converted(broken)
    assert not [
        entry for entry in (tmp_path / "cache" / "gguf").iterdir() if not entry.name.startswith(".lock-")
    ]


def test_an_interrupted_conversion_leaves_nothing_and_begins_anew(path, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "gguf"

    def ending(weights, target, **more):
        target.write_bytes(b"half")
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_file", ending)
        with pytest.raises(Interrupted, match="of the conversion nothing is kept") as ended:
            converted(path)
    assert ended.value.number == signal.SIGTERM
    assert not [entry for entry in folder.iterdir() if not entry.name.startswith(".lock-")]
    assert intact(converted(path))


def test_leftovers_of_killed_conversions_go_and_those_of_running_ones_stay(path, tmp_path):
    folder = tmp_path / "cache" / "gguf"
    for name in ("killed", "running"):
        (folder / f".draft-{name}").mkdir(parents=True)
        (folder / f".draft-{name}" / "model.safetensors").write_bytes(b"half")
    with FileLock(folder / ".lock-running"):
        kept = converted(path)
    assert {entry.name for entry in folder.iterdir() if entry.is_dir()} == {".draft-running", kept.name}


def test_two_at_once_convert_once(path, monkeypatch):
    calls, places = [], []
    parameters = cache.parameters
    meet = threading.Barrier(2, timeout=60)

    def slow(*arguments):
        calls.append(threading.get_ident())
        return parameters(*arguments)

    def both():
        meet.wait()
        places.append(converted(path))

    monkeypatch.setattr(cache, "parameters", slow)
    threads = [threading.Thread(target=both) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(places)) == 1
    assert len(places) == 2
    assert len(calls) == 1
