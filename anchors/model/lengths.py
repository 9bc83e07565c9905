"""The lengths of a prompt at which a model's configuration changes its attention."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from anchors.errors import AnchorsError


@dataclass(frozen=True)
class Change:
    """A length beyond which attention is another than below it.

    Attributes:
        length: the longest prompt, in tokens, that is still on the near side.
        what: what begins beyond it.
        rotary: beyond it the positions of the whole row are encoded otherwise: rows of the two sides cannot share a
            batch, and keys made on one side cannot be read from the other.
        each: beyond it every length is encoded in its own way (dynamic NTK), so that no two lengths share a batch.
    """

    length: int
    what: str
    rotary: bool = False
    each: bool = False


WINDOW, CHUNK, LOCAL = "sliding window", "attention chunk", "local attention"
KEPT, INDEX = "kept keys (top-k)", "sparse index (top-k)"
HIDING = (WINDOW, CHUNK, LOCAL, KEPT, INDEX)
"""What hides some of the earlier tokens from a query."""
CHOOSING = (KEPT, INDEX)
"""What does so by their scores."""


def changes(config: PreTrainedConfig) -> tuple[Change, ...]:
    """The changes that a configuration (of its text part) names, by length, without doubles.

    Read are sliding windows and local attention, attention chunks, sparse indices (top-k of tokens or of blocks of
    them), and rotary or attention scaling that depends on the original context: longrope, dynamic NTK, YaRN, Llama 4's
    temperature.

    Example:
        >>> changes(MistralConfig(sliding_window=16))
        (Change(length=16, what='sliding window', rotary=False, each=False),)
    """
    text = config.get_text_config(decoder=True)
    found = {*_windows(text), *_indices(text), *_rotary(text)}
    return tuple(sorted((c for c in found if c.length > 0), key=lambda c: (c.length, c.what)))


def side(found: tuple[Change, ...], length: int) -> tuple[int, ...]:
    """On which side of every rotary change a prompt lies: prompts with equal sides may share a context."""
    return tuple((length if c.each else 1) if length > c.length else 0 for c in found if c.rotary)


def alike(found: tuple[Change, ...], length: int) -> tuple[int, ...]:
    """Prompts for which this is equal may share a batch.

    Beyond a top-k of keys they have one length, too: where scores are equal, torch.topk chooses by the number of keys,
    padding included.
    """
    width = length if any(c.what in CHOOSING and length > c.length for c in found) else 0
    return (*side(found, length), width)


def groups(found: tuple[Change, ...], lengths: Sequence[int]) -> list[list[int]]:
    """Indices of prompts that may share a batch, in order of their first one."""
    by_side: dict[tuple[int, ...], list[int]] = {}
    for i, length in enumerate(lengths):
        by_side.setdefault(alike(found, length), []).append(i)
    return list(by_side.values())


def demand_one_side(
    found: tuple[Change, ...], lengths: Sequence[int], encoded: int | None = None, name: str = "The model"
) -> None:
    """Refuse what would be computed with the positions of another length.

    Args:
        found: of `changes`.
        lengths: of the rows of a batch, cached tokens included, in tokens.
        encoded: at which length the cached keys were made, if there are any.
        name: of the model, for the error.

    Raises:
        AnchorsError: they lie on different sides of a rotary change.
    """
    everything = [*lengths, *([] if encoded is None else [encoded])]
    if not everything:
        return
    low, high = min(everything), max(everything)
    if side(found, low) == side(found, high):
        return
    change = next(c for c in found if c.rotary and (high > c.length))
    what = (
        f"prompts of {low} and {high} tokens share a batch"
        if encoded is None
        else f"demonstrations run at {encoded} tokens are continued to {max(lengths)}"
    )
    remedy = (
        "Run them in separate batches."
        if encoded is None
        else f"Use another number of --shots, so that all lies on one side of {change.length} tokens."
    )
    raise AnchorsError(
        f"{name} encodes positions otherwise in prompts longer than {change.length} tokens ({change.what}), and {what}.",
        remedy,
        code="positions",
    )


def without_memory(model: nn.Module) -> None:
    """Let rotary embeddings of dynamic length forget earlier prompts.

    transformers keeps the frequencies of the longest prompt so far until a short one comes; a fresh model computes
    those of the prompt at hand. Here every call is one of a fresh model.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {"": kinds}
        dynamic = [name for name, kind in by_layer.items() if isinstance(kind, str) and "dynamic" in kind]
        if dynamic:
            module.register_forward_pre_hook(partial(_forget, dynamic))


