"""Demonstrations run once: keys and values on which any number of queries continue, with unchanged numbers."""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from anchors.attention.selection import untied
from anchors.errors import AnchorsError
from anchors.model.lengths import CHOOSING
from anchors.tasks.prompts import Prompt

if TYPE_CHECKING:
    from anchors.model.language import LanguageModel


@dataclass(frozen=True)
class Context:
    """The keys and values of some tokens in every layer, and where the next token stands.

    Attributes:
        ids: the tokens.
        positions: the position of each.
        keys, values: by layer, as the family caches them, [1, kv_heads, tokens, dim]: after rotary embedding; the
            latent ones where it caches those (DeepSeek); None in a layer that reads those of an earlier one.
        next: position of the token that follows.
        length: how many tokens had been run when they were encoded. Some rotary embeddings depend on it.
        indices: by layer, the keys of a sparse index, [1, (1,) tokens, dim]; None in a layer without.
        kinds: by layer, the class of transformers' cache layer that holds this.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    keys: tuple[Float[Tensor, "1 _heads tokens _dim"] | None, ...]
    values: tuple[Float[Tensor, "1 _heads tokens _dim"] | None, ...]
    next: int
    length: int
    indices: tuple[Float[Tensor, "1 *one tokens _dim"] | None, ...]
    kinds: tuple[type, ...]

    @property
    def bytes(self) -> int:
        """Memory of the keys and values, and of the keys of an index."""
        held = (t for t in (*self.keys, *self.values, *self.indices) if t is not None)
        return sum(t.numel() * t.element_size() for t in held)

    def cache(self, batch: int = 1) -> DynamicCache:
        """A fresh transformers cache for a batch, sharing this memory until it grows.

        Layers without a window throughout: a sliding window is the mask's business, and a cache that forgot what is
        outside the window could not be cut.
        """
        cache = DynamicCache()
        positions = torch.tensor([self.positions])
        for kind, keys, values, index in zip(self.kinds, self.keys, self.values, self.indices, strict=True):
            layer = kind()
            if keys is not None and values is not None:
                layer.lazy_initialization(keys, values)
                layer.keys = keys.expand(batch, -1, -1, -1)
                layer.values = values.expand(batch, -1, -1, -1)
            if index is not None:
                grow = getattr(layer, "update_indexer", None) or layer.update_index
                grow(index.expand(batch, *index.shape[1:]))
            layer.positions = positions
            cache.layers.append(layer)
        return cache

    def keep(self, tokens: Sequence[int], next: int) -> "Context":
        """Only some of the tokens, by index; what follows starts at position `next`.

        Raises:
            AnchorsError: no token, or a family that counts blocks of keys.
        """
        if not tokens:
            raise AnchorsError(
                "No token of the demonstrations is to be kept.",
                "Keep the label words at least.",
                code="option-value",
            )
        if any(hasattr(kind, "update_index") for kind in self.kinds):
            raise AnchorsError(
                "The sparse index of this family chooses blocks of neighbouring keys: without some of the tokens "
                "the blocks would be others.",
                "Compress the demonstrations of another model.",
                code="no-shared-context",
            )
        chosen = torch.tensor(list(tokens))

        def kept(held: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
            return tuple(None if x is None else x.index_select(-2, chosen.to(x.device)) for x in held)

        return Context(
            ids=tuple(self.ids[i] for i in tokens),
            positions=tuple(self.positions[i] for i in tokens),
            keys=kept(self.keys),
            values=kept(self.values),
            next=next,
            length=self.length,
            indices=kept(self.indices),
            kinds=self.kinds,
        )


def cache_argument(model: nn.Module) -> str:
    """What the forward pass of a model calls its cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def keeping(model: nn.Module, columns: Tensor) -> dict[str, Any]:
    """The argument that asks a model for the logits of some columns only; none where its `forward` does not name it.

    A `forward` that takes anything may hand it on to its attention (Whisper). What comes back then has all columns.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    # Where a model is spread, accelerate moves tensors to its first device; the states they index are on its last.
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    return {"logits_to_keep": columns.cpu().numpy() if spread else columns}


def fresh_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache of the kind the family itself makes, but without windows.

    Raises:
        AnchorsError: a layer keeps more than keys and values (a recurrent or convolutional state, compressed keys).
    """
    cache = DynamicCache(config=model.config)
    kinds = [type(layer).__name__ for layer in cache.layers]
    for i, layer in enumerate(cache.layers):
        if kinds[i] in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            cache.layers[i] = DynamicLayer()
        elif kinds[i] not in ("DynamicIndexedLayer", "DummyLayer") and not hasattr(layer, "update_index"):
            raise AnchorsError(
                f"Layer {i} of {type(model).__name__} caches more than keys and values (a state, {kinds[i]}): "
                "demonstrations cannot be run once and shared by many queries.",
                "Use flow or view, which run every prompt as a whole, or another model.",
                code="no-shared-context",
            )
    # Where all layers are plain, the cache grows as many as are used.
    return DynamicCache() if all(type(layer) is DynamicLayer for layer in cache.layers) else cache


