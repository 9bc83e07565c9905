"""How `anchors classify` shows vanilla in-context learning."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from anchors.cli import common
from anchors.cli.common import estimate_of, summary_table
from anchors.cli.tables import Grid

if TYPE_CHECKING:
    import pandas as pd

    from anchors.study.prompted import Report


def shown(result: "Report", view: Any) -> Iterator[Grid]:
    """Accuracy and loss, and a confusion matrix per condition, of every task."""
    tables = result.tables
    for task, part in tables["summary"].groupby("task", sort=False):
        title = f"{task}, {result.title}, {part['examples'].iloc[0]} examples"
        yield summary_table(part, ["accuracy", "loss"], title)
        for condition in sorted(dict.fromkeys(part["condition"]), key=lambda c: c != "none"):
            picked = [
                t[(t["task"] == task) & (t["condition"] == condition)]
                for t in (tables["confusion"], tables["classes"])
            ]
            yield _confusion(*picked, condition)


def _confusion(counts: "pd.DataFrame", classes: "pd.DataFrame", condition: str) -> Grid:
    labels = list(dict.fromkeys(counts["gold"]))
    table = Grid(
        "confusion" if condition == "none" else f"confusion, {condition}",
        caption="rows: the true label; columns: the predicted one; "
        f"{common.caption_of(classes[classes['metric'] != 'f1'])}",
    )
    table.add_column("")
    for label in labels:
        table.add_column(label, justify="right")
    for name in ("precision", "recall"):
        table.add_column(name)
    for label in labels:
        own = counts[counts["gold"] == label].set_index("predicted")["prompts"]
        scores = classes[classes["label"] == label].set_index("metric")
        table.add_row(
            escape(label),
            *(str(own[other]) for other in labels),
            *(_score(scores.loc[name]) for name in ("precision", "recall")),
        )
    return table


def _score(row: "pd.Series") -> str:
    """Of a label that no prompt has, or that is never said, there is none."""
    none = "never said" if row.name == "precision" else "no prompt"
    return estimate_of(row) if row["prompts"] else none
