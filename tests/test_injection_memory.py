"""Injection in memory: the right tensors change, and every bit comes back."""

import copy
from collections.abc import Iterator

import pytest
import torch
from gpu import needs_cuda
from injection_families import Models, models, tokenizer

from anchors.errors import AnchorsError
from anchors.injection.merging.memory import TaskVectors, inject
from anchors.injection.merging.methods import METHODS
from anchors.injection.merging.recipe import Recipe, merge_tensor


@pytest.fixture(scope="module", params=["smolvlm", "llava"])
def own(request: pytest.FixtureRequest) -> Models:
    """SmolVLM's head is its embedding, LLaVA has a head of its own."""
    return models(request.param)


@pytest.fixture(scope="module")
def vectors(own: Models) -> TaskVectors:
    tokenizers = tokenizer("<image>"), tokenizer(), tokenizer()
    return TaskVectors.of(own.vlm, own.base, own.expert, tokenizers=tokenizers)


@pytest.fixture(autouse=True)
def untouched(own: Models) -> Iterator[None]:
    """Whatever a test does, the weights are the same bits and the same memory afterwards."""
    named = dict(own.vlm.named_parameters(remove_duplicate=False))
    before = {name: (p, p.data_ptr(), p.detach().clone(), p.grad) for name, p in named.items()}
    yield
    after = dict(own.vlm.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    for name, (parameter, place, bits, grad) in before.items():
        assert after[name] is parameter, name
        assert parameter.data_ptr() == place, name
        assert torch.equal(parameter, bits), name
        assert parameter.grad is grad, name


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_the_tower_is_what_merge_tensor_makes_of_it_and_nothing_else_changes(own, vectors, method):
    recipe = Recipe(method, options={"iterations": 3, "lr": 1e-3} if method == "wudi" else ())
    before = state(own.vlm)
    with inject(own.vlm, vectors, recipe) as injected:
        after = state(own.vlm)
        again = own.vlm(input_ids=torch.arange(4, 12)[None]).logits
    merged = {pair.vlm: pair for pair in vectors.pairs if pair.kind in ("layer", "norm")}
    squares = 0.0
    for name, weight in after.items():
        if name not in merged:
            assert torch.equal(weight, before[name]), name
            continue
        pair = merged[name]
        wanted = merge_tensor(
            recipe, pair.canonical, vectors.base[name], before[name], vectors.expert[name], pair.layer
        )
        assert torch.equal(weight, wanted), name
        squares += float((weight - before[name]).double().square().sum())
    changed = sum(not torch.equal(after[name], before[name]) for name in after)
    assert (injected.changed, injected.kept) == (changed, len(vectors.pairs) - changed)
    assert injected.changed > 0.8 * len(merged)
    assert injected.norm == pytest.approx(squares**0.5, rel=1e-5)
    size = sum(float(before[pair.vlm].double().square().sum()) for pair in vectors.pairs) ** 0.5
    assert injected.relative == pytest.approx(injected.norm / size, rel=1e-5)
    assert not torch.equal(again, own.vlm(input_ids=torch.arange(4, 12)[None]).logits)


def test_swapping_makes_the_tower_the_expert(own, vectors):
    expert = dict(own.expert.named_parameters())
    with inject(own.vlm, vectors, "swap"):
        for pair in vectors.pairs:
            if pair.kind in ("layer", "norm"):
                assert torch.equal(own.vlm.get_parameter(pair.vlm), expert[pair.llm])


def test_weights_come_back_after_an_exception_inside(own, vectors):
    with pytest.raises(KeyError, match="inside"), inject(own.vlm, vectors):
        raise KeyError("inside")


def test_weights_come_back_where_merging_itself_fails_half_way(own, vectors):
    broken = dict(vectors.expert)
    last = [pair.vlm for pair in vectors.pairs if pair.kind == "norm"][-1]
    broken[last] = torch.full_like(broken[last], torch.nan)
    bad = TaskVectors(vectors.pairs, vectors.base, broken)
    with pytest.raises(
        AnchorsError, match=r"model\.norm\.weight of the expert holds \d+ numbers that are NaN"
    ):
        inject(own.vlm, bad).__enter__()


def test_weights_come_back_whatever_is_done_to_them_inside(own, vectors):
    with inject(own.vlm, vectors, "task-arithmetic", 0.5), torch.no_grad():
        for pair in vectors.pairs:
            if pair.kind == "layer":
                own.vlm.get_parameter(pair.vlm).mul_(3)


def test_injections_nest(own, vectors):
    """The inner one takes the merged tower for v, and must not use what was kept of the outer one."""
    one = next(pair for pair in vectors.pairs if pair.kind == "layer" and "q_proj" in pair.canonical)
    recipe = Recipe("tsv-m", 0.7)
    weight = own.vlm.get_parameter(one.vlm)
    b, v, e = vectors.base[one.vlm], weight.detach().clone(), vectors.expert[one.vlm]
    with inject(own.vlm, vectors, recipe):
        outer = weight.detach().clone()
        with inject(own.vlm, vectors, recipe):
            assert torch.equal(weight, merge_tensor(recipe, one.canonical, b, outer, e, one.layer))
        assert torch.equal(weight, outer)
    assert torch.equal(outer, merge_tensor(recipe, one.canonical, b, v, e, one.layer))


@pytest.mark.parametrize("method", ["dare", "della", "ties", "tsv-m", "breadcrumbs"])
def test_what_is_kept_between_strengths_changes_no_bit(own, vectors, method):
    fresh = TaskVectors.of(own.vlm, own.base, own.expert)
    for strength, vlm_strength in ((1.0, 1.0), (0.3, 1.0), (0.3, 0.3)):
        if method == "ties" and vlm_strength != 1:
            continue
        with inject(own.vlm, vectors, method, strength, vlm_strength=vlm_strength):
            kept = state(own.vlm)
        fresh._kept.prepared.clear()
        with inject(own.vlm, fresh, method, strength, vlm_strength=vlm_strength):
            assert all(torch.equal(weight, kept[name]) for name, weight in state(own.vlm).items())


def test_another_seed_is_another_mask(own, vectors):
    with inject(own.vlm, vectors, "dare", seed=1):
        one = state(own.vlm)
    with inject(own.vlm, vectors, "dare", seed=2):
        assert any(not torch.equal(weight, one[name]) for name, weight in state(own.vlm).items())


def test_what_was_kept_goes_when_the_weights_are_trained_on(own):
    vlm = copy.deepcopy(own.vlm)
    vectors = TaskVectors.of(vlm, own.base, own.expert)
    with inject(vlm, vectors, "tsv-m"):
        pass
    name = next(pair.vlm for pair in vectors.pairs if "q_proj" in pair.canonical)
    with torch.no_grad():
        vlm.get_parameter(name).mul_(1.1)
    pair = next(pair for pair in vectors.pairs if pair.vlm == name)
    v = vlm.get_parameter(name).detach().clone()
    with inject(vlm, vectors, "tsv-m"):
        wanted = merge_tensor(
            Recipe("tsv-m"), pair.canonical, vectors.base[name], v, vectors.expert[name], pair.layer
        )
        assert torch.equal(vlm.get_parameter(name), wanted)


def test_layers_outside_the_range_keep_their_bits(own, vectors):
    before = state(own.vlm)
    with inject(own.vlm, vectors, layers=(1, 2), embeddings="by-token"):
        after = state(own.vlm)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {pair.vlm for pair in vectors.pairs if pair.layer in (1, 2)}


def test_each_layer_has_a_strength_of_its_own(own, vectors):
    one = {pair.layer: pair for pair in vectors.pairs if "q_proj.weight" in pair.canonical}
    before = state(own.vlm)
    with inject(own.vlm, vectors, per_layer=(0.0, 0.5, 2.0), strength=0.0) as injected:
        for layer, strength in enumerate((0.0, 0.5, 2.0)):
            name = one[layer].vlm
            wanted = torch.add(before[name], vectors.expert[name] - vectors.base[name], alpha=strength)
            assert torch.equal(own.vlm.get_parameter(name), wanted)
    assert injected.recipe.label() == "task-arithmetic λ=0,0.5,2 else 0"


@pytest.mark.parametrize("policy", ["shared-rows", "by-token"])
def test_rows_of_embedding_and_head_are_merged_once_and_new_ones_kept(own, vectors, policy):
    embedding = own.vlm.get_input_embeddings().weight
    before = embedding.detach().clone()
    tau = own.expert.get_input_embeddings().weight.detach() - own.base.get_input_embeddings().weight.detach()
    with inject(own.vlm, vectors, strength=0.5, embeddings=policy):
        after = embedding.detach().clone()
        head = own.vlm.get_output_embeddings().weight.detach().clone()
    assert torch.equal(after[:60], torch.add(before[:60], tau[:60], alpha=0.5))
    assert torch.equal(after[60:], before[60:])
    tied = own.vlm.get_output_embeddings().weight is embedding
    assert torch.equal(head, after) == tied


def test_parameters_that_only_share_memory_change_together():
    own = models("llava")
    vlm = copy.deepcopy(own.vlm)
    vectors = TaskVectors.of(vlm, own.base, own.expert)
    name = next(pair.vlm for pair in vectors.pairs if "q_proj" in pair.canonical)
    vlm.second = torch.nn.Parameter(vlm.get_parameter(name).data)
    with inject(vlm, vectors):
        assert torch.equal(vlm.second, vlm.get_parameter(name))
        assert vlm.second.data_ptr() == vlm.get_parameter(name).data_ptr()


def test_strength_zero_changes_nothing_and_may(own, vectors):
    with inject(own.vlm, vectors, "ties", 0.0) as injected:
        assert (injected.changed, injected.norm, injected.relative) == (0, 0.0, 0.0)


def test_an_expert_that_is_its_base_is_refused(own):
    vectors = TaskVectors.of(own.vlm, own.base, own.base)
    with pytest.raises(AnchorsError, match="changes none of the tower's"), inject(own.vlm, vectors):
        pass


def test_a_change_that_rounds_away_is_refused(own):
    vlm = copy.deepcopy(own.vlm).to(torch.bfloat16)
    base, expert = (copy.deepcopy(side).to(torch.bfloat16) for side in (own.base, own.expert))
    vectors = TaskVectors.of(vlm, base, expert)
    with inject(vlm, vectors) as injected:
        assert injected.changed > 0
        assert vlm.get_input_embeddings().weight.dtype == torch.bfloat16
    with pytest.raises(AnchorsError, match="too small for the type"), inject(vlm, vectors, strength=1e-9):
        pass


def test_numbers_too_large_for_half_precision_are_refused(own):
    vlm = copy.deepcopy(own.vlm).to(torch.float16)
    expert = copy.deepcopy(own.expert)
    with torch.no_grad():
        for weight in expert.parameters():
            weight.mul_(1e6)
    vectors = TaskVectors.of(vlm, own.base, expert)
    with pytest.raises(AnchorsError, match="too large for the type"), inject(vlm, vectors, strength=10):
        pass


def test_state_dicts_will_do(own, vectors):
    from_states = TaskVectors.of(own.vlm.state_dict(), own.base.state_dict(), own.expert.state_dict())
    assert {pair.vlm for pair in from_states.pairs} == {pair.vlm for pair in vectors.pairs}
    with inject(own.vlm, vectors):
        one = state(own.vlm)
    with inject(own.vlm, from_states):
        assert all(torch.equal(weight, one[name]) for name, weight in state(own.vlm).items())


def test_a_head_of_its_own_cannot_go_into_a_tied_one():
    own = models("smolvlm")
    expert = dict(own.expert.state_dict())
    expert["lm_head.weight"] = expert["lm_head.weight"] + 1
    tokenizers = tokenizer("<image>"), tokenizer(), tokenizer()
    vectors = TaskVectors.of(own.vlm, own.base, expert, tokenizers=tokenizers)
    with inject(own.vlm, vectors) as injected:
        assert injected.changed
    with (
        pytest.raises(AnchorsError, match="The expert has a head of its own"),
        inject(own.vlm, vectors, embeddings="by-token"),
    ):
        pass


def test_another_model_is_refused(own, vectors):
    with pytest.raises(AnchorsError, match="has no parameter"), inject(own.base, vectors):
        pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"layers": (1, 3)}, "the tower has layers 0 to 2"), ({"per_layer": (1.0, 1.0)}, "the tower has 3")],
)
def test_recipes_for_another_depth_are_refused(own, vectors, fields, message):
    with pytest.raises(AnchorsError, match=message), inject(own.vlm, vectors, **fields):
        pass


