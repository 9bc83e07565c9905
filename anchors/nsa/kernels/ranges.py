# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
"""dk and dv of the branches whose keys are seen by a range of positions: the compressed branch and the window.

A row of a query tile is one position of one head, and a key tile walks the heads of its group position by position.
So a tile's rows lie one stride apart, and what belongs to them is read as it lies: log₂ Σ exp and ⟨dO, o⟩ are kept by
head and position, with |gate| in the first, so that exp2(scores − mass) is the pattern times |gate|. A program of a
branch with a gate below 0 takes all of its tiles through the section with a mask, which knows the sign.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from anchors.attention.kernels import LOG2E, nearest
from anchors.nsa.kernels.tiles import (
    NEVER,
    key_offsets,
    load_rows,
    load_tail,
    load_tile,
    products,
    save_rows,
    times,
)

PROGRAMS, SPLITS = 512, 16
"""Programs that a walk is cut for, and the most parts of one."""
MANY = 16
"""Heads of a group from which on lists of positions go by rows of one head: where that was timed faster."""
PAD = 128
"""Positions are padded to a multiple of this and by as much again: at least the rows of any tile."""


@triton.jit
@no_type_check
def rows_kernel(
    lse, inner, gate, masses, means, signs, length, padded, heads, inner_step, gate_step,
    TILE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """log₂ Σ exp − log₂ |gate| and ⟨dO, o⟩ by head and position; behind the last position, of rows without a pattern."""
    position = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    example = tl.program_id(2).to(tl.int64)
    inside = (head < heads)[:, None] & (position < length)[None, :]
    line = (example * length + position)[None, :] * heads + head[:, None]
    mass = tl.load(lse + line, mask=inside, other=float("-inf"))
    weight = tl.load(gate + line * gate_step, mask=inside, other=1.0)
    mean = tl.load(inner + line * inner_step, mask=inside, other=0.0)
    mass = tl.where(mass == float("-inf"), NEVER, mass * LOG2E - tl.log2(tl.abs(weight)))
    place = (example * heads + head)[:, None] * padded + position[None, :]
    kept = (head < heads)[:, None] & (position < padded)[None, :]
    tl.store(means + place, mean, mask=kept)
    tl.store(signs + place, tl.where(weight < 0, -1.0, 1.0), mask=kept)
    tl.store(masses + place, mass, mask=kept)


@triton.jit
@no_type_check
def range_kernel(
    q, k, v, dz, dk, dv, masses, means, signs, lowest, spans, k_strides, v_strides,
    length, padded, keys, past, scale, factor, groups, size, stride, reach,
    BRANCH: tl.constexpr, UNTIL: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPLITS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The first keys have the longest walks; all parts of them start first.
    start, part = tl.program_id(0) // SPLITS * KEYS, tl.program_id(0) % SPLITS
    example, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    last = tl.minimum(start + KEYS, keys) - 1
    if spans is not None:
        spans += example.to(tl.int64) * keys * 2
        since, since_all = tl.load(spans + start * 2), tl.load(spans + last * 2)
        until = tl.minimum(tl.maximum(tl.load(spans + last * 2 + 1) - past, 0), length)
        until_all = tl.minimum(tl.maximum(tl.load(spans + start * 2 + 1) - past, 0), length)
    elif BRANCH == "compressed":
        since, since_all, until, until_all = (
            start * stride + size - 1,
            last * stride + size - 1,
            length,
            length,
        )
    else:
        since, since_all = start, last
        until = tl.minimum(tl.maximum(last + reach - past, 0), length)
        until_all = tl.minimum(tl.maximum(start + reach - past, 0), length)
    # Aligned, so that what lies by position is read sixteen bytes at a time.
    begin = tl.maximum(since - past, 0) // 16 * 16
    tiles = tl.cdiv(tl.maximum(until - begin, 0), ROWS)
    masked = tl.minimum(tl.cdiv(tl.maximum(since_all - past - begin, 0), ROWS), tiles)
    whole = tl.maximum(tl.maximum(until_all - begin, 0) // ROWS, masked)
    each = tl.cdiv(tiles, SPLITS)
    first = tl.minimum(part * each, tiles)
    end = tl.minimum(first + each, tiles)
    signed = tl.load(lowest) < 0
    masked = tl.where(signed, end, tl.minimum(tl.maximum(masked, first), end))
    whole = tl.where(signed, end, tl.minimum(tl.maximum(whole, masked), end))
    bounds = (first, masked, whole, end)
    column, row = tl.arange(0, KEYS), tl.arange(0, ROWS)
    key = start + column
    since = key * stride + size - 1 if BRANCH == "compressed" else key
    until = key + reach
    if spans is not None:
        row_of_key = tl.minimum(key, keys - 1) * 2
        since, until = tl.load(spans + row_of_key), tl.load(spans + row_of_key + 1)
    k += example.to(tl.int64) * k_strides[0] + group * k_strides[2]
    v += example.to(tl.int64) * v_strides[0] + group * v_strides[2]
    k_tile = load_rows(k, key_offsets(start, k_strides[1], keys, KEYS, True), DIM, DIM, PRECISION)
    v_tile = load_rows(v, key_offsets(start, v_strides[1], keys, KEYS, True), DIM_V, DIM_V, PRECISION)
    dk_total = tl.zeros([KEYS, DIM], tl.float32)
    dv_total = tl.zeros([KEYS, DIM_V], tl.float32)
    for section in tl.static_range(3):
        for index in range(bounds[section] * HEADS, bounds[section + 1] * HEADS):
            position = begin + index // HEADS * ROWS
            head = group * HEADS + index % HEADS
            line = example * groups * HEADS + head
            q_tile = nearest(tl.reshape(q.load([example, position, head, 0]), [ROWS, DIM]), PRECISION)
            dz_tile = nearest(tl.reshape(dz.load([example, position, head, 0]), [ROWS, DIM_V]), PRECISION)
            mass = tl.reshape(masses.load([line, position]), [ROWS])
            mean = tl.reshape(means.load([line, position]), [ROWS])
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            pattern = tl.exp2(scores * factor - mass[None, :])
            if section != 1:
                at = position + row + past
                seen = at[None, :] >= since[:, None]
                if UNTIL:
                    seen &= at[None, :] < until[:, None]
                pattern = tl.where(seen, pattern, 0.0)
                if signed:
                    pattern *= tl.load(signs + line.to(tl.int64) * padded + position + row)[None, :]
            dv_total = times(pattern, dz_tile, dv_total, PRECISION, False)
            slope = pattern * (tl.dot(v_tile, tl.trans(dz_tile), input_precision=PRECISION) - mean[None, :])
            dk_total = times(slope, q_tile, dk_total, PRECISION, False)
    out = ((part * (tl.num_programs(1) // groups) + example).to(tl.int64) * keys + key) * groups + group
    save_rows(dk, out * DIM, key < keys, dk_total * scale, DIM, DIM)
    save_rows(dv, out * DIM_V, key < keys, dv_total, DIM_V, DIM_V)


@triton.jit
@no_type_check
def list_kernel(
    q, k, v, dz, dk, dv, masses, means, signs, lowest, spans, queries, items, bases, q_strides, k_strides, v_strides, dz_strides,
    padded, keys, past, scale, factor, groups,
    HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, WIDTH_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of the selected branch, whose positions are a list: of a piece of a block's readers, and of a part of it."""
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair, block = tl.load(items + item * 4), tl.load(items + item * 4 + 1)
    if pair < 0:
        return
    begin, stop = tl.load(items + item * 4 + 2), tl.load(items + item * 4 + 3)
    start = (block * PARTS + part) * KEYS if spans is None else block + part * KEYS
    listed = begin + tl.arange(0, SPLIT)
    # The list ascends: those that do not see the tile whole stand first, and the last tile is not full.
    some = tl.load(queries + listed, mask=listed < stop, other=2147483647 - past) + past < start + KEYS - 1
    tiles = tl.cdiv(stop - begin, ROWS)
    signed = tl.load(lowest) < 0
    masked = tl.minimum(tl.cdiv(tl.sum(some.to(tl.int32)), ROWS), tiles)
    masked = tl.where(signed, tiles, masked)
    bounds = (0, masked, tl.maximum((stop - begin) // ROWS, masked), tiles)
    example, group = (pair // groups).to(tl.int64), pair % groups
    column, row = tl.arange(0, KEYS), tl.arange(0, ROWS)
    q += example * q_strides[0]
    dz += example * dz_strides[0]
    k += example * k_strides[0] + group * k_strides[2]
    v += example * v_strides[0] + group * v_strides[2]
    own = key_offsets(start, k_strides[1], keys, KEYS, True)
    k_tile = load_rows(k, own, min(DIM, WIDTH), WIDTH, PRECISION)
    k_tail = load_tail(k, own, k_tile, DIM, WIDTH, TAIL, PRECISION)
    v_tile = load_rows(v, key_offsets(start, v_strides[1], keys, KEYS, True), DIM_V, WIDTH_V, PRECISION)
    dk_total = tl.zeros([KEYS, WIDTH], tl.float32)
    if TAIL > 0:
        dk_rest = tl.zeros([KEYS, TAIL], tl.float32)
    dv_total = tl.zeros([KEYS, WIDTH_V], tl.float32)
    q += group * HEADS * q_strides[2]
    dz += group * HEADS * dz_strides[2]
    first = (example * groups + group) * HEADS * padded
    for section in tl.static_range(3):
        for index in range(bounds[section], bounds[section + 1]):
            place = begin + index * ROWS + row
            query = tl.load(queries + (place if section == 1 else tl.minimum(place, stop - 1)))
            long = query.to(tl.int64)
            # What depends on the list is found once for all heads.
            q_rows = q + (long * q_strides[1])[:, None]
            dz_rows = dz + (long * dz_strides[1])[:, None]
            q_main, q_rest = q_rows + tl.arange(0, WIDTH)[None, :], q_rows
            if TAIL > 0:
                q_rest = q_rows + (WIDTH + tl.arange(0, TAIL))[None, :]
            dz_main = dz_rows + tl.arange(0, WIDTH_V)[None, :]
            if section != 1:
                seen = ((query + past)[None, :] >= (start + column)[:, None]) & (place < stop)[None, :]
            for head in range(HEADS):
                q_tile = load_tile(q_main + head * q_strides[2], min(DIM, WIDTH), WIDTH, PRECISION)
                q_tail = q_tile
                if TAIL > 0:
                    q_tail = load_tile(q_rest + head * q_strides[2], DIM - WIDTH, TAIL, PRECISION)
                dz_tile = load_tile(dz_main + head * dz_strides[2], DIM_V, WIDTH_V, PRECISION)
                mass = tl.load(masses + first + head * padded + query)
                mean = tl.load(means + first + head * padded + query)
                scores = products(k_tile, k_tail, q_tile, q_tail, TAIL, PRECISION)
                pattern = tl.exp2(scores * factor - mass[None, :])
                if section != 1:
                    pattern = tl.where(seen, pattern, 0.0)
                    if signed:
                        pattern *= tl.load(signs + first + head * padded + query)[None, :]
                dv_total = times(pattern, dz_tile, dv_total, PRECISION, False)
                slope = pattern * (
                    tl.dot(v_tile, tl.trans(dz_tile), input_precision=PRECISION) - mean[None, :]
                )
                dk_total = times(slope, q_tile, dk_total, PRECISION, False)
                if TAIL > 0:
                    dk_rest = times(slope, q_tail, dk_rest, PRECISION, False)
    if spans is None:
        out, kept = (item * PARTS + part) * KEYS + column, column < KEYS
    else:
        out = tl.load(bases + item) + part * KEYS + column
        kept = start + column < tl.load(spans + (example * keys + block) * 2 + 1)
    save_rows(dk, out * DIM, kept, dk_total * scale, min(DIM, WIDTH), WIDTH)
    if TAIL > 0:
        save_rows(dk + WIDTH, out * DIM, kept, dk_rest * scale, DIM - WIDTH, TAIL)
    save_rows(dv, out * DIM_V, kept, dv_total, DIM_V, WIDTH_V)


def rows_by_head(
    lse: Float[Tensor, "batch query heads"],
    inner: Float[Tensor, "batch query heads"],
    gate: Float[Tensor, "batch query heads"],
) -> tuple[Tensor, Tensor, Tensor]:
    """log₂ Σ exp − log₂ |gate|, ⟨dO, o⟩ and the gate's sign, all [batch, heads, padded]."""
    batch, length, heads = lse.shape
    # A tile begins at any multiple of 16, so that the last one reaches as far again beyond the last position.
    padded = (triton.cdiv(length, PAD) + 1) * PAD
    masses = lse.new_empty(batch, heads, padded)
    means, signs = torch.empty_like(masses), torch.empty_like(masses)
    with torch.cuda.device_of(lse):
        rows_kernel[padded // 64, triton.cdiv(heads, 32), batch](
            lse.contiguous(),
            inner,
            gate,
            masses,
            means,
            signs,
            length,
            padded,
            heads,
            inner.stride(-1),
            gate.stride(-1),
            TILE=64,
            HEADS=32,
        )
    return masses, means, signs


def boxed(*tensors: Tensor) -> bool:
    """Whether the copy engine of Hopper and its successors can read tensors in boxes: every row at a multiple of 16 bytes."""
    return all(
        x.numel() > 0
        and x.data_ptr() % 16 == 0
        and all(step > 0 and step * x.element_size() % 16 == 0 for step in x.stride()[:-1])
        and (not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0))
        for x in tensors
    )


def fits(shape: dict[str, int], *tensors: Tensor) -> bool:
    """`boxed`, and heads that fill the tiles they are read in."""
    return shape["DIM"] == shape["WIDTH"] and shape["DIM_V"] == shape["WIDTH_V"] and boxed(*tensors)


def boxes(x: Float[Tensor, "batch query heads dim"], rows: int) -> TensorDescriptor:
    """A tensor as the copy engine reads it: so many positions of one head at a time, and zeros behind the last."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, x.shape[-1]])


def line_boxes(x: Float[Tensor, "batch heads padded"], rows: int) -> TensorDescriptor:
    """The same of numbers by head and position."""
    batch, heads, padded = x.shape
    return TensorDescriptor(x, [batch * heads, padded], [padded, 1], [1, rows])
