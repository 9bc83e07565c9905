"""Vanilla in-context learning: what the model answers. The baseline of every other analysis."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from anchors.study.analysis import Cell, Costs, Record, Sizes

if TYPE_CHECKING:
    from torch import Tensor

    from anchors.context import Context
    from anchors.model.language import LanguageModel
    from anchors.tasks.drawing import Drawn
    from anchors.tasks.task import Task


CONTENT_FREE = ("N/A", "[MASK]", "")
"""Queries without content (Zhao et al. 2021, section 5)."""


def _moved(cell: Cell) -> list[tuple[int, int]]:
    """Of every class the one under whose label word it is shown, where labels are permuted."""
    if cell.how.control != "permuted-labels":
        return []
    from anchors.tasks.drawing import demonstrations

    true = demonstrations(cell.task, cell.data, replace(cell.how, control="none"))
    shown = demonstrations(cell.task, cell.data, cell.how)
    return sorted({(one.label, other.label) for one, other in zip(true, shown, strict=True)})


@dataclass(frozen=True)
class Classification:
    """Accuracy and label probabilities of vanilla in-context learning.

        predicted = argmax over the label words' logits at the target

    Demonstrations are drawn once per seed and run once; test examples share their cache.

    Contextual calibration (Zhao et al. 2021, "Calibrate Before Use") divides the label probabilities by their mean
    p_cf over queries without content, so that a label the prompt favours anyway loses that favour:

        calibrated = argmax_i p_i / p_cf,i

    Where labels are permuted (`--control permuted-labels`) rows of the seed say of every class under which label word it is shown
    (`shown_as/<label word>`: the number of the other), so that answers can be told to follow the prompt or what the model knew before.

    Attributes:
        calibrate: also with contextual calibration, under the condition `calibrated`: label probabilities divided by those of
            queries without content.

    Example:
        >>> measure(model, Classification(), task, data, Sample(examples=50), out=Path("results"))
    """

    kind: ClassVar[str] = "classify"
    version: ClassVar[int] = 2
    fresh: ClassVar[bool] = False

    calibrate: bool = False

    def costs(self, sizes: Sizes) -> Costs:
        empty = (sizes._replace(rows=len(CONTENT_FREE)).asked(),) if self.calibrate else ()
        return Costs((sizes.asked(),), (sizes.encoded(), *empty), sizes.shared)

    def prepare(self, model: "LanguageModel", cell: Cell) -> "tuple[Context, Tensor | None]":
        from anchors.context import answer, encode, queries, shared_demonstrations
        from anchors.icl import label_probabilities
        from anchors.tasks.drawing import demonstrations
        from anchors.tasks.prompts import build

        context = encode(model, shared_demonstrations([d.prompt for d in cell.prompts]))
        if not self.calibrate:
            return context, None
        shown = demonstrations(cell.task, cell.data, cell.how)
        empty = [build(cell.task, model.tokenizer, shown, text, None) for text in CONTENT_FREE]
        shared_demonstrations([cell.prompts[0].prompt, *empty])
        batch = queries(empty, len(context.ids), model.device)
        return context, label_probabilities(answer(model, context, batch), batch).mean(0)

    def once(self, model: "LanguageModel", state: tuple, cell: Cell) -> list[Record]:
        favour = [] if state[1] is None else state[1].tolist()
        said = [
            Record(f"content_free/{label}", p, "calibrated")
            for label, p in zip(cell.task.labels, favour, strict=bool(favour))
        ]
        return said + [Record(f"shown_as/{cell.task.labels[own]}", other) for own, other in _moved(cell)]

    def measure(
        self, model: "LanguageModel", state: tuple, task: "Task", batch: "Sequence[Drawn]"
    ) -> list[list[Record]]:
        from anchors.context import answer, queries
        from anchors.icl import joined, label_probabilities, outcomes

        context, favour = state
        asked = queries([d.prompt for d in batch], len(context.ids), model.device)
        probabilities = label_probabilities(answer(model, context, asked), asked)
        found = outcomes(task, asked, probabilities)
        if favour is not None:
            calibrated = probabilities / favour
            calibrated = calibrated / calibrated.sum(-1, keepdim=True)
            found = joined(found, outcomes(task, asked, calibrated, "calibrated"))
        return found
