"""`anchors inject sweep`: which method injects how much of a skill, and what the VLM forgets meanwhile."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from anchors.cli import common
from anchors.cli.common import estimate, out

if TYPE_CHECKING:
    import pandas as pd


def sweep(
    suites: Annotated[
        list[Path],
        typer.Argument(
            metavar="SUITE...",
            help="Folders with suite.json, as `anchors inject demo` builds them; several are trainings of one experiment "
            "with different seeds.",
        ),
    ],
    grid: Annotated[
        str,
        typer.Option(help="small (some twenty settings) or full (some two hundred).", rich_help_panel="Grid"),
    ] = "full",
    methods: Annotated[
        str | None,
        typer.Option(
            help="With commas, options behind colons: task-arithmetic:vlm_strength=0.8,ties,dare:rescale=none.",
            rich_help_panel="Grid",
        ),
    ] = None,
    strengths: Annotated[
        str | None, typer.Option(help="λ of the expert, such as 0.25,0.5,1.", rich_help_panel="Grid")
    ] = None,
    densities: Annotated[
        str | None,
        typer.Option(help="Of methods that drop entries, such as 0.2,0.5.", rich_help_panel="Grid"),
    ] = None,
    draws: Annotated[
        int | None, typer.Option(min=1, help="Masks of each random method.", rich_help_panel="Grid")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Ranges that are injected, such as 0-3,4-7,all, or thirds; default: all, and in a full grid each third "
            "of task arithmetic's.",
            rich_help_panel="Grid",
        ),
    ] = None,
    embeddings: Annotated[
        str, typer.Option(help="keep, shared-rows, by-token; with commas.", rich_help_panel="Grid")
    ] = "keep",
    scenarios: Annotated[
        str | None,
        typer.Option(help="With commas; default: all that have an expert.", rich_help_panel="Protocol"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many examples of each split.", rich_help_panel="Protocol"),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="Where results are reported; settings are chosen on `tune`, where the scenario and vision both have it.",
            rich_help_panel="Protocol",
        ),
    ] = "test",
    controls: Annotated[
        bool,
        typer.Option(help="Blank and shuffled images at every setting.", rich_help_panel="Protocol"),
    ] = True,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts at once; default: by length.", rich_help_panel="Protocol"),
    ] = None,
    retention: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="The share of the VLM's vision that a setting must keep on the examples it is chosen on (`tune`, see "
            "--split); whether it does so where results are reported is said. Changing it computes nothing anew.",
            rich_help_panel="Protocol",
        ),
    ] = 0.95,
    device: common.Device = "auto",
    precision: common.Precision = "auto",
    to: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the results.", rich_help_panel="Output")
    ] = Path("results/inject-sweep"),
    csv: Annotated[
        bool, typer.Option("--csv", help="Write the rows as CSV, too.", rich_help_panel="Output")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the tables as JSON.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Method × strength × density × mask × layers on the scenarios of a suite: skill gained, vision kept, by intervals.

    Beside every setting stand the same questions on blank and on shuffled images; beside all of them the VLM alone, the
    expert told in words, the cascade and a fine-tuned VLM. Running the same command again computes only what is
    missing.
    """
    with common.reporting():
        from anchors.results import require_writable

        require_writable(to)
        with common.err.status("loading torch and transformers"):
            from transformers.utils import logging as transformers_logging

            from anchors.injection.grid import Grid
            from anchors.injection.suite import Suite
            from anchors.injection.sweep import Sweep
            from anchors.injection.sweep_report import report

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        wanted = Sweep(
            Grid(
                grid, common.words(methods, "--methods"), common.numbers(strengths, "--strengths"), common.numbers(densities, "--densities"), draws,
                common.words(layers, "--layers"), common.words(embeddings, "--embeddings") or ("keep",),
            ),
            common.words(scenarios, "--scenarios"), split, limit, controls, batch, retention,
        )  # fmt: skip
        opened = [Suite.open(path) for path in suites]
        with common.progress_bar("settings") as progress:
            result = report(
                opened, wanted, out=to, device=device, precision=precision, csv=csv, progress=progress,
            )  # fmt: skip
        common.print_notes(result.notes)
        if as_json:
            common.print_json(result.as_json())
            return
        for scenario in dict.fromkeys(result.tables["summary"]["scenario"]):
            own = {name: t[t["scenario"] == scenario] for name, t in result.tables.items()}
            guesses = result.tables["guessing"]
            own["guessing"] = guesses[guesses["scenario"].isin([scenario, opened[0].vision])]
            for show in (_references, _best, _matched, _sensitivity):
                if (table := show(own, scenario)) is not None:
                    out.print(table)
        out.print(_scenarios(result.tables["scenarios"]))
        common.print_files(result.files)


INTERVALS = "[95 % bootstrap interval; Wilson's where all answers are right, or all wrong]"


