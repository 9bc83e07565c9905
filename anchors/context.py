"""Demonstrations run once: keys and values on which any number of queries continue, with unchanged numbers."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

from anchors.attention.edits import Edit
from anchors.attention.seam import editing, idle
from anchors.attention.selection import untied
from anchors.errors import AnchorsError
from anchors.model.lengths import CHOOSING
from anchors.model.replay import TOKENS, replayed, told_apart
from anchors.tasks.prompts import Prompt

if TYPE_CHECKING:
    from anchors.model.language import LanguageModel

BUCKET = 16
"""Queries that may be replayed are padded to a multiple of so many tokens, so that there are few shapes of them."""


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
        states: by layer, what a recurrent layer keeps, as transformers' cache layer has it (tensors [1, …] by number within
            their names); None in a layer without.
        again: where a family does not go on from its states, the edits under which its tokens are run again before every
            query, as whole prompts; nothing is held then. None where they are not.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    keys: tuple[Float[Tensor, "1 _heads tokens _dim"] | None, ...]
    values: tuple[Float[Tensor, "1 _heads tokens _dim"] | None, ...]
    next: int
    length: int
    indices: tuple[Float[Tensor, "1 *one tokens _dim"] | None, ...]
    kinds: tuple[type, ...]
    states: tuple[dict[str, Any] | None, ...] = ()
    again: tuple[Edit, ...] | None = None

    @property
    def bytes(self) -> int:
        """Memory of the keys and values, of the keys of an index, and of recurrent states."""
        held = (t for t in (*self.keys, *self.values, *self.indices) if t is not None)
        return sum(t.numel() * t.element_size() for t in held) + self.state_bytes

    @property
    def state_bytes(self) -> int:
        """Memory of recurrent states, which does not grow with the tokens."""
        held = (x for own in self.states for x in tree_leaves(own) if isinstance(x, Tensor))
        return sum(t.numel() * t.element_size() for t in held)

    @property
    def plain(self) -> bool:
        """Whether it is keys and values, in every layer, and nothing else."""
        held = (*self.keys, *self.values)
        return (
            self.again is None
            and not any(self.states)
            and all(isinstance(x, Tensor) for x in held)
            and not any(isinstance(x, Tensor) for x in self.indices)
        )

    def cache(self, batch: int = 1) -> DynamicCache:
        """A fresh transformers cache for a batch, sharing this memory until it grows.

        Layers without a window throughout: a sliding window is the mask's business, and a cache that forgot what is
        outside the window could not be cut. Recurrent states are copied, for each row: a family writes over them.
        """
        cache = DynamicCache()
        positions = torch.tensor([self.positions])
        states = self.states or (None,) * len(self.kinds)
        for kind, keys, values, index, state in zip(
            self.kinds, self.keys, self.values, self.indices, states, strict=True
        ):
            layer = kind()
            vars(layer).update(tree_map(lambda x: _repeated(x, batch), state or {}))
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

    def forget(self, name: str) -> "Context | None":
        """The same with states of one name set to zero; None where there are none."""
        states = tuple(
            own and own | {name: tree_map(lambda x: x * 0 if isinstance(x, Tensor) else x, own.get(name))}
            for own in self.states
        )
        there = any(isinstance(x, Tensor) for own in states for x in tree_leaves(own and own.get(name)))
        return replace(self, states=states) if there else None

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
        if self.again is not None or any(self.states):
            raise AnchorsError(
                "Recurrent layers keep the demonstrations in a state, in which all tokens are mixed: it cannot be had without "
                "some of them.",
                "Compress the demonstrations of a model whose layers all attend.",
                code="no-shared-context",
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


def _repeated(x: Any, batch: int) -> Any:
    """A state for each row, in memory of its own."""
    return x.expand(batch, *x.shape[1:]).clone() if isinstance(x, Tensor) else x


def _state(layer: Any) -> dict[str, Any] | None:
    """What a cache layer keeps of a recurrent one: all that is there by the number of a state."""
    if not hasattr(layer, "recurrent_states"):
        return None
    numbered = {name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)}
    return numbered | {"dtype": layer.dtype, "device": layer.device}


def fresh_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache of the kind the family itself makes, but without windows.

    Raises:
        AnchorsError: a layer keeps more than keys and values and transformers' own recurrent states (compressed keys, say).
    """
    cache = DynamicCache(config=model.config)
    kinds = [type(layer).__name__ for layer in cache.layers]
    for i, layer in enumerate(cache.layers):
        if kinds[i] in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            cache.layers[i] = DynamicLayer()
        elif kinds[i] == "LinearAttentionAndSlidingWindowAttentionLayer":
            cache.layers[i] = LinearAttentionAndFullAttentionLayer()
        elif kinds[i] in ("LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer"):
            continue
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
            cannot be continued that far (see `LanguageModel.demand_one_side`), or by one token from a recurrent state.
    """
    start = 0 if context is None else context.next
    model.demand_one_side([start + len(ids)], None if context is None else context.length)
    tokens = torch.tensor([list(ids)], device=model.device)
    positions = model.positions(tokens, context)
    if not model.carries:
        return _run_again(model, tokens, context)
    if len(ids) == 1 and context is not None and any(context.states):
        raise AnchorsError(
            f"A state that {model.name} has run to cannot be kept one token on: some recurrent families step a single token in other "
            "arithmetic than several (Nemotron-H).",
            "Run the tokens with those before them, or several at once.",
            code="no-shared-context",
        )
    # A tensor: with a number some families drop positions on the way, and their keys would be missing.
    last = torch.tensor([len(ids) - 1], device=model.device)
    cache = fresh_cache(model.model) if context is None else context.cache()
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
        states=tuple(map(_state, layers)),
    )
    _demand_filled(model, found)
    return found


def _run_again(model: "LanguageModel", tokens: Int[Tensor, "1 tokens"], context: Context | None) -> Context:
    """A context that holds its tokens only. They are run here once, for edits and probes."""
    if context is not None and editing():
        raise AnchorsError(
            f"{model.name} runs whole prompts: an edit of what follows a context could not be kept with it.",
            "Edit the context, or the queries.",
            code="no-shared-context",
        )
    last = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
    model.logits(tokens, last, context)
    before = () if context is None else context.ids
    ids = (*before, *tokens[0].tolist())
    edits = editing() if context is None else context.again
    return Context(
        ids, tuple(range(len(ids))), keys=(), values=(), next=len(ids), length=len(ids), indices=(), kinds=(), again=edits
    )  # fmt: skip


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


def on_context(
    model: "LanguageModel",
    name: str,
    context: Context,
    step: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """`step(context, *inputs)`; on CUDA one order from its third run on, on contexts of the same length, see `anchors.model.replay`.

    Args:
        name: of the step, and of all that it reads beside the model, the context and `inputs`.
        step: waits for the GPU nowhere; returns tensors without a gradient.
    """
    if not _replayable(model, context):
        return step(context, *inputs)
    layers, held = len(context.keys), [x for x in (*context.keys, *context.values) if x is not None]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        own = replace(context, keys=given[:layers], values=given[layers : 2 * layers])
        return step(own, *given[2 * layers :])

    key = name, model.precision, context.positions, context.next, context.length, context.kinds
    return replayed(model.model, key, run, (*held, *inputs))


def _replayable(model: "LanguageModel", context: Context) -> bool:
    """What opened the seam would not see a replayed step, and a length at which attention changes is asked of numbers."""
    return model.device.type == "cuda" and context.plain and not model.changes and idle()


@torch.no_grad()
def answer(
    model: "LanguageModel", context: Context | None, batch: Queries
) -> Float[Tensor, "batch vocabulary"]:
    """Next-token logits at each query's target, on the shared context; float32 at least.

    Raises:
        AnchorsError: logits that are not numbers; a sparse index that chooses by chance (see `untied`).
    """
    if context is not None and batch.ids.numel() <= TOKENS and _replayable(model, context):
        (logits,) = on_context(
            model, "answer", context, partial(_answered, model), _bucketed(model, context, batch)
        )
    else:
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


def _answered(
    model: "LanguageModel",
    context: Context,
    ids: Int[Tensor, "batch tokens"],
    columns: Int[Tensor, " columns"],
    where: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch vocabulary"]]:
    """`LanguageModel.logits_at`, its columns told apart before."""
    logits = model.logits(ids, columns, context)
    return (logits[torch.arange(len(ids), device=logits.device), where],)


def _bucketed(model: "LanguageModel", context: Context, batch: Queries) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, the columns that are asked for, and which of them each row asks for, padded to one of few shapes."""
    width = -(-batch.ids.shape[1] // BUCKET) * BUCKET
    if model.context is not None:
        width = max(batch.ids.shape[1], min(width, model.context - context.next))
    ids = torch.cat([batch.ids, batch.ids[:, -1:].expand(-1, width - batch.ids.shape[1])], 1)
    columns, where = told_apart(batch.target.tolist())
    return ids, torch.tensor(columns, device=ids.device), torch.tensor(where, device=ids.device)
