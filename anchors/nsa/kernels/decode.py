# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
"""One token of Native Sparse Attention against a cache, in four launches.

    o_t = Σ_c g_t^c · Attn(q_t, K_t^c, V_t^c)                                                         (Eq. 5)

1. Append; attend to the compressed tokens, piece by piece, and write down the scores.
2. Importance of the blocks from the scores (Eqs. 8 to 10), and the choice of n of them (Eq. 11), by whichever program of a row
   is the last to arrive, by an atomic count: it finds the same numbers in memory whoever it is. That leaves the memory idle,
   so the pieces of the window, which do not depend on the choice, are read beside it.
3. Attend to pieces of the chosen blocks.
4. Join the pieces, and apply the gates.

The literal twin is a row of `anchors.nsa.reference`. Two runs agree bit for bit.

Source: Yuan et al., "Native Sparse Attention" (ACL 2025), section 3.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from anchors.errors import AnchorsError
from anchors.nsa.geometry import Geometry
from anchors.nsa.kernels import decode_kernels as kernels
from anchors.nsa.kernels.cache import NSACache, Tuning, captured

__all__ = ["NSACache", "Tuning", "captured", "nsa_decode"]

Phi = Callable[[Tensor], Tensor]


@torch.no_grad()
def nsa_decode(
    q: Float[Tensor, "batch 1 heads dim"],
    k_new: Sequence[Float[Tensor, "batch 1 groups dim"]],
    v_new: Sequence[Float[Tensor, "batch 1 groups dim_v"]],
    gates: Float[Tensor, "batch 1 heads 3"],
    cache: NSACache,
    *,
    phi: tuple[Phi, Phi] | None = None,
    geometry: Geometry,
    scale: float,
    q_cmp: Float[Tensor, "batch 1 heads dim"] | None = None,
) -> Float[Tensor, "batch 1 heads dim_v"]:
    """Appends one token to the cache and returns its attention output, row t = `cache.length` of the parallel form.

    Afterwards `cache.idx` holds the blocks that were chosen. Nothing is read on the host. A token that the cache has
    no room for is not stored, and its output is NaN.

    Args:
        q: queries, rotated by the caller where there are rotations.
        k_new, v_new: keys and values of the branches cmp (raw), slc and win, in this order, rotated likewise.
        gates: factors of the branches cmp, slc and win.
        phi: φ of keys and of values, [..., l, dim] → [..., dim], for the compressed token that may end here; runs at
            every step, on the last l raw rows as [batch, 1, groups, l, dim], and its result is kept at the steps that
            end a block. None: the mean.
        geometry: that of the cache.
        scale: factor on the scores.
        q_cmp: queries of the compressed branch, where they are rotated otherwise; None: `q`.

    Raises:
        AnchorsError: tensors that do not belong to this cache.
    """
    q_cmp = q if q_cmp is None else q_cmp
    _demand(q, q_cmp, k_new, v_new, gates, cache, geometry)
    q, q_cmp, *rows = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, q_cmp, *k_new, *v_new))
    k_cmp, k_slc, k_win, v_cmp, v_slc, v_win = rows
    nkc, nvc = k_cmp, v_cmp
    if phi is not None:
        nkc, nvc = (
            one(_last(cache, ring, new)).to(new.dtype).contiguous()
            for one, ring, new in zip(phi, (cache.k_cmp, cache.v_cmp), (k_cmp, v_cmp), strict=True)
        )
        _demand_shape("φ of the keys", nkc, k_cmp.shape)
        _demand_shape("φ of the values", nvc, v_cmp.shape)
    out = q.new_empty(q.shape[0], 1, q.shape[2], cache.v_slc.shape[-1])
    with torch.cuda.device_of(q) if q.is_cuda else nullcontext():
        _launch(
            q, q_cmp, (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win), nkc, nvc, gates, cache, scale, phi, out
        )
    return out


def _launch(q, q_cmp, k_new, v_new, nkc, nvc, gates, cache: NSACache, scale: float, phi, out) -> None:
    geometry, tuning = cache.geometry, cache.tuning
    batch, groups, tokens, dim = cache.k_slc.shape
    heads, compressed, window = cache.scores.shape[1], cache.kc.shape[2], cache.k_win.shape[2]
    pieces_cmp, pieces_slc, pieces_win = cache.splits
    splits, dim_v, sums = sum(cache.splits), cache.v_slc.shape[-1], triton.cdiv(compressed, tuning.tile_sum)
    rows, before, line = batch * groups, pieces_cmp + pieces_slc, cache.scores.stride(1)
    shape = {
        "G": heads // groups, "PADDED": max(16, triton.next_power_of_2(heads // groups)), "DIM": dim, "DIM_V": dim_v,
        "WIDTH": max(16, triton.next_power_of_2(dim)), "WIDTH_V": max(16, triton.next_power_of_2(dim_v)),
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    blocks = {"L": geometry.l, "STRIDE": geometry.d}
    choice = {
        "LP": geometry.lp, "N": geometry.n, "INIT": geometry.n_init, "LOCAL": geometry.n_local,
        "BLOCKS": triton.next_power_of_2(geometry.blocks(tokens)), "CHOSEN": triton.next_power_of_2(geometry.n),
        "BITS": tuning.bits, "SPLITS": pieces_cmp, "PIECES": triton.next_power_of_2(pieces_cmp),
    }  # fmt: skip
    (nk_cmp, nk_slc, nk_win), (nv_cmp, nv_slc, nv_win) = k_new, v_new
    partial = cache.top, cache.mass, cache.part
    kernels.compress[pieces_cmp, rows](
        q_cmp, nk_cmp, nv_cmp, nk_slc, nv_slc, nk_win, nv_win, nkc, nvc,
        cache.k_slc, cache.v_slc, cache.k_win, cache.v_win, cache.k_cmp, cache.v_cmp, cache.kc, cache.vc,
        cache.length, cache.position, cache.scores, *partial,
        _strides(q_cmp), _strides(*k_new), _strides(*v_new), scale, groups, tokens, window, compressed, line, splits,
        **blocks, **shape, GIVEN=phi is not None, ROWS=triton.next_power_of_2(geometry.l),
        TILE=tuning.tile_cmp, num_warps=tuning.warps_cmp, num_stages=tuning.stages_cmp,
    )  # fmt: skip
    kernels.choose[rows, sums + pieces_win](
        q, cache.k_win, cache.v_win, cache.scores, cache.shares, *partial, cache.idx, cache.position, cache.length,
        cache.arrived, _strides(q), scale, groups, tokens, window, compressed, line, splits, before, sums,
        **blocks, **choice, **shape, TILE_SUM=tuning.tile_sum, CHUNK=tuning.chunk, TILE=tuning.tile,
        num_warps=tuning.warps_select, num_stages=tuning.stages,
    )  # fmt: skip
    kernels.read[pieces_slc, rows](
        q, cache.k_slc, cache.v_slc, cache.idx, cache.position, *partial, _strides(q), scale, groups, tokens, splits,
        pieces_cmp, **shape, LP=geometry.lp, N=geometry.n, CHUNK=tuning.chunk, TILE=tuning.tile,
        num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    kernels.merge[heads, batch](
        gates, *partial, cache.position, out, (gates.stride(0), gates.stride(2), gates.stride(3)), tokens,
        SELECTED=pieces_cmp, WINDOW=before, SPLITS=splits, PIECES=triton.next_power_of_2(splits),
        DIM_V=dim_v, WIDTH_V=shape["WIDTH_V"], TILE=tuning.tile_merge, num_warps=tuning.warps_merge,
    )  # fmt: skip


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of the example and the head, of each tensor in turn."""
    return tuple(stride for x in tensors for stride in (x.stride(0), x.stride(2)))


