"""GGUF files compute what the model that they were written from computes, or are refused by the key or tensor."""

import struct

import gguf
import gguf_files as made
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from anchors.errors import AnchorsError
from anchors.gguf import converted
from anchors.gguf.architectures import ARCHITECTURES, configuration
from anchors.gguf.reading import read
from anchors.gguf.weights import parameters
from anchors.model.language import load

VARIANTS = made.variants()
WORDS = made.sentencepiece_keys(["the cat sat on the mat", "it's 2024 now"] * 3)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ANCHORS_CACHE", str(tmp_path / "cache"))


def file_of(path, name="llama", keys=None, tensors=None, config=None, **options):
    """The file of a variant, with keys and tensors added, changed or (None) left out; and its model."""
    arch, own, more, factors = VARIANTS[name]
    model = made.model(config or own)
    stated = made.stated(arch, model.config) | more | WORDS | (keys or {})
    laid = made.laid_out(arch, model) | factors | (tensors or {})
    return made.write(path / f"{name}.gguf", arch, stated, laid, **options), model


def logits_of(path, ids):
    model = AutoModelForCausalLM.from_pretrained(converted(path), attn_implementation="eager")
    with torch.no_grad():
        return model(ids).logits


def own_logits(model, ids):
    """Of an untouched model of the same configuration: some keep frequencies from when they were built."""
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    fresh.set_attn_implementation("eager")
    with torch.no_grad():
        return fresh.eval()(ids).logits


def assert_same(path, model, length=40, tolerance=1e-5):
    ids = torch.randint(0, 512, (2, length), generator=torch.Generator().manual_seed(0))
    got, right = logits_of(path, ids), own_logits(model, ids)
    assert right.std() > 0.1
    assert (got - right).norm() < tolerance * right.norm()


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_the_function_is_that_of_the_model_written(tmp_path, name):
    path, model = file_of(tmp_path, name)
    assert_same(path, model)


def test_every_architecture_is_tried():
    assert {arch for arch, *_ in VARIANTS.values()} == set(ARCHITECTURES)


def test_scalings_change_the_function():
    """Else the comparison above would hold of files whose scaling is not read."""
    ids = torch.arange(40)[None] * 7 % 512
    for name, plain in (("llama-llama3", "llama"), ("llama-linear", "llama"), ("gemma3-linear", "gemma3"), ("qwen2-yarn", "qwen2"), ("phi3-longrope", "phi3")):  # fmt: skip
        scaled, unscaled = (own_logits(made.model(VARIANTS[n][1]), ids) for n in (name, plain))
        assert (scaled - unscaled).norm() > 1e-3 * unscaled.norm(), name


@pytest.mark.parametrize("context", [32, 64, 500])
def test_factors_of_llama_3_are_recognised(tmp_path, context):
    factors = np.array([made.llama3_factor(5000.0 ** (i / 4), context) for i in range(4)], np.float32)
    path, _ = file_of(tmp_path, tensors={"rope_freqs.weight": factors})
    rope = configuration(read(path)).rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("llama3", 8.0)


def test_any_other_factors_are_applied_as_they_are(tmp_path):
    factors = np.array([1.5, 0.7, 3.0, 11.0], np.float32)
    path, model = file_of(tmp_path, tensors={"rope_freqs.weight": factors})
    with torch.no_grad():
        rotary = model.model.rotary_emb
        rotary.inv_freq /= torch.tensor(factors)
    ids = torch.arange(300)[None] * 7 % 512  # beyond the context, too: nothing switches there
    with torch.no_grad():
        right = model(ids).logits
    assert (logits_of(path, ids) - right).norm() < 1e-5 * right.norm()


@pytest.mark.parametrize("length", [20, 60])
def test_longrope_on_both_sides_of_its_threshold(tmp_path, length):
    config = made.copy.deepcopy(VARIANTS["phi3-longrope"][1])
    config.original_max_position_embeddings = config.rope_parameters["original_max_position_embeddings"] = 32
    path, model = file_of(
        tmp_path, "phi3-longrope", {"rope.scaling.original_context_length": 32}, config=config
    )
    assert_same(path, model, length)


