"""Recipes, and `merge_tensor` where inputs are at their ends: no density, no strength, no change, no matrix, no number."""

import json
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from checking import unchecked
from hypothesis import given, settings
from torch import Tensor

from anchors.errors import AnchorsError
from anchors.injection.merging.methods import METHODS
from anchors.injection.merging.recipe import Recipe, merge_tensor
from anchors.injection.merging.sparse import largest

NAME = "model.layers.0.mlp.up_proj.weight"
FEW = {"wudi": {"iterations": 2}}
DENSE = [name for name, own in METHODS.items() if "density" in own.defaults]
ALONE = [name for name in DENSE if METHODS[name].defaults.get("drop") == "expert"]


def three(shape: tuple[int, ...], seed: int = 0, zeros: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    b = torch.randn(shape, generator=g)
    v, e = (
        b + 0.1 * torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) >= zeros)
        for _ in range(2)
    )
    return b, v, e


def recipe(method: str, strength: float | None = None, **fields: Any) -> Recipe:
    return Recipe(method, strength, **{"options": FEW.get(method, {})} | fields)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    method = draw(st.sampled_from(list(METHODS)))
    own = METHODS[method]
    options = dict(FEW.get(method, {}))
    for name, choices in own.choices.items():
        options[name] = draw(st.sampled_from(choices))
    fields: dict[str, Any] = {"seed": draw(st.integers(0, 3))}
    if "density" in own.defaults:
        fields["density"] = draw(st.sampled_from([0.02, 0.3, 0.5, 0.97, 1.0]))
    if "epsilon" in own.defaults:
        options["epsilon"] = 0.01
    if "gamma" in own.defaults:
        options["gamma"] = draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
    if not own.blend and options.get("convention") != "paper":
        fields["vlm_strength"] = draw(st.sampled_from([0.0, 0.5, 1.0, -1.0]))
    strength = 1.0 if method == "swap" else draw(st.sampled_from([0.0, 0.3, 1.0, 2.0, -1.0]))
    return Recipe(method, strength, options=options, **fields)


SHAPES = [(), (1,), (5,), (1, 1), (1, 6), (6, 1), (7, 4), (4, 7), (2, 3, 4), (0,), (0, 3)]


@settings(max_examples=300, deadline=None)
@given(recipes(), st.sampled_from(SHAPES), st.integers(0, 5), st.sampled_from([0.0, 0.7, 1.0]))
def test_every_recipe_gives_finite_numbers_of_the_same_shape_and_leaves_its_inputs(own, shape, seed, zeros):
    tensors = three(shape, seed, zeros)
    copies = [t.clone() for t in tensors]
    first = merge_tensor(own, NAME, *tensors, layer=0)
    assert first.shape == shape
    assert first.dtype == torch.float32
    assert bool(first.isfinite().all())
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))
    cache: dict = {}
    for _ in range(2):
        assert torch.equal(first, merge_tensor(own, NAME, *tensors, layer=0, cache=cache))


@settings(max_examples=100, deadline=None)
@given(recipes())
def test_recipes_survive_json_and_can_be_keys(own):
    again = Recipe.from_dict(json.loads(json.dumps(own.as_dict())))
    assert again == own
    assert hash(again) == hash(own)
    assert own.label().startswith(own.method)


@pytest.mark.parametrize("method", METHODS)
def test_without_strength_the_vlm_is_kept_as_it_is(method):
    b, v, e = three((6, 4))
    v = v.to(torch.bfloat16)
    assert merge_tensor(recipe(method, 0.0), NAME, b, v, e, layer=0) is v


@pytest.mark.parametrize("method", DENSE)
def test_density_0_is_refused(method):
    with pytest.raises(AnchorsError, match="density is 0; it must be a share above 0"):
        recipe(method, density=0.0)


@pytest.mark.parametrize("method", ["task-arithmetic", *ALONE])
def test_where_the_expert_is_the_base_adding_it_changes_no_bit(method):
    b, v, _ = three((6, 4))
    assert torch.equal(merge_tensor(recipe(method, 1.3), NAME, b, v, b), v)


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_of_three_equal_tensors_is_that_tensor(method):
    b, _, _ = three((6, 4))
    assert torch.equal(merge_tensor(recipe(method), NAME, b, b.clone(), b.clone()), b)


