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
from jaxtyping import Bool
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from anchors.attention.dense import DenseCall
from anchors.attention.taps import Slopes

LOG2E = tl.constexpr(1.4426950408889634)
HEAD_DIM = 256
"""The widest head whose sums of gradients fit the registers."""
H100_MEMORY = 232_448


@triton.jit
@no_type_check
def _seen(rows, columns, window, WINDOWED: tl.constexpr):
    if WINDOWED:
        return (columns <= rows) & (columns > rows - window)
    else:
        return columns <= rows


@triton.jit
@no_type_check
def _oldest(block, window, BLOCK: tl.constexpr, WINDOWED: tl.constexpr):
    """Where the first tile of keys that a block of rows sees begins."""
    if WINDOWED:
        return tl.maximum(block * BLOCK - window + 1, 0) // BLOCK * BLOCK
    else:
        return 0


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
def _forward(
    q, k, v, z, lse, q_strides, k_strides, v_strides, z_strides, length, window, scale, heads, groups,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head, example = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    q += example * q_strides[0] + head * q_strides[1]
    k += example * k_strides[0] + head // groups * k_strides[1]
    v += example * v_strides[0] + head // groups * v_strides[1]
    z += example * z_strides[0] + head * z_strides[1]
    q_tile = load_rows(q, q_strides[2], rows, length, DIM, WIDTH, PRECISION)
    top = tl.full([BLOCK], -1e30, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK, WIDTH_V], tl.float32)
    for start in range(_oldest(block, window, BLOCK, WINDOWED), (block + 1) * BLOCK, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        k_tile = load_rows(k, k_strides[2], columns, length, DIM, WIDTH, PRECISION)
        v_tile = load_rows(v, v_strides[2], columns, length, DIM_V, WIDTH_V, PRECISION)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(_seen(rows[:, None], columns[None, :], window, WINDOWED), scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        pattern = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        mass = mass * shrink + tl.sum(pattern, 1)
        total = total * shrink[:, None] + _times(pattern, v_tile, PRECISION)
        top = higher
    _save(z, z_strides[2], rows, length, total / mass[:, None], DIM_V, WIDTH_V)
    # In units of log 2, which is what the backward kernels exponentiate in.
    tl.store(lse + (example * heads + head) * length + rows, top + tl.log2(mass), mask=rows < length)


@triton.jit
@no_type_check
def _inner(
    z, dz, inner, live, z_strides, dz_strides, length, heads,
    DIM_V: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, example = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    largest = 0.0
    for head in range(heads):
        z_head = z + example * z_strides[0] + head * z_strides[1]
        z_tile = load_rows(z_head, z_strides[2], rows, length, DIM_V, WIDTH_V, "ieee").to(tl.float32)
        dz_head = dz + example * dz_strides[0] + head * dz_strides[1]
        dz_tile = load_rows(dz_head, dz_strides[2], rows, length, DIM_V, WIDTH_V, "ieee").to(tl.float32)
        sums = tl.sum(z_tile * dz_tile, 1)
        tl.store(inner + (example * heads + head) * length + rows, sums, mask=rows < length)
        # Not `max`, which may pass over a NaN: a slope that is not a number is no dead row.
        largest += tl.sum((dz_tile != 0).to(tl.float32))
    tl.store(live + example * tl.num_programs(0) + block, (largest > 0).to(tl.int32))


@triton.jit
@no_type_check
def _dq(
    q, k, v, dz, dq, lse, inner, live, q_strides, k_strides, v_strides, dz_strides, dq_strides,
    length, window, scale, heads, groups,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head, example = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
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
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    stop = tl.load(live + example * tl.num_programs(0) + block) * (block + 1) * BLOCK
    for start in range(_oldest(block, window, BLOCK, WINDOWED), stop, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        k_tile = load_rows(k, k_strides[2], columns, length, DIM, WIDTH, PRECISION)
        v_tile = load_rows(v, v_strides[2], columns, length, DIM_V, WIDTH_V, PRECISION)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        seen = _seen(rows[:, None], columns[None, :], window, WINDOWED)
        pattern = tl.where(seen, tl.exp2(scores - mass[:, None]), 0.0)
        slope = pattern * (tl.dot(dz_tile, tl.trans(v_tile), input_precision=PRECISION) - mean[:, None])
        total += _times(slope, k_tile, PRECISION)
    _save(dq, dq_strides[2], rows, length, total * scale, DIM, WIDTH)


@triton.jit
@no_type_check
def _dkv(
    q, k, v, dz, dk, dv, lse, inner, live,
    q_strides, k_strides, v_strides, dz_strides, dk_strides, dv_strides, length, window, scale, heads, groups,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block, kv_head, example = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks = tl.num_programs(0)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    k += example * k_strides[0] + kv_head * k_strides[1]
    k_tile = load_rows(k, k_strides[2], columns, length, DIM, WIDTH, PRECISION)
    v += example * v_strides[0] + kv_head * v_strides[1]
    v_tile = load_rows(v, v_strides[2], columns, length, DIM_V, WIDTH_V, PRECISION)
    dk_total = tl.zeros([BLOCK, WIDTH], tl.float32)
    dv_total = tl.zeros([BLOCK, WIDTH_V], tl.float32)
    # Padding is on the right and the last layer has one live row: a range holds what is live well enough.
    order = tl.arange(0, BLOCKS)
    alive = tl.load(live + example * blocks + order, mask=order < blocks, other=0) > 0
    first = tl.maximum(tl.min(tl.where(alive, order, BLOCKS)), block)
    last = tl.max(tl.where(alive, order + 1, 0))
    if WINDOWED:
        last = tl.minimum(last, ((block + 1) * BLOCK + window - 2) // BLOCK + 1)
    for head in range(kv_head * groups, (kv_head + 1) * groups):
        q_head = q + example * q_strides[0] + head * q_strides[1]
        dz_head = dz + example * dz_strides[0] + head * dz_strides[1]
        line = (example * heads + head) * length
        for start in range(first * BLOCK, last * BLOCK, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            q_tile = load_rows(q_head, q_strides[2], rows, length, DIM, WIDTH, PRECISION)
            dz_tile = load_rows(dz_head, dz_strides[2], rows, length, DIM_V, WIDTH_V, PRECISION)
            mass = tl.load(lse + line + rows, mask=rows < length, other=float("inf"))
            mean = tl.load(inner + line + rows, mask=rows < length, other=0.0)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2E)
            seen = _seen(rows[None, :], columns[:, None], window, WINDOWED)
            pattern = tl.where(seen, tl.exp2(scores - mass[None, :]), 0.0)
            dv_total += _times(pattern, dz_tile, PRECISION)
            slope = pattern * (tl.dot(v_tile, tl.trans(dz_tile), input_precision=PRECISION) - mean[None, :])
            dk_total += _times(slope, q_tile, PRECISION)
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
        and _shape(call)["BLOCK"] > 0
        and window_of(call) is not None
    )


def window_of(call: DenseCall) -> int | None:
    """The w for which a row sees its last w keys, itself included; None where its mask is no such band."""
    length, mask = call.k.shape[2], call.mask
    if mask is None:
        return length
    if mask.dtype != torch.bool or mask.shape[-2] != length or mask.shape[-1] < length:
        return None
    # The layers of a model share one mask, and each asks a few times; the version tells of writes to it.
    if mask.is_inference():
        return _band(mask[..., :length])
    known = _BANDS.get(mask)
    if known is None or known[:2] != (mask._version, length):
        known = _BANDS[mask] = (mask._version, length, _band(mask[..., :length]))
    return known[2]


_BANDS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _band(mask: Bool[Tensor, "batch heads query key"]) -> int | None:
    place = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    window = mask[0, 0, -1].sum(dtype=torch.int32)
    band = (place <= place[:, None]) & (place > place[:, None] - window)
    found = int(torch.where((mask == band).all(), window, 0))
    return found or None


def forward(call: DenseCall) -> tuple[Tensor, Tensor]:
    """z, laid out so that joining the heads copies nothing, and log₂ Σ_j exp(scores_ij)."""
    q, k, v = map(dense, (call.q, call.k, call.v))
    batch, heads, length, _ = q.shape
    window = window_of(call) or length
    z = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    shape = _shape(call)
    with torch.cuda.device_of(q):
        _forward[triton.cdiv(length, shape["BLOCK"]), heads, batch](
            q, k, v, z, lse, *map(strides, (q, k, v, z)), length, window, call.scale, heads, call.groups,
            **shape, **_tuning("forward", call), WINDOWED=window < length, PRECISION=precision_of(q.dtype),
        )  # fmt: skip
    return z, lse


def slopes(call: DenseCall, z: Tensor, lse: Tensor, dz: Tensor) -> Slopes:
    """Reads z and dz once, for the saliency and for `gradients`."""
    dz = dense(dz)
    batch, heads, length, _ = z.shape
    shape = _shape(call)
    blocks = triton.cdiv(length, shape["BLOCK"])
    inner = torch.empty_like(lse)
    live = torch.empty(batch, blocks, dtype=torch.int32, device=z.device)
    with torch.cuda.device_of(z):
        _inner[blocks, batch](
            z, dz, inner, live, strides(z), strides(dz), length, heads,
            DIM_V=shape["DIM_V"], WIDTH_V=shape["WIDTH_V"], BLOCK=shape["BLOCK"],
        )  # fmt: skip
    return Slopes(dz, lse, inner, live, shape["BLOCK"], window_of(call) or length, precision_of(z.dtype))


def gradients(call: DenseCall, slopes: Slopes) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""
    q, k, v = map(dense, (call.q, call.k, call.v))
    batch, heads, length, _ = q.shape
    dq, dk, dv = (
        torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    shape = _shape(call)
    blocks = triton.cdiv(length, shape["BLOCK"])
    common = (*map(strides, (q, k, v, slopes.dz)),)
    with torch.cuda.device_of(q):
        _dq[blocks, heads, batch](
            q, k, v, slopes.dz, dq, slopes.lse, slopes.inner, slopes.live, *common, strides(dq),
            length, slopes.window, call.scale, heads, call.groups,
            **shape, **_tuning("dq", call), WINDOWED=slopes.window < length, PRECISION=slopes.precision,
        )  # fmt: skip
        _dkv[blocks, k.shape[1], batch](
            q, k, v, slopes.dz, dk, dv, slopes.lse, slopes.inner, slopes.live,
            *common, strides(dk), strides(dv), length, slopes.window, call.scale, heads, call.groups,
            **shape, **_tuning("dkv", call), WINDOWED=slopes.window < length, PRECISION=slopes.precision,
            BLOCKS=triton.next_power_of_2(blocks),
        )  # fmt: skip
    return dq, dk, dv


def strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def dense(x: Tensor) -> Tensor:
    """With neighbours in the last dimension, which the kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def width_of(dim: int) -> int:
    """Columns of the tile that holds rows of so many numbers."""
    return max(16, triton.next_power_of_2(dim))


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program's tiles may take; where nothing is compiled, those of an H100."""
    if device.type != "cuda":
        return H100_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _shape(call: DenseCall) -> dict[str, int]:
    dim, dim_v = call.q.shape[-1], call.v.shape[-1]
    width, width_v = width_of(dim), width_of(dim_v)
    block = _block(max(width, width_v), call.q.dtype, shared_memory(call.q.device))
    return {"DIM": dim, "DIM_V": dim_v, "WIDTH": width, "WIDTH_V": width_v, "BLOCK": block}


def _block(width: int, dtype: torch.dtype, memory: int) -> int:
    """Rows of a tile: the most of which as many as a kernel holds at once (as compiled for an H100) fit; 0 for none."""
    held = 7 if dtype == torch.float16 else 6
    # Wider tiles of float32 and their halves overflow the registers by far.
    blocks = (16,) if width > 128 and dtype.itemsize == 4 else (64, 32)
    return next((rows for rows in blocks if held * rows * width * dtype.itemsize <= memory), 0)


def _tuning(kernel: str, call: DenseCall) -> dict[str, int]:
    # Measured on an H100. Tiles of float32 leave no room for a second set, and gain nothing by one.
    half = call.q.dtype.itemsize == 2
    wide = max(call.q.shape[-1], call.v.shape[-1]) > 128
    return {"num_warps": 8 if half and wide else 4, "num_stages": 2 if half else 1}


def precision_of(dtype: torch.dtype) -> str:
    """How float32 is multiplied, in Triton's words: in TF32 where torch's own products are."""
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if exact else "tf32"
