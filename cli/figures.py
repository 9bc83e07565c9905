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
        from anchors.figures.style import save
        from anchors.results import read_table, write_table

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
            facts = next(iter(read.values()))[1]
            tables = experiment.tables({kind: rows for kind, (rows, _) in read.items()})
            files = []
            for name, table in tables.items():
                files.append(folder / f"{experiment.name}_{name}.parquet")
                write_table(files[-1], table, facts)
            drawn = draw(experiment.figure or "none", tables, facts["model"])
            files += [] if drawn is None else save(drawn, folder / experiment.name)
            common.print_files(files)
            drawn_any = True
            if drawn is None:
                err.print(f"{experiment.name} has no picture; its tables are written.")
        if not drawn_any:
            raise AnchorsError(
                f"{str(to)!r} holds no rows of any experiment.", "Run `anchors run NAME` first."
            )
