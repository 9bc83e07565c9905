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
from anchors.model.replay import TOKENS, replays_of
from anchors.model.witness import TOLERANCE

if TYPE_CHECKING:
    from anchors.model.language import LanguageModel

SHARE = 0.25
"""Of a GPU's memory, what a pass may keep before blocks are computed twice."""
CPU_BYTES = 1 << 30
"""What a pass may keep on the CPU."""
CPU_TOKENS = 512
"""Tokens of a batch up to which the CPU is not asked; on a GPU these are `TOKENS`."""
PROBES = 16, 32
"""Tokens of two short passes: what the longer one keeps more, it keeps of each token."""


class _Listener:
    """A tap that keeps ∂L/∂z of every layer."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = frozenset(layers)
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
    weights = {p.untyped_storage().data_ptr() for p in (*model.model.parameters(), *model.model.buffers())}

    def slopes(tokens: int, held: dict[int, int]) -> list[Tensor]:
        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return x

        ids = torch.arange(tokens, device=model.device)[None]
        listener = _Listener(model.layers)
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            seam(model.modules, taps=[listener]),
            model.arithmetic(),
        ):
            loss = model.logits(ids, torch.tensor([tokens - 1], device=model.device)).float().square().sum()
            loss.backward()
        return [listener.dz[layer] for layer in model.layers]

    short, long = PROBES
    few: dict[int, int] = {}
    many: dict[int, int] = {}
    slopes(short, few)
    plain = slopes(long, many)
    blocks = blocks_of(model.model, [m for m in model.modules if m is not None])
    if blocks:
        try:
            with recomputing(blocks, model.arithmetic):
                twice = slopes(long, {})
            same = all(
                _distance(a, b) <= TOLERANCE[model.precision] for a, b in zip(plain, twice, strict=True)
            )
        except (AnchorsError, RuntimeError, KeyError):  # what a family does between its blocks
            same = False
        blocks = blocks if same else []
    wide = 4 if model.device.type == "cuda" else model.model.dtype.itemsize  # see Routed.arithmetic
    width = model.model.config.get_text_config().hidden_size
    found = _KEPT[model.model] = Kept(
        (sum(many.values()) - sum(few.values())) / (long - short),
        len(blocks) * width * max(wide, model.model.dtype.itemsize),
        sum(dz.numel() // long * dz.element_size() + 4 * dz.shape[1] for dz in plain),
        tuple(blocks),
    )
    return found


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).float().norm() / other.float().norm().clamp(min=1e-30))


def twice(model: "LanguageModel", tokens: int) -> tuple[Kept, bool] | None:
    """Whether a pass over so many tokens would keep too much: then what it keeps, and whether attention is kept, too."""
    gpu = model.device.type == "cuda"
    if model.device.type not in ("cpu", "cuda") or tokens <= (TOKENS if gpu else CPU_TOKENS):
        return None
    own, allowed, keep = kept(model), float(CPU_BYTES), True
    if gpu:
        free, whole = torch.cuda.mem_get_info(model.device)
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        allowed = min(SHARE * whole, 0.8 * free)
        keep = tokens * (own.inputs + own.attention) < 0.75 * free
    return (own, keep) if own.blocks and tokens * own.plainly > allowed else None


@contextmanager
def recomputed(model: "LanguageModel", tokens: int) -> Generator[None]:
    """Compute the blocks of a model twice where a pass over so many tokens would keep too much."""
    if model.device.type == "cuda" and (records := replays_of(model.model)).recorded:
        records.forget()
        torch.cuda.empty_cache()
    found = twice(model, tokens)
    with nullcontext() if found is None else recomputing(found[0].blocks, model.arithmetic, keep=found[1]):
        yield
