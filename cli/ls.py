"""`anchors ls`: the experiments, and which of them have results."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from anchors.cli import common
from anchors.cli.common import out
from anchors.cli.tables import Grid


def ls(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List the experiments of `anchors run`: what each shows, its grid, whether rows of it are there."""
    with common.reporting():
        found = lines(folder)
        if as_json:
            common.print_json(found)
            return
        out.print(table(found, folder))


def lines(folder: Path) -> list[dict[str, Any]]:
    """Of every experiment what it is, and whether its rows are in the folder."""
    from anchors.experiments import CATALOGUE

    return [
        {
            "name": e.name,
            "title": e.title,
            "finding": e.finding,
            "analyses": list(e.kinds()),
            "tasks": sorted({task for cells in e.cells for task in cells.tasks}),
            "seeds": list(e.seeds),
            "examples": max(min(e.examples, cells.examples or e.examples) for cells in e.cells),
            "rows": all((folder / e.name / f"{kind}.parquet").is_file() for kind in e.kinds()),
        }
        for e in CATALOGUE.values()
    ]


def table(found: list[dict[str, Any]], folder: Path) -> Grid:
    """The same for the console."""
    made = Grid(caption=f"✓ rows in {folder}; run one with `anchors run NAME`", keys=2)
    for name in ("", "experiment", "what it shows", "seeds × examples"):
        made.add_column(name, overflow="fold" if name == "what it shows" else "ellipsis")
    for line in found:
        mark = "[green]✓[/]" if line["rows"] else ""
        made.add_row(mark, line["name"], escape(line["title"]), f"{len(line['seeds'])} × {line['examples']}")
    return made