@pytest.mark.parametrize(("name", "layers", "kinds"), [
    ("gemma3", 62, (["sliding_attention"] * 5 + ["full_attention"]) * 11),
    ("gemma2", 46, ["sliding_attention", "full_attention"] * 23),
])  # fmt: skip
def test_gemma_of_27b_divides_by_another_root(tmp_path, name, layers, kinds):
    config = made.copy.deepcopy(VARIANTS[name][1])
    config.num_hidden_layers, config.query_pre_attn_scalar = layers, 32 // 4
    config.layer_types = kinds[:layers]
    path, model = file_of(tmp_path, name, config=config)
    assert_same(path, model)


@pytest.mark.parametrize("pattern", [2, [True, False, False, True, True, False, True]])
def test_patterns_of_windows(tmp_path, pattern):
    sliding = pattern if isinstance(pattern, list) else [layer % 2 == 0 for layer in range(7)]
    config = made.copy.deepcopy(VARIANTS["gemma3"][1])
    config.layer_types = ["sliding_attention" if s else "full_attention" for s in sliding]
    path, model = file_of(tmp_path, "gemma3", {"attention.sliding_window_pattern": pattern}, config=config)
    assert_same(path, model)


def test_absent_keys_have_llama_cpps_defaults(tmp_path):
    config = made.copy.deepcopy(VARIANTS["gemma3"][1])
    config.rope_parameters["sliding_attention"]["rope_theta"] = config.rope_parameters["full_attention"][
        "rope_theta"
    ] = 1e4
    config.final_logit_softcapping, config.sliding_window, config.layer_types = (
        None,
        256,
        ["full_attention"] * 7,
    )
    left_out = ("rope.freq_base", "rope.freq_base_swa", "final_logit_softcapping", "attention.sliding_window")
    path, model = file_of(tmp_path, "gemma3", dict.fromkeys(left_out), config=config)
    assert_same(path, model)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_tied_and_untied(tmp_path, tied):
    config = made.copy.deepcopy(VARIANTS["llama"][1])
    config.tie_word_embeddings = tied
    path, model = file_of(tmp_path, config=config)
    assert ("output.weight" in read(path).tensors) is not tied
    assert_same(path, model)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q5_1", "Q8_0"])
