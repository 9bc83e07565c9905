# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
"""The saliency of a layer of Native Sparse Attention over pairs of tokens, in one Triton kernel and O(T) memory.

    I_ij = |Σ_h (g^slc P^slc_ij ⟨dz_i, v^slc_j⟩ + g^win P^win_ij ⟨dz_i, v^win_j⟩ + Σ_{c,m: cd+m=j} g^cmp P^cmp_ic ⟨dz_i, φ_m(v_c)⟩)|

A token j lies in l/d compressed tokens, as its ⌊j/d⌋-th, one before, …: so the compressed branch is walked as l/d
dense branches over tokens, whose keys are kc of the r-th of them and whose values are φ_m(v), and all branches of a
tile of pairs meet in one sum before |·| is taken. A program owns some query rows and some keys and has all heads and
branches inside; it keeps sums by row, by row and head, and the rows and map that were asked for. To a place only one
program adds, and the parts into which a row's keys are split are added in order: two runs agree bit for bit.

The literal twin is `anchors.nsa.call.NSACall.products`, tile by tile in torch.

Source: Yuan et al., "Native Sparse Attention" (ACL 2025), Eqs. 5 to 12; Wang et al., "Label Words are Anchors" (EMNLP
2023), section 2.1.
"""

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from anchors.attention.kernels import (
    LOG2E,
    dense,
    load_rows,
    nearest,
    precision_of,
    shared_memory,
    strides,
    width_of,
)
from anchors.attention.saliency_kernel import chosen, splits_of
from anchors.nsa.attention import BRANCHES, Branches
from anchors.nsa.geometry import Geometry
from anchors.nsa.kernels.attention import Branch, attend

ALL = "all"
"""The name of what all branches are together."""
LIVE = 64
"""Rows of a block that is passed over where its slopes are all zero."""
TILES = {
    (4, 128): ((16, 32, 4, 1, 73_728), (16, 16, 4, 1, 0)),
    (4, 256): ((16, 32, 8, 1, 114_688), (16, 16, 4, 1, 0)),
    (2, 128): ((64, 64, 8, 2, 98_816), (32, 32, 4, 1, 0)),
    (2, 256): ((32, 32, 4, 1, 0),),
}
"""By bytes of a number and width of a head: query rows, keys, warps, stages, and the bytes of shared memory that they take
as compiled for an H100; the first that fits, else the last."""


@dataclass(frozen=True)
class BranchSaliency:
    """What is kept of the flow of each branch, and of all together; by the names of `BRANCHES` and `ALL`.

    Attributes:
        totals: Σ |flow| over all pairs, a token's attention to itself left out.
        rows: |flow| of the wanted rows without the diagonal, or flow itself; 0 where none was wanted.
        full: that of all rows, of all branches together, where it was asked for.
        head_sums: Σ_j of the flow of each head through all branches, which must be ⟨z, dz⟩: the certificate.
    """

    totals: dict[str, Float[Tensor, " batch"]]
    rows: dict[str, Float[Tensor, "batch wanted key"]]
    full: Float[Tensor, "batch query key"] | None
    head_sums: Float[Tensor, "batch heads query"]


