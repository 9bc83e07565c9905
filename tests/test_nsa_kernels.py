"""The Triton kernels of NSA's branches and their gradients against the equations in float64.

Without a GPU they run in Triton's interpreter, in a process of its own (see `test_kernels`), which multiplies bfloat16
wrongly: bfloat16 is tested on CUDA only.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import cast

import pytest
import torch
from gpu import needs_cuda, needs_interpreter, needs_triton

from anchors.errors import AnchorsError
from anchors.nsa import reference
from anchors.nsa.geometry import Geometry

BRANCHES = ("compressed", "selected", "window")
NAMES = ("q", "q_cmp", "kc", "vc", "ks", "vs", "kw", "vw", "g")
ALLOWED = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    heads: int
    groups: int
    dim: int
    dim_v: int
    geometry: Geometry
    past: int = 0
    own: bool = False
    """Whether the compressed branch has queries of its own."""


def small(lp: int, n: int, w: int) -> Geometry:
    return Geometry(l=8, d=4, lp=lp, n=n, w=w, n_init=1, n_local=1)


def tuning(**sizes: int) -> dict[str, dict[str, int]]:
    return {f"{role}.{branch}": sizes for role in ("forward", "query", "keys") for branch in BRANCHES}


TINY = [
    pytest.param(Shape(1, 53, 6, 2, 16, 24, small(16, 2, 21)), torch.float32, id="groups-of-3"),
    pytest.param(
        Shape(1, 45, 2, 2, 40, 16, small(32, 2, 100), past=7, own=True), torch.float32, id="groups-of-1"
    ),
    pytest.param(Shape(1, 44, 4, 1, 16, 16, small(16, 2, 9)), torch.float16, id="half"),
]
BOXES = [
    Shape(1, 53, 6, 2, 16, 16, small(16, 2, 21)),
    Shape(2, 45, 2, 2, 16, 32, small(32, 2, 100), past=7, own=True),
]
"""Heads that fill their tiles, so that the copy engine can read them."""
PAPER = Geometry(w=100, n=6)
LARGE = [
    Shape(1, 700, 16, 1, 128, 128, PAPER),
    Shape(2, 517, 32, 1, 64, 64, PAPER, own=True),
    Shape(1, 517, 8, 1, 60, 60, Geometry(l=16, d=8, lp=32, n=5, w=70)),
    Shape(1, 640, 14, 2, 100, 100, Geometry(l=16, d=16, lp=16, n=7, w=33)),
    Shape(1, 450, 16, 4, 192, 128, Geometry(lp=128, n=3, w=128)),
    Shape(2, 333, 6, 2, 32, 32, Geometry(l=8, d=4, lp=16, n=4, w=32), past=100),
    Shape(1, 640, 8, 4, 128, 64, PAPER, past=3, own=True),
    Shape(1, 1030, 4, 4, 64, 128, PAPER),
    Shape(1, 500, 32, 4, 192, 128, Geometry(lp=64, n=4, w=512)),
    Shape(1, 700, 2, 2, 96, 96, PAPER),
    Shape(1, 700, 4, 2, 192, 128, PAPER),
]


def draw(shape: Shape, dtype: torch.dtype, device: str) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """Inputs in the layouts that models have, and chosen blocks of which some are taken away."""
    generator = torch.Generator().manual_seed(shape.tokens + shape.dim)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    s, g = shape, shape.geometry
    queries, compressed = s.tokens - s.past, g.compressed(s.tokens)
    q, other = normal(s.batch, queries, s.heads, 2 * s.dim).chunk(2, -1)
    ks, kw = normal(s.batch, s.groups, s.tokens, 2 * s.dim).transpose(1, 2).chunk(2, -1)
    gates = torch.rand(s.batch, queries, s.heads, 3, generator=generator).to(device, dtype)
    inputs = [
        q, other if s.own else None,
        normal(s.batch, compressed, s.groups, s.dim), normal(s.batch, compressed, s.groups, s.dim_v),
        ks, normal(s.batch, s.tokens, s.groups, s.dim_v), kw, normal(s.batch, s.tokens, s.groups, s.dim_v), gates,
    ]  # fmt: skip
    importance = torch.rand(s.batch, queries, s.groups, g.blocks(s.tokens), generator=generator)
    idx = reference.select(importance, geometry=g, tokens=s.tokens, past=s.past)
    taken = torch.randint(-g.n, g.n + 1, idx.shape[:3], generator=generator)
    return inputs, idx.where(torch.arange(g.n) < g.n - taken[..., None], -1).to(device)


def exact(shape: Shape, q, q_cmp, kc, vc, ks, vs, kw, vw, g, idx) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Output and log-sum-exp of the branches."""
    geometry, common = shape.geometry, {"scale": shape.dim**-0.5, "past": shape.past}
    first = q if q_cmp is None else q_cmp
    return [
        reference.compressed_attention(first, kc, vc, l=geometry.l, d=geometry.d, **common),
        reference.selected_attention(q, ks, vs, idx, lp=geometry.lp, **common),
        reference.window_attention(q, kw, vw, w=geometry.w, **common),
    ]


