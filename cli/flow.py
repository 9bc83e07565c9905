"""`anchors flow`: the information flow of a model doing in-context learning (2.1)."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from anchors.cli import common
from anchors.cli.common import out
from anchors.cli.setting import Setting, measurement

if TYPE_CHECKING:
    import pandas as pd

    from anchors.runner import Analysis

COLOURS = {"s_wp": "blue", "s_pq": "red", "s_ww": "bright_black"}


@measurement()
def flow(
    setting: Setting,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers shown in table and page, e.g. 0,5,10-12; all are measured.", rich_help_panel="Output"
        ),
    ] = None,
    pages: Annotated[
        int, typer.Option(min=0, help="Prompts on the HTML page.", rich_help_panel="Output")
    ] = 3,
) -> None:
    """Measure S_wp, S_pq and S_ww by layer; write a table, a figure and a page to click through.

    I_l = |Σ_h A ⊙ ∂L/∂A|: S_wp is the mean flow from words to label words, S_pq from label words to the target, S_ww
    between all other words. Where label words have several tokens, the share of the flow from them to the target that
    --policy leaves out of S_pq stands beside it. Running the same command again computes only what is missing.
    """
    result = setting.report(
        "flow",
        _analyses,
        layers=lambda model: common.layers_from(layers, model.n_layers),
        pages=pages,
    )
    if setting.as_json:
        common.print_json(result.as_json())
        return
    summary = result.tables["summary"]
    for task, part in summary.groupby("task", sort=False):
        shown = common.layers_from(layers, int(part["layer"].max()) + 1)
        out.print(_table(part, shown, f"{task}, {result.facts['model']}"))
    common.print_files(result.files)


def _analyses() -> "list[Analysis]":
    from anchors.flow.analysis import InformationFlow

    return [InformationFlow()]


def _table(summary: "pd.DataFrame", layers: list[int], title: str) -> Table:
    examples = summary["examples"].iloc[0]
    from anchors.stats import REST

    left = summary[summary["metric"] == REST]
    several = bool((left["mean"] > 0).any())
    caption = "mean [95 % bootstrap interval] in thousandths; share of each sum in the layer in %"
    if several:
        caption += (
            "; left out: how much of the flow from label words to the target comes from tokens of theirs that are not "
            "counted in S_pq, in %"
        )
    table = Table(
        title=f"Information flow: {escape(title)}, {examples} examples",
        caption=escape(caption),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("layer", justify="right", no_wrap=True)
    for name, colour in COLOURS.items():
        table.add_column(name.capitalize(), style=colour, no_wrap=True)
    table.add_column("shares", no_wrap=True)
    if several:
        table.add_column("left\nout", justify="right", no_wrap=True)
    for layer in layers:
        part = summary[summary["layer"] == layer].set_index("metric")
        cells = [
            part.loc[name, "note"] or _interval(*(1e3 * part.loc[name, ["mean", "low", "high"]]))
            for name in COLOURS
        ]
        shares = " ".join(
            "–" if part.loc[name, "note"] else f"{100 * part.loc[name, 'share']:.0f}" for name in COLOURS
        )
        left = [f"{100 * part.loc[REST, 'share']:.0f}"] if several else []
        table.add_row(str(layer), *cells, shares, *left)
    return table


def _interval(mean: float, low: float, high: float) -> str:
    import numpy as np

    def short(x: float) -> str:
        text = np.format_float_positional(x, precision=2, fractional=False, trim="-")
        return text.removeprefix("0") or "0" if "." in text else text

    return short(mean) if np.isnan(low) else f"{short(mean)} \\[{short(low)}, {short(high)}]"
