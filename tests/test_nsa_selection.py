"""The choice of blocks by Triton kernels, against the equations.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported: in a process
of its own. It multiplies bfloat16 as 16-bit integers, so bfloat16 is tested on CUDA only.
"""

import pytest
import torch
from gpu import needs_cuda, needs_interpreter, needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st

from anchors.errors import AnchorsError
from anchors.nsa import reference
from anchors.nsa.geometry import Geometry

pytestmark = needs_triton
SMALL = {
    "score.float32": {"rows": 64, "keys": 16},
    "score": {"rows": 64, "keys": 16},
    "topn": {"scores": 1024},
}
"""Tiles small enough that a few tokens make several of them."""
CASES = [
    # l, d, l', groups, heads per group, tokens, dim
    (32, 16, 64, 2, 4, 333, 16),
    (16, 16, 16, 1, 1, 69, 16),
    (8, 4, 16, 2, 3, 35, 24),
    (8, 4, 24, 1, 16, 17, 48),
    (16, 4, 16, 1, 3, 53, 40),
]


def case(l: int, d: int, groups: int, heads: int, tokens: int, dim: int, dtype=torch.float32, device="cpu"):
    """Queries cut out of a wider tensor, compressed keys and the log-sum-exp of their branch."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    q = draw(2, tokens, groups * heads * dim * 2)[..., : groups * heads * dim].unflatten(-1, (-1, dim))
    kc = reference.compress(draw(2, tokens, groups, dim), lambda x: x.mean(-2), l=l, d=d)
    kc = kc.transpose(1, 2).contiguous().transpose(1, 2)
    _, lse = reference.compressed_attention(q.double(), kc.double(), kc.double(), l=l, d=d, scale=dim**-0.5)
    return q, kc, lse.float()


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def test_weights_by_hand():
    """l = 32, d = 16, l' = 64: five compressed tokens overlap a block, by 1, 2, 2, 2 and 1 strides."""
    weights = reference.overlap(8, 2, l=32, d=16, lp=64)
    assert weights[:, 1].tolist() == [0, 0, 0, 1, 2, 2, 2, 1]
    assert weights[:, 0].tolist() == [2, 2, 2, 1, 0, 0, 0, 0]


