"""The files of one report, written together: which results may take the place of which.

Every table carries its facts, and these say of which model, task and settings it is (the report's parts), how much of it there
is (seeds, examples), and which files were written with it. Results take the place of others only if these are contained in
them: the same command again, more prompts, more seeds, more tasks. All others are moved, whole, into a folder of their own
under `set-aside`, and that is said; nothing is replaced without a word.
"""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from anchors.errors import AnchorsError, parsed
from anchors.study.results import key_of, write_atomic, write_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ASIDE = "set-aside"
AMOUNTS = ("seeds", "examples", "grid")
"""Of a part: how much was measured. Everything else says what."""
PASSING = (
    "versions", "platform", "command", "written", "notes", "files", "device", "revision", "arithmetic_error",
)  # fmt: skip
"""Facts that say nothing of what was measured."""
_OURS = (".parquet", ".json", ".csv", ".png", ".pdf", ".html")


@dataclass
class Shelf:
    """Files that are gathered, and then written where nothing else is lost by it.

    Attributes:
        out: the folder.
        name: what their names begin with.
    """

    out: Path
    name: str
    _writers: dict[str, Callable[[Path, dict[str, Any]], object]] = field(default_factory=dict)

    def table(self, name: str, rows: pd.DataFrame, *, csv: bool = False) -> None:
        """A table as parquet with its facts beside it, and as CSV, too, where that is wanted."""
        self._writers[f"{name}.parquet"] = lambda path, facts: write_table(path, rows, facts)
        if csv:
            self._writers[f"{name}.csv"] = lambda path, _: write_atomic(
                path, lambda draft: rows.to_csv(draft, index=False)
            )

    def figure(self, name: str, drawn: "Figure | None") -> None:
        """A figure as PNG and PDF; None is no figure."""
        if drawn is not None:
            from anchors.figures.style import write_figure

            for suffix in (".png", ".pdf"):
                self._writers[name + suffix] = lambda path, facts: write_figure(drawn, path, described(facts))

    def page(self, name: str, html: str) -> None:
        """A page."""
        self._writers[f"{name}.html"] = lambda path, _: write_atomic(
            path, lambda draft: draft.write_text(html, encoding="utf-8")
        )

    def write(self, facts: dict[str, Any]) -> tuple[list[Path], list[str]]:
        """Set aside what must not be replaced, and write.

        Args:
            facts: of the report, with its parts.

        Returns:
            The files (without the facts beside them), and what was set aside, in words.

        Raises:
            AnchorsError: the folder for what is set aside cannot be made or is a link.
        """
        names = list(self._writers)
        names += [Path(name).with_suffix(".json").name for name in names if name.endswith(".parquet")]
        kept, notes = make_room(self.out, self.name, names, facts)
        facts = facts | {"files": sorted({*names, *kept})}
        for name, write in self._writers.items():
            write(self.out / name, facts)
        return [self.out / name for name in self._writers], notes


def described(facts: dict[str, Any]) -> str:
    """Of what a figure is, in a line that is kept in its file."""
    said = (facts.get("model"), facts.get("fingerprint"), f"report {key_of(parts_of(facts))}")
    return ", ".join(str(x) for x in said if x)


