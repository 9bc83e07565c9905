"""How `anchors flow --prompts` shows what flows into the last token of prompts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape

from anchors.cli import common
from anchors.cli.flow import View
from anchors.cli.tables import Grid

if TYPE_CHECKING:
    import pandas as pd

    from anchors.study.report import Report

SHOWN = 5
"""Prompts, and layers of each, of which sources are shown."""
BEST = 4
"""Tokens of a layer that are named."""


def shown(result: "Report", view: View) -> Iterator[Grid]:
    """The means by layer, and the strongest sources of the first prompts."""
    summary = result.tables["summary"]
    task, examples = summary["task"].iloc[0], summary["examples"].iloc[0]
    yield common.layer_table(summary, f"Flow into the target: {task}, {result.title}, {examples} prompts")
    yield _sources(result.tables, view.layers)


def _sources(tables: "dict[str, pd.DataFrame]", layers: str | None) -> Grid:
    import pandas as pd

    sources, prompts = tables["sources"], tables["prompts"].set_index("number")
    own = sorted({int(x) for x in sources["layer"]})
    chosen = common.layers_from(layers, own) if layers else own
    last = len(chosen) - 1
    few = sorted({chosen[round(i * last / (SHOWN - 1))] for i in range(SHOWN)}) if last >= SHOWN else chosen
    table = common.new_table(
        "Which tokens the target takes it from",
        "prompt",
        "aim",
        "p",
        "layer",
        "strongest tokens, with positions and shares",
        keys=4,
        caption="share of all that flows into the target in the layer; "
        f"the tables hold more (first {SHOWN} prompts shown)",
    )
    table.columns[4].no_wrap = False
    for number in list(prompts.index)[:SHOWN]:
        facts = prompts.loc[number]
        aim = repr(facts["target"]) + (f" against {facts['against']!r}" if pd.notna(facts["against"]) else "")
        for layer in few:
            part = sources[(sources["number"] == number) & (sources["layer"] == layer)].head(BEST)
            named = ", ".join(
                f"{row['token']!r} ({row['position']}) {100 * row['share']:.0f} %"
                for row in part.to_dict("records")
            )
            table.add_row(
                str(number + 1), escape(aim), f"{100 * facts['probability']:.3g} %", str(layer), escape(named)
            )
    return table
