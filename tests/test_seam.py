"""The seam: what is edited is edited, nothing else is, and what cannot be edited is refused."""

import itertools
from dataclasses import replace

import pytest
import torch
from families import make
from gpu import needs_cuda
from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

from anchors.attention.call import AttentionCall
from anchors.attention.edits import Edit, ban, isolate, scale
from anchors.attention.seam import own_attention, route, seam
from anchors.attention.streaming import streaming
from anchors.errors import AnchorsError, RoutingError
from anchors.flow.saliency import collate
from anchors.model.language import load


def run(lm, batch):
    with torch.no_grad():
        return lm.logits_at(batch.ids, batch.target)


def every_layer(lm):
    return frozenset(range(lm.n_layers))


def random_call(**changes):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 8, generator=generator) for h in (4, 2, 2))
    return AttentionCall(**({"layer": 0, "q": q, "k": k, "v": v, "scale": 0.35} | changes))


CALLS = {
    "causal": {},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "key bias": {"key_bias": torch.tensor([1.0, 0.5, 0.25, 0.125])[None, :, None] * torch.arange(9.0)},
    "window": {"mask": (torch.ones(9, 9).tril() * torch.ones(9, 9).triu(-3)).bool()[None, None]},
    "additive mask": {"mask": torch.full((9, 9), -torch.inf).triu(1)[None, None]},
}


def test_logits_through_the_seam_are_the_models_own(lm, prompts):
    batch = collate(prompts)
    through = run(lm, batch)
    with own_attention(lm.model):
        own = run(lm, batch)
    again = run(lm, batch)
    torch.testing.assert_close(through, own, rtol=1e-4, atol=1e-5)
    assert torch.equal(through, again)


def test_weights_of_one_change_nothing(lm, prompts):
    batch = collate(prompts)
    identity = Edit(every_layer(lm), weight=lambda call: torch.ones(1, 1, 1, 1), neutral=True)
    with seam(lm.modules, edits=[identity]):
        edited = run(lm, batch)
    torch.testing.assert_close(edited, run(lm, batch), rtol=1e-4, atol=5e-5)


def test_a_ban_in_any_single_layer_changes_the_logits(lm, prompts):
    batch = collate(prompts[:1])
    before = run(lm, batch)
    for layer in range(lm.n_layers):
        key = batch.target[:, None] - 1
        with seam(lm.modules, edits=[ban([layer], batch.target[:, None], key)]):
            assert not torch.equal(run(lm, batch), before)
    assert torch.equal(run(lm, batch), before)


@pytest.mark.parametrize("kind", sorted(CALLS))
def test_a_ban_zeroes_exactly_the_named_entries_and_renormalises(kind):
    call = random_call(**CALLS[kind])
    query, key = torch.tensor([[8, 7], [5, -1]]), torch.tensor([[7, 5], [4, -1]])
    bias = ban([0], query, key).bias(call)
    rows = torch.arange(9)
    visible = call.visible(rows, slice(0, 9))
    before = call.pattern()
    after = call.softmax(call.scores(call.q, call.k) + bias, visible)
    named = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    named[0, 0, 8, 7] = named[0, 0, 7, 5] = named[1, 0, 5, 4] = True
    assert (after[named.expand_as(after)] == 0).all()
    assert (before[named.expand_as(before)] > 0).all()
    touched = named.any(-1, keepdim=True).expand_as(after)
    assert torch.equal(after[~touched], before[~touched])
    if kind != "sinks":
        torch.testing.assert_close(after.sum(-1), torch.ones_like(after.sum(-1)))


@pytest.mark.parametrize("kind", sorted(CALLS))
def test_an_isolated_position_sees_itself_only(kind):
    call = random_call(**CALLS[kind])
    bias = isolate([0], torch.tensor([[3, 7], [5, -1]])).bias(call)
    before = call.pattern()
    after = call.softmax(call.scores(call.q, call.k) + bias, call.visible(torch.arange(9), slice(0, 9)))
    for example, row in itertools.product(range(2), range(9)):
        if row in ((3, 7), (5,))[example]:
            assert (after[example, :, row, :row] == 0).all()
            assert (after[example, :, row, row] > before[example, :, row, row]).all()
            if kind != "sinks":
                torch.testing.assert_close(after[example, :, row, row], torch.ones(4))
        else:
            assert torch.equal(after[example, :, row], before[example, :, row])


@pytest.mark.parametrize("past", [0, 4])
def test_a_scale_multiplies_exactly_the_named_entries(past):
    """exp(β) at A(q, p_i) of each head, 1 elsewhere; positions count from the start of the cache."""
    generator = torch.Generator().manual_seed(1)
    beta = torch.randn(3, 4, 2, generator=generator)
    call = random_call(layer=2, q=random_call().q[:, :, past:])
    query, key = torch.tensor([8, 6]), torch.tensor([[1, 5], [4, 0]])
    field = scale([2], query, key, beta.__getitem__).weight(call)
    expected = torch.ones(2, 4, 9 - past, 9)
    for example, head, i in itertools.product(range(2), range(4), range(2)):
        expected[example, head, query[example] - past, key[example, i]] = beta[2, head, i].exp()
    torch.testing.assert_close(field.expand_as(expected), expected)


