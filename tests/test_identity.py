"""A model keeps its identity wherever it lies, and loses it with any change that could change a number."""

import copy
import json
import shutil
from functools import partial

import pytest
import torch
from families import make
from gpu import needs_cuda
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from anchors.analyses.classification import Classification
from anchors.analyses.reweighting import Reweighting
from anchors.digest import multilinear, tensor_digest, tensor_digests
from anchors.errors import AnchorsError
from anchors.model import identity as identities
from anchors.model.identity import fingerprint, held, identity
from anchors.model.language import load
from anchors.study.runner import Sample, config_of, measure
from anchors.tasks.data import read
from anchors.tasks.task import TASKS

TASK = TASKS["sst2"]


def reading(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)


@pytest.fixture(scope="module")
def llama():
    return make("llama", 50)


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    llama.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------ bytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_of_every_weight_counts(dtype):
    model = make("gpt2", 50, dtype)
    weights = list(model.parameters())
    before = fingerprint(model)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(weights) - 1), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
    @example(0, 0.0, 1)
    @example(len(weights) - 1, 1 - 2**-40, 128)
    def changed(which, place, bits):
        raw = weights[which].data.view(-1).view(torch.uint8)
        at = int(place * len(raw))
        raw[at] ^= bits
        try:
            assert fingerprint(model) != before
        finally:
            raw[at] ^= bits

    changed()
    assert fingerprint(model) == before


def test_order_shape_and_type_count():
    x = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    others = [
        x[[1, 0, 2]],
        x[:, [1, 0, 2, 3]],
        x.reshape(4, 3),
        x.view(torch.int32),
        x.double(),
        x[:2],
        x.t(),
    ]
    assert len({tensor_digest(other) for other in [x, *others]}) == 8
    assert tensor_digest(x) == tensor_digest(x.clone()) == tensor_digest(x.t().contiguous().t())
    assert tensor_digest(torch.empty(0, 3)) != tensor_digest(torch.empty(3, 0))


def test_digests_are_those_of_the_bytes_alone():
    """The literal twin: xxh3 of type, shape and bytes, tensor by tensor, of whatever shares its memory."""
    import xxhash

    whole = torch.randn(6, 5).bfloat16()
    own = {"whole": whole, "again": whole, "part": whole[2:4], "turned": whole.t(), "one": torch.tensor(3)}
    for name, digest in tensor_digests(own).items():
        x = own[name]
        raw = x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert digest == xxhash.xxh3_128_hexdigest(f"{x.dtype}{tuple(x.shape)}\n".encode() + raw)


@needs_cuda
def test_a_gpu_changes_nothing(llama):
    own = {"small": torch.randn(7), "large": torch.randn(3, 12_000_001), "turned": torch.randn(300, 200).t()}
    own |= {"empty": torch.empty(0), "half": torch.randn(33).half(), "none": torch.tensor(True)}
    assert tensor_digests({n: x.cuda() for n, x in own.items()}) == tensor_digests(own)
    assert fingerprint(copy.deepcopy(llama).cuda()) == fingerprint(llama)


def test_what_a_tensor_is_made_of_counts():
    from torch.testing._internal.two_tensor import TwoTensor

    parts = torch.arange(4.0), torch.ones(4)
    digest = tensor_digest(TwoTensor(*parts))
    assert digest == tensor_digest(nn.Parameter(TwoTensor(*(x.clone() for x in parts)), requires_grad=False))
    for i in range(2):
        other = [x.clone() for x in parts]
        other[i][3] += 1
        assert tensor_digest(TwoTensor(*other)) != digest
    assert tensor_digest(TwoTensor(*reversed(parts))) != digest


def test_quantised_weights_count(llama):
    quantization = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(llama)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    before = fingerprint(model)
    assert before != fingerprint(llama)
    weight = model.model.layers[1].mlp.up_proj.weight
    inner = getattr(weight, weight.__tensor_flatten__()[0][0])
    inner.view(-1)[-1] ^= 1
    assert fingerprint(model) != before


def test_the_sum_on_a_device_sees_the_order_of_entries():
    x = torch.randn(40, 30)
    swapped = [x[torch.tensor([1, 0, *range(2, 40)])], x.flip(0), x.flip(1), -x, x.roll(1)]
    assert len({int(multilinear(one)) for one in [x, *swapped]}) == 6
    assert int(multilinear(x)) == int(multilinear(x.clone()))