def _forget(layer_types: list[str], module: Any, args: tuple) -> None:
    for name in layer_types:
        prefix = f"{name}_" if name else ""
        original = getattr(module, f"{prefix}original_inv_freq")
        home = getattr(module, f"{prefix}inv_freq").device
        module.register_buffer(f"{prefix}inv_freq", original.to(home), persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _values(config: PreTrainedConfig, name: str) -> Iterator[Any]:
    """A setting of the configuration, or of those of its layers where they have their own."""
    try:
        yield getattr(config, name, None)
    except (AttributeError, RuntimeError):  # what configurations raise where the value differs by layer
        yield None
    try:
        own = dict(getattr(config, "per_layer_config", None) or {})
    except (AttributeError, TypeError, ValueError):
        own = {}  # no layers of its own, as in a configuration of several towers
    for part in own.values():
        yield part.get(name) if isinstance(part, dict) else getattr(part, name, None)


def numbers(config: PreTrainedConfig, name: str) -> Iterator[int]:
    """A positive whole number of the configuration, or those of its layers where they have their own."""
    for value in _values(config, name):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield value


def _windows(config: PreTrainedConfig) -> Iterator[Change]:
    kinds = getattr(config, "layer_types", None)

    def some(*words: str) -> bool:
        return kinds is None or any(word in str(kind) for kind in kinds for word in words)

    if getattr(config, "use_sliding_window", None) is not False and some("sliding", "compressed", "local"):
        yield from (Change(n, WINDOW) for n in numbers(config, "sliding_window"))
    if some("chunked"):
        yield from (Change(n, CHUNK) for n in numbers(config, "attention_chunk_size"))
    if "local" in (getattr(config, "attention_layers", None) or ()):
        yield from (Change(n, LOCAL) for n in numbers(config, "window_size"))
    yield from (Change(n, KEPT) for n in numbers(config, "keep_window_size"))


def _indices(config: PreTrainedConfig) -> Iterator[Change]:
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    if kinds and not any("index" in kind or "sparse" in kind for kind in kinds):
        return
    rates = getattr(config, "compress_rates", None) or {}
    rate = min(rates.values(), default=1) if isinstance(rates, dict) else 1
    yield from (Change(n * rate, INDEX) for n in numbers(config, "index_topk"))
    for block in numbers(config, "index_block_size"):
        blocks = next(numbers(config, "index_topk_blocks"), 0)
        yield Change(block * blocks, INDEX)
    for budget in numbers(config, "indexer_budget"):
        tail = next(numbers(config, "indexer_compress_ratio"), 1) - 1  # an incomplete block is always seen
        yield Change(budget + tail, INDEX)


def _rotary(config: PreTrainedConfig) -> Iterator[Change]:
    for parameters in _values(config, "rope_parameters"):
        own = parameters if isinstance(parameters, dict) else {}
        by_type = [part for part in own.values() if isinstance(part, dict)]
        for rope in by_type or [own]:
            yield from _scaled(config, rope)
    if getattr(config, "attn_temperature_tuning", False):
        yield from (Change(n - 1, "attention temperature") for n in numbers(config, "floor_scale"))


def _scaled(config: PreTrainedConfig, rope: dict[str, Any]) -> Iterator[Change]:
    kind = rope.get("rope_type", rope.get("type")) or ""
    original = rope.get("original_max_position_embeddings")
    if kind == "longrope":
        original = original or getattr(config, "original_max_position_embeddings", None)
        if original:
            yield Change(int(original), "longrope's original context", rotary=True)
    elif "dynamic" in kind:
        if longest := getattr(config, "max_position_embeddings", None):
            yield Change(int(longest), "dynamic NTK", rotary=True, each=True)
    elif kind == "yarn" and original:
        yield Change(int(original), "YaRN's original context")
    if original and rope.get("llama_4_scaling_beta"):
        yield Change(int(original), "attention temperature")
