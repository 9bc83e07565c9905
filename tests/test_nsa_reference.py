"""The equations of NSA: by hand, by slow loops, against SDPA, by perturbing the future, and in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from anchors.errors import AnchorsError
from anchors.nsa import attention, phi, reference
from anchors.nsa.attention import Branches, nsa_attention, trace
from anchors.nsa.geometry import Geometry

SMALL = Geometry(l=8, d=4, lp=16, n=4, w=12)


def drawn(tokens=70, heads=6, groups=2, dim=4, dim_v=5, batch=2, geometry=SMALL, seed=0, dtype=torch.float64):
    """Queries, branches (compressed by their mean) and gates."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    k, v = draw(3, batch, tokens, groups, dim), draw(3, batch, tokens, groups, dim_v)
    pool = {"l": geometry.l, "d": geometry.d, "phi": lambda x: x.mean(-2)}
    kv = Branches(reference.compress(k[0], **pool), reference.compress(v[0], **pool), k[1], v[1], k[2], v[2])
    return draw(batch, tokens, heads, dim), kv, draw(batch, tokens, heads, 3).sigmoid()


def slow(q, kv, gates, g, scale):
    """Eqs. 5 to 12 of every query and head, one at a time, with Python's own numbers."""
    batch, tokens, heads, _ = q.shape
    groups = kv.k_slc.shape[2]
    out = torch.zeros(batch, tokens, heads, kv.v_slc.shape[-1], dtype=q.dtype)

    def softmax(scores):
        top = max(scores, default=0.0)
        mass = [math.exp(s - top) for s in scores]
        return [m / sum(mass) for m in mass]

    for b in range(batch):
        for t in range(tokens):
            for group in range(groups):
                own = [h for h in range(heads) if h // (heads // groups) == group]
                seen = [i for i in range(kv.kc.shape[1]) if i * g.d + g.l - 1 <= t]
                importance = [0.0] * (t // g.lp + 1)
                patterns = {}
                for h in own:
                    patterns[h] = softmax([float(q[b, t, h] @ kv.kc[b, i, group]) * scale for i in seen])
                    for i, p in zip(seen, patterns[h], strict=True):
                        for j in range(len(importance)):
                            shared = set(range(i * g.d, i * g.d + g.l)) & set(range(j * g.lp, (j + 1) * g.lp))
                            importance[j] += p * len(shared) / g.d
                last = len(importance) - 1
                first = {j for j in range(len(importance)) if j < g.n_init or j > last - g.n_local}
                order = sorted(range(len(importance)), key=lambda j: (j not in first, -importance[j], j))
                chosen = [s for j in order[: g.n] for s in range(j * g.lp, (j + 1) * g.lp) if s <= t]
                window = range(max(0, t - g.w + 1), t + 1)
                for h in own:
                    if seen:
                        o = sum(p * kv.vc[b, i, group] for i, p in zip(seen, patterns[h], strict=True))
                        out[b, t, h] += gates[b, t, h, 0] * o
                    for c, (keys, values, where) in enumerate(
                        [(kv.k_slc, kv.v_slc, chosen), (kv.k_win, kv.v_win, window)], start=1
                    ):
                        p = softmax([float(q[b, t, h] @ keys[b, s, group]) * scale for s in where])
                        o = sum(x * values[b, s, group] for x, s in zip(p, where, strict=True))
                        out[b, t, h] += gates[b, t, h, c] * o
    return out


@pytest.mark.parametrize("geometry", [SMALL, Geometry(8, 8, 8, 4, 5), Geometry(4, 2, 8, 2, 9, 1, 1)])
def test_every_row_is_what_the_equations_say(geometry):
    q, kv, gates = drawn(tokens=100, heads=4, batch=1, geometry=geometry)
    found = nsa_attention(q, kv, gates, geometry, scale=0.4, backend="reference")
    torch.testing.assert_close(found, slow(q, kv, gates, geometry, 0.4), rtol=1e-12, atol=1e-12)


def test_the_weights_of_eq_9_by_hand():
    """With l = 32, d = 16 and l' = 64 a block weighs the compressed tokens that reach into it 1, 2, 2, 2, 1."""
    weights = reference.overlap(12, 3, l=32, d=16, lp=64)
    assert weights[:, 1].tolist() == [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0, 0]
    assert weights[:, 0].tolist()[:5] == [2, 2, 2, 1, 0]  # nothing reaches in from before the text
    assert torch.equal(reference.overlap(5, 5, l=16, d=16, lp=16), torch.eye(5))


def test_importance_is_conserved_away_from_the_edges():
    pattern = torch.rand(1, 1, 2, 9)
    found = reference.importance_of(pattern, 1, 3, l=32, d=16, lp=64)
    torch.testing.assert_close(found.sum(), pattern.sum() * 32 / 16)


def test_everything_selected_is_dense_attention():
    q, kv, _ = drawn()
    dense = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, kv.k_slc, kv.v_slc)), is_causal=True, scale=0.5, enable_gqa=True
    ).transpose(1, 2)
    window, _ = reference.window_attention(q, kv.k_slc, kv.v_slc, w=70, scale=0.5)
    every = torch.arange(5).expand(2, 70, 2, 5).int()
    selected, _ = reference.selected_attention(q, kv.k_slc, kv.v_slc, every, lp=16, scale=0.5)
    torch.testing.assert_close(window, dense, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(selected, dense, rtol=1e-12, atol=1e-13)


def test_gradients_in_float64():
    tiny = Geometry(l=4, d=2, lp=4, n=3, w=3, n_local=1)
    q, kv, gates = drawn(tokens=14, heads=2, groups=1, dim=2, dim_v=1, batch=1, geometry=tiny)
    idx = trace(q, kv, gates, tiny).idx
    inputs = [x.requires_grad_() for x in (q, gates, *vars(kv).values())]

    def run(q, gates, *branches):
        return nsa_attention(q, Branches(*branches), gates, tiny, idx=idx, backend="reference")

    assert torch.autograd.gradcheck(run, inputs)


def test_rows_before_the_first_compressed_token_are_zero_with_finite_gradients():
    q, kv, _ = drawn()
    q.requires_grad_()
    o, lse = reference.compressed_attention(q, kv.kc, kv.vc, l=8, d=4, scale=0.5)
    assert not o[:, :7].any()
    assert (lse[:, :7] == -math.inf).all()
    assert torch.isfinite(lse[:, 7:]).all()
    o.square().sum().backward()
    assert torch.isfinite(q.grad).all()
    assert not q.grad[:, :7].any()


SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=12, max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    scores=SCORES,
    t=st.integers(0, 191),
    banned=st.sets(st.integers(0, 11), max_size=4),
    forced=st.integers(0, 11),
)
def test_selection_is_the_order_by_force_score_and_index(scores, t, banned, forced):
    geometry = Geometry(l=8, d=4, lp=16, n=5, w=12)
    ban, force = (torch.zeros(12, dtype=torch.bool) for _ in range(2))
    ban[list(banned)] = True
    force[forced] = True
    importance = torch.tensor(scores).expand(1, 1, 1, 12)
    found = reference.select(importance, geometry=geometry, tokens=192, past=t, force=force, ban=ban)[0, 0, 0]
    own = t // 16
    candidates = [j for j in range(own + 1) if j not in banned]
    first = {0, own, own - 1, forced}
    best = sorted(candidates, key=lambda j: (j not in first, -scores[j], j))[:5]
    assert found.tolist() == sorted(best) + [-1] * (5 - len(best))


