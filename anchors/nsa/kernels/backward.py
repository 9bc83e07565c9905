# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
"""The Triton kernels behind `anchors.nsa.kernels.sparse_attention`, which has their equations.

A row of a query tile is one head at one position, as in the forward pass. The gate is a factor per row: of dq it is
taken at the end, of dk and dv on the pattern.
"""

from typing import no_type_check

import triton
import triton.language as tl

from anchors.attention.kernels import LOG2E
from anchors.nsa.kernels.tiles import (
    NEVER,
    key_offsets,
    key_rows,
    key_tile,
    load_rows,
    load_tail,
    products,
    query_rows,
    save_rows,
    spanned,
    tile_bounds,
    times,
)


@triton.jit
@no_type_check
def inner_kernel(
    o_cmp, o_slc, o_win, dz, inner, rows, DIM_V: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH_V)
    inside = row < rows
    kept = inside[:, None] & (columns < DIM_V)[None, :]
    places = row[:, None] * DIM_V + columns[None, :]
    slope = tl.load(dz + places, mask=kept, other=0.0).to(tl.float32)
    cmp = tl.sum(slope * tl.load(o_cmp + places, mask=kept, other=0.0).to(tl.float32), 1)
    slc = tl.sum(slope * tl.load(o_slc + places, mask=kept, other=0.0).to(tl.float32), 1)
    win = tl.sum(slope * tl.load(o_win + places, mask=kept, other=0.0).to(tl.float32), 1)
    tl.store(inner + row * 3, cmp, mask=inside)
    tl.store(inner + row * 3 + 1, slc, mask=inside)
    tl.store(inner + row * 3 + 2, win, mask=inside)


