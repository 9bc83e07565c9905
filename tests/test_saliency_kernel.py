"""The saliency kernel against |Σ_h P ⊙ (g · dz vᵀ)| by its definition, in float64, for every kind of pattern.

Without a GPU it runs in Triton's interpreter, in a process of its own; see `test_kernels`.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from gpu import needs_cuda, needs_interpreter, needs_triton

from anchors.errors import AnchorsError
from anchors.nsa import reference
from anchors.nsa.geometry import Geometry

GEOMETRY = Geometry(l=8, d=4, lp=16, n=4, w=16)
KINDS = ("causal", "window", "compressed", "selected")
TINY = [
    # kind, (batch, tokens, heads, groups, dim, dim_v), classes, gates, past
    ("causal", (1, 40, 3, 1, 16, 24), 16, False, 3),
    ("window", (1, 70, 2, 1, 16, 16), 1, True, 0),
    ("compressed", (2, 41, 4, 2, 24, 16), 3, True, 0),
    ("selected", (1, 70, 4, 2, 16, 16), 2, True, 0),
    ("odd blocks", (1, 70, 2, 2, 16, 16), 2, False, 10),
    ("wide", (1, 35, 2, 1, 256, 256), 1, False, 0),
]


def case(kind: str, shape: tuple[int, ...], classes: int, gated: bool, past: int, dtype, device: str):
    """Everything that a call of the kernel takes, in strides of both layouts, and the visible keys of each group."""
    from anchors.attention.saliency_kernel import Band, Compressed, Selected

    batch, tokens, heads, groups, dim, dim_v = shape
    generator = torch.Generator().manual_seed(tokens + dim)
    draw = lambda *size: torch.randn(*size, generator=generator).to(device, dtype)  # noqa: E731
    rows, g = tokens - past, GEOMETRY
    lp = 24 if kind == "odd blocks" else g.lp
    keys = g.compressed(tokens) if kind == "compressed" else tokens
    q, k = draw(batch, heads, rows, dim).transpose(1, 2), draw(batch, keys, groups, dim)
    v, dz = draw(batch, groups, keys, dim_v).transpose(1, 2), draw(batch, rows, heads, 2 * dim_v)[..., :dim_v]
    where = {"past": past, "device": device}
    if kind == "compressed":
        pattern = Compressed(g.l, g.d)
        visible = reference.compressed_visible(rows, keys, l=g.l, d=g.d, **where)[None, :, None]
    elif kind in ("selected", "odd blocks"):
        scores = torch.rand(batch, rows, groups, -(-tokens // lp), generator=generator).to(device)
        idx = reference.select(scores, geometry=Geometry(8, 4, lp, 4, 16), tokens=tokens, past=past)
        pattern, visible = Selected(idx, lp), reference.selected_visible(idx, tokens, lp=lp, past=past)
    else:
        pattern = Band(g.w if kind == "window" else None)
        window = reference.window_visible(rows, keys, w=pattern.window or tokens, **where)
        visible = window[None, :, None]
    gates = torch.rand(batch, rows, heads, 3, generator=generator).to(device, dtype)[..., 1]
    gates = gates if gated else None
    kinds = torch.randint(-1, classes, (batch, keys), generator=generator).to(device) if classes > 1 else None
    wanted = torch.tensor([[0, rows - 1, -1, rows // 2, rows - 1]], device=device).expand(batch, 5)
    return SimpleNamespace(**locals())


def oracle(c: SimpleNamespace) -> dict[str, torch.Tensor]:
    q, k, v, dz = (x.double() for x in (c.q, c.k, c.v, c.dz))
    _, lse, pattern = reference.attention(q, k, v, c.visible, c.dim**-0.5)
    slope = torch.einsum("bthd,bshd->bths", dz, v.repeat_interleave(c.heads // c.groups, 2))
    product = pattern * slope * (1 if c.gates is None else c.gates.double()[..., None])
    flow = product.sum(2)
    size = flow.abs()
    if c.kind != "compressed":
        own = torch.arange(c.rows, device=q.device)
        size[:, own, own + c.past] = 0
    kinds = torch.zeros(c.batch, c.keys, device=q.device, dtype=torch.long) if c.kinds is None else c.kinds
    member = (kinds[..., None] == torch.arange(c.classes, device=q.device)).double()
    rows = size.gather(1, c.wanted.clamp(min=0)[..., None].expand(-1, -1, c.keys))
    return {
        "lse": lse,
        "abs_sums": size @ member,
        "signed_sums": flow @ member,
        "head_sums": product.sum(-1).transpose(1, 2),
        "rows": rows * (c.wanted >= 0)[..., None],
        "full": size,
    }


def agree(c: SimpleNamespace, allowed: float) -> None:
    from anchors.attention.saliency_kernel import saliency

    exact = oracle(c)
    lse = exact.pop("lse").float()
    options = {"scale": c.dim**-0.5, "gates": c.gates, "classes": c.kinds, "n_classes": c.classes}
    options |= {"wanted": c.wanted, "past": c.past}
    given = (c.pattern, c.q, c.k, c.v, c.dz)
    found = saliency(*given, lse, full=True, **options)
    again = saliency(*given, lse, full=True, **options)
    for name, value in exact.items():
        mine = getattr(found, name)
        assert torch.equal(mine, getattr(again, name)), f"two runs differ in {name}"
        assert mine.shape == value.shape
        error = (mine.double() - value).norm() / value.norm()
        assert error <= allowed, f"{name} is off by {error:.1e}"
    for example, row in (c.wanted >= 0).nonzero().tolist():
        assert torch.equal(found.rows[example, row], found.full[example, c.wanted[example, row]])
    assert not found.rows[c.wanted < 0].any()


@needs_triton
@needs_interpreter
@pytest.mark.parametrize("given", TINY, ids=lambda given: given[0])
def test_against_the_definition(given):
    c = case(*given, torch.float32, "cpu")
    agree(c, 3e-6)


@needs_triton
@needs_interpreter
def test_memory_is_linear(monkeypatch):
    """Nothing that is allocated has as many numbers as there are pairs of blocks; half precision, log 2, dead rows."""
    from anchors.attention import saliency_kernel as kernel

    monkeypatch.setattr(kernel, "TILINGS", {(2, 64): ((16, 16, 4, 1),)})
    monkeypatch.setattr(kernel, "SPLITS", 2)
    c = case("causal", (1, 96, 1, 1, 16, 16), 1, False, 0, torch.float16, "cpu")
    c.dz[:, 32:64] = 0
    live = c.dz.ne(0).flatten(2).any(-1).unflatten(1, (3, 32)).any(-1).int()
    exact, sizes = oracle(c), []
    for name in ("empty", "zeros"):
        made = getattr(torch, name)

        def counted(*size, made=made, **options):
            sizes.append(math.prod(size))
            return made(*size, **options)

        monkeypatch.setattr(kernel.torch, name, counted)
    found = kernel.saliency(
        c.pattern, c.q, c.k, c.v, c.dz, exact["lse"].float() / math.log(2),
        scale=c.dim**-0.5, live=(live, 32), base2=True,
    )  # fmt: skip
    assert max(sizes) <= 2 * kernel.SPLITS * c.tokens < c.tokens**2 // 16
    assert found.full is None
    assert found.rows.numel() == 0
    for name in ("abs_sums", "signed_sums", "head_sums"):
        mine = getattr(found, name)
        assert (mine.double() - exact[name]).norm() / exact[name].norm() < 2e-3
        assert not mine.flatten()[32:64].any()


@needs_triton
@needs_interpreter
def test_no_compressed_key_yet():
    from anchors.attention.saliency_kernel import Compressed, saliency

    q, k, lse = torch.randn(1, 5, 2, 16), torch.randn(1, 0, 1, 16), torch.full((1, 5, 2), -torch.inf)
    found = saliency(Compressed(8, 4), q, k, k, q, lse, scale=1.0, wanted=torch.tensor([[3]]))
    assert not found.abs_sums.any()
    assert not found.head_sums.any()
    assert found.rows.shape == (1, 1, 0)


@needs_triton
def test_refusals():
    from anchors.attention.saliency_kernel import Band, saliency

    q, lse = torch.zeros(1, 4, 3, 16), torch.zeros(1, 4, 3)
    with pytest.raises(AnchorsError, match="classes"):
        saliency(Band(), q, q, q, q, lse, scale=1.0, n_classes=2)
    with pytest.raises(AnchorsError, match="float64"):
        saliency(Band(), q, q, q, q.double(), lse, scale=1.0)
    with pytest.raises(AnchorsError, match="groups"):
        saliency(Band(), q, q[:, :, :2], q[:, :, :2], q, lse, scale=1.0)


@needs_triton
def test_tilings_fit():
    """On an H100 every type and width runs in the tiles that the table prefers."""
    from anchors.attention import saliency_kernel as kernel

    for dtype in kernel.DTYPES:
        for dim in (16, 64, 100, 128, 192, 256):
            plan = kernel.tiling(kernel.Band(), dim, dim, dtype)
            first = kernel.TILINGS[dtype.itemsize, max(64, plan["WIDTH"])][0]
            assert (plan["ROWS"], plan["KEYS"], plan["num_warps"], plan["num_stages"]) == first
    blocks = kernel.Selected(torch.zeros(1, 1, 1, 1, dtype=torch.int32), 16)
    assert kernel.tiling(blocks, 64, 64, torch.float32)["KEYS"] == 16
    assert kernel.tiling(kernel.Band(), 128, 128, torch.float32, memory=100_000)["ROWS"] == 32


@needs_triton
@needs_cuda
@pytest.mark.parametrize("kind", [*KINDS, "odd blocks"])
@pytest.mark.parametrize(
    ("shape", "dtype", "mode", "allowed"),
    [
        ((2, 700, 8, 2, 64, 64), torch.float32, "ieee", 3e-6),
        ((2, 333, 6, 6, 100, 64), torch.float32, "tf32", 2e-3),
        ((1, 1000, 16, 1, 192, 128), torch.bfloat16, "tf32", 1e-2),
        ((1, 500, 3, 1, 256, 256), torch.float32, "ieee", 3e-6),
        ((2, 515, 4, 4, 128, 128), torch.float16, "tf32", 2e-3),
    ],
)
def test_on_cuda(kind, shape, dtype, mode, allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", mode)
    agree(case(kind, shape, 7, True, 0, dtype, "cuda"), allowed)
