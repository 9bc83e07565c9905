"""Merging methods against mergekit and peft where they do the same, and against slow formulas where nobody does.

Where the published conventions differ, the name of the test says which one is meant.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from anchors.injection.merging.methods import METHODS
from anchors.injection.merging.recipe import Recipe, merge_tensor
from anchors.injection.merging.spectral import interference, polar, spectrum, tsv

SHAPE = (24, 16)
NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def kit() -> SimpleNamespace:
    """mergekit and peft; slow to import."""
    from mergekit.merge_methods.api import merge_tensors
    from peft.utils import merge_utils

    return SimpleNamespace(merge=merge_tensors, peft=merge_utils)


@pytest.fixture(scope="module")
def three() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    b = torch.randn(SHAPE, generator=g)
    return b, b + 0.2 * torch.randn(SHAPE, generator=g), b + 0.3 * torch.randn(SHAPE, generator=g)


@pytest.fixture
def coin(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], None]:
    """Make torch.bernoulli throw what a recipe's random numbers throw; ours begins with the expert, others end so."""

    def put(recipe: Recipe) -> None:
        generator = recipe.generator(NAME)
        draws = [torch.rand(SHAPE, generator=generator) for _ in range(2)]
        monkeypatch.setattr(torch, "bernoulli", lambda p: (draws.pop() < p).to(p.dtype))

    return put


def merged(three: tuple[Tensor, Tensor, Tensor], recipe: Recipe) -> Tensor:
    return merge_tensor(recipe, NAME, *three, layer=0)


def close(one: Tensor, other: Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other.to(one.dtype), rtol=rtol, atol=3e-6)


WEIGHTS = [(1.0, 1.0), (1.0, 0.5), (0.7, 1.3)]


@pytest.mark.parametrize(("lv", "le"), WEIGHTS)
def test_task_arithmetic_is_mergekits_and_pefts(kit, three, lv, le):
    ours = merged(three, Recipe("task-arithmetic", le, lv))
    b, v, e = three
    close(ours, kit.merge(list(three), "task_arithmetic", parameters={"weight": [lv, le]}, base_index=0))
    close(ours, b + kit.peft.task_arithmetic([v - b, e - b], torch.tensor([lv, le])))


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_average_is_mergekits_linear(kit, three, share):
    _, v, e = three
    ours = merged(three, Recipe("average", share))
    close(ours, kit.merge([v, e], "linear", parameters={"weight": [1 - share, share]}))


@pytest.mark.parametrize(("lv", "le"), WEIGHTS)
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_in_mergekits_convention_is_mergekits(kit, three, lv, le, density):
    ours = merged(three, Recipe("ties", le, lv, density, options={"convention": "mergekit"}))
    parameters = {"weight": [lv, le], "density": density}
    close(ours, kit.merge(list(three), "ties", parameters=parameters, base_index=0))


@pytest.mark.parametrize(("lv", "le"), WEIGHTS)
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_in_pefts_convention_is_pefts(kit, three, lv, le, density):
    b, v, e = three
    ours = merged(three, Recipe("ties", le, lv, density, options={"convention": "peft"}))
    close(ours, b + kit.peft.ties([v - b, e - b], torch.tensor([lv, le]), density))


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_ties_in_the_papers_convention_has_one_strength_and_is_pefts_with_equal_weights(kit, three, strength):
    b, v, e = three
    ours = merged(three, Recipe("ties", strength))
    close(ours, b + kit.peft.ties([v - b, e - b], torch.tensor([strength, strength]), 0.2))
    parameters = {"weight": 1.0, "density": 0.2, "lambda": strength}
    close(ours, kit.merge(list(three), "ties", parameters=parameters, base_index=0))


def test_ties_conventions_of_peft_and_mergekit_are_far_apart_for_unequal_weights(three):
    b, _, _ = three
    one, other = (
        merged(three, Recipe("ties", 0.5, options={"convention": convention})) - b
        for convention in ("peft", "mergekit")
    )
    assert (one - other).norm() / one.norm() > 0.2


