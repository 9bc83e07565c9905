"""Tiny random vision-language models of transformers' own classes, each with the language model of its tower.

`models(family)` are in memory, `saved(family)` are safetensors directories with a tokenizer; both are made once per
process. The tower is the base plus a little (τ_v), the expert is the base plus something else (τ_e), as after training.
"""

import atexit
import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

TOKENS = 60
"""Tokens of the language models' tokenizers; their embeddings have ROWS rows, of which the last are padding."""
ROWS = 64
VLM_ROWS = 72
"""The vision-language models' tokenizers have one token more, `<image>` in row 60."""
IMAGE = TOKENS

_SIZE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GEMMA = _SIZE | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
_SEEING = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_QWEN_EYES = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_QWEN3_EYES = {
    "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
_CLIP = CLIPVisionConfig(**_SEEING, projection_dim=16)
_MOE = _SIZE | {
    "moe_intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "norm_topk_prob": True,
}


def _language(config: type[PreTrainedConfig], size: dict, tied: bool, **more: object) -> PreTrainedConfig:
    return config(vocab_size=ROWS, tie_word_embeddings=tied, **size, **more)


def _text(language: PreTrainedConfig, **more: object) -> dict:
    """The tower's part of a vision-language configuration."""
    return language.to_dict() | {"vocab_size": VLM_ROWS} | more


def _qwen(config: type[PreTrainedConfig], eyes: dict) -> Callable[[PreTrainedConfig, bool], PreTrainedConfig]:
    def make(language: PreTrainedConfig, tied: bool) -> PreTrainedConfig:
        text = _text(language, **_QWEN_ROPE)
        text.pop("model_type")
        return config(
            text_config=text, vision_config=_QWEN_EYES | eyes, tie_word_embeddings=tied, image_token_id=IMAGE,
            video_token_id=IMAGE + 1, vision_start_token_id=IMAGE + 2, vision_end_token_id=IMAGE + 3,
        )  # fmt: skip

    return make


@dataclass(frozen=True)
class Family:
    """The language model's configuration, and how to make the vision-language model's from it."""

    language: PreTrainedConfig
    tied: bool
    make: Callable[[PreTrainedConfig, bool], PreTrainedConfig]


FAMILIES: dict[str, Family] = {
    "llava": Family(
        _language(LlamaConfig, _SIZE, tied=False),
        False,
        lambda language, tied: LlavaConfig(
            vision_config=_CLIP.to_dict(), text_config=_text(language), image_token_id=IMAGE,
            image_seq_length=4, vision_feature_layer=-1, tie_word_embeddings=tied,
        ),
    ),
    "llava_next": Family(
        _language(MistralConfig, _SIZE, tied=False),
        False,
        lambda language, tied: LlavaNextConfig(
            vision_config=_CLIP.to_dict(), text_config=_text(language), image_token_id=IMAGE,
            image_seq_length=4, image_grid_pinpoints=[[16, 16]], vision_feature_layer=-1, tie_word_embeddings=tied,
        ),
    ),
    # The head of its own, though the language model's is its embedding.
    "idefics3": Family(
        _language(LlamaConfig, _SIZE, tied=True),
        False,
        lambda language, tied: Idefics3Config(
            vision_config=_SEEING, text_config=_text(language, tie_word_embeddings=tied), image_token_id=IMAGE,
            scale_factor=2, pad_token_id=0, tie_word_embeddings=tied,
        ),
    ),
    "smolvlm": Family(
        _language(LlamaConfig, _SIZE, tied=True),
        True,
        lambda language, tied: SmolVLMConfig(
            vision_config=_SEEING, text_config=_text(language), image_token_id=IMAGE, scale_factor=2, pad_token_id=0,
            tie_word_embeddings=tied,
        ),
    ),
    "qwen2_vl": Family(
        _language(Qwen2Config, _SIZE, tied=True),
        True,
        _qwen(Qwen2VLConfig, {"embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2}),
    ),
    "qwen2_5_vl": Family(
        _language(Qwen2Config, _SIZE, tied=False),
        False,
        _qwen(
            Qwen2_5_VLConfig,
            {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16, "window_size": 16, "fullatt_block_indexes": [1]},
        ),
    ),
    "gemma3": Family(
        _language(Gemma3TextConfig, _GEMMA, tied=True),
        True,
        lambda language, tied: Gemma3Config(
            text_config=_text(language), vision_config=SiglipVisionConfig(**_SEEING, vision_use_head=False).to_dict(),
            mm_tokens_per_image=1, image_token_index=IMAGE, boi_token_index=IMAGE + 1, eoi_token_index=IMAGE + 2,
            tie_word_embeddings=tied,
        ),
    ),
    "qwen3_vl": Family(
        _language(Qwen3Config, _SIZE | {"head_dim": 8}, tied=True), True, _qwen(Qwen3VLConfig, _QWEN3_EYES)
    ),
    "qwen3_vl_moe": Family(
        _language(Qwen3MoeConfig, _MOE, tied=False), False, _qwen(Qwen3VLMoeConfig, _QWEN3_EYES)
    ),
    "internvl": Family(
        _language(Qwen2Config, _SIZE, tied=False),
        False,
        lambda language, tied: InternVLConfig(
            vision_config=_SEEING | {"image_size": [16, 16], "patch_size": [4, 4]}, text_config=_text(language),
            image_token_id=IMAGE, image_seq_length=4, tie_word_embeddings=tied,
        ),
    ),
    "llava_onevision": Family(
        _language(Qwen2Config, _SIZE, tied=True),
        True,
        lambda language, tied: LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**_SEEING, vision_use_head=False).to_dict(), text_config=_text(language),
            image_token_id=IMAGE, video_token_id=IMAGE + 1, image_grid_pinpoints=[[16, 16]], vision_feature_layer=-1,
            tie_word_embeddings=tied,
        ),
    ),
    "mistral3": Family(
        _language(MistralConfig, _SIZE | {"head_dim": 8}, tied=False),
        False,
        lambda language, tied: Mistral3Config(
            vision_config={"model_type": "pixtral", **_SEEING, "head_dim": 8}, text_config=_text(language),
            image_token_index=IMAGE, vision_feature_layer=-1, tie_word_embeddings=tied,
        ),
    ),
}  # fmt: skip

NAMES = tuple(sorted(FAMILIES))

_AROUND = (
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
_INSIDE = (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))
LAYOUTS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    # The family, and beginnings of names: as transformers has them in memory, and as checkpoints of the hub do.
    "Qwen/Qwen3-VL-2B-Instruct": ("qwen3_vl", ()),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": ("qwen3_vl_moe", ()),
    "OpenGVLab/InternVL3-1B-hf": ("internvl", _INSIDE + _AROUND),
    "OpenGVLab/InternVL3-1B": (
        "internvl",
        (
            *_INSIDE,
            ("model.vision_tower.", "vision_model."),
            ("model.multi_modal_projector.layer_norm.", "mlp1.0."),
            ("model.multi_modal_projector.linear_1.", "mlp1.1."),
            ("model.multi_modal_projector.linear_2.", "mlp1.3."),
        ),
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": (
        "llava_onevision",
        (
            *_INSIDE,
            ("model.image_newline", "image_newline"),
            ("model.vision_tower.", "vision_tower.vision_model."),
            _AROUND[1],
        ),
    ),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": ("mistral3", _INSIDE + _AROUND),
}
"""Whole vision-language checkpoints as published, one tiny one of each."""
_ORIGINAL_EYES = (
    ("encoder.layer.", "encoder.layers."), ("embeddings.cls_token", "embeddings.class_embedding"),
    ("position_embeddings", "position_embedding"), ("patch_embeddings.projection", "patch_embedding"),
    ("lambda_", "ls"), ("attention.projection_layer", "attn.proj"), ("attention.", "attn."),
    ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
)  # fmt: skip


