"""Demonstrations run once: keys and values on which any number of queries continue, with unchanged numbers."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from anchors.errors import AnchorsError
from anchors.tasks.prompts import Prompt

if TYPE_CHECKING:
    from anchors.models import LanguageModel


@dataclass(frozen=True)
class Context:
    """The keys and values of some tokens in every layer, and where the next token stands.

    Attributes:
        ids: the tokens.
        positions: the position of each.
        keys, values: by layer, [1, kv_heads, tokens, dim], after rotary embedding.
        next: position of the token that follows.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    keys: tuple[Float[Tensor, "1 kv_heads tokens dim"], ...]
    values: tuple[Float[Tensor, "1 kv_heads tokens dim_v"], ...]
    next: int

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def cache(self, batch: int = 1) -> DynamicCache:
        """A fresh transformers cache for a batch, sharing this memory until it grows.

        Plain layers throughout: a sliding window is the mask's business, and a cache that forgot what is outside
        the window could not be cut.
        """
        cache = DynamicCache()
        positions = torch.tensor([self.positions])
        for keys, values in zip(self.keys, self.values, strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys = keys.expand(batch, -1, -1, -1)
            layer.values = values.expand(batch, -1, -1, -1)
            layer.positions = positions
            cache.layers.append(layer)
        return cache

    def keep(self, tokens: Sequence[int], next: int) -> "Context":
        """Only some of the tokens, by index; what follows starts at position `next`."""
        if not tokens:
            raise AnchorsError(
                "No token of the demonstrations is to be kept.", "Keep the label words at least."
            )
        index = torch.tensor(list(tokens))
        return Context(
            ids=tuple(self.ids[i] for i in tokens),
            positions=tuple(self.positions[i] for i in tokens),
            keys=tuple(k.index_select(2, index.to(k.device)) for k in self.keys),
            values=tuple(v.index_select(2, index.to(v.device)) for v in self.values),
            next=next,
        )


def cache_argument(model: nn.Module) -> str:
    """What the forward pass of a model calls its cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def encode(model: "LanguageModel", ids: Sequence[int], context: Context | None = None) -> Context:
    """Run tokens, after those of `context` if given; open the seam around it for edits and probes."""
    start = 0 if context is None else context.next
    cache = DynamicCache() if context is None else context.cache()
    tokens = torch.tensor([list(ids)], device=model.device)
    steps = torch.arange(start, start + len(ids), device=model.device)[None]
    past = {"use_cache": True, cache_argument(model.model): cache}
    with model.arithmetic():
        model.model(input_ids=tokens, position_ids=steps, logits_to_keep=1, **past)
    before, stood = (context.ids, context.positions) if context else ((), ())
    return Context(
        ids=(*before, *ids),
        positions=(*stood, *range(start, start + len(ids))),
        keys=tuple(layer.keys for layer in cache.layers),
        values=tuple(layer.values for layer in cache.layers),
        next=start + len(ids),
    )


def shared_demonstrations(prompts: Sequence[Prompt]) -> tuple[int, ...]:
    """The tokens of the demonstrations that all the prompts show.

    Raises:
        AnchorsError: they show different ones.
    """
    first = prompts[0]
    shared = first.ids[: first.query]
    other = next(
        (i for i, p in enumerate(prompts) if p.query != len(shared) or p.ids[: p.query] != shared), None
    )
    if other is not None:
        raise AnchorsError(
            f"Prompt {other} does not begin with the demonstrations of prompt 0: they cannot be run once for all.",
            "Draw them with Draw(fresh=False). If the texts are the same, the tokenizer joins the last "
            "demonstration with the query: end the separator with a newline.",
        )
    return shared


@dataclass(frozen=True)
class Queries:
    """What follows the demonstrations, padded on the right.

    Attributes:
        ids: token ids; padding repeats the row's last token and is seen by no real one.
        target: column of each row's last token.
        label_ids: per class, the token that stands for it.
        gold: the right class; -1 where it is not known.
    """

    ids: Int[Tensor, "batch tokens"]
    target: Int[Tensor, " batch"]
    label_ids: Int[Tensor, "batch classes"]
    gold: Int[Tensor, " batch"]


def queries(prompts: Sequence[Prompt], start: int, device: torch.device | str) -> Queries:
    """The prompts from token `start` on, as one batch."""
    rows = [p.ids[start:] for p in prompts]
    width = max(map(len, rows))
    return Queries(
        ids=torch.tensor([[*r, *[r[-1]] * (width - len(r))] for r in rows], device=device),
        target=torch.tensor([len(r) - 1 for r in rows], device=device),
        label_ids=torch.tensor([p.label_ids for p in prompts], device=device),
        gold=torch.tensor([-1 if p.gold is None else p.gold for p in prompts], device=device),
    )


@torch.no_grad()
def answer(
    model: "LanguageModel", context: Context | None, batch: Queries
) -> Float[Tensor, "batch vocabulary"]:
    """Next-token logits at each query's target, on the shared context; float32 at least.

    Raises:
        AnchorsError: logits that are not numbers.
    """
    logits = model.logits_at(batch.ids, batch.target, context)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not torch.isfinite(logits).all():
        bad = (~torch.isfinite(logits)).any(-1).nonzero().flatten().tolist()
        raise AnchorsError(
            f"The logits of example(s) {bad} of the batch are not numbers: the model overflows.",
            "Use --precision float32 or bfloat16 (float16 overflows easily), and check the model's weights.",
        )
    return logits
