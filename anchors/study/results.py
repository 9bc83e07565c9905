"""One result shape: long tidy tables in parquet, with their provenance, written so that nothing is lost.

A run is a folder named by a hash of what its numbers depend on. Each finished batch is one file in it, written
atomically and named by what it holds; running the same command again computes only what no whole file holds yet.
"""

import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from xxhash import xxh3_64_hexdigest

from anchors.errors import AnchorsError, brief, errno_of, full, parsed
from anchors.places import require_file

PACKAGES = ("label-anchors", "torch", "transformers", "tokenizers", "numpy", "pandas", "scipy")
METADATA_KEY = b"label-anchors"
ELSEWHERE = "elsewhere"


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a draft beside the target, then move it there in one step; it is on the disk before its name is.

    Raises:
        AnchorsError: the place cannot be written, or something that is no file is there; it is untouched.
    """
    require_file(path)
    draft = handle = None
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(
                dir=path.parent, prefix=f".{path.stem}-", suffix=f".draft{path.suffix}"
            )
            draft = Path(name)
            _lock(handle)
            write(draft)
            draft.chmod(0o644)  # mkstemp makes private files; results are meant to be shared
            _sync(draft)
            draft.replace(path)
            _sync(path.parent)
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


@contextmanager
def writing(path: Path, called: str = "", elsewhere: str = "choose another --out") -> Generator[None]:
    """While a file or folder is written: what the system refuses becomes an error with its mend.

    The writers of safetensors and tokenizers raise exceptions of their own for it, the latter a bare `Exception`.

    Args:
        path: what is written.
        called: what it is to the user, before its name.
        elsewhere: how to write to another place.

    Raises:
        AnchorsError: it cannot be written.
    """
    try:
        yield
    except AnchorsError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, SafetensorError)) and errno_of(error) is None:
            raise
        reason = brief(getattr(error, "strerror", None) or error)
        raise AnchorsError(
            f"{called} {str(path)!r} cannot be written: {reason}.".lstrip(),
            f"Make room there, or {elsewhere}; what is finished is kept."
            if full(error)
            else f"{elsewhere[0].upper()}{elsewhere[1:]}.",
            code="file-unwritable",
        ) from error


def _sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_DRAFT = re.compile(r"\..+-[a-z0-9_]{8}\.draft(\.\w+)?")
_STALE = 60.0
"""Seconds: a younger draft is left alone, whoever made it."""
_ABANDONED = 86400.0
"""Seconds after which a draft is nobody's where locks tell nothing."""


def clear_drafts(folder: Path) -> None:
    """Take away what killed processes left of files they were writing in a folder; a draft that is being written stays."""
    for path in folder.glob(".*.draft*"):
        if not _DRAFT.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            continue
        try:
            age = time.time() - path.stat().st_mtime
            if age > _STALE:
                handle = os.open(path, os.O_RDWR)
                try:
                    free = _lock(handle)
                finally:
                    os.close(handle)
                if free or (free is None and age > _ABANDONED):
                    path.unlink()
        except OSError:
            continue  # somebody else's, or gone meanwhile


def _lock(handle: int) -> bool | None:
    """Hold an open file until it is closed or the process ends: False where another holds it, None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, some network file systems
        return None
    return True


def require_writable(folder: Path) -> None:
    """Find out before any work whether results can be written here.

    Raises:
        AnchorsError: they cannot.
    """
    above = next((each for each in (folder, *folder.parents) if os.path.exists(each)), folder)
    if os.path.exists(above) and not above.is_dir():
        raise AnchorsError(
            f"{str(folder)!r} cannot be written: {str(above)!r} is no folder.",
            "Choose another --out.",
            code="file-unwritable",
        )
    with writing(folder, "The folder"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"ok")
            _sync(folder)
    clear_drafts(folder)


def key_of(config: dict[str, Any]) -> str:
    """Twelve hex digits that name a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def provenance(**facts: Any) -> dict[str, Any]:
    """Who made a table, with what: the given facts, package versions, platform, command line, time (UTC)."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return facts | {
        "versions": {name: installed(name) for name in PACKAGES} | {"python": platform.python_version()},
        "platform": platform.platform(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_table(path: Path, rows: pd.DataFrame, facts: dict[str, Any]) -> None:
    """Write rows as parquet with the facts in the file's metadata, and the facts beside it as JSON."""
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    table = pa.Table.from_pandas(rows, preserve_index=False)
    write_atomic(path, lambda draft: store(table, draft, text, compression="zstd"))
    write_atomic(path.with_suffix(".json"), lambda draft: draft.write_text(text + "\n", encoding="utf-8"))


