"""`anchors nsa probe`: what becomes of label words in a model with Native Sparse Attention."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from anchors.cli import common
from anchors.cli.common import estimate, new_table, out
from anchors.errors import AnchorsError

if TYPE_CHECKING:
    import pandas as pd

DEFAULT = Path(__file__).parents[1] / "experiments" / "nsa" / "checkpoint"
"""The model that comes with the repository."""
OTHER = "The same weights, other blocks"


def probe(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL_DIR]",
            help="A folder of `anchors nsa train`; default: the small model that comes along.",
        ),
    ] = None,
    prompts: Annotated[
        int, typer.Option("--prompts", "-n", min=1, help="Held-out episodes.", rich_help_panel="Protocol")
    ] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the episodes.", rich_help_panel="Protocol")] = 0,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Length of an episode; default: as trained.", rich_help_panel="Protocol"),
    ] = None,
    demonstrations: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="At most so many before the query; default: as many as fit.",
            rich_help_panel="Protocol",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Classes of an episode, e.g. 4-8; default: as trained.", rich_help_panel="Protocol"
        ),
    ] = None,
    words: Annotated[
        str | None,
        typer.Option(
            help="Words of a text, e.g. 16-24: longer ones leave blocks without a label word; default: as trained.",
            rich_help_panel="Protocol",
        ),
    ] = None,
    keyword_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of a text's words that are its class's; default: as trained.",
            rich_help_panel="Protocol",
        ),
    ] = None,
    d: Annotated[
        int | None, typer.Option("--d", min=1, help="Another stride.", rich_help_panel=OTHER)
    ] = None,
    lp: Annotated[
        int | None, typer.Option("--lp", min=1, help="Other selection blocks, l'.", rich_help_panel=OTHER)
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Another number of blocks.", rich_help_panel=OTHER)
    ] = None,
    w: Annotated[
        int | None, typer.Option("--w", min=1, help="Another window.", rich_help_panel=OTHER)
    ] = None,
    interventions: Annotated[
        bool, typer.Option(help="Ban, force, cut and isolate, too.", rich_help_panel="Protocol")
    ] = True,
    vectors: Annotated[
        int,
        typer.Option(
            min=0, help="Label words of a prompt for the identity probe.", rich_help_panel="Protocol"
        ),
    ] = 32,
    device: common.Device = "auto",
    precision: common.Precision = "auto",
    to: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the results.", rich_help_panel="Output")
    ] = Path("results/nsa-probe"),
    pages: Annotated[
        int, typer.Option(min=0, help="Prompts on the HTML page.", rich_help_panel="Output")
    ] = 2,
    csv: Annotated[
        bool, typer.Option("--csv", help="Write the rows as CSV, too.", rich_help_panel="Output")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the tables as JSON.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Are label words still anchors when attention is sparse? By branch, layer and group, on held-out episodes.

    Flow by branch; how often the last position selects label words' blocks, against chance and near-by blocks; purity,
    recall, dilution; gates; and what banning, forcing, cutting and isolating them does to the answer. Running the same
    command again computes only what is missing.
    """
    with common.reporting():
        folder = DEFAULT if model is None else model
        if not folder.is_dir():
            raise AnchorsError(
                f"The model {str(folder)!r} is not a directory.", "Train one: `anchors nsa train --out DIR`."
            )
        ranges = {
            name: None if text is None else common.span(text, f"--{name}")
            for name, text in (("classes", classes), ("words", words))
        }
        from anchors.results import require_writable

        require_writable(to)
        lm = common.load_model(str(folder), device, precision, None, None, False)
        if model is None:
            # Where the package lies is nobody's business in results.
            lm = replace(lm, name="the small NSA model")
        from anchors.nsa.probe import Probe, geometry_of, with_geometry
        from anchors.nsa.probe_report import episodes_of, report

        geometry_of(lm)
        lm = with_geometry(lm, d=d, lp=lp, n=n, w=w)
        wanted = Probe(
            episodes_of(lm, folder, tokens=tokens, keyword_rate=keyword_rate, **ranges),
            seed,
            prompts,
            demonstrations,
            interventions,
            vectors,
        )
        with common.progress_bar("prompts") as progress:
            result = report(lm, wanted, out=to, pages=pages, csv=csv, progress=progress)
        common.print_notes(result.notes)
        if as_json:
            common.print_json(result.as_json())
            return
        title = f"{result.facts['model']}, {prompts} prompts"
        for show in (_selection, _branches, _summary):
            if (table := show(result.tables, title)) is not None:
                out.print(table)
        common.print_files(result.files)


def _selection(tables: "dict[str, pd.DataFrame]", title: str) -> Table | None:
    if (found := tables.get("selection")) is None:
        return None
    table = new_table(
        f"Selection of label words' blocks: {title}",
        "label words",
        "layer",
        "group",
        "selected",
        "chance",
        "control",
        "AUC",
        "q",
    )
    for row in found.to_dict(orient="records"):
        spans = [
            estimate(row[n], row[f"{n}_low"], row[f"{n}_high"]) for n in ("asr", "chance", "control", "auc")
        ]
        name = "all" if row["which"] == "label" else "right class"
        table.add_row(name, str(row["layer"]), str(row["group"]), *spans, f"{row['q']:.3f}")
    return table


def _branches(tables: "dict[str, pd.DataFrame]", title: str) -> Table | None:
    found = tables["branches"]
    if "share" not in found:
        return None
    table = new_table(
        f"Share of each branch: {title}",
        "layer",
        *(f"S_{p} {b}" for p in ("wp", "pq") for b in ("cmp", "slc", "win")),
    )
    indexed = found.set_index(["layer", "pair", "branch"])
    for layer in found["layer"].unique():
        cells = [
            estimate(*indexed.loc[(layer, p, b), ["share", "share_low", "share_high"]])
            for p in ("wp", "pq")
            for b in ("cmp", "slc", "win")
        ]
        table.add_row(str(layer), *cells)
    return table


def _summary(tables: "dict[str, pd.DataFrame]", title: str) -> Table | None:
    if (found := tables.get("summary")) is None:
        return None
    untouched = found.loc[(found["condition"] == "none") & (found["metric"] == "accuracy")]
    table = new_table(
        f"Interventions: {title}, untouched accuracy "
        + "".join(estimate(*row) for row in untouched[["value", "low", "high"]].to_numpy())
        + "".join(f" (chance {estimate(c, None, None)})" for c in untouched["chance"].dropna()),
        "condition",
        "Δ accuracy",
        "beyond control",
        "Δ label logit",
    )
    table.columns[0].no_wrap = True
    indexed = found.set_index(["condition", "metric"])

    def cell(condition: str, metric: str, name: str) -> str:
        if (condition, metric) not in indexed.index or name not in indexed:
            return ""
        return estimate(*indexed.loc[(condition, metric), [name, f"{name}_low", f"{name}_high"]], signed=True)

    for condition in found["condition"].unique():
        if condition != "none":
            wanted = (("accuracy", "difference"), ("accuracy", "beyond"), ("logit", "difference"))
            table.add_row(condition, *(cell(condition, *own) for own in wanted))
    return table
