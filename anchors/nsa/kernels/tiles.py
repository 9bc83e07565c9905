# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
"""What the kernels of the three branches share: which keys a query sees, how tiles are read, and their sizes.

A row of a query tile is one query head at one position: `TILE` neighbouring positions times all heads of a group,
`GROUP` of them with padding. Padding rows and rows past the end read the last real row again and store nothing, so
that no load of a loop over tiles needs a mask.

`no_type_check` keeps run-time checkers of shapes off what Triton compiles: they wrap functions.
"""

from functools import cache
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from anchors.attention.kernels import nearest, power_of_2, shared_memory, width_of
from anchors.errors import AnchorsError

LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(1e30)
"""A log₂ Σ exp beside which every score is nothing: the pattern of its row is exactly 0."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = 128
"""The most query heads of a group: the rows of one tile."""
UNION = 64
"""The most positions of a query tile of the selected branch: a bit each."""

Settings = dict[str, int]
NARROW, USUAL, WIDE = 64, 128, 256
"""Head widths (padded to powers of two) up to which a row of `TUNING` holds."""


def _sizes(rows: int, keys: int, warps: int, stages: int, **more: int) -> Settings:
    return {"rows": rows, "keys": keys, "num_warps": warps, "num_stages": stages, **more}


def _exact(rows: int, keys: int, warps: int = 4, **more: int) -> Settings:
    # Two stages of float32 tiles leave no room in shared memory.
    return _sizes(rows, keys, warps, 1, **more)


TUNING: dict[tuple[str, str, int], Settings] = {
    ("forward.compressed", "bfloat16", NARROW): _sizes(128, 64, 8, 3, peel=1),
    ("forward.compressed", "bfloat16", USUAL): _sizes(128, 128, 8, 3, peel=1),
    ("forward.compressed", "bfloat16", WIDE): _sizes(64, 64, 4, 2, peel=1),
    ("forward.selected", "bfloat16", NARROW): _sizes(64, 64, 4, 3, peel=1),
    ("forward.selected", "bfloat16", USUAL): _sizes(64, 64, 4, 3, peel=1),
    ("forward.selected", "bfloat16", WIDE): _sizes(64, 64, 4, 2, peel=1),
    ("forward.window", "bfloat16", NARROW): _sizes(128, 64, 4, 3, peel=1),
    ("forward.window", "bfloat16", USUAL): _sizes(64, 64, 4, 3, peel=0),
    ("forward.window", "bfloat16", WIDE): _sizes(64, 64, 4, 2, peel=1),
    ("query.compressed", "bfloat16", NARROW): _sizes(128, 64, 8, 3, peel=1),
    ("query.compressed", "bfloat16", USUAL): _sizes(128, 64, 8, 3, peel=1),
    ("query.compressed", "bfloat16", WIDE): _sizes(64, 32, 4, 2, peel=1),
    ("query.selected", "bfloat16", NARROW): _sizes(64, 64, 4, 3, peel=1),
    ("query.selected", "bfloat16", USUAL): _sizes(64, 64, 4, 2, peel=1),
    ("query.selected", "bfloat16", WIDE): _sizes(64, 32, 4, 2, peel=1),
    ("query.window", "bfloat16", NARROW): _sizes(128, 64, 8, 3, peel=1),
    ("query.window", "bfloat16", USUAL): _sizes(64, 64, 4, 2, peel=1),
    ("query.window", "bfloat16", WIDE): _sizes(64, 32, 4, 2, peel=1),
    ("keys.compressed", "bfloat16", NARROW): _sizes(64, 64, 4, 2, peel=1, splits=4),
    ("keys.compressed", "bfloat16", USUAL): _sizes(32, 64, 4, 3, peel=1, splits=4),
    ("keys.compressed", "bfloat16", WIDE): _sizes(32, 64, 8, 2, peel=1, splits=4),
    ("keys.selected", "bfloat16", NARROW): _sizes(64, 64, 4, 2, peel=1, split=1024),
    ("keys.selected", "bfloat16", USUAL): _sizes(32, 64, 4, 2, peel=1, split=1024),
    ("keys.selected", "bfloat16", WIDE): _sizes(32, 64, 8, 2, peel=1, split=1024),
    ("keys.window", "bfloat16", NARROW): _sizes(64, 64, 4, 2, peel=1, splits=1),
    ("keys.window", "bfloat16", USUAL): _sizes(32, 64, 4, 2, peel=1, splits=1),
    ("keys.window", "bfloat16", WIDE): _sizes(32, 64, 8, 2, peel=1, splits=1),
}
"""Sizes by kernel, dtype and head width.