def store(table: pa.Table, place: Any, facts: str, **how: Any) -> None:
    """A table as parquet with facts in the file's metadata; in that of the schema they would be stored twice, once in base 64.

    Args:
        place: a path, or what can be written to.
        how: for `pyarrow.parquet.ParquetWriter`; without `store_schema` what pandas asks for stays.
    """
    told = {METADATA_KEY: facts.encode()}
    if not how.get("store_schema", True):
        told |= table.schema.metadata or {}
    with pq.ParquetWriter(place, table.schema, **how) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(told)


def facts_text(path: Path) -> bytes | None:
    """The facts of a table as they stand in its file.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    return (pq.read_metadata(path).metadata or {}).get(METADATA_KEY)


@contextmanager
def _reading(path: Path) -> Generator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise AnchorsError(
            f"The table {str(path)!r} cannot be read: {error}", code="file-unreadable"
        ) from error


def read_table(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows and facts of a table written by `write_table`, and the rows that its fact `elsewhere` says are kept in another one.

    Raises:
        AnchorsError: it, or the other one, cannot be read.
    """
    with _reading(path):
        table, text = pq.read_table(path), facts_text(path)
    try:
        facts = parsed(text or b"{}")
        if not isinstance(facts, dict):
            raise ValueError("they are no JSON object")
    except ValueError as error:
        raise AnchorsError(
            f"The facts in {str(path)!r} cannot be read: {brief(error)}", code="file-unreadable"
        ) from error
    elsewhere, own = facts.pop(ELSEWHERE, None), table.to_pandas()
    if not elsewhere:
        return own, facts
    return pd.concat([own, *_kept_elsewhere(path, elsewhere)], ignore_index=True), facts


def _kept_elsewhere(path: Path, others: Any) -> Iterator[pd.DataFrame]:
    """Rows of other tables: `file`, from the folder of this one on, and `only`, by column the values that they have."""
    within = path.parents[min(2, len(path.parents) - 1)].resolve()
    try:
        asked = [(path.parent / str(other["file"]), dict(other["only"])) for other in others]
    except (KeyError, TypeError, ValueError) as error:
        raise AnchorsError(
            f"{str(path)!r} does not say where the rest of its rows is.", code="rows"
        ) from error
    for place, only in asked:
        if not place.resolve().is_relative_to(within):
            raise AnchorsError(f"Rows of {str(path)!r} are said to lie outside its results.", code="rows")
        with _reading(place):
            rows, nested = (
                pq.read_table(place).to_pandas(),
                f'"{ELSEWHERE}":'.encode() in (facts_text(place) or b""),
            )
        if nested or not only or not {*only} <= {*rows}:
            raise AnchorsError(
                f"{str(place)!r} does not hold the rest of the rows of {str(path)!r}.", code="rows"
            )
        yield rows[np.logical_and.reduce([rows[name].isin(values) for name, values in only.items()])]


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a table alone.

    Raises:
        AnchorsError: it cannot be read, or holds none.
    """
    try:
        facts = parsed(facts_text(path) or b"")
    except (OSError, pa.ArrowInvalid, ValueError) as error:
        raise AnchorsError(
            f"The facts in {str(path)!r} cannot be read: {brief(error)}", code="file-unreadable"
        ) from error
    if not isinstance(facts, dict) or not isinstance(facts.get("model"), str):
        raise AnchorsError(f"The facts in {str(path)!r} name no model.", code="rows")
    facts.pop(ELSEWHERE, None)
    return facts


def values_in(path: Path, columns: Sequence[str]) -> list[str]:
    """What stands in the first of these columns that a table has, each once, in order; no other column is read.

    Raises:
        AnchorsError: it cannot be read.
    """
    there = next((name for name in columns if name in columns_of(path)), None)
    if there is None:
        return []
    with _reading(path):
        found = pq.read_table(path, columns=[there])[there].unique().to_pylist()
    return [str(value) for value in found if value is not None]


def columns_of(path: Path) -> list[str]:
    """The names of a table's columns.

    Raises:
        AnchorsError: it cannot be read.
    """
    with _reading(path):
        return pq.read_schema(path).names


def read_rows(
    path: Path, columns: Sequence[str], numeric: Sequence[str], facts: Mapping[str, type]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows that a figure is to be drawn from, and their facts; what cannot be drawn is refused.

    Args:
        path: a table written by `write_table`.
        columns: that it must have.
        numeric: those of them that hold numbers; the last one not only missing ones.
        facts: that it must have, and their types.

    Raises:
        AnchorsError: the file cannot be read; it lacks a fact or a column, or has no row, or a gap; text for
            numbers; all missing.
    """
    rows, known = read_table(path)
    again = "Was it written by this toolkit, and not changed since? Measure again."
    if lacking := [name for name, kind in facts.items() if not isinstance(known.get(name), kind)]:
        raise AnchorsError(
            f"{str(path)!r} does not say how it was measured: it lacks {', '.join(lacking)} in its metadata.",
            again,
            code="rows",
        )
    if lacking := [name for name in columns if name not in rows]:
        raise AnchorsError(f"The rows in {str(path)!r} have no column {lacking[0]!r}.", again, code="rows")
    if rows.empty:
        raise AnchorsError(f"{str(path)!r} has no rows.", again, code="rows")
    if gaps := [name for name in columns if name not in numeric and rows[name].isna().any()]:
        raise AnchorsError(f"The column {gaps[0]!r} of {str(path)!r} has gaps.", again, code="rows")
    for name in numeric:
        numbers = pd.to_numeric(rows[name], errors="coerce")
        if (strange := numbers.isna() & rows[name].notna()).any():
            raise AnchorsError(
                f"The column {name!r} of {str(path)!r} holds {rows.loc[strange, name].iloc[0]!r}, which is no number.",
                again,
                code="rows",
            )
    if numbers.isna().all():
        raise AnchorsError(
            f"All numbers in the column {name!r} of {str(path)!r} are missing.", again, code="rows"
        )
    return rows, known


def plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as plain data; missing values are null."""
    rows = table.astype(object).to_dict(orient="records")
    return [
        {
            k: None if v is pd.NA or (isinstance(v, float) and not math.isfinite(v)) else v
            for k, v in row.items()
        }
        for row in rows
    ]


@dataclass(frozen=True)
class Run:
    """The rows of one configuration on disk.

    Attributes:
        folder: where the batches lie.
        config: what the numbers depend on; nothing else does.
        identity: the columns that name one unit of work; all of its rows are written at once.
        notes: what was found when the folder was opened.
    """

    folder: Path
    config: dict[str, Any]
    identity: tuple[str, ...] = ("seed", "number")
    notes: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        out: Path,
        kind: str,
        config: dict[str, Any],
        identity: tuple[str, ...] = ("seed", "number"),
        *,
        model: str | None = None,
    ) -> "Run":
        """Open or make the folder of a configuration under `out/runs`; what was cut there is set aside.

        Args:
            out: results folder.
            kind: of the analysis.
            config: what the numbers depend on.
            identity: the columns that name one unit of work.
            model: what the model is called: rows of another model under this name are told of.
        """
        run = cls.at(out, kind, config, identity)
        path = run.folder / "config.json"
        written = config | {_MADE: {"model": model, "label-anchors": version("label-anchors")}}
        if (told := _config_in(run.folder)) is None or _key(told) != _key(written):
            text = json.dumps(written, indent=1, sort_keys=True) + "\n"
            write_atomic(path, lambda draft: draft.write_text(text, encoding="utf-8"))
        notes = run.mended()
        if model is not None and not run._batches():
            notes += run._others(kind, model)
        return replace(run, notes=tuple(notes))

    @classmethod
    def at(
        cls, out: Path, kind: str, config: dict[str, Any], identity: tuple[str, ...] = ("seed", "number")
    ) -> "Run":
        """The run of a configuration, whether or not there is anything of it; nothing is written or moved."""
        return cls(out / "runs" / f"{kind}-{key_of(config)}", config, identity)

    def mended(self) -> list[str]:
        """Set aside what was cut, take away drafts, and tell."""
        clear_drafts(self.folder)
        damaged = [path for path in self._batches() if self._batch(path) is None]
        return [f"{set_aside(path)} was cut or changed; its prompts are measured anew." for path in damaged]

    def rows(self) -> pd.DataFrame | None:
        """All rows so far, each unit of work once; None when there are none."""
        taken: set[tuple] = set()
        kept = []
        for frame in self._frames():
            units = pd.MultiIndex.from_frame(frame[list(self.identity)])
            kept.append(frame[~units.isin(taken)] if taken else frame)
            taken |= set(units)
        return pd.concat(kept, ignore_index=True) if kept else None

    def done(self) -> set[tuple]:
        """The units of work that are already there."""
        units: set[tuple] = set()
        for frame in self._frames():
            units |= set(frame[list(self.identity)].drop_duplicates().itertuples(index=False, name=None))
        return units

    def append(self, rows: pd.DataFrame, units: Iterable[tuple]) -> None:
        """Write the rows of some units of work, all or nothing."""
        buffer = io.BytesIO()
        rows.to_parquet(buffer, index=False)
        content = buffer.getvalue()
        name = hashlib.sha256(repr(sorted(units)).encode()).hexdigest()[:16]
        path = self.folder / f"batch-{name}-{xxh3_64_hexdigest(content)}.parquet"
        write_atomic(path, lambda draft: draft.write_bytes(content))

    def _batches(self) -> list[Path]:
        return sorted(self.folder.glob("batch-*.parquet"))

    def _frames(self) -> Iterator[pd.DataFrame]:
        for path in self._batches():
            if (frame := self._batch(path)) is not None:
                yield frame

    def _batch(self, path: Path) -> pd.DataFrame | None:
        """The rows of a batch; None where the file is not the one that was written.

        Raises:
            AnchorsError: it may not be read.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise AnchorsError(
                f"{str(path)!r} cannot be read: {error.strerror or error}.",
                "Choose another --out.",
                code="file-unreadable",
            ) from error
        if not path.stem.endswith(f"-{xxh3_64_hexdigest(content)}"):
            return None
        return pd.read_parquet(io.BytesIO(content))

    def _others(self, kind: str, model: str) -> list[str]:
        """Notes on runs that measured the same of a model of this name, and what of it was different."""
        notes = []
        for folder in sorted(self.folder.parent.glob(f"{kind}-*")):
            told = _config_in(folder)
            if folder == self.folder or told is None or not next(folder.glob("batch-*.parquet"), None):
                continue
            made = told.get(_MADE) or {}
            same = [_key({k: v for k, v in c.items() if k not in _IDENTITY}) for c in (told, self.config)]
            if same[0] == same[1] and made.get("model", model) == model:
                notes.append(
                    f"The rows in {str(folder)!r} were made under another identity ({_difference(told, self.config)}): they are "
                    "kept as they are, none of them is used, and everything is measured anew."
                )
        return notes


