"""`anchors causal`: patch the label words between prompts with exchanged labels, layer by layer."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from anchors.cli import common
from anchors.cli.common import out
from anchors.cli.setting import Setting, measurement

if TYPE_CHECKING:
    from anchors.runner import Analysis


@measurement(examples=40)
def causal(
    setting: Setting,
    stride: Annotated[int, typer.Option(min=1, help="Patch every so many layers.")] = 1,
    positions: Annotated[
        str, typer.Option(help="label; random: as many other positions; others: all other positions.")
    ] = "label,random",
    flow: Annotated[
        bool, typer.Option(help="Measure the saliency's S_pq on as many prompts, to compare.")
    ] = True,
) -> None:
    """In which layers does the prediction take what it needs from the label words?

    The residual stream at the label words, just before a layer, is replaced by that of the same prompt with the label
    words exchanged; follow_l is how far the label logits move to those of the exchanged prompt (1 = all the way).
    """

    def analyses() -> "list[Analysis]":
        from anchors.causal import Causal
        from anchors.flow.analysis import InformationFlow

        chosen: list[Analysis] = [Causal(stride=stride, positions=common.words(positions))]
        return [*chosen, InformationFlow()] if flow else chosen

    result = setting.report("causal", analyses)
    if setting.as_json:
        common.print_json(result.as_json())
        return
    for task, part in result.tables["summary"].groupby("task", sort=False):
        table = Table(
            title=escape(f"Patching: {task}, {result.facts['model']}, {part['examples'].iloc[0]} examples"),
            caption=escape(f"follow {common.caption_of(part[part['metric'] == 'follow'])}"),
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        follow = part[part["metric"] == "follow"]
        table.add_column("layer")
        conditions = list(dict.fromkeys(follow["condition"]))
        for condition in conditions:
            table.add_column(escape(condition), no_wrap=True)
        for layer, own in follow.groupby("layer"):
            cells = own.set_index("condition")
            table.add_row(str(layer), *(common.estimate_of(cells.loc[c]) for c in conditions))
        out.print(table)
    common.print_files(result.files)