def test_added_norm_of_task_arithmetic_is_the_strength_times_the_experts():
    b, v, e = three((30, 20))
    for strength in (0.3, 1.0, -2.0):
        change = merge_tensor(recipe("task-arithmetic", strength), NAME, b, v, e) - v
        assert change.norm() == pytest.approx(abs(strength) * float((e - b).norm()), rel=1e-4)


def test_vlm_strength_scales_the_vlms_own_task_vector():
    b, v, e = three((30, 20))
    merged = merge_tensor(recipe("task-arithmetic", 0.4, vlm_strength=0.6), NAME, b, v, e)
    torch.testing.assert_close(merged, b + 0.6 * (v - b) + 0.4 * (e - b), rtol=1e-5, atol=1e-6)


def test_random_masks_depend_on_name_and_seed_and_on_nothing_else():
    tensors = three((30, 20))
    own = recipe("dare")
    one = merge_tensor(own, NAME, *tensors)
    torch.rand(7)
    assert torch.equal(one, merge_tensor(own, NAME, *tensors))
    assert torch.equal(one, merge_tensor(own, NAME, *(t.double() for t in tensors)))
    assert not torch.equal(one, merge_tensor(own, NAME.replace("0", "1"), *tensors))
    assert not torch.equal(one, merge_tensor(recipe("dare", seed=1), NAME, *tensors))