_MADE = "made_by"
_IDENTITY = (_MADE, "model", "software", "version", "vlm", "base", "expert", "upper")


def _key(config: dict[str, Any]) -> str:
    return key_of({k: v for k, v in config.items() if k != _MADE})


def _config_in(folder: Path) -> dict[str, Any] | None:
    """What a run says of itself; None where it says nothing, or its file was cut."""
    try:
        found = parsed((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """In words, what of two identities is different."""
    found = []
    for name in _IDENTITY[1:]:
        one, other = before.get(name), after.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            parts = [part for part in {**one, **other} if one.get(part) != other.get(part)]
            if name == "software":
                parts = [f"{part} {one.get(part)}, now {other.get(part)}" for part in parts]
            found.append(", ".join(parts) if name in ("model", "software") else f"{name}: {', '.join(parts)}")
        elif isinstance(other, dict) or one is None:
            found.append("an earlier version of label-anchors, which knew less of it")
        else:
            found.append(f"{name} {one}, now {other}")
    return "; ".join(dict.fromkeys(found))


def set_aside(path: Path) -> str:
    """Move a damaged file out of the way and keep it; returns its new name.

    Raises:
        AnchorsError: the folder cannot be written.
    """
    count = 1
    while (target := path.with_name(f"{path.name}.damaged-{count}")).exists():
        count += 1
    with writing(path):
        path.rename(target)
    return str(target)
