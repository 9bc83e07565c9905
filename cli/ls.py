"""`anchors ls`: the experiments, which of them have results, and all that lies there by model and size."""

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
    """List what was measured, by model and size, and the experiments of `anchors run`: what each shows, its grid, whether rows of it are there."""
    with common.reporting():
        from anchors.collection import amount, gather
        from anchors.errors import AnchorsError
        from anchors.experiments import CATALOGUE

        there: list[dict[str, Any]] = []
        for own in gather([folder]) if folder.is_dir() else []:
            try:
                facts = own.facts
            except AnchorsError as error:
                common.print_notes([error.message])
                continue
            said = {"model": facts["model"], "precision": facts.get("precision"), "size": amount(facts)}
            there.append(
                {"name": own.name, **said, "folder": str(own.folder), "written": facts.get("written")}
            )

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
            common.print_json({"experiments": found, "results": there})
            return
        if there:
            out.print(_lying(there, folder))
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


def _lying(there: list[dict[str, Any]], folder: Path) -> Table:
    """What lies under a folder."""
    names = ("measured", "model", "precision", "examples × seeds", "in")
    table = Table(
        box=SIMPLE_HEAD,
        caption="put them side by side with `anchors compare DIR…`, on one page with `anchors report DIR`",
    )
    for name in names:
        table.add_column(name, overflow="fold")
    for own in there:
        place = Path(own["folder"]).relative_to(folder)
        cells = (own["name"], own["model"], own["precision"] or "", own["size"], str(place))
        table.add_row(*map(escape, cells))
    return table