def test_edits_of_positions_in_the_cache_are_an_error():
    call = random_call(q=random_call().q[:, :, 4:])
    low, key = torch.tensor([[3], [8]]), torch.tensor([[1], [1]])
    for field in (
        ban([0], low, key).bias,
        isolate([0], low).bias,
        scale([0], low[:, 0], key, lambda _: torch.zeros(4, 1)).weight,
    ):
        with pytest.raises(AnchorsError, match="below 4"):
            field(call)


@pytest.mark.parametrize("kind", sorted(CALLS))
@pytest.mark.parametrize("past", [0, 3])
def test_some_rows_of_the_pattern_are_those_of_the_whole(kind, past):
    changes = dict(CALLS[kind])
    if "mask" in changes:
        changes["mask"] = changes["mask"][..., past:, :]
    call = random_call(**changes, q=random_call().q[:, :, past:])
    whole = call.pattern()
    rows = torch.tensor([[5, 0, 2], [1, 5, 4]])
    found = call.pattern_at(rows)
    for example, i in itertools.product(range(2), range(3)):
        torch.testing.assert_close(found[example, :, i], whole[example, :, rows[example, i]])


@pytest.mark.parametrize("queries", [1, 2, 6, 9])
def test_queries_after_a_past_see_all_of_it_whoever_computes(queries):
    """Softmax by hand, row by row: row i of n queries sees the first 9 − n + i + 1 keys."""
    whole = random_call()
    call = random_call(q=whole.q[:, :, -queries:])
    right = torch.zeros(2, 4, queries, 8)
    for example, head, row in itertools.product(range(2), range(4), range(queries)):
        seen = 9 - queries + row + 1
        weights = (0.35 * call.k[example, head // 2, :seen] @ call.q[example, head, row]).softmax(0)
        right[example, head, row] = weights @ call.v[example, head // 2, :seen]
    rows = torch.arange(queries).expand(2, -1)
    nothing = Edit(frozenset([0]), weight=lambda _: torch.ones(1, 1, 1, 1), neutral=True)
    found = {
        "fused": call.fused(),
        "streamed": call.streamed(()),
        "edited": call.edited([nothing]),
        "pattern": call.apply(call.pattern()),
        "pattern_at": call.apply(call.pattern_at(rows)),
    }
    for name, z in found.items():
        torch.testing.assert_close(z, right, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_mask_that_needs_a_gradient_gets_it(heads, batch):
    """Against plain autograd, in float64; keys need none here, so that the mask's alone asks for the tiles."""
    base, sides = random_call(), []
    generator = torch.Generator().manual_seed(2)
    free = torch.randn(batch, heads, 9, 9, generator=generator).double()
    for function in (
        lambda call: streaming(call, ()),
        lambda call: call.apply(call.pattern()),
        lambda c: c.fused(),
    ):
        mask = free.masked_fill(torch.ones(9, 9).triu(1).bool(), -1e30).requires_grad_()
        q, k, v = (x.double() for x in (base.q, base.k, base.v))
        z = function(AttentionCall(0, q, k, v, base.scale, mask=mask))
        sides.append(torch.autograd.grad((z * torch.arange(z.numel()).view(z.shape).cos()).sum(), mask)[0])
    for ours in (sides[0], sides[2]):
        torch.testing.assert_close(ours, sides[1], rtol=1e-9, atol=1e-11)
    assert sides[1].abs().amax() > 1e-2


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_an_edit_that_leaves_a_query_nothing_is_an_error_and_isolation_never_does(kind):
    """A sparse index may hide a query from itself: banning all before it would make the softmax read masked keys."""
    seen = torch.ones(9, 9).tril().bool()
    seen[5, 5] = False
    mask = (seen if kind == "boolean" else torch.zeros(9, 9).masked_fill(~seen, torch.finfo().min))[
        None, None
    ]
    call, row = random_call(mask=mask), torch.tensor([[5]] * 2)
    before = torch.arange(5).expand(2, -1)
    with pytest.raises(AnchorsError, match="hides from some queries of layer 0 all that they see"):
        call.edited([ban([0], row.expand(2, 5), before)])
    z = call.edited([isolate([0], row)])
    torch.testing.assert_close(z[:, :, 5], call.v[:, :, 5].repeat_interleave(2, dim=1))
    rest = [i for i in range(9) if i != 5]
    torch.testing.assert_close(z[:, :, rest], call.streamed(())[:, :, rest])
    sunk = random_call(mask=mask, sinks=torch.zeros(4)).edited([ban([0], row.expand(2, 5), before)])
    assert not sunk[:, :, 5].any()


class Layers:
    """A probe that keeps the layers of the calls it sees."""

    def __init__(self, *layers):
        self.layers, self.seen = frozenset(layers), []

    def see(self, call):
        self.seen.append(call.layer)


def test_a_probe_sees_its_layers_and_changes_nothing(lm, prompts):
    batch, probe = collate(prompts), Layers(0, 2)
    before = run(lm, batch)
    with seam(lm.modules, probes=[probe]):
        assert torch.equal(run(lm, batch), before)
    assert probe.seen == [0, 2]


def test_a_probe_that_sees_nothing_is_an_error(gpt2, prompts):
    with (
        pytest.raises(RoutingError, match=r"'Layers' did not fire in layer \[3\]"),
        seam(gpt2.modules, probes=[Layers(1, 3)]),
    ):
        run(gpt2, collate(prompts))


@pytest.mark.parametrize("kind", sorted(CALLS))
def test_streamed_attention_and_its_gradients_equal_the_literal_ones(kind):
    """Output and gradients of q, k and v against plain autograd through the materialised pattern, in float64."""
    changes = {name: value.double() if name == "sinks" else value for name, value in CALLS[kind].items()}
    base = random_call(**changes)
    sides = []
    for function in (lambda call: streaming(call, ()), lambda call: call.apply(call.pattern())):
        q, k, v = (x.double().requires_grad_() for x in (base.q, base.k, base.v))
        z = function(AttentionCall(0, q, k, v, base.scale, **changes))
        gradients = torch.autograd.grad((z * torch.arange(z.numel()).view(z.shape).cos()).sum(), (q, k, v))
        sides.append((z.detach(), *gradients))
    for ours, literal in zip(*sides, strict=True):
        torch.testing.assert_close(ours, literal, rtol=1e-9, atol=1e-11)


def test_edit_of_a_layer_that_does_not_exist_is_an_error(gpt2, prompts):
    batch = collate(prompts)
    with (
        pytest.raises(RoutingError, match=r"did not fire in layer \[99\]"),
        seam(gpt2.modules, edits=[ban([0, 99], batch.target[:, None], batch.labels[:, :1])]),
    ):
        run(gpt2, batch)


def test_seam_around_nothing_is_an_error(gpt2, prompts):
    batch = collate(prompts)
    with (
        pytest.raises(RoutingError, match="did not fire"),
        seam(gpt2.modules, edits=[ban([0], batch.target[:, None], batch.labels[:, :1])]),
    ):
        pass


def test_edit_that_aims_at_masked_entries_is_an_error(gpt2, prompts):
    batch = collate(prompts)
    future = batch.target[:, None]
    with (
        pytest.raises(AnchorsError, match="changed nothing"),
        seam(gpt2.modules, edits=[ban([0], future - 1, future)]),
    ):
        run(gpt2, batch)


def test_edits_of_another_model_do_not_leak(gpt2, tokenizer, prompts):
    other = load(make("llama", len(tokenizer)), tokenizer=tokenizer, device="cpu")
    batch = collate(prompts)
    before = run(other, batch)
    with seam(gpt2.modules, edits=[ban([0], batch.target[:, None], batch.labels[:, :1])]):
        assert torch.equal(run(other, batch), before)
        run(gpt2, batch)


def test_nothing_is_left_behind_after_an_exception(lm, prompts):
    batch = collate(prompts)
    before = run(lm, batch)
    with (
        pytest.raises(KeyError),
        seam(lm.modules, edits=[ban([0], batch.target[:, None], batch.labels[:, :1])]),
    ):
        raise KeyError
    assert torch.equal(run(lm, batch), before)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: RwkvForCausalLM(RwkvConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2)), "own code"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2)), "0 attention calls|own code"),
    ],
)  # fmt: skip
def test_families_that_do_not_route_attention_here_are_refused(model, said):
    with pytest.raises(RoutingError, match=said):
        route(model().eval())


def test_a_model_in_training_mode_is_refused(tokenizer):
    model = make("gpt2", len(tokenizer)).train()
    with pytest.raises(RoutingError, match="dropout"):
        route(model)


@needs_cuda
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("past", [0, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim_v", [64, 40])
def test_no_pattern_and_no_plan_is_made_on_cuda(kv_heads, past, dtype, dim_v):
    """Of a short call: torch's own choice would plan for each new length, and form patterns where heads share keys."""
    tokens = 61 + past
    q, k, v = (
        torch.randn(2, heads, length, dim, device="cuda")
        for heads, length, dim in ((4, 61, 64), (kv_heads, tokens, 64), (kv_heads, tokens, dim_v))
    )
    exact = AttentionCall(0, q, k, v, 0.125)
    call = replace(exact, q=q.to(dtype), k=k.to(dtype), v=v.to(dtype))
    with torch.profiler.profile() as seen:
        z = call.fused()
    names = {event.name for event in seen.events()}
    assert any("scaled_dot_product" in name for name in names)
    assert not any("cudnn" in name or "attention_math" in name for name in names)
    atol = 2e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(z.float(), exact.apply(exact.pattern()), atol=atol, rtol=0)
