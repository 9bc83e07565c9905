"""Tiny models of every architecture that is converted, and their GGUF files, laid out as llama.cpp's converter does."""

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as t
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 512}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
BASE = GROUPED | {"rope_parameters": ROPE, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
EPS = 3e-4
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
BOTH = {"full_attention": {"rope_type": "default", "rope_theta": 8e5}, "sliding_attention": ROPE}
SLIDING = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]

# Every value that a key of the file states is another one than transformers' default.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": t.LlamaConfig(**BASE, rms_norm_eps=EPS),
    "granite": t.GraniteConfig(
        **BASE, rms_norm_eps=EPS, logits_scaling=0.3, embedding_multiplier=3.0, residual_multiplier=0.7,
        attention_multiplier=0.2, tie_word_embeddings=True,
    ),
    "qwen2": t.Qwen2Config(**BASE, rms_norm_eps=EPS, tie_word_embeddings=True),
    "qwen3": t.Qwen3Config(**BASE, rms_norm_eps=EPS, head_dim=16),
    "qwen2moe": t.Qwen2MoeConfig(
        **BASE, rms_norm_eps=EPS, **EXPERTS, shared_expert_intermediate_size=24, norm_topk_prob=False
    ),
    "qwen3moe": t.Qwen3MoeConfig(**BASE, rms_norm_eps=EPS, **EXPERTS, head_dim=16, norm_topk_prob=True),
    "phi3": t.Phi3Config(
        **BASE | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, rms_norm_eps=EPS, sliding_window=None
    ),
    "gemma": t.GemmaConfig(**BASE, rms_norm_eps=EPS, head_dim=16, hidden_act="gelu_pytorch_tanh"),
    "gemma2": t.Gemma2Config(
        **BASE, rms_norm_eps=EPS, head_dim=16, query_pre_attn_scalar=16, sliding_window=9,
        attn_logit_softcapping=3.0, final_logit_softcapping=2.0,
    ),
    "gemma3": t.Gemma3TextConfig(
        **BASE | {"rope_parameters": BOTH, "num_hidden_layers": 7}, rms_norm_eps=EPS, head_dim=16,
        query_pre_attn_scalar=16, sliding_window=9, layer_types=SLIDING, final_logit_softcapping=2.0,
    ),
    "starcoder2": t.Starcoder2Config(
        **BASE, norm_epsilon=EPS, use_bias=True, sliding_window=None, hidden_act="gelu_pytorch_tanh"
    ),
    "stablelm": t.StableLmConfig(
        **BASE | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, layer_norm_eps=EPS, use_qkv_bias=True,
        use_parallel_residual=False,
    ),
    "nemotron": t.NemotronConfig(
        **BASE | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, norm_eps=EPS, head_dim=8
    ),
    "falcon": t.FalconConfig(
        **BASE, num_kv_heads=2, layer_norm_epsilon=EPS, new_decoder_architecture=True, ffn_hidden_size=48, bias=False
    ),
    "gpt2": t.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=256, vocab_size=512, layer_norm_epsilon=EPS,
        bos_token_id=0, eos_token_id=0,
    ),
    "bloom": t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=512, layer_norm_epsilon=EPS),
}  # fmt: skip


def model(config: PreTrainedConfig, seed: int = 0, gain: float = 0.25) -> PreTrainedModel:
    """A model whose logits tell any change of a norm, a scale or a frequency."""
    torch.manual_seed(seed)
    made = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).float().eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            shift = 1.0 if "norm" in name.lower().rsplit(".", 2)[-2] or ".ln_" in name else 0.0
            shift = (
                0.0 if name.endswith("bias") or config.model_type.startswith(("gemma", "nemotron")) else shift
            )
            weight.copy_(shift + gain * torch.randn_like(weight))
    return made