@dataclass(frozen=True)
class Models:
    """Three models that share a base; do not change their weights."""

    vlm: PreTrainedModel
    base: PreTrainedModel
    expert: PreTrainedModel


@dataclass(frozen=True)
class Saved:
    """The same three as directories; do not change their files (copy the folder)."""

    vlm: Path
    base: Path
    expert: Path


@cache
def models(family: str, dtype: torch.dtype = torch.float32) -> Models:
    """Vision-language model, base and expert of a family."""
    spec = FAMILIES[family]
    torch.manual_seed(NAMES.index(family))
    base = MODEL_FOR_CAUSAL_LM_MAPPING[type(spec.language)](copy.deepcopy(spec.language))
    _disturb(base, 0.3)
    expert = copy.deepcopy(base)
    _disturb(expert, 0.05)
    config = spec.make(copy.deepcopy(spec.language), spec.tied)
    vlm = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)
    _disturb(vlm, 0.3)
    with torch.no_grad():
        # Not by anchors.injection.merging.mapping, so that it can be held to this.
        tower = dict(vlm.get_decoder().named_parameters())
        for name, weight in base.model.named_parameters():
            tower[name][: len(weight)].copy_(weight)
        if not spec.tied:
            vlm.get_output_embeddings().weight[:ROWS].copy_(base.get_output_embeddings().weight)
    _disturb(vlm, 0.03)
    return Models(*(model.to(dtype).eval() for model in (vlm, base, expert)))


