"""Injection from disk to disk: the same numbers as in memory, in files that others read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from injection_families import LAYOUTS, NAMES, ROWS, TOKENS, Saved, published, saved
from injection_families import models as models_of
from injection_merging import BF16, SHARD, copies, models, nothing_at, rewrite, run, same, weights  # noqa: F401
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaProcessor,
)

from anchors.errors import AnchorsError
from anchors.injection.merging import base as looking
from anchors.injection.merging.checkpoint import INDEX, SINGLE, Checkpoint
from anchors.injection.merging.mapping import tower
from anchors.injection.merging.memory import TaskVectors, inject
from anchors.injection.merging.merge import merge
from anchors.injection.merging.recipe import Recipe, merge_tensor
from anchors.injection.merging.sources import Sources

RECIPES = {
    "task arithmetic": Recipe(strength=0.7),
    "both strengths": Recipe(strength=0.7, vlm_strength=0.4, embeddings="shared-rows"),
    "dare": Recipe("dare", 0.7, density=0.3, seed=3, embeddings="by-token"),
    "ties": Recipe("ties", 1.5, density=0.4),
    "della": Recipe("della", 0.7, density=0.5, seed=1, layers=(1, 2)),
    "tsv-m": Recipe("tsv-m", 1.0),
    "per layer": Recipe(per_layer=(0.0, 0.5, 1.0)),
}


def in_memory(models: Saved, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Merged weights as `inject` makes them, in transformers' names."""
    vlm = AutoModelForImageTextToText.from_pretrained(models.vlm, dtype="auto")
    base, expert = (
        AutoModelForCausalLM.from_pretrained(p, dtype="auto") for p in (models.base, models.expert)
    )
    tokenizers = [AutoTokenizer.from_pretrained(p) for p in (models.vlm, models.base, models.expert)]
    vectors = TaskVectors.of(vlm, base, expert, tokenizers=tokenizers)
    with inject(vlm, vectors, recipe):
        return {name: tensor.clone() for name, tensor in vlm.state_dict().items()}


@pytest.mark.parametrize("family", NAMES)
def test_reloads_and_equals_the_one_in_memory(family: str, tmp_path: Path) -> None:
    models, recipe = saved(family, BF16, SHARD), RECIPES["dare"]
    report = run(models, tmp_path / "out", recipe, shard_size=SHARD)
    assert report.notes == ()  # configurations agree
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert same(dict(model.state_dict()), in_memory(models, recipe))
    before, after = Checkpoint.open(models.vlm), Checkpoint.open(tmp_path / "out")
    assert (before.shapes, before.dtypes) == (after.shapes, after.dtypes)
    assert report.changed + report.kept == len(before.entries)
    assert set(report.tensors.loc[report.tensors["changed"], "tower"]) == {True}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()["<image>"] == 60


def as_transformers_has_it(layout: str, folder: Path) -> dict[str, torch.Tensor]:
    """What transformers reads from a checkpoint of this layout, with no key missing and none unexpected.

    The original InternVL is read by code of its own; there the names are led back by hand, as its authors' script does.
    """
    if layout != "OpenGVLab/InternVL3-1B":
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="auto", output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return dict(model.state_dict())
    held, own = weights(folder), models_of("internvl").vlm.state_dict()
    for name in [name for name in held if ".qkv." in name]:
        for which, part in zip("qkv", held.pop(name).chunk(3), strict=True):
            held[name.replace("qkv", f"{which}_proj")] = part
    back = dict(zip(published(layout, fused=False), own, strict=True))
    assert held.keys() == back.keys()
    return {back[name]: tensor for name, tensor in held.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_merge_to_what_plain_python_makes(layout: str, tmp_path: Path) -> None:
    family, _ = LAYOUTS[layout]
    own, paths = models_of(family), saved(family)
    shutil.copytree(paths.vlm, tmp_path / "vlm")
    save_file(published(layout), tmp_path / "vlm" / SINGLE)
    v, b, e = (dict(model.state_dict()) for model in (own.vlm, own.base, own.expert))
    assert same(as_transformers_has_it(layout, tmp_path / "vlm"), v)  # the layout is what transformers knows
    report = merge(tmp_path / "vlm", paths.expert, paths.base, Recipe(strength=0.7, embeddings="shared-rows"),
                   tmp_path / "out")  # fmt: skip
    before, after = Checkpoint.open(tmp_path / "vlm"), Checkpoint.open(tmp_path / "out")
    assert (before.shapes, before.dtypes) == (after.shapes, after.dtypes)
    merged, touched = as_transformers_has_it(layout, tmp_path / "out"), set()
    for name, tensor in v.items():
        wanted, inside = tensor.clone(), name.replace("model.language_model.", "model.")
        if "visual" not in name and inside in b:
            rows = slice(TOKENS if inside in ("model.embed_tokens.weight", "lm_head.weight") else None)
            wanted[rows] += 0.7 * (e[inside][rows] - b[inside][rows])
            touched.add(inside)
        torch.testing.assert_close(merged[name], wanted, rtol=0, atol=5e-7)
    assert touched == set(b)
    assert report.changed == len(before.entries) - sum(not tower for tower in report.tensors["tower"])


_LIKE_INTERNLM2 = (
    ("embed_tokens", "tok_embeddings"), ("self_attn.o_proj", "attention.wo"), ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.down_proj", "feed_forward.w2"), ("mlp.up_proj", "feed_forward.w3"), ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"), ("lm_head", "output"), ("self_attn.q_proj", "attention.wqkv"),
)  # fmt: skip


