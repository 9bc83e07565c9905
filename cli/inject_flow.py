"""`anchors inject flow`: information flow from images and text, before and after an injection."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from anchors.cli import common
from anchors.cli.common import err, estimate, new_table, out
from anchors.cli.inject_sweep import INTERVALS, guessed
from anchors.errors import AnchorsError

if TYPE_CHECKING:
    import pandas as pd


def flow(
    suites: Annotated[
        list[Path],
        typer.Argument(
            metavar="SUITE...",
            help="Folders of suites; several are trainings of one experiment with other seeds.",
        ),
    ],
    method: Annotated[
        str, typer.Option(help="How experts are injected.", rich_help_panel="Injection")
    ] = "task-arithmetic",
    strengths: Annotated[
        str, typer.Option(help="λ_e, with commas; 0 is always there.", rich_help_panel="Injection")
    ] = "0,0.25,0.3,0.5,0.75,1,1.25,1.5",
    density: Annotated[
        float | None,
        typer.Option(help="Of methods that drop entries.", min=0, max=1, rich_help_panel="Injection"),
    ] = None,
    experts: Annotated[
        str, typer.Option(help="Names with commas, or all.", rich_help_panel="Injection")
    ] = "all",
    scenarios: Annotated[
        str,
        typer.Option(
            help="Names with commas, or all; an expert is measured on its own and on vision.",
            rich_help_panel="Protocol",
        ),
    ] = "all",
    shots: Annotated[
        int, typer.Option(min=0, help="Demonstrations before the query.", rich_help_panel="Protocol")
    ] = 2,
    prompts: Annotated[
        int,
        typer.Option("--prompts", "-n", min=1, help="Prompts of each scenario.", rich_help_panel="Protocol"),
    ] = 100,
    examples: Annotated[
        int,
        typer.Option(min=1, help="Examples of each scenario for the accuracy.", rich_help_panel="Protocol"),
    ] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of the demonstrations.", rich_help_panel="Protocol")] = 0,
    device: common.Device = "auto",
    precision: common.Precision = "auto",
    to: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the results.", rich_help_panel="Output")
    ] = Path("results/inject-flow"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the tables as JSON.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Split the information flow by its source (images, text) and see what an injection does to it.

    Image tokens, text, label words and target are the roles of a prompt with demonstrations. Written are the flow by layer
    before and after, and over λ; whether vision damage goes with lost image flow; and whether a λ that is chosen as the
    largest that leaves the image flow as it was, within an ε, comes near the best. That choice uses no labels of its
    expert; ε, like the factor c of the norm-ratio rule, is fitted with labels of the other experts. Running the same
    command again computes only what is missing.
    """
    with common.reporting():
        from anchors.results import plain, require_writable

        require_writable(to)
        with err.status("loading torch and transformers"):
            from transformers.utils import logging as transformers_logging

            from anchors.injection.flow_report import Wanted, measure
            from anchors.injection.recipe import Recipe
            from anchors.injection.suite import Suite

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        wanted = Wanted(
            Recipe(method=method, density=density), _with_none(strengths), shots, prompts, examples,
            common.words(None if scenarios == "all" else scenarios, "--scenarios"),
            common.words(None if experts == "all" else experts, "--experts"), seed,
        )  # fmt: skip
        opened = [Suite.open(folder) for folder in suites]
        with common.progress_bar("settings") as progress:
            measured = measure(opened, wanted, out=to, device=device, precision=precision, progress=progress)
        from anchors.injection.flow_write import write

        with err.status("tables and figures"):
            tables, files, notes = write(measured, opened, wanted, to)
        common.print_notes(notes)
        if as_json:
            common.print_json({name: plain(table) for name, table in tables.items()})
            return
        title = f"{opened[0].name}, {method}"
        for table in (_strengths(tables, title), _damage(tables, title), _regret(tables, title)):
            if table is not None:
                out.print(table)
        common.print_files(files)


def _with_none(text: str) -> tuple[float, ...]:
    found = sorted({*common.numbers(text, "--strengths"), 0.0})
    if len(found) < 2 or found[0] < 0:
        raise AnchorsError(
            f"--strengths {text!r} needs a λ above 0 and none below.", "For example: --strengths 0,0.5,1"
        )
    return tuple(found)


def _strengths(tables: "dict[str, pd.DataFrame]", title: str) -> Table | None:
    from anchors.figures.inject_flow import PATHS

    found, right = tables["strengths"], tables["accuracy"].set_index(["scenario", "expert", "strength"])
    own = found[(found["measure"] == "share") & (found["labels"] == "gold")]
    metrics = [m for m in PATHS if (own["metric"] == m).any()]
    paths = (f"{PATHS[m][0]}, {half}" for m in metrics if m[2] == "i" for half in ("shallow", "deep"))
    table = new_table(
        f"Share of the flow that comes from images and text: {title}",
        *("scenario", "expert", "λ", "accuracy", *paths),
        caption="into label words and into the target; mean over layers of the shallow and of the deep half "
        f"{INTERVALS}; {guessed(tables['guessing'])}",
    )
    for (scenario, expert, strength), part in own.groupby(["scenario", "expert", "strength"], sort=False):
        cells = part.set_index(["metric", "part"])
        shown = [
            estimate(*cells.loc[(m, half), ["value", "low", "high"]])
            for m in metrics
            if m[2] == "i"
            for half in ("shallow", "deep")
        ]
        accuracy = estimate(*right.loc[(scenario, expert, strength), ["value", "low", "high"]])
        table.add_row(escape(scenario), escape(expert), f"{strength:g}", accuracy, *shown)
    return table


def _damage(tables: "dict[str, pd.DataFrame]", title: str) -> Table | None:
    if "damage" not in tables:
        return None
    table = new_table(
        f"Does vision damage go with lost image flow? {title}",
        *("measure", "flow", "layers", "ρ", "p", "q", "ρ beyond λ", "p", "q", "settings"),
        caption="Spearman's ρ of the drop of vision accuracy and the relative loss of flow; permutation p"
        f"{_least(tables['damage'])}; q: p corrected for the number of these tests",
    )
    for row in tables["damage"].itertuples():
        numbers = [f"{row.rho:+.2f}", f"{row.p:.4f}", f"{row.q:.3f}"]
        numbers += [f"{row.within:+.2f}", f"{row.within_p:.3f}", f"{row.within_q:.3f}"]
        shown = ["" if "nan" in text else text for text in numbers]
        table.add_row(row.measure, row.metric, row.part, *shown, f"{row.settings} on {row.curves} curves")
    return table


def _least(damage: "pd.DataFrame") -> str:
    """How small the p beyond λ can get."""
    least = damage["least_p"].dropna()
    return f", beyond λ no smaller than {least.max():.2g}" if len(least) else ""


def _regret(tables: "dict[str, pd.DataFrame]", title: str) -> Table | None:
    if "regret" not in tables:
        return None
    table = new_table(
        f"Choosing λ: {title}",
        *("rule", "mean regret", "chosen λ by expert"),
        caption="regret: best utility over the grid minus the chosen λ's; utility: mean of skill accuracy and vision retention; "
        "ε, c and the best fixed λ are fitted with labels of the other experts",
    )
    for row in tables["regret"].itertuples():
        own = tables["choices"][tables["choices"]["rule"] == row.rule]
        chosen = [
            f"{escape(expert)} {', '.join(f'{x:g}' for x in part['strength'])}"
            for expert, part in own.groupby("expert", sort=False)
        ]
        table.add_row(escape(row.rule), estimate(row.regret, row.low, row.high, digits=3), "; ".join(chosen))
    return table
