"""Patching the label words: in which layers does the prediction take what it needs from them?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from anchors._names import forwarding
from anchors.context import Context, Queries, answer
from anchors.errors import AnchorsError, CertificateError
from anchors.model.language import LanguageModel
from anchors.study.analysis import Record
from anchors.tasks.drawing import derangement, random_positions
from anchors.tasks.prompts import Prompt
from anchors.tasks.task import Task


@dataclass(frozen=True)
class Contexts:
    """What the queries of a seed are answered on.

    Attributes:
        own: the demonstrations with their labels, prompt A.
        exchanged: the same with exchanged label words, prompt B.
        patched: by condition and layer, A with B's residual stream put in there.
    """

    own: Context
    exchanged: Context
    patched: dict[tuple[str, int], Context]


def label_logits(model: LanguageModel, context: Context, asked: Queries) -> Float[Tensor, "batch classes"]:
    logits = answer(model, context, asked)
    return centred(logits.gather(1, asked.label_ids.to(logits.device)))


def centred(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
    """Without what all labels have in common, which changes no probability; in float64, for their differences."""
    return logits.double() - logits.double().mean(-1, keepdim=True)


def by_prompt(found: dict[str, Tensor], condition: str, layer: int | None) -> list[list[Record]]:
    columns = [[Record(name, v, condition, layer) for v in values.tolist()] for name, values in found.items()]
    return [list(own) for own in zip(*columns, strict=True)]


def exchange(task: Task, lengths: Sequence[int], rng: np.random.Generator) -> list[int]:
    """For each class, the class whose label word its demonstrations get: another one with as many tokens.

    Label words of different lengths cannot be exchanged, since all that follows would move; a class whose label
    word has a length of its own keeps it.

    Raises:
        AnchorsError: no two label words have the same length.
    """
    moved = list(range(len(lengths)))
    for length in sorted(set(lengths)):
        group = [c for c, own in enumerate(lengths) if own == length]
        if len(group) > 1:
            for c, other in zip(group, derangement(len(group), rng), strict=True):
                moved[c] = group[other]
    if moved == list(range(len(lengths))):
        counts = ", ".join(f"{label!r} {n}" for label, n in zip(task.labels, lengths, strict=True))
        raise AnchorsError(
            f"No label words of {task.name!r} can be exchanged: their numbers of tokens all differ ({counts}).",
            "Choose label words of which two at least have as many tokens as each other (--labels).",
            code="label-words",
        )
    return moved


def places(
    own: Prompt, exchanged: Prompt, conditions: Sequence[str], rng: np.random.Generator
) -> dict[str, tuple[int, ...]]:
    """The positions that each condition patches.

    Raises:
        AnchorsError: the two prompts differ elsewhere than at label words, or the demonstrations are too short.
    """
    label = tuple(i for i, role in enumerate(own.roles) if role == "label")
    pairs = zip(own.ids, exchanged.ids, strict=False)
    if len(own.ids) != len(exchanged.ids) or not {i for i, (a, b) in enumerate(pairs) if a != b} <= set(
        label
    ):
        raise AnchorsError(
            "Exchanging the label words changes other tokens of the prompt, too.",
            "Follow {label} in the template by a newline, so that the tokenizer keeps it apart.",
            code="label-words",
        )
    found = {"label": label, "others": tuple(i for i in range(own.query) if i not in label)}
    if "random" in conditions:
        found["random"] = random_positions(replace(own, label_positions=label), rng)
    return found


def demand_equal(patched: Context, exchanged: Context) -> None:
    """All that differs was exchanged before the first layer: the keys and values must be B's."""
    pairs = zip((*patched.keys, *patched.values), (*exchanged.keys, *exchanged.values), strict=True)
    error = max(float((a - b).norm() / b.norm()) for a, b in pairs if a is not None and b is not None)
    if not error < 1e-3:
        raise CertificateError(
            f"With all that differs patched before layer 0, keys and values differ by {error:.1e} from prompt B's.",
            "Layers of this model see the tokens by another way than the residual stream.",
        )


@torch.no_grad()
def literal(
    bridge: Any, own: Prompt, exchanged: Prompt, positions: Sequence[int], layer: int
) -> Float[Tensor, " classes"]:
    """The label words' logits of one patched prompt by transformer-lens, both prompts run as a whole.

    Args:
        bridge: of `LanguageModel.to_transformer_lens`.
        own, exchanged: prompts A and B, of the same length.
        positions: where the residual stream before `layer` is taken from B.
    """
    name, where = f"blocks.{layer}.hook_in", list(positions)
    a, b = (torch.tensor([p.ids], device=bridge.cfg.device) for p in (own, exchanged))
    _, cache = bridge.run_with_cache(b, names_filter=name)

    def swap(stream: Tensor, hook: Any) -> Tensor:
        stream = stream.clone()
        stream[:, where] = cache[name][:, where]
        return stream

    logits = bridge.run_with_hooks(a, fwd_hooks=[(name, swap)])
    return logits[0, own.target, list(own.label_ids)]


__getattr__ = forwarding(__name__)
