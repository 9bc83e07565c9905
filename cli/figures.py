"""`anchors figures`: draw experiments again from their rows; no model and no torch."""

from pathlib import Path

from anchors.cli import common
from anchors.cli.common import err
from anchors.cli.run import Folder, Names, experiments
from anchors.errors import AnchorsError


def figures(names: Names, to: Folder = Path("results")) -> None:
    """Draw figures and tables of experiments from the rows that `anchors run` left."""
    with common.reporting():
        from anchors.figures import draw
        from anchors.results import read_table
        from anchors.shelf import Shelf, contained
        from anchors.summaries import marked

        drawn_any = False
        for experiment in experiments(names):
            folder = to / experiment.name
            missing = [k for k in experiment.kinds() if not (folder / f"{k}.parquet").is_file()]
            if missing and "all" in names:
                continue
            if missing:
                raise AnchorsError(
                    f"{str(folder)!r} holds no rows of {', '.join(missing)}.",
                    f"Run `anchors run {experiment.name}` first.",
                )
            read = {kind: read_table(folder / f"{kind}.parquet") for kind in experiment.kinds()}
            (first, facts), *others = ((kind, facts) for kind, (_, facts) in read.items())
            for kind, other in others:
                if not (contained(facts, other) and contained(other, facts)):
                    raise AnchorsError(
                        f"{str(folder)!r} holds rows of {first} and of {kind} that were not measured together.",
                        f"Run `anchors run {experiment.name}` again.",
                    )
            rows = {kind: rows for kind, (rows, _) in read.items()}
            tables = marked(experiment.tables(rows), rows, facts.get("arithmetic_error"))
            shelf = Shelf(folder, experiment.name)
            for name, table in tables.items():
                shelf.table(f"{experiment.name}_{name}", table)
            drawn = draw(experiment.figure or "none", tables, facts["model"])
            shelf.figure(experiment.name, drawn)
            files, moved = shelf.write(facts)
            common.print_notes(moved)
            common.print_files(files)
            drawn_any = True
            if drawn is None:
                err.print(f"{experiment.name} has no picture; its tables are written.")
        if not drawn_any:
            raise AnchorsError(
                f"{str(to)!r} holds no rows of any experiment.", "Run `anchors run NAME` first."
            )
