# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
"""The saliency of an attention pattern in one Triton kernel, for dense and for sparse attention, in O(T) memory.

With P_h = exp(scale · q_h k_hᵀ − lse_h) on the visible keys and an optional gate g_h on each row of the output,

    I = |Σ_h P_h ⊙ (g_h · dz_h v_hᵀ)|,

which is |Σ_h A_h ⊙ ∂L/∂A_h| of that branch. The absolute value comes after the sum over heads, so a program owns
some query rows and some keys and has all heads inside. It walks its keys tile by tile and keeps sums: by row and
class of key, by row and head, and the rows and maps that were asked for. No sum is left to chance: to a place only one program adds, and
the parts into which a row's keys are split are added in order, so two runs agree bit for bit.

Which keys a row sees is one rule, e_j ≤ t and e_j > t − w, with e_j = j · d + l − 1 the last position that key j
stands for (d = l = 1 for tokens); chosen blocks narrow it further, by row and group.

Source: Wang et al., "Label Words are Anchors" (EMNLP 2023), section 2.1; Yuan et al., "Native Sparse Attention"
(ACL 2025), Eqs. 5 to 12.
"""

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from anchors.attention.kernels import (
    H100_MEMORY,
    LOG2E,
    dense,
    load_rows,
    precision_of,
    shared_memory,
    width_of,
)
from anchors.errors import AnchorsError

