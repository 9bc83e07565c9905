"""Models that cannot be read or do not fit are refused with a reason, before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from injection_families import Saved, saved
from injection_merging import BF16, SHARD, copies, models, nothing_at, rewrite, run, same, shard_of, weights  # noqa: F401
from safetensors.torch import load_file, save_file

from anchors.errors import AnchorsError
from anchors.injection.checkpoint import INDEX, SINGLE, Checkpoint
from anchors.injection.merge import merge
from anchors.injection.recipe import Recipe


def edit(path: Path, **changes: object) -> None:
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | changes))


def spoil_missing(folder: Path) -> None:
    shard_of(folder).unlink()


def spoil_short(folder: Path) -> None:
    path = shard_of(folder)
    path.write_bytes(path.read_bytes()[:-100])


def spoil_header(folder: Path) -> None:
    path = shard_of(folder)
    path.write_bytes(path.read_bytes()[:8] + b"#" * 500)


def spoil_empty(folder: Path) -> None:
    shard_of(folder).write_bytes(b"")


def spoil_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": [')


def spoil_list(folder: Path) -> None:
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map=where | {"model.extra": shard_of(folder).name})


def spoil_escape(folder: Path) -> None:
    edit(folder / INDEX, weight_map={"a": "../base/model.safetensors"})


def spoil_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def spoil_none(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def spoil_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def spoil_quantised(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})


SPOILT = {
    spoil_missing: "lacks 1 of its",
    spoil_short: "no whole safetensors file",
    spoil_header: "no whole safetensors file",
    spoil_empty: "no whole safetensors file",
    spoil_index: "cannot be read",
    spoil_list: "lacks 1 tensors that the index says",
    spoil_escape: "points out of its folder",
    spoil_pickles: "only as pickles",
    spoil_none: "has neither model.safetensors nor",
    spoil_config: "has no config.json",
    spoil_quantised: r"is quantised \(bitsandbytes\)",
}


@pytest.mark.parametrize("role", ["vlm", "base", "expert"])
@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__.removeprefix("spoil_"))
def test_damaged_models(spoil, role: str, copies: Saved, tmp_path: Path) -> None:
    if len(list(getattr(copies, role).glob("model-*"))) == 0:
        held = load_file(getattr(copies, role) / SINGLE)
        save_file(held, getattr(copies, role) / "model-00001-of-00001.safetensors")
        (getattr(copies, role) / SINGLE).unlink()
        where = dict.fromkeys(held, "model-00001-of-00001.safetensors")
        (getattr(copies, role) / INDEX).write_text(json.dumps({"weight_map": where}))
    spoil(getattr(copies, role))
    with pytest.raises(AnchorsError, match=SPOILT[spoil]):
        run(copies, tmp_path / "out")
    assert nothing_at(tmp_path / "out")


def test_weights_that_cannot_be_merged(copies: Saved, tmp_path: Path) -> None:
    name, out = "model.layers.1.mlp.up_proj.weight", tmp_path / "out"
    rewrite(copies.expert, lambda held: held | {name: held[name].to(torch.float8_e4m3fn)})
    with pytest.raises(AnchorsError, match=rf"{name} in .* is of type F8_E4M3"):
        run(copies, out)
    rewrite(copies.expert, lambda held: held | {name: held[name].float().fill_(float("nan"))})
    with pytest.raises(AnchorsError, match=f"{name} of the expert holds 384 numbers that are NaN"):
        run(copies, out)
    rewrite(copies.expert, lambda held: held | {name: held[name].float().fill_(1e9)})
    rewrite(copies.vlm, lambda held: {n: t.half() for n, t in held.items()})
    with pytest.raises(
        AnchorsError, match=r"384 merged numbers of .*up_proj.weight are too large for torch.float16"
    ):
        run(copies, out)
    rewrite(copies.expert, lambda held: {n: t for n, t in held.items() if n != name})
    with pytest.raises(AnchorsError, match="missing in the language model"):
        run(copies, out)
    rewrite(copies.base, lambda held: held | {name: held[name][:, :8].contiguous()})
    with pytest.raises(AnchorsError, match="of another shape"):
        run(copies, out)
    assert nothing_at(out)


def test_models_of_another_kind(models: Saved, tmp_path: Path) -> None:
    other = saved("gemma3", BF16, SHARD)
    with pytest.raises(AnchorsError, match="The base is not what the language tower was made from"):
        merge(models.vlm, other.expert, other.base, Recipe(), tmp_path / "out")
    with pytest.raises(AnchorsError, match="no tensor"):
        merge(tmp_path_of_vision(tmp_path), models.expert, models.base, Recipe(), tmp_path / "out")
    for nowhere in ("./nowhere", "/nowhere/at/all"):
        with pytest.raises(AnchorsError, match="is not a directory"):
            merge(nowhere, models.expert, models.base, Recipe(), tmp_path / "out")
    assert nothing_at(tmp_path / "out")


def tmp_path_of_vision(tmp_path: Path) -> Path:
    folder = tmp_path / "vision"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"vision_model.embeddings.weight": torch.ones(3)}, folder / SINGLE)
    return folder


def test_models_of_the_hub(models: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they lie in the hub's cache, without network."""
    commit = "0123456789" * 4
    for role in ("vlm", "base", "expert"):
        repository = tmp_path / "hub" / f"models--org--{role}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        shutil.copytree(getattr(models, role), repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    merge("org/vlm", "org/expert", "org/base", Recipe(strength=0.5), tmp_path / "out")
    run(models, tmp_path / "plain")
    assert same(weights(tmp_path / "out"), weights(tmp_path / "plain"))
    facts = json.loads((tmp_path / "out" / "injection.json").read_text())
    assert facts["models"]["expert"] == {"name": "org/expert", "commit": commit}
    shard_of(tmp_path / "hub" / "models--org--vlm" / "snapshots" / commit).unlink()
    with pytest.raises(AnchorsError, match="lacks 1 of its"):
        merge("org/vlm", "org/expert", "org/base", Recipe(strength=0.5), tmp_path / "again")
    with pytest.raises(AnchorsError, match="the hub does not give it"):
        merge("org/nothing", "org/expert", "org/base", Recipe(strength=0.5), tmp_path / "again")


def test_fingerprints(copies: Saved) -> None:
    before = {role: Checkpoint.open(getattr(copies, role)).fingerprint for role in ("vlm", "base", "expert")}
    assert len(set(before.values())) == 3
    rewrite(copies.expert, dict)  # the same tensors in another file
    assert Checkpoint.open(copies.expert).fingerprint == before["expert"]
    rewrite(copies.expert, lambda held: held | {"model.norm.weight": held["model.norm.weight"] + 1})
    assert Checkpoint.open(copies.expert).fingerprint != before["expert"]
