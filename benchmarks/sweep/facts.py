"""What an untouched model shows of itself: the causes for which a number may be refused. Imports nothing of the toolkit."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sweep.oracle import block_of, continued, runs, watching
from sweep.right import Asked, Group, entered, patched, streams_first

EVERY = (
    "logits",
    "padded",
    "maps",
    "sums",
    "shared",
    "isolation",
    "readout",
    "re-weighting",
    "compression",
    "patching",
)
ON_SHARED = EVERY[4:]
MOVED = 1e-4
USUAL = {
    "module",
    "query",
    "key",
    "value",
    "attention_mask",
    "s_aux",
    "position_ids",
    "cache_position",
    "position_embeddings",
}


@dataclass(frozen=True)
class Fact:
    """Something about a model that is not as the toolkit's numbers need it.

    Attributes:
        text: what the untouched model shows.
        numbers: which numbers it is a reason to refuse.
    """

    text: str
    numbers: tuple[str, ...]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-300))


@torch.no_grad()
def facts(model: nn.Module, groups: Sequence[Group]) -> list[Fact]:
    """What stands against some numbers."""
    found: list[Fact] = []
    for look in (
        _embedding,
        _interface,
        _calls,
        _returned,
        _handed,
        _causal,
        _prefix,
        _positions,
        _batch,
        _history,
        _cache,
        _continuing,
        _ties,
        _stream,
    ):
        try:
            found += look(model, groups)
        except Exception as error:  # noqa: BLE001 - that a model cannot do a thing is a fact about it
            name = look.__name__.strip("_")
            found.append(Fact(f"{name}: {type(error).__name__}: {str(error)[:160]}", _OF[name]))
    return found


_OF = {
    "embedding": EVERY, "interface": EVERY, "calls": EVERY, "returned": ("maps", "sums"), "handed": EVERY, "causal": EVERY, "prefix": ON_SHARED,
    "positions": EVERY, "batch": EVERY, "history": EVERY, "cache": ON_SHARED, "continuing": ON_SHARED, "ties": ON_SHARED, "stream": ("patching",),
}  # fmt: skip


def _short_long(groups: Sequence[Group]) -> tuple[Asked, Asked]:
    return groups[0].prompts[0], groups[-1].prompts[0]


def _embedding(model: nn.Module, groups: Sequence[Group]) -> Iterator[Fact]:
    table = model.get_input_embeddings()
    if not isinstance(getattr(table, "weight", None), Tensor):
        yield Fact(
            f"its tokens are embedded by a {type(table).__name__}, with a table for each codebook", EVERY
        )


def _interface(model: nn.Module, groups: Sequence[Group]) -> Iterator[Fact]:
    if not model._can_set_attn_implementation():
        yield Fact(
            "transformers itself cannot choose its attention function: it has attention code of its own",
            EVERY,
        )


def _calls(model: nn.Module, groups: Sequence[Group]) -> Iterator[Fact]:
    """One pattern in each layer?"""
    _, seen = runs(model, groups[0].prompts[0].ids)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    by_block = Counter(block_of(name) for name in seen.names)
    several = {block: n for block, n in by_block.items() if n > 1}
    if several:
        block, n = next(iter(several.items()))
        yield Fact(f"{len(several)} layers make several attention patterns ({block}: {n})", EVERY)
    if len(by_block) != layers:
        yield Fact(f"{len(by_block)} of {layers} layers make an attention pattern over all tokens", EVERY)
    if seen.fused:
        yield Fact(f"{seen.fused[0]} calls torch's fused attention itself", EVERY)
    heads = [pattern.shape[1] for pattern in seen.patterns]
    if len(set(heads)) > 1:
        yield Fact(f"layers have {heads} heads", ("re-weighting",))


def _returned(model: nn.Module, groups: Sequence[Group]) -> Iterator[Fact]:
    """Are the weights that the model returns those that its softmax made?"""
    ids = torch.tensor([groups[0].prompts[0].ids])
    with watching(model, ids.shape[1], ids.shape[1]) as seen:
        out = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, output_attentions=True
        )
    given = [a for a in getattr(out, "attentions", None) or () if a is not None]
    if len(given) != len(seen.patterns):
        yield Fact(
            f"returns {len(given)} attention matrices where softmax made {len(seen.patterns)}",
            ("maps", "sums"),
        )
        return
    worst = max((apart(a.reshape(p[..., : ids.shape[1]].shape), p[..., : ids.shape[1]]) for a, p in zip(given, seen.patterns, strict=True)), default=0)  # fmt: skip
    if worst > MOVED:
        yield Fact(f"the attention weights it returns are not what softmax made ({worst:.1e})", EVERY)


@contextmanager
def _hearing(model: nn.Module) -> Iterator[tuple[set[str], list[str]]]:
    """Names of the tensors that attention layers hand to their own eager attention function, and of masks with a gradient;
    and the modules that called it."""
    heard: set[str] = set()
    callers: list[str] = []
    homes = {sys.modules[type(module).__module__] for module in model.modules()}
    plain = {home: home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward")}

    def listening(function: Callable) -> Callable:
        def called(*args, **kwargs):
            callers.append(type(args[0]).__name__)
            heard.update(n for n, x in kwargs.items() if isinstance(x, Tensor) and n not in USUAL)
            mask = kwargs.get("attention_mask", args[4] if len(args) > 4 else None)
            if isinstance(mask, Tensor) and mask.requires_grad:
                heard.add("a mask that requires a gradient")
            return function(*args, **kwargs)

        return called

    for home, function in plain.items():
        home.eager_attention_forward = listening(function)
    try:
        yield heard, callers
    finally:
        for home, function in plain.items():
            home.eager_attention_forward = function


def _handed(model: nn.Module, groups: Sequence[Group]) -> Iterator[Fact]:
    with torch.enable_grad(), _hearing(model) as (heard, callers):
        _, seen = runs(model, groups[-1].prompts[0].ids)
    if len(callers) < len(seen.patterns):
        yield Fact(
            f"{len(seen.patterns)} attention patterns are made, {len(callers)} of them by the attention function that "
            "transformers lets one replace",
            EVERY,
        )
    if heard:
        yield Fact(f"layers hand more to their attention: {', '.join(sorted(heard))}", EVERY)


def _causal(model: nn.Module, groups: Sequence[Group]) -> Iterator[Fact]:
    for prompt in _short_long(groups):
        other = (*prompt.ids[:-1], prompt.label_ids[0])
        moved = apart(runs(model, other)[0][:-1], runs(model, prompt.ids)[0][:-1])
        if moved > MOVED:
            yield Fact(
                f"another last token moves earlier logits by {moved:.1e} ({len(prompt.ids)} tokens)", EVERY
            )
            return


def _prefix(model: nn.Module, groups: Sequence[Group]) -> Iterator[Fact]:
    for prompt in _short_long(groups):
        moved = apart(runs(model, prompt.ids)[0][: prompt.query], runs(model, prompt.ids[: prompt.query])[0])
        if moved > MOVED:
            yield Fact(
                f"logits of {prompt.query} demonstration tokens move by {moved:.1e} when {len(prompt.ids)} tokens are run",
                ON_SHARED,
            )
            return


def first_position(model: nn.Module, prompt: Asked) -> int | None:
    """The position of a prompt's first token, when the model is told positions; None where it is told none that fit."""
    plain = runs(model, prompt.ids)[0]
    padding = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None) or 0
    for first in (0, padding + 1, 1, 2):
        if apart(runs(model, prompt.ids, range(first, first + len(prompt.ids)))[0], plain) < MOVED:
            return first
    return None


