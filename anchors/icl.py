"""Vanilla in-context learning: what the model answers. The baseline of every other analysis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from anchors.context import Context, Queries, answer, encode, queries, shared_demonstrations
from anchors.models import LanguageModel
from anchors.runner import Cell, Record
from anchors.tasks.drawing import Drawn, demonstrations
from anchors.tasks.prompts import build
from anchors.tasks.task import Task

CONTENT_FREE = ("N/A", "[MASK]", "")
"""Queries without content (Zhao et al. 2021, section 5)."""


@dataclass(frozen=True)
class Classification:
    """Accuracy and label probabilities of vanilla in-context learning.

        predicted = argmax over the label words' logits at the target

    Contextual calibration (Zhao et al. 2021, "Calibrate Before Use") divides the label probabilities by their mean
    p_cf over queries without content, so that a label the prompt favours anyway loses that favour:

        calibrated = argmax_i p_i / p_cf,i

    Attributes:
        calibrate: also report the calibrated predictions, under the condition `calibrated`.

    Example:
        >>> measure(model, Classification(), task, data, Sample(examples=50), out=Path("results"))
    """

    kind: ClassVar[str] = "classify"
    version: ClassVar[int] = 1
    fresh: ClassVar[bool] = False

    calibrate: bool = False

    @property
    def passes(self) -> float:
        return 1.0

    def prepare(self, model: LanguageModel, cell: Cell) -> tuple[Context, Tensor | None]:
        context = encode(model, shared_demonstrations([d.prompt for d in cell.prompts]))
        if not self.calibrate:
            return context, None
        shown = demonstrations(cell.task, cell.data, cell.how)
        empty = [build(cell.task, model.tokenizer, shown, text, None) for text in CONTENT_FREE]
        shared_demonstrations([cell.prompts[0].prompt, *empty])
        batch = queries(empty, len(context.ids), model.device)
        return context, label_probabilities(answer(model, context, batch), batch).mean(0)

    def once(self, model: LanguageModel, state: tuple, cell: Cell) -> list[Record]:
        favour = state[1]
        return (
            []
            if favour is None
            else [
                Record(f"content_free/{label}", p, "calibrated")
                for label, p in zip(cell.task.labels, favour.tolist(), strict=True)
            ]
        )

    def measure(
        self, model: LanguageModel, state: tuple, task: Task, batch: Sequence[Drawn]
    ) -> list[list[Record]]:
        context, favour = state
        asked = queries([d.prompt for d in batch], len(context.ids), model.device)
        probabilities = label_probabilities(answer(model, context, asked), asked)
        found = outcomes(task, asked, probabilities)
        if favour is not None:
            calibrated = probabilities / favour
            calibrated = calibrated / calibrated.sum(-1, keepdim=True)
            found = joined(found, outcomes(task, asked, calibrated, "calibrated"))
        return found


def label_probabilities(
    logits: Float[Tensor, "batch vocabulary"], batch: Queries
) -> Float[Tensor, "batch classes"]:
    """Softmax over the label words' logits only."""
    return logits.gather(1, batch.label_ids.to(logits.device)).softmax(-1)


def outcomes(
    task: Task, batch: Queries, probabilities: Float[Tensor, "batch classes"], condition: str = "none"
) -> list[list[Record]]:
    """Per prompt: the label probabilities, the prediction, the truth, whether they agree, the loss in nats."""
    gold = batch.gold.tolist()
    predicted = probabilities.argmax(-1).tolist()
    return [
        [
            *(
                Record(f"probability/{label}", p, condition)
                for label, p in zip(task.labels, row, strict=True)
            ),
            Record("predicted", guess, condition),
            *(_against(truth, guess, row, condition) if truth >= 0 else ()),
        ]
        for row, guess, truth in zip(probabilities.double().tolist(), predicted, gold, strict=True)
    ]


def _against(truth: int, guess: int, row: list[float], condition: str) -> list[Record]:
    """What can only be said where the right answer is known."""
    return [
        Record("gold", truth, condition),
        Record("accuracy", guess == truth, condition),
        Record("loss", -math.log(row[truth]) if row[truth] else math.inf, condition),
    ]


def loyalties(
    logits: Float[Tensor, "batch vocabulary"],
    baseline: Float[Tensor, "batch vocabulary"],
    batch: Queries,
    top: int,
    condition: str,
) -> list[list[Record]]:
    """How far an intervention leaves the answer alone (2.2).

    Label loyalty: whether the predicted label is unchanged. Word loyalty: the Jaccard similarity of the `top` most
    probable words of the whole vocabulary.
    """
    same = label_probabilities(logits, batch).argmax(-1) == label_probabilities(baseline, batch).argmax(-1)
    words = jaccard(logits.topk(top).indices, baseline.topk(top).indices)
    return [
        [Record("label_loyalty", label, condition), Record("word_loyalty", word, condition)]
        for label, word in zip(same.tolist(), words.tolist(), strict=True)
    ]


def compared(
    model: LanguageModel, contexts: dict[str, Context], task: Task, batch: Sequence[Drawn], top: int
) -> list[list[Record]]:
    """Outcomes of each prompt on several contexts, and the loyalties of each to the one called `none`."""
    asked = queries([d.prompt for d in batch], len(contexts["none"].ids), model.device)
    baseline = answer(model, contexts["none"], asked)
    parts = [outcomes(task, asked, label_probabilities(baseline, asked))]
    for name, context in contexts.items():
        if name != "none":
            logits = answer(model, context, asked)
            parts.append(outcomes(task, asked, label_probabilities(logits, asked), name))
            parts.append(loyalties(logits, baseline, asked, top, name))
    return joined(*parts)


def jaccard(one: Int[Tensor, "batch top"], other: Int[Tensor, "batch top"]) -> Float[Tensor, " batch"]:
    """|A ∩ B| / |A ∪ B| of two sets of as many different entries, by row."""
    common = (one[:, :, None] == other[:, None, :]).sum((1, 2)).float()
    return common / (one.shape[1] + other.shape[1] - common)


def joined(*parts: list[list[Record]]) -> list[list[Record]]:
    """Records of the same prompts, put together."""
    return [[record for part in own for record in part] for own in zip(*parts, strict=True)]
