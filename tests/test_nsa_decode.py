"""One-token decoding against the rows of the parallel reference.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported: in a process
of its own. It multiplies bfloat16 as 16-bit integers, so bfloat16 is tested on CUDA only.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from gpu import needs_cuda, needs_interpreter, needs_triton
from torch import Tensor

from anchors.errors import AnchorsError
from anchors.nsa import reference
from anchors.nsa.geometry import Geometry
from anchors.nsa.kernels.cache import NSACache, Tuning, captured
from anchors.nsa.texts import Texts

TINY = Geometry(l=8, d=4, lp=16, n=3, w=12, n_local=1)
"""One block of three is free to be chosen."""
PLAIN = Geometry(l=16, d=16, lp=16, n=4, w=20)
WHOLE = Tuning(chunk_cmp=64, chunk=64, tile_cmp=64, tile=64, tile_sum=64, tile_merge=4, bits=8)
"""A branch is one piece of one tile: few operations, which is what the interpreter's time goes by."""
TILES = Tuning(chunk_cmp=64, chunk=64, tile_cmp=16, tile=16, tile_sum=16, tile_merge=4)
"""A branch is one piece of several tiles."""
PIECES = Tuning(chunk_cmp=16, chunk=16, tile_cmp=16, tile=16, tile_sum=16, tile_merge=2, bits=2)
"""Branches, and the sums of a row, are cut into many pieces."""
ODD = Tuning(chunk_cmp=23, chunk=24, tile_cmp=16, tile=16, tile_sum=4, tile_merge=1, bits=1)
"""Pieces end within tiles, and tiles of blocks within blocks."""


def mean(block: Tensor) -> Tensor:
    return block.mean(-2)


@dataclass(frozen=True)
class Case:
    """Inputs of `tokens` steps, and everything that the parallel form makes of them."""

    geometry: Geometry
    q: Tensor
    q_cmp: Tensor
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    gates: Tensor
    kc: Tensor
    vc: Tensor
    scale: float
    o: Tensor
    idx: Tensor
    phi: tuple | None = None

    @property
    def tokens(self) -> int:
        return self.q.shape[1]

    def cache(self, tuning: Tuning | None = None, tokens: int | None = None) -> NSACache:
        batch, _, heads, dim = self.q.shape
        groups, dim_v, tokens = self.k[0].shape[2], self.v[0].shape[-1], tokens or self.tokens
        dtype, device = self.q.dtype, self.q.device
        return NSACache.empty(batch, tokens, groups, heads, dim, dim_v, self.geometry, dtype, device, tuning)

    def filled(self, start: int, tuning: Tuning | None = None, tokens: int | None = None) -> NSACache:
        """A cache that took in the first tokens as a prompt."""
        cache, complete = self.cache(tuning, tokens), self.geometry.compressed(start)
        if start:
            keys, values = ([x[:, :start] for x in xs] for xs in (self.k, self.v))
            cache.prefill(keys, values, self.kc[:, :complete], self.vc[:, :complete])
        return cache

    def row(self, t: int) -> tuple[Tensor, ...]:
        return tuple(x[:, t : t + 1] for x in (self.q, *self.k, *self.v, self.gates, self.q_cmp))

    def step(self, cache: NSACache, row: tuple[Tensor, ...]) -> Tensor:
        from anchors.nsa.kernels.decode import nsa_decode

        q, *keys_values, gates, q_cmp = row
        return nsa_decode(
            q, keys_values[:3], keys_values[3:], gates, cache,
            phi=self.phi, geometry=self.geometry, scale=self.scale, q_cmp=None if q_cmp is q else q_cmp,
        )  # fmt: skip


