"""Writing a model shard by shard, so that a merge broken off anywhere goes on, and nothing half-written is seen.

.OUT.draft/journal.json                  what is being written, and the facts of every finished shard
.OUT.draft/model-00001-of-00003.safetensors …   finished shards
.OUT.draft/shard.part                    the one being written

The draft lies beside OUT, on the same file system. It becomes OUT, in one step, when everything is there and checked.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from anchors.errors import AnchorsError, parsed
from anchors.injection.merging.checkpoint import INDEX, Checkpoint, Entry, as_bytes, opened
from anchors.study.results import write_atomic

FACTS = "injection.json"
"""The file in OUT that says what it was made from."""
_JOURNAL, _PART, _LOCK = "journal.json", "shard.part", "lock"
_OURS = re.compile(r"lock|shard\.part|\.?journal.*\.json|model.*\.safetensors")
_SHOWN = 3
_LARGE = 1 << 27
"""Bytes of a tensor beside which no other one is made while it is written: two of a 70B model's are a gigabyte."""

Facts = list[dict[str, Any]]
"""One JSON-able row for each tensor of a shard."""
Made = Callable[[str], tuple[Tensor, dict[str, Any]]]
"""From a name to its tensor and the facts about it."""


@dataclass(frozen=True)
class Layout:
    """Which tensors go into which shard.

    Attributes:
        shards: by file name, in order: the tensors in it, by name, in the order in which they are written.
        total: bytes of all tensors.
    """

    shards: Mapping[str, Mapping[str, Entry]]
    total: int

    @classmethod
    def of(cls, entries: Mapping[str, Entry], shard_size: str) -> "Layout":
        """Shards of at most a size (a larger tensor is one alone), named as transformers names them.

        Raises:
            AnchorsError: the size is none.
        """
        try:
            split = split_state_dict_into_shards_factory(
                dict(entries),
                get_storage_size=lambda entry: entry.nbytes,
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=shard_size,
            )
            if float(shard_size.strip()[:-2]) <= 0:
                raise ValueError("no room for anything")
        except (ValueError, OverflowError) as error:
            raise AnchorsError(
                f"{shard_size!r} is not a size of shards.", "Give one like 500MB or 5GB.", code="option-value"
            ) from error
        # Wide types first keeps every tensor aligned to its own size.
        shards = {
            file: {name: entries[name] for name in sorted(names, key=lambda name: -entries[name].itemsize)}
            for file, names in split.filename_to_tensors.items()
        }
        return cls(shards, int(split.metadata["total_size"]))


