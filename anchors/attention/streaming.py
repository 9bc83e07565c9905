"""Attention whose backward pass streams over tiles of query rows and shows each tile to the taps.

With z = A v and dz = ∂L/∂z, a tile of rows needs A (recomputed from q and k) and ∂L/∂A = dz vᵀ only:

    A ⊙ ∂L/∂A = A ⊙ (dz vᵀ)
    ∂L/∂s     = A ⊙ ∂L/∂A − A · Σ_j (A ⊙ ∂L/∂A)          (s = masked scores)

∂L/∂s is the mask's gradient, too, where a family makes its mask from what it sees (Doge). The product that saliency wants is therefore a by-product of the gradient itself, and no tensor of size
layers × heads × T² ever exists. The literal twin is `AttentionCall.pattern` under plain autograd.

On CUDA the Triton kernels of `kernels` do the same without writing any tile to memory, where they know the
call and every tap can do with their sums; otherwise, and everywhere else, the tile loop below does it.
"""

import functools
import importlib.util
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from anchors.attention.bands import waits
from anchors.attention.dense import DenseCall
from anchors.attention.form import grouped, grouped_transposed
from anchors.attention.taps import FusedTap, Tap

TILE_BYTES = {"cpu": 4 << 20, "cuda": 512 << 20, "mps": 64 << 20}
"""Size of one [batch, heads, rows, keys] tile: the cache of a CPU core, a small part of a GPU's memory."""


class Tile(NamedTuple):
    """Some query rows and the range of keys that they can see."""

    rows: Tensor  # ascending, on the device
    part: slice | Tensor  # the same rows as the cheapest index
    keys: slice


def tiles(call: DenseCall, rows: Tensor | None = None) -> Iterator[Tile]:
    """Cut all query rows, or the given ascending ones (on the CPU; none is none), into tiles."""
    batch, heads, queries, _ = call.q.shape
    keys, device = call.k.shape[2], call.q.device
    width = batch * heads * keys * torch.finfo(call.compute_dtype).bits // 8
    size = max(1, TILE_BYTES.get(device.type, TILE_BYTES["cpu"]) // width)
    seen = None
    if call.mask is not None and call.mask.dtype == torch.bool:
        seen = call.mask.flatten(0, 1).any(0).cpu()
    for tile in (torch.arange(queries) if rows is None else rows).split(size):
        if not len(tile):  # of no rows, torch makes one empty piece
            continue
        first, last = int(tile[0]), int(tile[-1])
        whole = last - first + 1 == len(tile)
        on_device = torch.arange(first, last + 1, device=device) if whole else tile.to(device)
        start, stop = 0, keys
        if seen is not None:
            columns = seen[tile].any(0).nonzero()
            start, stop = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 1)
        elif call.mask is None and call.causal:
            stop = last + keys - queries + 1
        yield Tile(on_device, slice(first, last + 1) if whole else on_device, slice(start, stop))


