"""Compressing demonstrations into their anchors (3.2): keep the keys and values of label words and format, drop the text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from anchors._names import forwarding
from anchors.context import Context, encode
from anchors.errors import AnchorsError, nearest
from anchors.model.language import LanguageModel
from anchors.model.lengths import Change, demand_one_side
from anchors.rules import RULES, Rule
from anchors.study.analysis import Cell
from anchors.tasks.drawing import demonstrations
from anchors.tasks.prompts import Prompt, build


def resolve(rule: Rule | Literal["reference"], model: LanguageModel) -> Rule:
    """The reference implementation's rule: `restart` with learned absolute positions, else `after-last-anchor`."""
    if rule != "reference":
        return rule
    learned = any(
        isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] in ("wpe", "embed_positions")
        for name, module in model.model.named_modules()
    )
    return "restart" if learned else "after-last-anchor"


def compress(context: Context, tokens: Sequence[int], rule: Rule = "after-last-anchor") -> Context:
    """Keep some tokens' keys and values in every layer; the rule says at which position the test input begins.

    In layers with a sliding window or attention chunks, these count kept tokens.
    """
    if rule not in RULES:
        raise AnchorsError(f"Unknown position rule {rule!r}.", nearest(rule, RULES), code="unknown-name")
    kept = sorted(set(tokens))
    start = {"restart": 0, "original": context.next}.get(rule)
    if start is None:
        start = context.positions[kept[-1]] + 1 if kept else 0
    return context.keep(kept, start)


def anchor_tokens(prompt: Prompt) -> list[int]:
    """The anchors of a prompt: its label words, with all their tokens, and the format tokens of its demonstrations."""
    return sorted({*_label_tokens(prompt), *_format_tokens(prompt)})


def random_tokens(prompt: Prompt, rng: np.random.Generator) -> list[int]:
    """The anchors, with each token of a label word replaced by a random text token of the same demonstration."""
    chosen = set(_format_tokens(prompt))
    for p in _label_tokens(prompt):
        own = [i for i in range(prompt.query) if prompt.demonstrations[i] == prompt.demonstrations[p]]
        free = [i for i in own if prompt.roles[i] == "text" and i not in chosen]
        if not free:
            raise AnchorsError(
                f"Demonstration {prompt.demonstrations[p] + 1} has fewer text tokens than its label word has tokens.",
                "Leave hidden_random out (--methods), or use longer demonstrations.",
                code="too-few",
            )
        chosen.add(int(rng.choice(free)))
    return sorted(chosen)


def _format_tokens(prompt: Prompt) -> list[int]:
    return [i for i in range(prompt.query) if prompt.roles[i] == "format"]


def _label_tokens(prompt: Prompt) -> set[int]:
    """The label-word positions and the other tokens of these words (none where a control put them elsewhere)."""
    words = {prompt.demonstrations[p] for p in prompt.label_positions if prompt.roles[p] == "label"}
    rest = {
        i for i in range(prompt.query) if prompt.roles[i] == "label" and prompt.demonstrations[i] in words
    }
    return rest | set(prompt.label_positions)


class AnchorCache(DynamicCache):
    """Compressed demonstrations as a cache for `model.generate`.

    Attributes:
        context: the kept keys and values.
        full_bytes: memory of the whole demonstrations' keys and values.
        changes: of the model; see `anchors.model.lengths`.
        first_position: what the family calls the position of the first token.

    Raises:
        AnchorsError: when it grows beyond a length at which the family encodes positions otherwise.

    Example:
        >>> cache = AnchorCache.of(lm, prompt)
        >>> lm.model.generate(**cache.inputs(query_ids), max_new_tokens=5)
        >>> cache.saved_bytes
    """

    def __init__(
        self, context: Context, full_bytes: int, changes: tuple[Change, ...] = (), first_position: int = 0
    ) -> None:
        super().__init__()
        self.layers = context.cache().layers
        self.context = context
        self.full_bytes = full_bytes
        self.changes = changes
        self.first_position = first_position

    def __repr__(self) -> str:
        """What it is, in five lines."""
        kept, whole, held = len(self.context.ids), self.context.length, self.context.bytes
        return (
            "AnchorCache: the anchors of demonstrations, to go on from\n"
            f"  {kept} of {whole} tokens, in {len(self.context.keys)} layers\n"
            f"  {held / 1e6:,.3f} of {self.full_bytes / 1e6:,.3f} MB; cache.saved_bytes: {self.saved_bytes:,}\n"
            f"  a query stands from position {self.context.next} on\n"
            "  go on: model.model.generate(**cache.inputs(query_ids), max_new_tokens=5)"
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        reached = self.context.next + keys.shape[-2] - len(self.context.ids)
        demand_one_side(self.changes, [reached], self.context.length)
        return keys, values

    @classmethod
    def of(cls, model: LanguageModel, prompt: Prompt, rule: Rule = "after-last-anchor") -> "AnchorCache":
        """Run the demonstrations of a prompt once and keep their anchors.

        Raises:
            AnchorsError: the family takes no positions, see `LanguageModel.positions`.
        """
        whole = encode(model, prompt.ids[: prompt.query])
        kept = compress(whole, anchor_tokens(prompt), rule)
        model.positions(torch.tensor([prompt.ids[prompt.query :]]), kept)
        return cls(kept, whole.bytes, model.changes, model.first_position or 0)

    @property
    def saved_bytes(self) -> int:
        """Memory that the dropped keys and values would have taken."""
        return self.full_bytes - self.context.bytes

    def inputs(self, query: Sequence[int] | Int[Tensor, " tokens"]) -> dict[str, Any]:
        """What `generate` needs to go on with a query: the kept tokens and the query, at their positions.

        Each call hands out a fresh copy of the cache, so that one AnchorCache serves many queries.
        """
        device = next(keys for keys in self.context.keys if keys is not None).device
        query = [int(i) for i in query]
        positions = [*self.context.positions, *range(self.context.next, self.context.next + len(query))]
        ids = torch.tensor([[*self.context.ids, *query]], device=device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.tensor([positions], device=device) + self.first_position,
            "past_key_values": AnchorCache(self.context, self.full_bytes, self.changes, self.first_position),
        }


def text_anchor(model: LanguageModel, cell: Cell) -> tuple[int, ...]:
    """The tokens of format and label words alone, as text: `Review:\\nSentiment: Positive\\n…`."""
    before, _, _ = cell.task.pieces
    bare = replace(cell.task, template=before.rstrip(" ") + cell.task.template[len(before) :])
    shown = [replace(e, text="") for e in demonstrations(cell.task, cell.data, cell.how)]
    prompt = build(bare, model.tokenizer, shown, "", None)
    return prompt.ids[: prompt.query]


__getattr__ = forwarding(__name__)
