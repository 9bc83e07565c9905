"""`anchors ls`: the experiments, which of them have results, and all that lies there by task, model and size."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from anchors.cli import common
from anchors.cli.common import out
from anchors.cli.tables import Grid
from anchors.places import told_apart


def ls(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List what was measured, by task, model and size, and the experiments of `anchors run`: what each shows, its grid, whether rows of it are there."""
    with common.reporting():
        from anchors.collection import amount
        from anchors.errors import AnchorsError
        from anchors.leavings import everything

        there: list[dict[str, Any]] = []
        for own in everything([folder]) if folder.is_dir() else []:
            try:
                facts, tasks = own.facts, own.tasks
            except AnchorsError as error:
                common.print_notes([error.message])
                continue
            said = {"tasks": tasks, "precision": facts.get("precision"), "size": amount(facts)}
            there.append(
                {
                    "name": own.name,
                    "model": facts["model"],
                    **said,
                    "folder": str(own.folder),
                    "written": facts.get("written"),
                }
            )

        found = lines(folder)
        if as_json:
            common.print_json({"experiments": found, "results": there})
            return
        if there:
            out.print(_lying(there, folder))
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


def _lying(there: list[dict[str, Any]], folder: Path) -> Grid:
    """What lies under a folder."""
    made = Grid(
        caption="put them side by side with `anchors compare DIR…`, on one page with `anchors report DIR`",
        keys=1,
    )
    for name in ("measured", "tasks", "model", "precision", "examples × seeds", "in"):
        made.add_column(name, overflow="fold")
    titles = told_apart(own["model"] for own in there)
    for own in there:
        place, tasks = str(Path(own["folder"]).relative_to(folder)), ", ".join(own["tasks"])
        cells = (own["name"], tasks, titles[own["model"]], own["precision"] or "", own["size"], place)
        made.add_row(*map(escape, cells))
    return made
