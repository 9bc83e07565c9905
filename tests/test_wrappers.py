"""Model objects: adapters answer as in peft, wrappers come off, and what is no model is told so."""

import copy

import pytest
import torch
from families import make
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel

from anchors.errors import AnchorsError
from anchors.flow import flow
from anchors.model.language import load
from anchors.model.preparation import undone

peft = pytest.importorskip("peft")


def plain(tokenizer, tied: bool = False) -> LlamaForCausalLM:
    model = make("llama", len(tokenizer))
    config = LlamaConfig.from_dict(model.config.to_dict() | {"tie_word_embeddings": tied})
    twin = LlamaForCausalLM(config)
    twin.load_state_dict(model.state_dict(), strict=False)
    twin.tie_weights()
    return twin.eval()


def adapted(model, config, seed: int = 0):
    """peft's object around a model, its adapter far from doing nothing."""
    found = peft.get_peft_model(model, config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in found.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=draw) * 0.2)
    return found


def asked(model, prompt) -> torch.Tensor:
    """Label probabilities by the object itself."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt.ids])).logits[0, -1].float()
    return logits[list(prompt.label_ids)].softmax(-1)


def close(lm, prompt, right, most: float = 1e-3) -> bool:
    return float((flow(lm, [prompt]).probabilities[0] - right).abs().max()) < most


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "lora on the head": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"]),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], use_dora=True),
    "lora on the embedding": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "a trained head": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "trained tokens": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", sorted(ADAPTERS))
def test_adapters_answer_as_in_peft(tmp_path, tokenizer, prompts, method, tied):
    """From files and as an object, in float32 and in half precision."""
    base = plain(tokenizer, tied)
    base.save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), ADAPTERS[method]())
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    own = asked(model, prompts[0])
    assert float((own - asked(base, prompts[0])).abs().max()) > 0.01, "the adapter does nothing"
    half = asked(copy.deepcopy(model).to(torch.bfloat16), prompts[0])
    assert close(load(str(tmp_path / "tuned"), device="cpu"), prompts[0], own)
    assert close(load(str(tmp_path / "tuned"), device="cpu", precision="bfloat16"), prompts[0], half, 0.1)
    assert close(load(model, tokenizer=tokenizer, device="cpu"), prompts[0], own)


def test_adapters_are_taken_as_they_are(tokenizer, prompts):
    """Off, merged, one of several."""
    config = ADAPTERS["lora"]()
    bare = asked(plain(tokenizer), prompts[0])
    model = adapted(plain(tokenizer), config)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    model.set_adapter("other")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B.other" in name:
                weight.add_(0.1)
    right = {name: (model.set_adapter(name), asked(model, prompts[0]))[1] for name in ("default", "other")}
    assert float((right["default"] - right["other"]).abs().max()) > 0.01
    for name, own in right.items():
        model.set_adapter(name)
        assert close(load(model, tokenizer=tokenizer, device="cpu"), prompts[0], own)
    with model.disable_adapter():
        assert close(load(model, tokenizer=tokenizer, device="cpu"), prompts[0], bare)
    model.set_adapter("default")
    model.merge_adapter()
    assert close(load(model, tokenizer=tokenizer, device="cpu"), prompts[0], right["default"])
    model.unmerge_adapter()
    assert close(
        load(model.merge_and_unload(), tokenizer=tokenizer, device="cpu"), prompts[0], right["default"]
    )


OUTSIDE = {
    "a prompt of vectors": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "a prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "switched by tokens": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("method", sorted(OUTSIDE))
def test_adapters_outside_the_layers_are_refused(tmp_path, tokenizer, method):
    plain(tokenizer).save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), OUTSIDE[method]())
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    for source, more in ((str(tmp_path / "tuned"), {}), (model, {"tokenizer": tokenizer})):
        with pytest.raises(AnchorsError, match=r"adapter 'default'.*outside the model|adapter 'default'.*before the prompt"):  # fmt: skip
            load(source, device="cpu", **more)


@pytest.mark.parametrize("spoiled", ["base", "adapter too few", "adapter too many", "pickle"])
def test_an_adapter_and_its_base_are_loaded_whole(tmp_path, tokenizer, spoiled):
    from safetensors.torch import load_file, save_file

    plain(tokenizer).save_pretrained(tmp_path / "base")
    adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), ADAPTERS["lora"]()).save_pretrained(
        tmp_path / "tuned"
    )
    tokenizer.save_pretrained(tmp_path / "tuned")
    path = tmp_path / ("base/model.safetensors" if spoiled == "base" else "tuned/adapter_model.safetensors")
    weights, last = load_file(path), "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"
    said = {"base": r"not whole.*lm_head\.weight", "pickle": "adapter_model.safetensors"}.get(
        spoiled, "not whole.*lora_B"
    )
    if spoiled == "base":
        del weights["lm_head.weight"]
    elif spoiled == "adapter too few":
        del weights[last]
    else:
        weights[last.replace("layers.2", "layers.7")] = weights[last].clone()
    save_file(weights, path, {"format": "pt"})
    if spoiled == "pickle":
        path.rename(path.with_name("adapter_model.bin"))
    with pytest.raises(AnchorsError, match=said):
        load(str(tmp_path / "tuned"), device="cpu")


def test_wrappers_that_change_nothing_come_off(tokenizer, prompts):
    right = asked(plain(tokenizer), prompts[0])
    compiled, partly = plain(tokenizer), plain(tokenizer)
    partly.compile()
    partly.model.layers[1] = torch.compile(partly.model.layers[1])
    partly.model.layers[2].forward = torch.compile(partly.model.layers[2].forward)
    for source in (torch.compile(compiled), partly, nn.DataParallel(plain(tokenizer))):
        assert close(load(source, tokenizer=tokenizer, device="cpu"), prompts[0], right)


class Engine(nn.Module):
    """What a training library puts around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


