"""Tiny configurations of every family, derived from the fields of its configuration class, and variants of some.

A field is sized by its name, with the first of `RULES` that matches; what a family needs beyond that stands in `OWN`.
`edge` is a number of tokens between the two lengths that prompts have: whatever changes attention at a length (windows,
chunks, the keys that a sparse index keeps, the original context of a rope scaling) changes it there.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

CAUSAL = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGES = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

LAYERS, HEADS, KV_HEADS, HEAD, WIDTH, INNER, LONGEST = 4, 4, 2, 16, 64, 96, 512
EDGE = "edge"
RULES: tuple[tuple[str, object], ...] = (
    (r"(unpadded_)?vocab_size(_per_layer(_input)?)?|n_vocab", "vocabulary"),
    (r"num_kv_shared_layers|num_(mtp|nextn_predict)_layers", 0),
    (r"(num_)?dense_layers|num_dense_layers|first_k_dense_replace|moe_layer_(freq|start_index)|zero_expert_num", 1),
    (r"n_?(um)?_?(hidden_|decoder_|encoder_)?layers?|(de|en)coder_layers|num_blocks", LAYERS),
    (r"(num_|n_|swa_num_|num_global_|attn_)?(key_value|kv)_heads|swa_num_kv_heads", KV_HEADS),
    (r"linear_num_key_heads|o_groups", 2),
    (r"index_n_heads", 16),
    (r"mamba_(n|num)_heads", 8),
    (r"(linear_num_(value_)?heads)", HEADS),
    (r"(swa_)?(num_|n_|de|en|num_de|num_en)?(coder_)?(attention_|swa_)?(attention_)?heads?|n_mamba_heads", HEADS),
    (r"q_lora_rank", 24),
    (r"kv_lora_rank|o_lora_rank", 16),
    (r"qk_(rope|nope)_head_dim", 8),
    (r"query_pre_attn_scalar|(linear_|index_|v_|qk_|global_|swa_|swa_v_)?((key|value)_)?head_dim", HEAD),
    (r"dim_head|d_head|d_kv|kv_channels|mamba_(d_head|head_dim)|attention_head_size", HEAD),
    (r"(num_|num_local_|n_routed_|moe_num_)experts", 4),
    (r"(num_|moe_num_|n_)shared_experts|n_group|topk_group|num_expert_group|mamba_n_?groups|n_groups", 1),
    (r"num_experts_per_(tok|token)|moe_(k|topk|top_k)|top_k_experts", 2),
    (r"(moe_|shared_|shared_expert_|shared_experts_|moe_shared_expert_)(expert_)?intermediate_size", 48),
    (r"expert_ffn_hidden_size", 48),
    (r"(dense_)?intermediate_size(_mlp)?|(de|en)?(coder_)?ffn_dim|n_inner|d_ff|d_inner|dim_ff|dff|feed_forward_size", INNER),
    (r"ffn_hidden_size|block_ff_dim", INNER),
    (r"hidden_size_per_layer_input|laurel_rank", 8),
    (r"hidden_size|d_model|n_embd|emb_dim|dim|word_embed_proj_dim|embedding_(size|dim)|(in|out)put_embedding_size", WIDTH),
    (r"attention_hidden_size|lru_width|conv_dim|block_dim", WIDTH),
    (r"max_(position_embeddings|target_positions|seq_len|sequence_length)|n_positions|n_ctx|seq_length", LONGEST),
    (r"sliding_window(_size)?|attention_(window|chunk)_size|window_size|index_topk", EDGE),
    (r"(mamba_)?d_state|ssm_state_size|state_size|mamba_dt_rank|time_step_rank", 8),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"mamba_expand|altup_num_inputs", 2),
    (r"linear_conv_kernel_dim|mamba_d_conv", 4),
    (r"(mamba_)?chunk_size", 16),
)  # fmt: skip
_RULES = tuple((re.compile(f"(?:{pattern})$"), value) for pattern, value in RULES)
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
"""The tokenizer's first tokens; families that count positions from the padding's number start at another than 0."""
MULTIPLIERS = {"attention_multiplier": 0.25}
MARKS = {
    "image_token_id": -4,
    "image_token_index": -4,
    "video_token_id": -3,
    "video_token_index": -3,
    "vision_start_token_id": -2,
    "image_start_token_id": -2,
    "boi_token_id": -2,
    "boi_token_index": -2,
    "vision_end_token_id": -1,
    "image_end_token_id": -1,
    "eoi_token_id": -1,
    "eoi_token_index": -1,
}
"""The last tokens of a vocabulary, in models that see; no text has them."""

DECODERS = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
]
"""Encoders that become language models with `is_decoder`."""
LATENT = [
    "axk1",
    "axk2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "minicpm3",
    "youtu",
    "longcat_flash",
    "kimi_linear",
    "bailing_hybrid",
    "mistral4",
]
"""Keys and values from a shared latent vector: as many of them as queries, whose rotated part counts as the head."""
_DRAFTS = "it drafts for another model: it reads that model's keys and values, and no tokens (its forward ignores input_ids)"
NOT_TRIED = {"gemma4_assistant": _DRAFTS, "gemma4_unified_assistant": _DRAFTS}
"""Families that are no language models by themselves, and why."""
ONE_BY_ONE = ["sliding_attention", "full_attention"] * 2
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": _PLAIN_ROPE | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}}

OWN: dict[str, dict[str, Any]] = {
    **{family: {"is_decoder": True} for family in DECODERS},
    **{family: {"num_key_value_heads": HEADS, "head_dim": 8} for family in LATENT},
    **{family: {"text_config": _MROPE} for family in ["glm4v", "glm46v", "glm_ocr", "glm4v_moe", "glmga", "qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "qwen2_5_omni_thinker"]},
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "bailing_hybrid": {"num_key_value_heads": HEADS, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2},
    "blt": {"encoder_hash_byte_group_vocab": 300, "encoder_hash_byte_group_size": [3, 4], "cross_attn_k": 1,
            "num_hidden_layers": LAYERS}
    | {part: {"hidden_size_global": WIDTH, "num_key_value_heads": HEADS, "cross_attn_k": 1}
       for part in ("encoder_config", "decoder_config", "global_config", "patcher_config")},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _PLAIN_ROPE, "sliding_attention": _PLAIN_ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": WIDTH}},
    "dots3_note": {"text_config": {"num_key_value_heads": HEADS, "head_dim": HEAD, "per_layer_config": {}},
                   "vision_config": {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": WIDTH},
                   "audio_config": {"hidden_size": 32, "num_attention_heads": 2, "adapter_input_size": 32, "adapter_out_dim": WIDTH}},
    "dots3_note_text": {"num_key_value_heads": HEADS, "head_dim": HEAD, "per_layer_config": {}},
    "gemma4": {"text_config": {"num_kv_shared_layers": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_k25": {"text_config": {"num_key_value_heads": HEADS, "head_dim": 8}},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": HEAD},
    "minimax": {"block_size": 16},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse"] * LAYERS, "index_block_size": 8, "index_topk_blocks": 4},
    "mistral_large4": {"text_config": {"num_key_value_heads": HEADS, "head_dim": 8}},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "modernbert-decoder": {"local_attention": 128},
    "qwen2_moe": {"use_sliding_window": True},
    "qwen4_exp": {"text_config": {"hc_lowrank": 8, "ngram_vocab_size_base": 100, "split_ngram_parts": 1,
                                  "make_ngram_vocab_size_divisible_by": 8}},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD, "indexer_budget": 16,
                       "indexer_compress_ratio": 4, "hc_count": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 100,
                       "split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 8},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"] * 2, "axial_pos_shape": [16, 32],
                 "axial_pos_embds_dim": [32, 32], "num_buckets": 4, "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16},
    "xlstm": {"qk_dim_factor": 1.0, "num_blocks": LAYERS},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "num_key_value_heads": HEADS,
              "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": HEADS, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
OWN["qwen4_exp"]["text_config"] |= OWN["qwen4_exp_text"]


def _rope(kind: str, longest: bool = False, **more: object) -> dict[str, Any]:
    """A rope scaling whose original context ends at the edge."""
    scaling = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": EDGE} | more
    return {"rope_parameters": scaling} | ({"max_position_embeddings": EDGE} if longest else {})


_LONGROPE = _rope(
    "longrope", short_factor=[1.0] * 8, long_factor=[2.0, 4.0, 6.0, 8.0] * 2, partial_rotary_factor=1.0
)
_OTHER_SHAPES = {
    "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 12, "kv_lora_rank": 8, "head_dim": 24,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "bert+bidirectional": {"is_decoder": False},
    "roberta+bidirectional": {"is_decoder": False},
    "electra+bidirectional": {"is_decoder": False},
    "roberta+padding-1-later": {"is_decoder": True, "pad_token_id": 5},
    "mistral+window-16": {"sliding_window": 16},
    "llama+bias": {"attention_bias": True, "mlp_bias": True},
    "llama+dynamic": _rope("dynamic", longest=True, factor=4.0),
    "llama+yarn": _rope("yarn", factor=4.0),
    "llama+linear": _rope("linear", factor=4.0),
    "llama+llama3": _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    "phi3+longrope": _LONGROPE | {"original_max_position_embeddings": EDGE, "sliding_window": None},
    "phi3+window": {"sliding_window": EDGE},
    "qwen2+window": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3+window": {"use_sliding_window": True, "max_window_layers": 2},
    "gemma2+window-16": {"sliding_window": 16, "attn_logit_softcapping": 2.0},
    "gemma3_text+bidirectional": {"use_bidirectional_attention": True},
    "gemma3n_text+kv-shared": {"num_kv_shared_layers": 2},
    "gemma4_text+kv-shared": {"num_kv_shared_layers": 2},
    "gemma4_text+no-per-layer-input": {"hidden_size_per_layer_input": 0},
    "gpt2+reorder": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode+heads": {"multi_query": False},
    "big_bird+sparse": {"is_decoder": True, "attention_type": "block_sparse"},
    "falcon+heads": {"multi_query": False, "num_kv_heads": HEADS, "parallel_attn": False, "bias": True},
    "falcon+new": {"new_decoder_architecture": True},
    "falcon+alibi": {"alibi": True},
    "opt+postnorm": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "granitemoehybrid+attention": {"layer_types": ["attention"] * LAYERS},
    "bamba+attention": {"attn_layer_indices": list(range(LAYERS))},
    "deepseek_v32+topk-16": {"index_topk": 16},
    "deepseek_v32+ties": {"index_n_heads": 1},
    "dots3_note_text+heads": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "per_layer_config": {1: _OTHER_SHAPES, 3: _OTHER_SHAPES},
    },
    "gemma4_text+heads": {"num_global_key_value_heads": 1, "attention_k_eq_v": True, "num_kv_shared_layers": 2},
    "laguna+heads": {"num_attention_heads_per_layer": [4, 8, 4, 8]},
    "mimo_v2_flash+heads": {"swa_num_attention_heads": 8},
    "llama4_text+chunk-16": {"attention_chunk_size": 16},
}  # fmt: skip


def families() -> Iterator[str]:
    """Every causal family, then the variants."""
    yield from CAUSAL
    yield from VARIANTS


def _fields(kind: type[PreTrainedConfig]) -> set[str]:
    """The names that a configuration class takes, without those that only stand for another of them."""
    names = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    for base in kind.__mro__:
        if "__init__" in vars(base):
            names |= set(inspect.signature(base.__init__).parameters)
    aliases = {alias for alias, real in (getattr(kind, "attribute_map", None) or {}).items() if real in names}
    return names - {"self", "kwargs"} - aliases


def _sized(kind: type[PreTrainedConfig], vocabulary: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    fields = _fields(kind)
    for name in fields:
        value = next((value for pattern, value in _RULES if pattern.match(name)), None)
        if value is not None:
            found[name] = vocabulary if value == "vocabulary" else value
    found |= {name: value for name, value in (TOKENS | MULTIPLIERS).items() if name in fields}
    found |= {name: vocabulary + place for name, place in MARKS.items() if name in fields}
    if "activation_sparsity_pattern" in fields:
        found["activation_sparsity_pattern"] = None
    return found


def _mixed(default: PreTrainedConfig) -> list[str] | None:
    """The kinds of layers that a family mixes, one after the other."""
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    return [kinds[i % len(kinds)] for i in range(LAYERS)] if len(kinds) > 1 else None


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Settings of the one with those of the other over them; parts are merged likewise."""
    parts = {
        n: merged(one[n], x)
        for n, x in other.items()
        if isinstance(x, dict) and isinstance(one.get(n), dict) and x
    }
    return one | other | parts


