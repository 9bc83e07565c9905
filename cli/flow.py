"""How `anchors flow` shows the information flow (2.1)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anchors.cli import common
from anchors.cli.tables import Grid

if TYPE_CHECKING:
    import pandas as pd

    from anchors.model.language import LanguageModel
    from anchors.study.prompted import Report

COLOURS = {"s_wp": "blue", "s_pq": "red", "s_ww": "bright_black"}


@dataclass(frozen=True)
class View:
    """What is shown of a flow.

    Attributes:
        layers: layers shown in table and page, e.g. 0,5,10-12; all are measured.
        pages: prompts on the HTML page.
    """

    layers: str | None = None
    pages: int = field(default=3, metadata={"min": 0})

    def of(self, model: "LanguageModel") -> dict[str, Any]:
        """What `anchors.study.prompted.report` takes."""
        return {"layers": common.layers_from(self.layers, model.layers), "pages": self.pages}


def shown(result: "Report", view: View) -> Iterator[Grid]:
    """The three sums of the shown layers, a table per task."""
    for task, part in result.tables["summary"].groupby("task", sort=False):
        layers = common.layers_from(view.layers, sorted({int(x) for x in part["layer"].dropna()}))
        yield _table(part, layers, f"{task}, {result.title}")


def _table(summary: "pd.DataFrame", layers: list[int], title: str) -> Grid:
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
    table = Grid(f"Information flow: {title}, {examples} examples", caption=caption)
    table.add_column("layer", justify="right")
    for name, colour in COLOURS.items():
        table.add_column(name.capitalize(), style=colour)
    table.add_column("shares")
    if several:
        table.add_column("left\nout", justify="right")
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