@cache
def saved(family: str, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Saved:
    """The same three as safetensors directories (in several shards where `shard` is small) with tokenizers."""
    folder = _root() / f"{family}-{str(dtype).removeprefix('torch.')}-{shard}"
    own = models(family, dtype)
    paths = []
    for name, model in (("vlm", own.vlm), ("base", own.base), ("expert", own.expert)):
        model.save_pretrained(folder / name, max_shard_size=shard)
        tokenizer(*(["<image>"] if name == "vlm" else [])).save_pretrained(folder / name)
        paths.append(folder / name)
    return Saved(*paths)


def published(layout: str, fused: bool = True) -> dict[str, torch.Tensor]:
    """The vision-language model's tensors as the checkpoint of the hub holds them.

    By hand, from its index and transformers' own conversions; tests let transformers read it. `fused` is how the original
    InternVL holds queries, keys and values of its eyes.
    """
    family, renamed = LAYOUTS[layout]
    found = {}
    own = models(family).vlm.state_dict()
    if FAMILIES[family].tied:
        del own["lm_head.weight"]
    for name, tensor in own.items():
        if ".experts." in name:
            tensor = tensor.transpose(1, 2).contiguous()  # [expert, in, out]
        name = next((new + name.removeprefix(old) for old, new in renamed if name.startswith(old)), name)
        for old, new in _ORIGINAL_EYES if name.startswith("vision_model.") else ():
            name = name.replace(old, new)
        found[name] = tensor
    for name in [name for name in found if fused and name.startswith("vision_model.") and ".q_proj." in name]:
        own = [found.pop(name.replace("q_proj", f"{which}_proj")) for which in "qkv"]
        found[name.replace("q_proj", "qkv")] = torch.cat(own)
    return found


def tokenizer(*more: str, order: Callable[[list[str]], list[str]] = list) -> PreTrainedTokenizerFast:
    """Words `w0` … of a language model, and more tokens after them; `order` permutes the words."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = special + order([f"w{i}" for i in range(TOKENS - len(special))]) + list(more)
    vocabulary = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


@cache
def _root() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="injection-families-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@torch.no_grad()
def _disturb(model: PreTrainedModel, size: float) -> None:
    for weight in model.parameters():
        weight.add_(size * torch.randn_like(weight))
