"""Several texts in one row, packed or padded, against the equations of each text alone.

Without a GPU the kernels run in Triton's interpreter, in a process of its own (see `test_kernels`).
"""

import copy
from itertools import pairwise

import pytest
import torch
from gpu import needs_cuda, needs_interpreter, needs_triton
from torch import Tensor

from anchors.errors import AnchorsError
from anchors.nsa import phi, reference
from anchors.nsa.attention import Branches, nsa_attention
from anchors.nsa.config import NSAConfig
from anchors.nsa.geometry import Geometry
from anchors.nsa.model import NativeSparseAttention
from anchors.nsa.texts import Texts

SMALL = Geometry(l=8, d=4, lp=16, n=3, w=12, n_init=1, n_local=1)
NAMES = ("q", "q_cmp", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
LENGTHS = {
    # One token, shorter than a compression block, exact multiples of d, l and l', an empty text, and long ones.
    "many": [1, 5, 8, 7, 0, 16, 1, 1, 3, 48, 2, 37, 4, 12],
    "few": [58, 37, 6],
    "one": [67],
    "short": [3, 1, 2],
}
TILES = {
    f"{role}.{branch}": {"rows": 32, "keys": 16, "splits": 2, "split": 8}
    for role in ("forward", "query", "keys")
    for branch in ("compressed", "selected", "window")
}
"""Tiles small enough that texts fill several, and pieces small enough that lists of readers are cut."""


def draw(batch: int, tokens: int, heads: int, groups: int, dim: int, dim_v: int, like: dict) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + heads)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(**like)

    q, q_cmp = normal(batch, tokens, heads, 2 * dim).chunk(2, -1)
    pairs = [normal(batch, tokens, groups, size) for _ in range(3) for size in (dim, dim_v)]
    return [q, q_cmp, *pairs, torch.rand(batch, tokens, heads, 3, generator=generator).to(**like)]


def pools(dim: int, dim_v: int, l: int, like: dict) -> list[phi.MLP]:
    generator = torch.Generator().manual_seed(0)
    made = [phi.MLP(l, size) for size in (dim, dim_v)]
    for pool in made:
        for weight in pool.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return [pool.to(**like) for pool in made]


def equations(inputs: list[Tensor], phis, g: Geometry) -> Tensor:
    """One text by the equations alone."""
    q, q_cmp, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
    scale = q.shape[-1] ** -0.5
    kc, vc = (reference.compress(x, p, l=g.l, d=g.d) for x, p in zip((k_cmp, v_cmp), phis, strict=True))
    o_cmp, lse = reference.compressed_attention(q_cmp, kc, vc, l=g.l, d=g.d, scale=scale)
    idx = reference.select_blocks(q_cmp, kc, lse, geometry=g, tokens=q.shape[1], scale=scale)
    o_slc, _ = reference.selected_attention(q, k_slc, v_slc, idx, lp=g.lp, scale=scale)
    o_win, _ = reference.window_attention(q, k_win, v_win, w=g.w, scale=scale)
    return reference.combine(o_cmp, o_slc, o_win, gates)


def together(inputs: list[Tensor], phis, g: Geometry, texts: Texts, backend: str | dict) -> Tensor:
    """All texts at once, by a backend, or by the kernels under some settings."""
    q, q_cmp, k_cmp, v_cmp, *pairs, gates = inputs
    layout = texts.laid(g)
    kv = Branches(layout.compress(k_cmp, phis[0]), layout.compress(v_cmp, phis[1]), *pairs)
    if isinstance(backend, str):
        return nsa_attention(q, kv, gates, g, q_cmp=q_cmp, texts=texts, backend=backend)
    from anchors.nsa.kernels.sparse_attention import sparse_attention

    return sparse_attention(
        q, q_cmp, *vars(kv).values(), gates, None,
        geometry=g, scale=q.shape[-1] ** -0.5, texts=texts, tuning=backend,
    )  # fmt: skip


def leaves(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in inputs]