CLASSES = 16
"""Most classes of keys."""
SPLITS = 8
"""Most parts into which the keys of some query rows are split."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILINGS = {
    (4, 64): ((64, 128, 4, 1), (64, 64, 4, 1), (32, 32, 4, 1)),
    (4, 128): ((64, 64, 4, 1), (32, 32, 4, 1)),
    (4, 256): ((64, 32, 8, 1), (16, 16, 4, 1)),
    (2, 64): ((128, 128, 8, 3), (64, 64, 4, 1), (32, 32, 4, 1)),
    (2, 128): ((64, 64, 4, 2), (64, 64, 4, 1), (32, 32, 4, 1)),
    (2, 256): ((64, 64, 8, 1), (32, 32, 4, 1)),
}
"""By bytes of a number and width of a head: query rows, keys, warps and stages, by preference on an H100."""


@dataclass(frozen=True)
class Band:
    """Causal attention to tokens: j ≤ t, and j > t − window where there is one."""

    window: int | None = None


@dataclass(frozen=True)
class Compressed:
    """Attention to compressed tokens, each of l tokens, one every d: i · d + l − 1 ≤ t (Eq. 7 of NSA)."""

    l: int
    d: int


@dataclass(frozen=True)
class Selected:
    """Causal attention inside chosen blocks of lp tokens (Eq. 12 of NSA).

    Attributes:
        idx: block numbers by row and group, -1 for none; no number twice in a row.
    """

    idx: Int[Tensor, "batch query groups n"]
    lp: int


Pattern = Band | Compressed | Selected


@dataclass(frozen=True)
class Saliency:
    """What is kept of flow = Σ_h P_h ⊙ (g_h · dz_h v_hᵀ).

    Attributes:
        abs_sums: Σ |flow| over the keys of each class, a token's attention to itself left out.
        signed_sums: Σ flow over the keys of each class, that attention included: where every key has a class,
            the sum over classes is Σ_h g_h · ⟨z_h, dz_h⟩.
        head_sums: Σ_j P ⊙ (g · dz vᵀ), which must be g · ⟨z, dz⟩: the certificate.
        rows: |flow| of the wanted rows without the diagonal; 0 where none was wanted.
        full: |flow| without the diagonal, where it was asked for.
    """

    abs_sums: Float[Tensor, "batch query classes"]
    signed_sums: Float[Tensor, "batch query classes"]
    head_sums: Float[Tensor, "batch heads query"]
    rows: Float[Tensor, "batch wanted key"]
    full: Float[Tensor, "batch query key"] | None


@triton.jit
@no_type_check
def chosen(
    idx, idx_strides, kv_head, rows, columns, tile, length,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr, CHOSEN_WIDTH: tl.constexpr,
):  # fmt: skip
    """Which rows chose the block of each key: a column vector where all keys are of one block."""
    line = idx + kv_head * idx_strides[2] + rows[:, None].to(tl.int64) * idx_strides[1]
    inside = (rows < length)[:, None]
    if BLOCK % KEYS == 0:
        slots = tl.arange(0, CHOSEN_WIDTH)[None, :]
        blocks = tl.load(line + slots, mask=inside & (slots < CHOSEN), other=-1)
        return tl.max((blocks == tile * KEYS // BLOCK).to(tl.int32), 1)[:, None]
    else:
        hit = tl.zeros([ROWS, KEYS], tl.int32)
        for slot in range(CHOSEN):
            block = tl.load(line + slot, mask=inside, other=-1)
            hit += (block == columns[None, :] // BLOCK).to(tl.int32)
        return hit


@triton.jit
@no_type_check
def _group(
    flow, seen, q, k, v, dz, lse, gates, by_head, q_strides, k_strides, v_strides, dz_strides,
    lse_strides, gate_strides, kv_head, left, ahead, length, scale, unit,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, GROUPS: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the heads of one group to a tile of flow, and to the sums by head and row."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, KEYS)
    k += kv_head * k_strides[2]
    v += kv_head * v_strides[2]
    k_tile = load_rows(k, k_strides[1], columns, ahead, DIM, WIDTH, PRECISION)
    if GROUPS > 1:
        v_tile = load_rows(v, v_strides[1], columns, ahead, DIM_V, WIDTH_V, PRECISION)
    for member in range(GROUPS):
        head = kv_head * GROUPS + member
        q_tile = load_rows(q + head * q_strides[2], q_strides[1], rows, left, DIM, WIDTH, PRECISION)
        line = head * lse_strides[2] + rows * lse_strides[1]
        mass = tl.load(lse + line, mask=rows < left, other=float("inf"))
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        product = tl.where(seen, tl.exp2(scores - (mass * unit)[:, None]), 0.0)
        if GATED:
            line = head * gate_strides[2] + rows * gate_strides[1]
            gate = tl.load(gates + line, mask=rows < left, other=0.0)
            product *= gate.to(tl.float32)[:, None]
        # Late, so that the first two tiles have left the registers.
        dz_tile = load_rows(dz + head * dz_strides[2], dz_strides[1], rows, left, DIM_V, WIDTH_V, PRECISION)
        if GROUPS == 1:
            v_tile = load_rows(v, v_strides[1], columns, ahead, DIM_V, WIDTH_V, PRECISION)
        product *= tl.dot(dz_tile, tl.trans(v_tile), input_precision=PRECISION)
        flow += product
        # Nobody else adds there, and nobody waits for it.
        tl.atomic_add(by_head + head * length + rows, tl.sum(product, 1), mask=rows < left, sem="relaxed")
    return flow


@triton.jit
@no_type_check
def _saliency(
    q, k, v, dz, lse, gates, live, classes, idx, wanted, absolute, signed, by_head, picked, full,
    q_strides, k_strides, v_strides, dz_strides, lse_strides, gate_strides, idx_strides,
    length, keys, past, window, scale, unit, kv_heads, count, blocks,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr,
    SPAN: tl.constexpr, STRIDE: tl.constexpr, DIAGONAL: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK: tl.constexpr, CHOSEN: tl.constexpr, CHOSEN_WIDTH: tl.constexpr,
    CLASSED: tl.constexpr, CLASSES: tl.constexpr, CLASS_WIDTH: tl.constexpr,
    LIVE: tl.constexpr, GATED: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    example = tl.program_id(1).to(tl.int64)
    # The last rows see most keys, so they go first.
    place = tl.num_programs(0) // SPLITS - 1 - tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    start = place * ROWS
    rows = start + tl.arange(0, ROWS)
    times = rows + past
    part = example * SPLITS + split
    q += example * q_strides[0] + start.to(tl.int64) * q_strides[1]
    k += example * k_strides[0]
    v += example * v_strides[0]
    dz += example * dz_strides[0] + start.to(tl.int64) * dz_strides[1]
    lse += example * lse_strides[0] + start.to(tl.int64) * lse_strides[1]
    by_head += part * (kv_heads * GROUPS) * length + start
    if GATED:
        gates += example * gate_strides[0] + start.to(tl.int64) * gate_strides[1]
    if CHOSEN > 0:
        idx += example * idx_strides[0]

    newest = tl.minimum(start + ROWS, length) - 1 + past
    stop = tl.minimum(tl.maximum(newest - SPAN + 1 + STRIDE, 0) // STRIDE, keys)
    first = 0
    if WINDOWED:
        first = tl.maximum(start + past - window + 1, 0) // KEYS
    last = (stop + KEYS - 1) // KEYS
    share = (tl.maximum(last - first, 0) + SPLITS - 1) // SPLITS
    begin = first + split * share
    end = tl.minimum(begin + share, last)
    if LIVE > 0:
        alive = tl.load(live + example * blocks + rows // LIVE, mask=rows < length, other=0)
        end = tl.where(tl.max(alive) > 0, end, begin)
    here = 0
    for index in range(count):
        row = tl.load(wanted + example * count + index)
        here += ((row >= start) & (row < start + ROWS)).to(tl.int32)

    kinds = tl.arange(0, CLASS_WIDTH)[None, :]
    size = tl.zeros([ROWS, CLASS_WIDTH], tl.float32)
    sums = tl.zeros([ROWS, CLASS_WIDTH], tl.float32)
    for tile in range(begin, end):
        columns = tile * KEYS + tl.arange(0, KEYS)
        moments = columns * STRIDE + (SPAN - 1)
        seen = (moments[None, :] <= times[:, None]) & (columns < keys)[None, :]
        if WINDOWED:
            seen = seen & (moments[None, :] > times[:, None] - window)
        flow = tl.zeros([ROWS, KEYS], tl.float32)
        # Inside the tile rows and keys count from its own corner, whose offset alone needs 64 bits.
        k_tile = k + tl.cast(tile * KEYS, tl.int64) * k_strides[1]
        v_tile = v + tl.cast(tile * KEYS, tl.int64) * v_strides[1]
        left, ahead = length - start, keys - tile * KEYS
        # What is the same for all heads would be kept in registers, which then overflow.
        for kv_head in tl.range(kv_heads, disable_licm=True):
            visible, reached = seen, True
            if CHOSEN > 0:
                hit = chosen(
                    idx, idx_strides, kv_head, rows, columns, tile, length,
                    ROWS, KEYS, BLOCK, CHOSEN, CHOSEN_WIDTH,
                )  # fmt: skip
                visible, reached = seen & (hit > 0), tl.max(hit) > 0
            if reached:
                flow = _group(
                    flow, visible, q, k_tile, v_tile, dz, lse, gates, by_head,
                    q_strides, k_strides, v_strides, dz_strides, lse_strides, gate_strides,
                    kv_head, left, ahead, length, scale, unit,
                    DIM, DIM_V, WIDTH, WIDTH_V, ROWS, KEYS, GROUPS, GATED, PRECISION,
                )  # fmt: skip
        magnitude = tl.abs(flow)
        if DIAGONAL:
            magnitude = tl.where(columns[None, :] == times[:, None], 0.0, magnitude)
        if not CLASSED:
            size += tl.sum(magnitude, 1)[:, None]
            sums += tl.sum(flow, 1)[:, None]
        else:
            kind_of = tl.load(classes + example * keys + columns, mask=columns < keys, other=-1)[None, :]
            for kind in range(CLASSES):
                share_of = tl.sum(tl.where(kind_of == kind, magnitude, 0.0), 1)[:, None]
                size += tl.where(kinds == kind, share_of, 0.0)
                share_of = tl.sum(tl.where(kind_of == kind, flow, 0.0), 1)[:, None]
                sums += tl.where(kinds == kind, share_of, 0.0)
        if here > 0:
            for index in range(count):
                row = tl.load(wanted + example * count + index)
                if row >= start and row < start + ROWS:
                    one = tl.sum(tl.where(rows[:, None] == row, magnitude, 0.0), 0)
                    tl.store(picked + (example * count + index) * keys + columns, one, mask=columns < keys)
        if FULL:
            line = full + (example * length + start) * keys + tl.arange(0, ROWS)[:, None] * keys
            inside = (rows < length)[:, None] & (columns < keys)[None, :]
            tl.store(line + columns[None, :], magnitude, mask=inside)
        # The next tile reads the sums by head that other threads have just written.
        tl.debug_barrier()
    where = (part * length + rows)[:, None] * CLASSES + kinds
    inside = (rows < length)[:, None] & (kinds < CLASSES)
    tl.store(absolute + where, size, mask=inside)
    tl.store(signed + where, sums, mask=inside)


def saliency(
    pattern: Pattern,
    q: Float[Tensor, "batch query heads dim"],
    k: Float[Tensor, "batch key kv_heads dim"],
    v: Float[Tensor, "batch key kv_heads dim_v"],
    dz: Float[Tensor, "batch query heads dim_v"],
    lse: Float[Tensor, "batch query heads"],
    *,
    scale: float,
    gates: Float[Tensor, "batch query heads"] | None = None,
    classes: Int[Tensor, "batch key"] | None = None,
    n_classes: int = 1,
    wanted: Int[Tensor, "batch wanted"] | None = None,
    full: bool = False,
    past: int = 0,
    live: tuple[Int[Tensor, "batch blocks"], int] | None = None,
    base2: bool = False,
    precision: str | None = None,
) -> Saliency:
    """|Σ_h P_h ⊙ (g_h · dz_h v_hᵀ)| of one attention pattern, summed by row and class of key, in memory O(T).

    Any strides but the last; pass [B, H, T, D] as its transpose. Two runs agree bit for bit.

    Args:
        pattern: which keys each row sees.
        k, v: of tokens, or of compressed tokens where the pattern is `Compressed`.
        dz: ∂L/∂z, of the branch's ungated output times the gate where `gates` are given, in v's type.
        lse: log Σ_j exp(scores_ij) over the visible keys; anything where there are none.
        gates: factor on each row of each head.
        classes: class of each key, 0 to n_classes − 1; any other number is in no sum.
        wanted: rows to keep, -1 for none.
        full: whether to keep the whole map, in memory O(T²).
        past: keys before the first query: row i stands at position i + past.
        live: 0 for blocks of rows where dz is 0 throughout, and the number of rows of a block.
        base2: whether `lse` is in units of log 2.
        precision: how float32 is multiplied, in Triton's words; by default as torch is set to.

    Raises:
        AnchorsError: more classes than 16; types that differ or that the kernel does not multiply.

    Example:
        >>> found = saliency(Band(), q, k, v, dz, lse, scale=q.shape[-1] ** -0.5, wanted=targets)
        >>> found.abs_sums.sum((1, 2))                        # Σ_{j<i} I[i, j] by example
    """
    q, k, v, dz = map(dense, (q, k, v, dz))
    _demand(q, k, v, dz, classes, n_classes)
    batch, length, heads, dim = q.shape
    keys, kv_heads, dim_v = k.shape[1], k.shape[2], v.shape[-1]
    plan = tiling(pattern, dim, dim_v, q.dtype, shared_memory(q.device))
    tiles, splits = triton.cdiv(length, plan["ROWS"]), splits_of(keys, plan["KEYS"])
    idx = dense(pattern.idx) if isinstance(pattern, Selected) else None
    classes = None if classes is None else classes.to(q.device, torch.int32).contiguous()
    wanted = q.new_empty(batch, 0, dtype=torch.int64) if wanted is None else wanted.to(q.device).contiguous()
    real, home = torch.float32, q.device
    by_class = torch.empty(2, batch, splits, length, n_classes, dtype=real, device=home)
    by_head = torch.zeros(batch, splits, heads, length, dtype=real, device=home)
    picked = torch.zeros(*wanted.shape, keys, dtype=real, device=home)
    whole = torch.zeros(batch, length, keys, dtype=real, device=home) if full else None
    window = pattern.window if isinstance(pattern, Band) else None
    compressed = isinstance(pattern, Compressed)
    with torch.cuda.device_of(q):
        _saliency[tiles * splits, batch](
            q, k, v, dz, lse, gates, live and live[0], classes, idx, wanted, *by_class, by_head, picked, whole,
            *map(_strides, (q, k, v, dz, lse, gates, idx)),
            length, keys, past, window or 0, scale, 1.0 if base2 else LOG2E.value, kv_heads, wanted.shape[1],
            live[0].shape[1] if live else 0,
            **plan, SPLITS=splits, GROUPS=heads // kv_heads,
            SPAN=pattern.l if compressed else 1, STRIDE=pattern.d if compressed else 1,
            DIAGONAL=not compressed, WINDOWED=window is not None,
            BLOCK=pattern.lp if isinstance(pattern, Selected) else 1,
            CHOSEN=0 if idx is None else idx.shape[-1],
            CHOSEN_WIDTH=1 if idx is None else triton.next_power_of_2(idx.shape[-1]),
            CLASSED=classes is not None, CLASSES=n_classes, CLASS_WIDTH=triton.next_power_of_2(n_classes),
            LIVE=live[1] if live else 0, GATED=gates is not None, FULL=full,
            PRECISION=precision or precision_of(q.dtype),
        )  # fmt: skip
    size, sums = by_class.sum(2)
    return Saliency(size, sums, by_head.sum(1), picked, whole)


def splits_of(keys: int, tile: int) -> int:
    """Into how many parts the keys are split: by their number alone, so that a batch's size changes no bit."""
    return max(1, min(SPLITS, triton.cdiv(keys, tile)))


