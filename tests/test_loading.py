"""Models from files: what does not fit is named; what is allowed to be absent or left over still loads."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import make
from injection_vlms import make_vlm
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    YoutuConfig,
    YoutuForCausalLM,
)
from typer.testing import CliRunner

import anchors
from anchors.cli import app
from anchors.errors import AnchorsError
from anchors.injection.asking.vlm import load_vlm
from anchors.model.language import load
from anchors.tasks.prompts import from_text
from anchors.tasks.task import TASKS

TEXT = "Review: quiet\nSentiment: Negative\n\nReview: good\nSentiment:"


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    make("llama", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def llama(llama_directory, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(llama_directory, tmp_path / "m")


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "model.safetensors"
    save_file({k: w.contiguous() for k, w in change(load_file(path)).items()}, path, {"format": "pt"})


def configure(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def without(name: str) -> Callable[[dict], dict]:
    return lambda w: {key: x for key, x in w.items() if name not in key}


def renamed(prefix: str) -> Callable[[dict], dict]:
    return lambda w: {prefix + key: x for key, x in w.items()}


def holding(value: float) -> Callable[[dict], dict]:
    def change(w: dict) -> dict:
        w["model.layers.1.mlp.up_proj.weight"][3, 2] = value
        return w

    return change


def misshapen(w: dict) -> dict:
    return w | {"model.layers.2.mlp.up_proj.weight": torch.zeros(47, 32)}


SPOILED = {
    "no head": (without("lm_head"), r"1 weight of LlamaForCausalLM not in the file: lm_head\.weight"),
    "a norm too few": (without("layers.1.input_layernorm"), r"model\.layers\.1\.input_layernorm\.weight"),
    "a wrapper's names": (renamed("module."), r"'module\.'.*model\.module"),
    "a compiled one's names": (renamed("_orig_mod."), r"'_orig_mod\.'.*_orig_mod"),
    "foreign names": (renamed("tower."), r"30 weights of LlamaForCausalLM not in the file.*30 weights in the file"),
    "one too many": (lambda w: w | {"score.weight": torch.zeros(2, 32)}, r"no place for: score\.weight"),
    "another shape": (misshapen, r"layers\.2\.mlp\.up_proj\.weight is 47×32 in the file and 48×32 in the model"),
    "not a number": (holding(float("nan")), r"layers\.1\.mlp\.up_proj\.weight.* 1 number .*\[3, 2\]: nan"),
    "infinite": (holding(float("-inf")), r"layers\.1\.mlp\.up_proj\.weight.*\[3, 2\]: -inf"),
}  # fmt: skip


@pytest.mark.parametrize("situation", sorted(SPOILED))
def test_weights_that_do_not_fit_are_named(llama, situation):
    change, said = SPOILED[situation]
    rewrite(llama, change)
    with pytest.raises(AnchorsError, match=rf"(?s){said}"):
        load(str(llama), device="cpu")


@pytest.mark.parametrize(("layers", "said"), [(4, r"9 weights .*model\.layers\.3\."), (2, r"9 weights in the file .*model\.layers\.2\.")])  # fmt: skip
def test_more_or_fewer_layers_than_the_file(llama, layers, said):
    configure(llama, num_hidden_layers=layers)
    with pytest.raises(AnchorsError, match=said):
        load(str(llama), device="cpu")


def test_a_classifier_is_no_language_model(tmp_path, tokenizer):
    GPT2ForSequenceClassification(make("gpt2", len(tokenizer)).config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(AnchorsError, match=r"no place for: score\.weight"):
        load(str(tmp_path), device="cpu")


def test_what_a_class_computes_itself_may_lie_in_the_file(tmp_path, tokenizer):
    """Causal masks of GPT-2 and rotary frequencies of Llama, as their first checkpoints hold them; a tied head need not."""
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 512, 512) for i in range(3)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    for family, more in (("gpt2", masks), ("gptj", masks), ("llama", frequencies)):
        folder = tmp_path / family
        make(family, len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        rewrite(folder, lambda w, more=more: w | more)
        found = load(str(folder), device="cpu").fingerprint
        assert found == load(make(family, len(tokenizer)), tokenizer=tokenizer, device="cpu").fingerprint
    tied = LlamaConfig.from_dict(
        make("llama", len(tokenizer)).config.to_dict() | {"tie_word_embeddings": True}
    )
    LlamaForCausalLM(tied).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    load(str(tmp_path / "tied"), device="cpu")


CONFIGURED = {
    "zero layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "layers in words": ({"num_hidden_layers": "three"}, "num_hidden_layers"),
    "other heads than the file": ({"num_key_value_heads": 1}, r"6 weights of another shape.*k_proj"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised: gptq.*optimum"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantised: awq"),
    "bitsandbytes": (
        {"quantization_config": {"load_in_4bit": True}},
        r"quantised: bitsandbytes.*bitsandbytes",
    ),
    "unknown": ({"quantization_config": {"quant_method": "squash"}}, r"does not know: 'squash'"),
    "an encoder": ({"model_type": "vit"}, "vit model, which transformers has no causal language model for"),
    "no type": ({"model_type": "no-such-model"}, "no-such-model"),
}


@pytest.mark.parametrize("situation", sorted(CONFIGURED))
def test_configurations_that_make_no_model(llama, situation):
    entries, said = CONFIGURED[situation]
    configure(llama, **entries)
    with pytest.raises(AnchorsError, match=said) as refused:
        load(str(llama), device="cpu")
    assert len(str(refused.value)) < 1000


def test_heads_that_do_not_divide(tmp_path, tokenizer):
    config = LlamaConfig.from_dict(
        make("llama", len(tokenizer)).config.to_dict() | {"num_key_value_heads": 3}
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(AnchorsError, match="does not run by itself"):
        load(str(tmp_path), device="cpu")


@pytest.mark.parametrize("text", ["[1, 2]", "{", "[" * 100_000, '{"a":' * 100_000, "\0", ""])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_files_that_are_no_tables(llama, name, text):
    if "index" in name:
        (llama / "model.safetensors").unlink()
    (llama / name).write_text(text)
    with pytest.raises(AnchorsError, match="could not be loaded"):
        load(str(llama), device="cpu")


@pytest.mark.parametrize(
    "shards",
    [["a.safetensors"], {"lm_head.weight": 5}, {"x": "../other.safetensors"}, {"x": "/other.safetensors"}],
)
def test_shards_are_files_of_the_directory(llama, shards):
    shutil.copy(llama / "model.safetensors", llama.parent / "other.safetensors")
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    with pytest.raises(AnchorsError, match=r"outside its directory|no table from names"):
        load(str(llama), device="cpu")


def test_links_out_of_the_directory_are_not_read_but_those_of_the_hubs_cache_are(llama, tmp_path):
    weights = llama / "model.safetensors"
    elsewhere = shutil.move(weights, tmp_path / "elsewhere.safetensors")
    weights.symlink_to(elsewhere)
    with pytest.raises(AnchorsError, match=r"'model\.safetensors'.*outside its directory"):
        load(str(llama), device="cpu")
    weights.unlink()
    shutil.move(elsewhere, weights)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(llama.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(i), snapshot))
    load(str(snapshot), device="cpu")


def test_a_directory_without_a_tokenizer(llama):
    for path in llama.glob("*token*"):
        path.unlink()
    with pytest.raises(AnchorsError, match="tokenizer"):
        load(str(llama), device="cpu")


def test_ordinary_tokens_without_a_row_are_refused_at_once_and_special_ones_where_they_occur(
    llama, tokenizer
):
    larger = type(tokenizer).from_pretrained(llama)
    larger.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    larger.save_pretrained(llama)
    lm, rows = load(str(llama), device="cpu"), len(tokenizer)
    for text, said in ((TEXT, None), ("<picture> " + TEXT, rf"token {rows}.*has {rows} rows")):
        ids = torch.tensor([from_text(text, TASKS["sst2"], lm.tokenizer).ids])
        if said is None:
            lm.logits_at(ids, torch.tensor([3]))
        else:
            with pytest.raises(AnchorsError, match=said):
                lm.logits_at(ids, torch.tensor([3]))
    larger.add_tokens(["quiet"])
    larger.save_pretrained(llama)
    with pytest.raises(AnchorsError, match=rf"embedding has {rows} rows, the tokenizer {rows + 2} tokens"):
        load(str(llama), device="cpu")


@pytest.mark.parametrize("verb", [["check"], ["classify", "-n", "2", "-m"], ["flow", "-n", "2", "-m"]])
def test_a_vision_language_model_is_called_one(tmp_path, verb):
    vlm = make_vlm("llava", routed=False)
    vlm.model.save_pretrained(tmp_path / "vlm")
    vlm.processor.save_pretrained(tmp_path / "vlm")
    done = CliRunner().invoke(app, [*verb, str(tmp_path / "vlm")])
    assert done.exit_code == 2
    assert "is a vision-language model (llava)" in done.stderr
    assert "anchors inject" in done.stderr
    assert len(done.stderr) < 1000


def test_towers_are_loaded_whole_too(tmp_path, llama):
    vlm = make_vlm("llava", routed=False)
    vlm.model.save_pretrained(tmp_path / "vlm")
    vlm.processor.save_pretrained(tmp_path / "vlm")
    load_vlm(tmp_path / "vlm", device="cpu")
    names = load_file(tmp_path / "vlm" / "model.safetensors")
    gone = next(name for name in names if "vision" in name and "q_proj.weight" in name)
    rewrite(tmp_path / "vlm", without(gone))
    with pytest.raises(
        AnchorsError, match=r"1 weight of LlavaForConditionalGeneration not in the file.*vision"
    ):
        load_vlm(tmp_path / "vlm", device="cpu")
    with pytest.raises(AnchorsError, match=r"no vision-language model.*the language model llama"):
        load_vlm(llama, device="cpu")


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99", "mps", ""])
def test_devices_that_are_none(device, llama_directory):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is an MPS device here")
    for loader in (load, load_vlm):
        with pytest.raises(AnchorsError, match="device"):
            loader(str(llama_directory), device=device)


def test_the_names_of_the_package_stay_where_they_were():
    from anchors.model.language import LanguageModel, prepare

    assert anchors.load is load
    assert prepare
    assert anchors.LanguageModel is LanguageModel


def test_numbers_are_those_of_the_file(tmp_path, tokenizer, llama):
    """Youtu zeroes its padding row while it loads; a tensor that holds other numbers than its file is refused."""
    from anchors.model.written import as_written

    config = YoutuConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, pad_token_id=3,
        vocab_size=len(tokenizer), tie_word_embeddings=True,
    )  # fmt: skip
    model = YoutuForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "youtu")
    tokenizer.save_pretrained(tmp_path / "youtu")
    lm = load(str(tmp_path / "youtu"), device="cpu")
    assert torch.equal(lm.model.lm_head.weight, load_file(tmp_path / "youtu" / "model.safetensors")["model.embed_tokens.weight"])  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(llama)
    as_written(model, llama, "m")
    turned = model.model.layers[1].self_attn.q_proj.weight.data
    turned.copy_(turned.flip(0))
    as_written(model, llama, "m")
    turned[0, 0] += 1
    with pytest.raises(AnchorsError, match=r"layers\.1\.self_attn\.q_proj\.weight of 'm' does not hold"):
        as_written(model, llama, "m")
