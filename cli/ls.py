"""`anchors ls`: the experiments, and which of them have results."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from anchors.cli import common
from anchors.cli.common import out


def ls(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List the experiments of `anchors run`: what each shows, its grid, whether rows of it are there."""
    with common.reporting():
        from anchors.experiments import CATALOGUE

        found: list[dict[str, Any]] = [
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
        if as_json:
            common.print_json(found)
            return
        table = Table(
            box=SIMPLE_HEAD, caption=f"✓ rows in {escape(str(folder))}; run one with `anchors run NAME`"
        )
        for name in ("", "experiment", "what it shows", "seeds × examples"):
            table.add_column(name)
        for line in found:
            mark = "[green]✓[/]" if line["rows"] else ""
            table.add_row(
                mark, line["name"], escape(line["title"]), f"{len(line['seeds'])} × {line['examples']}"
            )
        out.print(table)