def test_merging_does_not_move_the_global_random_numbers():
    before = torch.get_rng_state()
    for method in METHODS:
        merge_tensor(recipe(method), NAME, *three((6, 4)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_in_float32_whatever_the_type(dtype):
    tensors = [t.to(dtype) for t in three((6, 4))]
    merged = merge_tensor(recipe("task-arithmetic", 0.3), NAME, *tensors)
    assert torch.equal(
        merged, merge_tensor(recipe("task-arithmetic", 0.3), NAME, *(t.float() for t in tensors))
    )


def test_everything_runs_in_inference_mode():
    with torch.inference_mode():
        for method in METHODS:
            assert merge_tensor(recipe(method), NAME, *three((6, 4))).isfinite().all()


def test_integers_are_kept_where_base_and_expert_agree_and_refused_where_not():
    b, v = torch.arange(4), torch.arange(4) + 1
    assert merge_tensor(recipe("ties"), "model.layers.0.steps", b, v, b.clone()) is v
    with pytest.raises(AnchorsError, match=r"model\.layers\.0\.steps holds torch\.int64 in the base"):
        merge_tensor(recipe("ties"), "model.layers.0.steps", b, v, b + 2)
    with pytest.raises(AnchorsError, match=r"(?s)torch\.float32 in the VLM .* not quantised"):
        merge_tensor(recipe("ties"), "model.layers.0.steps", b.float(), v.float(), b.to(torch.int8))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("which", "who"), [(0, "the base"), (1, "the VLM"), (2, "the expert")])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_is_an_error_that_says_where(method, which, who, bad):
    if METHODS[method].blend and which == 0:
        return  # needs no base
    tensors = list(three((6, 4)))
    tensors[which] = tensors[which].index_fill(0, torch.tensor(2), bad)
    with pytest.raises(
        AnchorsError, match=f"up_proj.weight of {who} holds 4 numbers that are NaN or infinite"
    ):
        merge_tensor(recipe(method), NAME, *tensors)


def test_shapes_that_differ_are_an_error_that_says_which():
    b, v, e = three((6, 4))
    with unchecked(), pytest.raises(AnchorsError, match=r"base \(6, 4\), VLM \(6, 4\), expert \(5, 4\)"):
        merge_tensor(recipe("task-arithmetic"), NAME, b, v, e[:5])


def test_layers_outside_the_range_and_what_is_in_no_layer_are_the_vlms():
    b, v, e = three((6, 4))
    own = recipe("task-arithmetic", layers=(1, 2))
    for layer, changed in ((0, False), (1, True), (2, True), (3, False), (None, False)):
        assert (merge_tensor(own, NAME, b, v, e, layer) is not v) == changed


def test_strengths_of_layers_leave_what_is_in_no_layer_to_the_common_one():
    own = recipe("task-arithmetic", 0.25, per_layer=(0.5, 0.0))
    assert [own.strength_of(layer) for layer in (0, 1, None)] == [0.5, None, 0.25]
    with pytest.raises(AnchorsError, match="strengths of 2 layers, the tower has 3"):
        own.strength_of(2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.data())
def test_the_largest_are_exactly_as_many_as_asked_for_and_nested_also_among_equals(values, data):
    tensor = torch.tensor(values, dtype=torch.float32)
    masks = [largest(tensor, count) for count in range(len(values) + 1)]
    for count, mask in enumerate(masks):
        assert int(mask.sum()) == count
        assert tensor[mask].sum() == tensor.sort(descending=True).values[:count].sum()
        assert bool((masks[max(count - 1, 0)] <= mask).all())


def test_selection_has_no_limit_of_size():
    """torch.quantile refuses more than 2²⁴ numbers."""
    values = torch.arange(2**24 + 10, dtype=torch.float32)
    assert int(largest(values, 1000).sum()) == 1000


def test_the_methods_own_defaults():
    assert Recipe().label() == "task-arithmetic λ=1"
    assert Recipe("average").strength == 0.1  # the a = 0.9 of most published injections
    assert Recipe("ties").parameters()["density"] == 0.2
    assert Recipe("dare", options={"rescale": "none"}).parameters()["rescale"] == "none"
    long = Recipe("dare", 0.5, 0.9, 0.2, 3, (2, 5), None, "by-token", {"rescale": "l1"})
    assert long.label() == "dare λ=0.5 λv=0.9 d=0.2 rescale=l1 layers 2–5 by-token seed 3"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "teis"}, "no merging method 'teis'.*\n.*task-arithmetic"),
        ({"strength": float("nan")}, "is not finite"),
        ({"per_layer": (1.0, float("inf"))}, "is not finite"),
        ({"strength": 1e30}, "would drown the model"),
        ({"vlm_strength": -1e30}, "would drown the model"),
        ({"density": 0.5}, "takes no density"),
        ({"method": "dare", "density": 1.5}, "must be a share"),
        ({"layers": (3, 2)}, "first and the last layer"),
        ({"layers": (3,)}, "first and the last layer"),
        ({"embeddings": "mean"}, "keep, shared-rows, by-token"),
        ({"options": {"rescale": "l1"}}, "task-arithmetic has no option 'rescale'.\nIt has none"),
        ({"method": "dare", "options": {"rescale": "l2"}}, "There are: density, l1, none"),
        ({"method": "dare", "options": {"density": 0.2}}, "dare has no option 'density'"),
        ({"method": "ties", "options": {"drop": "expert"}}, "There are: both"),
        ({"method": "wudi", "options": {"iterations": 1.5}}, "must be a number like 300"),
        ({"method": "wudi", "options": {"lr": "fast"}}, "must be a number like 1e-05"),
        ({"method": "wudi", "options": {"lr": -1.0}}, "at least 0"),
        ({"method": "della", "density": 0.05}, "between 0 and 1: take a smaller epsilon"),
        ({"method": "ties", "vlm_strength": 0.5}, "would be ignored"),
        ({"method": "average", "vlm_strength": 0.5}, "would be ignored"),
        ({"method": "swap", "strength": 0.5}, "take average"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(fields, message):
    with unchecked(), pytest.raises(AnchorsError, match=message):
        Recipe(**fields)


def test_a_field_that_no_recipe_has_is_refused():
    with pytest.raises(AnchorsError, match="no field 'lambda'"):
        Recipe.from_dict({"lambda": 1.0})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_pieces_make_the_whole(method, name, monkeypatch):
    b, v, e = (torch.randn(12, 10, generator=torch.Generator().manual_seed(i)) for i in range(3))
    recipe = Recipe(method, **({"options": {"iterations": 3}} if method == "wudi" else {}))
    whole = merge_tensor(recipe, name, b, v, e, 0)
    monkeypatch.setattr("anchors.injection.merging.recipe.PIECE", 7)
    torch.testing.assert_close(merge_tensor(recipe, name, b, v, e, 0), whole, rtol=2e-7, atol=2e-7)
    half = merge_tensor(recipe, name, b, v.bfloat16(), e, 0, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.shape == v.shape