def agree(inputs, phis, g, texts, parts: list[tuple[int, int, int]], backend: str, allowed: float) -> None:
    """Outputs and gradients of the texts (example, start, end) are those of each alone, and of nothing else."""
    exact, found = leaves(inputs, torch.float64), leaves(inputs, inputs[0].dtype)
    wide = [phi.MLP(p.l, p.encoding.shape[1]) for p in phis]
    for one, other in zip(wide, phis, strict=True):
        one.to(other.encoding.device, torch.float64).load_state_dict(other.state_dict())
    o = together(found, phis, g, texts, backend)
    slope = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o)
    real = torch.zeros(o.shape[:2], dtype=torch.bool, device=o.device)
    loss = 0
    for example, start, end in parts:
        real[example, start:end] = True
        alone = equations([x[example : example + 1, start:end] for x in exact], wide, g)
        off = (o[example, start:end] - alone[0]).abs().max()
        assert off <= allowed, f"the text from {start} to {end} is off by {off:.1e}"
        loss = loss + (alone[0] * slope[example, start:end]).sum()
    loss.backward()
    o.backward(slope * real[..., None, None])
    pairs = [(name, x.grad, y.grad) for name, x, y in zip(NAMES, found, exact, strict=True)]
    for one, other in zip(phis, wide, strict=True):
        named = zip(one.named_parameters(), other.parameters(), strict=True)
        pairs += [(name, x.grad, y.grad) for (name, x), y in named]
    for name, x, y in pairs:
        if y is None:
            assert x is None or not x.any(), name  # no text has a compressed token
            continue
        off = float((x - y).norm() / y.norm().clamp(min=1e-3))
        assert off <= allowed, f"the gradient of {name} is off by {off:.1e}"
        if x.dim() == 4:
            assert not x[~real].any(), f"padding has a gradient of {name}"
    for pool in phis:
        pool.zero_grad()


def packed(
    lengths: list[int],
    heads: tuple[int, int],
    g: Geometry,
    backend: str,
    dtype,
    device="cpu",
    dims=(16, 24),
    allowed=1e-5,
):
    like = {"dtype": dtype, "device": device}
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    tokens = sum(lengths)
    inputs, phis = draw(1, tokens, *heads, *dims, like), pools(*dims, g.l, like)
    edges = bounds.tolist()
    parts = [(0, a, b) for a, b in pairwise(edges) if b > a]
    agree(inputs, phis, g, Texts.of_bounds(bounds, tokens), parts, backend, allowed)


def padded(backend: str, dtype, device="cpu", g=SMALL, tokens=35, allowed=1e-5) -> None:
    """Padding on the left, on the right, on both sides, and nothing but one token; a padding longer than a block."""
    spans = [(13, tokens), (0, 27), (9, tokens - 1), (tokens - 1, tokens)]
    mask = torch.zeros(len(spans), tokens, dtype=torch.long, device=device)
    for row, (start, end) in zip(mask, spans, strict=True):
        row[start:end] = 1
    like = {"dtype": dtype, "device": device}
    inputs, phis = draw(len(spans), tokens, 4, 1, 16, 16, like), pools(16, 16, g.l, like)
    parts = [(i, *span) for i, span in enumerate(spans)]
    agree(inputs, phis, g, Texts.of_mask(mask), parts, backend, allowed)