@needs_interpreter
def test_weights_of_the_kernel():
    """All compressed keys alike: after T tokens each has the share 1 / C, so that importance counts the strides."""
    from anchors.nsa.kernels.selection import block_importance

    for tokens, strides in [(256, [7, 8, 8, 7]), (80, [7, 1]), (31, [0])]:
        compressed = max(0, (tokens - 32) // 16 + 1)
        found = block_importance(
            torch.zeros(1, 2, 1, 16), torch.zeros(1, compressed, 1, 16), torch.full((1, 2, 1), compressed).log(),
            l=32, d=16, lp=64, tokens=tokens, scale=1.0, past=tokens - 2, tuning=SMALL,
        )  # fmt: skip
        assert torch.allclose(found[0, 1, 0] * compressed, torch.tensor(strides).float())


@needs_interpreter
@pytest.mark.parametrize(("flip", "boxes"), [(False, 0), (True, 0), (True, 1)])
@pytest.mark.parametrize(("l", "d", "lp", "groups", "heads", "tokens", "dim"), CASES)
def test_importance(l, d, lp, groups, heads, tokens, dim, flip, boxes):
    from anchors.nsa.kernels.selection import block_importance

    q, kc, lse = case(l, d, groups, heads, tokens, dim)
    past = tokens - 40 if tokens > 300 else 0
    q, lse = q[:, past:], lse[:, past:]
    asked = {"l": l, "d": d, "lp": lp, "tokens": tokens, "scale": dim**-0.5, "past": past}
    tuning = SMALL | {"score.float32": {"rows": 64, "keys": 32, "flip": flip, "boxes": boxes}}
    found = block_importance(q, kc, lse, **asked, tuning=tuning)
    exact = reference.block_importance(q.double(), kc.double(), lse.double(), **asked)
    assert off(found, exact) < 1e-6
    if tokens < 20:
        assert torch.equal(found, block_importance(q, kc, lse, **asked, tuning=tuning))


@needs_interpreter
def test_half_precision():
    from anchors.nsa.kernels.selection import block_importance

    q, kc, lse = case(8, 4, 2, 3, 35, 24, dtype=torch.float16)
    asked = {"l": 8, "d": 4, "lp": 16, "tokens": 35, "scale": 24**-0.5}
    exact = reference.block_importance(q.double(), kc.double(), lse.double(), **asked)
    assert off(block_importance(q, kc, lse, **asked, tuning=SMALL), exact) < 1e-5


@needs_interpreter
@pytest.mark.parametrize("past", [0, 31])
def test_chunks(past):
    """However the queries are cut into chunks, and whatever is wished for, the choice is that of the equations."""
    from anchors.nsa.kernels.selection import select_blocks

    geometry = Geometry(l=8, d=4, lp=8, n=4, w=8)
    q, kc, lse = case(8, 4, 2, 3, 75, 16)
    generator = torch.Generator().manual_seed(0)
    wishes = {
        "force": torch.rand(2, 1, 1, 10, generator=generator) < 0.1,
        "ban": torch.rand(75 - past, 1, 10, generator=generator) < 0.2,
        "bias": torch.randn(2, 1, 2, 1, generator=generator),
    }
    asked = {"geometry": geometry, "tokens": 75, "scale": 0.25, "past": past}
    q, lse = q[:, past:], lse[:, past:]
    for some in ({}, wishes):
        exact = reference.select_blocks(q, kc, lse, **asked, **some)
        for size in (1 << 20,) if not some else (8000,):
            found = select_blocks(q, kc, lse, **asked, **some, chunk_bytes=size, tuning=SMALL)
            assert torch.equal(found, exact)
    assert found.dtype == torch.int32


@needs_interpreter
def test_ranges_end_where_rows_double():
    from anchors.nsa.kernels.selection import _chunks

    def cut(stop: int, past: int, least: int) -> list[tuple[int, int, int]]:
        return list(_chunks(0, stop, 4, past, 64, 1 << 30, least))

    assert cut(40000, 0, 256) == [(0, 16384, 256), (16384, 32768, 512), (32768, 40000, 640)]
    assert cut(10000, 12000, 256) == [(0, 4384, 256), (4384, 10000, 352)]
    assert cut(40000, 0, 1024) == [(0, 40000, 640)]


@needs_interpreter
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_top_n(data):
    """Scores of few values, so that ties are the rule."""
    from anchors.nsa.kernels.selection import select

    n = data.draw(st.integers(1, 5))
    n_init = data.draw(st.integers(0, min(2, n)))
    n_local = data.draw(st.integers(0, min(2, n - n_init)))
    geometry = Geometry(4, 4, 4, n=n, w=4, n_init=n_init, n_local=n_local)
    queries, blocks = 6, data.draw(st.integers(2, 11))
    tokens = 4 * blocks
    past = data.draw(st.integers(0, tokens - queries))
    values = torch.tensor([0.0, -0.0, 1.0, 1e-30, 3.4e38, -2.0, float("-inf"), float("inf"), -1e-45])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def some(chance: float, *size: int) -> torch.Tensor | None:
        return torch.rand(*size, generator=generator) < chance if data.draw(st.booleans()) else None

    picked = torch.randint(
        data.draw(st.integers(1, len(values))), (1, queries, 2, blocks), generator=generator
    )
    bias = torch.randn(blocks, generator=generator).round() if data.draw(st.booleans()) else None
    asked = {
        "geometry": geometry, "tokens": tokens, "past": past, "bias": bias,
        "force": some(0.4, 2, blocks), "ban": some(0.3, 1, queries, 1, blocks),
    }  # fmt: skip
    exact = reference.select(values[picked], **asked)
    # With few parts of a row, the bound from their largest leaves a search of its own.
    sizes = {"scores": 64, "tops": data.draw(st.sampled_from([1, 128]))}
    assert torch.equal(select(values[picked], **asked, tuning={"topn": sizes}), exact)


@needs_interpreter
@pytest.mark.parametrize("spread", [0.1, 10.0])
def test_top_n_of_long_rows(spread):
    """Rows of several parts each: all different, then with ties among the best, then mostly ties."""
    from anchors.nsa.kernels.selection import select

    geometry, blocks, queries = Geometry(), 700, 4
    drawn = torch.randn(1, queries, 2, blocks, generator=torch.Generator().manual_seed(0))
    for scores in ((spread * drawn).exp(), (spread * drawn).round(), (drawn > 2.5).float()):
        asked = {"geometry": geometry, "tokens": 64 * blocks, "past": 64 * (blocks - 40)}
        assert torch.equal(select(scores, **asked), reference.select(scores, **asked))


@needs_interpreter
def test_not_a_number_comes_last():
    from anchors.nsa.kernels.selection import select

    scores = torch.tensor([float("nan"), 1.0, float("-inf"), float("nan"), 2.0, float("nan")]).expand(
        1, 1, 1, 6
    )
    asked = {"tokens": 24, "past": 23}
    for n, best in [(2, [1, 4]), (3, [1, 2, 4]), (4, [0, 1, 2, 4]), (5, [0, 1, 2, 3, 4])]:
        geometry = Geometry(4, 4, 4, n=n, w=4, n_init=0, n_local=0)
        assert select(scores, geometry=geometry, **asked).tolist() == [[[best]]]


def chosen(seed: int = 0) -> torch.Tensor:
    """Ragged choices of three out of seven blocks, block 0 in most of them."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.full((2, 13, 2, 3), -1, dtype=torch.int32)
    for row in idx.view(-1, 3):
        blocks = torch.randperm(7, generator=generator)[: int(torch.randint(4, (), generator=generator))]
        blocks = blocks[:2].unique() if len(blocks) > 2 else blocks
        blocks = torch.cat([torch.zeros(1, dtype=torch.long), blocks[blocks > 0]]).sort().values
        row[: len(blocks)] = blocks
    idx[0, 3] = -1
    return idx


@needs_interpreter
@pytest.mark.parametrize("tile", [1, 5, 32, 64])
def test_union(tile):
    from anchors.nsa.kernels.selection import rho, union

    idx = chosen()
    if tile == 64:  # all bits of a 64-bit mask, the sign among them
        idx = idx.repeat(1, 6, 1, 1)
    rows_there = idx.shape[1]
    found = union(idx, tile)
    sizes = []
    for example, group, start in [
        (b, h, t) for b in range(2) for h in range(2) for t in range(0, rows_there, tile)
    ]:
        rows = idx[example, start : start + tile, group].tolist()
        blocks = sorted({block for row in rows for block in row} - {-1})
        bits = [sum(1 << i for i, row in enumerate(rows) if block in row) for block in blocks]
        empty = tile * 3 - len(blocks)
        place = example, group, start // tile
        assert found.blocks[place].tolist() == blocks + [-1] * empty
        assert [
            bit & (2 ** (64 if tile > 32 else 32) - 1) for bit in found.members[place].tolist()
        ] == bits + [0] * empty
        sizes.append(len(blocks))
    assert found.counts.flatten().tolist() == sizes
    assert rho(found) == pytest.approx(sum(sizes) / len(sizes) / (3 * tile))
    again = union(idx.transpose(1, 2).contiguous().transpose(1, 2), tile)
    assert all(map(torch.equal, vars(found).values(), vars(again).values()))


@pytest.mark.parametrize("split", [1, 4, 1024])
def test_inverse(split):
    from anchors.nsa.kernels.selection import inverse

    idx = chosen()
    found = inverse(idx, 7, split)
    assert len(found.items) == 2 * 2 * 7 + idx.numel() // split
    used = found.items[found.items[:, 0] >= 0].tolist()
    assert (found.items[len(used) :] == -1).all()
    for line, block in [(line, block) for line in range(4) for block in range(7)]:
        readers = [t for t in range(13) if block in idx[line // 2, t, line % 2].tolist()]
        first, number = int(found.first[line, block]), int(found.number[line, block])
        pieces = used[first : first + number]
        assert all(piece[:2] == [line, block] and 0 < piece[3] - piece[2] <= split for piece in pieces)
        gathered = [t for piece in pieces for t in found.queries[piece[2] : piece[3]].tolist()]
        assert gathered == readers
    assert len(used) == found.number.sum()
    assert all(map(torch.equal, vars(found).values(), vars(inverse(idx, 7, split)).values()))


def test_refused():
    from anchors.nsa.kernels.selection import select, union

    with pytest.raises(AnchorsError, match="tile of 65"):
        union(chosen(), 65)
    with pytest.raises(AnchorsError, match="begin 4"):
        select(torch.zeros(1, 4, 1, 3), geometry=Geometry(4, 4, 4, n=3, w=4), tokens=16)


LARGE = [
    # l, d, l', groups, heads per group, tokens, dim
    (32, 16, 64, 4, 16, 2500, 128),
    (32, 16, 64, 2, 3, 2049, 192),
    (16, 16, 16, 3, 1, 700, 64),
    (8, 4, 24, 2, 4, 1000, 60),
]


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("l", "d", "lp", "groups", "heads", "tokens", "dim"), LARGE)
def test_on_cuda(l, d, lp, groups, heads, tokens, dim, dtype):
    from anchors.nsa.kernels.selection import block_importance, select, select_blocks

    q, kc, lse = case(l, d, groups, heads, tokens, dim, dtype, "cuda")
    asked = {"tokens": tokens, "scale": dim**-0.5}
    found = block_importance(q, kc, lse, l=l, d=d, lp=lp, **asked)
    exact = reference.block_importance(q.double(), kc.double(), lse.double(), l=l, d=d, lp=lp, **asked)
    assert off(found, exact) < 1e-5
    geometry = Geometry(l, d, lp)
    idx = select_blocks(q, kc, lse, geometry=geometry, **asked)
    assert torch.equal(idx, select(found, geometry=geometry, tokens=tokens))
    assert torch.equal(idx, reference.select(found, geometry=geometry, tokens=tokens))
    small = select_blocks(q, kc, lse, geometry=geometry, **asked, chunk_bytes=1 << 20)
    assert torch.equal(idx, small)


@needs_cuda
def test_lists_on_cuda():
    """The lists of a device are those of the processor, where the interpreter has checked them."""
    from anchors.nsa.kernels.selection import inverse, select, union

    scores = torch.rand(2, 3000, 3, 47, device="cuda").mul(20).round()
    idx = select(scores, geometry=Geometry(), tokens=3000)
    assert torch.equal(idx, reference.select(scores, geometry=Geometry(), tokens=3000))
    found, same = inverse(idx, 47), inverse(idx.cpu(), 47)
    used = int(same.items[:, 3].max())
    assert torch.equal(found.queries[:used].cpu(), same.queries[:used])
    assert all(
        torch.equal(vars(found)[name].cpu(), vars(same)[name]) for name in ("items", "first", "number")
    )
    for tile in (1, 4, 8, 32, 64):
        made = union(idx, tile)
        blocks, counts = made.blocks.cpu(), made.counts.cpu()
        for example, group, place in [(0, 0, 0), (1, 2, 40), (1, 1, blocks.shape[2] - 1)]:
            rows = idx[example, place * tile : place * tile + tile, group].cpu()
            distinct = rows[rows >= 0].unique()
            assert blocks[example, group, place, : len(distinct)].tolist() == distinct.tolist()
            assert counts[example, group, place] == len(distinct)
            for slot, block in enumerate(distinct.tolist()):
                bits = int(made.members[example, group, place, slot]) & (2 ** (64 if tile > 32 else 32) - 1)
                assert bits == sum(1 << i for i, row in enumerate(rows.tolist()) if block in row)
