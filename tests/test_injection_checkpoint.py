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
from anchors.injection.merging.checkpoint import INDEX, SINGLE, Checkpoint
from anchors.injection.merging.inspection import inspect
from anchors.injection.merging.merge import merge
from anchors.injection.merging.recipe import Recipe


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
    assert facts["identity"]["written"] == dict.fromkeys(("vlm", "base", "expert"), commit)
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


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize("policy", ["shared-rows", "by-token"])
def test_rows_are_not_merged_unproved(policy: str, copies: Saved, tmp_path: Path) -> None:
    without_tokenizer(copies.expert)
    with pytest.raises(AnchorsError, match=f"{policy} needs the tokenizers .* none in .*expert") as error:
        run(copies, tmp_path / "out", Recipe(strength=0.5, embeddings=policy))
    assert "keep" in error.value.remedy
    assert nothing_at(tmp_path / "out")


def test_tokenizers_run_no_code_and_ask_nothing(
    copies: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "n")
    without_tokenizer(copies.expert)
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (copies.expert / "tokenizer_config.json").write_text(json.dumps(own))
    (copies.expert / "own.py").write_text("raise SystemExit")
    with pytest.raises(AnchorsError, match=r"The tokenizer in .*expert' cannot be read"):
        run(copies, tmp_path / "out", Recipe(strength=0.5, embeddings="by-token"))
    assert not asked


@pytest.mark.parametrize("error", [ImportError("needs sentencepiece"), RuntimeError("odd"), Exception("raw")])
def test_tokenizers_that_cannot_be_read(
    error: Exception, models: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(AnchorsError, match=f"cannot be read: {error}"):
        run(models, tmp_path / "out", Recipe(strength=0.5, embeddings="by-token"))


def test_a_model_in_two_roles(copies: Saved, tmp_path: Path) -> None:
    shutil.copytree(copies.vlm, tmp_path / "twin")
    for vlm in (copies.vlm, tmp_path / "twin"):
        with pytest.raises(AnchorsError, match="is given as the base, but is the vision-language model"):
            merge(copies.vlm, copies.expert, vlm, Recipe(), tmp_path / "out")
        with pytest.raises(AnchorsError, match="is given as the expert, but is the vision-language model"):
            merge(copies.vlm, vlm, copies.base, Recipe(), tmp_path / "out")
    shutil.copytree(copies.base, tmp_path / "language")
    held = weights(copies.base)
    rewrite(tmp_path / "language", lambda _: {n: t + 0.01 for n, t in held.items()})
    with pytest.raises(AnchorsError, match="has no eyes"):
        merge(tmp_path / "language", copies.expert, copies.base, Recipe(), tmp_path / "out")
    assert nothing_at(tmp_path / "out")


def test_a_base_of_zeros(copies: Saved, tmp_path: Path) -> None:
    rewrite(copies.base, lambda held: {n: torch.zeros_like(t) for n, t in held.items()})
    with pytest.raises(AnchorsError, match="is inf for the vision-language model"):
        run(copies, tmp_path / "out")
    found = inspect(copies.vlm, copies.expert, copies.base)
    assert any("is inf ‖b‖" in warning for warning in found.warnings)


@pytest.mark.parametrize(("role", "name"), [("vlm", "vision-language model"), ("expert", "expert")])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads 2, not 4"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 1, not 2"),
        ({"head_dim": 4}, "head_dim 8, not 4"),
        ({"hidden_act": "gelu"}, "activation silu, not gelu"),
    ],
)
def test_the_same_shapes_cut_otherwise(
    changes: dict, said: str, role: str, name: str, copies: Saved, tmp_path: Path
) -> None:
    configure(getattr(copies, role), **changes)
    with pytest.raises(AnchorsError, match=f"otherwise than the {name}: it has {said}") as error:
        run(copies, tmp_path / "out")
    assert "--force" in error.value.remedy
    assert any(said in warning for warning in inspect(copies.vlm, copies.expert, copies.base).warnings)
    assert any(said in note for note in run(copies, tmp_path / "out", force=True).notes)


def configure(folder: Path, **changes: object) -> None:
    """Change the configuration of a language model or tower; None takes a key away."""
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    text |= changes
    for key in [key for key in changes if changes[key] is None]:
        del text[key]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_theta": 5e5}, "rope_theta 10000.0, not 500000.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta 10000.0, not 500000.0"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling {'rope_type': 'default'}"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-06, not 1e-05"),
        ({"sliding_window": 4096}, "sliding_window off, not 4096"),
    ],
)  # fmt: skip
def test_what_a_longer_training_changed_is_a_note(
    changes: dict, said: str, copies: Saved, tmp_path: Path
) -> None:
    configure(copies.base, sliding_window="off")
    configure(copies.expert, **changes)
    report = run(copies, tmp_path / "out")
    assert len(report.notes) == 1
    assert said in report.notes[0]
    assert inspect(copies.vlm, copies.expert, copies.base).warnings == report.notes


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": None, "rope_parameters": None, "rms_norm_eps": None, "hidden_act": "swish"},
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None},
        {"rope_parameters": None, "rope_theta": 10000, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        {"sliding_window": 4096, "use_sliding_window": False},
    ],
)  # fmt: skip
def test_what_is_only_written_otherwise_is_no_difference(
    changes: dict, copies: Saved, tmp_path: Path
) -> None:
    configure(copies.base, sliding_window="off")
    configure(copies.vlm, **changes)
    assert run(copies, tmp_path / "out").notes == ()