@torch.no_grad()
def encode(model: "LanguageModel", ids: Sequence[int], context: Context | None = None) -> Context:
    """Run tokens, after those of `context` if given; open the seam around it for edits and probes.

    Raises:
        AnchorsError: the model's cache holds other things than the keys and values of these tokens, or `context`
            cannot be continued that far (see `LanguageModel.demand_one_side`).
    """
    start = 0 if context is None else context.next
    model.demand_one_side([start + len(ids)], None if context is None else context.length)
    cache = fresh_cache(model.model) if context is None else context.cache()
    tokens = torch.tensor([list(ids)], device=model.device)
    positions = model.positions(tokens, context)
    # A tensor: with a number some families drop positions on the way, and their keys would be missing.
    last = torch.tensor([len(ids) - 1], device=model.device)
    past = {"use_cache": True, cache_argument(model.model): cache}
    with model.arithmetic(), _determined(model):
        model.model(input_ids=tokens, **positions, **keeping(model.model, last), **past)
    before, stood = (context.ids, context.positions) if context else ((), ())
    layers = cache.layers
    found = Context(
        ids=(*before, *ids),
        positions=(*stood, *range(start, start + len(ids))),
        keys=tuple(getattr(layer, "keys", None) for layer in layers),
        values=tuple(getattr(layer, "values", None) for layer in layers),
        next=start + len(ids),
        length=start + len(ids),
        indices=tuple(getattr(x, "indexer_keys", getattr(x, "idx_keys", None)) for x in layers),
        kinds=tuple(type(layer) for layer in layers),
    )
    _demand_filled(model, found)
    return found


def _determined(model: "LanguageModel") -> AbstractContextManager[None]:
    """Where a sparse index chooses by chance, a context is not the beginning of the whole prompt."""
    return untied(model.model) if any(c.what in CHOOSING for c in model.changes) else nullcontext()


def _demand_filled(model: "LanguageModel", found: Context) -> None:
    held = [t.shape[-2] for t in (*found.keys, *found.indices) if t is not None]
    if not held or set(held) != {len(found.ids)}:
        raise AnchorsError(
            f"The cache of {model.name} holds {sorted(set(held)) or 'no'} keys of {len(found.ids)} tokens: "
            "demonstrations cannot be run once and shared by many queries.",
            "Use flow or view, which run every prompt as a whole, or another model.",
            code="no-shared-context",
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
            code="no-shared-context",
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
        AnchorsError: logits that are not numbers; a sparse index that chooses by chance (see `untied`).
    """
    with nullcontext() if context is None else _determined(model):
        logits = model.logits_at(batch.ids, batch.target, context)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not torch.isfinite(logits).all():
        bad = (~torch.isfinite(logits)).any(-1).nonzero().flatten().tolist()
        raise AnchorsError(
            f"The logits of example(s) {bad} of the batch are not numbers: the model overflows.",
            "Use --precision float32 or bfloat16 (float16 overflows easily), and check the model's weights.",
            code="not-finite",
        )
    return logits