def stated(arch: str, c: PreTrainedConfig) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for a configuration, without the architecture's name in front."""
    # A copy in plain values: attribute_map gives GPT-2 and Bloom the common names.
    rope = getattr(c, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    heads = c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    eps = next(v for v in (getattr(c, n, None) for n in (
        "rms_norm_eps", "norm_epsilon", "layer_norm_eps", "norm_eps", "layer_norm_epsilon")) if v is not None)  # fmt: skip
    rms = hasattr(c, "rms_norm_eps")
    wide = (
        getattr(c, "ffn_hidden_size", None)
        or getattr(c, "intermediate_size", None)
        or getattr(c, "n_inner", None)
    )
    keys: dict[str, Any] = {
        "context_length": getattr(c, "max_position_embeddings", 256),
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": wide or 4 * c.hidden_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(c, "num_kv_heads", None)
        or getattr(c, "num_key_value_heads", heads),
        f"attention.layer_norm_{'rms_' if rms else ''}epsilon": float(eps),
    }
    if rope:
        keys["rope.freq_base"] = float(rope["rope_theta"])
    if rope and arch in ("llama", "granite", "phi3", "stablelm", "nemotron"):
        keys["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if arch in ("qwen3", "qwen3moe", "gemma", "gemma2", "gemma3"):
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch.endswith("moe"):
        keys |= {"expert_count": c.num_experts, "expert_used_count": c.num_experts_per_tok}
        keys["expert_feed_forward_length"] = c.moe_intermediate_size
    match arch:
        case "qwen2moe":
            keys["expert_shared_feed_forward_length"] = c.shared_expert_intermediate_size
        case "granite":
            keys |= {"attention.scale": c.attention_multiplier, "embedding_scale": c.embedding_multiplier}
            keys |= {"residual_scale": c.residual_multiplier, "logit_scale": c.logits_scaling}
        case "phi3":
            keys["attention.sliding_window"] = c.sliding_window or 0
        case "gemma2":
            keys["attn_logit_softcapping"] = c.attn_logit_softcapping
            keys |= {
                "final_logit_softcapping": c.final_logit_softcapping,
                "attention.sliding_window": c.sliding_window,
            }
        case "gemma3":
            keys["rope.freq_base_swa"] = c.rope_parameters["sliding_attention"]["rope_theta"]
            keys |= {
                "final_logit_softcapping": c.final_logit_softcapping,
                "attention.sliding_window": c.sliding_window,
            }
        case "stablelm":
            keys["use_parallel_residual"] = c.use_parallel_residual
        case "nemotron":
            keys["rope.scaling.type"] = "none"
        case "falcon":
            keys["tensor_data_layout"] = "jploski"
    return keys


def laid_out(arch: str, m: PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors that llama.cpp's converter writes for a model, in float32."""
    c = m.config
    tied = set(m.all_tied_weights_keys)
    weights = {name: w.float() for name, w in m.state_dict().items() if name not in tied}
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch], c.num_hidden_layers)
    tensors = {}
    for name, w in weights.items():
        if arch == "bloom":
            name = name.removeprefix("transformer.")
        if name.endswith("experts.gate_up_proj"):
            layer, middle = name.split(".")[2], w.shape[1] // 2
            tensors[f"blk.{layer}.ffn_gate_exps.weight"] = w[:, :middle]
            tensors[f"blk.{layer}.ffn_up_exps.weight"] = w[:, middle:]
            continue
        if name.endswith("experts.down_proj"):
            tensors[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = w
            continue
        if arch in ("llama", "granite") and ("q_proj" in name or "k_proj" in name):
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            pairs = [zip(*head.chunk(2), strict=True) for head in w.chunk(heads)]
            w = torch.stack([row for head in pairs for pair in head for row in pair])
        if (arch.startswith("gemma") or arch == "nemotron") and name.endswith("norm.weight"):
            w = w + 1
        if arch == "gpt2" and any(part in name for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            w = w.T
        if arch == "bloom" and "query_key_value" in name:
            by_head = w.reshape(c.n_head, 3, -1, *w.shape[1:])
            w = torch.cat([by_head[:, part].flatten(0, 1) for part in range(3)])
        if arch == "falcon" and "query_key_value" in name:
            groups = w.reshape(c.num_kv_heads, c.num_attention_heads // c.num_kv_heads + 2, -1, w.shape[-1])
            w = torch.cat([p.flatten(0, -2) for p in (groups[:, :-2], groups[:, -2], groups[:, -1])])
        if name.endswith("shared_expert_gate.weight"):
            w = w[0]
        stem, _, suffix = name.rpartition(".")
        tensors[f"{table.get_name(stem)}.{suffix}"] = w
    return {name: np.ascontiguousarray(w.numpy()) for name, w in tensors.items()}


def byte_level_keys(
    tokenizer: PreTrainedTokenizerFast, pre: str | None = "gpt-2", words: int = 512
) -> dict[str, Any]:
    """A byte-level tokenizer as keys, cut to its first `words` tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])[:words]
    kept = {word for word, _ in vocabulary}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [word for word, _ in vocabulary],
        "tokenizer.ggml.token_type": [3] + [1] * (len(vocabulary) - 1),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges if "".join(pair) in kept],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    return keys if pre is not None else {k: v for k, v in keys.items() if k != "tokenizer.ggml.pre"}


def sentencepiece_keys(texts: Iterable[str], words: int = 512) -> dict[str, Any]:
    """A small vocabulary of SentencePiece's kind: bytes, characters, and words by how often they were joined."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=words - 259, show_progress=False))
    learnt = [word for word, _ in sorted(raw.get_vocab().items(), key=lambda pair: pair[1])]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt]
    tokens += [f"[PAD{n}]" for n in range(words - len(tokens))]
    types = [2, 3, 3] + [6] * 256 + [1] * len(learnt)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types + [5] * (words - len(types)),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(n) for n in range(words - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write(
    path: Path,
    arch: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    quantise: Callable[[str, np.ndarray], gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A GGUF file. Keys without a namespace get the architecture's; None leaves a key out."""
    out = gguf.GGUFWriter(str(path), arch)
    adders = {bool: out.add_bool, int: out.add_uint32, float: out.add_float32, str: out.add_string}
    for name, value in keys.items():
        full = (
            name if name.split(".")[0] in ("general", "tokenizer", "split", "quantize") else f"{arch}.{name}"
        )
        if isinstance(value, list):
            out.add_array(full, value)
        elif value is not None:
            adders[type(value)](full, value)
    for name, values in tensors.items():
        if values is None:
            continue
        kind = quantise(name, values) if quantise else gguf.GGMLQuantizationType.F32
        if kind == gguf.GGMLQuantizationType.F32:
            out.add_tensor(name, values)
        else:
            out.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def variants() -> dict[str, tuple[str, PreTrainedConfig, dict[str, Any], dict[str, np.ndarray]]]:
    """By name: architecture, configuration, further keys, further tensors. Every architecture, every rotary scaling."""
    made = {arch: (arch, config, {}, {}) for arch, config in CONFIGS.items()}

    def with_rope(
        name: str, arch: str, rope: dict, keys: dict, tensors: dict | None = None, **more: Any
    ) -> None:
        config = copy.deepcopy(CONFIGS[arch])
        config.rope_parameters = config.rope_parameters | rope
        for field, value in more.items():
            setattr(config, field, value)
        made[name] = arch, config, keys, tensors or {}

    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}
    with_rope("llama-linear", "llama", {"rope_type": "linear", "factor": 3.0}, linear)
    with_rope(
        "llama-linear-old-key", "llama", {"rope_type": "linear", "factor": 3.0}, {"rope.scale_linear": 3.0}
    )
    with_rope(
        "qwen2-yarn", "qwen2",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
    )  # fmt: skip
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    factors = np.array([llama3_factor(5000.0 ** (i / 4), 64) for i in range(4)], np.float32)
    with_rope("llama-llama3", "llama", {"rope_type": "llama3", **llama3}, {}, {"rope_freqs.weight": factors})
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 8e5}
    with_rope("gemma3-linear", "gemma3", {"full_attention": full}, linear | {"rope.scaling.factor": 8.0})
    short, long = np.array([1.1, 1.3], np.float32), np.array([2.0, 7.0], np.float32)
    with_rope(
        "phi3-longrope", "phi3",
        {
            "rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist(),
            "original_max_position_embeddings": 512, "attention_factor": 1.2, "factor": 2.0,
        },
        {"rope.scaling.original_context_length": 512, "rope.scaling.attn_factor": 1.2},
        {"rope_factors_short.weight": short, "rope_factors_long.weight": long},
        original_max_position_embeddings=512,
        max_position_embeddings=1024,
    )  # fmt: skip
    parallel = copy.deepcopy(CONFIGS["stablelm"])
    parallel.use_parallel_residual, parallel.use_qkv_bias = True, False
    made["stablelm-parallel"] = "stablelm", parallel, {}, {}
    old = copy.deepcopy(CONFIGS["falcon"])
    old.num_kv_heads, old.new_decoder_architecture, old.multi_query = 1, False, True
    made["falcon-7b"] = "falcon", old, {}, {}
    biased = copy.deepcopy(CONFIGS["llama"])
    biased.attention_bias = biased.mlp_bias = True
    made["llama-bias"] = "llama", biased, {}, {}
    return made


def llama3_factor(wavelength_per_turn: float, context: int) -> float:
    """By how much Llama 3.1 divides a frequency, as its authors write it (llama_models, `apply_scaling`), factor 8."""
    wavelength = 2 * math.pi * wavelength_per_turn
    if wavelength < context / 4:
        return 1.0
    if wavelength > context:
        return 8.0
    smooth = (context / wavelength - 1) / (4 - 1)
    return 1 / ((1 - smooth) / 8 + smooth)
