"""What the keys of each architecture mean: a transformers configuration for what a file states, or a refusal by name.

Each function below takes every key that it understands out of `Keys`; a key that is left over is refused by its
name. A key that the file does not have takes the value that llama.cpp gives it (src/models/*.cpp, `load_arch_hparams`),
which is often another one than transformers' default. Keys under `general.`, and those that belong to other
programs, are read by no implementation of the model.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from anchors.errors import AnchorsError
from anchors.gguf.reading import GGUFFile

_REQUIRED = object()
# Llama 3.1 and later: the ramp between scaled and plain frequencies.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


# What transformers raises for values that do not go together.
NO_MODEL = (
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    RuntimeError,
    AssertionError,
    StrictDataclassError,
)


class Keys:
    """The keys of one architecture in a file. Calling takes one out; `done` refuses what nobody took."""

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.prefix = file, f"{file.architecture}."
        size = len(self.prefix)
        self.left = {name[size:]: v for name, v in file.keys.items() if name.startswith(self.prefix)}

    def __call__(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a key; one value for all layers where the file has a list of equal ones."""
        value = self.left.pop(name, default)
        if value is _REQUIRED:
            self.file.refuse(f"it has no key {self.prefix}{name}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                self.file.refuse(f"{self.prefix}{name} differs between layers")
            return value[0]
        return value

    def layers(self, name: str, default: Any) -> Any:
        """The value of a key that may be a list over layers."""
        return self.left.pop(name, default)

    def only(self, name: str, *allowed: Any) -> None:
        """Take a key that has one possible meaning here."""
        value = self(name, allowed[0])
        if value not in allowed:
            self.file.refuse(f"{self.prefix}{name} is {value!r}, and only {allowed[0]!r} is understood")

    def done(self) -> None:
        if self.left:
            names = ", ".join(f"{self.prefix}{name}" for name in sorted(self.left)[:5])
            more = f" and {len(self.left) - 5} more" if len(self.left) > 5 else ""
            self.file.refuse(f"what {names}{more} would change in {self.file.architecture} is not understood")


def configuration(file: GGUFFile) -> PreTrainedConfig:
    """The transformers configuration that a file states, with every key of its architecture accounted for.

    Raises:
        AnchorsError: an architecture or a key that is not understood, by its name; a value that makes no model.
    """
    if file.architecture not in ARCHITECTURES:
        file.refuse(
            f"models of the architecture {file.architecture!r} are not converted here, only those of "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    keys = Keys(file)
    try:
        fields = ARCHITECTURES[file.architecture](keys)
        keys.done()
        named = {"bos": "bos", "eos": "eos", "pad": "padding"}
        special = {
            f"{part}_token_id": file.keys.get(f"tokenizer.ggml.{name}_token_id")
            for part, name in named.items()
        }
        return AutoConfig.for_model(**fields, **special)
    except AnchorsError:
        raise
    except NO_MODEL as error:
        file.refuse(f"its keys make no model of the architecture {file.architecture} ({first_line(error)})")


def first_line(error: BaseException) -> str:
    return " ".join(str(error).strip().split("\n")[:2])


def _decoder(k: Keys) -> dict[str, Any]:
    """What all architectures have in common, under the names that most configurations have."""
    embedding = k.file.tensors.get("token_embd.weight")
    if embedding is None:
        k.file.refuse("it has no tensor token_embd.weight")
    hidden, heads = k("embedding_length"), k("attention.head_count")
    if not heads or hidden % heads:
        k.file.refuse(f"{heads} heads do not divide an embedding of {hidden}")
    groups = k("attention.head_count_kv", heads)
    if not groups or heads % groups:
        k.file.refuse(f"{groups} key-value heads do not divide {heads} heads")
    head_dim = k("attention.key_length", hidden // heads)
    if k("attention.value_length", hidden // heads) != head_dim:
        k.file.refuse(f"{k.prefix}attention.value_length differs from {k.prefix}attention.key_length")
    k.only("vocab_size", embedding.shape[0])
    blocks = {name.split(".")[1] for name in k.file.tensors if name.startswith("blk.")}
    k.only("block_count", len(blocks))
    k.only("attention.causal", True)
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "intermediate_size": k("feed_forward_length"),
        "max_position_embeddings": k("context_length"),
        "tie_word_embeddings": "output.weight" not in k.file.tensors,
    }


def _dense(k: Keys) -> dict[str, Any]:
    k.only("expert_count", 0)
    k.only("expert_used_count", 0)
    return _decoder(k)


def _rope(k: Keys, fields: dict[str, Any], partial: bool = False, finetuned: bool = False) -> dict[str, Any]:
    """Rotary frequencies θ^(−2i/d), and how they are scaled.

    Args:
        k: the file's keys.
        fields: those of `_decoder`.
        partial: whether transformers' class rotates only a part of each head when it is told so.
        finetuned: whether `rope.scaling.finetuned` switches the rotation off, instead of being a remark.
    """
    theta = k("rope.freq_base", 10000.0)
    rotated, head_dim = k("rope.dimension_count", fields["head_dim"]), fields["head_dim"]
    if rotated != head_dim and (not partial or int(head_dim * (rotated / head_dim)) != rotated):
        k.file.refuse(f"{k.prefix}rope.dimension_count is {rotated} of {head_dim}")
    parameters = {"rope_type": "default", "rope_theta": theta}
    if partial:
        parameters["partial_rotary_factor"] = rotated / head_dim

    k.only("rope.scaling.finetuned", True, *(() if finetuned else (False,)))
    kind = k("rope.scaling.type", "linear")
    factor = k("rope.scaling.factor", 0.0), k("rope.scale_linear", 0.0)
    factor = factor[0] or factor[1] or 1.0
    original = k("rope.scaling.original_context_length", fields["max_position_embeddings"])
    stretch = k("rope.scaling.attn_factor", 1.0)
    slow, fast = k("rope.scaling.yarn_beta_slow", 1.0), k("rope.scaling.yarn_beta_fast", 32.0)
    k.only("rope.scaling.yarn_ext_factor", 1.0 if kind == "yarn" else 0.0, -1.0)
    k.only("rope.scaling.yarn_attn_factor", 1.0)
    frequencies = _factors(k, "rope_freqs.weight", rotated)
    short, long = (_factors(k, f"rope_factors_{length}.weight", rotated) for length in ("short", "long"))
    alone = frequencies is None and kind != "yarn" and factor == 1.0
    if short is not None and long is not None and alone:
        return parameters | {
            "rope_type": "longrope",
            "short_factor": short.tolist(),
            "long_factor": long.tolist(),
            "factor": fields["max_position_embeddings"] / original,
            "original_max_position_embeddings": original,
            "attention_factor": stretch,
        }
    if short is not None or long is not None:
        k.file.refuse(
            "rope_factors_short.weight and rope_factors_long.weight do not go together with the rest"
        )
    if kind == "yarn" and frequencies is None:
        return parameters | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": stretch * (0.1 * math.log(max(factor, 1.0)) + 1.0),
            "beta_fast": fast,
            "beta_slow": slow,
        }
    if kind not in ("none", "linear"):
        k.file.refuse(f"{k.prefix}rope.scaling.type is {kind!r}")
    if stretch != 1.0:
        k.file.refuse(f"{k.prefix}rope.scaling.attn_factor is {stretch}")
    linear = factor if kind == "linear" else 1.0
    if frequencies is not None:
        if linear != 1.0:
            k.file.refuse(f"it has both rope_freqs.weight and {k.prefix}rope.scaling.factor")
        return parameters | _divided(frequencies, theta, fields["max_position_embeddings"])
    return parameters | ({"rope_type": "linear", "factor": linear} if linear != 1.0 else {})


def _factors(k: Keys, name: str, rotated: int) -> np.ndarray | None:
    if name not in k.file.tensors:
        return None
    factors = k.file.array(name)
    if factors.shape != (rotated // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
        k.file.refuse(f"{name} does not hold {rotated // 2} positive numbers")
    return factors


def _divided(factors: np.ndarray, theta: float, context: int) -> dict[str, Any]:
    """Frequencies divided by `rope_freqs.weight`: in the form of Llama 3 if that gives these numbers, else as a list.

    Llama 3: with s = (L/λ − 1)/(4 − 1) clipped to [0, 1], λ the wavelength and L the context trained on, a frequency is
    multiplied by (1 − s)/F + s. L follows from any factor between 1 and F; where there is none, powers of two are tried.
    """
    if (factors == 1.0).all():
        return {}
    wavelengths = 2 * math.pi * theta ** (np.arange(len(factors)) / len(factors))
    largest = float(factors.max())
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    share = (1 / factors - 1 / largest) / (1 - 1 / largest)
    between = (factors > 1.0) & (factors < largest)
    lengths = {round(length) for length in (wavelengths * (low + share * (high - low)))[between].tolist()}
    for length in sorted(lengths) + [2**power for power in range(4, 24)]:
        ramp = np.clip((length / wavelengths - low) / (high - low), 0, 1)
        if np.allclose(factors, 1 / ((1 - ramp) / largest + ramp), rtol=1e-5, atol=0):
            return (
                {"rope_type": "llama3", "factor": largest}
                | _LLAMA3
                | {"original_max_position_embeddings": length}
            )
    # The same list for short and long prompts: the frequencies depend on no length.
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "factor": 1.0,
        "original_max_position_embeddings": context,
        "attention_factor": 1.0,
    }


def _has(k: Keys, name: str) -> bool:
    return f"blk.0.{name}" in k.file.tensors


def _llama(k: Keys) -> dict[str, Any]:
    fields = _dense(k)
    return {
        "model_type": "llama",
        **fields,
        "rms_norm_eps": k("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(k, fields),
        "attention_bias": _has(k, "attn_q.bias"),
        "mlp_bias": _has(k, "ffn_gate.bias"),
        "hidden_act": "silu",
    }


def _granite(k: Keys) -> dict[str, Any]:
    fields = _dense(k)
    return {
        "model_type": "granite",
        **fields,
        "rms_norm_eps": k("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(k, fields, finetuned=True),
        "attention_bias": _has(k, "attn_q.bias"),
        "mlp_bias": _has(k, "ffn_gate.bias"),
        "hidden_act": "silu",
        "logits_scaling": k("logit_scale"),
        "embedding_multiplier": k("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": k("residual_scale", 0.0) or 1.0,
        "attention_multiplier": k("attention.scale", 0.0) or fields["head_dim"] ** -0.5,
    }


def _qwen2(k: Keys) -> dict[str, Any]:
    fields = _dense(k)
    if fields.pop("head_dim") * fields["num_attention_heads"] != fields["hidden_size"]:
        k.file.refuse(f"{k.prefix}attention.key_length is not the embedding divided by the heads")
    fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    return {
        "model_type": "qwen2",
        **fields,
        "rms_norm_eps": k("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(k, fields),
        "use_sliding_window": False,
        "hidden_act": "silu",
    }


def _qwen3(k: Keys) -> dict[str, Any]:
    fields = _dense(k)
    return {
        "model_type": "qwen3",
        **fields,
        "rms_norm_eps": k("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(k, fields),
        "attention_bias": False,
        "use_sliding_window": False,
        "hidden_act": "silu",
    }


def _experts(k: Keys, normalised: bool) -> dict[str, Any]:
    """Experts of Qwen: a softmax over all, the largest taken, their weights made to sum to 1 if `normalised`."""
    k.only("expert_gating_func", 1)
    k.only("expert_weights_norm", normalised)
    k.only("expert_weights_scale", 1.0, 0.0)
    k.only("expert_group_count", 0)
    k.only("expert_group_used_count", 0)
    return {
        "num_experts": k("expert_count"),
        "num_experts_per_tok": k("expert_used_count"),
        "norm_topk_prob": normalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "hidden_act": "silu",
    }


def _qwen2moe(k: Keys) -> dict[str, Any]:
    fields, experts = _decoder(k), _experts(k, normalised=False)
    width = fields["intermediate_size"]
    return {
        "model_type": "qwen2_moe",
        **fields,
        **experts,
        "rms_norm_eps": k("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(k, fields),
        "moe_intermediate_size": k("expert_feed_forward_length", width // experts["num_experts_per_tok"]),
        "shared_expert_intermediate_size": k("expert_shared_feed_forward_length", width),
        "qkv_bias": _has(k, "attn_q.bias"),
    }


def _qwen3moe(k: Keys) -> dict[str, Any]:
    fields, experts = _decoder(k), _experts(k, normalised=True)
    used = experts["num_experts_per_tok"]
    return {
        "model_type": "qwen3_moe",
        **fields,
        **experts,
        "rms_norm_eps": k("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(k, fields),
        "moe_intermediate_size": k("expert_feed_forward_length", fields["intermediate_size"] // used),
        "attention_bias": False,
    }


def _phi3(k: Keys) -> dict[str, Any]:
    """Phi-3 and 4. llama.cpp computes without the window that the file states; transformers, and we, with it."""
    fields = _dense(k)
    fields.pop("head_dim")
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    rope = _rope(k, fields | {"head_dim": head_dim}, partial=True)
    # transformers reads the context trained on from the configuration itself.
    original = rope.get("original_max_position_embeddings", fields["max_position_embeddings"])
    return {
        "model_type": "phi3",
        **fields,
        "rms_norm_eps": k("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        "sliding_window": k("attention.sliding_window", 0) or None,
        "hidden_act": "silu",
    }


def _gemma(k: Keys) -> dict[str, Any]:
    fields = _dense(k)
    return {
        "model_type": "gemma",
        **fields,
        "rms_norm_eps": k("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(k, fields),
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


def _attention_scale(fields: dict[str, Any], layers_of_27b: int) -> float:
    """What is under the root of Gemma's attention scale: the heads' size, but embedding / heads in the models of 27B.

    No key states it. llama.cpp, too, knows the 27B by the number of layers.
    """
    if fields["num_hidden_layers"] == layers_of_27b:
        return fields["hidden_size"] // fields["num_attention_heads"]
    return fields["head_dim"]


def _windows(k: Keys, layers: int, pattern: int) -> list[str]:
    """The kind of each layer: of every `pattern` layers the last sees everything, or what a list in the file says."""
    stated = k.layers("attention.sliding_window_pattern", pattern)
    if isinstance(stated, list):
        if len(stated) != layers:
            k.file.refuse(f"{k.prefix}attention.sliding_window_pattern does not have {layers} entries")
        sliding = [bool(entry) for entry in stated]
    else:
        sliding = [stated == 0 or layer % stated < stated - 1 for layer in range(layers)]
    return ["sliding_attention" if entry else "full_attention" for entry in sliding]


def _gemma2(k: Keys) -> dict[str, Any]:
    fields = _dense(k)
    rope = _rope(k, fields)
    k.only("rope.freq_base_swa", rope["rope_theta"])
    return {
        "model_type": "gemma2",
        **fields,
        "rms_norm_eps": k("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "query_pre_attn_scalar": _attention_scale(fields, layers_of_27b=46),
        "attn_logit_softcapping": k("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": k("final_logit_softcapping", 30.0) or None,
        "sliding_window": k("attention.sliding_window", 4096),
        "layer_types": _windows(k, fields["num_hidden_layers"], pattern=2),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


def _gemma3(k: Keys) -> dict[str, Any]:
    fields = _dense(k)
    window, layers = k("attention.sliding_window", 0), fields["num_hidden_layers"]
    kinds = _windows(k, layers, pattern=6) if window else ["full_attention"] * layers
    sliding = {"rope_type": "default", "rope_theta": k("rope.freq_base_swa", 10000.0)}
    full = _rope(k, fields)
    if full["rope_type"] not in ("default", "linear"):
        k.file.refuse("it scales frequencies in another way than Gemma 3 does, by one factor in some layers")
    return {
        "model_type": "gemma3_text",
        **fields,
        "rms_norm_eps": k("attention.layer_norm_rms_epsilon"),
        # Only the layers that see everything are scaled.
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        "query_pre_attn_scalar": _attention_scale(fields, layers_of_27b=62),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": k("final_logit_softcapping", 0.0) or None,
        "sliding_window": window or fields["max_position_embeddings"],
        "layer_types": kinds,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


def _whole_heads(k: Keys) -> dict[str, Any]:
    """`_dense` for classes whose heads are always embedding / heads wide."""
    fields = _dense(k)
    if fields["head_dim"] * fields["num_attention_heads"] != fields["hidden_size"]:
        k.file.refuse(f"{k.prefix}attention.key_length is not the embedding divided by the heads")
    return fields


def _starcoder2(k: Keys) -> dict[str, Any]:
    fields = _whole_heads(k)
    return {
        "model_type": "starcoder2",
        **fields,
        "norm_epsilon": k("attention.layer_norm_epsilon"),
        "rope_parameters": _rope(k, fields),
        "use_bias": _has(k, "attn_q.bias"),
        "sliding_window": k("attention.sliding_window", 0) or None,
        "hidden_act": "gelu_pytorch_tanh",
    }


def _stablelm(k: Keys) -> dict[str, Any]:
    fields = _whole_heads(k)
    parallel = not _has(k, "ffn_norm.weight")
    k.only("use_parallel_residual", parallel)
    return {
        "model_type": "stablelm",
        **fields,
        "layer_norm_eps": k("attention.layer_norm_epsilon"),
        "rope_parameters": _rope(k, fields, partial=True),
        "use_qkv_bias": _has(k, "attn_q.bias"),
        "qk_layernorm": False,
        "use_parallel_residual": parallel,
        "hidden_act": "silu",
    }


def _nemotron(k: Keys) -> dict[str, Any]:
    fields = _dense(k)
    return {
        "model_type": "nemotron",
        **fields,
        "norm_eps": k("attention.layer_norm_epsilon"),
        "rope_parameters": _rope(k, fields, partial=True),
        "attention_bias": _has(k, "attn_q.bias"),
        "mlp_bias": _has(k, "ffn_up.bias"),
        "hidden_act": "relu2",
    }


def _falcon(k: Keys) -> dict[str, Any]:
    """Falcon: with one key-value head the layout of the 7B, with several that of the 40B and its two norms."""
    fields = _whole_heads(k)
    k.only("tensor_data_layout", "jploski")
    groups = _has(k, "attn_norm_2.weight")
    if not groups and fields["num_key_value_heads"] != 1:
        k.file.refuse("it has several key-value heads, but no blk.0.attn_norm_2.weight")
    return {
        "model_type": "falcon",
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "num_hidden_layers": fields["num_hidden_layers"],
        "num_attention_heads": fields["num_attention_heads"],
        "num_kv_heads": fields["num_key_value_heads"],
        "ffn_hidden_size": fields["intermediate_size"],
        "max_position_embeddings": fields["max_position_embeddings"],
        "tie_word_embeddings": fields["tie_word_embeddings"],
        "layer_norm_epsilon": k("attention.layer_norm_epsilon"),
        "rope_parameters": _rope(k, fields),
        "new_decoder_architecture": groups,
        "multi_query": not groups,
        "parallel_attn": True,
        "bias": _has(k, "attn_qkv.bias"),
        "alibi": False,
        "activation": "gelu",
    }


def _gpt2(k: Keys) -> dict[str, Any]:
    fields = _whole_heads(k)
    k.only("rope.dimension_count", fields["head_dim"])
    return {
        "model_type": "gpt2",
        "vocab_size": fields["vocab_size"],
        "n_embd": fields["hidden_size"],
        "n_layer": fields["num_hidden_layers"],
        "n_head": fields["num_attention_heads"],
        "n_inner": fields["intermediate_size"],
        "n_positions": fields["max_position_embeddings"],
        "tie_word_embeddings": fields["tie_word_embeddings"],
        "layer_norm_epsilon": k("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _bloom(k: Keys) -> dict[str, Any]:
    fields = _whole_heads(k)
    if fields["intermediate_size"] != 4 * fields["hidden_size"]:
        k.file.refuse(f"{k.prefix}feed_forward_length is not four times {k.prefix}embedding_length")
    k.only("attention.max_alibi_bias", 8.0)
    return {
        "model_type": "bloom",
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "n_layer": fields["num_hidden_layers"],
        "n_head": fields["num_attention_heads"],
        "seq_length": fields["max_position_embeddings"],
        "tie_word_embeddings": fields["tie_word_embeddings"],
        "layer_norm_epsilon": k("attention.layer_norm_epsilon"),
        "apply_residual_connection_post_layernorm": False,
        "slow_but_exact": False,
    }


ARCHITECTURES: dict[str, Callable[[Keys], dict[str, Any]]] = {
    "llama": _llama,
    "granite": _granite,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen2moe": _qwen2moe,
    "qwen3moe": _qwen3moe,
    "phi3": _phi3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "starcoder2": _starcoder2,
    "stablelm": _stablelm,
    "nemotron": _nemotron,
    "falcon": _falcon,
    "gpt2": _gpt2,
    "bloom": _bloom,
}