@triton.jit
@no_type_check
def _add_rows(
    pointer, offsets, inside, tile, ACCUMULATE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    if ACCUMULATE:
        columns = tl.arange(0, WIDTH)
        kept = inside[:, None] & (columns < DIM)[None, :]
        tile += tl.load(pointer + offsets[:, None] + columns[None, :], mask=kept, other=0.0).to(tl.float32)
    save_rows(pointer, offsets, inside, tile, DIM, WIDTH)


@triton.jit
@no_type_check
def query_kernel(
    q, k, v, dz, dq, lse, inner, gate, spans, blocks, members, counts, q_strides, k_strides, v_strides, dz_strides,
    length, keys, past, scale, factor, heads, groups, size, stride, reach, entries, inner_step, gate_step,
    BRANCH: tl.constexpr, LOW: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr,
    PARTS: tl.constexpr, ENTRIES: tl.constexpr, PEEL: tl.constexpr, ACCUMULATE: tl.constexpr, BOXES: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, WIDTH_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0), tl.program_id(1) % heads
    example = (tl.program_id(1) // heads).to(tl.int64)
    if BRANCH == "compressed":
        tile = tl.num_programs(0) - 1 - tile
    within, query, head, inside = query_rows(tile, length, groups, group, TILE, GROUP)
    q += example * q_strides[0]
    dz += example * dz_strides[0]
    if not BOXES:
        k += example * k_strides[0] + group * k_strides[2]
        v += example * v_strides[0] + group * v_strides[2]
    count = 0
    if BRANCH == "selected":
        listed = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tile
        count = tl.load(counts + listed)
        blocks += listed * entries
        members += listed * entries
    long = query.to(tl.int64)
    line = (example * length + query) * (heads * groups) + head
    own = long * q_strides[1] + head * q_strides[2]
    q_tile = load_rows(q, own, min(DIM, WIDTH), WIDTH, PRECISION)
    q_tail = load_tail(q, own, q_tile, DIM, WIDTH, TAIL, PRECISION)
    dz_tile = load_rows(dz, long * dz_strides[1] + head * dz_strides[2], DIM_V, WIDTH_V, PRECISION)
    mass = tl.load(lse + line)
    mass = tl.where(inside & (mass != float("-inf")), mass * LOG2E, NEVER)
    mean = tl.load(inner + line * inner_step)
    if spans is not None:
        spans += example * (length + past) * 2
    low, high = spanned(query + past, spans, keys, size, stride, reach, BRANCH)
    bounds = tile_bounds(
        tile * TILE + past, tl.minimum(tile * TILE + TILE, length) - 1 + past, spans, keys, size, stride, reach,
        blocks, count, BRANCH, KEYS, PARTS, ENTRIES, PEEL,
    )  # fmt: skip
    total = tl.zeros([TILE * GROUP, WIDTH], tl.float32)
    if TAIL > 0:
        rest = tl.zeros([TILE * GROUP, TAIL], tl.float32)
    for part in tl.static_range(3):
        if part > 0 or LOW:
            for index in range(bounds[part], bounds[part + 1]):
                start, member = key_tile(index, within, spans, blocks, members, BRANCH, KEYS, PARTS)
                k_tile, k_tail = key_rows(
                    k, k_strides[1], example, group, start, keys, KEYS, part != 1, BOXES, DIM, WIDTH, TAIL, PRECISION
                )  # fmt: skip
                v_tile, _ = key_rows(
                    v, v_strides[1], example, group, start, keys, KEYS, part != 1, BOXES, DIM_V, WIDTH_V, 0, PRECISION
                )  # fmt: skip
                scores = products(q_tile, q_tail, k_tile, k_tail, TAIL, PRECISION)
                slope = tl.dot(dz_tile, tl.trans(v_tile), input_precision=PRECISION)
                base = tl.where(member, mass, NEVER) if BRANCH == "selected" else mass
                pattern = tl.exp2(scores * factor - base[:, None])
                if part != 1:
                    columns = start + tl.arange(0, KEYS)
                    seen = columns[None, :] < high[:, None]
                    if LOW:
                        seen &= columns[None, :] >= low[:, None]
                    pattern = tl.where(seen, pattern, 0.0)
                slope = pattern * (slope - mean[:, None])
                total = times(slope, k_tile, total, PRECISION, False)
                if TAIL > 0:
                    rest = times(slope, k_tail, rest, PRECISION, False)
    weight = tl.load(gate + line * gate_step) * scale
    _add_rows(dq, line * DIM, inside, total * weight[:, None], ACCUMULATE, min(DIM, WIDTH), WIDTH)
    if TAIL > 0:
        _add_rows(dq + WIDTH, line * DIM, inside, rest * weight[:, None], ACCUMULATE, DIM - WIDTH, TAIL)


@triton.jit
@no_type_check
def key_kernel(
    q, k, v, dz, dk, dv, masses, inner, gate, spans, queries, items, bases, q_strides, k_strides, v_strides, dz_strides,
    length, keys, past, scale, factor, heads, groups, size, stride, reach, inner_step, gate_step,
    BRANCH: tl.constexpr, UNTIL: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, PEEL: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, WIDTH_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, TILE * GROUP), tl.arange(0, KEYS)
    if BRANCH == "selected":
        item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        pair, block = tl.load(items + item * 4), tl.load(items + item * 4 + 1)
        if pair < 0:
            return
        begin, stop = tl.load(items + item * 4 + 2), tl.load(items + item * 4 + 3)
        start = (block * PARTS + part) * KEYS if spans is None else block + part * KEYS
        listed = begin + tl.arange(0, SPLIT)
        # The list ascends: those that do not see the tile whole stand first.
        some = (
            tl.load(queries + listed, mask=listed < stop, other=2147483647 - past) + past < start + KEYS - 1
        )
        tiles = tl.cdiv(stop - begin, TILE)
        masked, whole = tl.cdiv(tl.sum(some.to(tl.int32)), TILE), tiles
        if spans is None:
            place = item * PARTS + part
            out, kept = place * KEYS + column, column < KEYS
    else:
        # The first keys have the longest walks; all parts of them start first.
        start, part = tl.program_id(0) // SPLITS * KEYS, tl.program_id(0) % SPLITS
        pair = tl.program_id(1)
        last = tl.minimum(start + KEYS, keys) - 1
        if spans is not None:
            spans += (pair // heads).to(tl.int64) * keys * 2
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
        begin, stop = tl.maximum(since - past, 0), until
        tiles = tl.cdiv(tl.maximum(stop - begin, 0), TILE)
        masked = tl.minimum(tl.cdiv(tl.maximum(since_all - past - begin, 0), TILE), tiles)
        whole = tiles
        if UNTIL:
            whole = tl.maximum(tl.maximum(until_all - begin, 0) // TILE, masked)
        out = ((pair // heads).to(tl.int64) * keys + start + column) * heads + pair % heads
        out += part.to(tl.int64) * (tl.num_programs(1) // heads) * keys * heads
        kept = start + column < keys
    example, group = (pair // heads).to(tl.int64), pair % heads
    each = tl.cdiv(tiles, SPLITS)
    first = tl.minimum((part if BRANCH != "selected" else 0) * each, tiles)
    end = tl.minimum(first + each, tiles)
    masked = tl.minimum(tl.maximum(masked, first), end)
    whole = tl.minimum(tl.maximum(whole, masked), end)
    if not PEEL:
        masked, whole = end, end
    bounds = (first, masked, whole, end)
    key = start + column
    since = key * stride + size - 1 if BRANCH == "compressed" else key
    until = key + reach
    if spans is not None and BRANCH != "selected":
        row_of_key = tl.minimum(key, keys - 1) * 2
        since, until = tl.load(spans + row_of_key), tl.load(spans + row_of_key + 1)
    q += example * q_strides[0]
    dz += example * dz_strides[0]
    k += example * k_strides[0] + group * k_strides[2]
    v += example * v_strides[0] + group * v_strides[2]
    own = key_offsets(start, k_strides[1], keys, KEYS, True)
    k_tile = load_rows(k, own, min(DIM, WIDTH), WIDTH, PRECISION)
    k_tail = load_tail(k, own, k_tile, DIM, WIDTH, TAIL, PRECISION)
    v_tile = load_rows(v, key_offsets(start, v_strides[1], keys, KEYS, True), DIM_V, WIDTH_V, PRECISION)
    head = group * groups + tl.minimum(row % GROUP, groups - 1)
    real = row % GROUP < groups
    dk_total = tl.zeros([KEYS, WIDTH], tl.float32)
    if TAIL > 0:
        dk_rest = tl.zeros([KEYS, TAIL], tl.float32)
    dv_total = tl.zeros([KEYS, WIDTH_V], tl.float32)
    for section in tl.static_range(3):
        if section < 2 or UNTIL:
            for index in range(bounds[section], bounds[section + 1]):
                query = begin + index * TILE + row // GROUP
                inside = (query < stop) & real
                query = tl.minimum(query, stop - 1)
                if BRANCH == "selected":
                    query = tl.load(queries + query)
                long = query.to(tl.int64)
                line = (example * length + query) * (heads * groups) + head
                places = long * q_strides[1] + head * q_strides[2]
                q_tile = load_rows(q, places, min(DIM, WIDTH), WIDTH, PRECISION)
                q_tail = load_tail(q, places, q_tile, DIM, WIDTH, TAIL, PRECISION)
                dz_tile = load_rows(
                    dz, long * dz_strides[1] + head * dz_strides[2], DIM_V, WIDTH_V, PRECISION
                )
                mass = tl.where(inside, tl.load(masses + line), NEVER)
                mean = tl.load(inner + line * inner_step)
                weight = tl.load(gate + line * gate_step)
                scores = products(k_tile, k_tail, q_tile, q_tail, TAIL, PRECISION)
                pattern = tl.exp2(scores * factor - mass[None, :])
                if section != 1:
                    position = query + past
                    seen = position[None, :] >= since[:, None]
                    if UNTIL:
                        seen &= position[None, :] < until[:, None]
                    pattern = tl.where(seen, pattern, 0.0)
                pattern *= weight[None, :]
                dv_total = times(pattern, dz_tile, dv_total, PRECISION, False)
                slope = tl.dot(v_tile, tl.trans(dz_tile), input_precision=PRECISION) - mean[None, :]
                slope = pattern * slope
                dk_total = times(slope, q_tile, dk_total, PRECISION, False)
                if TAIL > 0:
                    dk_rest = times(slope, q_tail, dk_rest, PRECISION, False)
    if spans is not None and BRANCH == "selected":
        # Here, for they would be held through the loops.
        out = tl.load(bases + item) + part * KEYS + column
        kept = start + column < tl.load(spans + (example * keys + block) * 2 + 1)
    save_rows(dk, out * DIM, kept, dk_total * scale, min(DIM, WIDTH), WIDTH)
    if TAIL > 0:
        save_rows(dk + WIDTH, out * DIM, kept, dk_rest * scale, DIM - WIDTH, TAIL)
    save_rows(dv, out * DIM_V, kept, dv_total, DIM_V, WIDTH_V)


@triton.jit
@no_type_check
def sum_kernel(
    parts, total, first, number, heads, keys, size, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    block, pair = tl.program_id(0), tl.program_id(1)
    listed = pair * tl.num_programs(0) + block
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = (row < size)[:, None] & (columns < DIM)[None, :]
    start, count = tl.load(first + listed).to(tl.int64), tl.load(number + listed)
    tile = tl.zeros([ROWS, WIDTH], tl.float32)
    for index in range(count):
        tile += tl.load(
            parts + (((start + index) * size + row) * DIM)[:, None] + columns[None, :], mask=inside, other=0.0
        )
    key = block * size + row
    line = ((pair // heads).to(tl.int64) * keys + key) * heads + pair % heads
    save_rows(total, line * DIM, (row < size) & (key < keys), tile, DIM, WIDTH)


@triton.jit
@no_type_check
def text_sum_kernel(
    parts, total, seen, number, extra, heads, keys, size,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`sum_kernel` where several texts lie in a row: by tokens, for their blocks begin anywhere."""
    pair = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = key < keys
    begin = tl.load(seen + (pair // heads * keys + key) * 2, mask=inside, other=0)
    within = (key - begin) % size
    listed = pair * keys + key - within
    count = tl.load(number + listed, mask=inside, other=0)
    # The first piece of a block lies where its tokens do, the others behind all tokens.
    behind = tl.num_programs(1).to(tl.int64) * keys
    behind += tl.load(extra + listed, mask=inside, other=0).to(tl.int64) * size + within
    place = pair * keys + key
    tile = tl.zeros([ROWS, WIDTH], tl.float32)
    for index in range(tl.max(count, 0)):
        held = (index < count)[:, None] & (columns < DIM)[None, :]
        tile += tl.load(parts + (place * DIM)[:, None] + columns[None, :], mask=held, other=0.0)
        place = behind + index * size
    line = (pair // heads * keys + key) * heads + pair % heads
    save_rows(total, line * DIM, inside, tile, DIM, WIDTH)