def parts_of(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured, and of each how much: by a key of the one, the other."""
    found = {}
    for part in facts.get("parts") or [{k: v for k, v in facts.items() if k not in PASSING}]:
        what = {k: v for k, v in part.items() if k not in (*AMOUNTS, "data_source", "read")}
        found[key_of(json.loads(json.dumps(what, default=str)))] = {k: part[k] for k in AMOUNTS if k in part}
    return found


def contained(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether all that one report is of stands in another, too: no less of it, and of nothing else."""
    mine, theirs = parts_of(new), parts_of(old)

    def fits(amount: Any, most: Any) -> bool:
        if isinstance(amount, list) and isinstance(most, list):
            return set(map(str, amount)) <= set(map(str, most))
        return amount <= most if isinstance(amount, int) and isinstance(most, int) else amount == most

    return all(
        key in mine and all(fits(amount, mine[key].get(name)) for name, amount in own.items())
        for key, own in theirs.items()
    )


def make_room(out: Path, name: str, names: list[str], facts: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Move away whatever files of these names would replace without being the same results, or more of them.

    Args:
        out: the folder.
        name: what the names begin with.
        names: of the files that will be written.
        facts: of the report that they are of.

    Returns:
        Other files of earlier results that stay valid beside the new ones; and what was set aside, in words.
    """
    there = {p.name for p in out.iterdir() if p.is_file() or p.is_symlink()} if out.is_dir() else set()
    kept: list[str] = []
    notes: list[str] = []
    taken: set[str] = set()
    for old, files in _reports(out, name, there):
        own = [file for file in files if file in there and file not in taken]
        taken |= set(own)
        if not set(own) & set(names):
            continue
        if not contained(old, facts):
            notes.append(_move(out, own, old))
        elif contained(facts, old):
            kept += own
        elif stale := [file for file in own if file not in names]:
            notes.append(_move(out, stale, old))
    if unknown := sorted((there - taken) & set(names)):
        notes.append(_move(out, unknown, {}))
    return kept, notes


def _reports(out: Path, name: str, there: set[str]) -> list[tuple[dict[str, Any], list[str]]]:
    """The reports in a folder: the facts of each, and its files.

    Tables from before they named the files written with them are of one report where their parts are the same. Pictures,
    pages and CSV files say nothing of themselves: those that begin with `name` are taken to belong to such a table of this
    name.
    """
    found: dict[str, tuple[dict[str, Any], set[str]]] = {}
    nameless: list[str] = []
    for file in sorted(there):
        if file.endswith(".json") and (facts := facts_beside(out / file)):
            files = facts.get("files")
            whole = isinstance(files, list) and all(isinstance(f, str) for f in files)
            key = key_of({"parts": parts_of(facts), "whole": whole})
            own = files if whole else [file, f"{Path(file).stem}.parquet", f"{Path(file).stem}.csv"]
            found.setdefault(key, (facts, set()))[1].update(own)
            nameless += [key] if not whole and _begins(file, name) else []
    if nameless:
        known = {file for _, files in found.values() for file in files}
        found[nameless[0]][1].update(f for f in there - known if _begins(f, name) and Path(f).suffix in _OURS)
    return [(facts, sorted(files & there)) for facts, files in found.values()]


def require_unread(out: Path, names: Iterable[str], sources: Iterable[str]) -> None:
    """Refuse results among whose files one that is read lies: it would be moved away with earlier results.

    Args:
        out: the folder.
        names: what names of files begin with.
        sources: what is read; what is no file is no matter.

    Raises:
        AnchorsError: names the file.
    """
    for source in sources:
        path = Path(source).expanduser()
        ours = path.suffix in _OURS and any(_begins(path.name, name) for name in names)
        if ours and path.is_file() and path.resolve().parent == out.expanduser().resolve():
            raise AnchorsError(
                f"{source!r}, which is read, lies among the results and has the name of one of them.",
                "Choose another --out, or give the file another name.",
                code="would-overwrite",
            )


def _begins(file: str, name: str) -> bool:
    return re.fullmatch(rf"{re.escape(name)}([_-].*)?", Path(file).stem) is not None


def facts_beside(path: Path) -> dict[str, Any] | None:
    """What stands beside a table; None for any other file."""
    try:
        found = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"versions", "command", "written"} <= set(found) else None


def _move(out: Path, files: list[str], facts: dict[str, Any]) -> str:
    """Into a folder named after the model and what was measured; into one of their own where nobody knows."""
    model = re.sub(r"[^\w.-]+", "-", Path(str(facts.get("model", ""))).name).strip("-.")[:60]
    folder = out / ASIDE / "-".join(x for x in (model, key_of(parts_of(facts)) if facts else "unknown") if x)
    if not facts:
        folder = next(
            f for i in itertools.count(1) if not os.path.lexists(f := folder.with_name(f"unknown-{i}"))
        )
    for place in (folder.parent, folder):
        if place.is_symlink():
            raise AnchorsError(
                f"{str(place)!r} is a link.", "Remove it, or choose another --out.", code="outside"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            (out / file).replace(folder / file)
    except OSError as error:
        raise AnchorsError(
            f"Earlier results cannot be set aside in {str(folder)!r}: {error.strerror or error}.",
            "Choose another --out.",
            code="file-unwritable",
        ) from error
    whose = (
        f"of {facts['model']} that are no part of these results"
        if facts.get("model")
        else "of unknown origin"
    )
    return f"{len(files)} earlier file{'s' * (len(files) != 1)} {whose} set aside in {folder}."