`rows` and `keys` are the sides of a tile, `peel` whether the tiles that all rows see whole get a loop without a mask,
`splits` into how many parts the queries of a key tile are cut, `split` how many queries of a block one program takes.
"""

for _branch in ("compressed", "selected", "window"):
    _more = {"split": 1024} if _branch == "selected" else {"splits": 4 if _branch == "compressed" else 1}
    for _width, _side in ((NARROW, 64), (USUAL, 32), (WIDE, 16)):
        TUNING[f"forward.{_branch}", "float16", _width] = TUNING[f"forward.{_branch}", "bfloat16", _width]
        TUNING[f"forward.{_branch}", "float32", _width] = _exact(2 * _side, _side, peel=1)
        # The slopes of float16 are multiplied in TF32, from tiles of float32.
        for _dtype in ("float32", "float16"):
            TUNING[f"query.{_branch}", _dtype, _width] = _exact(_side, _side, peel=1)
            TUNING[f"keys.{_branch}", _dtype, _width] = _exact(_side, _side, peel=1, **_more)


BOXED: dict[tuple[str, str, int], Settings] = {
    ("forward.compressed", "bfloat16", USUAL): _sizes(128, 64, 4, 2, peel=1),
    ("forward.selected", "bfloat16", USUAL): _sizes(64, 64, 4, 2, peel=1),
    ("forward.window", "bfloat16", USUAL): _sizes(64, 32, 4, 3, peel=1),
    ("query.selected", "bfloat16", USUAL): _sizes(64, 64, 4, 2, peel=1),
    ("query.window", "bfloat16", USUAL): _sizes(64, 64, 4, 2, peel=1),
    ("keys.compressed", "bfloat16", USUAL): _sizes(64, 128, 8, 3),
    ("keys.selected", "bfloat16", USUAL): _sizes(32, 64, 4, 3, split=1024),
    ("keys.window", "bfloat16", USUAL): _sizes(64, 128, 8, 3),
}
"""The same where the copy engine reads the tiles in boxes (of the selected branch's dk and dv: where rows are positions of one
head), and was timed to be faster."""

ROOM = 160 << 10
"""Bytes of shared memory per program that the table reckons with: an A100 has them."""


def tuned(
    kernel: str, like: Tensor, width: int, tuning: dict[str, Any] | None, boxed: bool = False
) -> Settings:
    """The settings of a kernel for a dtype and a head width, with those of `tuning[kernel]` put over them.

    Args:
        boxed: whether the copy engine can read the tensors, so that a row of `BOXED` goes before one of `TUNING`, unless
            `tuning` says `boxes` 0.
    """
    row = next((size for size in (NARROW, USUAL) if width <= size), WIDE)
    key = kernel, str(like.dtype).removeprefix("torch."), row
    settings = dict(TUNING[key])
    given = {} if tuning is None else tuning.get(kernel, {})
    room = shared_memory(like.device) >= ROOM
    if boxed and given.get("boxes", 1) and room and key in BOXED:
        settings = BOXED[key] | {"boxes": 1}
    elif not room:
        settings |= {"rows": min(settings["rows"], 64), "keys": min(settings["keys"], 32), "num_stages": 1}
    return settings | given


def parted(dim: int) -> tuple[int, int]:
    """A head as one power of 2, or as two where that is less: 192 is 128 and 64, not 256."""
    whole = max(16, power_of_2(dim))
    half = whole // 2
    tail = max(16, power_of_2(dim - half)) if half >= 16 else whole
    return (half, tail) if half + tail < whole else (whole, 0)


@cache
def widths(dim: int, dim_v: int) -> dict[str, int]:
    """The compile-time head widths of a kernel: real, and padded to powers of two, of a key to two of them."""
    width, tail = parted(dim)
    return {"DIM": dim, "DIM_V": dim_v, "WIDTH": width, "TAIL": tail, "WIDTH_V": width_of(dim_v)}


def widest(dim: int, dim_v: int) -> int:
    """The width by which a row of `TUNING` is chosen."""
    return max(width_of(dim), width_of(dim_v))


def demand(q: Tensor, k: Tensor, v: Tensor, scale: float) -> int:
    """Query heads per group, where the kernels can compute this.

    Raises:
        AnchorsError: a dtype, a number of heads or a scale that they cannot take.
    """
    heads, groups = q.shape[2], k.shape[2]
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise AnchorsError(
            f"Queries, keys and values are {q.dtype}, {k.dtype} and {v.dtype}.",
            "The kernels need one of float32, bfloat16 and float16 for all; backend='reference' takes any.",
            code="precision",
        )
    if groups < 1 or heads % groups or heads // groups > HEADS:
        raise AnchorsError(
            f"{heads} query heads cannot be divided among {groups} groups for the kernels.",
            f"Choose a number of groups that divides the heads and leaves at most {HEADS} in a group.",
            code="geometry",
        )
    if scale <= 0:
        raise AnchorsError(f"The scale is {scale}.", "It must be positive.", code="option-value")
    return heads // groups


@triton.jit
@no_type_check
def load_rows(pointer, offsets, DIM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    # The pointer last: what is behind it does not change along many loops.
    return load_tile(pointer + (offsets[:, None] + tl.arange(0, WIDTH)[None, :]), DIM, WIDTH, PRECISION)


@triton.jit
@no_type_check
def load_tile(places, DIM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    if DIM == WIDTH:
        return nearest(tl.load(places), PRECISION)
    return nearest(tl.load(places, mask=(tl.arange(0, WIDTH) < DIM)[None, :], other=0.0), PRECISION)


@triton.jit
@no_type_check
def save_rows(pointer, offsets, inside, tile, DIM: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    kept = inside[:, None] & (columns < DIM)[None, :]
    tl.store(pointer + offsets[:, None] + columns[None, :], tile.to(pointer.dtype.element_ty), mask=kept)


@triton.jit
@no_type_check
def load_tail(
    pointer,
    offsets,
    main,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The columns behind the first `WIDTH`, where a head is parted in two; else `main` again, which nobody uses."""
    tile = main
    if TAIL > 0:
        tile = load_rows(pointer + WIDTH, offsets, DIM - WIDTH, TAIL, PRECISION)
    return tile