def _table(title: str, *columns: str) -> Table:
    table = common.new_table(title, *columns, overflow="fold")
    table.columns[0].no_wrap = True
    return table


def _cells(row: dict, *names: str, signed: bool = False) -> list[str]:
    """Estimates; a missing column is an empty cell."""
    return [
        estimate(*(row.get(f"{name}{end}") for end in ("", "_low", "_high")), signed=signed) for name in names
    ]


def _references(tables: "dict[str, pd.DataFrame]", scenario: str) -> Table:
    names = ("skill", "blank", "shuffled", "vision")
    table = _table(f"{scenario} without injection", "", "skill", "image blank", "shuffled", "vision")
    table.caption = escape(f"{INTERVALS}; {guessed(tables['guessing'])}")
    found = tables["summary"]
    for row in found[found["family"] == "reference"].to_dict(orient="records"):
        table.add_row(row["setting"], *_cells(row, *names))
    return table


def guessed(found: "pd.DataFrame") -> str:
    """What the accuracies have to be compared with."""
    told = [
        f"{row['scenario']} {estimate(row['chance'], None, None)} and {estimate(row['majority'], None, None)}"
        for row in found.to_dict(orient="records")
    ]
    return f"right by chance and by always giving the kind's most frequent answer: {', '.join(told)}"


def _best(tables: "dict[str, pd.DataFrame]", scenario: str) -> Table:
    found = tables["best"]
    share, chosen_on, split = found[["retention", "chosen_on", "split"]].iloc[0]
    title = (
        f"{scenario}: of each family the setting of highest skill among those that keep {100 * share:g} % of the VLM's vision "
        f"on {chosen_on}; what it does on {split}"
    )
    lost = not found["kept"].all()
    caption = f"{INTERVALS}; vision kept: of the VLM's own on {split}"
    caption += f"; ✗: kept on {chosen_on}, but not on {split}" if lost else ""
    table = _table(title, "family", "setting", "skill", "vision", "vision kept", "net of blank", "Δ skill")
    table.caption = escape(caption)
    for row in found.to_dict(orient="records"):
        family, setting = row["family"], row["setting"].removeprefix(f"{row['family']} ")
        skill, vision, kept, net = _cells(row, "skill", "vision", "vision_kept", "net")
        kept += "" if row["kept"] else " ✗"
        table.add_row(
            *map(escape, (family, setting)), skill, vision, kept, net, *_cells(row, "difference", signed=True)
        )
    return table


def _matched(tables: "dict[str, pd.DataFrame]", scenario: str) -> Table | None:
    """At the strength nearest to 1 alone; the file has all."""
    found = tables["matched"]
    if not len(found):  # without task arithmetic there is nothing to compare with, and no column
        return None
    found = found[found["family"] != "task-arithmetic"]
    if not len(found):
        return None
    at = min(found["at"], key=lambda x: abs(x - 1))
    title = f"{scenario}: difference to task arithmetic at λ = {at:g}, at equal λ and at equal norm added"
    table = _table(title, "family", "d", "skill, λ", "vision, λ", "skill, norm", "vision, norm")
    own = found[found["at"] == at]
    for (family, density), part in own.groupby(["family", "density"], sort=False, dropna=False):
        by = {row["by"]: row for row in part.to_dict(orient="records")}
        names = ("skill_difference", "vision_difference")
        cells = [
            cell for how in ("strength", "dose") for cell in _cells(by.get(how, {}), *names, signed=True)
        ]
        table.add_row(escape(family), "" if density != density else f"{density:g}", *cells)
    return table


def _sensitivity(tables: "dict[str, pd.DataFrame]", scenario: str) -> Table:
    columns = ("family", "of", "lowest", "highest", "near the best", "keep vision", "both")
    table = _table(f"{scenario}: how much hangs on the numbers (shares of settings)", *columns)
    for row in tables["sensitivity"].to_dict(orient="records"):
        cells = _cells(row, "lowest", "highest", "near", "keep", "both")
        table.add_row(escape(row["family"]), str(row["settings"]), *cells)
    return table


def _scenarios(found: "pd.DataFrame") -> Table:
    """All scenarios beside each other."""
    columns = ("scenario", "at", "skill", "vision", "net of blank", "of the oracle", "rank", "holds")
    table = _table("Which scenarios can be injected", *columns)
    for row in found.to_dict(orient="records"):
        cells = [row["scenario"], "chosen" if row["how"] == "best" else row["how"]]
        cells += _cells(row, "skill", "vision", "net", "recovered")
        rank, share = row["rank"], row["rank_share"]
        shown = ["" if rank != rank else f"{rank:.0f}", "" if share != share else f"{share:.0%}"]
        table.add_row(*map(escape, cells), *shown)
    return table
