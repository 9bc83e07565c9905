# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
"""Triton kernels for causal attention, with or without a sliding window, and for its gradients, on CUDA.

The tile loop of `streaming` writes every tile of scores, patterns and products to memory and reads it back;
here a tile lives and dies inside one program. With P = exp(scale · q kᵀ − lse) and dP = dz vᵀ,

    dq = scale · (P ⊙ (dP − inner)) k, dv = Pᵀ dz, dk = scale · (P ⊙ (dP − inner))ᵀ q,  inner = ⟨z, dz⟩.

No sum is left to chance: no atomics, so two runs agree bit for bit. Float32 operands are multiplied in TF32
where torch's own products are, else as three TF32 products of their halves, which is float32-accurate. The
literal twin is the tile loop. What the taps read, |Σ_h P ⊙ dP|, is formed in `saliency_kernel`.

`no_type_check` keeps run-time checkers of shapes off what Triton compiles: they wrap functions.
"""

from functools import cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from anchors._names import forwarding
from anchors.attention.dense import DenseCall
from anchors.attention.taps import Slopes

__getattr__ = forwarding(__name__)
LOG2E = tl.constexpr(1.4426950408889634)
HEAD_DIM = 256
"""The widest head whose sums of gradients fit the registers."""
H100_MEMORY = 232_448
LIVE = 64
"""Rows of a block that is alive or dead as one: dead ones, whose slopes are zero, are passed over."""
LONG = 2048
"""Tokens from which the backward kernels have work enough for larger tiles."""
KERNELS = ("forward", "dq", "dkv")
_HALF, _WIDE = ((64, 64, 4, 2), (32, 32, 4, 2)), ((64, 64, 8, 2), (32, 32, 8, 2))
_FULL, _FULL_WIDE = ((64, 64, 4, 1), (32, 32, 4, 1)), ((16, 16, 4, 1),)
TILES = {
    (2, 64): {
        "forward": ((64, 64, 4, 3), *_HALF),
        "dq": _HALF,
        "dkv": _HALF,
        "long dq": ((128, 64, 8, 2), *_HALF),
        "long dkv": ((32, 128, 4, 2), *_HALF),
    },
    (2, 128): {
        "forward": ((64, 64, 4, 3), *_HALF),
        "dq": _HALF,
        "dkv": _HALF,
        "long dkv": ((64, 128, 8, 3), *_HALF),
    },
    (2, 256): dict.fromkeys(KERNELS, _WIDE),
    (4, 64): dict.fromkeys(KERNELS, _FULL),
    (4, 128): dict.fromkeys(KERNELS, _FULL),
    (4, 256): dict.fromkeys(KERNELS, _FULL_WIDE),
}
"""By bytes of a number and width of a head, and by kernel: query rows, keys, warps and stages, by preference on an H100."""


@triton.jit
@no_type_check
def _seen(rows, columns, window, WINDOWED: tl.constexpr):
    if WINDOWED:
        return (columns <= rows) & (columns > rows - window)
    else:
        return columns <= rows


@triton.jit
@no_type_check
def _oldest(row, window, KEYS: tl.constexpr, WINDOWED: tl.constexpr):
    """Where the first tile of keys that a row sees begins."""
    if WINDOWED:
        return tl.maximum(row - window + 1, 0) // KEYS * KEYS
    else:
        return 0