def hears_positions(model: nn.Module, prompt: Asked) -> bool:
    twice = [2 * i for i in range(len(prompt.ids))]
    with suppress(TypeError):
        return apart(runs(model, prompt.ids, twice)[0], runs(model, prompt.ids)[0]) > MOVED
    return False


def _positions(model: nn.Module, groups: Sequence[Group]) -> Iterator[Fact]:
    if not hears_positions(model, groups[0].prompts[0]):
        yield Fact("other positions change no logit, or none are taken", ("compression",))
        return
    first = first_position(model, groups[0].prompts[0])
    if first is None:
        yield Fact("positions 0, 1, 2 … give other logits than none, and so do those after padding", EVERY)
    elif first:
        yield Fact(f"positions start at {first}", EVERY)


def _batch(model: nn.Module, groups: Sequence[Group]) -> Iterator[Fact]:
    prompts = _short_long(groups)
    width = max(len(p.ids) for p in prompts)
    ids = torch.tensor([[*p.ids, *[p.ids[-1]] * (width - len(p.ids))] for p in prompts])
    mask = torch.tensor([[1] * len(p.ids) + [0] * (width - len(p.ids)) for p in prompts])
    together = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for row, p in enumerate(prompts):
        moved = apart(together[row, : len(p.ids)], runs(model, p.ids)[0])
        if moved > MOVED:
            yield Fact(f"a prompt of {len(p.ids)} tokens changes by {moved:.1e} in a padded batch", EVERY)