def _last(cache: NSACache, ring: Tensor, new: Tensor) -> Tensor:
    """The last l raw rows, the new one included, in order: [batch, 1, groups, l, dim]."""
    order = (cache.length[:, None] + torch.arange(1, cache.geometry.l, device=ring.device)) % cache.geometry.l
    older = ring.take_along_dim(order.long()[:, None, :, None], 2)
    return torch.cat([older, new.transpose(1, 2)], 2)[:, None]


def _demand(q, q_cmp, k_new, v_new, gates, cache: NSACache, geometry: Geometry) -> None:
    if geometry != cache.geometry:
        raise AnchorsError(
            f"The cache was made for {cache.geometry}.", f"Make one for {geometry}.", code="geometry"
        )
    batch, groups, _, dim = cache.k_slc.shape
    heads, dim_v = cache.scores.shape[1], cache.v_slc.shape[-1]
    _demand_shape("q", q, (batch, 1, heads, dim))
    _demand_shape("q_cmp", q_cmp, (batch, 1, heads, dim))
    _demand_shape("gates", gates, (batch, 1, heads, 3))
    if len(k_new) != 3 or len(v_new) != 3:
        raise AnchorsError(
            f"{len(k_new)} new keys and {len(v_new)} new values were given.",
            "Each branch has its own: give three of each, of cmp, slc and win.",
            code="shape",
        )
    for k, v in zip(k_new, v_new, strict=True):
        _demand_shape("k_new", k, (batch, 1, groups, dim))
        _demand_shape("v_new", v, (batch, 1, groups, dim_v))
    for x in (q, q_cmp, *k_new, *v_new):
        if x.dtype != cache.k_slc.dtype:
            raise AnchorsError(
                f"The cache holds {cache.k_slc.dtype}, and a tensor is {x.dtype}.",
                "Convert one of them.",
                code="precision",
            )


def _demand_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise AnchorsError(f"{name} is {list(x.shape)}.", f"This cache needs {list(shape)}.", code="shape")