# ------------------------------------------------------------------------------------------------ places and names
def test_copies_shards_and_names_do_not_count(llama, saved, tmp_path):
    before = fingerprint(llama)
    llama.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    shutil.copytree(saved, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    named = {
        "transformers_version": "4.1.0",
        "_name_or_path": "elsewhere",
        "torch_dtype": "float32",
        "architectures": None,
    }
    named |= {"id2label": {"0": "x"}, "use_cache": False}
    path.write_text(
        json.dumps({key: v for key, v in json.loads(path.read_text()).items() if key != "dtype"} | named)
    )
    for folder in (saved, tmp_path / "shards", tmp_path / "copy"):
        assert fingerprint(reading(folder)) == before


def test_weights_that_are_elsewhere_count(saved, tmp_path):
    """By a device map in memory or on disk, where a model's own tensors hold no numbers."""
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file, save_file

    names = (
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(3)),
    )
    spread = {name: "disk" if name[-1] in "12" else "cpu" for name in names}
    whole = reading(saved)
    there = partial(reading, device_map=spread, offload_folder=tmp_path / "offloaded")
    model = there(saved)
    assert sum(weight.is_meta for weight in model.parameters()) == 18
    assert identity(model) == identity(whole)

    shutil.copytree(saved, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][5, 7] += 1e-6
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert fingerprint(there(tmp_path / "other")) != fingerprint(whole)

    from accelerate import cpu_offload

    kept = cpu_offload(reading(saved), execution_device="cpu")
    assert all(weight.is_meta for weight in kept.parameters())
    assert identity(kept) == identity(whole)


def test_a_model_without_numbers_is_refused():
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
        )
    with pytest.raises(AnchorsError, match=r"embed_tokens\.weight has no numbers"):
        fingerprint(model)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma3_window", "nsa"])
def test_neither_loading_nor_running_counts(family, tokenizer):
    model = make(family, len(tokenizer))
    before = identity(model, tokenizer)
    lm = load(model, tokenizer=tokenizer, device="cpu")
    assert lm.identity == before
    lm.tokenizer(["a", "a b c"], truncation=True, max_length=2)
    with torch.no_grad():
        lm.logits_at(torch.arange(40)[None], torch.tensor([39]))
    assert lm.identity == before
    assert lm.fingerprint == fingerprint(model, tokenizer) != fingerprint(model)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_what_ran_before_does_not_count(kind):
    """Such families rewrite their frequencies from the length of each prompt."""
    rope = {"rope_type": kind, "rope_theta": 1e4}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {"factor": 4.0}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    if kind == "longrope":
        sizes |= {"pad_token_id": 0, "original_max_position_embeddings": 16}
    config, model = (Phi3Config, Phi3ForCausalLM) if kind == "longrope" else (LlamaConfig, LlamaForCausalLM)
    model = model(config(**sizes, rope_parameters=rope, max_position_embeddings=32)).eval()
    before, frequencies = fingerprint(model), model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        model(torch.arange(40)[None])
    assert not torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert fingerprint(model) == before