def test_ties_counts_half_of_what_both_agree_on_so_that_it_injects_less_than_task_arithmetic(three):
    b, v, e = three
    ties = merged(three, Recipe("ties", density=1.0)) - b
    agreed = (v - b).sign() == (e - b).sign()
    close(ties[agreed], ((v - b) + (e - b))[agreed] / 2)
    assert ties.norm() < 0.8 * ((v - b) + (e - b)).norm()


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_magnitude_is_pefts(kit, three, density):
    b, v, e = three
    ours = merged(three, Recipe("magnitude", 0.8, 0.9, density, options={"drop": "both"}))
    close(ours, b + kit.peft.magnitude_prune([v - b, e - b], torch.tensor([0.9, 0.8]), density))


@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.5, 0.1), (0.95, 0.2), (1.0, 0.01)])
def test_breadcrumbs_is_mergekits(kit, three, density, gamma):
    ours = merged(three, Recipe("breadcrumbs", 0.8, 0.9, density, options={"gamma": gamma, "drop": "both"}))
    parameters = {"weight": [0.9, 0.8], "density": density, "gamma": gamma}
    close(ours, kit.merge(list(three), "breadcrumbs", parameters=parameters, base_index=0))


def test_dare_rescaled_by_density_is_pefts(kit, three, coin):
    b, v, e = three
    recipe = Recipe("dare", 0.8, 0.9, 0.3, options={"drop": "both"})
    ours = merged(three, recipe)
    coin(recipe)
    close(ours, b + kit.peft.dare_linear([v - b, e - b], torch.tensor([0.9, 0.8]), 0.3))


def test_dare_rescaled_by_l1_is_mergekits(kit, three, coin):
    recipe = Recipe("dare", 0.8, 0.9, 0.3, options={"drop": "both", "rescale": "l1"})
    ours = merged(three, recipe)
    coin(recipe)
    parameters = {"weight": [0.9, 0.8], "density": 0.3}
    close(ours, kit.merge(list(three), "dare_linear", parameters=parameters, base_index=0))


def test_dare_ties_in_pefts_convention_is_pefts(kit, three, coin):
    b, v, e = three
    recipe = Recipe("dare-ties", 0.8, 0.9, 0.6, options={"convention": "peft"})
    ours = merged(three, recipe)
    coin(recipe)
    close(ours, b + kit.peft.dare_ties([v - b, e - b], torch.tensor([0.9, 0.8]), 0.6))


@pytest.mark.parametrize(("method", "theirs"), [("dare-ties", "dare_ties"), ("della-ties", "della")])
@pytest.mark.parametrize(("convention", "normalize"), [("mergekit", True), ("sum", False)])
def test_random_masks_with_ties_in_mergekits_conventions_are_mergekits(
    kit, three, coin, method, theirs, convention, normalize
):
    """Its default is `sum` for dare_ties, `mergekit` for della."""
    epsilon = {"epsilon": 0.2} if method == "della-ties" else {}
    recipe = Recipe(method, 0.8, 0.9, 0.6, options={"convention": convention, "rescale": "l1"} | epsilon)
    ours = merged(three, recipe)
    coin(recipe)
    parameters = {"weight": [0.9, 0.8], "density": 0.6, "normalize": normalize} | epsilon
    close(ours, kit.merge(list(three), theirs, parameters=parameters, base_index=0))


@pytest.mark.parametrize("rescale", ["l1", "none"])
def test_della_rescaled_by_l1_or_not_is_mergekits(kit, three, coin, rescale):
    options = {"drop": "both", "rescale": rescale, "epsilon": 0.2}
    recipe = Recipe("della", 0.8, 0.9, 0.5, options=options)
    ours = merged(three, recipe)
    coin(recipe)
    parameters = {"weight": [0.9, 0.8], "density": 0.5, "epsilon": 0.2, "rescale": rescale == "l1"}
    close(ours, kit.merge(list(three), "della_linear", parameters=parameters, base_index=0))


def test_della_in_the_papers_convention_divides_each_entry_by_its_own_probability(three):
    b, v, e = three
    tau, recipe = e - b, Recipe("della", density=0.5, options={"epsilon": 0.2})
    uniform = torch.rand(SHAPE, generator=recipe.generator(NAME))
    wanted = torch.zeros(SHAPE)
    for i in range(SHAPE[0]):
        for rank, j in enumerate(tau[i].abs().argsort().tolist()):
            p = 0.3 + 0.4 * rank / (SHAPE[1] - 1)
            wanted[i, j] = tau[i, j] / p if uniform[i, j] < p else 0
    close(merged(three, recipe) - v, wanted)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sce_with_the_published_floor_is_mergekits(kit, three, density):
    ours = merged(three, Recipe("sce", density=density, options={"floor": 1e-6}))
    close(ours, kit.merge(list(three), "sce", parameters={"select_topk": density}, base_index=0))


