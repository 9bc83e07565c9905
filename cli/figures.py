"""`anchors figures`: draw experiments and studies again from their rows; no model and no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anchors.cli import common
from anchors.cli.common import err
from anchors.cli.run import Folder
from anchors.errors import AnchorsError, nearest

if TYPE_CHECKING:
    from anchors.collection import Results

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAMES...",
        help="Experiments, see `anchors ls`, or studies; `all` for every one, `scale` for those of `anchors run scale`; these only where there are rows.",
    ),
]


def figures(names: Names, to: Folder = Path("results")) -> None:
    """Draw figures and tables of experiments and studies from the rows that `anchors run` and their verbs left."""
    with common.reporting():
        from anchors.experiments import SUITES
        from anchors.study.report import leave

        drawn_any = False
        for own in drawings(names, to):
            missing = [kind for kind, file in own.files.items() if not file.is_file()]
            if missing and {"all", *SUITES} & {*names}:
                continue
            if missing:
                raise AnchorsError(
                    f"{str(own.folder)!r} holds no rows of {', '.join(missing)}.",
                    f"Run `{own.mend}` first.",
                    code="rows",
                )
            tables, facts = own.made, own.facts
            with own.drawable():
                result = leave(own.folder, own.stem, facts, tables, own.figure)
            common.print_notes(result.notes[len(facts.get("notes", ())) :])
            common.print_files(result.files)
            drawn_any = True
            if not any(file.suffix == ".png" for file in result.files):
                err.print(f"{own.name} has no picture; its tables are written.")
        if not drawn_any:
            raise AnchorsError(
                f"{str(to)!r} holds no rows of any experiment.", "Run `anchors run NAME` first.", code="rows"
            )


def drawings(names: list[str], to: Path) -> "list[Results]":
    """What these names stand for: experiments, and studies by their verbs, with the other models and runs beside them."""
    from anchors.collection import known
    from anchors.experiments import SUITES

    found = known()
    names = [own for name in names for own in SUITES.get(name, (name,))]
    if unknown := [name for name in names if name != "all" and name not in found]:
        raise AnchorsError(
            f"No experiment and no study is called {unknown}.",
            nearest(unknown[0], [*found, "all"]),
            code="unknown-name",
        )
    wanted = list(found) if "all" in names else list(dict.fromkeys(names))
    every = []
    for name in wanted:
        every.append(found[name](to / name))
        beside = [found[name](path) for path in sorted((to / name).glob("*/"))]
        every += [own for own in beside if all(file.is_file() for file in own.files.values())]
    return every