def after(queries: int, backend: str, dtype, device="cpu", g=SMALL, tokens=67, allowed=1e-5) -> None:
    """The last rows of a batch that is padded on the left, as after a cache: those of the equations of each text."""
    like, starts = {"dtype": dtype, "device": device}, [0, 9, 30, tokens - 4]
    mask = torch.arange(tokens, device=device) >= torch.tensor(starts, device=device)[:, None]
    inputs, phis = draw(len(starts), tokens, 4, 2, 16, 16, like), pools(16, 16, g.l, like)
    texts, past = Texts.of_mask(mask), tokens - queries
    q, q_cmp, k_cmp, v_cmp, *pairs, gates = (x.detach() for x in inputs)
    with torch.no_grad():
        kv = Branches(
            *(texts.laid(g).compress(x, p) for x, p in zip((k_cmp, v_cmp), phis, strict=True)), *pairs
        )
        found = nsa_attention(
            q[:, past:],
            kv,
            gates[:, past:],
            g,
            q_cmp=q_cmp[:, past:],
            past=past,
            texts=texts,
            backend=backend,
        )
        for i, start in enumerate(starts):
            own = [x[i : i + 1, start:].double() for x in inputs]
            alone = equations(own, [copy.deepcopy(p).double() for p in phis], g)
            torch.testing.assert_close(found[i].double(), alone[0, -queries:], rtol=0, atol=allowed)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_equations_of_packed_texts(lengths):
    packed(lengths, (4, 2), SMALL, "reference", torch.float64, allowed=1e-12)


def test_equations_of_padded_texts():
    padded("reference", torch.float64, allowed=1e-12)


@pytest.mark.parametrize("queries", [1, 4])
def test_equations_after_a_cache(queries):
    after(queries, "reference", torch.float64, allowed=1e-12)


def test_texts_from_bounds_positions_and_masks_are_the_same():
    starts, ends = [0, 0, 0, 3, 4, 4, 4, 4], [3, 3, 3, 4, 8, 8, 8, 8]
    bounds, positions = torch.tensor([0, 0, 3, 4, 8]), torch.tensor([[0, 1, 2, 0, 0, 1, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]])
    for texts in (Texts.of_bounds(bounds, 8), Texts.of_positions(positions)):
        assert texts.start.tolist() == [starts]
        assert texts.end.tolist() == [ends]
    texts = Texts.of_mask(mask)
    assert texts.start.tolist() == [[0] * 3 + [3] * 5] * 2
    assert texts.end.tolist() == [[3] * 3 + [8] * 5] * 2
    both = Texts.of_mask(mask[1:], positions)
    assert both.start.tolist() == [starts]
    assert Texts.of_positions(positions).expanded(2).start.tolist() == [starts] * 2


def test_compressed_rows_lie_one_behind_the_other():
    """Blocks of 8 tokens every 4 within texts of 5, 16 and 9 tokens: none, three and one."""
    layout = Texts.of_bounds(torch.tensor([0, 5, 21, 30]), 30).laid(SMALL)
    assert layout.place.tolist() == [[5, 9, 13, 21, 30, 30]]
    assert layout.first[0, [0, 5, 20, 21, 29]].tolist() == [0, 0, 0, 3, 3]
    assert layout.compressed.seers[0].tolist() == [[12, 21], [16, 21], [20, 21], [28, 30], [37, 30], [37, 30]]


def test_blocks_are_named_by_their_first_tokens():
    layout = Texts.of_bounds(torch.tensor([0, 20, 45]), 45).laid(SMALL)
    idx = torch.tensor([0, 1, -1], dtype=torch.int32).expand(1, 45, 1, 3)
    found = layout.blocks_at(idx)[0, :, 0]
    # Queries before a block see none of it.
    assert found[[0, 15, 16, 20, 35, 36]].tolist() == [
        [0, -1, -1], [0, -1, -1], [0, 16, -1], [20, -1, -1], [20, -1, -1], [20, 36, -1]
    ]  # fmt: skip
    assert torch.equal(layout.blocks_at(idx[:, 16:], past=16)[0, :, 0], found[16:])


@pytest.mark.parametrize("bounds", [[0, 4, 9], [1, 10], [0, 6, 4, 10], [0, 12]])
def test_bounds_that_do_not_divide_the_row(bounds):
    with pytest.raises(AnchorsError, match="do not divide"):
        Texts.of_bounds(torch.tensor(bounds), 10)


def test_masks_with_holes():
    with pytest.raises(AnchorsError, match="within a text"):
        Texts.of_mask(torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]))


