"""Experts of a mixture, stacked in the vision-language model and one by one in the language model, are the same matrices."""

import json
import re
import shutil
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from injection_families import TOKENS, models, published, saved
from injection_merging import weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

from anchors.cli.inject import app
from anchors.errors import AnchorsError
from anchors.injection.merging.checkpoint import SINGLE
from anchors.injection.merging.memory import TaskVectors, inject
from anchors.injection.merging.merge import merge
from anchors.injection.merging.recipe import Recipe, merge_tensor
from anchors.injection.merging.stacks import apart

FAMILY, EXPERTS, INNER = "qwen3_vl_moe", 4, 12
RECIPES = (Recipe(strength=0.7, layers=(1, 2)), Recipe("ties", 1.5, density=0.4))
OTHERS = (Recipe("dare", 0.7, density=0.3, seed=3), Recipe("tsv-m", 1.0))
Weights = dict[str, torch.Tensor]


def turned(held: Weights) -> Weights:
    return {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in held.items()
    }


def single(held: Weights) -> Weights:
    """Of stacks [expert, out, in] the matrices, named as Qwen3-MoE names them."""
    found = {}
    for name, tensor in held.items():
        prefix, inside, kind = name.rpartition(".experts.")
        if not inside:
            found[name] = tensor
            continue
        for i in range(EXPERTS):
            if kind == "down_proj":
                found[f"{prefix}.experts.{i}.down_proj.weight"] = tensor[i].clone()
            else:
                found[f"{prefix}.experts.{i}.gate_proj.weight"] = tensor[i, :INNER].clone()
                found[f"{prefix}.experts.{i}.up_proj.weight"] = tensor[i, INNER:].clone()
    return found


@pytest.fixture
def layouts(tmp_path: Path) -> dict[str, Path]:
    """The same vision-language model as published, as transformers 5 saves it, and with its experts one by one."""
    plain, found = load_file(saved(FAMILY).vlm / SINGLE), {}
    for name, held in (
        ("published", published("Qwen/Qwen3-VL-30B-A3B-Instruct")),
        ("saved", plain),
        ("single", single(plain)),
    ):
        found[name] = tmp_path / name
        shutil.copytree(saved(FAMILY).vlm, found[name])
        save_file(held, found[name] / SINGLE)
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
def test_every_layout_is_merged_expert_by_expert(
    recipe: Recipe, layouts: dict[str, Path], tmp_path: Path
) -> None:
    base, expert = (load_file(folder / SINGLE) for folder in (saved(FAMILY).base, saved(FAMILY).expert))
    v, wanted = single(load_file(layouts["saved"] / SINGLE)), {}
    for name, own in v.items():
        inside = name.replace("model.language_model.", "model.")
        layer = re.search(r"language_model\.layers\.(\d+)\.", name)
        if inside not in base or name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            wanted[name] = own
        else:
            number = int(layer[1]) if layer else None
            wanted[name] = merge_tensor(recipe, inside, base[inside], own, expert[inside], number)
    for name, folder in layouts.items():
        report = merge(folder, saved(FAMILY).expert, saved(FAMILY).base, recipe, tmp_path / f"{name}-out")
        found = weights(tmp_path / f"{name}-out")
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in weights(folder).items()}
        found = turned(found) if name == "published" else found
        found = found if name == "single" else single(found)
        for own in wanted:
            torch.testing.assert_close(found[own], wanted[own], rtol=0, atol=1e-6)
        rows = report.tensors.set_index("name").filter(like=".experts.", axis=0)
        assert set(rows["module"]) == {"mlp"}
        assert set(rows.loc[rows["changed"], "layer"]) == ({1, 2} if recipe.layers else {0, 1, 2})


def test_the_experts_own_answers_come_out_of_the_vision_language_model(
    layouts: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever was stacked or turned: with every weight the expert's, both say the same of a text."""
    recipe = Recipe("swap", embeddings="shared-rows")
    merge(layouts["published"], saved(FAMILY).expert, saved(FAMILY).base, recipe, tmp_path / "out")
    ids = torch.arange(4, 40)[None]
    vlm, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expert, base = (
        AutoModelForCausalLM.from_pretrained(own) for own in (saved(FAMILY).expert, saved(FAMILY).base)
    )
    with torch.no_grad():
        ours, theirs, others = (model(input_ids=ids).logits[..., :TOKENS] for model in (vlm, expert, base))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - others).abs().max() > 0.1


