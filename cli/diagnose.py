"""How `anchors diagnose` shows which labels a model confuses (3.3)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from anchors.cli import common
from anchors.cli.common import estimate
from anchors.cli.tables import Grid

if TYPE_CHECKING:
    from anchors.study.prompted import Report


def shown(result: "Report", view: Any) -> Iterator[Grid | str]:
    """Foretold and actual confusion of every pair of labels, and how well they agree."""
    for task, pairs in result.tables["pairs"].groupby("task", sort=False):
        agreement = result.tables["summary"]
        agreement = agreement[agreement["task"] == task]
        condition = agreement["condition"].iloc[0]
        own = pairs[pairs["condition"] == condition].sort_values("actual")
        table = common.new_table(
            f"Pairs of labels: {task}, {condition}",
            *("labels", "texts", "foretold distance", "actual AUC"),
            caption=f"texts: different ones of each label; {common.caption_of(own)}",
        )
        for row in own.itertuples():
            table.add_row(
                escape(f"{row.one} / {row.other}"),
                f"{row.one_texts} / {row.other_texts}",
                f"{row.predicted:.2f}",
                estimate(row.actual, row.low, row.high) or escape(row.note),
            )
        yield table
        for row in agreement.dropna(subset=["correlation"]).itertuples():
            yield (
                f"{row.condition}: rank correlation {estimate(row.correlation, row.low, row.high)}, "
                f"permutation p = {row.p:.3f}"
            )
