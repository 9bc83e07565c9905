"""How `anchors causal` shows the patching of label words."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from anchors.cli import common
from anchors.cli.tables import Grid

if TYPE_CHECKING:
    from anchors.study.prompted import Report


def shown(result: "Report", view: Any) -> Iterator[Grid]:
    """How far the answer follows a patch before each layer, by what is patched; a table per task."""
    for task, part in result.tables["summary"].groupby("task", sort=False):
        follow = part[part["metric"] == "follow"]
        title = f"Patching: {task}, {result.title}, {part['examples'].iloc[0]} examples"
        conditions = list(dict.fromkeys(follow["condition"]))
        caption = f"follow {common.caption_of(follow)}"
        table = common.new_table(title, "layer", *conditions, caption=caption)
        for layer, own in follow.groupby("layer"):
            cells = own.set_index("condition")
            table.add_row(str(layer), *(common.estimate_of(cells.loc[c]) for c in conditions))
        yield table
