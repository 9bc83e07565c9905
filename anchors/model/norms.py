# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
"""Norms of a frozen model in one kernel each way, for NVIDIA GPUs.

    y = w · (x − μ) / √(var(x) + ε) + b        (layer norm)
    y = (w + c) · x / √(mean(x²) + ε)          (root mean square; c is 1 in Gemma's, else 0)

Families write the second one step by step, and autocast writes what a half-precision product reads once more: each step
moves the whole residual stream. Here x is read once, and y is written in the precision of the one product that reads it;
where anything else reads it, in float32. The literal twin is the forward of the module itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from anchors.model.alteration import Alteration

WIDEST = 16_384
"""Numbers of a row that a program holds."""


@triton.jit
@no_type_check
def _normed(
    x, weight, bias, y, mean, rstd, width, eps, plus,
    WIDTH: tl.constexpr, CENTRED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    held = tl.load(x + row * width + column, mask=inside, other=0.0)
    if CENTRED:
        middle = tl.sum(held, 0) / width
        held = tl.where(inside, held - middle, 0.0)
        tl.store(mean + row, middle)
    scale = 1.0 / tl.sqrt(tl.sum(held * held, 0) / width + eps)
    tl.store(rstd + row, scale)
    out = held * scale * (tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + plus)
    if BIASED:
        out += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _sloped(
    x, weight, dy, dx, mean, rstd, width, plus, WIDTH: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    held = tl.load(x + row * width + column, mask=inside, other=0.0)
    scale = tl.load(rstd + row)
    if CENTRED:
        held = tl.where(inside, held - tl.load(mean + row), 0.0)
    held *= scale
    slope = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32)
    slope *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + plus
    off = slope - held * (tl.sum(slope * held, 0) / width)
    if CENTRED:
        off -= tl.sum(slope, 0) / width
    tl.store(dx + row * width + column, off * scale, mask=inside)


@dataclass(frozen=True)
class Form:
    """What a norm computes: whether it takes the mean off, what it adds to its weight, ε."""

    centred: bool
    plus: float
    eps: float


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, form, dtype):
        x = x.contiguous()
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        y = torch.empty_like(x, dtype=dtype)
        mean, rstd = x.new_empty(rows if form.centred else 0), x.new_empty(rows)
        with torch.cuda.device_of(x):
            _normed[(rows,)](
                x, weight, bias, y, mean, rstd, width, form.eps, form.plus, WIDTH=triton.next_power_of_2(width),
                CENTRED=form.centred, BIASED=bias is not None, num_warps=_warps(width),
            )  # fmt: skip
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.form = form
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *slopes):
        x, weight, mean, rstd = ctx.saved_tensors
        dy, width, dx = slopes[0].contiguous(), x.shape[-1], torch.empty_like(x)
        with torch.cuda.device_of(x):
            _sloped[(x.numel() // width,)](
                x, weight, dy, dx, mean, rstd, width, ctx.form.plus, WIDTH=triton.next_power_of_2(width),
                CENTRED=ctx.form.centred, num_warps=_warps(width),
            )  # fmt: skip
        return dx, None, None, None, None


def _warps(width: int) -> int:
    return min(16, max(1, triton.next_power_of_2(width) // 512))


def norm(
    x: Float[Tensor, "*rows width"],
    weight: Float[Tensor, " width"],
    bias: Float[Tensor, " width"] | None,
    form: Form,
    dtype: torch.dtype,
) -> Float[Tensor, "*rows width"]:
    """The norm of float32 rows, written as `dtype`; differentiable with respect to x only."""
    return _Norm.apply(x, weight, bias, form, dtype)


class OneKernel:
    """The forward of a norm module.

    Attributes:
        own: the module's own forward.
        rounds: whether y is read by one product alone, which rounds it.
    """

    def __init__(self, module: nn.Module, own: Callable[..., Any], form: Form) -> None:
        self.module, self.own, self.form, self.rounds = module, own, form, False

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Any:
        module, device = self.module, x.device.type
        weight = cast(Tensor, module.weight)
        if args or options or x.dtype != torch.float32 or not x.is_cuda or weight.requires_grad:
            return self.own(x, *args, **options)
        wide = self.rounds and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if wide else torch.float32
        return norm(x, weight, getattr(module, "bias", None), self.form, dtype)


def one_kernel_norms(model: nn.Module) -> list[Alteration]:
    """The norms of a frozen model on CUDA whose formula is known: each is tried on numbers, with the weights that it has."""
    made = []
    for module in model.modules():
        weight, eps = getattr(module, "weight", None), _eps(module)
        if eps is None or weight is None or weight.dim() != 1 or "forward" in vars(module):
            continue
        if len(weight) <= WIDEST and (form := _form(module, eps)) is not None:
            made.append(Alteration.of(module, "forward", OneKernel(module, module.forward, form)))
    return made


def _eps(module: nn.Module) -> float | None:
    """ε of a norm; None of what is none."""
    if not type(module).__name__.endswith("Norm") or list(module.children()) or module._forward_hooks:
        return None
    if {name for name, _ in module.named_parameters()} - {"weight", "bias"}:
        return None
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    return eps if isinstance(eps, float) else None


@torch.no_grad()
def _form(module: nn.Module, eps: float) -> Form | None:
    """Which formula the module follows, on random numbers with a large mean; None of none."""
    weight, bias = cast(Tensor, module.weight), getattr(module, "bias", None)
    seeded = torch.Generator(weight.device).manual_seed(0)
    x = 3 + torch.randn(4, len(weight), generator=seeded, device=weight.device)
    try:
        with torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32):
            own = module(x)
    except RuntimeError:  # a norm that takes no float32
        return None
    for form in (Form(True, 0.0, eps), Form(False, 0.0, eps), Form(False, 1.0, eps)):
        if own.shape == x.shape and own.dtype == x.dtype and _near(norm(x, weight, bias, form, x.dtype), own):
            return form
    return None


def _near(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm()) <= 1e-6 * float(other.norm())


class _Readers(TorchDispatchMode):
    """Counts who reads some tensors, or views of them: products that round them, and anything else."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.owner: dict[int, OneKernel] = {}
        self.held: list[Tensor] = []
        self.rounding: dict[OneKernel, int] = {}
        self.others: set[OneKernel] = set()

    def watch(self, x: Tensor, owner: OneKernel) -> None:
        self.owner[id(x)] = owner
        self.held.append(x)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in args:
            owner = self.owner.get(id(x)) if isinstance(x, Tensor) else None
            if owner is None:
                continue
            if func.is_view and isinstance(out, Tensor):
                self.watch(out, owner)
            elif func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == self.dtype:
                self.rounding[owner] = self.rounding.get(owner, 0) + 1
            else:
                self.others.add(owner)
        return out


def let_round(norms: list[OneKernel], run: Callable[[], object], dtype: torch.dtype) -> None:
    """Find out in one small run which norms are read by one product alone that rounds what it reads, and let those round.

    Args:
        norms: of the model that `run` runs.
        run: a forward pass in the model's arithmetic.
        dtype: to which it rounds.
    """
    readers = _Readers(dtype)
    handles = [
        one.module.register_forward_hook(lambda _, __, y, one=one: readers.watch(y, one)) for one in norms
    ]
    try:
        with torch.no_grad(), readers:
            run()
    finally:
        for handle in handles:
            handle.remove()
    for one in norms:
        one.rounds = readers.rounding.get(one) == 1 and one not in readers.others
