"""`anchors report`: all that was measured under a folder, as one page and one text."""

from pathlib import Path
from typing import Annotated

import typer

from anchors.cli import common

Folder = Annotated[Path, typer.Argument(metavar="[DIR]", help="A folder of results, with all below it.")]


def report(
    folder: Folder = Path("results"),
    to: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of report.html and report.md; default: DIR.")
    ] = None,
) -> None:
    """Write all that was measured under a folder into one HTML page and one Markdown text.

    Models, tasks, what the tables say in sentences, figures, tables, provenance and the commands to repeat it: from rows and tables
    alone, without a model.
    """
    with common.reporting():
        from anchors.booklet import write_booklet
        from anchors.leavings import everything

        files, left = write_booklet(folder, everything([folder]), to or folder)
        common.print_notes(left)
        common.print_files(files)
