"""One result shape: long tidy tables in parquet, with their provenance, written so that nothing is lost.

A run is a folder named by a hash of what its numbers depend on. Each finished batch is one file in it, written
atomically; running the same command again computes only what no file holds yet.
"""

import hashlib
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from anchors.errors import AnchorsError

PACKAGES = ("label-anchors", "torch", "transformers", "tokenizers", "numpy", "pandas", "scipy")
METADATA_KEY = b"label-anchors"


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a draft beside the target, then move it there in one step.

    Raises:
        AnchorsError: the place cannot be written; the target is untouched.
    """
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
        draft = Path(name)
        write(draft)
        draft.chmod(0o644)  # mkstemp makes private files; results are meant to be shared
        draft.replace(path)
    except OSError as error:
        raise AnchorsError(
            f"{str(path)!r} cannot be written: {error.strerror or error}", "Choose another --out."
        ) from error
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Find out before any work whether results can be written here."""
    probe = folder / f".writable-{os.getpid()}"
    write_atomic(probe, lambda draft: draft.write_text("ok"))
    probe.unlink(missing_ok=True)


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
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_table(path: Path, rows: pd.DataFrame, facts: dict[str, Any]) -> None:
    """Write rows as parquet with the facts in the file's metadata, and the facts beside it as JSON."""
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    table = pa.Table.from_pandas(rows, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA_KEY: text.encode()})
    write_atomic(path, lambda draft: pq.write_table(table, draft, compression="zstd"))
    write_atomic(path.with_suffix(".json"), lambda draft: draft.write_text(text + "\n", encoding="utf-8"))


def read_table(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows and facts of a table written by `write_table`."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise AnchorsError(f"The table {str(path)!r} cannot be read: {error}") from error
    facts = (table.schema.metadata or {}).get(METADATA_KEY, b"{}")
    return table.to_pandas(), json.loads(facts)


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
    """

    folder: Path
    config: dict[str, Any]
    identity: tuple[str, ...] = ("seed", "number")

    @classmethod
    def open(cls, out: Path, kind: str, config: dict[str, Any]) -> "Run":
        """Open or make the folder of a configuration under `out/runs`."""
        run = cls.at(out, kind, config)
        text = json.dumps(config, indent=1, sort_keys=True) + "\n"
        if not (run.folder / "config.json").is_file():
            write_atomic(run.folder / "config.json", lambda draft: draft.write_text(text, encoding="utf-8"))
        return run

    @classmethod
    def at(cls, out: Path, kind: str, config: dict[str, Any]) -> "Run":
        """The run of a configuration, whether or not there is anything of it."""
        return cls(out / "runs" / f"{kind}-{key_of(config)}", config)

    def rows(self) -> pd.DataFrame | None:
        """All rows so far, each unit of work once; None when there are none."""
        frames = [pd.read_parquet(path) for path in sorted(self.folder.glob("batch-*.parquet"))]
        if not frames:
            return None
        taken: set[tuple] = set()
        kept = []
        for frame in frames:
            units = pd.MultiIndex.from_frame(frame[list(self.identity)])
            kept.append(frame[~units.isin(taken)] if taken else frame)
            taken |= set(units)
        return pd.concat(kept, ignore_index=True)

    def done(self) -> set[tuple[int, ...]]:
        """The units of work that are already there."""
        units: set[tuple[int, ...]] = set()
        for path in self.folder.glob("batch-*.parquet"):
            frame = pd.read_parquet(path, columns=list(self.identity))
            units |= set(frame.drop_duplicates().itertuples(index=False, name=None))
        return units

    def append(self, rows: pd.DataFrame, units: Iterable[tuple[int, ...]]) -> None:
        """Write the rows of some units of work, all or nothing."""
        name = hashlib.sha256(repr(sorted(units)).encode()).hexdigest()[:16]
        write_atomic(self.folder / f"batch-{name}.parquet", lambda draft: rows.to_parquet(draft, index=False))