def leaves(inputs: list[torch.Tensor | None], dtype: torch.dtype) -> list[torch.Tensor | None]:
    return [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]


def differentiate(
    shape: Shape, inputs, idx: torch.Tensor, slope: torch.Tensor, sizes=None
) -> dict[str, torch.Tensor]:
    from anchors.nsa.kernels.sparse_attention import sparse_attention

    tensors = leaves(inputs, slope.dtype)
    o = sparse_attention(
        *tensors, idx, geometry=shape.geometry, scale=shape.dim**-0.5, past=shape.past, tuning=sizes
    )
    o.backward(slope)
    named = zip(NAMES, tensors, strict=True)
    return {"o": o.detach()} | {name: x.grad for name, x in named if x is not None}


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    assert found.shape == exact.shape
    assert torch.isfinite(found).all()
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def agree(
    shape: Shape, dtype: torch.dtype, device: str, sizes=None, again: bool = True, shift: float = 0.0
) -> None:
    inputs, idx = draw(shape, dtype, device)
    inputs[-1] = cast(torch.Tensor, inputs[-1]) - shift
    tensors = leaves(inputs, torch.float64)
    branches = exact(shape, *tensors, idx)
    o = reference.combine(*(x for x, _ in branches), tensors[-1])
    slope = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    o.backward(slope.double())
    found = differentiate(shape, inputs, idx, slope, sizes)
    wanted = {"o": o.detach()}
    wanted |= {name: x.grad for name, x in zip(NAMES, tensors, strict=True) if x is not None}
    for name, value in wanted.items():
        off = distance(found[name], value)
        assert off <= ALLOWED[dtype], f"{name} is off by {off:.1e}"
    if again:
        for name, value in differentiate(shape, inputs, idx, slope, sizes).items():
            assert torch.equal(value, found[name]), f"two runs differ in {name}"


def forward_agrees(shape: Shape, dtype: torch.dtype, device: str, sizes=None) -> None:
    from anchors.nsa.kernels import attention

    inputs, idx = draw(shape, dtype, device)
    q, q_cmp, kc, vc, ks, vs, kw, vw, _ = inputs
    g, common = shape.geometry, {"scale": shape.dim**-0.5, "past": shape.past, "tuning": sizes}
    first = q if q_cmp is None else q_cmp
    found = [
        attention.compressed_attention(first, kc, vc, l=g.l, d=g.d, **common),
        attention.selected_attention(q, ks, vs, idx, lp=g.lp, **common),
        attention.window_attention(q, kw, vw, w=g.w, **common),
    ]
    double = [None if x is None else x.double() for x in inputs]
    for (o, lse), (exact_o, exact_lse) in zip(found, exact(shape, *double, idx), strict=True):
        assert distance(o, exact_o) <= ALLOWED[dtype]
        empty = exact_lse == -math.inf
        assert torch.equal(lse == -math.inf, empty)
        assert distance(lse[~empty], exact_lse[~empty]) <= ALLOWED[dtype]
        assert not o[empty].any()


@needs_triton
@needs_interpreter
@pytest.mark.parametrize(("shape", "dtype"), TINY)
def test_against_the_equations(shape, dtype):
    agree(shape, dtype, "cpu", tuning(rows=32, keys=16, splits=2, split=32), again=False)


