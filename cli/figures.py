"""`anchors figures`: draw experiments and studies again from their rows; no model and no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anchors.cli import common
from anchors.cli.common import err
from anchors.cli.run import Folder
from anchors.errors import AnchorsError, brief, nearest

if TYPE_CHECKING:
    import pandas as pd

    from anchors.summaries import Rows, Tables

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAMES...", help="Experiments, see `anchors ls`, or studies; `all` for every one."
    ),
]


@dataclass(frozen=True)
class Drawing:
    """What is drawn again.

    Attributes:
        name: of the experiment or study, and its folder.
        stem: what its files' names begin with.
        files: of its rows by kind.
        tables: from rows to tables; None where the kind of rows says it.
        figure: kind of picture.
        mend: the command that makes its rows.
        columns: of its rows, where they are not those of prompts.
    """

    name: str
    stem: str
    files: dict[str, Path]
    tables: "Callable[[Rows], Tables] | None"
    figure: str
    mend: str
    columns: tuple[str, ...] = ()

    def read(self, kind: str, file: Path) -> "tuple[pd.DataFrame, dict[str, Any]]":
        """Rows and their facts; see `anchors.study.results.read_rows`."""
        from anchors.study.results import read_rows, read_table

        if self.columns and kind != self.figure:
            return read_table(file)
        columns = self.columns or ROWS
        numeric = [name for name in columns if name in NUMERIC or name in OTHERS]
        return read_rows(file, columns, numeric, {"model": str})


NUMERIC = ("seed", "number", "layer", "value")
OTHERS = ("group", "head", "place", "mask", "strength", "correct")
"""Columns of numbers that rows of other studies have."""
ROWS = ("model", "task", "condition", "metric", *NUMERIC)
"""Columns that all rows have, of a measurement (see `anchors.study.runner.Measured`) and of what stands beside it."""


def figures(names: Names, to: Folder = Path("results")) -> None:
    """Draw figures and tables of experiments and studies from the rows that `anchors run` and their verbs left."""
    with common.reporting():
        from anchors.study.report import leave, tabulated
        from anchors.study.shelf import contained

        drawn_any = False
        for drawing in drawings(names, to):
            folder = to / drawing.name
            missing = [kind for kind, file in drawing.files.items() if not file.is_file()]
            if missing and "all" in names:
                continue
            if missing:
                raise AnchorsError(
                    f"{str(folder)!r} holds no rows of {', '.join(missing)}.",
                    f"Run `{drawing.mend}` first.",
                    code="rows",
                )
            read = {kind: drawing.read(kind, file) for kind, file in drawing.files.items()}
            (first, facts), *others = ((kind, facts) for kind, (_, facts) in read.items())
            for kind, other in others:
                if not (contained(facts, other) and contained(other, facts)):
                    raise AnchorsError(
                        f"{str(folder)!r} holds rows of {first} and of {kind} that were not measured together.",
                        f"Run `{drawing.mend}` again.",
                        code="mixed",
                    )
            rows = {kind: rows for kind, (rows, _) in read.items()}
            try:
                tables = tabulated(rows, facts, drawing.tables)
                result = leave(folder, drawing.stem, facts, tables, drawing.figure)
            except AnchorsError:
                raise
            except (LookupError, ValueError) as error:
                held = [set(t["metric"].astype(str)) for t in rows.values() if "metric" in t]
                raise AnchorsError(
                    f"{drawing.name} cannot be drawn from the rows in {str(folder)!r}, whose metrics are "
                    f"{brief(', '.join(sorted(set().union(*held))), 200)}: {brief(error)}.",
                    f"Run `{drawing.mend}` again.",
                    code="rows",
                ) from error
            common.print_notes(result.notes[len(facts.get("notes", ())) :])
            common.print_files(result.files)
            drawn_any = True
            if not any(file.suffix == ".png" for file in result.files):
                err.print(f"{drawing.name} has no picture; its tables are written.")
        if not drawn_any:
            raise AnchorsError(
                f"{str(to)!r} holds no rows of any experiment.", "Run `anchors run NAME` first.", code="rows"
            )


def drawings(names: list[str], to: Path) -> list[Drawing]:
    """What these names stand for: experiments, and studies by their verbs."""
    from anchors.experiments import CATALOGUE
    from anchors.study.registry import STUDIES

    found = {
        e.name: Drawing(
            e.name,
            e.name,
            {kind: to / e.name / f"{kind}.parquet" for kind in e.kinds()},
            e.tables,
            e.figure or "none",
            f"anchors run {e.name}",
        )
        for e in CATALOGUE.values()
    }
    for name, line in STUDIES.items():
        if line.verb:
            files = {kind: to / line.folder / f"{stem}.parquet" for kind, stem in line.stems.items()}
            files = {kind: file for kind, file in files.items() if kind == name or file.is_file()}
            found[line.folder] = Drawing(
                line.folder, line.stems[name], files, None, name, f"anchors {line.command}", line.columns
            )
    if "all" in names:
        return list(found.values())
    if unknown := [name for name in names if name not in found]:
        raise AnchorsError(
            f"No experiment and no study is called {unknown}.",
            nearest(unknown[0], [*found, "all"]),
            code="unknown-name",
        )
    return [found[name] for name in dict.fromkeys(names)]