def internlm2(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A language model as InternLM2 names it, with queries, keys and values of a group in one tensor; without biases."""
    held = {
        name: tensor for name, tensor in held.items() if "vision_model" in name or "proj.bias" not in name
    }
    for name in [name for name in held if name.endswith("self_attn.q_proj.weight")]:
        q, k, v = (held.pop(name.replace("q_proj", f"{which}_proj")) for which in "qkv")
        held[name] = torch.cat([q, k, v])  # one group: one head of keys
    for old, new in _LIKE_INTERNLM2:
        held = {n if "vision_model" in n else n.replace(old, new): t for n, t in held.items()}
    return held


def test_a_tower_with_the_names_of_internlm2(tmp_path: Path) -> None:
    """OpenGVLab/InternVL2_5-8B: other names and fused projections, the same sums."""
    paths, recipe = saved("internvl"), Recipe(strength=0.7, embeddings="shared-rows")
    plain = {
        "vlm": published("OpenGVLab/InternVL3-1B"),
        "base": weights(paths.base),
        "expert": weights(paths.expert),
    }
    for role, held in plain.items():
        shutil.copytree(getattr(paths, role), tmp_path / role)
        save_file(internlm2(held), tmp_path / role / SINGLE)
    names = set(weights(tmp_path / "base"))
    assert {"model.tok_embeddings.weight", "output.weight", "model.layers.1.attention.wqkv.weight"} < names
    assert "language_model.output.weight" in weights(tmp_path / "vlm")
    merge(*(tmp_path / role for role in ("vlm", "expert", "base")), recipe, tmp_path / "out")
    shutil.copytree(paths.vlm, tmp_path / "original")
    save_file(plain["vlm"], tmp_path / "original" / SINGLE)
    merge(tmp_path / "original", paths.expert, paths.base, recipe, tmp_path / "wanted")
    found, wanted = weights(tmp_path / "out"), internlm2(weights(tmp_path / "wanted"))
    assert same(found, wanted)
    before = weights(tmp_path / "vlm")
    assert sum(not torch.equal(found[name], before[name]) for name in found) == len(names)
    with pytest.raises(AnchorsError, match="missing in the tower"):
        merge(tmp_path / "vlm", paths.expert, paths.base, recipe, tmp_path / "no")


def test_a_model_with_code_of_its_own(tmp_path: Path) -> None:
    """As the original InternVL: its configuration is read under its own names, its code is left behind, which is said."""
    paths = saved("internvl")
    vlm = tmp_path / "vlm"
    shutil.copytree(paths.vlm, vlm)
    save_file(published("OpenGVLab/InternVL3-1B"), vlm / SINGLE)
    config = json.loads((vlm / "config.json").read_text())
    config |= {
        "model_type": "internvl_chat",
        "llm_config": config.pop("text_config"),
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
    }
    (vlm / "config.json").write_text(json.dumps(config))
    (vlm / "modeling_internvl_chat.py").write_text("raise SystemExit")
    report = merge(vlm, paths.expert, paths.base, Recipe(strength=0.5), tmp_path / "out")
    (note,) = report.notes
    assert "(modeling_internvl_chat.py), which is not copied" in note
    assert not list((tmp_path / "out").glob("*.py"))
    config["llm_config"]["num_attention_heads"] = 1
    (vlm / "config.json").write_text(json.dumps(config))
    with pytest.raises(AnchorsError, match="num_attention_heads 2, not 1"):
        merge(vlm, paths.expert, paths.base, Recipe(strength=0.5), tmp_path / "another")


@pytest.mark.parametrize("name", RECIPES)
def test_every_kind_of_method_equals_the_one_in_memory(name: str, models: Saved, tmp_path: Path) -> None:
    run(models, tmp_path / "out", RECIPES[name])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert same(dict(model.state_dict()), in_memory(models, RECIPES[name]))


def test_the_towers_change_is_the_methods_delta(tmp_path: Path) -> None:
    models, recipe = saved("llava"), Recipe(strength=0.3)  # float32: nothing is rounded away
    report = run(models, tmp_path / "out", recipe)
    b, v, e, m = (weights(p) for p in (models.base, models.vlm, models.expert, tmp_path / "out"))
    pairs = tower({n: t.shape for n, t in v.items()}, {n: t.shape for n, t in b.items()}).pairs
    changed = report.tensors.set_index("name")
    for pair in pairs:
        if pair.kind in ("embedding", "head"):
            assert torch.equal(m[pair.vlm], v[pair.vlm])
            continue
        delta = 0.3 * (e[pair.llm] - b[pair.llm])
        torch.testing.assert_close(m[pair.vlm] - v[pair.vlm], delta, rtol=0, atol=3e-7)
        merged = merge_tensor(recipe, pair.canonical, b[pair.llm], v[pair.vlm], e[pair.llm], pair.layer)
        assert torch.equal(m[pair.vlm], merged)
        assert changed.loc[pair.vlm, "change"] == pytest.approx(float(delta.norm()), rel=1e-4)
    outside = set(v) - {pair.vlm for pair in pairs}
    assert outside
    assert all(torch.equal(m[name], v[name]) for name in outside)
    table = report.by_module().set_index("module")
    assert table.loc["attention", ["tensors", "changed", "kept"]].tolist() == [12, 12, 0]
    assert table.loc["vision_tower", "changed"] == 0
    assert report.by_layer()["layer"].tolist() == [0, 1, 2]
    tower_change = report.tensors["change"].astype(float)
    assert report.relative == pytest.approx(
        float(tower_change.pow(2).sum() / report.tensors["norm"].astype(float).pow(2).sum()) ** 0.5
    )


def test_rows_that_no_text_has_stay(models: Saved, tmp_path: Path) -> None:
    run(models, tmp_path / "out", Recipe(strength=0.5, embeddings="shared-rows"))
    before, after = weights(models.vlm), weights(tmp_path / "out")
    for name in (n for n in before if "embed_tokens" in n or "lm_head" in n):
        assert not torch.equal(before[name][:60], after[name][:60])
        assert torch.equal(before[name][60:], after[name][60:])  # <image>, and padding
        assert len(after[name]) > ROWS


def test_layers_outside_the_range_are_the_same_bits(models: Saved, tmp_path: Path) -> None:
    report = run(models, tmp_path / "out", Recipe(strength=1, layers=(1, 1)))
    changed = report.tensors.loc[report.tensors["changed"], "layer"]
    assert set(changed) == {1}
    assert len(changed) == 9


@pytest.mark.parametrize("size", ["3KB", "20KB", "1GB"])
def test_shards_do_not_matter(size: str, models: Saved, tmp_path: Path) -> None:
    recipe = Recipe("dare", 0.7, density=0.3)
    run(models, tmp_path / "out", recipe, shard_size=size)
    run(saved("llava", BF16), tmp_path / "whole", recipe)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    if size == "1GB":
        assert files == [SINGLE]
        return
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    limit = int(size.removesuffix("KB")) * 1000
    for file in files:
        held = load_file(tmp_path / "out" / file)  # safetensors' own reader agrees with our writer
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= limit


def test_a_merge_that_changes_nothing(models: Saved, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AnchorsError, match="changed nothing in the language tower"):
        merge(models.vlm, models.base, models.base, Recipe(strength=0.5), out)
    with pytest.raises(AnchorsError, match="changed nothing"):
        merge(models.vlm, models.base, models.base, Recipe(per_layer=(0, 1, 0)), out)
    assert nothing_at(out)
    report = run(models, out, Recipe(strength=0))  # that is what it is meant to do
    assert report.changed == 0
    assert same(weights(out), weights(models.vlm))


def test_widths_of_types_may_be_mixed(copies: Saved, tmp_path: Path) -> None:
    """An expert in float32, and tensors of other types outside the tower."""
    rewrite(copies.expert, lambda held: {n: t.float() for n, t in held.items()})
    extra = {
        "model.flag": torch.tensor(True),
        "model.steps": torch.arange(3),
        "model.none": torch.zeros(0, 4),
    }
    rewrite(copies.vlm, lambda held: held | extra)
    run(copies, tmp_path / "out")
    after = weights(tmp_path / "out")
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in extra.items())
    assert {t.dtype for n, t in after.items() if n not in extra} == {BF16}


def test_a_tied_head_that_is_on_disk_stays_the_embedding(tmp_path: Path) -> None:
    models, recipe = saved("smolvlm", BF16), RECIPES["dare"]
    folder, name = tmp_path / "vlm", "model.text_model.embed_tokens.weight"
    shutil.copytree(models.vlm, folder)
    rewrite(folder, lambda held: held | {"lm_head.weight": held[name].clone()})
    both = Saved(folder, models.base, models.expert)
    run(both, tmp_path / "out", recipe)
    run(models, tmp_path / "one", recipe)
    held, one = weights(tmp_path / "out"), weights(tmp_path / "one")
    assert torch.equal(held.pop("lm_head.weight"), one[name])
    assert same(held, one)
    shutil.copytree(models.expert, tmp_path / "expert")
    rewrite(tmp_path / "expert", lambda held: held | {"lm_head.weight": torch.ones(ROWS, 16).bfloat16()})
    for vlm in (folder, models.vlm):
        with pytest.raises(AnchorsError, match="has a head of its own"):
            merge(vlm, tmp_path / "expert", models.base, recipe, tmp_path / "none")
    merge(models.vlm, tmp_path / "expert", models.base, Recipe(), tmp_path / "kept")


def test_what_goes_with_the_weights(copies: Saved, tmp_path: Path) -> None:
    (copies.vlm / "modeling_own.py").write_text("raise SystemExit")
    (copies.vlm / "chat_template.jinja").write_text("{{ messages }}")
    run(copies, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not {"modeling_own.py", INDEX, "journal.json", "lock"} & names
    facts = json.loads((tmp_path / "out" / "injection.json").read_text())
    assert facts["identity"]["recipe"]["strength"] == 0.5
    assert facts["identity"]["models"]["vlm"] == Checkpoint.open(copies.vlm).fingerprint
    assert {row["module"] for row in facts["tensors"]} >= {"attention", "mlp", "norm", "vision_tower"}


def test_a_processor_still_loads(copies: Saved, tmp_path: Path) -> None:
    eyes = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    words = AutoTokenizer.from_pretrained(copies.vlm)
    LlavaProcessor(eyes, words, patch_size=8, chat_template="{{ messages }}").save_pretrained(copies.vlm)
    run(copies, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, LlavaProcessor)
    assert processor.image_processor.crop_size["height"] == 16
    assert processor.chat_template == "{{ messages }}"


def test_the_look_at_the_base_goes_in_pieces(models: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a 70B model three whole matrices in float32 would be three gigabytes, and their differences as much."""
    made: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                made.append(result.numel())
            return result

    monkeypatch.setattr(looking, "PIECE", 100)
    sources = Sources.open(models.vlm, models.expert, models.base)
    with Sizes():
        looking.require_base(sources)
    assert max(made) == 100
    assert min(own[0] * own[1] for own in sources.base.shapes.values() if len(own) == 2) > 100