@triton.jit
@no_type_check
def products(left, left_tail, right, right_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """left · rightᵀ over both parts of a head."""
    scores = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    if TAIL > 0:
        scores = tl.dot(left_tail, tl.trans(right_tail), scores, input_precision=PRECISION)
    return scores


@triton.jit
@no_type_check
def times(left, right, total, PRECISION: tl.constexpr, BOUNDED: tl.constexpr):
    """total + left · right, of a float32 tile and one of inputs; `BOUNDED` says that left lies in [0, 1]."""
    if right.dtype == tl.bfloat16 or (BOUNDED and right.dtype == tl.float16):
        return tl.dot(left.to(right.dtype), right, total)
    # Slopes leave float16's range easily; in TF32 it loses nothing.
    return tl.dot(nearest(left, PRECISION), right.to(tl.float32), total, input_precision=PRECISION)


@triton.jit
@no_type_check
def query_rows(tile, length, groups, group, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Position within the tile, query, head, and whether the row is real, of every row of a query tile."""
    row = tl.arange(0, TILE * GROUP)
    query, head = tile * TILE + row // GROUP, row % GROUP
    inside = (query < length) & (head < groups)
    return row // GROUP, tl.minimum(query, length - 1), group * groups + tl.minimum(head, groups - 1), inside


@triton.jit
@no_type_check
def visible(position, keys, size, stride, reach, BRANCH: tl.constexpr):
    """The keys [low, high) that a position sees: of the compressed branch, i·d + l − 1 ≤ t; of the window, t − w < j ≤ t."""
    if BRANCH == "compressed":
        high = tl.minimum(tl.maximum(position - size + 1 + stride, 0) // stride, keys)
        low = position * 0
    elif BRANCH == "window":
        high = position + 1
        low = tl.maximum(position + 1 - reach, 0)
    else:
        high = position + 1
        low = position * 0
    return low, high


@triton.jit
@no_type_check
def spanned(position, spans, keys, size, stride, reach, BRANCH: tl.constexpr):
    """`visible`, where several texts lie in a row: [low, high) stands written for each position."""
    if spans is None or BRANCH == "selected":
        low, high = visible(position, keys, size, stride, reach, BRANCH)
    else:
        low, high = tl.load(spans + position * 2), tl.load(spans + position * 2 + 1)
    return low, high


@triton.jit
@no_type_check
def tile_bounds(
    lowest, highest, spans, keys, size, stride, reach, blocks, count,
    BRANCH: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, ENTRIES: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Key tiles of a query tile: [0] to [1] and [2] to [3] need a mask, every row sees those between whole.

    Tiles are counted along the keys; in the selected branch along the list of blocks, `PARTS` to a block. Where several
    texts lie in a row, the list names a block by its first token.
    """
    if BRANCH == "selected":
        entry = tl.arange(0, ENTRIES)
        block = tl.load(blocks + entry, mask=entry < count, other=2147483647)
        first, stop = count * 0, count * PARTS
        start = first
        if spans is None:
            end = tl.sum((block < (lowest + 1) // (KEYS * PARTS)).to(tl.int32)) * PARTS
        else:
            end = tl.sum((block <= lowest + 1 - KEYS * PARTS).to(tl.int32)) * PARTS
    else:
        low, high_all = spanned(lowest, spans, keys, size, stride, reach, BRANCH)
        low_all, high = spanned(highest, spans, keys, size, stride, reach, BRANCH)
        first, stop = low // KEYS, tl.cdiv(high, KEYS)
        start = tl.minimum(tl.cdiv(low_all, KEYS), stop)
        end = tl.maximum(high_all // KEYS, start)
    if not PEEL:
        start, end = first, first
    return first, start, end, stop


@triton.jit
@no_type_check
def key_tile(
    index, tile, spans, blocks, members, BRANCH: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr
):
    """The first key of a tile, and the rows of the query tile that chose its block."""
    if BRANCH == "selected":
        if spans is None:
            start = tl.load(blocks + index // PARTS) * (KEYS * PARTS) + index % PARTS * KEYS
        else:
            start = tl.load(blocks + index // PARTS) + index % PARTS * KEYS
        member = ((tl.load(members + index // PARTS) >> tile) & 1) > 0
    else:
        start = index * KEYS
        member = tile >= 0
    return start, member


@triton.jit
@no_type_check
def key_offsets(start, stride, keys, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """Offsets of the rows of a key tile; past the end, of the last key."""
    row = tl.arange(0, KEYS)
    if MASKED:
        row = tl.minimum(row, keys - 1 - start)
    return (tl.full([1], 0, tl.int64) + start) * stride + row * stride


@triton.jit
@no_type_check
def key_rows(
    pointer, stride, example, group, start, keys, KEYS: tl.constexpr, MASKED: tl.constexpr, BOXES: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both parts of a key tile; past the end the last key again, or zeros where the copy engine reads."""
    if BOXES:
        tile = tl.reshape(pointer.load([example.to(tl.int32), start, group, 0]), [KEYS, WIDTH])
        tail = tile
    else:
        places = key_offsets(start, stride, keys, KEYS, MASKED)
        tile = load_rows(pointer, places, min(DIM, WIDTH), WIDTH, PRECISION)
        tail = load_tail(pointer, places, tile, DIM, WIDTH, TAIL, PRECISION)
    return tile, tail
