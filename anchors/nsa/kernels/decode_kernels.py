# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
"""Device functions of `decode`: the launches of one step, in the order in which they run.

Partial sums over a piece of the keys are (m, z, O) = (max s, Σ exp(s − m), Σ exp(s − m) v), with s in units of log 2.
Every program serves the G query heads of a group at once, padded to the 16 rows of a product. `row` counts examples
times groups.
"""

from typing import no_type_check

import triton
import triton.language as tl

from anchors._names import forwarding

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-2147483648)


@triton.jit
@no_type_check
def _complete(t, L: tl.constexpr, STRIDE: tl.constexpr):
    """Compressed tokens that a query at position t sees."""
    return tl.where(t + 1 >= L, (t + 1 - L) // STRIDE + 1, 0)


@triton.jit
@no_type_check
def _queries(
    q, strides, example, group, G: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    heads, columns = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    q += example.to(tl.int64) * strides[0] + (group * G + heads)[:, None] * strides[1] + columns[None, :]
    return tl.load(q, mask=(heads < G)[:, None] & (columns < DIM)[None, :], other=0.0)


@triton.jit
@no_type_check
def _rows(pointer, rows, seen, DIM: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    inside = seen[:, None] & (columns < DIM)[None, :]
    return tl.load(pointer + rows[:, None] * DIM + columns[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def _online(q_tile, k_tile, v_tile, seen, scale, top, mass, total, PRECISION: tl.constexpr):
    """One tile of keys more: its scores, and the partial sums with it."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
    raised = tl.where(seen[None, :], scores * LOG2E, -1e30)
    higher = tl.maximum(top, tl.max(raised, 1))
    pattern = tl.where(seen[None, :], tl.exp2(raised - higher[:, None]), 0.0)
    shrink = tl.exp2(top - higher)
    mass = mass * shrink + tl.sum(pattern, 1)
    product = tl.dot(pattern.to(v_tile.dtype), v_tile, input_precision=PRECISION)
    return scores, higher, mass, total * shrink[:, None] + product


@triton.jit
@no_type_check
def _keep(
    top, mass, part, first, split, splits, m, z, o,
    G: tl.constexpr, PADDED: tl.constexpr, DIM_V: tl.constexpr, WIDTH_V: tl.constexpr,
):  # fmt: skip
    """Stores the partial sums of one piece. A piece that saw nothing says so by z = 0, and stores no O.

    One with a score that is not a number says so by m, in which a maximum leaves no trace of it: no wrong output goes
    unnoticed.
    """
    m = tl.where(z == z, m, z)
    heads, columns = tl.arange(0, PADDED), tl.arange(0, WIDTH_V)
    place = (first.to(tl.int64) + heads) * splits + split
    tl.store(top + place, m, mask=heads < G)
    tl.store(mass + place, z, mask=heads < G)
    inside = ((heads < G) & (z > 0))[:, None] & (columns < DIM_V)[None, :]
    tl.store(part + place[:, None] * DIM_V + columns[None, :], o, mask=inside)


@triton.jit
@no_type_check
def _append(
    new_k, new_v, k, v, strides_k, strides_v, example, group, slot, fits,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
):  # fmt: skip
    columns, columns_v = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    inside, inside_v = columns < tl.where(fits, DIM, 0), columns_v < tl.where(fits, DIM_V, 0)
    new_k += example * strides_k[0] + group * strides_k[1]
    new_v += example * strides_v[0] + group * strides_v[1]
    # Both are on their way before either is waited for.
    key = tl.load(new_k + columns, mask=inside, other=0.0)
    value = tl.load(new_v + columns_v, mask=inside_v, other=0.0)
    tl.store(k + slot * DIM + columns, key, mask=inside)
    tl.store(v + slot * DIM_V + columns_v, value, mask=inside_v)


@triton.jit
@no_type_check
def _fresh(
    new, ready, ring, cache, slot, place,
    GIVEN: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Stores the compressed token that ends here: the one that is given, or the mean of the last l tokens."""
    columns, rows = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    if GIVEN:
        value = tl.load(ready + columns, mask=columns < DIM, other=0.0)
    else:
        value = tl.load(new + columns, mask=columns < DIM, other=0.0).to(tl.float32)
        # The row of the current token still holds the one that left, and another program may be replacing it.
        older = _rows(ring, rows, (rows < L) & (rows != slot), DIM, WIDTH).to(tl.float32)
        value = (value + tl.sum(older, 0)) / L
    tl.store(cache + place * DIM + columns, value.to(cache.dtype.element_ty), mask=columns < DIM)


@triton.jit
@no_type_check
def compress(
    q, nk_cmp, nv_cmp, nk_slc, nv_slc, nk_win, nv_win, nkc, nvc,
    k_slc, v_slc, k_win, v_win, k_cmp, v_cmp, kc, vc,
    length, position, scores, top, mass, part,
    q_strides, k_strides, v_strides, scale, groups, tokens, window, compressed, line, splits,
    GIVEN: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    G: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
    """Appends the token, completes the compressed token that ends with it, attends to a piece of the compressed ones.

    The strides of `k_strides` and `v_strides` are (example, group) of the new rows of cmp, slc and win in turn. A token
    beyond the cache's room is not stored.
    """
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    example, group = row // groups, row % groups
    q_tile = _queries(q, q_strides, example, group, G, PADDED, DIM, WIDTH)
    t = tl.load(length + example)
    fits = t < tokens
    complete = tl.minimum(_complete(t, L, STRIDE), compressed)
    # Cut anew at every step: a cache that is far from full is read by as many programs as a full one.
    chunk = tl.maximum(tl.cdiv(tl.cdiv(complete, tl.num_programs(0)), TILE), 1) * TILE
    ends = fits & (t + 1 >= L) & ((t + 1 - L) % STRIDE == 0)
    kc += row * compressed * DIM
    vc += row * compressed * DIM_V
    k_cmp += row * L * DIM
    v_cmp += row * L * DIM_V
    if ends & ((complete - 1) // chunk == split):
        nk_own = nk_cmp + example * k_strides[0] + group * k_strides[1]
        nv_own = nv_cmp + example * v_strides[0] + group * v_strides[1]
        _fresh(nk_own, nkc + row * DIM, k_cmp, kc, t % L, complete - 1, GIVEN, L, ROWS, DIM, WIDTH)
        _fresh(nv_own, nvc + row * DIM_V, v_cmp, vc, t % L, complete - 1, GIVEN, L, ROWS, DIM_V, WIDTH_V)
    # The last piece is the shortest.
    if split == tl.num_programs(0) - 1:
        if group == 0:
            tl.store(position + example, t)
        _append(
            nk_cmp, nv_cmp, k_cmp, v_cmp, k_strides[0:2], v_strides[0:2], example, group, t % L, fits,
            DIM, DIM_V, WIDTH, WIDTH_V,
        )  # fmt: skip
        _append(
            nk_slc, nv_slc, k_slc + row * tokens * DIM, v_slc + row * tokens * DIM_V, k_strides[2:4], v_strides[2:4],
            example, group, t, fits, DIM, DIM_V, WIDTH, WIDTH_V,
        )  # fmt: skip
        _append(
            nk_win, nv_win, k_win + row * window * DIM, v_win + row * window * DIM_V, k_strides[4:6], v_strides[4:6],
            example, group, t % window, fits, DIM, DIM_V, WIDTH, WIDTH_V,
        )  # fmt: skip
    # The loop reads the compressed token that other threads of this program have just stored.
    tl.debug_barrier()
    m = tl.full([PADDED], -1e30, tl.float32)
    z = tl.full([PADDED], 0.0, tl.float32)
    o = tl.full([PADDED, WIDTH_V], 0.0, tl.float32)
    heads = tl.arange(0, PADDED)
    scores += row * G * line
    stop = tl.minimum(complete, (split + 1) * chunk)
    for start in range(split * chunk, stop, TILE):
        tile = start + tl.arange(0, TILE)
        seen = tile < stop
        k_tile = _rows(kc, tile, seen, DIM, WIDTH)
        v_tile = _rows(vc, tile, seen, DIM_V, WIDTH_V)
        s, m, z, o = _online(q_tile, k_tile, v_tile, seen, scale, m, z, o, PRECISION)
        # Whole lines at once: what is stored beyond the last compressed token is never used.
        there = (heads < G)[:, None] & (tile < line)[None, :]
        tl.store(scores + heads[:, None] * line + tile[None, :], s, mask=there)
    _keep(top, mass, part, row * G, split, splits, m, z, o, G, PADDED, DIM_V, WIDTH_V)


@triton.jit
@no_type_check
def _lse(
    top, mass, row, splits, SPLITS: tl.constexpr, PIECES: tl.constexpr, G: tl.constexpr, PADDED: tl.constexpr
):
    """log2 Σ_i exp2(m_i) z_i of each head, over the pieces i of the compressed tokens."""
    heads, pieces = tl.arange(0, PADDED), tl.arange(0, PIECES)
    place = (row * G + heads)[:, None] * splits + pieces[None, :]
    inside = (heads < G)[:, None] & (pieces < SPLITS)[None, :]
    m = tl.load(top + place, mask=inside, other=-1e30)
    z = tl.load(mass + place, mask=inside, other=0.0)
    peak = tl.max(m, 1)
    total = tl.sum(z * tl.exp2(m - peak[:, None]), 1)
    return tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), 1e30)


@triton.jit
@no_type_check
def _scores(scores, row, tile, line, G: tl.constexpr, PADDED: tl.constexpr):
    heads = tl.arange(0, PADDED)
    inside = (heads < G)[:, None] & (tile < line)[None, :]
    return tl.load(scores + (row * G + heads)[:, None] * line + tile[None, :], mask=inside, other=-1e30)


@triton.jit
@no_type_check
def _choice(
    shares, idx, row, t, complete, compressed, tokens,
    L: tl.constexpr, STRIDE: tl.constexpr, LP: tl.constexpr, N: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    BLOCKS: tl.constexpr, CHOSEN: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Importance of the blocks of a row from its shares, and the n highest of them."""
    blocks = tl.arange(0, BLOCKS)
    own = tl.minimum(t, tokens - 1) // LP
    importance = tl.full([BLOCKS], 0.0, tl.float32)
    first = blocks * (LP // STRIDE) + (1 - L // STRIDE)
    shares += row * compressed
    for shift in tl.static_range(LP // STRIDE + L // STRIDE - 1):
        # The strides that block j shares with its compressed token of this rank: 1, 2, 2, 2, 1 for l = 2d, l' = 4d.
        weight = tl.minimum(tl.minimum(shift + 1, L // STRIDE), LP // STRIDE + L // STRIDE - 1 - shift)
        token = first + shift
        inside = (token >= 0) & (token < complete)
        importance += tl.load(shares + token, mask=inside, other=0.0) * weight
    # Bits of a float that is not negative order like the float. Unforced blocks lie below zero, and blocks that are no
    # candidates at the bottom, behind every candidate of the same key.
    bits = importance.to(tl.int32, bitcast=True)
    forced = (blocks < INIT) | (blocks > own - LOCAL)
    key = tl.where(blocks <= own, tl.where(forced, bits, bits ^ LOWEST), LOWEST)
    wanted = tl.minimum(own + 1, N)
    # The highest bar that `wanted` keys reach, some bits of it at a time; its sign bit counts from below.
    levels = tl.arange(0, 1 << BITS)
    bar = wanted * 0
    for step in range(32 // BITS):
        low = 32 - BITS * (step + 1)
        reached = key[:, None] >= ((bar | (levels << low)) ^ LOWEST)[None, :]
        enough = tl.sum(reached.to(tl.int32), 0) >= wanted
        bar = bar | ((tl.sum(enough.to(tl.int32), 0) - 1) << low)
    bar = bar ^ LOWEST
    above, level = (key > bar).to(tl.int32), (key == bar).to(tl.int32)
    room = wanted - tl.sum(above, 0)
    both = above + (level << 16)
    before = tl.cumsum(both, 0) - both
    chosen = (above > 0) | ((level > 0) & ((before >> 16) < room))
    place = (before & 0xFFFF) + tl.minimum(before >> 16, room)
    tl.store(idx + row * N + place, blocks, mask=chosen)
    rank = tl.arange(0, CHOSEN)
    tl.store(idx + row * N + rank, tl.full([CHOSEN], -1, tl.int32), mask=(rank >= wanted) & (rank < N))


@triton.jit
@no_type_check
def _last(arrived, count):
    """Whether this program is the last of `count` to arrive here; it then sees what the others wrote."""
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(arrived, 0)
    return last


@triton.jit
@no_type_check
def choose(
    q, k_win, v_win, scores, shares, top, mass, part, idx, position, length, arrived,
    q_strides, scale, groups, tokens, window, compressed, line, splits, before, sums,
    L: tl.constexpr, STRIDE: tl.constexpr, LP: tl.constexpr, N: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    BLOCKS: tl.constexpr, CHOSEN: tl.constexpr, SPLITS: tl.constexpr, PIECES: tl.constexpr, TILE_SUM: tl.constexpr,
    G: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The choice of the blocks by the last of the programs that sum the patterns of a row; advances the length.

    That waits for itself more than for the memory, so that programs from `sums` on attend to pieces of the window.
    """
    # By rows first: sums of every row start before the first piece of a window.
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.load(position + row // groups)
    if piece < sums:
        complete = tl.minimum(_complete(t, L, STRIDE), compressed)
        if piece * TILE_SUM < complete:
            tile = piece * TILE_SUM + tl.arange(0, TILE_SUM)
            # On their way while the log-sum-exps are being found.
            s = _scores(scores, row, tile, line, G, PADDED)
            lse = _lse(top, mass, row, splits, SPLITS, PIECES, G, PADDED)
            share = tl.sum(tl.exp2(s * LOG2E - lse[:, None]), 0)
            tl.store(shares + row * compressed + tile, share, mask=tile < complete)
        if _last(arrived + row, sums):
            # Only the first launch reads the length, so that any later one may advance it.
            if row % groups == 0:
                tl.store(length + row // groups, t + 1)
            _choice(
                shares, idx, row, t, complete, compressed, tokens,
                L, STRIDE, LP, N, INIT, LOCAL, BLOCKS, CHOSEN, BITS,
            )  # fmt: skip
    else:
        q_tile = _queries(q, q_strides, row // groups, row % groups, G, PADDED, DIM, WIDTH)
        m, z, o = _piece(
            q_tile, k_win + row * window * DIM, v_win + row * window * DIM_V, idx, (piece - sums) * CHUNK,
            tl.minimum(window, t + 1), tl.minimum(t, tokens - 1), scale, True, LP, PADDED, DIM, DIM_V, WIDTH, WIDTH_V, CHUNK, TILE, PRECISION,
        )  # fmt: skip
        _keep(top, mass, part, row * G, before + piece - sums, splits, m, z, o, G, PADDED, DIM_V, WIDTH_V)


@triton.jit
@no_type_check
def _piece(
    q_tile, k, v, idx, start, held, t, scale,
    RECENT: tl.constexpr, LP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums over the slots from `start` on of the `held` ones: of the blocks of `idx`, or of the window."""
    stop = tl.minimum(held, start + CHUNK)
    m = tl.full([PADDED], -1e30, tl.float32)
    z = tl.full([PADDED], 0.0, tl.float32)
    o = tl.full([PADDED, WIDTH_V], 0.0, tl.float32)
    for first in range(start, stop, TILE):
        slots = first + tl.arange(0, TILE)
        inside = slots < stop
        if RECENT:
            # The order of keys is of no consequence, so the window's ring is read as it lies.
            tile = slots
        elif LP % TILE == 0 and CHUNK % TILE == 0:
            # One block a tile: a number, for keys behind a tensor of addresses are not fetched tiles ahead.
            tile = tl.load(idx + first // LP) * LP + slots % LP
        else:
            tile = tl.load(idx + slots // LP, mask=inside, other=0) * LP + slots % LP
        seen = inside & (tile <= t)
        k_tile = _rows(k, tile, seen, DIM, WIDTH)
        v_tile = _rows(v, tile, seen, DIM_V, WIDTH_V)
        _, m, z, o = _online(q_tile, k_tile, v_tile, seen, scale, m, z, o, PRECISION)
    return m, z, o


@triton.jit
@no_type_check
def read(
    q, k_slc, v_slc, idx, position, top, mass, part, q_strides, scale, groups, tokens, splits, before,
    LP: tl.constexpr, N: tl.constexpr, G: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends to a piece of the chosen blocks; `before` is the first."""
    piece, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    example, group = row // groups, row % groups
    q_tile = _queries(q, q_strides, example, group, G, PADDED, DIM, WIDTH)
    t = tl.minimum(tl.load(position + example), tokens - 1)
    m, z, o = _piece(
        q_tile, k_slc + row * tokens * DIM, v_slc + row * tokens * DIM_V, idx + row * N, piece * CHUNK,
        tl.minimum(t // LP + 1, N) * LP, t, scale, False, LP, PADDED, DIM, DIM_V, WIDTH, WIDTH_V, CHUNK, TILE, PRECISION,
    )  # fmt: skip
    _keep(top, mass, part, row * G, before + piece, splits, m, z, o, G, PADDED, DIM_V, WIDTH_V)


@triton.jit
@no_type_check
def merge(
    gates, top, mass, part, position, out, gate_strides, tokens,
    SELECTED: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr, PIECES: tl.constexpr,
    DIM_V: tl.constexpr, WIDTH_V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Joins the pieces of each branch and the branches, weighted by the gates (Eq. 5).

    O = Σ_i exp(m_i − m) O_i / Σ_i exp(m_i − m) z_i; `SELECTED` and `WINDOW` are the first pieces of those branches.
    """
    head, example = tl.program_id(0), tl.program_id(1).to(tl.int64)
    line = example * tl.num_programs(0) + head
    gates += example * gate_strides[0] + head * gate_strides[1]
    top += line * SPLITS
    mass += line * SPLITS
    pieces, columns, branches = tl.arange(0, PIECES), tl.arange(0, WIDTH_V), tl.arange(0, 4)
    branch = (pieces >= SELECTED).to(tl.int32) + (pieces >= WINDOW).to(tl.int32)
    m = tl.load(top + pieces, mask=pieces < SPLITS, other=-1e30)
    z = tl.load(mass + pieces, mask=pieces < SPLITS, other=0.0)
    m = tl.where(branch[None, :] == branches[:, None], m[None, :], -1e30)
    peak = tl.max(m, 1)
    total = tl.sum(tl.where(m <= -1e29, 0.0, z[None, :] * tl.exp2(m - peak[:, None])), 1)
    gate = tl.load(gates + branches * gate_strides[2], mask=branches < 3, other=0.0).to(tl.float32)
    factor = tl.where(total == 0, 0.0, gate / tl.where(total == 0, 1.0, total))
    o = tl.full([WIDTH_V], 0.0, tl.float32)
    for start in range(0, SPLITS, TILE):
        tile = start + tl.arange(0, TILE)
        whose = (tile >= SELECTED).to(tl.int32) + (tile >= WINDOW).to(tl.int32)
        tops = tl.load(top + tile, mask=tile < SPLITS, other=-1e30)
        own = tl.where(whose[None, :] == branches[:, None], tops[None, :], -1e30)
        weight = tl.sum(tl.where(own <= -1e29, 0.0, factor[:, None] * tl.exp2(own - peak[:, None])), 0)
        # Behind a piece that saw nothing lies what an earlier step left there.
        inside = (tops > -1e29)[:, None] & (columns < DIM_V)[None, :]
        place = (line * SPLITS + tile)[:, None] * DIM_V + columns[None, :]
        o += tl.sum(weight[:, None] * tl.load(part + place, mask=inside, other=0.0), 0)
    # A token that found no room has no output; a wrong one would go unnoticed.
    o = tl.where(tl.load(position + example) < tokens, o, float("nan"))
    tl.store(out + line * DIM_V + columns, o.to(out.dtype.element_ty), mask=columns < DIM_V)


__getattr__ = forwarding(__name__)
