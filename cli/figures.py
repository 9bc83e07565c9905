"""`anchors figures`: draw experiments and studies again from their rows; no model and no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anchors.cli import common
from anchors.cli.common import err
from anchors.cli.run import Folder
from anchors.errors import AnchorsError, brief, nearest

if TYPE_CHECKING:
    from anchors.summaries import Rows, Tables

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAMES...", help="Experiments, see `anchors ls`, or studies; `all` for every one."
    ),
]

COLUMNS = ("task", "shots", "control", "seed", "number", "condition", "layer", "metric", "value")
"""Of all rows that experiments and studies leave."""


@dataclass(frozen=True)
class Drawing:
    """What is drawn again.

    Attributes:
        name: of the experiment or study, its folder and its files.
        files: of its rows by kind.
        tables: from rows to tables.
        figure: kind of picture.
        mend: the command that makes its rows.
    """

    name: str
    files: dict[str, Path]
    tables: "Callable[[Rows], Tables]"
    figure: str
    mend: str


def figures(names: Names, to: Folder = Path("results")) -> None:
    """Draw figures and tables of experiments and studies from the rows that `anchors run` and their verbs left."""
    with common.reporting():
        from anchors.figures import draw
        from anchors.results import read_rows
        from anchors.shelf import Shelf, contained
        from anchors.summaries import marked

        drawn_any = False
        for drawing in drawings(names, to):
            folder = to / drawing.name
            missing = [kind for kind, file in drawing.files.items() if not file.is_file()]
            if missing and "all" in names:
                continue
            if missing:
                raise AnchorsError(
                    f"{str(folder)!r} holds no rows of {', '.join(missing)}.", f"Run `{drawing.mend}` first."
                )
            read = {
                kind: read_rows(file, COLUMNS, {"model": (), "parts": ()}, ("value", "layer"))
                for kind, file in drawing.files.items()
            }
            (first, facts), *others = ((kind, facts) for kind, (_, facts) in read.items())
            for kind, other in others:
                if not (contained(facts, other) and contained(other, facts)):
                    raise AnchorsError(
                        f"{str(folder)!r} holds rows of {first} and of {kind} that were not measured together.",
                        f"Run `{drawing.mend}` again.",
                    )
            rows = {kind: rows for kind, (rows, _) in read.items()}
            try:
                tables = marked(drawing.tables(rows), rows, facts.get("arithmetic_error"))
            except AnchorsError:
                raise
            except (KeyError, ValueError) as error:
                raise AnchorsError(
                    f"The rows in {str(folder)!r} lack what {drawing.name} shows: {brief(error)}.",
                    f"Run `{drawing.mend}` again.",
                ) from error
            shelf = Shelf(folder, drawing.name)
            for name, table in tables.items():
                shelf.table(f"{drawing.name}_{name}", table)
            drawn = draw(drawing.figure, tables, facts["model"])
            shelf.figure(drawing.name, drawn)
            files, moved = shelf.write(facts)
            common.print_notes(moved)
            common.print_files(files)
            drawn_any = True
            if drawn is None:
                err.print(f"{drawing.name} has no picture; its tables are written.")
        if not drawn_any:
            raise AnchorsError(
                f"{str(to)!r} holds no rows of any experiment.", "Run `anchors run NAME` first."
            )


def drawings(names: list[str], to: Path) -> list[Drawing]:
    """What these names stand for: experiments, and studies by their verbs."""
    from anchors.experiments import CATALOGUE
    from anchors.study.registry import STUDIES
    from anchors.summaries import tables_of

    found = {
        e.name: Drawing(
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
            files = {name: to / name / f"{name}.parquet"}
            if line.beside is not None:
                beside = to / name / f"{name}_{line.beside[0]}_rows.parquet"
                files |= {line.beside[0]: beside} if beside.is_file() else {}
            found[name] = Drawing(name, files, tables_of, name, f"anchors {name}")
    if "all" in names:
        return list(found.values())
    if unknown := [name for name in names if name not in found]:
        raise AnchorsError(
            f"No experiment and no study is called {unknown}.", nearest(unknown[0], [*found, "all"])
        )
    return [found[name] for name in dict.fromkeys(names)]
