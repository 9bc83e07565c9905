"""The Triton kernels against the tile loop of the same module.

Without a GPU they run in Triton's interpreter, which must be chosen before Triton is imported: in a process
of its own. It multiplies bfloat16 as 16-bit integers, so bfloat16 is tested on CUDA only.
"""

import pytest
import torch
from gpu import needs_cuda, needs_interpreter, needs_triton
from transformers.pytorch_utils import Conv1D

from anchors.attention import streaming
from anchors.attention.call import AttentionCall
from anchors.flow.saliency import FlowTap

TINY = [
    pytest.param(shape, dtype, id="-".join(map(str, (*shape, str(dtype).removeprefix("torch.")))))
    for shape, dtype in [
        # batch, heads, kv_heads, length, dim, dim_v, and the window of keys
        ((2, 4, 2, 70, 16, 16), torch.float32),
        ((1, 3, 3, 130, 24, 24), torch.float32),
        ((2, 2, 1, 33, 64, 40), torch.float32),
        ((2, 2, 1, 70, 16, 16), torch.float16),
        ((1, 2, 1, 140, 16, 16, 37), torch.float32),
        ((1, 2, 1, 40, 256, 136), torch.float32),
    ]
]
LARGE = [
    pytest.param(shape, dtype, mode, id="-".join(map(str, (*shape, str(dtype).removeprefix("torch."), mode))))
    for shape in [
        (3, 25, 25, 256, 64, 64),
        (2, 8, 2, 333, 128, 128),
        (2, 6, 3, 200, 24, 24),
        (2, 4, 2, 900, 64, 64, 130),
        (1, 8, 4, 700, 256, 256),
        (1, 4, 4, 300, 256, 256, 64),
    ]
    for dtype, mode in [
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.bfloat16, "tf32"),
        (torch.float16, "tf32"),
    ]
]
ALLOWED = {
    (torch.float32, "ieee"): 3e-6,
    (torch.float32, "tf32"): 2e-3,
    (torch.bfloat16, "tf32"): 1e-2,
    (torch.float16, "tf32"): 2e-3,
}