def test_sce_without_the_published_floor_still_weighs_small_deltas(kit, three):
    """Mean squares of fine-tuning are below mergekit's floor, where it weighs both alike."""
    b, v, e = three
    small = b, b + 1e-3 * (v - b), b + 1e-3 * (e - b)
    size = 1e3 * (merged(small, Recipe("sce", density=1.0)) - b)
    torch.testing.assert_close(size, merged(three, Recipe("sce", density=1.0)) - b, rtol=0.01, atol=2e-3)
    theirs = kit.merge(list(small), "sce", parameters={"select_topk": 1.0}, base_index=0)
    assert (1e3 * (theirs - b) - size).norm() > 0.1 * size.norm()


def test_dare_without_rescaling_is_task_arithmetic_with_strength_times_density_in_expectation(three):
    """What peft did up to 0.18.1: there a density is a strength in disguise."""
    recipes = [Recipe("dare", 0.8, density=0.3, seed=s, options={"rescale": "none"}) for s in range(600)]
    masks = torch.stack([merged(three, recipe) for recipe in recipes])
    error = (masks.mean(0) - merged(three, Recipe("task-arithmetic", 0.8 * 0.3))) / (
        masks.std(0) / len(recipes) ** 0.5
    )
    assert error.abs().max() < 5
    assert error.square().mean() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("method", ["dare", "della"])
def test_rescaled_by_density_random_masks_are_task_arithmetic_in_expectation(three, method):
    recipes = [Recipe(method, 0.8, density=0.4, seed=s) for s in range(600)]
    masks = torch.stack([merged(three, recipe) for recipe in recipes])
    error = masks.mean(0) - merged(three, Recipe("task-arithmetic", 0.8))
    assert (error / (masks.std(0) / len(recipes) ** 0.5)).abs().max() < 5


def test_rescaled_by_l1_a_mask_keeps_the_l1_norm(three):
    b, v, e = three
    for method in ("dare", "della"):
        change = merged(three, Recipe(method, density=0.4, options={"rescale": "l1"})) - v
        assert change.abs().sum() == pytest.approx(float((e - b).abs().sum()), rel=1e-4)


def test_masks_of_lower_densities_lie_in_those_of_higher_ones(three):
    _, v, _ = three
    for method in ("dare", "magnitude"):
        one, other = (merged(three, Recipe(method, density=d)) != v for d in (0.2, 0.6))
        assert one.sum() < other.sum()
        assert bool((one <= other).all())


