"""Tiny random models of many architectures, on which every invariant runs."""

import torch
import transformers as hf
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from anchors.model.architectures import known
from anchors.nsa.config import NSAConfig

WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = WIDE | {"num_key_value_heads": 2}
POSITIONS = {"max_position_embeddings": 512}

CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(n_layer=3, n_head=4, n_embd=32, n_positions=512),
    "gptj": GPTJConfig(n_layer=3, n_head=4, n_embd=32, n_positions=512, rotary_dim=4),
    "gpt_neox": GPTNeoXConfig(**WIDE, **POSITIONS),
    "llama": LlamaConfig(**GROUPED, **POSITIONS),
    "qwen2": Qwen2Config(**GROUPED, **POSITIONS),
    "qwen3": Qwen3Config(**GROUPED, **POSITIONS, head_dim=8),
    "mistral_window": MistralConfig(**GROUPED, **POSITIONS, sliding_window=16),
    "gemma2_softcap_window": Gemma2Config(
        **GROUPED, **POSITIONS, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, attn_logit_softcapping=2.0
    ),
    "gemma3_window": Gemma3TextConfig(
        **GROUPED, **POSITIONS, head_dim=8, query_pre_attn_scalar=8, sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32,
        do_layer_norm_before=True, **POSITIONS,
    ),
    "phi3": Phi3Config(**GROUPED, **POSITIONS, pad_token_id=0),
    "gpt_oss_sinks": GptOssConfig(
        **GROUPED, **POSITIONS, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "nsa": NSAConfig(**GROUPED, **POSITIONS, l=8, d=4, lp=16, n=4, w=12),
}  # fmt: skip

_OLD = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GPT = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 512}
_BERT = _OLD | {"intermediate_size": 48, "is_decoder": True} | POSITIONS
_BART = {"d_model": 32, "pad_token_id": 1} | POSITIONS
_FALCON = _OLD | POSITIONS | {"ffn_hidden_size": 48}

BRIDGED: dict[str, PreTrainedConfig] = {
    "openai": hf.OpenAIGPTConfig(**_GPT),
    "codegen": hf.CodeGenConfig(**_GPT, rotary_dim=4),
    "gpt_neo": hf.GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        window_size=16,
        attention_types=[[["local", "global"], 1]],
        **POSITIONS,
    ),
    "gpt_neox_japanese": hf.GPTNeoXJapaneseConfig(**_OLD, intermediate_multiple_size=2, **POSITIONS),
    "bloom": hf.BloomConfig(
        hidden_size=48, n_layer=2, n_head=6, apply_residual_connection_post_layernorm=True
    ),
    "mpt": hf.MptConfig(d_model=48, n_layers=2, n_heads=6, max_seq_len=512, attn_config={"clip_qkv": 1.5}),
    "falcon": hf.FalconConfig(**_FALCON),
    "falcon_new": hf.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_own_keys": hf.FalconConfig(
        **_FALCON, multi_query=False, num_kv_heads=4, bias=True, parallel_attn=False
    ),
    "xglm": hf.XGLMConfig(**_BART, num_layers=2, attention_heads=4, ffn_dim=48),
    "trocr": hf.TrOCRConfig(**_BART, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48),
    "mvp": hf.MvpConfig(
        **_BART, encoder_layers=2, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48
    ),
    "rembert": hf.RemBertConfig(**_BERT, input_embedding_size=16, output_embedding_size=16),
    "megatron_bert": hf.MegatronBertConfig(**_BERT),
    "big_bird": hf.BigBirdConfig(**_BERT, attention_type="original_full"),
    "roformer": hf.RoFormerConfig(**_BERT, rotary_value=True),
}
"""Families that come through a line of `anchors.attention.bridges.BRIDGES`; GPT-J, which has one, too, stands above."""

DENSE = sorted(set(CONFIGS) - {"nsa"})
"""Families whose attention is one matrix of transformers' own; NSA is held to its equations in test_nsa_model.py."""


def make(family: str, vocabulary: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a family, with weights large enough for attention to be far from uniform."""
    known()
    table = CONFIGS if family in CONFIGS else BRIDGED
    torch.manual_seed(sorted(table).index(family))
    config = type(table[family]).from_dict(table[family].to_dict() | {"vocab_size": vocabulary})
    config._attn_implementation = "eager"
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    return randomised(model).to(dtype)


def randomised(model: PreTrainedModel, seed: int | None = None) -> PreTrainedModel:
    """Weights large enough for attention to be far from uniform; with a seed, the same ones for the same names."""
    draw = None if seed is None else torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 or "sinks" in name or name.endswith(".A"):
            std = 1.0 if "sinks" in name and weight.dim() < 2 else 0.3
            torch.nn.init.normal_(weight, std=std, generator=draw)
    return model