@functools.cache
def triton_runs(device: torch.device) -> bool:
    """Whether the Triton kernels can run there: on an NVIDIA GPU with TF32 and bfloat16 units."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def fused_kernels(call: DenseCall, taps: Sequence[Tap]) -> ModuleType | None:
    """The Triton kernels, where they compute exactly this call and every tap can do with their sums."""
    if not triton_runs(call.q.device) or not all(isinstance(tap, FusedTap) for tap in taps):
        return None
    from anchors.attention import kernels

    return kernels if kernels.supports(call) else None


Attended = dict[int, tuple[Tensor, Tensor | None]]
"""By layer, z and the log-sums of a call."""

_kept: ContextVar[Attended | None] = ContextVar("anchors_kept", default=None)


@contextmanager
def keeping_attention(kept: Attended | None) -> Generator[None]:
    """Let calls that are made twice on the same numbers be computed once: the first leaves in `kept` what the second takes
    from there."""
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)


class _Streaming(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, leaf, call, taps):
        ctx.call, ctx.taps = call, taps
        ctx.set_materialize_grads(False)
        ctx.kernels = fused_kernels(call, taps)
        if ctx.kernels is None:
            waits(call.layer)
        lse, kept = None, _kept.get()
        taken = None if kept is None else kept.pop(call.layer, None)
        if taken is not None:
            z, lse = taken
        elif ctx.kernels is not None:
            z, lse = ctx.kernels.forward(call)
        elif call.fusable:
            z = call.fused()
        else:
            z = torch.empty(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=v.device)
            dtype = call.compute_dtype
            for rows, part, keys in tiles(call):
                scores = call.scores(q[:, :, part].to(dtype), k[:, :, keys].to(dtype), keys)
                pattern = call.softmax(scores, call.visible(rows, keys))
                z[:, :, part] = grouped(pattern, v[:, :, keys].to(dtype), call.groups).to(v.dtype)
        if taken is None and kept is not None:
            kept[call.layer] = z, lse
        ctx.save_for_backward(q, k, v, z, lse)
        return z

    @staticmethod
    def backward(ctx, *slopes):
        (dz,) = slopes
        if dz is None:
            return (None,) * 7
        # The autocast of whoever differentiates reaches this far, and would round the tiles.
        with torch.autocast(dz.device.type, enabled=False):
            return (*_Streaming.differentiate(ctx, dz), None, None, None)

    @staticmethod
    def differentiate(ctx, dz: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, z, lse = ctx.saved_tensors
        call: DenseCall = ctx.call
        dtype, groups = call.compute_dtype, call.groups
        wanted = any(ctx.needs_input_grad[:3])
        mask = call.mask if ctx.needs_input_grad[3] else None
        dmask = None if mask is None else torch.zeros_like(mask, dtype=dtype)
        if ctx.kernels is not None:
            slopes = ctx.kernels.slopes(call, z, lse, dz)
            for tap in ctx.taps:
                tap.fused(call, slopes)
            return (*(ctx.kernels.gradients(call, slopes) if wanted else (None, None, None)), None)
        if wanted:
            dq = torch.zeros_like(q, dtype=dtype)
            dk, dv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        for tap in ctx.taps:
            tap.begin(call, z, dz)
        # Rows without gradient contribute nothing: padding, and all but the target in the last layer.
        live = dz.ne(0).any(-1).any(1).any(0).nonzero().flatten().cpu()
        for rows, part, keys in tiles(call, live):
            q_tile, dz_tile = q[:, :, part].to(dtype), dz[:, :, part].to(dtype)
            k_tile, v_tile = k[:, :, keys].to(dtype), v[:, :, keys].to(dtype)
            scores = call.scores(q_tile, k_tile, keys)
            pattern = call.softmax(scores, call.visible(rows, keys))
            product = grouped(dz_tile, v_tile.transpose(-1, -2), groups).mul_(pattern)
            for tap in ctx.taps:
                tap.tile(call, rows, keys, product)
            if not wanted and dmask is None:
                continue
            ds = product.addcmul_(pattern, product.sum(-1, keepdim=True), value=-1)
            if dmask is not None:
                dmask[..., rows, keys] += ds.sum_to_size(*dmask.shape[:2], *ds.shape[2:])
            if not wanted:
                continue
            dv[:, :, keys] += grouped_transposed(pattern, dz_tile, groups)
            if call.softcap is not None:
                ds.mul_(1 - (scores / call.softcap).square())
            dq[:, :, part] = grouped(ds, k_tile, groups).mul_(call.scale)
            dk[:, :, keys] += grouped_transposed(ds, q_tile, groups).mul_(call.scale)
        dmask = None if dmask is None or mask is None else dmask.to(mask.dtype)
        if not wanted:
            return None, None, None, dmask
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dmask


def streaming(call: DenseCall, taps: Sequence[Tap]) -> Tensor:
    """z of a call, with the taps shown A ⊙ ∂L/∂A tile by tile when the loss is differentiated.

    The output is differentiable even where q, k and v are not (the model's parameters are frozen), so that the
    first layer, too, is tapped while nothing below it is differentiated.
    """
    leaf = torch.zeros((), device=call.q.device, requires_grad=True)
    return _Streaming.apply(call.q, call.k, call.v, call.mask, leaf, call, tuple(taps))