def test_singular_values_and_polar_factor_are_torchs():
    for shape in ((24, 16), (16, 24), (5, 1)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        u, s, v = spectrum(matrix)
        torch.testing.assert_close(s, torch.linalg.svdvals(matrix.double()))
        torch.testing.assert_close((u * s) @ v.T, matrix.double())
        full = torch.linalg.svd(matrix.double(), full_matrices=False)
        torch.testing.assert_close(polar(matrix), full.U @ full.Vh)


def test_what_is_rounding_has_no_direction():
    thin = torch.outer(torch.arange(6.0), torch.arange(4.0))
    u, s, v = spectrum(thin)
    assert (s > 0).tolist() == [True, False, False, False]
    assert not u[:, 1:].any()
    assert not v[:, 1:].any()
    assert polar(thin).norm() == pytest.approx(1)
    assert not polar(torch.zeros(3, 2)).any()


def _svd(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :k], s[:k], vh[:k].T


def _procrustes(matrix: Tensor) -> Tensor:
    p, _, qh = torch.linalg.svd(matrix, full_matrices=False)
    return p @ qh


def test_tsv_m_is_the_papers_formula(three):
    b, v, e = three
    k = min(SHAPE) // 2
    parts = [_svd(v - b, k), _svd(e - b, k)]
    u, w = (_procrustes(torch.cat([part[i] for part in parts], dim=1)) for i in (0, 2))
    for strength, vlm_strength in ((1.0, 1.0), (1.5, 1.0), (0.5, 0.5)):
        s = torch.cat([vlm_strength * parts[0][1], strength * parts[1][1]])
        close(merged(three, Recipe("tsv-m", strength, vlm_strength)), b + u @ torch.diag(s) @ w.T)


def test_tsv_m_makes_task_vectors_orthogonal_and_keeps_their_singular_values(three):
    b, v, e = three
    a_v, a_e = tsv(v - b, e - b, {}, torch.Generator())
    assert (a_v.T @ a_e).norm() < 1e-5
    assert (a_v @ a_e.T).norm() < 1e-5
    for a, tau in ((a_v, v - b), (a_e, e - b)):
        close(torch.linalg.svdvals(a)[:8], torch.linalg.svdvals(tau)[:8], rtol=1e-4)


@pytest.mark.parametrize(("lv", "le"), WEIGHTS)
def test_iso_c_is_the_papers_formula(three, lv, le):
    b, v, e = three
    u, s, w = _svd(lv * (v - b) + le * (e - b), 16)
    ours = merged(three, Recipe("iso-c", le, lv))
    close(ours, b + s.mean() * u @ w.T)
    close(torch.linalg.svdvals(ours - b), s.mean().expand(16), rtol=1e-4)


def test_iso_cts_is_the_papers_formula(three):
    b, v, e = three
    taus = (v - b).double(), (e - b).double()
    parts = [_svd(taus[0] + taus[1], 12)]  # 75% of 16, and two of each
    common = parts[0][0]
    parts += [_svd(tau - common @ common.T @ tau, 2) for tau in taus]
    u, s, w = (torch.cat([part[i] for part in parts], dim=-1) for i in range(3))
    ours = merged(three, Recipe("iso-cts", options={"common": 0.75}))
    close(ours, b + s.mean() * _procrustes(u) @ _procrustes(w).T)
    close(merged(three, Recipe("iso-cts", options={"common": 1.0})), merged(three, Recipe("iso-c")))


@pytest.mark.parametrize(("lv", "le"), [(1.0, 1.0), (1.0, 0.5)])
def test_wudi_is_adam_on_the_papers_objective_and_lowers_it(three, lv, le):
    b, v, e = three
    tau_v, tau_e = v - b, e - b
    options = {"iterations": 40, "lr": 1e-3}
    change = (lv * tau_v + le * tau_e).requires_grad_()
    adam = torch.optim.Adam([change], lr=1e-3)
    for _ in range(40):
        adam.zero_grad()
        sum(
            ((change - weight * tau) @ tau.T).square().sum() / tau.square().sum()
            for weight, tau in ((lv, tau_v), (le, tau_e))
        ).backward()
        adam.step()
    ours = merged(three, Recipe("wudi", le, lv, options=options)) - b
    torch.testing.assert_close(ours, change.detach(), rtol=1e-3, atol=1e-4)
    before, after = (interference(x, tau_v, tau_e, lv, le) for x in (lv * tau_v + le * tau_e, ours))
    assert after < 0.9 * before


@pytest.mark.parametrize("method", [name for name, own in METHODS.items() if own.linear_only])
def test_spectral_methods_take_the_mean_or_the_sum_of_what_is_no_linear_map(three, method):
    b, v, e = three
    rest = METHODS[method].rest
    assert rest == (1.0 if method == "wudi" else 0.5)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        ours = merge_tensor(Recipe(method, 0.8), name, b, v, e)
        close(ours, b + rest * ((v - b) + 0.8 * (e - b)))
    norm = merge_tensor(Recipe(method, 0.8), "model.norm.weight", b[0], v[0], e[0])
    close(norm, (b + rest * ((v - b) + 0.8 * (e - b)))[0])


@pytest.mark.parametrize("method", METHODS)
def test_the_change_of_a_tensor_is_the_methods_own_function(three, method):
    b, v, e = three
    own, recipe = METHODS[method], Recipe(method, None if method == "swap" else 0.8)
    if own.blend:
        delta = (1 - recipe.strength) * (v - b) + recipe.strength * (e - b)
    else:
        delta = own(v - b, e - b, 1.0, recipe.strength, recipe.parameters(), recipe.generator(NAME))
    close(merged(three, recipe), b + delta)