def needed(rows: int, keys: int, width: int, width_v: int, dtype: torch.dtype, stages: int) -> int:
    """Bytes of shared memory that a program takes, as compiled for an H100: its tiles, and of float32 the keys' halves again."""
    halves = keys // 2 if dtype == torch.float32 else 0
    return (rows + keys + halves) * (width + width_v) * dtype.itemsize * stages


def tiling(
    pattern: Pattern, dim: int, dim_v: int, dtype: torch.dtype, memory: int = H100_MEMORY
) -> dict[str, int]:
    """Tile sizes and launch parameters: the first of the table that fits the shared memory, else its last."""
    width, width_v = width_of(dim), width_of(dim_v)
    table = TILINGS[dtype.itemsize, max(64, width, width_v)]
    table = (
        table if isinstance(pattern, Band) or len(table) < 3 else table[1:]
    )  # the largest were tried on bands
    fitting = (x for x in table if needed(x[0], x[1], width, width_v, dtype, x[3]) <= memory)
    rows, keys, warps, stages = next(fitting, table[-1])
    # The keys of a tile are then of one block, which a row has chosen or not.
    if isinstance(pattern, Selected) and pattern.lp >= 16 and pattern.lp & (pattern.lp - 1) == 0:
        keys = min(keys, pattern.lp)
    return {
        "DIM": dim, "DIM_V": dim_v, "WIDTH": width, "WIDTH_V": width_v,
        "ROWS": rows, "KEYS": keys, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _demand(q: Tensor, k: Tensor, v: Tensor, dz: Tensor, classes: Tensor | None, n_classes: int) -> None:
    if not 1 <= n_classes <= CLASSES or (classes is None and n_classes > 1):
        raise AnchorsError(
            f"{n_classes} classes of keys{' without a class for each key' * (classes is None)}.",
            f"Give `classes`, with 1 to {CLASSES} of them.",
            code="shape",
        )
    if not q.dtype == k.dtype == v.dtype == dz.dtype or q.dtype not in DTYPES:
        raise AnchorsError(
            f"The saliency kernel got {q.dtype}, {k.dtype}, {v.dtype} and {dz.dtype}.",
            "Give q, k, v and dz one type: float32, bfloat16 or float16.",
            code="precision",
        )
    if q.shape[2] % k.shape[2]:
        raise AnchorsError(
            f"{q.shape[2]} query heads cannot be divided among {k.shape[2]} groups.",
            "Choose a number of groups (key-value heads) that divides the query heads.",
            code="geometry",
        )