@pytest.mark.parametrize("recipe", OTHERS, ids=lambda recipe: recipe.method)
def test_memory_and_disk_make_the_same_numbers(
    recipe: Recipe, layouts: dict[str, Path], tmp_path: Path
) -> None:
    own = models(FAMILY)
    vectors, before = TaskVectors.of(own.vlm, own.base, own.expert), own.vlm.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    merge(layouts["saved"], saved(FAMILY).expert, saved(FAMILY).base, recipe, tmp_path / "out")
    on_disk = weights(tmp_path / "out")
    with inject(own.vlm, vectors, recipe) as injected:
        after = {name: tensor.clone() for name, tensor in own.vlm.state_dict().items()}
    assert all(torch.equal(after[name], on_disk[name]) for name in on_disk)
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert injected.changed == len(changed)
    norm = sum(float((after[name] - before[name]).double().square().sum()) for name in changed) ** 0.5
    assert injected.norm == pytest.approx(norm, rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.vlm.state_dict().items())


def test_a_base_that_weighs_its_experts_otherwise_is_refused(
    layouts: dict[str, Path], tmp_path: Path
) -> None:
    """Qwen3-VL-MoE's weights of the chosen experts always add up to 1; Qwen3-MoE's where its configuration says so."""
    base = tmp_path / "base"
    shutil.copytree(saved(FAMILY).base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"norm_topk_prob": False}))
    with pytest.raises(AnchorsError, match="norm_topk_prob False, not True"):
        merge(layouts["saved"], saved(FAMILY).expert, base, Recipe(), tmp_path / "out")


def test_gates_and_ups_that_changed_places_are_found_out(layouts: dict[str, Path], tmp_path: Path) -> None:
    held = load_file(layouts["saved"] / SINGLE)
    for name in held:
        if name.endswith("gate_up_proj"):
            held[name] = held[name].roll(INNER, dims=1)
    save_file(held, layouts["saved"] / SINGLE)
    with pytest.raises(AnchorsError, match=r"is 1\.\d+ for the vision-language model in .*gate_proj"):
        merge(layouts["saved"], saved(FAMILY).expert, saved(FAMILY).base, Recipe(), tmp_path / "out")


def test_what_is_no_stack_of_gates_and_ups_stays_as_it_is() -> None:
    stacks = {"layers.0.mlp.experts.gate_up_proj": (4, 24, 16), "layers.0.mlp.experts.down_proj": (4, 16, 12)}
    assert len(apart(stacks).slices) == 12
    for odd in (
        {"layers.0.mlp.experts.gate_up_proj_bias": (4, 24)},  # they alternate
        {"layers.0.mlp.experts.down_proj": (4, 16, 13)},
        {"layers.0.mlp.experts.down_proj": (5, 16, 12)},
        {"layers.0.mlp.experts.3.up_proj.weight": (12, 16)},  # there already
    ):
        assert apart(stacks | odd) == apart({}).__class__(stacks | odd, {}, {})


@settings(max_examples=60, deadline=None)
@given(experts=st.integers(1, 4), hidden=st.integers(1, 9), inner=st.integers(1, 9))
def test_both_tensors_say_which_way_round_they_are(experts: int, hidden: int, inner: int) -> None:
    up, down = "model.layers.3.mlp.experts.gate_up_proj", "model.layers.3.mlp.experts.down_proj"
    plain = {up: (experts, 2 * inner, hidden), down: (experts, hidden, inner)}
    theirs = {name: (size[0], size[2], size[1]) for name, size in plain.items()}
    assert {place.turned for place in apart(plain).slices.values()} == {False}
    if hidden == 2 * inner:
        with pytest.raises(AnchorsError, match="cannot be told"):
            apart(theirs)
        return
    assert {place.turned for place in apart(theirs).slices.values()} == {True}
    assert apart(theirs).shapes == apart(plain).shapes
    stack = torch.randn(theirs[up])
    last = apart(theirs).taken({up: stack}, f"model.layers.3.mlp.experts.{experts - 1}.up_proj.weight")
    assert torch.equal(last, stack[experts - 1].T[inner:])


def test_a_plan_names_the_stack_and_shows_experts_once(layouts: dict[str, Path]) -> None:
    own = saved(FAMILY)
    command = [str(layouts["published"]), str(own.expert), "--base", str(own.base), "--dry-run"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("experts.*.gate_proj.weight") == 1
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    rows = [row for row in told["tower"] if ".experts." in row["name"]]
    assert len(rows) == 3 * EXPERTS * 3
    assert {row["vlm"].rsplit(".", 1)[-1] for row in rows} == {"gate_up_proj", "down_proj"}
    assert not any("language_model.layers" in name for name in told["kept"])