def test_quantised_weights_are_ggufs_numbers(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    plain = gguf.GGMLQuantizationType.F32
    path, model = file_of(
        tmp_path, "qwen3", quantise=lambda _, w: plain if w.ndim == 1 or w.shape[-1] % 32 else kind
    )
    file = read(path)
    for name, laid in made.laid_out("qwen3", model).items():
        right = laid if file.tensors[name].type == plain else gguf.dequantize(gguf.quantize(laid, kind), kind)
        np.testing.assert_array_equal(file.array(name), right)
    assert any(tensor.type == kind for tensor in file.tensors.values())
    weight = parameters(file, configuration(file))[1]["model.layers.1.mlp.gate_proj.weight"]
    np.testing.assert_array_equal(weight.numpy(), file.array("blk.1.ffn_gate.weight"))


KEYS = {
    "llama": {
        "attention.clamp_kqv": 8.0, "attention.scale": 0.1, "attention.sliding_window": 16, "attention.causal": False,
        "attention.value_length": 16, "attention.max_alibi_bias": 8.0, "attention.layer_norm_epsilon": 1e-5,
        "attention.temperature_scale": 0.1, "attention.head_count_kv": [2, 4], "attention.head_count": 3,
        "logit_scale": 0.5, "embedding_scale": 12.0, "residual_scale": 0.2, "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0, "expert_count": 4, "expert_weights_scale": 2.5, "pooling_type": 1,
        "rope.dimension_count": 4, "rope.dimension_sections": [2, 2, 0, 0], "rope.scaling.alpha": 2.0,
        "rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.3, "rope.scaling.yarn_log_multiplier": 0.1,
        "rope.freq_base_swa": 1e4, "vocab_size": 500, "block_count": 3, "something.nobody.knows": 1,
        "leading_dense_block_count": 1, "nextn_predict_layers": 1, "swin_norm": True, "attention.key_length_mla": 3,
    },
    "qwen3moe": {
        "expert_gating_func": 2, "expert_weights_norm": False, "expert_weights_scale": 2.0, "expert_group_count": 2,
        "expert_shared_count": 1,
    },
    "qwen2moe": {"expert_weights_norm": True},
    "gemma2": {"rope.freq_base_swa": 1e6, "attention.sliding_window_pattern": [True]},
    "gemma3": {"rope.scaling.type": "yarn", "attn_logit_softcapping": 50.0},
    "stablelm": {"use_parallel_residual": True},
    "granite": {"rope.scaling.finetuned": False},
    "falcon": {"tensor_data_layout": "meta"},
    "bloom": {"attention.max_alibi_bias": 4.0, "feed_forward_length": 48},
    "gpt2": {"attention.clamp_kqv": 8.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "key", "value"), [(n, k, v) for n, some in KEYS.items() for k, v in some.items()]
)
def test_keys_that_are_not_understood_are_refused_by_name(tmp_path, name, key, value):
    more = {"rope.scaling.factor": 2.0} if value == "yarn" else {}
    path, _ = file_of(tmp_path, name, {key: value, **more})
    said = {"attention.head_count": "do not divide", "rope.scaling.type": "scal"}.get(
        key, key.replace(".", r"\.")
    )
    with pytest.raises(AnchorsError, match=said):
        configuration(read(path))


@pytest.mark.parametrize("keys", [
    {"general.sampling.temp": 0.7, "general.some.remark": "x", "quantize.imatrix.entries_count": 3},
    {"rope.scaling.finetuned": True, "vocab_size": 512, "attention.causal": True, "expert_count": 0},
    {"tokenizer.ggml.eot_token_id": 5, "tokenizer.chat_template": "{{ x }}", "tokenizer.ggml.add_eos_token": False},
    {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
    {"attention.head_count_kv": [2, 2], "feed_forward_length": [48, 48]},
])  # fmt: skip
def test_keys_that_change_nothing_are_read_over(tmp_path, keys):
    path, model = file_of(tmp_path, "llama", keys)
    assert_same(path, model)


ONES = np.ones(8, np.float32)


@pytest.mark.parametrize(("name", "tensor", "values", "said"), [
    ("llama", "blk.0.attn_q_norm.weight", ONES, r"blk\.0\.attn_q_norm\.weight has no place in a LlamaForCausalLM"),
    ("qwen2", "blk.1.attn_output.bias", np.ones(32, np.float32), "attn_output.bias has no place"),
    ("llama", "blk.0.attn_sinks.weight", ONES, "attn_sinks.weight has no place"),
    ("llama", "nobody.knows", ONES, "nobody.knows has no place"),
    ("bloom", "rope_freqs.weight", ONES, "rope_freqs.weight has no place"),
    ("llama", "rope_freqs.weight", ONES, "rope_freqs.weight does not hold 4 positive numbers"),
    ("llama", "blk.1.ffn_norm.weight", None, "no tensor blk.1.ffn_norm.weight for model.layers.1"),
    ("llama", "blk.0.attn_q.bias", np.ones(32, np.float32), "no tensor .*attn_k.bias"),
    ("llama", "output_norm.weight", ONES, "output_norm.weight has the shape"),
    ("llama", "token_embd.weight", None, "no tensor token_embd.weight"),
    ("qwen3moe", "blk.0.ffn_up_exps.weight", None, "no tensor blk.0.ffn_up_exps.weight"),
    ("qwen3moe", "blk.0.exp_probs_b.bias", np.ones(4, np.float32), "exp_probs_b.bias has no place"),
    ("phi3", "rope_factors_long.weight", np.ones(2, np.float32), "rope_factors_short.weight and rope_factors_long"),
])  # fmt: skip
def test_tensors_are_accounted_for_on_both_sides(tmp_path, name, tensor, values, said):
    path, _ = file_of(tmp_path, name, tensors={tensor: values})
    with pytest.raises(AnchorsError, match=said):
        converted(path)


def test_the_table_is_that_of_ggufs_own_reader(tmp_path):
    path, _ = file_of(
        tmp_path, "gemma3", {"attention.sliding_window_pattern": [True] * 7, "general.name": "ñ"}
    )
    file, twin = read(path), gguf.GGUFReader(path)
    right = {name: field.contents() for name, field in twin.fields.items() if not name.startswith("GGUF.")}
    assert file.keys == right
    assert list(file.tensors) == [tensor.name for tensor in twin.tensors]
    for tensor in twin.tensors:
        ours = file.tensors[tensor.name]
        assert (ours.start, ours.size, ours.type) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(file.array(tensor.name), tensor.data)


@pytest.mark.parametrize(("change", "said"), [
    (lambda b: b"", "does not begin with the letters GGUF"),
    (lambda b: b"GGML" + b[4:], "does not begin with the letters GGUF"),
    (lambda b: b[:4], "cut short"),
    (lambda b: b[:200], "cut short: its header goes on beyond its 200 bytes"),
    (lambda b: b[:-100], "cut short: .* bytes of"),
    (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], "version 1"),
    (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "version 50331648"),
])  # fmt: skip
def test_reasons_why_a_file_cannot_be_read_are_true(tmp_path, change, said):
    path, _ = file_of(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(AnchorsError, match=f"cannot be read: .*{said}"):
        converted(path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("arch", "keys", "said"), [
    ("llama", {"split.count": 3, "split.no": 0}, "one of 3 parts.*\n.*merge"),
    ("llama", {"general.type": "adapter"}, "a LoRA adapter"),
    ("clip", {}, "the vision part"),
    ("mamba", {}, "architecture 'mamba' are not converted here, only those of bloom"),
])  # fmt: skip
def test_files_that_are_no_whole_language_model(tmp_path, arch, keys, said):
    path = made.write(
        tmp_path / "x.gguf", arch, keys | WORDS, {"token_embd.weight": np.ones((4, 4), np.float32)}
    )
    with pytest.raises(AnchorsError, match=said):
        converted(path)


def test_a_part_is_known_by_its_name_and_a_directory_is_none(tmp_path):
    path, _ = file_of(tmp_path)
    part = path.rename(tmp_path / "x-00001-of-00002.gguf")
    with pytest.raises(AnchorsError, match="one of 2 parts"):
        converted(part)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(AnchorsError, match="is a directory"):
        converted(tmp_path / "folder.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path, _ = file_of(tmp_path_factory.mktemp("gguf"))
    return path.read_bytes()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_refused_or_harmless(whole, tmp_path, data):
    """Whatever byte is hit, before the tensors' numbers: a refusal in a sentence, or a configuration."""
    spots = data.draw(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=4))
    blob = bytearray(whole)
    for at, value in spots:
        blob[at] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(blob[: data.draw(st.sampled_from([len(blob), len(blob), 700, len(blob) - 1]))])
    try:
        file = read(path)
        parameters(file, configuration(file))
    except AnchorsError as error:
        assert error.remedy


def test_loading_puts_it_on_the_seam(tmp_path):
    path, model = file_of(tmp_path, "llama-llama3")
    lm = load(str(path), device="cpu")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        got, right = lm.model(ids).logits, own_logits(model, ids)
    assert (got - right).norm() < 1e-5 * right.norm()
    assert lm.tokenizer("").input_ids == [1]