@dataclass
class Draft:
    """The hidden folder in which a model grows.

    Attributes:
        out: what it becomes.
        identity: JSON-able: what the numbers depend on.
        finished: facts of the shards that are there, by file name.
        notes: what was found when the draft was opened.
        fresh: whether it holds nothing of an earlier call.
    """

    out: Path
    identity: dict[str, Any]
    finished: dict[str, Facts] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fresh: bool = False

    @property
    def folder(self) -> Path:
        return self.out.parent / f".{self.out.name}.draft"

    @classmethod
    @contextmanager
    def open(cls, out: Path, identity: dict[str, Any], total: int) -> Generator["Draft"]:
        """The draft of a model; one of another configuration is thrown away, and a note says so.

        Only one process at a time may have it.

        Args:
            out: folder of the model to be.
            identity: what its numbers depend on.
            total: bytes that all shards together will have.

        Raises:
            AnchorsError: there is a model already; another process is at it; too little space; nothing can be
                written. Shards that were finished stay for the next time.
        """
        if out.is_symlink():
            raise AnchorsError(f"{str(out)!r} is a link.", "Give the folder itself as --out.", code="outside")
        draft = cls(out.resolve(), json.loads(json.dumps(identity)))
        try:
            if _taken(out):
                raise AnchorsError(
                    f"{str(out)!r} is there already; it would be overwritten.",
                    "Choose another --out, or delete it.",
                    code="would-overwrite",
                )
            draft._require_own()
            draft.folder.mkdir(parents=True, exist_ok=True)
            with _locked(draft.folder / _LOCK, out):
                try:
                    draft._resume()
                    draft._demand_space(total)
                    yield draft
                except BaseException:
                    (draft.folder / _PART).unlink(missing_ok=True)
                    if draft.fresh and not draft.finished:
                        draft.discard()
                    raise
        except OSError as error:
            kept = (
                f" {len(draft.finished)} finished shards are kept in {draft.folder.name}."
                if draft.finished
                else ""
            )
            raise AnchorsError(
                f"{str(out)!r} cannot be written: {error.strerror or error}.{kept}",
                "Make room, then run the same command again; or choose another --out.",
                code="file-unwritable",
            ) from error

    def write(self, file: str, entries: Mapping[str, Entry], made: Made) -> None:
        """Write one shard, a tensor at a time, unless it is there."""
        if file in self.finished:
            return
        facts: Facts = []

        def tensor(name: str) -> Tensor:
            value, fact = made(name)
            facts.append(fact)
            return value

        part = self.folder / _PART
        write_shard(part, entries, tensor)
        part.replace(self.folder / file)
        self.finished[file] = facts
        self._write_journal()

    def publish(self, layout: Layout, facts: dict[str, Any], companions: Sequence[Path]) -> None:
        """Add the index and the files that go with the weights, check everything, and make the draft OUT.

        Raises:
            AnchorsError: what was written is not what should be there; something else is in OUT by now.
        """
        if len(layout.shards) > 1:
            where = {name: file for file, names in layout.shards.items() for name in names}
            _write_json(self.folder / INDEX, {"metadata": {"total_size": layout.total}, "weight_map": where})
        for path in companions:
            # Companions were found to lie in the model's folder: no link is followed out of it.
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, self.folder / path.name)
        _write_json(self.folder / FACTS, facts)
        wanted = {name: entry for names in layout.shards.values() for name, entry in names.items()}
        if wrong := _wrong(self.folder, wanted):
            raise AnchorsError(
                f"{len(wrong)} tensors in {str(self.folder)!r} are not what they should be: {wrong[:_SHOWN]}.",
                "Delete the folder and run the same command again; if it comes back, the disk is at fault.",
                code="model-not-whole",
            )
        try:
            self.folder.replace(self.out)
        except OSError as error:
            if not _taken(self.out):
                raise
            raise AnchorsError(
                f"Something was put into {str(self.out)!r} meanwhile; it would be overwritten.",
                f"Move that away, then run the same command again: what was made is kept in {self.folder.name}.",
                code="busy",
            ) from error
        # Not before: a draft without its journal would be made anew.
        _tidy(self.out)

    def discard(self) -> None:
        """Throw the draft away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _require_own(self) -> None:
        """Refuse a folder of the draft's name that no merge has made: it would be emptied."""
        there = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        foreign = not all(map(_OURS.fullmatch, there)) and _journal(self.folder) is None
        if self.folder.is_symlink() or self.folder.is_file() or foreign:
            what = "a link" if self.folder.is_symlink() else "no draft of a merge"
            raise AnchorsError(
                f"{str(self.folder)!r} is {what}; what it holds would be lost.",
                "Move or delete it, or choose another --out.",
                code="would-overwrite",
            )

    def _resume(self) -> None:
        """Take up the shards of a journal of this configuration; begin anew where there is none."""
        journal = _journal(self.folder)
        before, shards = (None, {}) if journal is None else (journal["identity"], dict(journal["shards"]))
        if before is not None and before != self.identity:
            self.notes += (
                f"A draft of another configuration was thrown away ({difference(before, self.identity)}).",
            )
            shards = {}
        self.fresh = not shards
        self.finished = {file: facts for file, facts in shards.items() if _whole(self.folder / file)}
        if self.finished:
            self.notes += (f"Went on after {len(self.finished)} finished shards.",)
        for path in self.folder.iterdir():
            if path.name not in {*self.finished, _LOCK}:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._write_journal()

    def _write_journal(self) -> None:
        _write_json(self.folder / _JOURNAL, {"identity": self.identity, "shards": self.finished})

    def _demand_space(self, total: int) -> None:
        there = sum((self.folder / file).stat().st_size for file in self.finished)
        free = shutil.disk_usage(self.folder).free
        if free < total - there:
            raise AnchorsError(
                f"The model needs {(total - there) / 1e9:.2f} GB more in {str(self.out.parent)!r}, "
                f"where {free / 1e9:.2f} GB are free.",
                "Make room, or choose another --out.",
                code="disk-full",
            )


