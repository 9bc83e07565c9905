"""How `anchors readout` shows the attention to the label words (2.3)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from anchors.cli import common
from anchors.cli.tables import Grid

if TYPE_CHECKING:
    from anchors.study.prompted import Report


def shown(result: "Report", view: Any) -> Iterator[Grid]:
    """AUCROC_l and R_l of every layer, a table per task; and why there are none where there are none."""
    for task, part in result.tables["summary"].groupby("task", sort=False):
        title = f"Reading out: {task}, {result.title}, {part['examples'].iloc[0]} examples"
        table = common.new_table(title, "layer", "AUCROC", "R", caption=common.caption_of(part))
        for layer, own in part.groupby("layer"):
            cells = own.set_index("metric")
            table.add_row(str(layer), *(common.layer_cell(cells.loc[m]) for m in ("aucroc", "r")))
        yield table
        common.print_notes([f"{task}: {note}." for note in dict.fromkeys(part["note"]) if note])