# ------------------------------------------------------------------------------------------------ configuration
@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        ("llama", {"num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1}),
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama", {"hidden_act": "relu"}),
        ("llama", {"max_position_embeddings": 256}),
        ("gpt2", {"n_head": 2}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("mistral_window", {"sliding_window": 8}),
        ("mistral_window", {"sliding_window": None}),
        ("gemma2_softcap_window", {"attn_logit_softcapping": 30.0}),
        ("gemma2_softcap_window", {"final_logit_softcapping": None}),
        ("gpt_oss_sinks", {"num_experts_per_tok": 2}),
        ("nsa", {"n": 5}),
        ("nsa", {"compressed_rope": "none"}),
    ],
)
def test_what_the_configuration_decides_counts(family, change, tmp_path):
    """No weight shows it."""
    make(family, 50).save_pretrained(tmp_path)
    before = fingerprint(reading(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert fingerprint(reading(tmp_path)) != before


def edited(**names):
    def edit(model):
        for path, value in names.items():
            *home, name = path.split("__")
            setattr(model.get_submodule(".".join(home)), name, value)

    return edit


def rows_swapped(model):
    table = model.get_input_embeddings().weight.data
    table[[3, 7]] = table[[7, 3]]


def heads_off(model):
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[:, 8:] = 0


def frequencies(change):
    return lambda model: model.model.rotary_emb.inv_freq.copy_(change(model.model.rotary_emb.inv_freq))


@pytest.mark.parametrize(
    "change",
    [
        rows_swapped,
        heads_off,
        frequencies(lambda x: x * 1.01),
        frequencies(lambda x: x.bfloat16().float()),
        edited(model__layers__1__self_attn__scaling=0.1),
        edited(model__layers__0__self_attn__is_causal=False),
        edited(model__norm__variance_epsilon=0.1),
        edited(model__layers__2__mlp__act_fn=nn.ReLU()),
        edited(model__layers__2__mlp__gate_proj=nn.Identity()),
    ],
)
def test_a_model_changed_in_place_is_another_one(change, llama):
    model = copy.deepcopy(llama)
    assert fingerprint(model) == fingerprint(llama)
    change(model)
    assert fingerprint(model) != fingerprint(llama)


def test_adapters_count():
    """Their weights, their scale, and whether they are on."""
    peft = pytest.importorskip("peft")
    how = partial(peft.LoraConfig, r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(make("llama", 50), how(lora_alpha=4))
    model = wrapped.base_model.model
    scales = [m.scaling for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    seen = [fingerprint(model)]
    assert identity(model).digest == seen[0]
    for scale in scales:
        scale["default"] *= 2
    seen.append(fingerprint(model))
    for scale in scales:
        scale["default"] /= 2
    with wrapped.disable_adapter():
        seen.append(fingerprint(model))
    assert fingerprint(model) == seen[0]
    wrapped.add_adapter("two", how(lora_alpha=4))
    seen.append(fingerprint(model))
    wrapped.set_adapter("two")
    seen.append(fingerprint(model))
    wrapped.merge_adapter()
    seen.append(fingerprint(model))
    assert len(set(seen)) == 6


def test_the_tokenizer_counts(tokenizer, llama):
    before = identity(llama, tokenizer)
    other = copy.deepcopy(tokenizer)
    assert identity(llama, other) == before
    other.add_tokens(["<extra>"])
    after = identity(llama, other)
    assert {part for part in after.parts if after.parts[part] != before.parts[part]} == {"tokenizer"}


def test_special_tokens_that_are_split_as_text_count(tokenizer, llama):
    other = copy.deepcopy(tokenizer)
    other.split_special_tokens = True
    assert other("a<s>b")["input_ids"] != tokenizer("a<s>b")["input_ids"]
    assert identity(llama, other).parts["tokenizer"] != identity(llama, tokenizer).parts["tokenizer"]


# ------------------------------------------------------------------------------------------------ code
OWN_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM

from .factors import factor


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids=None, attention_mask=None, **options):
        found = super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
        found.logits = found.logits * factor()
        return found
"""


def test_all_files_of_code_that_comes_with_a_model_count(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    prints, logits = [], []
    for name, factor in (("one", 1.0), ("copied", 1.0), ("other", 3.0)):
        folder = tmp_path / name
        shutil.copytree(saved, folder)
        (folder / "own_model.py").write_text(OWN_MODEL)
        (folder / "factors.py").write_text(f"def factor():\n    return {factor}\n")
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
        config["auto_map"] = {
            "AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        model = reading(folder, trust_remote_code=True)
        prints.append(fingerprint(model))
        logits.append(model(torch.arange(9)[None]).logits)
    assert torch.equal(logits[0] * 3, logits[2])
    assert prints[0] == prints[1] != prints[2]


def test_code_that_cannot_be_known_again_is_told_of(tokenizer, tmp_path):
    lm = load(make("gpt2", len(tokenizer)), tokenizer=tokenizer, device="cpu")
    how, data = Sample(examples=2), read(TASK)
    first = measure(lm, Classification(), TASK, data, how, out=tmp_path)
    assert not first.notes
    hook = lm.model.transformer.h[1].register_forward_hook(lambda module, args, out: out * 0.5)
    assert lm.fingerprint != lm.fingerprint
    for count in (2, 3):  # never taken up
        found = measure(lm, Classification(), TASK, data, how, out=tmp_path)
        assert "cannot be known again" in found.notes[0]
        assert "transformer.h.1" in found.notes[0]
        assert not found.rows["value"].equals(first.rows["value"])
        assert len(list((tmp_path / "runs").iterdir())) == count
    hook.remove()
    assert lm.identity.parts == first.config["model"]
    lm.model.transformer.h[0].mlp.forward = lambda x: x
    assert lm.identity.unknown


class Halved(nn.Module):
    """A module of somebody's own."""

    def forward(self, x):
        return x / 2


def test_the_text_of_a_class_counts():
    kind = identities._kind(Halved())
    assert kind[0] == "Halved"
    assert "return x / 2" in kind[1]
    assert len(identities._kind(nn.Linear(2, 2))) == 1


# ------------------------------------------------------------------------------------------------ what runs are named by
def test_a_run_reads_the_model_as_it_is_then(tokenizer, tmp_path):
    lm = load(make("gpt2", len(tokenizer)), tokenizer=tokenizer, device="cpu")
    data, how = read(TASK), Sample(examples=2)
    before = measure(lm, Classification(), TASK, data, how, out=tmp_path)
    lm.model.transformer.h[2].mlp.c_proj.weight.data[1] = 0
    after = measure(lm, Classification(), TASK, data, how, out=tmp_path)
    alone = measure(lm, Classification(), TASK, data, how)
    assert after.rows.equals(alone.rows)
    assert not after.rows["value"].equals(before.rows["value"])
    assert len(after.notes) == 1
    assert str(before.folder) in after.notes[0]
    assert "(weights)" in after.notes[0]
    assert not measure(lm, Classification(), TASK, data, how, out=tmp_path).notes


def test_an_identity_that_is_held_is_not_read_again(gpt2, monkeypatch):
    found = gpt2.identity
    monkeypatch.setattr(identities, "tensors", lambda model: pytest.fail("read again"))
    with held(gpt2.model, found):
        assert gpt2.identity is found
        assert gpt2.fingerprint == found.digest
    with pytest.raises(pytest.fail.Exception):
        _ = gpt2.fingerprint


def test_a_file_counts_by_what_is_in_it(gpt2, make_cell, tmp_path):
    cell = make_cell(examples=2)
    _, beta = Reweighting(epochs=1, per_class=1, learning_rate=0.5).prepare(gpt2, cell)
    path, data, how = tmp_path / "mine.safetensors", cell.data, Sample(examples=2)
    beta.save(path, {"fingerprint": gpt2.fingerprint})
    shutil.copy(path, tmp_path / "copy.safetensors")
    one, other = (
        config_of(gpt2, Reweighting(beta=str(tmp_path / name)), cell.task, data, how)
        for name in ("mine.safetensors", "copy.safetensors")
    )
    assert one == other
    first = measure(gpt2, Reweighting(beta=str(path)), cell.task, data, how, out=tmp_path / "out").rows
    beta.beta.neg_()
    beta.save(path, {"fingerprint": gpt2.fingerprint})
    again = measure(gpt2, Reweighting(beta=str(path)), cell.task, data, how, out=tmp_path / "out").rows
    changed = again["condition"] == "reweighted"
    assert not again.loc[changed, "value"].equals(first.loc[changed, "value"])
    assert again.loc[~changed, "value"].equals(first.loc[~changed, "value"])
    with pytest.raises(AnchorsError, match="does not hold a fitted β: No such file"):
        measure(gpt2, Reweighting(beta=str(tmp_path / "none")), cell.task, data, how, out=tmp_path / "out")


def test_beta_belongs_to_its_model(gpt2, make_cell, tokenizer):
    cell = make_cell(examples=2)
    _, beta = Reweighting(epochs=1, per_class=1).prepare(gpt2, cell)
    kept = type(beta).load(cell.folder / f"beta-{cell.how.seed}.safetensors")
    kept.demand(gpt2)
    model = make("gpt2", len(tokenizer))
    model.transformer.h[0].attn.c_attn.weight.data[0, 0] += 1e-6
    other = load(model, tokenizer=tokenizer, device="cpu")
    with pytest.raises(AnchorsError, match="with other weights, adapters, configuration or tokenizer"):
        kept.demand(other)
    old = type(beta)(beta.beta, beta.classes, facts={"fingerprint": "0123456789abcdef", "model": "tiny"})
    with pytest.raises(AnchorsError, match="a sample of the weights only"):
        old.demand(gpt2)