@needs_triton
@needs_interpreter
@pytest.mark.parametrize("shift", [0.0, 0.5], ids=["gates", "gates-below-0"])
@pytest.mark.parametrize(("shape", "rows", "keys"), [(BOXES[0], 32, 16), (BOXES[1], 16, 32)])
def test_boxes_against_the_equations(shape, rows, keys, shift):
    sizes = tuning(rows=rows, keys=keys, split=32, boxes=1)
    agree(shape, torch.float32, "cpu", sizes, again=False, shift=shift)


@needs_triton
@needs_interpreter
def test_padding_of_rows_interpreted():
    """Behind the last position, as far as any tile can reach, a row has no pattern."""
    from anchors.nsa.kernels import ranges

    lse, gate = torch.randn(2, 256, 3), torch.rand(2, 256, 3) - 0.5
    lse[:, :2] = -torch.inf
    masses, means, signs = ranges.rows_by_head(lse, gate * 2, gate)
    assert masses.shape[-1] >= 256 + 128 - 16
    kept = lse.transpose(1, 2)[..., 2:] / math.log(2) - gate.abs().log2().transpose(1, 2)[..., 2:]
    assert torch.allclose(masses[..., 2:256], kept, atol=1e-5)
    assert (masses[..., :2] == 1e30).all()
    assert (masses[..., 256:] == 1e30).all()
    assert torch.equal(means[..., :256], 2 * gate.transpose(1, 2))
    assert not means[..., 256:].any()
    assert torch.equal(signs[..., :256], gate.sign().transpose(1, 2))


@needs_triton
def test_what_fits_boxes():
    """Where the copy engine cannot read, the other kernels do: no tensor is misread."""
    from anchors.nsa.kernels import ranges
    from anchors.nsa.kernels.tiles import widths

    whole = torch.zeros(2, 8, 3, 32, dtype=torch.bfloat16)
    assert ranges.boxed(whole, whole[..., :16], whole.transpose(1, 2))
    assert not ranges.boxed(whole[..., 1:17])
    assert not ranges.boxed(torch.zeros(2, 8, 3, 20, dtype=torch.bfloat16))
    assert not ranges.boxed(whole[:, :0])
    assert not ranges.boxed(whole[:, :1].expand(2, 8, 3, 32))
    assert ranges.fits(widths(32, 32), whole)
    assert not ranges.fits(widths(20, 32), whole)
    assert not ranges.fits(widths(192, 128), torch.zeros(1, 8, 1, 192))


@needs_triton
@needs_interpreter
def test_outputs_of_branches_interpreted():
    forward_agrees(TINY[0].values[0], torch.float32, "cpu", tuning(rows=64, keys=32))