@needs_cuda
@pytest.mark.parametrize("method", METHODS)
def test_cuda_is_the_cpu_but_for_rounding(own, method):
    vlm = copy.deepcopy(own.vlm)
    recipe = Recipe(method, options={"iterations": 3} if method == "wudi" else ())
    with inject(vlm, TaskVectors.of(vlm, own.base, own.expert), recipe):
        wanted = state(vlm)
    vlm = vlm.to("cuda")
    with inject(vlm, TaskVectors.of(vlm, own.base, own.expert), recipe):
        for name, weight in state(vlm).items():
            torch.testing.assert_close(weight.cpu(), wanted[name], rtol=1e-4, atol=1e-5)


def _edits(weights: dict[str, torch.nn.Parameter]):
    def fused() -> None:
        for p in weights.values():
            p.grad = torch.ones_like(p)
        torch.optim.AdamW(weights.values(), lr=0.05, fused=True).step()

    def behind() -> None:
        for p in weights.values():
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))

    return {"fused optimizer": fused, "write to data": behind}


@pytest.mark.parametrize("whose", ["vlm", "base", "expert"])
@pytest.mark.parametrize("how", ["fused optimizer", "write to data"])
@pytest.mark.parametrize("method", ["dare", "ties", "tsv-m"])
def test_weights_that_change_between_calls_are_seen(own, whose, how, method):
    sides = {name: copy.deepcopy(getattr(own, name)) for name in ("vlm", "base", "expert")}
    vectors = TaskVectors.of(**sides)
    with inject(sides["vlm"], vectors, method):
        pass
    _edits(dict(sides[whose].named_parameters()))[how]()
    fresh = TaskVectors.of(**sides)
    with inject(sides["vlm"], fresh, method):
        wanted = state(sides["vlm"])
    with inject(sides["vlm"], vectors, method):
        assert all(torch.equal(p, wanted[name]) for name, p in sides["vlm"].named_parameters())


