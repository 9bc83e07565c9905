"""`anchors compare`: models or runs side by side, in one table and one figure."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from anchors.cli import common
from anchors.cli.common import estimate, out
from anchors.errors import AnchorsError

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

Folders = Annotated[
    list[Path],
    typer.Argument(
        metavar="DIR...", help="Folders of results with all below them; two runs of a study or more in all."
    ),
]


def compare(
    folders: Folders,
    to: Annotated[Path, typer.Option("--out", "-o", help="Folder of the table and the figure.")] = Path(
        "results/compare"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the tables as JSON.")] = False,
) -> None:
    """Put models or runs of a study side by side: one table, one figure, paired intervals where the prompts are the same.

    Differences are to the first run. They are paired where both runs have prompts in common (same template, labels, data, shots,
    control and seed); how many these are is said. Runs on other prompts stand side by side without a difference.
    """
    with common.reporting():
        from anchors.collection import Results, gather
        from anchors.comparison import KINDS, compared
        from anchors.figures.compare import draw
        from anchors.study.results import plain, provenance
        from anchors.study.shelf import Shelf

        by_kind: dict[str, list[Results]] = {}
        for own in gather(folders):
            by_kind.setdefault(own.kind, []).append(own)
        several = {kind: found for kind, found in by_kind.items() if len(found) > 1 and kind in KINDS}
        if not several:
            there = ", ".join(f"{len(found)} of {kind}" for kind, found in by_kind.items()) or "nothing"
            raise AnchorsError(
                f"There is nothing to put side by side: {there} in {', '.join(map(str, folders))}.",
                f"Name folders with at least two runs of one of {', '.join(KINDS)}.",
                code="rows",
            )
        printed: dict[str, Any] = {}
        files: list[Path] = []
        for kind, found in several.items():
            table = compared(found)
            parts = [part for own in found for part in own.facts.get("parts") or ()]
            models = " and ".join(dict.fromkeys(str(own.facts["model"]) for own in found))
            facts = provenance(model=models, parts=parts, of=[str(own.folder) for own in found])
            stem = f"compare_{kind}"
            shelf = Shelf(to, stem)
            shelf.table(stem, table)
            shelf.figure(stem, draw(table, f"{kind}, side by side"))
            written, notes = shelf.write(facts)
            common.print_notes(notes)
            files += written
            printed[kind] = plain(table)
            if not as_json:
                for shown in _shown(kind, table):
                    out.print(shown)
        if as_json:
            common.print_json(printed | {"files": [str(f) for f in files]})
            return
        common.print_files(files)


def _shown(kind: str, table: "pd.DataFrame") -> "Iterator[Table]":
    """A table per task: a line for every number and run."""
    from anchors.stats import GROUP, parts_by

    for (task, _, control), part in parts_by(table, GROUP):
        name = task if control == "none" else f"{task}, {control}"
        shown = common.new_table(
            f"{kind}: {name}",
            *("number", "run", "value", "Δ to the first", "n"),
            caption="[95 % bootstrap interval]; Δ: paired, on so many prompts that both have; each interval by itself, none corrected for the others",
            overflow="fold",
        )
        before = None
        for row in part.sort_values(["metric", "condition"], kind="stable").to_dict("records"):
            said = f"{row['metric']}, {row['condition'] if row['condition'] != 'none' else 'untouched'}"
            gap = estimate(row["difference"], row["difference_low"], row["difference_high"], signed=True)
            count = f"{row['examples']}" + (f", Δ {int(row['shared'])}" if gap else "")
            value = estimate(row["value"], row["low"], row["high"])
            shown.add_row("" if said == before else escape(said), escape(row["run"]), value, gap, count)
            before = said
        yield shown