def hot(device: str, dtype: torch.dtype, tokens: int) -> tuple[torch.Tensor, ...]:
    """Queries that all chose block 0, and half of them block 1; nobody chose block 2."""
    generator = torch.Generator().manual_seed(0)
    q, dz = (torch.randn(1, tokens, 2, 16, generator=generator).to(device, dtype) for _ in range(2))
    k, v = (torch.randn(1, 48, 1, 16, generator=generator).to(device, dtype) for _ in range(2))
    idx = torch.tensor([[0, -1], [0, 1]], dtype=torch.int32).repeat(tokens // 2, 1)[None, :, None]
    return q, k, v, idx.to(device), dz


def split_equals_unsplit(device: str, tokens: int, split: int) -> None:
    from anchors.nsa.kernels import sparse_attention as gradients
    from anchors.nsa.kernels.attention import Branch, attend

    q, k, v, idx, dz = hot(device, torch.float32, tokens)
    branch, common = Branch("selected", lp=16), {"scale": 0.25, "idx": idx, "past": 48 - tokens}
    if tokens > 48:
        common["past"] = 0
    o, lse = attend(branch, q, k, v, **common)
    rows = (q, k, v, dz, lse, gradients.inner(dz, o, o, o)[..., 1], torch.ones_like(lse))
    whole, parts = (
        gradients.key_gradients(
            branch, *rows, tuning={"keys.selected": {"rows": 32, "split": size}}, **common
        )
        for size in (1024, split)
    )
    for one, other in zip(whole, parts, strict=True):
        assert distance(one, other.double()) < 1e-6
        assert not one[:, 32:].any()
        assert one[:, :16].any(-1).all()


@needs_triton
@needs_interpreter
def test_split_interpreted():
    """The queries of a block that everybody chose, cut into pieces; a block that nobody chose has no gradient."""
    split_equals_unsplit("cpu", 48, 20)


def nothing_seen(device: str, dtype: torch.dtype) -> None:
    """No block is complete, none is chosen: only the window speaks."""
    shape = Shape(1, 6, 2, 1, 16, 16, small(16, 2, 4))
    inputs, idx = draw(shape, dtype, device)
    slope = torch.ones(1, 6, 2, 16, device=device, dtype=dtype)
    found = differentiate(shape, inputs, torch.full_like(idx, -1), slope)
    assert all(torch.isfinite(x).all() for x in found.values())
    assert not found["ks"].any()
    assert not found["vs"].any()
    assert not found["g"][..., :2].any()
    assert found["kc"].shape[1] == 0
    double = [None if x is None else x.double() for x in inputs]
    (*_, (window, _)) = exact(shape, *double, idx)
    assert distance(found["o"], window * double[-1][..., 2:]) <= ALLOWED[dtype]


@needs_triton
@needs_interpreter
def test_nothing_seen_interpreted():
    nothing_seen("cpu", torch.float32)


@needs_triton
def test_declined():
    """What the kernels cannot compute is named before anything runs."""
    from anchors.nsa.kernels import attention

    def call(dtype=torch.float32, heads=2, groups=1, scale=1.0, lp=16):
        q, k = torch.zeros(1, 4, heads, 16, dtype=dtype), torch.zeros(1, 4, groups, 16, dtype=dtype)
        idx = torch.zeros(1, 4, groups, 1, dtype=torch.int32)
        attention.selected_attention(q, k, k, idx, lp=lp, scale=scale)

    for wrong in (
        {"dtype": torch.float64},
        {"heads": 3, "groups": 2},
        {"heads": 256},
        {"scale": -1.0},
        {"lp": 24},
    ):
        with pytest.raises(AnchorsError):
            call(**wrong)


@needs_triton
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=lambda s: f"{s.heads}-{s.groups}-{s.dim}-{s.dim_v}")
def test_on_cuda(shape, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    forward_agrees(shape, dtype, "cuda")
    agree(shape, dtype, "cuda")


@needs_triton
@needs_cuda
@pytest.mark.parametrize("sizes", [{"peel": 0}, {"rows": 64, "keys": 32, "splits": 3, "split": 100}], ids=str)
def test_settings_on_cuda(sizes):
    agree(LARGE[0], torch.bfloat16, "cuda", tuning(**sizes))


@needs_triton
def test_without_boxes_the_sizes_are_those_of_pointers(monkeypatch):
    from anchors.nsa.kernels import tiles

    monkeypatch.setattr(tiles, "shared_memory", lambda device: tiles.ROOM)
    for kernel, dtype, width in tiles.BOXED:
        like = torch.zeros(1, dtype=getattr(torch, dtype))
        sizes = partial(tiles.tuned, kernel, like, width, boxed=True)
        assert sizes(None) == {**tiles.BOXED[kernel, dtype, width], "boxes": 1}
        assert sizes({kernel: {"boxes": 0}}) == {**tiles.TUNING[kernel, dtype, width], "boxes": 0}


@needs_triton
@needs_cuda
@pytest.mark.parametrize("sizes", [None, tuning(boxes=0)], ids=["boxes", "pointers"])
def test_gates_below_0_on_cuda(sizes):
    """exp2(scores − mass) knows |gate| only: the sign comes back in the section with a mask."""
    agree(LARGE[0], torch.bfloat16, "cuda", sizes, shift=0.5)


@needs_triton
@needs_cuda
def test_corners_on_cuda():
    for tokens, split in ((48, 20), (6000, 64)):
        split_equals_unsplit("cuda", tokens, split)
    for dtype in (torch.float32, torch.bfloat16):
        nothing_seen("cuda", dtype)