def _history(model: nn.Module, groups: Sequence[Group]) -> Iterator[Fact]:
    short, long = _short_long(groups)
    before = runs(model, short.ids)[0]
    runs(model, long.ids)
    moved = apart(runs(model, short.ids)[0], before)
    if moved > MOVED:
        yield Fact(f"the same prompt gives other logits after a longer one ({moved:.1e})", EVERY)


def _cache(model: nn.Module, groups: Sequence[Group]) -> Iterator[Fact]:
    """Is what a layer keeps keys and values, and does each layer keep its own?"""
    ids = torch.tensor([groups[0].prompts[0].ids])
    cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    _, seen = runs(model, groups[0].prompts[0].ids)
    layers = getattr(cache, "layers", None)
    if layers is None:
        yield Fact(f"its cache is a {type(cache).__name__}", ON_SHARED)
        return
    plain = {"DynamicLayer", "DynamicSlidingWindowLayer"}
    other = sorted({type(layer).__name__ for layer in layers} - plain)
    if other:
        yield Fact(f"layers keep more than keys and values: {', '.join(other)}", ON_SHARED)
    filled = sum(getattr(layer, "keys", None) is not None for layer in layers)
    if filled < len(seen.patterns):
        yield Fact(f"{filled} layers keep keys and values, {len(seen.patterns)} attend", ON_SHARED)


def _continuing(model: nn.Module, groups: Sequence[Group]) -> Iterator[Fact]:
    for prompt in _short_long(groups):
        rest = continued(model, prompt.ids[: prompt.query], prompt.ids[prompt.query :])
        moved = apart(rest, runs(model, prompt.ids)[0][prompt.query :])
        if moved > MOVED:
            yield Fact(
                f"going on after {prompt.query} cached tokens changes the logits by {moved:.1e}", ON_SHARED
            )
            return


class _TopK(TorchFunctionMode):
    """Looks at each choice of some of so many keys: is the last that is chosen worth more than the first that is not?"""

    def __init__(self, keys: int) -> None:
        super().__init__()
        self.keys, self.ties = keys, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.topk, Tensor.topk) and args[0].shape[-1] == self.keys:
            k = args[1] if len(args) > 1 else kwargs["k"]
            if k < self.keys:
                ordered = args[0].sort(-1, descending=True).values
                seen = ordered[..., k] > torch.finfo(ordered.dtype).min / 2
                self.ties += int(((ordered[..., k - 1] == ordered[..., k]) & seen).sum())
        return function(*args, **(kwargs or {}))


def _ties(model: nn.Module, groups: Sequence[Group]) -> Iterator[Fact]:
    """Is which keys a query reads a matter of chance?"""
    prompt = groups[-1].prompts[0]
    with _TopK(len(prompt.ids)) as mode:
        runs(model, prompt.ids)
    if mode.ties:
        yield Fact(
            f"in {mode.ties} choices of keys the last one chosen scores like the first one left out: which is read is chance",
            ON_SHARED,
        )


def _stream(model: nn.Module, groups: Sequence[Group]) -> Iterator[Fact]:
    """Does all that differs between two prompts enter the first layer by the residual stream, and by a single one?"""
    own, other = groups[0].prompts[0], groups[0].exchanged[0]
    first = block_of(runs(model, own.ids)[1].names[0])
    state = entered(model, own.ids, first)
    if state.dim() > 3:
        moved = float(patched(model, own, other, [first], one=True)["stream/0"])
        if moved > 1e-3:
            yield Fact(
                f"{len(streams_first(state, len(own.ids)))} residual streams enter {first} side by side, a tensor of shape "
                f"{list(state.shape)}; with the first of them exchanged, label logits are {moved:.1e} from the other prompt's",
                ("patching",),
            )
    moved = float(patched(model, own, other, [first])["stream/0"])
    if moved > 1e-3:
        yield Fact(
            f"with {'the stream' if state.dim() == 3 else 'all streams'} before {first} exchanged, label logits are {moved:.1e} from the other prompt's",
            ("patching",),
        )
