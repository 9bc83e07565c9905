# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
"""Triton kernels for the choice of blocks in Native Sparse Attention, on CUDA.

    p_i  = Σ_{h in group} exp(scale · ⟨q_h, k^cmp_i⟩ − lse_h)                                    (Eqs. 8 and 10)
    P_j  = Σ_i W_ij p_i,  W_ij = |[i·d, i·d + l) ∩ [j·l', (j + 1)·l')| / d                             (Eq. 9)
    I_t  = the n first of {j ≤ ⌊t / l'⌋}: forced ones, then larger P_j, then smaller j                (Eq. 11)

With r = l' / d and m = l / d ≤ r, compressed token i = a·r + u counts min(m, r − u) times in block a and the rest
of m times in block a + 1: two weighted sums over u and a shift by one block, no matrix product. Importance lives
for a chunk of queries at a time. The n-th largest score is found by bisection over the bits of its
order-preserving integer, from the n-th largest of the largest of every part of the row on, so nothing is sorted and
ties go to the lower index. No atomics: two runs agree bit for bit. The literal twin is `anchors.nsa.reference`.

Source: Yuan et al., "Native Sparse Attention" (ACL 2025), sections 3.3 and 3.4.
"""

from collections.abc import Iterator, Mapping
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from anchors.attention.kernels import LOG2E, cdiv, dense, nearest, power_of_2, precision_of
from anchors.errors import AnchorsError
from anchors.nsa.geometry import Geometry
from anchors.nsa.kernels import ranges
from anchors.nsa.kernels.lists import Inverse, Union, inverse, rho, union
from anchors.nsa.kernels.tiles import load_rows, load_tail, parted, products
from anchors.nsa.texts import Layout

__all__ = ["TUNING", "Inverse", "Union", "block_importance", "inverse", "rho", "select", "select_blocks", "union"]  # fmt: skip

LOWEST, HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
Tuning = Mapping[str, Mapping[str, Any]]
TUNING: Tuning = {
    # `rows` queries × heads by `keys` compressed keys; `flip` puts the keys on the rows of the product; `boxes`: the copy
    # engine reads the keys where it can.
    "score": {"rows": 128, "keys": 64, "flip": True, "boxes": 1, "num_warps": 4, "num_stages": 3},
    # One or two heads a group: more positions in as many rows, and more sums to hold.
    "score.few": {"rows": 64, "keys": 64, "flip": True, "num_warps": 4, "num_stages": 2},
    "score.float32": {"rows": 64, "keys": 32, "flip": False, "num_warps": 4, "num_stages": 1},
    # Scores that a program (one row at least) and a warp hold in registers; parts of a row whose largest bound the choice;
    # blocks from which on queries are cut where the width doubles.
    "topn": {"scores": 1024, "per_warp": 1024, "tops": 128, "least": 256},
}
"""Sizes by kernel; those of `tuning[kernel]` go over them."""