def test_heads_of_a_group_choose_together():
    """Permuting the heads within a group permutes the outputs and leaves the choice as it was."""
    q, kv, gates = drawn(heads=6, groups=2)
    order = torch.tensor([2, 0, 1, 4, 5, 3])
    plain, permuted = trace(q, kv, gates, SMALL), trace(q[:, :, order], kv, gates[:, :, order], SMALL)
    assert torch.equal(plain.idx, permuted.idx)
    torch.testing.assert_close(permuted.o, plain.o[:, :, order])


def test_a_bias_on_blocks_and_on_tokens():
    q, kv, gates = drawn()
    plain = trace(q, kv, gates, SMALL)
    lift = torch.zeros(5)
    lift[1] = 100.0
    assert (trace(q, kv, gates, SMALL, bias=lift).idx[:, 60:] == 1).any(-1).all()
    hidden = torch.zeros(1, 1, 70, 70, dtype=q.dtype)
    hidden[..., 60:, 21] = -math.inf
    found = trace(q, kv, gates, SMALL, token_bias=hidden)
    for c in (1, 2):
        assert not found.patterns[c][:, 60:, :, 21].any()
    blocks = [i for i in range(kv.kc.shape[1]) if i * 4 <= 21 < i * 4 + 8]
    assert not found.patterns[0][:, 60:][..., blocks].any()
    assert plain.patterns[0][:, 60:][..., blocks].any()
    torch.testing.assert_close(found.o[:, :60], plain.o[:, :60])


