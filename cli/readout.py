"""`anchors readout`: read the prediction off the attention to the label words (2.3)."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from anchors.cli import common
from anchors.cli.common import out
from anchors.cli.setting import Setting, measurement

if TYPE_CHECKING:
    from anchors.runner import Analysis


@measurement(examples=100)
def readout(setting: Setting) -> None:
    """AUCROC_l and R_l: how well each layer's attention to the label words tells the model's own prediction.

    The score of a class is Σ_h A(q, p) over its label words p; the AUC is taken against what the model predicts.
    R_l is the share of Σ (AUCROC − 0.5) that the layers up to l contribute; it is not defined where that sum over all
    layers is not above 0.
    """

    def analyses() -> "list[Analysis]":
        from anchors.readout import Readout

        return [Readout()]

    result = setting.report("readout", analyses)
    if setting.as_json:
        common.print_json(result.as_json())
        return
    for task, part in result.tables["summary"].groupby("task", sort=False):
        table = Table(
            title=escape(
                f"Reading out: {task}, {result.facts['model']}, {part['examples'].iloc[0]} examples"
            ),
            caption=escape(common.caption_of(part)),
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for name in ("layer", "AUCROC", "R"):
            table.add_column(name, no_wrap=True)
        for layer, own in part.groupby("layer"):
            cells = own.set_index("metric")
            shown = [common.layer_cell(cells.loc[m]) for m in ("aucroc", "r")]
            table.add_row(str(layer), *shown)
        out.print(table)
        common.print_notes([f"{task}: {note}." for note in dict.fromkeys(part["note"]) if note])
    common.print_files(result.files)