@triton.jit
@no_type_check
def _products(
    q_main, q_tail, k, places, token, example, group, KEYS: tl.constexpr, BOXES: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, TAIL: tl.constexpr, FLIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if BOXES:
        k_main = nearest(
            tl.reshape(k.load([example.to(tl.int32), token, group, 0]), [KEYS, WIDTH]), PRECISION
        )
        k_tail = k_main
    else:
        k_main = load_rows(k, places, min(DIM, WIDTH), WIDTH, PRECISION)
        k_tail = load_tail(k, places, k_main, DIM, WIDTH, TAIL, PRECISION)
    if FLIP:
        scores = products(k_main, k_tail, q_main, q_tail, TAIL, PRECISION)
    else:
        scores = products(q_main, q_tail, k_main, k_tail, TAIL, PRECISION)
    return scores


@triton.jit
@no_type_check
def _shares(
    q_main, q_tail, mass, seen, kc, k_stride, ahead, example, group, block, compressed, scale, BOXES: tl.constexpr,
    PER: tl.constexpr, REACH: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
    SLOTS: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, FLIP: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the compressed tokens that start in each block give to it, and to the block behind it."""
    row = tl.arange(0, BLOCKS * SLOTS)
    slot = row % SLOTS
    tokens = (block + row // SLOTS) * PER + slot
    places = (ahead + tl.minimum(tokens, compressed - 1)).to(tl.int64) * k_stride
    scores = _products(
        q_main, q_tail, kc, places, ahead + block * PER, example, group, BLOCKS * SLOTS, BOXES, DIM, WIDTH, TAIL, FLIP,
        PRECISION,
    )  # fmt: skip
    if FLIP:
        heads = tl.exp2(scores * scale - mass[None, :])
        pattern = tl.trans(tl.sum(tl.reshape(heads, [BLOCKS * SLOTS, GROUP, TILE]), 1))
    else:
        heads = tl.exp2(scores * scale - mass[:, None])
        pattern = tl.sum(tl.reshape(heads, [GROUP, TILE, BLOCKS * SLOTS]), 0)
    if MASKED or SLOTS != PER:
        pattern = tl.where((tokens[None, :] < seen[:, None]) & (slot < PER)[None, :], pattern, 0.0)
    pattern = tl.reshape(pattern, [TILE, BLOCKS, SLOTS])
    here = tl.minimum(REACH, PER - tl.arange(0, SLOTS)).to(tl.float32)[None, None, :]
    return tl.sum(pattern * here, 2), tl.sum(pattern * (REACH - here), 2)


@triton.jit
@no_type_check
def _walk(
    q_main, q_tail, mass, seen, kc, k_stride, ahead, example, group, scores, inside, full, stop, compressed, columns, scale,
    BOXES: tl.constexpr, PER: tl.constexpr, REACH: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
    SLOTS: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, FLIP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Importance of all blocks for a tile of queries, of which those `inside` are stored."""
    order = tl.arange(0, BLOCKS)
    turn = tl.zeros([TILE, BLOCKS], tl.int32) + ((order + BLOCKS - 1) % BLOCKS)[None, :]
    before = tl.zeros([TILE, BLOCKS], tl.float32)
    for tile in range(full):
        here, there = _shares(
            q_main, q_tail, mass, seen, kc, k_stride, ahead, example, group, tile * BLOCKS, compressed, scale, BOXES, PER, REACH,
            DIM, WIDTH, TAIL, SLOTS, BLOCKS, TILE, GROUP, FLIP, False, PRECISION,
        )  # fmt: skip
        if REACH > 1:
            turned = tl.gather(there, turn, 1)
            here += tl.where(order[None, :] == 0, before, turned)
            before = turned
        tl.store(scores[:, None] + (tile * BLOCKS + order)[None, :], here, mask=inside[:, None])
    for tile in range(full, stop):
        here, there = _shares(
            q_main, q_tail, mass, seen, kc, k_stride, ahead, example, group, tile * BLOCKS, compressed, scale, BOXES, PER, REACH,
            DIM, WIDTH, TAIL, SLOTS, BLOCKS, TILE, GROUP, FLIP, True, PRECISION,
        )  # fmt: skip
        if REACH > 1:
            turned = tl.gather(there, turn, 1)
            here += tl.where(order[None, :] == 0, before, turned)
            before = turned
        block = tile * BLOCKS + order
        tl.store(scores[:, None] + block[None, :], here, mask=inside[:, None] & (block < columns)[None, :])


@triton.jit
@no_type_check
def _score(
    q, kc, lse, scores, texts, q_strides, k_strides, lse_strides, first, rows, heads, past, compressed, columns, scale,
    l, d, lp, length, BOXES: tl.constexpr, PER: tl.constexpr, REACH: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    TAIL: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    FLIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The last queries see most and start first.
    start = tl.num_programs(0) - 1 - tl.program_id(0)
    group, example = tl.program_id(1), tl.program_id(2).to(tl.int64)
    # Head by head, so that the sum over heads stays within a thread.
    row = tl.arange(0, TILE * GROUP)
    query, head = start * TILE + row % TILE, row // TILE
    real = (query < rows) & (head < heads)
    query, head = tl.minimum(query, rows - 1), group * heads + tl.minimum(head, heads - 1)
    places = (first + query).to(tl.int64) * q_strides[1] + head * q_strides[2]
    q += example * q_strides[0]
    q_main = load_rows(q, places, min(DIM, WIDTH), WIDTH, PRECISION)
    q_tail = q_main
    if TAIL > 0:
        q_tail = load_rows(q + WIDTH, places, DIM - WIDTH, TAIL, PRECISION)
    lse += example * lse_strides[0]
    mass = tl.load(lse + (first + query).to(tl.int64) * lse_strides[1] + head * lse_strides[2])
    mass = tl.where(real & (mass != float("-inf")), mass * LOG2E, float("inf"))
    if not BOXES:
        kc += example * k_strides[0] + group * k_strides[2]
    query = start * TILE + tl.arange(0, TILE)
    earliest = past + first + start * TILE
    latest = past + first + tl.minimum(start * TILE + TILE, rows) - 1
    scores += ((example * rows + query) * tl.num_programs(1) + group) * columns
    if texts is None:
        seen = tl.maximum(past + first + query + 1 - l + d, 0) // d
        full = tl.minimum(tl.maximum(earliest + 1 - l + d, 0) // (d * BLOCKS * PER), columns // BLOCKS)
        stop = tl.cdiv(tl.minimum(latest // lp + 1, columns), BLOCKS)
        _walk(
            q_main, q_tail, mass, seen, kc, k_strides[1], 0, example, group, scores, query < rows, full, stop, compressed, columns,
            scale, BOXES, PER, REACH, DIM, WIDTH, TAIL, SLOTS, BLOCKS, TILE, GROUP, FLIP, PRECISION,
        )  # fmt: skip
    else:
        texts += example * (past + length) * 3
        # Text by text: a tile of queries lies in one mostly, and blocks are counted within it.
        while earliest <= latest:
            begin, end = tl.load(texts + earliest * 3), tl.load(texts + earliest * 3 + 1)
            ahead = tl.load(texts + earliest * 3 + 2)
            last = tl.minimum(latest, end - 1)
            position = past + first + query
            seen = tl.maximum(position - begin + 1 - l + d, 0) // d
            full = tl.minimum(
                tl.maximum(earliest - begin + 1 - l + d, 0) // (d * BLOCKS * PER), columns // BLOCKS
            )
            stop = tl.cdiv(tl.minimum((last - begin) // lp + 1, columns), BLOCKS)
            _walk(
                q_main, q_tail, mass, seen, kc, k_strides[1], ahead, example, group, scores,
                (position >= begin) & (position <= last), full, stop, compressed - ahead, columns, scale,
                BOXES, PER, REACH, DIM, WIDTH, TAIL, SLOTS, BLOCKS, TILE, GROUP, FLIP, PRECISION,
            )  # fmt: skip
            earliest = end


@triton.jit
@no_type_check
def _reached(keys, need, threshold, reach, step, rising):
    """The largest threshold that `need` keys of a row reach, or a lower one that exactly so many do; and how many do.

    From a threshold that enough reach, in steps that double while they are `rising`, and are halved from the first on that
    goes too far.
    """
    more = tl.max(tl.where(reach > need, step, 0), 0)
    while more > 0:
        trial = tl.where(threshold > HIGHEST - step, HIGHEST, threshold + step)
        held = tl.sum((keys >= trial[:, None]).to(tl.int32), 1)
        better = (held >= need) & (reach > need)
        threshold = tl.where(better, trial, threshold)
        reach = tl.where(better, held, reach)
        rising = tl.where(better, rising, 0)
        step = tl.where(rising > 0, tl.minimum(step, 1 << 29) * 2, step // 2)
        more = tl.max(tl.where(reach > need, step, 0), 0)
    return threshold, reach


@triton.jit
@no_type_check
def _bits(word):
    """How many bits of a 32-bit word are set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word += word >> 8
    return (word + (word >> 16)) & 63


@triton.jit
@no_type_check
def _topn(
    scores, idx, texts, force, ban, bias, force_strides, ban_strides, bias_strides, lines, first, rows, queries, groups,
    past, columns, lp, n_init, n_local,
    N: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TOPS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group, query = line % groups, first + line // groups % rows
    example = (line // groups // rows).to(tl.int64)
    j = tl.arange(0, WIDTH)
    own = past + query
    if texts is not None:
        own -= tl.load(texts + (example * (past + queries) + own) * 3, mask=line < lines, other=0)
    own = own // lp
    last = tl.where(line < lines, tl.minimum(own, columns - 1), -1)
    candidate = j[None, :] <= last[:, None]
    forced = (j < n_init)[None, :] | (j[None, :] > own[:, None] - n_local)
    if force is not None:
        place = example * force_strides[0] + query * force_strides[1] + group * force_strides[2]
        asked = tl.load(force + place[:, None] + j[None, :] * force_strides[3], mask=candidate, other=0)
        forced = forced | (asked != 0)
    if ban is not None:
        place = example * ban_strides[0] + query * ban_strides[1] + group * ban_strides[2]
        asked = tl.load(ban + place[:, None] + j[None, :] * ban_strides[3], mask=candidate, other=0)
        candidate = candidate & (asked == 0)
    key = tl.zeros([ROWS, WIDTH], tl.int32)
    if scores is not None:
        # Runs of 16 blocks are read whole, in wide loads.
        near = (j < columns)[None, :] & ((j // 16)[None, :] < ((last + 16) // 16)[:, None])
        score = tl.load(scores + line.to(tl.int64)[:, None] * columns + j[None, :], mask=near, other=0.0)
        if bias is not None:
            place = example * bias_strides[0] + query * bias_strides[1] + group * bias_strides[2]
            score += tl.load(bias + place[:, None] + j[None, :] * bias_strides[3], mask=candidate, other=0.0)
        # −0 becomes 0.
        score += 0.0
        key = score.to(tl.int32, bitcast=True)
        key = key ^ ((key >> 31) & 0x7FFFFFFF)
        key = tl.where(score == score, key, LOWEST + 1)
    if force is None:
        key = tl.where(forced, HIGHEST, key)
    else:
        # Where more are forced than there are places, the choice is among them.
        few = (tl.sum((forced & candidate).to(tl.int32), 1) <= N)[:, None]
        key = tl.where(forced, tl.where(few, HIGHEST, key), tl.where(few, key, LOWEST))
    key = tl.where(candidate, key, LOWEST)
    threshold = tl.full([ROWS], LOWEST + 1, tl.int32)
    once = tl.full([ROWS], 1, tl.int32)
    need, step, reach = once * N, once << 30, tl.sum((key > LOWEST).to(tl.int32), 1)
    # The n-th largest of the largest of every TOPS-th key is a bound from below, and mostly a near one.
    tops = key
    if TOPS < WIDTH:
        tops = tl.max(tl.reshape(key, [ROWS, WIDTH // TOPS, TOPS]), 1)
    held = tl.sum((tops >= 0).to(tl.int32), 1)
    better = (held >= need) & (reach > need)
    threshold = tl.where(better, 0, threshold)
    if TOPS < WIDTH:
        held = tl.where(reach > need, tl.where(better, held, N + 1), 0)
        threshold, _ = _reached(tops, need, threshold, held, step, once * 0)
        reach = tl.sum((key >= threshold[:, None]).to(tl.int32), 1)
        threshold, reach = _reached(key, need, threshold, reach, once << 16, once)
    else:
        reach = tl.where(better, held, reach)
        threshold, reach = _reached(key, need, threshold, reach, step, once * 0)
    chosen = key >= threshold[:, None]
    if tl.max(reach, 0) > N:
        # Of equal ones the first.
        level = key == threshold[:, None]
        spare = N - reach + tl.sum(level.to(tl.int32), 1)
        chosen = (key > threshold[:, None]) | (level & (tl.cumsum(level.to(tl.int32), 1) <= spare[:, None]))
    # The place of a block is its rank: found from 32 of them at a time as bits, so that nothing is scattered.
    bit = chosen.to(tl.int32) << (j % 32)[None, :]
    words = tl.sum(tl.reshape(bit, [ROWS, WIDTH // 32, 32]), 2)
    ends = tl.cumsum(_bits(words), 1)
    slot = tl.zeros([ROWS, PLACES], tl.int32) + tl.arange(0, PLACES)[None, :]
    word = tl.sum((ends[:, None, :] <= slot[:, :, None]).to(tl.int32), 2)
    some = word < WIDTH // 32
    word = tl.minimum(word, WIDTH // 32 - 1)
    left = tl.gather(words, word, 1)
    rank = slot - tl.gather(ends, word, 1) + _bits(left)
    block = word * 32
    for power in tl.static_range(4, -1, -1):
        lower = _bits(left & ((1 << (1 << power)) - 1))
        behind = rank >= lower
        rank -= tl.where(behind, lower, 0)
        left = tl.where(behind, left >> (1 << power), left)
        block += tl.where(behind, 1 << power, 0)
    idx += ((example * queries + query) * groups + group) * N
    tl.store(idx[:, None] + slot, tl.where(some, block, -1), mask=(slot < N) & (line < lines)[:, None])


def block_importance(
    q: Float[Tensor, "batch query heads dim"],
    kc: Float[Tensor, "batch compressed groups dim"],
    lse: Float[Tensor, "batch query heads"],
    *,
    l: int,
    d: int,
    lp: int,
    tokens: int,
    scale: float,
    past: int = 0,
    tuning: Tuning | None = None,
) -> Float[Tensor, "batch query groups blocks"]:
    """P of every query, group and block, whole: `select_blocks` never keeps it.

    Args:
        lse: natural log Σ exp of the scaled scores of the compressed branch; −∞ where a query sees nothing.
    """
    geometry = Geometry(l, d, lp, n=1, n_init=0, n_local=0)
    batch, queries, _, _ = q.shape
    scores = torch.zeros(
        batch, queries, kc.shape[2], geometry.blocks(tokens), dtype=torch.float32, device=q.device
    )
    _launch_score(q, kc, lse, scores, None, 0, geometry, scale, past, tuning)
    return scores


def select(
    importance: Float[Tensor, "batch query groups blocks"],
    *,
    geometry: Geometry,
    tokens: int,
    past: int = 0,
    force: Tensor | None = None,
    ban: Tensor | None = None,
    bias: Tensor | None = None,
    tuning: Tuning | None = None,
) -> Int[Tensor, "batch query groups n"]:
    """I_t: the top-n blocks of each query and group (Eq. 11), ascending, −1 at the end where there are fewer.

    Args:
        importance: P; not-a-number counts as the lowest score of all.
        force, ban: blocks always or never to choose; `ban` wins.
        bias: added to the importance. All three broadcast to [batch, query, groups, blocks].
    """
    if importance.shape[-1] != geometry.blocks(tokens):
        raise AnchorsError(
            f"The importance has {importance.shape[-1]} blocks, but {tokens} tokens begin {geometry.blocks(tokens)}.",
            "Compute it with the same geometry and tokens.",
            code="shape",
        )
    wishes = _wishes(importance.shape, force, ban, bias)
    idx = _empty_choice(importance, importance.shape[1], importance.shape[2], geometry.n)
    scores = importance.float().contiguous()
    _launch_topn(
        scores, idx, None, wishes, 0, importance.shape[1], importance.shape[-1], geometry, past, tuning
    )
    return idx


@torch.no_grad()
def select_blocks(
    q: Float[Tensor, "batch query heads dim"],
    kc: Float[Tensor, "batch compressed groups dim"],
    lse: Float[Tensor, "batch query heads"],
    *,
    geometry: Geometry,
    tokens: int,
    scale: float,
    past: int = 0,
    force: Tensor | None = None,
    ban: Tensor | None = None,
    bias: Tensor | None = None,
    layout: Layout | None = None,
    chunk_bytes: int = 256 << 20,
    tuning: Tuning | None = None,
) -> Int[Tensor, "batch query groups n"]:
    """I_t from the queries and the compressed keys (Eqs. 8 to 11); no gradient flows through the choice.

    Args:
        lse: natural log Σ exp of the scaled scores of the compressed branch; −∞ where a query sees nothing.
        tokens, past: keys there are, and how many of them come before the first query.
        force, ban, bias: as in `select`.
        layout: several texts in a row; blocks are then counted within a query's own.
        chunk_bytes: importance that exists at a time.
        tuning: overrides of `TUNING`.
    """
    batch, queries, _, _ = q.shape
    groups, blocks = kc.shape[2], geometry.blocks(tokens)
    wishes = _wishes((batch, queries, groups, blocks), force, ban, bias)
    idx = _empty_choice(q, queries, groups, geometry.n)
    # Queries that see n blocks or fewer choose them all.
    texts = None if layout is None else layout.tokens[:, : past + queries].contiguous()
    early = min(queries, max(0, geometry.n * geometry.lp - past))
    if early:
        columns = min(blocks, geometry.n)
        _launch_topn(None, idx, texts, wishes, 0, early, columns, geometry, past, tuning)
    buffer = None
    least = _table("topn", tuning)["least"]
    for start, stop, columns in _chunks(
        early, queries, batch * groups, past, geometry.lp, chunk_bytes, least
    ):
        size = batch * (stop - start) * groups * columns
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.float32, device=q.device)
        scores = buffer[:size].view(batch, stop - start, groups, columns)
        _launch_score(q, kc, lse, scores, texts, start, geometry, scale, past, tuning)
        _launch_topn(scores, idx, texts, wishes, start, stop, columns, geometry, past, tuning)
    return idx


def _launch_score(
    q: Tensor, kc: Tensor, lse: Tensor, scores: Tensor, texts: Tensor | None, first: int, geometry: Geometry,
    scale: float, past: int, tuning: Tuning | None,
) -> None:  # fmt: skip
    """Fills scores [batch, rows, groups, columns] for the query rows from `first` on."""
    batch, rows, groups, columns = scores.shape
    if not kc.shape[1]:
        scores.zero_()
        return
    q, kc = dense(q), dense(kc)
    heads, dim = q.shape[2] // groups, q.shape[3]
    group = power_of_2(heads)
    kind = "score.float32" if q.dtype == torch.float32 else "score.few" if group <= 2 else "score"
    table = _table(kind, tuning)
    tile = max(1, table.pop("rows") // group)
    per = geometry.lp // geometry.d
    slots = power_of_2(per)
    width, tail = parted(dim)
    columns_of_tile = max(1, table.pop("keys") // slots)
    boxes = bool(table.pop("boxes", 0)) and per == slots and dim == width and ranges.boxed(kc)
    source = ranges.boxes(kc, columns_of_tile * slots) if boxes else kc
    with torch.cuda.device_of(q):
        _score[cdiv(rows, tile), groups, batch](
            q, source, lse, scores, texts, q.stride()[:3], kc.stride()[:3], lse.stride(), first, rows, heads, past, kc.shape[1],
            columns, scale * LOG2E.value, geometry.l, geometry.d, geometry.lp, q.shape[1],
            BOXES=boxes, PER=per, REACH=geometry.l // geometry.d, DIM=dim, WIDTH=width, TAIL=tail, SLOTS=slots,
            BLOCKS=columns_of_tile, TILE=tile, GROUP=group, FLIP=table.pop("flip"),
            PRECISION=precision_of(q.dtype), **table,
        )  # fmt: skip


def _launch_topn(
    scores: Tensor | None, idx: Tensor, texts: Tensor | None, wishes: tuple[Tensor | None, ...], start: int, stop: int, columns: int,
    geometry: Geometry, past: int, tuning: Tuning | None,
) -> None:  # fmt: skip
    batch, queries, groups, n = idx.shape
    lines = batch * (stop - start) * groups
    table = _table("topn", tuning)
    width = max(32, power_of_2(columns))
    places = power_of_2(n)
    tops = min(width, max(table.pop("tops"), 4 * places))
    table.pop("least")
    rows = max(1, table.pop("scores") // width)
    warps = min(16, max(1, rows * width // table.pop("per_warp")))
    strides = (wish.stride() if wish is not None else (0, 0, 0, 0) for wish in wishes)
    with torch.cuda.device_of(idx):
        _topn[(cdiv(lines, rows),)](
            scores, idx, texts, *wishes, *strides, lines, start, stop - start, queries, groups, past, columns,
            geometry.lp, geometry.n_init, geometry.n_local,
            N=n, PLACES=places, ROWS=rows, WIDTH=width, TOPS=tops, num_warps=warps, **table,
        )  # fmt: skip


def _chunks(
    start: int, queries: int, lines: int, past: int, lp: int, chunk_bytes: int, least: int
) -> Iterator[tuple[int, int, int]]:
    """Ranges of queries, each with the blocks that its last query sees, in a multiple of 16.

    Wide ranges end where the tile that holds a row's scores would double.
    """
    while start < queries:
        wide = max(least, power_of_2(_seen(start + 1 + past, lp)))
        rows = min(queries - start, wide * lp - past - start)
        while rows > 1 and 4 * lines * rows * _seen(start + rows + past, lp) > chunk_bytes:
            rows = max(1, min(rows - 1, chunk_bytes // (4 * lines * _seen(start + rows + past, lp))))
        yield start, start + rows, _seen(start + rows + past, lp)
        start += rows


def _seen(tokens: int, lp: int) -> int:
    return cdiv(cdiv(tokens, lp), 16) * 16


def _wishes(shape: tuple[int, ...], *wishes: Tensor | None) -> tuple[Tensor | None, ...]:
    """force, ban and bias as the kernel reads them, spread over a shape by strides of 0."""
    *flags, bias = wishes
    spread = [flag.bool().view(torch.uint8).expand(shape) if flag is not None else None for flag in flags]
    return *spread, bias.float().expand(shape) if bias is not None else None


def _empty_choice(like: Tensor, queries: int, groups: int, n: int) -> Tensor:
    return torch.empty(like.shape[0], queries, groups, n, dtype=torch.int32, device=like.device)


def _table(kernel: str, tuning: Tuning | None) -> dict[str, Any]:
    return {**TUNING[kernel], **(tuning or {}).get(kernel, {})}
