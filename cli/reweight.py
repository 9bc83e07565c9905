"""`anchors reweight`: learn how much the target attends to each label word (3.1)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anchors.cli import common
from anchors.cli.common import out, summary_table
from anchors.cli.setting import Setting, measurement

if TYPE_CHECKING:
    from anchors.runner import Analysis


@measurement(examples=100)
def reweight(
    setting: Setting,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training examples.")] = 10,
    learning_rate: Annotated[float, typer.Option("--lr", min=1e-6, help="Of Adam.")] = 0.01,
    per_class: Annotated[int, typer.Option(min=1, help="Training examples per class.")] = 4,
    beta: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Apply this fitted β (safetensors) instead of fitting."
        ),
    ] = None,
) -> None:
    """Fit β on a few extra examples and apply it: accuracy against vanilla in-context learning.

    Â(q, p_i) = exp(β) · A(q, p_i), one β per layer, head and label word, only in the target's row. β is kept under
    the results' runs as safetensors with its provenance, drawn by layer, head and label, and used again.
    """

    def analyses() -> "list[Analysis]":
        from anchors.reweighting import Reweighting

        return [Reweighting(learning_rate, epochs, per_class, beta=None if beta is None else str(beta))]

    result = setting.report("reweight", analyses)
    if setting.as_json:
        common.print_json(result.as_json())
        return
    for task, part in result.tables["summary"].groupby("task", sort=False):
        title = f"Re-weighting: {task}, {result.facts['model']}, {part['examples'].iloc[0]} examples"
        out.print(summary_table(part, ["accuracy", "loss"], title))
    common.print_files(result.files)
