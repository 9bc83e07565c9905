"""What was measured under a folder: found by the names of files, read from rows, without a model and without torch."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from anchors.errors import AnchorsError, brief
from anchors.experiments import CATALOGUE
from anchors.study.registry import STUDIES
from anchors.study.report import near, spoken, tabulated
from anchors.study.results import read_facts, read_rows, read_table, values_in
from anchors.study.shelf import contained
from anchors.summaries import Rows, Tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMERIC = ("seed", "number", "layer", "value")
OTHERS = ("group", "head", "place", "mask", "strength", "correct")
"""Columns of numbers that rows of other studies have."""
ROWS = ("model", "task", "condition", "metric", *NUMERIC)
"""Columns that all rows have, of a measurement (see `anchors.study.runner.Measured`) and of what stands beside it."""


@dataclass(frozen=True)
class Results:
    """One experiment or study in one folder.

    Attributes:
        name: of the experiment, or the folder of the study by default.
        title: what it shows, in a line.
        folder: where it lies.
        stem: what its files' names begin with.
        files: of its rows by kind.
        tables: from rows to tables; None where the kind of rows says it.
        figure: kind of picture.
        mend: the command that makes its rows.
        columns: of its rows, where they are not those of prompts.
    """

    name: str
    title: str
    folder: Path
    stem: str
    files: dict[str, Path]
    tables: Callable[[Rows], Tables] | None
    figure: str
    mend: str
    columns: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Of its first rows."""
        return next(iter(self.files))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What is kept with the first of its rows."""
        return read_facts(self.files[self.kind])

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks, or scenarios, of the first of its rows, of which no other column is read; none where they are of neither.

        Raises:
            AnchorsError: they cannot be read.
        """
        return values_in(self.files[self.kind], ("task", "scenario"))

    @cached_property
    def rows(self) -> Rows:
        """Its rows by kind.

        Raises:
            AnchorsError: they cannot be read, or were not measured together.
        """
        read = {kind: self._read(kind, file) for kind, file in self.files.items()}
        (first, facts), *others = ((kind, facts) for kind, (_, facts) in read.items())
        for kind, other in others:
            if not (contained(facts, other) and contained(other, facts)):
                raise AnchorsError(
                    f"{str(self.folder)!r} holds rows of {first} and of {kind} that were not measured together.",
                    f"Run `{self.mend}` again.",
                    code="mixed",
                )
        return {kind: rows for kind, (rows, _) in read.items()}

    def _read(self, kind: str, file: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
        if self.columns and kind != self.figure:
            return read_table(file)
        columns = self.columns or ROWS
        numeric = [name for name in columns if name in NUMERIC or name in OTHERS]
        return read_rows(file, columns, numeric, {"model": str})

    @cached_property
    def made(self) -> Tables:
        """Its tables."""
        with self.drawable():
            return tabulated(self.rows, self.facts, self.tables)

    def pictures(self) -> "dict[str, Figure | bytes]":
        """By the name of the file that each has beside the rows."""
        from anchors.figures import draw

        with self.drawable():
            drawn = draw(self.figure, self.made, self.facts["model"])
        named = drawn if isinstance(drawn, dict) else {"": drawn}
        return {
            f"{self.stem}_{key}".rstrip("_") + ".png": own for key, own in named.items() if own is not None
        }

    def file_of(self, table: str) -> str:
        """The name of the file in which all of a table stands."""
        return f"{self.stem}_{table}.parquet"

    def drawable(self) -> "_Drawable":
        """While tables and pictures are made of its rows: what is lacking in them becomes an error that names it."""
        return _Drawable(self)

    def sentences(self) -> list[str]:
        """What its tables say, by kind of rows."""
        alone = self.tables is None
        beside = near(self.folder, self.kind, self.facts) if alone else {}
        return spoken(self.rows, self.made | beside, whole=alone)


class _Drawable:
    def __init__(self, results: Results) -> None:
        self.results = results

    def __enter__(self) -> None:
        self.results.rows  # noqa: B018 - read before: its own errors say more

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (LookupError, ValueError)) and not isinstance(error, AnchorsError):
            own = self.results
            held = [set(t["metric"].astype(str)) for t in own.rows.values() if "metric" in t]
            said = f", whose metrics are {brief(', '.join(sorted(set().union(*held))), 200)}" if held else ""
            raise AnchorsError(
                f"{own.name} cannot be drawn from the rows in {str(own.folder)!r}{said}: {brief(error)}.",
                f"Run `{own.mend}` again.",
                code="rows",
            ) from error


def known() -> Mapping[str, Callable[[Path], Results]]:
    """By name of an experiment or of a study's folder: what it would be in a folder. Files of a study's other rows are those
    that are there."""

    def experiment(e: Any) -> Callable[[Path], Results]:
        return lambda folder: Results(
            e.name, e.title, folder, e.name, {kind: folder / f"{kind}.parquet" for kind in e.kinds()},
            e.tables, e.figure or "none", f"anchors run {e.name}",
        )  # fmt: skip

    def study(name: str, line: Any) -> Callable[[Path], Results]:
        def at(folder: Path) -> Results:
            files = {kind: folder / f"{stem}.parquet" for kind, stem in line.stems.items()}
            files = {kind: file for kind, file in files.items() if kind == name or file.is_file()}
            title, stem = line.help.rstrip("."), line.stems[name]
            return Results(
                line.folder, title, folder, stem, files, None, name, f"anchors {line.command}", line.columns
            )

        return at

    found = {e.name: experiment(e) for e in CATALOGUE.values()}
    return found | {line.folder: study(name, line) for name, line in STUDIES.items() if line.verb}


def lying_in(folder: Path) -> list[Results]:
    """The experiments and studies whose rows lie in one folder. Rows of an experiment are known by its other files."""
    there = {path.name for path in folder.iterdir() if path.is_file()}
    found: list[Results] = []
    taken: set[Path] = set()
    for name, at in known().items():
        own = at(folder)
        whole = all(file.name in there for file in own.files.values())
        if name in CATALOGUE:
            whole = whole and any(n.startswith(f"{name}_") or n == f"{name}.png" for n in there)
        if whole and not taken & {own.files[own.kind]}:
            found.append(own)
            taken |= set(own.files.values())
    return found


def gather(
    folders: Iterable[Path], ways: Sequence[Callable[[Path], Iterable[Results]]] = (lying_in,)
) -> list[Results]:
    """All that was measured under some folders, in the order of the folders; runs in progress and hidden folders are passed over.

    Args:
        folders: with all below them.
        ways: how what lies in one folder is found.

    Raises:
        AnchorsError: one is no folder.
    """
    found: list[Results] = []
    for folder in folders:
        if not folder.is_dir():
            raise AnchorsError(
                f"{str(folder)!r} is not a directory.", "Name a folder of results.", code="file-unreadable"
            )
        found += [own for place in _walk(folder) for way in ways for own in way(place)]
    return list({(own.folder.resolve(), own.name, own.stem): own for own in found}.values())


def _walk(folder: Path) -> Iterator[Path]:
    for place, below, _ in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith(".") and name != "runs")
        yield Path(place)


def amount(facts: Mapping[str, Any]) -> str:
    """How much was measured: examples × seeds of every task, where that is known."""
    told = [
        f"{part['examples']} × {len(part['seeds'])}"
        for part in facts.get("parts") or ()
        if isinstance(part, dict) and "examples" in part and isinstance(part.get("seeds"), list)
    ]
    return ", ".join(dict.fromkeys(told))