@triton.jit
@no_type_check
def _alive(live, rows, length, LIVE: tl.constexpr):
    """1 where any of some rows has a gradient, else 0."""
    return tl.max(tl.load(live + rows // LIVE, mask=rows < length, other=0))


@triton.jit
@no_type_check
def nearest(tile, PRECISION: tl.constexpr):
    """Rounded to TF32: the tensor cores only cut off, an error of one sign, which no sum averages out."""
    if PRECISION == "tf32" and tile.dtype == tl.float32:
        return ((tile.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tile


@triton.jit
@no_type_check
def load_rows(pointer, stride, rows, length, DIM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    inside = (rows < length)[:, None] & (columns < DIM)[None, :]
    tile = tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    return nearest(tile, PRECISION)


@triton.jit
@no_type_check
def _save(pointer, stride, rows, length, tile, DIM: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    inside = (rows < length)[:, None] & (columns < DIM)[None, :]
    tl.store(
        pointer + rows[:, None] * stride + columns[None, :], tile.to(pointer.dtype.element_ty), mask=inside
    )


@triton.jit
@no_type_check
def _times(left, right, PRECISION: tl.constexpr):
    """A float32 tile times one of inputs."""
    if right.dtype == tl.bfloat16:
        return tl.dot(left.to(tl.bfloat16), right)
    # Slopes leave float16's range easily; in TF32 it loses nothing.
    return tl.dot(nearest(left, PRECISION), right.to(tl.float32), input_precision=PRECISION)


@triton.jit
@no_type_check
def _weighed(
    q_tile, k, v, k_stride, v_stride, start, rows, length, window, factor, top, mass, total,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    KEYS: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys more in the running softmax of some rows."""
    columns = start + tl.arange(0, KEYS)
    k_tile = load_rows(k, k_stride, columns, length, DIM, WIDTH, PRECISION)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * factor
    if MASKED:
        scores = tl.where(_seen(rows[:, None], columns[None, :], window, WINDOWED), scores, -1e30)
    higher = tl.maximum(top, tl.max(scores, 1))
    pattern = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    v_tile = load_rows(v, v_stride, columns, length, DIM_V, WIDTH_V, PRECISION)
    mass = mass * shrink + tl.sum(pattern, 1)
    total = total * shrink[:, None] + _times(pattern, v_tile, PRECISION)
    return higher, mass, total


@triton.jit
@no_type_check
def _forward(
    q, k, v, z, lse, q_strides, k_strides, v_strides, z_strides, length, window, scale, heads, groups,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The last rows see most keys, so they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, example = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    q += example * q_strides[0] + head * q_strides[1]
    k += example * k_strides[0] + head // groups * k_strides[1]
    v += example * v_strides[0] + head // groups * v_strides[1]
    z += example * z_strides[0] + head * z_strides[1]
    q_tile = load_rows(q, q_strides[2], rows, length, DIM, WIDTH, PRECISION)
    top = tl.full([ROWS], -1e30, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDTH_V], tl.float32)
    factor = scale * LOG2E
    start = _oldest(block * ROWS, window, KEYS, WINDOWED)
    clear = start
    if SPLIT:
        clear = (block * ROWS + 1) // KEYS * KEYS
        for at in range(0, clear, KEYS):
            top, mass, total = _weighed(
                q_tile, k, v, k_strides[2], v_strides[2], at, rows, length, window, factor, top, mass, total,
                DIM, DIM_V, WIDTH, WIDTH_V, KEYS, WINDOWED, PRECISION, False,
            )  # fmt: skip
    for at in range(clear, tl.minimum((block + 1) * ROWS, length), KEYS):
        top, mass, total = _weighed(
            q_tile, k, v, k_strides[2], v_strides[2], at, rows, length, window, factor, top, mass, total,
            DIM, DIM_V, WIDTH, WIDTH_V, KEYS, WINDOWED, PRECISION, True,
        )  # fmt: skip
    _save(z, z_strides[2], rows, length, total / mass[:, None], DIM_V, WIDTH_V)
    # In units of log 2, which is what the backward kernels exponentiate in.
    tl.store(lse + (example * heads + head) * length + rows, top + tl.log2(mass), mask=rows < length)


@triton.jit
@no_type_check
def _inner(
    z, dz, inner, live, z_strides, dz_strides, length, heads,
    DIM_V: tl.constexpr, WIDTH_V: tl.constexpr, LIVE: tl.constexpr,
):  # fmt: skip
    block, head, example = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = block * LIVE + tl.arange(0, LIVE)
    z += example * z_strides[0] + head * z_strides[1]
    dz += example * dz_strides[0] + head * dz_strides[1]
    z_tile = load_rows(z, z_strides[2], rows, length, DIM_V, WIDTH_V, "ieee").to(tl.float32)
    dz_tile = load_rows(dz, dz_strides[2], rows, length, DIM_V, WIDTH_V, "ieee").to(tl.float32)
    tl.store(
        inner + (example * heads + head) * length + rows, tl.sum(z_tile * dz_tile, 1), mask=rows < length
    )
    # Not `max`, which may pass over a NaN: a slope that is not a number is no dead row.
    some = (tl.sum((dz_tile != 0).to(tl.float32)) > 0).to(tl.int32)
    tl.store(live + (example * heads + head) * tl.num_programs(0) + block, some)


@triton.jit
@no_type_check
def _risen(
    q_tile, dz_tile, k, v, k_stride, v_stride, start, rows, length, window, factor, mass, mean, total,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    KEYS: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys more in dq of some rows."""
    columns = start + tl.arange(0, KEYS)
    k_tile = load_rows(k, k_stride, columns, length, DIM, WIDTH, PRECISION)
    v_tile = load_rows(v, v_stride, columns, length, DIM_V, WIDTH_V, PRECISION)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * factor
    pattern = tl.exp2(scores - mass[:, None])
    if MASKED:
        pattern = tl.where(_seen(rows[:, None], columns[None, :], window, WINDOWED), pattern, 0.0)
    slope = pattern * (tl.dot(dz_tile, tl.trans(v_tile), input_precision=PRECISION) - mean[:, None])
    return total + _times(slope, k_tile, PRECISION)


@triton.jit
@no_type_check
def _dq(
    q, k, v, dz, dq, lse, inner, live, q_strides, k_strides, v_strides, dz_strides, dq_strides,
    length, window, scale, heads, groups, blocks,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LIVE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, example = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    q += example * q_strides[0] + head * q_strides[1]
    k += example * k_strides[0] + head // groups * k_strides[1]
    v += example * v_strides[0] + head // groups * v_strides[1]
    dz += example * dz_strides[0] + head * dz_strides[1]
    dq += example * dq_strides[0] + head * dq_strides[1]
    line = (example * heads + head) * length + rows
    q_tile = load_rows(q, q_strides[2], rows, length, DIM, WIDTH, PRECISION)
    dz_tile = load_rows(dz, dz_strides[2], rows, length, DIM_V, WIDTH_V, PRECISION)
    mass = tl.load(lse + line, mask=rows < length, other=float("inf"))
    mean = tl.load(inner + line, mask=rows < length, other=0.0)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    factor = scale * LOG2E
    start = _oldest(block * ROWS, window, KEYS, WINDOWED)
    alive = _alive(live + example * blocks, rows, length, LIVE)
    clear, stop = start, tl.minimum((block + 1) * ROWS, length) * alive
    if SPLIT:
        clear = (block * ROWS + 1) // KEYS * KEYS * alive
        for at in range(0, clear, KEYS):
            total = _risen(
                q_tile, dz_tile, k, v, k_strides[2], v_strides[2], at, rows, length, window, factor, mass, mean,
                total, DIM, DIM_V, WIDTH, WIDTH_V, KEYS, WINDOWED, PRECISION, False,
            )  # fmt: skip
    for at in range(clear, stop, KEYS):
        total = _risen(
            q_tile, dz_tile, k, v, k_strides[2], v_strides[2], at, rows, length, window, factor, mass, mean,
            total, DIM, DIM_V, WIDTH, WIDTH_V, KEYS, WINDOWED, PRECISION, True,
        )  # fmt: skip
    _save(dq, dq_strides[2], rows, length, total * scale, DIM, WIDTH)


@triton.jit
@no_type_check
def _given(
    k_tile, v_tile, q, dz, lse, inner, q_stride, dz_stride, start, columns, length, window, factor,
    dk_total, dv_total,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of rows more in dk and dv of some keys."""
    rows = start + tl.arange(0, ROWS)
    q_tile = load_rows(q, q_stride, rows, length, DIM, WIDTH, PRECISION)
    dz_tile = load_rows(dz, dz_stride, rows, length, DIM_V, WIDTH_V, PRECISION)
    mass = tl.load(lse + rows, mask=rows < length, other=float("inf"))
    mean = tl.load(inner + rows, mask=rows < length, other=0.0)
    scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * factor
    pattern = tl.exp2(scores - mass[None, :])
    if MASKED:
        pattern = tl.where(_seen(rows[None, :], columns[:, None], window, WINDOWED), pattern, 0.0)
    dv_total += _times(pattern, dz_tile, PRECISION)
    slope = pattern * (tl.dot(v_tile, tl.trans(dz_tile), input_precision=PRECISION) - mean[None, :])
    return dk_total + _times(slope, q_tile, PRECISION), dv_total


@triton.jit
@no_type_check
def _dkv(
    q, k, v, dz, dk, dv, lse, inner, live,
    q_strides, k_strides, v_strides, dz_strides, dk_strides, dv_strides, length, window, scale, heads, groups, blocks,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LIVE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block, kv_head, example = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = block * KEYS + tl.arange(0, KEYS)
    k += example * k_strides[0] + kv_head * k_strides[1]
    k_tile = load_rows(k, k_strides[2], columns, length, DIM, WIDTH, PRECISION)
    v += example * v_strides[0] + kv_head * v_strides[1]
    v_tile = load_rows(v, v_strides[2], columns, length, DIM_V, WIDTH_V, PRECISION)
    dk_total = tl.zeros([KEYS, WIDTH], tl.float32)
    dv_total = tl.zeros([KEYS, WIDTH_V], tl.float32)
    # Padding is on the right and the last layer has one live row: a range holds what is live well enough.
    order = tl.arange(0, BLOCKS)
    alive = tl.load(live + example * blocks + order, mask=order < blocks, other=0) > 0
    first = tl.maximum(tl.min(tl.where(alive, order, BLOCKS)) * LIVE, block * KEYS) // ROWS * ROWS
    last = tl.minimum(tl.max(tl.where(alive, order + 1, 0)) * LIVE, length)
    # The first row that every key of the block is seen from.
    if WINDOWED:
        last = tl.minimum(last, (block + 1) * KEYS + window - 1)
    clear = last
    if SPLIT:
        clear = tl.minimum(((block + 1) * KEYS + ROWS - 2) // ROWS * ROWS, last)
    clear = tl.maximum(clear, first)
    factor = scale * LOG2E
    for head in range(kv_head * groups, (kv_head + 1) * groups):
        q_head = q + example * q_strides[0] + head * q_strides[1]
        dz_head = dz + example * dz_strides[0] + head * dz_strides[1]
        line = (example * heads + head) * length
        for start in range(first, clear, ROWS):
            dk_total, dv_total = _given(
                k_tile, v_tile, q_head, dz_head, lse + line, inner + line, q_strides[2], dz_strides[2], start,
                columns, length, window, factor, dk_total, dv_total,
                DIM, DIM_V, WIDTH, WIDTH_V, ROWS, WINDOWED, PRECISION, True,
            )  # fmt: skip
        if SPLIT:
            for start in range(clear, last, ROWS):
                dk_total, dv_total = _given(
                    k_tile, v_tile, q_head, dz_head, lse + line, inner + line, q_strides[2], dz_strides[2], start,
                    columns, length, window, factor, dk_total, dv_total,
                    DIM, DIM_V, WIDTH, WIDTH_V, ROWS, WINDOWED, PRECISION, False,
                )  # fmt: skip
    dk += example * dk_strides[0] + kv_head * dk_strides[1]
    dv += example * dv_strides[0] + kv_head * dv_strides[1]
    _save(dk, dk_strides[2], columns, length, dk_total * scale, DIM, WIDTH)
    _save(dv, dv_strides[2], columns, length, dv_total, DIM_V, WIDTH_V)


def supports(call: DenseCall) -> bool:
    """Whether these kernels compute exactly this call. The first look at a boolean mask waits for the GPU."""
    q, k, v = call.q, call.k, call.v
    return (
        call.fusable
        and call.causal
        and q.shape[2] == k.shape[2]
        and max(q.shape[-1], v.shape[-1]) <= HEAD_DIM
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(tiles(kernel, call) for kernel in KERNELS)
        and call.window is not None
    )


def forward(call: DenseCall) -> tuple[Tensor, Tensor]:
    """z, laid out so that joining the heads copies nothing, and log₂ Σ_j exp(scores_ij)."""
    q, k, v = map(dense, (call.q, call.k, call.v))
    batch, heads, length, _ = q.shape
    window = call.window or length
    z = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    tile = tiles("forward", call)
    with torch.cuda.device_of(q):
        _forward[triton.cdiv(length, tile["ROWS"]), heads, batch](
            q, k, v, z, lse, *map(strides, (q, k, v, z)), length, window, call.scale, heads, call.groups,
            **_widths(call), **tile, **_band(q, window), PRECISION=precision_of(q.dtype),
        )  # fmt: skip
    return z, lse


def slopes(call: DenseCall, z: Tensor, lse: Tensor, dz: Tensor) -> Slopes:
    """Reads z and dz once, for the saliency and for `gradients`."""
    dz = dense(dz)
    batch, heads, length, dim_v = z.shape
    blocks = triton.cdiv(length, LIVE)
    inner = torch.empty_like(lse)
    live = torch.empty(batch, heads, blocks, dtype=torch.int32, device=z.device)
    with torch.cuda.device_of(z):
        _inner[blocks, heads, batch](
            z, dz, inner, live, strides(z), strides(dz), length, heads,
            DIM_V=dim_v, WIDTH_V=width_of(dim_v), LIVE=LIVE,
        )  # fmt: skip
    return Slopes(dz, lse, inner, live.amax(1), LIVE, call.window or length, precision_of(z.dtype))


def gradients(call: DenseCall, slopes: Slopes) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""
    q, k, v = map(dense, (call.q, call.k, call.v))
    batch, heads, length, _ = q.shape
    dq, dk, dv = (
        torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    blocks = slopes.live.shape[1]
    common = (*map(strides, (q, k, v, slopes.dz)),)
    more = {"LIVE": LIVE, "PRECISION": slopes.precision} | _band(q, slopes.window) | _widths(call)
    by_rows, by_keys = tiles("dq", call), tiles("dkv", call)
    with torch.cuda.device_of(q):
        _dq[triton.cdiv(length, by_rows["ROWS"]), heads, batch](
            q, k, v, slopes.dz, dq, slopes.lse, slopes.inner, slopes.live, *common, strides(dq),
            length, slopes.window, call.scale, heads, call.groups, blocks, **by_rows, **more,
        )  # fmt: skip
        _dkv[triton.cdiv(length, by_keys["KEYS"]), k.shape[1], batch](
            q, k, v, slopes.dz, dk, dv, slopes.lse, slopes.inner, slopes.live,
            *common, strides(dk), strides(dv), length, slopes.window, call.scale, heads, call.groups, blocks,
            **by_keys, **more, BLOCKS=triton.next_power_of_2(blocks),
        )  # fmt: skip
    return dq, dk, dv


def strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def dense(x: Tensor) -> Tensor:
    """With neighbours in the last dimension, which the kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cdiv(number: int, by: int) -> int:
    """⌈number / by⌉. Triton's own serves kernels too, and takes microseconds of each launch."""
    return -(-number // by)


def power_of_2(number: int) -> int:
    """The first that is as large; likewise."""
    return 1 << (number - 1).bit_length()


def width_of(dim: int) -> int:
    """Columns of the tile that holds rows of so many numbers."""
    return max(16, power_of_2(dim))


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program's tiles may take; where nothing is compiled, those of an H100."""
    if device.type != "cuda":
        return H100_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _widths(call: DenseCall) -> dict[str, int]:
    dim, dim_v = call.q.shape[-1], call.v.shape[-1]
    return {"DIM": dim, "DIM_V": dim_v, "WIDTH": width_of(dim), "WIDTH_V": width_of(dim_v)}


def _band(q: Tensor, window: int) -> dict[str, bool]:
    """Whether tiles that every row sees whole are told apart, so that no mask is made for them. Not in float32, where there is
    no gain and the compiler takes twice as long."""
    windowed = window < q.shape[2]
    return {"WINDOWED": windowed, "SPLIT": q.dtype.itemsize == 2 and not windowed}


def tiles(kernel: str, call: DenseCall) -> dict[str, int]:
    """Tile sizes and launch parameters of a kernel: the first of the table that fits the shared memory; empty for none."""
    widths, dtype, length = _widths(call), call.q.dtype, call.k.shape[2]
    width = max(widths["WIDTH"], widths["WIDTH_V"])
    table = TILES[dtype.itemsize, max(64, width)]
    for rows, keys, warps, stages in table.get(f"long {kernel}" if length >= LONG else kernel, table[kernel]):
        held = _held(kernel, rows, keys, stages, dtype) * width * dtype.itemsize
        if held <= shared_memory(call.q.device):
            return {"ROWS": rows, "KEYS": keys, "num_warps": warps, "num_stages": stages}
    return {}


def _held(kernel: str, rows: int, keys: int, stages: int, dtype: torch.dtype) -> int:
    """How many rows of numbers a program holds in shared memory, as compiled for an H100."""
    if dtype == torch.float32:  # tiles and their halves
        return 6 * max(rows, keys)
    still, moving = (keys, rows) if kernel == "dkv" else (rows, keys)
    # Of float16, one tile once more as float32.
    return 2 * still + 2 * stages * moving + (moving if dtype == torch.float16 else 0)


def precision_of(dtype: torch.dtype) -> str:
    """How float32 is multiplied, in Triton's words: in TF32 where torch's own products are."""
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if exact else "tf32"
