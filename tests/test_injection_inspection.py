"""Task vectors measured before a merge, and signs of a wrong base."""

import math
from pathlib import Path

import pytest
import torch
from injection_families import saved
from safetensors.torch import save_file

from anchors.injection.merging.checkpoint import Checkpoint
from anchors.injection.merging.inspection import Inspection, inspect

Weights = dict[str, torch.Tensor]
WIDTH = 48


def random(scale: float, seed: int) -> Weights:
    """Numbers of a language model of two layers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (20, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(2):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
            shapes[f"model.layers.{i}.{name}.weight"] = (WIDTH, WIDTH)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (WIDTH,)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def plus(*parts: Weights) -> Weights:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def look(
    tmp_path: Path, v: Weights, e: Weights, b: Weights, dtype: torch.dtype = torch.float32
) -> Inspection:
    vlm = {f"language_{name}".replace("language_model.", "language_model.model."): t for name, t in v.items()}
    vlm["vision_tower.weight"] = torch.ones(3)
    for role, held in (("vlm", vlm), ("expert", e), ("base", b)):
        folder = tmp_path / role
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({n: t.to(dtype) for n, t in held.items()}, folder / "model.safetensors")
    return inspect(tmp_path / "vlm", tmp_path / "expert", tmp_path / "base")


BASE, TOWER, EXPERT = random(0.02, 0), random(0.001, 1), random(0.002, 2)
INSTRUCT = random(0.01, 3)


def test_measures_are_those_of_the_whole_models(tmp_path: Path) -> None:
    found = look(tmp_path, plus(BASE, TOWER), plus(BASE, EXPERT), BASE)
    names = [name for name in BASE if "embed_tokens" not in name]
    tau_v = torch.cat([(plus(BASE, TOWER)[n] - BASE[n]).double().flatten() for n in names])
    tau_e = torch.cat([(plus(BASE, EXPERT)[n] - BASE[n]).double().flatten() for n in names])
    expected = {
        "entries": len(tau_v),
        "norm_base": float(torch.cat([BASE[n].double().flatten() for n in names]).norm()),
        "norm_vlm": float(tau_v.norm()),
        "norm_expert": float(tau_e.norm()),
        "distance": float((tau_v - tau_e).norm()),
        "cosine": float(tau_v @ tau_e / tau_v.norm() / tau_e.norm()),
        "conflicts": float((tau_v * tau_e < 0).double().sum() / (tau_v * tau_e != 0).sum()),
        "zeros_vlm": float((tau_v == 0).double().mean()),
        "zeros_expert": float((tau_e == 0).double().mean()),
    }
    assert found.total == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert found.warnings == ()
    assert found.layers["layer"].tolist() == [0, 1]
    assert found.rows["module"].tolist().count("attention") == 2
    assert found.rows["entries"].sum() == len(tau_v)
    assert found.rows["norm_vlm"].pow(2).sum() == pytest.approx(float(tau_v @ tau_v), rel=1e-5)


def test_shards_and_shared_rows() -> None:
    one, other = saved("smolvlm", torch.bfloat16, "20KB"), saved("smolvlm", torch.bfloat16)
    first = inspect(one.vlm, one.expert, one.base, embeddings="shared-rows")
    assert first.total == inspect(*(Checkpoint.open(p) for p in (other.vlm, other.expert, other.base)),
                                  embeddings="shared-rows").total  # fmt: skip
    assert "embedding" in set(first.rows["module"])
    kept = inspect(one.vlm, one.expert, one.base)
    assert "embedding" not in set(kept.rows["module"])
    assert first.total["entries"] - kept.total["entries"] == 60 * 16  # of the tokens that all three have


def only(found: Inspection, *signs: str) -> bool:
    return len(found.warnings) == len(signs) and all(
        sign in warning for sign, warning in zip(signs, found.warnings, strict=True)
    )


def test_a_tower_made_from_the_instruct_version(tmp_path: Path) -> None:
    """v = b + instruct + τ, e = b + τ_e, base b."""
    found = look(tmp_path, plus(BASE, INSTRUCT, TOWER), plus(BASE, EXPERT), BASE)
    assert only(found, "5.1 times as far from the base"), found.warnings


def test_both_made_from_the_instruct_version(tmp_path: Path) -> None:
    found = look(tmp_path, plus(BASE, INSTRUCT, TOWER), plus(BASE, INSTRUCT, EXPERT), BASE)
    assert only(found, "nearer to the expert than to the base", "point the same way (cosine 0.9"), (
        found.warnings
    )


def test_the_right_base_is_quiet(tmp_path: Path) -> None:
    right = plus(BASE, INSTRUCT)
    assert look(tmp_path, plus(right, TOWER), plus(right, EXPERT), right).warnings == ()


def test_an_unrelated_base(tmp_path: Path) -> None:
    found = look(tmp_path, plus(BASE, TOWER), plus(BASE, EXPERT), random(0.02, 9))
    signs = ("left in the tower", "left in the expert", "nearer to the expert", "point the same way")
    assert only(found, *signs), found.warnings
    (tmp_path / "second").mkdir()
    found = look(tmp_path / "second", plus(BASE, TOWER), random(0.02, 9), BASE)
    assert only(found, "left in the expert"), found.warnings


def test_bf16_swallows_small_deltas(tmp_path: Path) -> None:
    """Section 1.3 of the notes: deltas of 1e-5 beside weights of 0.02."""
    small = random(1e-5, 4)
    found = look(tmp_path, plus(BASE, TOWER), plus(BASE, small), BASE, torch.bfloat16)
    assert 0.6 < found.total["zeros_expert"] < 0.95
    assert any("expert's deltas are exactly zero" in warning for warning in found.warnings)
    (tmp_path / "wide").mkdir()
    wide = look(tmp_path / "wide", plus(BASE, TOWER), plus(BASE, small), BASE)
    assert wide.total["zeros_expert"] < 0.1
    assert found.total["norm_expert"] > 1.5 * wide.total["norm_expert"]  # what is left is rounded up


def test_an_expert_that_touched_a_few_tensors_only(tmp_path: Path) -> None:
    """Zeros of tensors that were never trained are not those of rounding."""
    own = {n: t if "q_proj" in n else torch.zeros_like(t) for n, t in EXPERT.items()}
    found = look(tmp_path, plus(BASE, TOWER), plus(BASE, own), BASE)
    assert found.warnings == ()
    assert found.total["zeros_expert"] < 0.01


def test_a_frozen_tower_and_an_idle_expert(tmp_path: Path) -> None:
    found = look(tmp_path, BASE, plus(BASE, EXPERT), BASE)
    assert found.warnings == ()
    assert found.total["norm_vlm"] == 0
    (tmp_path / "idle").mkdir()
    assert only(look(tmp_path / "idle", plus(BASE, TOWER), BASE, BASE), "nothing to inject")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["vision-language model", "expert", "base"])
def test_numbers_that_are_none(number: float, role: str, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    roles = ("vision-language model", "expert", "base")
    three = dict(zip(roles, (plus(BASE, TOWER), plus(BASE, EXPERT), dict(BASE)), strict=True))
    three[role] = three[role] | {
        name: three[role][name].clone().index_put_((torch.tensor(3),), torch.tensor(number))
    }
    found = look(tmp_path, *three.values())
    assert f"NaN or infinite in language_model.{name} of the {role}:" in found.warnings[0]
    column = {"vision-language model": "norm_vlm", "expert": "norm_expert", "base": "norm_base"}[role]
    finite = found.layers[column].map(math.isfinite)
    assert found.layers["layer"].tolist() == [0, 1]
    assert finite.tolist() == [True, False]
    assert not math.isfinite(found.total[column])
    odd = found.rows[~found.rows[column].map(math.isfinite)]
    assert odd[["layer", "module"]].to_numpy().tolist() == [[1, "mlp"]]
