"""`anchors diagnose`: which labels a model confuses, and whether its keys foretell it (3.3)."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from anchors.cli import common
from anchors.cli.common import estimate, out
from anchors.cli.setting import Setting, measurement, numbers

if TYPE_CHECKING:
    from anchors.runner import Analysis


@measurement(examples=100)
def diagnose(
    setting: Setting,
    components: Annotated[
        str, typer.Option(help="Principal components of the queries, e.g. 10 or 5,10,20,50.")
    ] = "10",
    layer: Annotated[
        int | None, typer.Option(min=0, help="Where the keys are taken; default: two thirds up.")
    ] = None,
) -> None:
    """Foretell from the keys at the label words which labels are confused, and compare with what is.

    Foretold: distance of two labels' keys, weighed by the principal components of the queries at the targets. Actual:
    ROC AUC of p_i/p_j on the examples of both classes; 0.5 is guessing.
    """
    sweep = numbers(components, "--components")

    def analyses() -> "list[Analysis]":
        from anchors.diagnosis import Diagnosis

        return [Diagnosis(sweep, layer)]

    result = setting.report("diagnose", analyses, task="trec")
    if setting.as_json:
        common.print_json(result.as_json())
        return
    from anchors.summaries import sentence

    for task, pairs in result.tables["pairs"].groupby("task", sort=False):
        agreement = result.tables["summary"]
        agreement = agreement[agreement["task"] == task]
        condition = agreement["condition"].iloc[0]
        shown = pairs[pairs["condition"] == condition].sort_values("actual")
        table = Table(
            title=escape(f"Pairs of labels: {task}, {condition}"),
            caption=escape(f"texts: different ones of each label; {common.caption_of(shown)}"),
            box=SIMPLE_HEAD,
        )
        for name in ("labels", "texts", "foretold distance", "actual AUC"):
            table.add_column(name)
        for row in shown.itertuples():
            table.add_row(
                escape(f"{row.one} / {row.other}"),
                f"{row.one_texts} / {row.other_texts}",
                f"{row.predicted:.2f}",
                estimate(row.actual, row.low, row.high) or escape(row.note),
            )
        out.print(table)
        for row in agreement.dropna(subset=["correlation"]).itertuples():
            out.print(
                f"{row.condition}: rank correlation {estimate(row.correlation, row.low, row.high)}, "
                f"permutation p = {row.p:.3f}",
                markup=False,
            )
        out.print(sentence(pairs, agreement, condition), markup=False)
    common.print_files(result.files)
