# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
"""Float32-accurate products with frozen weights on TF32 tensor cores, for NVIDIA GPUs.

A float32 number is, to 22 bits, the sum of two TF32 numbers, hi + lo, so that

    x y = hi hi' + hi lo' + lo hi'    (+ lo lo', below float32's own rounding)

takes three tensor-core products, which together are faster than one on the float32 units. A tensor core cuts
its running sum off where float32 arithmetic rounds it, and that error grows with the length of the sum; each
short stretch is therefore summed there and the stretches are added up outside. The literal twin is the
forward of the module itself.
"""

from collections.abc import Callable
from functools import partial
from typing import cast, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from anchors.model.alteration import Alteration

FEWEST_ROWS = 256
"""Below this many rows the weights' way through memory takes longer than the arithmetic."""


@triton.jit
@no_type_check
def _product(
    left, right, bias, out, rows, columns, inner, BIASED: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Programs that run together share rows of `left` and of `right`, so that both stay in the L2 cache.
    tall, wide = tl.cdiv(rows, HEIGHT), tl.cdiv(columns, WIDTH)
    group = tl.program_id(0) // (GROUP * wide)
    within = tl.program_id(0) % (GROUP * wide)
    height = tl.minimum(tall - group * GROUP, GROUP)
    row = (group * GROUP + within % height) * HEIGHT + tl.arange(0, HEIGHT)
    column = within // height * WIDTH + tl.arange(0, WIDTH)
    step = tl.arange(0, DEPTH)
    left += (row % rows).to(tl.int64)[:, None] * inner + step[None, :]
    right += (column % columns).to(tl.int64)[None, :] * inner + step[:, None]
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for start in range(0, inner, DEPTH):
        x = tl.load(left, mask=step[None, :] < inner - start, other=0.0)
        y = tl.load(right, mask=step[:, None] < inner - start, other=0.0)
        total += tl.dot(x, y, input_precision="tf32x3")
        left += DEPTH
        right += DEPTH
    if BIASED:
        total += tl.load(bias + column % columns)[None, :]
    out += row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out, total, mask=(row < rows)[:, None] & (column < columns)[None, :])


def product(
    left: Float[Tensor, "*batch inner"],
    right: Float[Tensor, "inner columns"],
    bias: Float[Tensor, " columns"] | None = None,
) -> Float[Tensor, "*batch columns"]:
    """left @ right + bias, float32-accurate."""
    flat = left.reshape(-1, left.shape[-1]).contiguous()
    # Tensor cores read TF32 along the summed dimension only: copying a weight is cheaper than turning tiles.
    right = right.t().contiguous()
    rows, columns = len(flat), len(right)
    out = flat.new_empty(rows, columns)
    with torch.cuda.device_of(flat):
        _product[triton.cdiv(rows, 128) * triton.cdiv(columns, 64),](
            flat, right, bias, out, rows, columns, flat.shape[1], BIASED=bias is not None,
            HEIGHT=128, WIDTH=64, DEPTH=32, GROUP=8, num_warps=4, num_stages=3,
        )  # fmt: skip
    return out.view(*left.shape[:-1], columns)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, *slopes):
        (slope,) = slopes
        (weight,) = ctx.saved_tensors
        return product(slope, weight.t()), None, None


def frozen(
    x: Float[Tensor, "*batch inner"],
    weight: Float[Tensor, "inner columns"],
    bias: Float[Tensor, " columns"] | None = None,
) -> Float[Tensor, "*batch columns"]:
    """x @ weight + bias, differentiable with respect to x only."""
    return _Frozen.apply(x, weight, bias)


def _forward(module: nn.Linear | Conv1D, x: Tensor) -> Tensor:
    weight = module.weight if isinstance(module, Conv1D) else module.weight.t()
    if (
        x.is_cuda
        and x.dtype == weight.dtype == torch.float32
        and not weight.requires_grad
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and torch.backends.cuda.matmul.fp32_precision != "tf32"
    ):
        return frozen(x, weight, module.bias)
    own = cast(Callable[..., Tensor], type(module).forward)
    return own(module, x)


def split_products(model: nn.Module) -> list[Alteration]:
    """The linear layers of a frozen float32 model on CUDA, multiplying by `frozen` where that is faster."""
    return [
        Alteration.of(module, "forward", partial(_forward, module))
        for module in model.modules()
        # A forward that accelerate has replaced already (weights that are elsewhere) stays, and so does a weight that
        # only stands for numbers: a quantised one says that it is float32.
        if isinstance(module, nn.Linear | Conv1D)
        and type(module) in (nn.Linear, Conv1D)
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
    ]