def test_texts_of_other_keys():
    inputs, phis = draw(1, 20, 2, 1, 16, 16, {}), pools(16, 16, 8, {})
    with pytest.raises(AnchorsError, match="texts divide"):
        together(inputs, phis, SMALL, Texts.of_bounds(torch.tensor([0, 21]), 21), "reference")


@needs_triton
@needs_interpreter
@pytest.mark.parametrize(
    ("lengths", "heads", "backend"),
    [
        ("many", (2, 1), TILES),
        ("few", (3, 1), TILES),
        ("many", (1, 1), "triton"),
        ("short", (1, 1), "triton"),
        ("one", (8, 1), "triton"),
    ],
)
def test_packed_interpreted(lengths, heads, backend):
    packed(LENGTHS[lengths], heads, SMALL, backend, torch.float32)


@needs_triton
@needs_interpreter
def test_packed_in_boxes_interpreted():
    """As the copy engine reads tiles, which is the way of heads that fill them on a Hopper."""
    boxed = {name: {**sizes, "boxes": 1} for name, sizes in TILES.items()}
    for lengths, heads in (("many", (2, 1)), ("few", (3, 1))):
        packed(LENGTHS[lengths], heads, SMALL, boxed, torch.float32, dims=(16, 16))


@needs_triton
@needs_interpreter
def test_padded_interpreted():
    padded("triton", torch.float32)


@needs_triton
@needs_interpreter
@pytest.mark.parametrize("queries", [1, 4])
def test_rows_after_a_cache_interpreted(queries):
    after(queries, "triton", torch.float32)


PAPER = Geometry(w=100, n=6)
LARGE = [1, 30, 700, 32, 2, 64, 517, 1, 90]
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ON_CUDA = [
    pytest.param((16, 1), (128, 128), torch.bfloat16, id="16-heads"),
    pytest.param((4, 1), (192, 128), torch.bfloat16, id="wide"),
    pytest.param((3, 3), (96, 96), torch.bfloat16, id="groups-of-1"),
    pytest.param((4, 2), (64, 64), torch.float32, id="float32"),
]


@needs_triton
@needs_cuda
@pytest.mark.parametrize(("heads", "dims", "dtype"), ON_CUDA)
def test_packed_on_cuda(heads, dims, dtype, monkeypatch):
    """Outputs and gradients are those of the equations of each text, by the blocks that were chosen; nearly all of these
    are those of float64."""
    from anchors.nsa.kernels.attention import Branch, attend
    from anchors.nsa.kernels.selection import select_blocks
    from anchors.nsa.kernels.sparse_attention import sparse_attention

    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    like, g, tokens, scale = {"dtype": dtype, "device": "cuda"}, PAPER, sum(LARGE), dims[0] ** -0.5
    bounds = torch.tensor([0, *LARGE], device="cuda").cumsum(0)
    texts = Texts.of_bounds(bounds, tokens)
    layout, found = texts.laid(g), leaves(draw(1, tokens, *heads, *dims, like), dtype)
    q, q_cmp, k_cmp, v_cmp, *pairs, gates = found
    with torch.no_grad():
        compressed = [layout.compress(x, lambda block: block.mean(-2)) for x in (k_cmp, v_cmp)]
    compressed = leaves(compressed, dtype)
    branch = Branch("compressed", l=g.l, d=g.d)
    _, lse = attend(branch, q_cmp, *compressed, scale=scale, spans=layout.compressed)
    idx = select_blocks(q_cmp, compressed[0], lse, geometry=g, tokens=tokens, scale=scale, layout=layout)
    o = sparse_attention(q, q_cmp, *compressed, *pairs, gates, None, geometry=g, scale=scale, texts=texts)
    slope = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o)
    o.backward(slope)
    named = dict(zip(NAMES, (q, q_cmp, *compressed, *pairs, gates), strict=True))
    exact = {name: x.detach().double().requires_grad_() for name, x in named.items()}
    outputs, alike, row = [], [], 0
    for start, end in pairwise(bounds.tolist()):
        rows = {name: x[:, start:end] for name, x in exact.items() if not name.endswith("_cmp")}
        count = g.compressed(end - start)
        kc, vc = (exact[name][:, row : row + count] for name in ("k_cmp", "v_cmp"))
        row += count
        first = exact["q_cmp"][:, start:end]
        o_cmp, lse = reference.compressed_attention(first, kc, vc, l=g.l, d=g.d, scale=scale)
        wanted = reference.select_blocks(first, kc, lse, geometry=g, tokens=end - start, scale=scale)
        chosen = idx[:, start:end]
        alike.append((chosen == wanted).all(-1).flatten())
        o_slc, _ = reference.selected_attention(
            rows["q"], rows["k_slc"], rows["v_slc"], chosen, lp=g.lp, scale=scale
        )
        o_win, _ = reference.window_attention(rows["q"], rows["k_win"], rows["v_win"], w=g.w, scale=scale)
        outputs.append(reference.combine(o_cmp, o_slc, o_win, rows["gates"]))
    wanted = torch.cat(outputs, 1)
    wanted.backward(slope.double())
    assert torch.cat(alike).double().mean() > 0.95
    for name, x, y in [("o", o, wanted), *((name, x.grad, exact[name].grad) for name, x in named.items())]:
        off = float((x.detach().double() - y.detach()).norm() / y.detach().norm())
        assert off <= ALLOWED[dtype], f"{name} is off by {off:.1e}"


