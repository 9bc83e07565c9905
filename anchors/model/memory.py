"""What a pass keeps for its gradient, and whether the blocks of a model are computed twice instead."""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anchors.attention.form import Call
from anchors.attention.seam import seam
from anchors.attention.taps import Slopes
from anchors.errors import AnchorsError
from anchors.model.recompute import blocks_of, recomputing
from anchors.model.replay import TOKENS
from anchors.model.witness import TOLERANCE

if TYPE_CHECKING:
    from anchors.model.language import LanguageModel

SHARE = 0.25
"""Of the memory of a device, what a pass may keep before blocks are computed twice."""
PROBE = 64
"""Tokens on which it is found out what a pass keeps for each."""


class _Listener:
    """A tap that keeps ∂L/∂z of every layer."""

    def __init__(self, layers: int) -> None:
        self.layers = frozenset(range(layers))
        self.dz: dict[int, Tensor] = {}

    def begin(self, call: Call, z: Tensor, dz: Tensor) -> None:
        self.dz[call.layer] = dz

    def tile(self, call: Call, rows: Tensor, keys: slice, product: Tensor) -> None:
        pass

    def fused(self, call: Call, slopes: Slopes) -> None:
        self.dz[call.layer] = slopes.dz


@dataclass(frozen=True)
class Kept:
    """What a model keeps of a pass, in bytes for each token.

    Attributes:
        plainly: all that the gradient reads.
        inputs: the inputs of its blocks.
        attention: what attention gave, and its log-sums.
        blocks: those that can be computed twice; none where that gives other gradients.
    """

    plainly: float
    inputs: float
    attention: float
    blocks: tuple[nn.Module, ...]


_KEPT: "WeakKeyDictionary[nn.Module, Kept]" = WeakKeyDictionary()


def kept(model: "LanguageModel") -> Kept:
    """What a pass keeps, found out once on a few tokens, and whether the blocks may be computed twice there."""
    if (known := _KEPT.get(model.model)) is not None:
        return known
    tokens = min(PROBE, model.context or PROBE)
    ids = torch.arange(tokens, device=model.device)[None]
    weights = {p.untyped_storage().data_ptr() for p in (*model.model.parameters(), *model.model.buffers())}
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    def slopes() -> list[Tensor]:
        listener = _Listener(model.n_layers)
        with torch.enable_grad(), seam(model.modules, taps=[listener]), model.arithmetic():
            model.logits(ids, ids[0, -1:]).float().square().sum().backward()
        return [listener.dz[layer] for layer in range(model.n_layers)]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        plain = slopes()
    blocks = blocks_of(model.model, model.modules)
    if blocks:
        try:
            with recomputing(blocks, model.arithmetic):
                twice = slopes()
            same = all(
                _distance(a, b) <= TOLERANCE[model.precision] for a, b in zip(plain, twice, strict=True)
            )
        except (AnchorsError, RuntimeError, KeyError):  # what a family does between its blocks
            same = False
        blocks = blocks if same else []
    wide = 4 if model.device.type == "cuda" else model.model.dtype.itemsize  # see Routed.arithmetic
    width = model.model.config.get_text_config().hidden_size
    found = _KEPT[model.model] = Kept(
        sum(held.values()) / tokens,
        len(blocks) * width * max(wide, model.model.dtype.itemsize),
        sum(dz.numel() // tokens * dz.element_size() + 4 * dz.shape[1] for dz in plain),
        tuple(blocks),
    )
    return found


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).float().norm() / other.float().norm().clamp(min=1e-30))


@contextmanager
def recomputed(model: "LanguageModel", batch: int, tokens: int) -> Generator[None]:
    """Compute the blocks of a model twice where a pass over `batch` prompts of so many tokens would keep too much."""
    plan = nullcontext()
    if model.device.type == "cuda" and batch * tokens > TOKENS:
        own, count = kept(model), batch * tokens
        free, whole = torch.cuda.mem_get_info(model.device)
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        if own.blocks and count * own.plainly > min(SHARE * whole, 0.8 * free):
            keep = count * (own.inputs + own.attention) < 0.75 * free
            plan = recomputing(own.blocks, model.arithmetic, keep=keep)
    with plan:
        yield