def test_a_head_that_equals_its_embedding_is_merged_as_the_embedding():
    own = models("llava")
    vlm, base, expert = (copy.deepcopy(x) for x in (own.vlm, own.base, own.expert))
    vlm.lm_head.weight.data = vlm.get_input_embeddings().weight.detach().clone()
    for side in (base, expert):
        side.lm_head.weight.data = side.model.embed_tokens.weight.detach().clone()
    vectors = TaskVectors.of(vlm, base, expert)
    with inject(vlm, vectors, "dare", embeddings="shared-rows"):
        assert torch.equal(vlm.lm_head.weight, vlm.get_input_embeddings().weight)
    base.lm_head.weight.data += 1
    vectors = TaskVectors.of(vlm, base, expert)
    with pytest.raises(AnchorsError, match="The base has a head of its own"):
        inject(vlm, vectors, embeddings="shared-rows").__enter__()


def test_strengths_of_layers_leave_the_rest_alone(own, vectors):
    with inject(own.vlm, vectors, per_layer=(1.0, 0.0, 0.0), embeddings="shared-rows"):
        after = state(own.vlm)
    before = state(own.vlm)
    changed = {
        pair.layer
        for pair in vectors.pairs
        if pair.vlm in after and not torch.equal(after[pair.vlm], before[pair.vlm])
    }
    assert changed == {0}
