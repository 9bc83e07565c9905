"""GGUF files as directories of safetensors: converted once, kept in the user's cache, checked by checksum."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from safetensors.torch import save_file

from anchors.errors import AnchorsError, parsed
from anchors.gguf.architectures import configuration
from anchors.gguf.reading import read
from anchors.gguf.tokens import tokenizer
from anchors.gguf.weights import parameters
from anchors.pace import Interrupted, Pace
from anchors.study.results import writing

log = logging.getLogger(__name__)

# Raised whenever the conversion of some file gives another model, so that no older one is taken for it.
CONVERSION = 2
_ELSEWHERE = "set ANCHORS_CACHE to a directory that can be written, with room for the model in float32"


def cache_directory() -> Path:
    """Where converted models are kept: $ANCHORS_CACHE, else the user's cache directory."""
    chosen = os.environ.get("ANCHORS_CACHE")
    return Path(chosen) if chosen else user_cache_path("label-anchors")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def converted(path: Path) -> Path:
    """A GGUF file as a directory of safetensors in float32, with its tokenizer, made once and kept with its checksum.

    Every key and tensor that changes what the model computes is applied or refused by its name.

    Raises:
        AnchorsError: the file cannot be read; something in it is not understood; the cache cannot be written.
        Interrupted: the process was asked to end; nothing is left of the conversion.
    """
    # What cannot be read is said before its bytes are hashed.
    file = read(path)
    target = cache_directory() / "gguf" / f"{_sha256(path)[:32]}-{CONVERSION}"
    if intact(target):
        return target
    config, words = configuration(file), tokenizer(file)
    with _draft(target, 4 * file.elements) as draft:
        if intact(target):  # made by another process, while this one waited
            return target
        log.info("converting %s to safetensors (once)", path.name)
        pace = Pace(f"converting {path.name}: numbers")
        name, weights = parameters(file, config, lambda done, total: _say(pace.heard(done, total)))
        config.architectures, config.dtype = [name], "float32"
        with writing(target.parent, "The cache", _ELSEWHERE):
            config.save_pretrained(draft)
            words.save_pretrained(draft)
            save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
            checksum = {"file": path.name, "model.safetensors": _sha256(draft / "model.safetensors")}
            (draft / "checksum.json").write_text(json.dumps(checksum))
            if target.exists():
                shutil.rmtree(target)
            draft.rename(target)
    return target


def _say(line: str) -> None:
    if line:
        log.info(line)


@contextlib.contextmanager
def _draft(target: Path, size: int) -> Generator[Path]:
    """A directory beside `target` to write in, that no other process writes in and that is gone afterwards.

    Whatever makes writing impossible is noticed here, before anything is computed.
    """
    folder = target.parent
    draft, lock = folder / f".draft-{target.name}", FileLock(folder / f".lock-{target.name}")
    with writing(folder, "The cache", _ELSEWHERE):
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process is converting the same file; waiting for it")
            lock.acquire()
    try:
        with writing(folder, "The cache", _ELSEWHERE):
            shutil.rmtree(draft, ignore_errors=True)  # of a killed process: nobody held the lock
            draft.mkdir()
            free = shutil.disk_usage(folder).free
        if size > free and not intact(target):
            raise AnchorsError(
                f"The cache {str(folder)!r} has {free / 1e9:.2f} GB left, and the converted model takes "
                f"{size / 1e9:.2f} GB.",
                "Make room, or set ANCHORS_CACHE to a directory with more.",
                code="disk-full",
            )
        yield draft
    except KeyboardInterrupt as error:
        kept = (
            ""
            if not draft.exists()
            else "of the conversion nothing is kept; the same command begins it anew."
        )
        raise Interrupted.of(error, kept) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        lock.release()


def _clean(folder: Path) -> None:
    """Remove what killed conversions left: drafts whose lock nobody holds."""
    for draft in folder.glob(".draft-*"):
        lock = FileLock(folder / f".lock-{draft.name.removeprefix('.draft-')}")
        with contextlib.suppress(Timeout), lock.acquire(timeout=0):
            shutil.rmtree(draft, ignore_errors=True)


def intact(target: Path) -> bool:
    """Whether a converted model is whole: its weights match the checksum written with them."""
    try:
        wanted = parsed((target / "checksum.json").read_text())["model.safetensors"]
        return _sha256(target / "model.safetensors") == wanted
    except (OSError, ValueError, KeyError, TypeError):
        return False