def case(shape: tuple[int, ...], dtype: torch.dtype, device: str):
    """A call in the layouts that models have, the slope of its output with dead rows, and ragged wanted rows."""
    batch, heads, kv_heads, length, dim, dim_v, *window = shape
    generator = torch.Generator().manual_seed(length + dim)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    q = draw(batch, length, heads * dim * 2)[..., : heads * dim].unflatten(-1, (heads, dim)).transpose(1, 2)
    k, v = draw(batch, kv_heads, length, dim), draw(batch, length, kv_heads, dim_v).transpose(1, 2)
    dz = draw(batch, length, heads, dim_v).transpose(1, 2)
    dz[0, :, length // 2 - 3 :] = 0
    dz[-1, :, 5:7] = 0
    wanted = torch.tensor([[0, 5, length // 3, length - 1], [-1, length - 2, 1, -1], [-1, -1, -1, -1]])
    mask = band(length, *window).to(device) if window else None
    return AttentionCall(3, q, k, v, dim**-0.5, mask), dz, wanted[:batch].to(device)


def band(length: int, window: int) -> torch.Tensor:
    """The mask that transformers hands to a layer with a sliding window."""
    ones = torch.ones(1, 1, length, length, dtype=torch.bool)
    return ones.tril() & ones.triu(1 - window)


def run(
    call: AttentionCall, dz: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Everything that differentiating a tapped call yields, through `streaming`, in some arithmetic."""
    tap = FlowTap(frozenset([3]), wanted, frozenset([3]))
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (call.q, call.k, call.v))
    z = streaming.streaming(AttentionCall(3, q, k, v, call.scale, call.mask), [tap])
    z.backward(dz.to(dtype))
    off, largest = tap.error[3]
    named = {
        "z": z.detach(),
        "rows": tap.rows[3],
        "total": tap.total[3],
        "full": tap.full[3],
        "largest": largest,
    }
    return named | {"off": off / largest, "dq": q.grad, "dk": k.grad, "dv": v.grad}


def agree(call: AttentionCall, dz: torch.Tensor, wanted: torch.Tensor, allowed: float, monkeypatch) -> None:
    dtype = call.q.dtype
    found, again = (run(call, dz, wanted, dtype) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "fused_kernels", lambda call, taps: None)
        exact = run(call, dz, wanted, torch.float64)
    assert found["off"] <= allowed
    for name, value in exact.items():
        assert torch.equal(found[name], again[name]), f"two runs differ in {name}"
        assert found[name].shape == value.shape
        if name != "off":
            error = (found[name].double() - value).norm() / value.norm()
            assert error <= allowed, f"{name} is off by {error:.1e}"
    for name in ("dq", "full"):
        dead = found[name][0, ..., dz.shape[2] // 2 - 3 :, :]
        assert not dead.any(), f"{name} of rows without a gradient is not zero"
    assert not found["rows"][wanted < 0].any()
    assert torch.equal(found["full"], found["full"].tril(-1))
    for example, row in (wanted >= 0).nonzero().tolist():
        assert torch.equal(found["rows"][example, row], found["full"][example, wanted[example, row]])


@needs_triton
@needs_interpreter
@pytest.mark.parametrize(("shape", "dtype"), TINY)
def test_against_the_tile_loop(shape, dtype, monkeypatch):
    from anchors.attention import kernels

    monkeypatch.setattr(
        streaming,
        "fused_kernels",
        lambda call, taps: kernels if call.q.dtype != torch.float64 and kernels.supports(call) else None,
    )
    agree(*case(shape, dtype, "cpu"), 3e-6 if dtype == torch.float32 else 2e-3, monkeypatch)


@needs_triton
def test_declined():
    """What the kernels would compute wrongly is left to the tile loop."""
    from anchors.attention import kernels

    q, k = torch.zeros(1, 2, 8, 16), torch.zeros(1, 1, 8, 16)
    assert kernels.supports(AttentionCall(0, q, k, k, 1.0))
    sees_all = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    wide = torch.zeros(1, 1, 8, 512)
    for call in [
        AttentionCall(0, q, k, k, 1.0, mask=sees_all),
        AttentionCall(0, q, k, k, 1.0, causal=False),
        AttentionCall(0, q, k, k, 1.0, softcap=30.0),
        AttentionCall(0, q, k, k, 1.0, sinks=torch.zeros(2)),
        AttentionCall(0, q[:, :, :4], k, k, 1.0),
        AttentionCall(0, q, k, wide, 1.0),
        AttentionCall(0, q.double(), k.double(), k.double(), 1.0),
    ]:
        assert not kernels.supports(call)


@needs_triton
def test_bands_are_recognised():
    from anchors.attention import kernels

    q = torch.zeros(2, 2, 8, 16)
    window = lambda mask: AttentionCall(0, q, q, q, 1.0, mask=mask).window  # noqa: E731
    assert window(None) == window(band(8, 8)) == window(band(8, 20)) == 8
    for width in (1, 3, 7):
        mask = band(8, width)
        assert window(mask) == window(mask.expand(2, 2, 8, 8)) == width
        with torch.inference_mode():
            assert window(mask.clone()) == width
        assert kernels.supports(AttentionCall(0, q, q, q, 1.0, mask=mask))
        # The same tensor after a write is looked at again.
        mask[0, 0, 5, 5] = False
        assert window(mask) is None
    packed = band(8, 8).expand(2, 1, 8, 8).clone()
    packed[1, 0, 4:, :4] = False
    assert window(packed) is None
    assert window(torch.zeros(1, 1, 8, 8, dtype=torch.bool)) is None
    assert window(band(8, 3).float()) is None


@needs_triton
@needs_cuda
@pytest.mark.parametrize(("shape", "dtype", "mode"), LARGE)
def test_on_cuda(shape, dtype, mode, monkeypatch):
    call, dz, wanted = case(shape, dtype, "cuda")
    assert streaming.fused_kernels(call, [FlowTap(frozenset([3]), wanted)]) is not None
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", mode)
    agree(call, dz, wanted, ALLOWED[dtype, mode], monkeypatch)


@needs_triton
@needs_cuda
def test_long(monkeypatch):
    """Many blocks, the last of them ragged."""
    call, dz, wanted = case((1, 4, 2, 2500, 64, 64), torch.float32, "cuda")
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    agree(call, dz, wanted, ALLOWED[torch.float32, "ieee"], monkeypatch)


def layers(inner: int, columns: int, device: str) -> list[torch.nn.Module]:
    """A frozen layer of each kind that holds a weight matrix, one of them without a bias."""
    torch.manual_seed(inner)
    made = [
        Conv1D(columns, inner),
        torch.nn.Linear(inner, columns),
        torch.nn.Linear(inner, columns, bias=False),
    ]
    for layer in made:
        for weight in layer.parameters():
            torch.nn.init.normal_(weight)
    return [layer.to(device).requires_grad_(False) for layer in made]


def through(
    layer: torch.nn.Module, x: torch.Tensor, slope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, slope)
    return y.detach(), dx


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@needs_triton
@needs_interpreter
def test_products_interpreted():
    """Ragged in every direction: rows, columns and the summed dimension."""
    from anchors.model.products import frozen

    for layer in layers(75, 70, "cpu"):
        matrix = layer.weight if isinstance(layer, Conv1D) else layer.weight.t()
        x, slope = torch.randn(2, 65, 75), torch.randn(2, 65, 70)
        twin = through(layer, x, slope)
        layer.forward = lambda x, matrix=matrix, bias=layer.bias: frozen(x, matrix, bias)
        for found, exact in zip(through(layer, x, slope), twin, strict=True):
            assert distance(found, exact.double()) < 1e-6


@needs_triton
@needs_cuda
@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(512, 1600, 4800), (300, 6400, 1600), (257, 100, 1004)]
)
def test_products_are_float32_accurate(rows, inner, columns, monkeypatch):
    from anchors.model.preparation import apply
    from anchors.model.products import split_products

    x = torch.randn(rows, inner, device="cuda")
    slope = torch.randn(rows, columns, device="cuda")
    for plain, layer in zip(layers(inner, columns, "cuda"), layers(inner, columns, "cuda"), strict=True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
        apply(split_products(layer))
        found, again, ieee = through(layer, x, slope), through(layer, x, slope), through(plain, x, slope)
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
        tf32 = through(plain, x, slope)
        assert all(map(torch.equal, tf32, through(layer, x, slope))), "the mode of the products is not heeded"
        exact = through(plain.double(), x.double(), slope.double())
        for mine, same, theirs, rough, truth in zip(found, again, ieee, tf32, exact, strict=True):
            assert torch.equal(mine, same)
            assert distance(mine, truth) < 4 * distance(theirs, truth)
            assert distance(mine, truth) < distance(rough, truth) / 100


@needs_triton
@needs_cuda
def test_products_that_are_left_alone():
    """Few rows, and weights that learn."""
    from anchors.model.preparation import apply
    from anchors.model.products import FEWEST_ROWS, split_products

    (layer, *_), (plain, *_) = layers(64, 96, "cuda"), layers(64, 96, "cuda")
    apply(split_products(layer))
    few = torch.randn(FEWEST_ROWS - 1, 64, device="cuda")
    assert torch.equal(layer(few), plain(few))
    layer.requires_grad_(True)
    layer(torch.randn(FEWEST_ROWS, 64, device="cuda")).sum().backward()
    assert layer.weight.grad is not None