@pytest.mark.parametrize("kind", phi.PHI)
def test_phi_comes_apart_exactly(kind):
    torch.manual_seed(0)
    pool = phi.make(kind, 8, 6).double()
    for weight in pool.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(3, 5, 8, 6, dtype=torch.float64, requires_grad=True)
    parts, rest = pool.split(x)
    torch.testing.assert_close(parts.sum(-2) + rest, pool(x))
    for o in range(6):
        (slope,) = torch.autograd.grad(pool(x)[..., o].sum(), x)
        torch.testing.assert_close(parts[..., o], (slope * x).sum(-1))


def test_a_prompt_continued_after_a_cache():
    q, kv, gates = drawn()
    whole = nsa_attention(q, kv, gates, SMALL, backend="reference")
    late = nsa_attention(q[:, 50:], kv, gates[:, 50:], SMALL, backend="reference")
    torch.testing.assert_close(late, whole[:, 50:])


def test_one_token_is_attended_to_by_itself():
    q, kv, gates = drawn(tokens=1)
    found = nsa_attention(q, kv, gates, SMALL)
    own = gates[..., 1:2] * kv.v_slc.repeat_interleave(3, 2) + gates[..., 2:] * kv.v_win.repeat_interleave(
        3, 2
    )
    torch.testing.assert_close(found, own)


def broken(name):
    q, kv, gates = drawn(tokens=20)
    if name == "groups":
        return q[:, :, :5], kv, gates[:, :, :5], SMALL, {}
    if name == "empty":
        return q[:0], Branches(**{k: v[:0] for k, v in vars(kv).items()}), gates[:0], SMALL, {}
    if name == "nan":
        q[0, 3] = math.nan
    if name == "compressed":
        kv = Branches(**{**vars(kv), "kc": kv.kc[:, :-1]})
    if name == "gates":
        gates = gates[..., :2]
    if name == "twice":
        return q, kv, gates, SMALL, {"idx": torch.zeros(2, 20, 2, 2, dtype=torch.int32)}
    if name == "rows":
        return q, kv, gates, SMALL, {"idx": torch.zeros(2, 5, 2, 1, dtype=torch.int32)}
    if name == "keys":
        return q, kv, gates, SMALL, {"past": 5}
    options = {"triton": {"backend": "triton"}, "backend": {"backend": "cuda"}}.get(name, {})
    return q, kv, gates, SMALL, options


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("groups", "cannot be divided"), ("empty", "batch is empty"), ("nan", "not numbers"),
        ("compressed", "kc has the shape"), ("gates", "gates have the shape"), ("keys", "need 25 keys"),
        ("twice", "twice in a row"), ("rows", "idx has the shape"), ("triton", "tensors on cpu"), ("backend", "no backend called"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("wrong_types")
def test_bad_input_is_refused(name, said):
    q, kv, gates, geometry, options = broken(name)
    with pytest.raises(AnchorsError, match=said):
        nsa_attention(q, kv, gates, geometry, **options)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"l": 24, "d": 16}, "not a multiple of d"), ({"l": 16, "d": 16, "lp": 24}, "l' = 24 is not a multiple"),
        ({"l": 128, "lp": 64}, "smaller than compression"), ({"n": 2}, "do not fit"), ({"w": 0}, "at least 1"),
    ],
)  # fmt: skip
def test_geometries_that_the_equations_do_not_allow(sizes, said):
    with pytest.raises(AnchorsError, match=said):
        Geometry(**sizes)


def test_auto_takes_the_kernels_only_where_they_can_compute(monkeypatch):
    monkeypatch.setattr(attention, "triton_runs", lambda device: True)
    q = torch.zeros(1, 2, 2, 4)
    assert attention.resolve("auto", q, SMALL) == "triton"
    assert attention.resolve("auto", q.double(), SMALL) == "reference"
    assert attention.resolve("auto", q, Geometry(4, 2, 8, 4, 4)) == "reference"