NO_MODELS = {
    "a table of weights": (lambda m: m.state_dict(), "OrderedDict|dict"),
    "a configuration": (lambda m: m.config, "LlamaConfig.*configuration without weights"),
    "an engine": (lambda m: Engine(m), "Engine.*attribute `module`"),
    "a tower without a head": (lambda m: LlamaModel(m.config), "LlamaModel is no causal language model"),
    "a layer": (lambda m: m.model.layers[0], "LlamaDecoderLayer is no model"),
    "a number": (lambda m: 3, "int is no model"),
    "weights on meta": (lambda m: m.to("meta"), "holds no numbers"),
}


@pytest.mark.parametrize("what", sorted(NO_MODELS))
def test_what_is_no_model(tokenizer, what):
    made, said = NO_MODELS[what]
    with pytest.raises(AnchorsError, match=rf"(?s){said}"):
        load(made(plain(tokenizer)), tokenizer=tokenizer, device="cpu")


def test_a_bridge_keeps_the_models_own_tokens(tmp_path, tokenizer, prompts):
    """transformer-lens puts a BOS token in front; the model's own tokenizer does not, wherever the bridge came from."""
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    plain(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = load(str(tmp_path), device="cpu")
    text, right = prompts[0].text, tokenizer(prompts[0].text)["input_ids"]
    booted = bridges.TransformerBridge.boot_transformers(
        str(tmp_path),
        hf_model=plain(tokenizer),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True),
    )
    assert booted.tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *right]
    for bridge in (lm.to_transformer_lens(), booted):
        back = load(bridge, device="cpu")
        assert back.tokenizer(text)["input_ids"] == right
        assert close(back, prompts[0], asked(plain(tokenizer), prompts[0]))
    booted.tokenizer.name_or_path = str(tmp_path / "gone")
    with pytest.raises(AnchorsError, match=r"(?s)in front of every prompt.*tokenizer="):
        load(booted, device="cpu")
    assert load(booted, tokenizer=tokenizer, device="cpu").tokenizer is tokenizer


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_preparation_alters_can_be_taken_back(tokenizer, prompts, family):
    """To the bit, in the precision in which most is altered."""
    ids = torch.tensor([prompts[0].ids])
    with torch.no_grad():
        right = make(family, len(tokenizer), torch.bfloat16)(ids).logits
        lm = load(make(family, len(tokenizer)), tokenizer=tokenizer, device="cpu", precision="bfloat16")
        lm.model.set_attn_implementation("eager")
        for _ in range(2):
            assert not torch.equal(lm.model(ids).logits, right)
            with undone(lm.altered):
                assert torch.equal(lm.model(ids).logits, right)