def case(
    geometry: Geometry,
    shape: tuple[int, ...],
    dtype=torch.float32,
    device="cpu",
    *,
    phi=None,
    keys: str = "random",
) -> Case:
    batch, tokens, groups, g, dim, dim_v = shape
    generator = torch.Generator().manual_seed(tokens + g)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    q = draw(batch, tokens, groups * g * 2, dim)[:, :, : groups * g]
    k = tuple(draw(batch, tokens, groups, dim) for _ in range(3))
    v = tuple(draw(batch, tokens, groups, dim_v) for _ in range(3))
    if keys == "equal":
        k[0].zero_()
    gates = draw(batch, tokens, 3, groups * g).sigmoid().transpose(2, 3)
    q_cmp = q if phi is None else draw(batch, tokens, groups * g, dim)
    phi_k, phi_v = phi or (mean, mean)
    l, d, lp, scale = geometry.l, geometry.d, geometry.lp, dim**-0.5
    kc, vc = reference.compress(k[0], phi_k, l=l, d=d), reference.compress(v[0], phi_v, l=l, d=d)
    # The parallel form in float64: it and the kernels round differently, and only the latter are on trial.
    wide, wide_cmp, kc64, vc64 = (x.double() for x in (q, q_cmp, kc, vc))
    o_cmp, lse = reference.compressed_attention(wide_cmp, kc64, vc64, l=l, d=d, scale=scale)
    idx = reference.select_blocks(wide_cmp, kc64, lse, geometry=geometry, tokens=tokens, scale=scale)
    o_slc = reference.selected_attention(wide, k[1].double(), v[1].double(), idx, lp=lp, scale=scale)[0]
    o_win = reference.window_attention(wide, k[2].double(), v[2].double(), w=geometry.w, scale=scale)[0]
    o = reference.combine(o_cmp, o_slc, o_win, gates.double())
    return Case(geometry, q, q_cmp, k, v, gates, kc, vc, scale, o, idx, phi)


def follow(case: Case, cache: NSACache, steps: range, allowed: float) -> None:
    """Decodes the steps one by one, each against its row of the parallel form."""
    for t in steps:
        found = case.step(cache, case.row(t))
        assert torch.equal(cache.idx, case.idx[:, t]), f"other blocks at step {t}"
        error = (found - case.o[:, t : t + 1]).abs().max()
        assert error <= allowed, f"step {t} is off by {error:.1e}"
    assert cache.length.tolist() == [steps.stop] * len(cache.length)


@needs_triton
@needs_interpreter
def test_steps_from_an_empty_cache():
    """Across every boundary of strides, blocks and the window, several times."""
    follow(one := case(TINY, (1, 72, 1, 1, 16, 24)), one.cache(WHOLE), range(72), 1e-5)


@needs_triton
@needs_interpreter
@pytest.mark.parametrize(
    ("geometry", "shape", "start", "tuning"),
    [
        pytest.param(TINY, (1, 66, 2, 1, 16, 16), 62, PIECES, id="single-heads"),
        pytest.param(TINY, (2, 50, 1, 4, 24, 16), 46, PIECES, id="four-heads"),
        pytest.param(PLAIN, (1, 83, 1, 3, 16, 16), 77, TILES, id="one-size"),
        pytest.param(PLAIN, (1, 18, 1, 1, 16, 16), 13, PIECES, id="first-block"),
        pytest.param(replace(TINY, n=5, n_init=2, n_local=1), (1, 98, 1, 2, 16, 16), 94, WHOLE, id="forced"),
        pytest.param(TINY, (1, 98, 2, 3, 16, 24), 96, PIECES, id="two-groups"),
        pytest.param(Geometry(4, 4, 8, 4, 40, 0, 0), (1, 58, 1, 2, 16, 16), 54, WHOLE, id="unforced"),
        pytest.param(Geometry(6, 3, 18, 3, 17, 0, 1), (1, 110, 1, 17, 17, 33), 108, ODD, id="odd"),
    ],
)
def test_steps_after_a_prompt(geometry, shape, start, tuning):
    follow(one := case(geometry, shape), one.filled(start, tuning), range(start, shape[1]), 1e-5)