def write_shard(path: Path, entries: Mapping[str, Entry], tensor: Callable[[str], Tensor]) -> None:
    """Write a safetensors file a tensor at a time.

    The format puts sizes first and numbers after; all sizes are known beforehand, so no shard is ever held in memory,
    as it would be by safetensors' own function. https://github.com/huggingface/safetensors#format

    Args:
        path: the file.
        entries: types and shapes, by name, in the order in which they are written.
        tensor: from a name to the tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, entry in entries.items():
        span = [at, at := at + entry.nbytes]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(1) as pool:
        written = pool.submit(file.write, len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            raw = as_bytes(tensor(name))  # while the one before is being written
            if len(raw) != entry.nbytes:
                raise RuntimeError(f"{name} has {len(raw)} bytes, not {entry.nbytes}")
            written.result()
            written = pool.submit(file.write, raw.data)
            if len(raw) > _LARGE:
                written.result()
            del raw
        written.result()
        # Sizes alone tell whether a shard is whole, so its numbers must be on the disk before its name is.
        file.flush()
        os.fsync(file.fileno())


def finished(out: Path, identity: dict[str, Any], entries: Mapping[str, Entry]) -> dict[str, Any] | None:
    """The facts of a model that was written here with the same identity; None where there is no model of ours.

    Raises:
        AnchorsError: it was written with another one, or does not hold all tensors (of `entries`) any more.
    """
    try:
        facts = parsed((out / FACTS).read_text(encoding="utf-8"))
        before = facts["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if before != json.loads(json.dumps(identity)):
        raise AnchorsError(
            f"{str(out)!r} holds a merge of another configuration ({difference(before, identity)}).",
            "Choose another --out, or delete it.",
            code="other-run",
        )
    try:
        wrong, reason = _wrong(out, entries), None
    except AnchorsError as error:
        wrong, reason = [error.message], error
    if wrong:
        raise AnchorsError(
            f"{str(out)!r} was made by this command, but is no longer whole: {', '.join(wrong[:_SHOWN])}.",
            "Delete it and run the same command again.",
            code="model-not-whole",
        ) from reason
    _tidy(out)
    return facts


def difference(before: Any, after: Any) -> str:
    """What two JSON-able configurations differ in: the first thing, and how many more."""
    one, other = (dict(_flat(json.loads(json.dumps(own)))) for own in (before, after))
    names = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    if not names:
        return "none"
    more = f"; {len(names) - 1} more differ" if len(names) > 1 else ""
    return f"{names[0]} = {one.get(names[0])}, not {other.get(names[0])}{more}"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, own in value.items():
            yield from _flat(own, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _journal(folder: Path) -> dict[str, Any] | None:
    """The journal of a draft; None where there is none, or something else."""
    try:
        journal = parsed((folder / _JOURNAL).read_text(encoding="utf-8"))
        fits = isinstance(journal["identity"], dict) and all(
            Path(file).name == file and isinstance(facts, list) for file, facts in journal["shards"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return journal if fits else None


def _whole(file: Path) -> bool:
    """Whether a shard is there as it was written: not so after a power failure."""
    if file.is_symlink():
        return False
    try:
        opened(file)
    except AnchorsError:
        return False
    return True


def _taken(out: Path) -> bool:
    """Whether there is something that must not be overwritten."""
    return out.is_file() or (out.is_dir() and any(out.iterdir()))


def _tidy(out: Path) -> None:
    """Take away what only a draft needs."""
    for name in (_JOURNAL, _LOCK):
        (out / name).unlink(missing_ok=True)


def _wrong(folder: Path, wanted: Mapping[str, Entry]) -> list[str]:
    """Names of tensors that a model lacks, has too many, or has in another type or shape."""
    written = Checkpoint.open(folder).entries
    return [n for n in sorted({*written, *wanted}) if _kind(written.get(n)) != _kind(wanted.get(n))]


def _kind(entry: Entry | None) -> tuple | None:
    return None if entry is None else (entry.dtype, entry.shape)


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, lambda draft: draft.write_text(text, encoding="utf-8"))


@contextmanager
def _locked(path: Path, out: Path) -> Generator[None]:
    """Hold a lock that ends with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AnchorsError(
                f"Another process is writing {str(out)!r}.",
                "Wait for it, or choose another --out.",
                code="busy",
            ) from error
        yield
    finally:
        os.close(handle)