@triton.jit
@no_type_check
def _gathered(pointer, offsets, there, DIM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Rows that lie anywhere."""
    columns = tl.arange(0, WIDTH)
    inside = there[:, None] & (columns < DIM)[None, :]
    return nearest(tl.load(pointer + offsets[:, None] + columns[None, :], mask=inside, other=0.0), PRECISION)


@triton.jit
@no_type_check
def _heads(
    flow, seen, q, dz, k, v, k_places, v_places, there, lse, gates, by_head, q_strides, dz_strides,
    kv_head, heads, left, length, factor,
    BRANCH: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the heads of one group to a tile of one branch's flow, and to the sums by head and row."""
    rows = tl.arange(0, ROWS)
    k_tile = _gathered(k, k_places, there, DIM, WIDTH, PRECISION)
    v_tile = _gathered(v, v_places, there, DIM_V, WIDTH_V, PRECISION)
    for member in range(GROUPS):
        head = kv_head * GROUPS + member
        q_tile = load_rows(q + head * q_strides[2], q_strides[1], rows, left, DIM, WIDTH, PRECISION)
        line = (rows * heads + head) * 3 + BRANCH
        mass = tl.load(lse + line, mask=rows < left, other=float("inf"))
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * factor
        product = tl.where(seen, tl.exp2(scores - (mass * LOG2E)[:, None]), 0.0)
        product *= tl.load(gates + line, mask=rows < left, other=0.0)[:, None]
        dz_tile = load_rows(dz + head * dz_strides[2], dz_strides[1], rows, left, DIM_V, WIDTH_V, PRECISION)
        product *= tl.dot(dz_tile, tl.trans(v_tile), input_precision=PRECISION)
        flow += product
        # Nobody else adds there, and nobody waits for it.
        tl.atomic_add(by_head + head * length + rows, tl.sum(product, 1), mask=rows < left, sem="relaxed")
    return flow


@triton.jit
@no_type_check
def _kept(
    flow, size, rows, columns, kinds, wanted, picked, here, start, length, count, kept_count,
    KIND: tl.constexpr, ROWS: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """The sums by row of one kind of flow with this tile's, and its part of the wanted rows."""
    flow = tl.where(columns[None, :] == rows[:, None], 0.0, flow)
    magnitude = tl.abs(flow)
    size += tl.where(kinds == KIND, tl.sum(magnitude, 1)[:, None], 0.0)
    if here > 0:
        if not SIGNED:
            flow = magnitude
        for index in range(count):
            row = tl.load(wanted + index)
            if row >= start and row < start + ROWS:
                one = tl.sum(tl.where(rows[:, None] == row, flow, 0.0), 0)
                line = picked + (tl.cast(KIND, tl.int64) * kept_count + index) * length
                tl.store(line + columns, one, mask=columns < length)
    return size


@triton.jit
@no_type_check
def _saliency(
    q, q_cmp, kc, parts, ks, vs, kw, vw, dz, lse, gates, live, idx, wanted, absolute, by_head, picked, full,
    q_strides, qc_strides, kc_strides, part_strides, ks_strides, vs_strides, kw_strides, vw_strides, dz_strides,
    idx_strides, length, compressed, window, factor, kv_heads, count, blocks,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr,
    SPAN: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, CHOSEN: tl.constexpr, CHOSEN_WIDTH: tl.constexpr,
    KINDS: tl.constexpr, LIVE: tl.constexpr, SIGNED: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    example = tl.program_id(1).to(tl.int64)
    # The last rows see most keys, so they go first.
    place = tl.num_programs(0) // SPLITS - 1 - tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    start = place * ROWS
    rows = start + tl.arange(0, ROWS)
    heads = kv_heads * GROUPS
    part = example * SPLITS + split
    q += example * q_strides[0] + start.to(tl.int64) * q_strides[1]
    q_cmp += example * qc_strides[0] + start.to(tl.int64) * qc_strides[1]
    dz += example * dz_strides[0] + start.to(tl.int64) * dz_strides[1]
    kc += example * kc_strides[0]
    parts += example * part_strides[0]
    ks += example * ks_strides[0]
    vs += example * vs_strides[0]
    kw += example * kw_strides[0]
    vw += example * vw_strides[0]
    lse += (example * length + start) * heads * 3
    gates += (example * length + start) * heads * 3
    idx += example * idx_strides[0]
    by_head += part * heads * length + start
    wanted += example * count
    picked += example * count * length
    kept_count = tl.num_programs(1) * count

    newest = tl.minimum(start + ROWS, length) - 1
    last = newest // KEYS + 1
    share = (last + SPLITS - 1) // SPLITS
    begin = split * share
    end = tl.minimum(begin + share, last)
    alive = tl.load(live + example * blocks + rows // LIVE, mask=rows < length, other=0)
    end = tl.where(tl.max(alive) > 0, end, begin)
    here = 0
    for index in range(count):
        row = tl.load(wanted + index)
        here += ((row >= start) & (row < start + ROWS)).to(tl.int32)

    left = length - start
    kinds = tl.arange(0, KINDS)[None, :]
    size = tl.zeros([ROWS, KINDS], tl.float32)
    for tile in range(begin, end):
        # Inside the tile keys count from its own corner, whose offset alone needs 64 bits.
        inner = tl.arange(0, KEYS)
        columns, corner = tile * KEYS + inner, tl.cast(tile * KEYS, tl.int64)
        there = columns < length
        causal = (columns[None, :] <= rows[:, None]) & there[None, :]
        whole = tl.zeros([ROWS, KEYS], tl.float32)
        flow = tl.zeros([ROWS, KEYS], tl.float32)
        for back in range(SPAN // STRIDE):
            first = tile * KEYS // STRIDE - back
            oldest = tl.maximum(first, 0)
            if (oldest < compressed) & (oldest * STRIDE + SPAN - 1 <= newest):
                token = columns // STRIDE - back
                some = (token >= 0) & (token < compressed) & there
                seen = some[None, :] & ((token * STRIDE + (SPAN - 1))[None, :] <= rows[:, None])
                ahead, within = token - first, columns - token * STRIDE
                k_tile = kc + tl.cast(first, tl.int64) * kc_strides[1]
                v_tile = parts + tl.cast(first, tl.int64) * part_strides[1]
                # What is the same for all heads would be kept in registers, which then overflow.
                for kv_head in tl.range(kv_heads, disable_licm=True):
                    flow = _heads(
                        flow, seen, q_cmp, dz, k_tile + kv_head * kc_strides[2], v_tile + kv_head * part_strides[3],
                        ahead * kc_strides[1], ahead * part_strides[1] + within * part_strides[2],
                        some, lse, gates, by_head, qc_strides, dz_strides, kv_head, heads, left, length, factor,
                        0, DIM, DIM_V, WIDTH, WIDTH_V, ROWS, GROUPS, PRECISION,
                    )  # fmt: skip
                # The next pass adds to the sums by head that other threads have just written.
                tl.debug_barrier()
        if KINDS > 1:
            size = _kept(
                flow, size, rows, columns, kinds, wanted, picked, here, start, length, count, kept_count,
                0, ROWS, SIGNED,
            )  # fmt: skip
            whole += flow
            flow = tl.zeros([ROWS, KEYS], tl.float32)
        for kv_head in tl.range(kv_heads, disable_licm=True):
            hit = chosen(
                idx, idx_strides, kv_head, rows, columns, tile, length, ROWS, KEYS, BLOCK, CHOSEN, CHOSEN_WIDTH
            )  # fmt: skip
            if tl.max(hit) > 0:
                flow = _heads(
                    flow, causal & (hit > 0), q, dz, ks + corner * ks_strides[1] + kv_head * ks_strides[2],
                    vs + corner * vs_strides[1] + kv_head * vs_strides[2],
                    inner * ks_strides[1], inner * vs_strides[1], there, lse, gates, by_head, q_strides, dz_strides,
                    kv_head, heads, left, length, factor,
                    1, DIM, DIM_V, WIDTH, WIDTH_V, ROWS, GROUPS, PRECISION,
                )  # fmt: skip
        tl.debug_barrier()
        if KINDS > 1:
            size = _kept(
                flow, size, rows, columns, kinds, wanted, picked, here, start, length, count, kept_count,
                1, ROWS, SIGNED,
            )  # fmt: skip
            whole += flow
            flow = tl.zeros([ROWS, KEYS], tl.float32)
        if tile * KEYS + KEYS > start - window + 1:
            near = causal & (columns[None, :] > rows[:, None] - window)
            for kv_head in tl.range(kv_heads, disable_licm=True):
                flow = _heads(
                    flow, near, q, dz, kw + corner * kw_strides[1] + kv_head * kw_strides[2],
                    vw + corner * vw_strides[1] + kv_head * vw_strides[2],
                    inner * kw_strides[1], inner * vw_strides[1], there, lse, gates, by_head, q_strides, dz_strides,
                    kv_head, heads, left, length, factor,
                    2, DIM, DIM_V, WIDTH, WIDTH_V, ROWS, GROUPS, PRECISION,
                )  # fmt: skip
            tl.debug_barrier()
        if KINDS > 1:
            size = _kept(
                flow, size, rows, columns, kinds, wanted, picked, here, start, length, count, kept_count,
                2, ROWS, SIGNED,
            )  # fmt: skip
        whole += flow
        size = _kept(
            whole, size, rows, columns, kinds, wanted, picked, here, start, length, count, kept_count,
            KINDS - 1, ROWS, SIGNED,
        )  # fmt: skip
        if FULL:
            shown = tl.where(columns[None, :] == rows[:, None], 0.0, whole)
            if not SIGNED:
                shown = tl.abs(shown)
            line = full + (example * length + rows[:, None].to(tl.int64)) * length + columns[None, :]
            tl.store(line, shown, mask=(rows < length)[:, None] & there[None, :])
    where = (part * length + rows)[:, None] * KINDS + kinds
    tl.store(absolute + where, size, mask=(rows < length)[:, None] & (kinds < KINDS))


@torch.no_grad()
def saliency(
    q: Float[Tensor, "batch tokens heads dim"],
    kv: Branches,
    parts: Float[Tensor, "batch compressed l groups dim_v"],
    gates: Float[Tensor, "batch tokens heads 3"],
    dz: Float[Tensor, "batch tokens heads dim_v"],
    idx: Int[Tensor, "batch tokens groups n"],
    geometry: Geometry,
    *,
    scale: float,
    q_cmp: Float[Tensor, "batch tokens heads dim"] | None = None,
    wanted: Int[Tensor, "batch wanted"] | None = None,
    by_branch: bool = False,
    full: bool = False,
    signed: bool = False,
) -> BranchSaliency:
    """I over the tokens of whole prompts, summed in memory O(T). Waits for the GPU nowhere; two runs agree bit for bit.

    Args:
        parts: φ_m(v_c) of every token of every block, with an l-th of what belongs to none.
        dz: ∂L/∂z of the gated sum.
        idx: the chosen blocks, −1 for none.
        wanted: rows to keep, −1 for none.
        by_branch: whether each branch is summed by itself, too.
        full: whether to keep the whole map of all branches together, in memory O(T²).
        signed: whether rows and map keep the sign of Σ_h A ⊙ ∂L/∂A.

    Raises:
        AnchorsError: a type or a number of heads that the kernels cannot take.
    """
    g, (batch, length, heads, dim) = geometry, q.shape
    groups, dim_v, compressed = kv.k_slc.shape[2], kv.v_slc.shape[-1], kv.kc.shape[1]
    first = q if q_cmp is None else q_cmp
    lse = torch.stack(
        [
            attend(Branch("compressed", l=g.l, d=g.d), first, kv.kc, kv.vc, scale=scale)[1],
            attend(Branch("selected", lp=g.lp), q, kv.k_slc, kv.v_slc, idx=idx, scale=scale)[1],
            attend(Branch("window", w=g.w), q, kv.k_win, kv.v_win, scale=scale)[1],
        ],
        -1,
    )
    given = [dense(x) for x in (q, first, kv.kc, parts, kv.k_slc, kv.v_slc, kv.k_win, kv.v_win)]
    slope, gates, idx = dense(dz.to(q.dtype)), gates.float().contiguous(), dense(idx)
    blocks = triton.cdiv(length, LIVE)
    alive = torch.nn.functional.pad(slope.ne(0).flatten(2).any(-1), (0, blocks * LIVE - length))
    alive = alive.unflatten(1, (blocks, LIVE)).any(-1).int()
    kinds = (*BRANCHES, ALL) if by_branch else (ALL,)
    width, width_v = width_of(dim), width_of(dim_v)
    memory = shared_memory(q.device)
    table = TILES[q.dtype.itemsize, max(128, width, width_v)]
    rows, keys, warps, stages, _ = next((x for x in table if x[-1] <= memory), table[-1])
    if wanted is None:
        wanted = idx.new_empty(batch, 0, dtype=torch.int64)
    wanted = wanted.to(q.device).contiguous()
    tiles, splits = triton.cdiv(length, rows), splits_of(length, keys)
    sums = q.new_empty(batch, splits, length, len(kinds), dtype=torch.float32)
    by_head = q.new_zeros(batch, splits, heads, length, dtype=torch.float32)
    picked = q.new_zeros(len(kinds), *wanted.shape, length, dtype=torch.float32)
    whole = q.new_zeros(batch, length, length, dtype=torch.float32) if full else None
    with torch.cuda.device_of(q):
        _saliency[tiles * splits, batch](
            *given, slope, lse, gates, alive, idx, wanted, sums, by_head, picked, whole,
            *map(strides, given[:3]), given[3].stride()[:4], *map(strides, (*given[4:], slope, idx)),
            length, compressed, g.w, scale * LOG2E.value, groups, wanted.shape[1], blocks,
            DIM=dim, DIM_V=dim_v, WIDTH=width, WIDTH_V=width_v, ROWS=rows, KEYS=keys, SPLITS=splits,
            GROUPS=heads // groups, SPAN=g.l, STRIDE=g.d, BLOCK=g.lp, CHOSEN=idx.shape[-1],
            CHOSEN_WIDTH=triton.next_power_of_2(idx.shape[-1]), KINDS=len(kinds), LIVE=LIVE, SIGNED=signed,
            FULL=full, PRECISION=precision_of(q.dtype), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    totals = sums.sum((1, 2))
    return BranchSaliency(
        totals={name: totals[:, c] for c, name in enumerate(kinds)},
        rows={name: picked[c] for c, name in enumerate(kinds)},
        full=whole,
        head_sums=by_head.sum(1),
    )
