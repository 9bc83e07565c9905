"""An untouched model, watched and changed where its own eager attention calls softmax. Imports nothing of the toolkit.

Whatever a family does before and after, its attention pattern is what a softmax over the keys returns. Inside `watching`
every such call is caught (torch's function mode: above autograd, below nobody's module), so that a score can be hidden
before it, an entry be multiplied after it, and ∂L/∂A be asked of autograd, without a line that knows the family. The
right values of the paper's formulas (Wang et al. 2023) are written out in plain Python in `sweep.right`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

SIGMOID = {torch.sigmoid, F.sigmoid, Tensor.sigmoid}
SOFTMAX = {torch.softmax, torch.special.softmax, F.softmax, Tensor.softmax}
Change = Callable[[int, Tensor], Tensor]
"""From the number of an attention call and its scores (or its pattern), [batch, heads, queries, keys], to new ones."""


@dataclass
class Seen:
    """The attention calls of one run, in the order in which they came.

    Attributes:
        patterns: what each softmax returned, [batch, heads, queries, keys (and sinks)].
        visible: which keys a query sees in each, before anything is changed, [queries, keys (and sinks)].
        shares: the factor on each query's output by which a family takes a sink into account beside the softmax, as the sigmoid
            of the scores' logsumexp less the sink, [batch, heads, queries, 1]; 1 where there is none.
        names: the module that each was called in.
        fused: modules that called torch's fused attention, which shows no pattern.
    """

    patterns: list[Tensor] = field(default_factory=list)
    visible: list[Tensor] = field(default_factory=list)
    shares: list[Tensor | float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)


class _Softmax(TorchFunctionMode):
    def __init__(
        self, queries: int, keys: int, running: list[str], before: Change | None, after: Change | None
    ) -> None:
        super().__init__()
        self.sizes, self.running, self.before, self.after = (queries, keys), running, before, after
        self.seen = Seen()
        self.share: Tensor | float | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is F.scaled_dot_product_attention:
            self.seen.fused.append(self.running[-1] if self.running else "")
        if function is torch.logsumexp and self._attends(args[0]):
            grouped = args[0] if self.before is None else self.before(len(self.seen.patterns), args[0])
            self.share = 1.0  # the next sigmoid is the share
            return function(grouped, *args[1:], **kwargs)
        if function in SIGMOID and self.share is not None:
            self.share = function(*args, **kwargs)
            return self.share
        if function not in SOFTMAX or not self._attends(scores := args[0] if args else kwargs["input"]):
            return function(*args, **kwargs)
        if scores.dtype == torch.float64:
            kwargs.pop("dtype", None)  # float32 in the middle of a float64 model helps nobody
        layer = len(self.seen.patterns)
        grouped = scores.view(len(scores), -1, *scores.shape[-2:]) if scores.dim() != 3 else scores[None]
        self.seen.visible.append((grouped.detach() > torch.finfo(scores.dtype).min / 2).flatten(0, 1).any(0))
        if self.before is not None:
            grouped = self.before(layer, grouped)
        pattern = function(
            grouped.reshape(scores.shape), *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}
        )
        grouped = pattern.reshape(grouped.shape)
        self.seen.patterns.append(grouped)
        self.seen.shares.append(self.share[..., None] if isinstance(self.share, Tensor) else 1.0)
        self.share = None
        self.seen.names.append(self.running[-1] if self.running else "")
        return (grouped if self.after is None else self.after(layer, grouped)).reshape(scores.shape)

    def _attends(self, scores: Tensor) -> bool:
        queries, keys = self.sizes
        return scores.dim() >= 3 and scores.shape[-2] == queries and keys <= scores.shape[-1] <= keys + 1


class _Narrow(TorchFunctionMode):
    """Looks for what depends on weights and is in float32."""

    found = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32 and out.requires_grad:
            self.found = True
        return out


def rounds(model: nn.Module, ids: Sequence[int]) -> bool:
    """Whether a model in float64, whose weights require gradients, computes some things in float32 all the same."""
    with _Narrow() as mode:
        runs(model, ids)
    return mode.found


@contextmanager
def watching(
    model: nn.Module, queries: int, keys: int, before: Change | None = None, after: Change | None = None
) -> Iterator[Seen]:
    """Catch the attention of the one run inside: `queries` rows over `keys` columns (a sink may add one)."""
    running: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
            leave = module.register_forward_hook(lambda *_: running.pop() * 0 or None, always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        mode = stack.enter_context(_Softmax(queries, keys, running, before, after))
        yield mode.seen


def block_of(name: str) -> str:
    """The layer that a module stands in: everything up to the first number in its name."""
    found = re.match(r"(?:.*?\.)??(\d+)(?=\.|$)", name)
    return name[: found.end()] if found else name


def runs(
    model: nn.Module,
    ids: Sequence[int],
    positions: Sequence[int] | None = None,
    before: Change | None = None,
    after: Change | None = None,
) -> tuple[Tensor, Seen]:
    """Logits [tokens, vocabulary] of one whole prompt, asked the plain way, and its attention."""
    tokens = torch.tensor([list(ids)])
    more = {} if positions is None else {"position_ids": torch.tensor([list(positions)])}
    with watching(model, len(ids), len(ids), before, after) as seen:
        out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **more)
    return out.logits[0], seen


def hiding(entries: Callable[[int], Tensor | None]) -> Change:
    """Set scores to −∞ where `entries` of the call, booleans [queries, keys], says so; None leaves a call alone."""

    def change(layer: int, scores: Tensor) -> Tensor:
        hidden = entries(layer)
        if hidden is None:
            return scores
        wide = F.pad(hidden, (0, scores.shape[-1] - hidden.shape[-1]))
        return scores.masked_fill(wide, torch.finfo(scores.dtype).min)

    return change


def continued(
    model: nn.Module,
    before: Sequence[int],
    after: Sequence[int],
    kept: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    plain: bool = False,
) -> Tensor:
    """Logits of `after` on transformers' own cache of `before`, of which only some tokens are `kept`.

    The cache is the one that the model makes itself, or a `plain` one, in which windows forget nothing.
    """

    def ones(length: int) -> Tensor:
        return torch.ones(1, length, dtype=torch.long)

    own = {"past_key_values": DynamicCache()} if plain else {}
    cache = model(
        input_ids=torch.tensor([list(before)]), attention_mask=ones(len(before)), use_cache=True, **own
    ).past_key_values
    if kept is not None:
        index = torch.tensor(list(kept))
        for layer in cache.layers:
            for name, x in vars(layer).items():
                if isinstance(x, Tensor) and x.dim() >= 3 and x.shape[-2] == len(before):
                    setattr(layer, name, x.index_select(-2, index))
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = len(index)
    length = (len(before) if kept is None else len(kept)) + len(after)
    more = {} if positions is None else {"position_ids": torch.tensor([list(positions)])}
    out = model(
        input_ids=torch.tensor([list(after)]),
        attention_mask=ones(length),
        past_key_values=cache,
        use_cache=True,
        **more,
    )
    return out.logits[0]


@contextmanager
def entering(model: nn.Module, block: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put `change` of the residual stream in the place of what enters a layer, in the runs inside."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    handle = model.get_submodule(block).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