def _filled(settings: Any, edge: int) -> Any:
    if isinstance(settings, dict):
        return {name: _filled(value, edge) for name, value in settings.items()}
    return edge if isinstance(settings, str) and settings == EDGE else settings


SEEING = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_layers": 2, "head_dim": 16, "output_dim": 32,
    "out_hidden_size": WIDTH,
}  # fmt: skip
_LAYOUT = {"image_grid_pinpoints": [[16, 16]], "vision_feature_layer": -1}
SEEING_OWN: dict[str, dict[str, Any]] = {
    "llava": {"vision_feature_layer": -1},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "video_llava": {"vision_feature_layer": -1},
    "llava_next": _LAYOUT,
    "llava_next_video": _LAYOUT,
    "llava_onevision": _LAYOUT,
    "aya_vision": {"vision_feature_layer": -1},
    "internvl": {"vision_feature_layer": -1},
    "qianfan_ocr": {"vision_feature_layer": -1},
    "mistral3": {"vision_feature_layer": -1},
    "mistral_large4": {"vision_feature_layer": -1},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "idefics3": {"scale_factor": 2},
    "smolvlm": {"scale_factor": 2},
    "florence2": {"vision_config": {"patch_size": [8, 3, 3, 3]}},
    "qwen3_vl": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "qwen3_vl_moe": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "aria": {"projector_patch_to_query_dict": {4: 4}},
    "chameleon": {"vq_config": {"num_embeddings": 8}, "vocabulary_map": {"<image>": 1990} | {f"IMGIMG{letter}Z": 1000 + i for i, letter in enumerate("ABCDEFGH")}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _PLAIN_ROPE, "sliding_attention": _PLAIN_ROPE}}},
    "exaone4_5": {"vision_config": {"num_key_value_heads": 2}},
    "gemma4": {"vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                                 "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2,
                                 "position_embedding_size": 32, "model_type": "gemma4_vision"}},
    "hunyuan_vl": {"vision_config": {"text_hidden_size": WIDTH}, "text_config": _MROPE},
    "janus": {"vision_config": {"projection_dim": WIDTH}},
    "kimi_k25": {"projection_hidden_size": 32},
    "llama4": {"vision_config": {"intermediate_size": 128, "vision_output_dim": WIDTH, "projector_input_dim": WIDTH,
                                 "projector_output_dim": WIDTH, "num_hidden_layers": 2, "model_type": "llama4_vision_model"}},
    "paligemma": {"projection_dim": WIDTH, "vision_config": {"projection_dim": WIDTH}},
    "minicpm_ocr": {"vision_config": {"insert_layer_id": 0}},
    "minicpmv4_6": {"vision_config": {"insert_layer_id": 0}},
    "minicpmv4_7": {"vision_config": {"insert_layer_id": 0}},
    "instructblip": {"num_query_tokens": 4},
    "qwen2_vl": {"vision_config": {"hidden_size": WIDTH}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [48, 48],
                                        "rope_parameters": _PLAIN_ROPE | {"mrope_section": [3, 3, 2]}}},
    "molmo2": {"vision_config": {"image_size": [16, 16]}, "adapter_config": {"vision_feature_layer": [1, 0]}},
    "fuyu": {"patch_size": 8},
    "glm5_next": {"text_config": {"num_key_value_heads": HEADS, "index_kpool": 9, "qk_rope_head_dim": 0}},
    "inkling2": {"vision_config": {"text_hidden_size": WIDTH}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "muse_spark": {"vision_config": {"num_hidden_layers": 4}, "audio_config": {"num_hidden_layers": 4}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2}, "vision_config": {
        "sam_config": {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
                       "patch_size": 8, "global_attn_indexes": [1], "window_size": 2, "downsample_channels": [32, 32]},
        "encoder_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                           "num_key_value_heads": 2}}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "qformer_config": {"cross_attention_frequency": 1, "num_attention_heads": 2}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 2006},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 2006},
    "cosmos3_edge": {"text_config": _MROPE},
}  # fmt: skip
TEXTS = (
    "text_config",
    "decoder",
    "decoder_config",
    "thinker_config",
    "global_config",
    "encoder_config",
    "patcher_config",
)


def config(name: str, vocabulary: int, edge: int) -> PreTrainedConfig:
    """The tiny configuration of a family (`llama`) or a variant (`llama+yarn`)."""
    family = name.partition("+")[0]
    kind = CONFIG_MAPPING[family]
    own = OWN.get(family, {}) | VARIANTS.get(name, {})
    return _configured(kind, own, vocabulary, edge)


def _configured(
    kind: type[PreTrainedConfig], own: dict[str, Any], vocabulary: int, edge: int
) -> PreTrainedConfig:
    parts = getattr(kind, "sub_configs", None) or {}
    settings = _sized(kind, vocabulary)
    try:
        default = kind()
    except Exception:  # noqa: BLE001 - a class whose defaults contradict each other: its parts are all there is
        default = None
    if default is not None and (mixed := _mixed(default)) and "layer_types" in _fields(kind):
        settings["layer_types"] = mixed
    for part in parts:
        given = getattr(default, part, None)
        if given is None:
            continue
        of_part = type(given)
        if part in TEXTS:
            settings[part] = _sized(of_part, vocabulary)
            if mixed := _mixed(given):
                settings[part]["layer_types"] = mixed
        else:
            fields = _fields(of_part)
            settings[part] = {name: value for name, value in SEEING.items() if name in fields}
        settings[part] |= {"model_type": given.model_type}
    for name, value in own.items():
        inside = isinstance(value, dict) and isinstance(settings.get(name), dict)
        settings[name] = merged(settings[name], value) if inside else value
    return kind(**_filled(settings, edge))


def build(name: str, vocabulary: int, edge: int, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of a family, on transformers' own eager attention."""
    found = config(name, vocabulary, edge)
    kind = getattr(transformers, CAUSAL[name.partition("+")[0]])
    wanted = kind.config_class
    if wanted is not None and not isinstance(found, wanted):
        parts = (getattr(found, part, None) for part in found.sub_configs)
        found = next((part for part in parts if isinstance(part, wanted)), found)
    found._attn_implementation = "eager"
    torch.manual_seed(seed)
    return wide(kind(found).eval().float(), seed)


def build_seeing(family: str, vocabulary: int, edge: int, seed: int = 0) -> PreTrainedModel:
    """A tiny random model that sees images, on transformers' own eager attention."""
    found = _configured(
        CONFIG_MAPPING[family], OWN.get(family, {}) | SEEING_OWN.get(family, {}), vocabulary, edge
    )
    found._attn_implementation = "eager"
    torch.manual_seed(seed)
    return wide(getattr(transformers, IMAGES[family])(found).eval().float(), seed)


def wide(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Random weights large enough for attention to be far from uniform, drawn in the order of their names."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            plain = weight.dim() == 2 and "A_log" not in name and "conv" not in name
            expert = weight.dim() == 3 and any(part in name for part in ("expert", "mlp", "feed_forward"))
            if plain or expert:
                size = (
                    0.3
                    if "embed" in name
                    else 1.5
                    if "altup" in name  # its streams hardly mix below
                    else 0.2
                    if expert
                    else 0.3 * (WIDTH / max(WIDTH, weight.shape[-1])) ** 0.5
                )
                # GPT-Neo forms scores in float32 even in float64, and without dividing by √d: at the size of others' its own
                # maps would be rounded by 1.3e-4.
                if model.config.model_type == "gpt_neo" and ("q_proj" in name or "k_proj" in name):
                    size /= HEAD**0.25
                weight.copy_(torch.randn(weight.shape, generator=draw) * size)
            elif "sink" in name or "correct_output_scale" in name:  # zero at first: a dead path in Gemma 3n
                weight.copy_(torch.randn(weight.shape, generator=draw))
    return model