@needs_triton
@needs_cuda
@pytest.mark.parametrize("way", ["bounds", "positions", "mask"])
def test_nothing_waits_for_the_device(way):
    """Forward and backward, from the bounds on, with every wait of the host for the GPU an error."""
    tokens, like = 700, {"dtype": torch.bfloat16, "device": "cuda"}
    inputs, phis = draw(1, tokens, 16, 1, 128, 128, like), pools(128, 128, PAPER.l, like)
    given = {
        "bounds": torch.tensor([0, 40, 41, 500, tokens]),
        "positions": torch.cat([torch.arange(40), torch.arange(tokens - 40)])[None],
        "mask": (torch.arange(tokens) >= 33)[None].long(),
    }[way].cuda()
    make = {
        "bounds": lambda x: Texts.of_bounds(x, tokens),
        "positions": Texts.of_positions,
        "mask": Texts.of_mask,
    }[way]
    found = leaves(inputs, torch.bfloat16)
    slope = torch.randn(1, tokens, 16, 128, **like)
    for mode in ("default", "error"):  # compiled first
        torch.cuda.set_sync_debug_mode(mode)
        try:
            o = together(found, phis, PAPER, make(given), "triton")
            o.backward(slope)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(o).all()
    assert all(torch.isfinite(x.grad).all() for x in found)


@needs_triton
@needs_cuda
@pytest.mark.parametrize("given", ["cu_seqlens", "attention_mask"])
def test_a_layer_does_not_wait_for_the_device(given):
    layer = NativeSparseAttention(
        NSAConfig(
            hidden_size=64, num_attention_heads=16, num_key_value_heads=1, head_dim=128, n=6, w=100,
            backend="triton", compressed_rope="block_centre",
        )
    ).to("cuda", torch.bfloat16)  # fmt: skip
    x = torch.randn(1, 700, 64, device="cuda", dtype=torch.bfloat16)
    texts = {
        "cu_seqlens": torch.tensor([0, 40, 41, 500, 700]),
        "attention_mask": (torch.arange(700) >= 33)[None],
    }[given].cuda()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            layer(x, **{given: texts})[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(weight.grad).all() for weight in layer.parameters())


@needs_triton
@needs_cuda
def test_wrong_bounds_on_cuda_give_no_numbers():
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    inputs, phis = draw(1, 50, 16, 1, 128, 128, like), pools(128, 128, PAPER.l, like)
    o = together(inputs, phis, PAPER, Texts.of_bounds(torch.tensor([0, 20, 40]).cuda(), 50), "triton")
    assert o.isnan().all()