@needs_triton
@needs_interpreter
def test_steps_by_programs_in_another_order(monkeypatch):
    """Bit for bit the same, whichever program of a row sums last and chooses."""
    from triton.runtime.interpreter import interpreter_builder as builder

    one, place = case(TINY, (2, 98, 1, 2, 16, 16)), builder.set_grid_idx
    forth, back = one.filled(96, PIECES), one.filled(96, PIECES)
    found = [one.step(forth, one.row(t)) for t in (96, 97)]

    def reversed_place(*at: int) -> None:
        place(*(count - 1 - i for count, i in zip(builder.grid_dim, at, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", reversed_place)
    assert all(torch.equal(one.step(back, one.row(t)), o) for t, o in zip((96, 97), found, strict=True))
    assert all(
        map(torch.equal, (*back.kept, back.idx, back.arrived), (*forth.kept, forth.idx, forth.arrived))
    )


@needs_triton
@needs_interpreter
def test_steps_of_ties():
    """Keys that are all equal: full blocks tie, and the lower ones are chosen."""
    one = case(replace(PLAIN, n_init=0, n_local=1), (1, 150, 1, 2, 16, 16), keys="equal")
    follow(one, one.filled(148, WHOLE), range(148, 150), 1e-5)
    assert one.idx[0, 149, 0].tolist() == [0, 1, 2, 9]


@needs_triton
@needs_interpreter
def test_steps_of_a_learned_phi():
    """Any φ, and queries of its own for the compressed branch."""
    torch.manual_seed(0)
    weights = torch.randn(2, 8, 16, 16) / 11
    phi = tuple(
        lambda block, w=w: torch.tanh(torch.einsum("...lc,lce->...e", block, w.to(block))) for w in weights
    )
    one = case(TINY, (1, 44, 2, 2, 16, 16), phi=phi)
    follow(one, one.filled(38, TILES), range(38, 44), 1e-5)


@needs_triton
@needs_interpreter
def test_steps_of_a_ragged_batch():
    """Prompts of two lengths, padded on the right, then two steps of each."""
    one, starts = case(TINY, (2, 44, 1, 2, 16, 16)), torch.tensor([41, 6])
    cache = one.filled(0, WHOLE)
    keys, values = ([x[:, :41] for x in xs] for xs in (one.k, one.v))
    cache.prefill(keys, values, one.kc[:, :9], one.vc[:, :9], starts)
    for step in range(2):
        rows = [one.row(int(t) + step) for t in starts]
        mixed = tuple(torch.cat([x[i : i + 1] for i, x in enumerate(xs)]) for xs in zip(*rows, strict=True))
        found = one.step(cache, (*mixed[:-1], mixed[0]))
        for i, t in enumerate((starts + step).tolist()):
            torch.testing.assert_close(found[i, 0].double(), one.o[i, t], rtol=0, atol=1e-5)
            assert torch.equal(cache.idx[i], one.idx[i, t])
    assert cache.length.tolist() == [43, 8]


@needs_triton
@needs_interpreter
def test_steps_of_a_padded_batch():
    """Prompts of three lengths, padded on the left, on both sides and on the right with other tokens, then two steps."""
    one, lengths, starts = case(TINY, (3, 44, 1, 2, 16, 16)), [41, 6, 22], torch.tensor([0, 33, 13])
    texts = Texts.of_mask(torch.stack([mask_of(s, n) for s, n in zip(starts.tolist(), lengths, strict=True)]))
    layout = texts.laid(TINY)

    def shifted(x: Tensor) -> Tensor:
        made = torch.randn(3, 41, *x.shape[2:], generator=torch.Generator().manual_seed(0))
        for i, (start, n) in enumerate(zip(starts.tolist(), lengths, strict=True)):
            made[i, start : start + n] = x[i, :n]
        return made

    keys, values = ([shifted(x) for x in xs] for xs in (one.k, one.v))
    cache = one.cache(WHOLE)
    kc, vc = layout.compress(keys[0], mean), layout.compress(values[0], mean)
    cache.prefill(keys, values, kc, vc, texts=texts, starts=starts)
    for step in range(2):
        rows = [one.row(n + step) for n in lengths]
        mixed = tuple(torch.cat([x[i : i + 1] for i, x in enumerate(xs)]) for xs in zip(*rows, strict=True))
        found = one.step(cache, (*mixed[:-1], mixed[0]))
        for i, n in enumerate(lengths):
            torch.testing.assert_close(found[i, 0].double(), one.o[i, n + step], rtol=0, atol=1e-5)
            assert torch.equal(cache.idx[i], one.idx[i, n + step])
    assert cache.length.tolist() == [43, 8, 24]


def mask_of(start: int, length: int) -> Tensor:
    t = torch.arange(41)
    return (t >= start) & (t < start + length)


@needs_triton
@needs_interpreter
def test_steps_beyond_the_room():
    """The last token that fits, and one that does not: no memory is touched, and the output says so."""
    one = case(TINY, (1, 34, 1, 1, 16, 16))
    cache = one.filled(32, WHOLE, tokens=33)
    follow(one, cache, range(32, 33), 1e-5)
    kept = [x.clone() for x in cache.kept]
    assert one.step(cache, one.row(33)).isnan().all()
    assert all(map(torch.equal, cache.kept, kept))
    assert cache.length.tolist() == [34]


@needs_triton
@needs_interpreter
def test_steps_of_what_is_no_number():
    """Of whichever input, and of the compressed key that it ends in: its head has no output, the other its own."""
    one = case(TINY, (1, 48, 2, 1, 16, 16))
    for which in range(9):
        row = [x.clone() for x in one.row(47)]
        row[which][:, :, 1] = torch.nan
        found = one.step(one.filled(47, PIECES), tuple(row))
        assert found[:, :, 1].isnan().all()
        assert (found[:, :, 0] - one.o[:, 47:, 0]).abs().max() <= 1e-5


def test_prefill_keeps_the_last_tokens():
    """Position p lies in row p mod w of the window's ring, and p mod l of the raw one."""
    one = case(TINY, (1, 30, 1, 1, 16, 16))
    cache = one.filled(30)
    for ring, x in ((cache.k_win, one.k[2]), (cache.v_win, one.v[2]), (cache.k_cmp, one.k[0])):
        rows = ring.shape[2]
        for p in range(30 - rows, 30):
            assert torch.equal(ring[0, 0, p % rows], x[0, p, 0])
    assert torch.equal(cache.kc[0, 0, :6], one.kc[0, :, 0])
    # Every token once, the last 12 and the last 8, and 6 compressed ones; keys and values of 16 floats.
    assert cache.bytes == (30 + 12 + 8 + 6) * 2 * 16 * 4


def test_no_room():
    one = case(TINY, (1, 30, 1, 1, 16, 16))
    cache = one.cache(tokens=20)
    with pytest.raises(AnchorsError, match="does not fit"):
        cache.prefill(one.k, one.v, one.kc, one.vc)
    with pytest.raises(AnchorsError, match="needs the texts"):
        cache.prefill(
            *(([x[:, :20] for x in xs]) for xs in (one.k, one.v)),
            one.kc[:, :4],
            one.vc[:, :4],
            texts=None,
            starts=torch.zeros(1, dtype=torch.long),
        )
    with pytest.raises(AnchorsError, match="compressed keys"):
        cache.prefill([x[:, :20] for x in one.k], [x[:, :20] for x in one.v], one.kc, one.vc)
    coarse = Geometry(l=1024, d=1024, lp=1024)
    with pytest.raises(AnchorsError, match="32 bits"):
        NSACache.empty(1, 1 << 24, 1, 1, 64, 128, coarse, torch.bfloat16, "meta")
    assert NSACache.empty(1, (1 << 24) - 1, 1, 1, 64, 128, coarse, torch.bfloat16, "meta").length.is_meta


@needs_triton
def test_tensors_of_another_cache():
    one = case(TINY, (1, 30, 1, 2, 16, 16))
    with pytest.raises(AnchorsError, match="The cache was made for"):
        replace(one, geometry=PLAIN).step(one.cache(), one.row(0))
    q, *keys_values, gates, q_cmp = one.row(0)
    fewer = (q[:, :, :1], *keys_values, gates[:, :, :1], q_cmp[:, :, :1])
    with pytest.raises(AnchorsError, match=r"q is \[1, 1, 1, 16\]"):
        one.step(one.cache(), fewer)
    with pytest.raises(AnchorsError, match="The cache holds"):
        one.step(one.cache(), tuple(x.half() for x in one.row(0)))
    for groups, heads in ((2, 3), (0, 3)):
        with pytest.raises(AnchorsError, match="cannot be divided"):
            NSACache.empty(1, 8, groups, heads, 16, 16, TINY, torch.float32, "cpu")


SMALL = Geometry(l=32, d=16, lp=64, n=5, w=100)
ON_CUDA = [
    pytest.param(shape, dtype, tuning, id="-".join(map(str, (*shape, str(dtype).removeprefix("torch."), name))))
    for shape in [(2, 1500, 2, 16, 128, 128), (3, 700, 4, 1, 64, 64), (1, 700, 2, 3, 96, 64), (1, 700, 1, 20, 192, 128)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for name, tuning in [
        ("table", None),
        ("pieces", Tuning(32, 32, 16, 16, 32, 2, bits=1)),
    ]
]  # fmt: skip
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@needs_triton
@needs_cuda
@pytest.mark.parametrize(("shape", "dtype", "tuning"), ON_CUDA)
def test_on_cuda(shape, dtype, tuning):
    """Output of the blocks that were chosen; rounding may choose others than float64 does, by a hair."""
    one = case(SMALL, shape, dtype, "cuda")
    start, tokens = shape[1] - 40, shape[1]
    cache, again = one.filled(start, tuning), one.filled(start, tuning)
    same = 0
    for t in range(start, tokens):
        found = one.step(cache, one.row(t))
        assert torch.equal(found, one.step(again, one.row(t))), "two runs differ"
        alike = (cache.idx == one.idx[:, t]).all(-1).repeat_interleave(shape[3], 1)
        error = (found[:, 0].double() - one.o[:, t]).abs().amax(-1)
        assert error[alike].max() <= ALLOWED[dtype]
        same += alike.double().mean().item()
    assert same >= 0.9 * (tokens - start)


@needs_triton
@needs_cuda
@pytest.mark.parametrize("phi", [None, (mean, mean)], ids=["mean", "callable"])
def test_replayed(phi):
    """A graph that was captured once serves every later step, as the launches do one by one."""
    one = replace(case(SMALL, (2, 600, 2, 16, 128, 128), torch.bfloat16, "cuda"), phi=phi)
    cache, plain = one.filled(540), one.filled(540)
    replay = captured(lambda *row: one.step(cache, (*row, row[0])), cache, *one.row(540)[:-1])
    assert cache.length.tolist() == [540, 540]
    for t in range(540, 600):
        assert torch.equal(replay(*one.row(t)[:-1]), one.step(plain, one.row(t)))
    assert all(map(torch.equal, cache.kept, plain.kept))
    assert cache.length.tolist() == [600, 600]


@needs_triton
@needs_cuda
def test_long_on_cuda():
    """As many blocks as there is room for."""
    geometry, tokens = Geometry(w=64, n=16), 1_000_000
    cache = NSACache.empty(1, tokens + 1, 1, 4, 64, 64, geometry, torch.bfloat16, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    k, v = (
        torch.randn(1, tokens + 1, 1, 64, device="cuda", generator=generator).bfloat16() for _ in range(2)
    )
    q = torch.randn(1, 1, 4, 64, device="cuda", generator=generator).bfloat16()
    gates = torch.ones(1, 1, 4, 3, device="cuda")
    kc, vc = (reference.compress(x, mean, l=geometry.l, d=geometry.d) for x in (k, v))
    head, complete = slice(None, tokens), geometry.compressed(tokens)
    cache.prefill([k[:, head]] * 3, [v[:, head]] * 3, kc[:, :complete], vc[:, :complete])
    one = Case(geometry, q, q, (), (), gates, kc, vc, 0.125, q, q)
    found = one.step(cache, (q, *[k[:, tokens:]] * 3, *[v[:, tokens:]] * 3, gates, q))
    past = {"scale": 0.125, "past": tokens}
    wide, kc, vc, k, v = (x.float() for x in (q, kc, vc, k, v))
    o_cmp, lse = reference.compressed_attention(wide, kc, vc, l=geometry.l, d=geometry.d, **past)
    wanted = reference.block_importance(
        wide, kc, lse, l=geometry.l, d=geometry.d, lp=geometry.lp, tokens=tokens + 1, **past
    )[0, 0, 0]
    chosen = cache.idx[0, 0].long()
    assert torch.equal(chosen, chosen.unique())
    free = torch.ones_like(wanted, dtype=torch.bool)
    free[[0, -1, -2]] = False
    least = wanted[chosen[free[chosen]]].min()
    free[chosen] = False
    assert least >= wanted[free].max() * (1 - 1e-4)
    o_slc = reference.selected_attention(wide, k, v, cache.idx[:, None], lp=geometry.lp, **past)[0]
    o_win = reference.window_attention(wide, k, v, w=geometry.w, **past)[0]
    torch.testing.assert_close(
        found.float(), reference.combine(o_cmp, o_slc, o_win, gates), rtol=0, atol=2e-2
    )
