"""Vanilla in-context learning: what the model answers. The baseline of every other analysis."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anchors._names import forwarding
from anchors.context import Context, Queries, answer, queries
from anchors.errors import AnchorsError
from anchors.model.language import LanguageModel
from anchors.study.analysis import Record
from anchors.tasks.drawing import Drawn
from anchors.tasks.task import Task


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
    words = jaccard(best_words(logits, top).indices, best_words(baseline, top).indices)
    return [
        [Record("label_loyalty", label, condition), Record("word_loyalty", word, condition)]
        for label, word in zip(same.tolist(), words.tolist(), strict=True)
    ]


def best_words(scores: Float[Tensor, "batch vocabulary"], top: int) -> torch.return_types.topk:
    """The words with the largest scores, as `Tensor.topk` gives them.

    Raises:
        AnchorsError: so many that every word is one of them.
    """
    if top >= scores.shape[-1]:
        raise AnchorsError(
            f"The {top} most probable words are all of them: the vocabulary has {scores.shape[-1]}.",
            "Lower --top.",
            code="option-value",
        )
    return scores.topk(top)


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


__getattr__ = forwarding(__name__)
