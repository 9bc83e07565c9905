"""Tiny random vision-language models of several families with real processors, built in memory."""

import string
from functools import cache, partial

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm

from anchors.injection.asking.vlm import VisionLanguageModel, prepare_vlm
from anchors.model.loading import without_gpu_kernels

WORDS = ["what", "is", "it", "big", "yes", "no", "red", "blue", "seven", "one", "=", "?", ":", "#"]
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
EYES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = ("llava", "llava_next", "idefics3", "qwen2_vl", "gemma3")
ONE_IMAGE = ("blip_2",)
"""Families whose forward demands a picture and whose processor puts it before the text."""
HYBRIDS = ("qwen3_5",)
"""Families whose layers do not all attend."""
MORE = (
    "internvl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "paligemma", "idefics3-tiles", "smolvlm-tiles",
    *HYBRIDS,
)  # fmt: skip
"""Families of which the flow and the places of patches are tried, too."""
MERGED = ("internvl", "qwen3_vl", "qwen3_vl_moe", "llava_onevision", "mistral3")
"""Families of which merges and the flow through them are tried."""


def tokenizer(special: dict[str, str], more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Words, letters and line breaks, one token each."""
    alphabet = ["<unk>", "<eos>", "<pad>", "\n", *WORDS, *string.ascii_letters, *string.digits, *".,<>|_-"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(alphabet)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", behavior="removed"), pre_tokenizers.Split("\n", behavior="isolated")]
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>",
        extra_special_tokens=special,
    )  # fmt: skip
    found.add_tokens(list(more), special_tokens=True)
    return found


def _size(side: int) -> dict[str, dict[str, int]]:
    return {"size": {"height": side, "width": side}}


def _llava(kind: str):
    words = tokenizer({"image_token": "<image>"})
    eyes = CLIPVisionConfig(**EYES, image_size=16, patch_size=8)
    common = {
        "vision_config": eyes, "text_config": {"model_type": "llama", **TEXT, "vocab_size": len(words)},
        "image_token_id": words.convert_tokens_to_ids("<image>"), "vision_feature_layer": -1,
    }  # fmt: skip
    sides = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    strategy = {
        "patch_size": 8,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    if kind == "llava":
        config = LlavaConfig(**common, image_seq_length=4)
        processor = LlavaProcessor(LlavaImageProcessorPil(**sides), words, **strategy)
        return LlavaForConditionalGeneration(config), processor
    pins = [[16, 16], [16, 32], [32, 16]]
    config = LlavaNextConfig(**common, image_grid_pinpoints=pins)
    images = LlavaNextImageProcessorPil(**sides, image_grid_pinpoints=pins)
    return LlavaNextForConditionalGeneration(config), LlavaNextProcessor(images, words, **strategy)


def _idefics3(kind: str = "idefics3"):
    """With `tiles` in its name a picture is cut into tiles, too, as checkpoints have it."""
    tiles = kind.endswith("tiles")
    rows = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)] if tiles else []
    words = tokenizer(
        {"image_token": "<image>"},
        ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *rows),
    )
    smol = kind.startswith("smolvlm")
    config = (SmolVLMConfig if smol else Idefics3Config)(
        vision_config={**EYES, "image_size": 16, "patch_size": 4},
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(words) + 4},
        image_token_id=words.convert_tokens_to_ids("<image>"), scale_factor=2, pad_token_id=2,
    )  # fmt: skip
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 48 if tiles else 16},
        max_image_size={"longest_edge": 16},
        do_image_splitting=tiles,
    )
    if smol:
        processing_smolvlm.num2words = (
            processing_smolvlm.num2words or str
        )  # demanded, and used for videos alone
        processor = images_only(SmolVLMProcessor)(images, words, None, image_seq_len=4)
        return SmolVLMForConditionalGeneration(config), processor
    return Idefics3ForConditionalGeneration(config), Idefics3Processor(images, words, image_seq_len=4)


def images_only(process: type) -> type:
    """transformers needs torchvision to make a video processor, or even to see that there is none."""
    return type(process.__name__, (process,), {"check_argument_for_proper_class": lambda *_: None})


def _qwen2_vl():
    words = tokenizer(
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        ("<|vision_start|>", "<|vision_end|>"),
    )
    at = words.convert_tokens_to_ids
    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4},
        text_config={**TEXT, "vocab_size": len(words), "bos_token_id": None, "eos_token_id": 1, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
        image_token_id=at("<|image_pad|>"), video_token_id=at("<|video_pad|>"),
        vision_start_token_id=at("<|vision_start|>"), vision_end_token_id=at("<|vision_end|>"),
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 256})
    return Qwen2VLForConditionalGeneration(config), images_only(Qwen2VLProcessor)(images, words)


def _later_qwen(kind: str):
    """Qwen2.5-VL, Qwen3-VL and Qwen3.5: their own eyes behind the processor of Qwen2-VL."""
    words = tokenizer(
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
         "vision_end_token": "<|vision_end|>"}
    )  # fmt: skip
    at = words.convert_tokens_to_ids
    old = kind == "qwen2_5_vl"
    text = {**TEXT, "vocab_size": len(words), "bos_token_id": None, "eos_token_id": 1, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}  # fmt: skip
    eyes = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
    }
    more = (
        {"fullatt_block_indexes": [1], "window_size": 16}
        if old
        else {"num_position_embeddings": 64} | ({} if kind in HYBRIDS else {"deepstack_visual_indexes": [0]})
    )
    if kind in HYBRIDS:
        text |= {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        }  # fmt: skip
        text["rope_parameters"] |= {"partial_rotary_factor": 1.0}
    made = {
        "vision_config": {**eyes, **more}, "text_config": text if old else {**text, "head_dim": 8},
        "image_token_id": at("<|image_pad|>"), "video_token_id": at("<|video_pad|>"),
        "vision_start_token_id": at("<|vision_start|>"), "vision_end_token_id": at("<|vision_end|>"),
    }  # fmt: skip
    images = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    if old:
        config, processor = Qwen2_5_VLConfig(**made), images_only(Qwen2_5_VLProcessor)(images, words)
        return Qwen2_5_VLForConditionalGeneration(config), processor
    processor = images_only(Qwen3VLProcessor)(images, words)
    if kind in HYBRIDS:
        with without_gpu_kernels():  # which are chosen when the family's code is first read
            from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

            return Qwen3_5ForConditionalGeneration(Qwen3_5Config(**made)), processor
    if kind == "qwen3_vl":
        return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**made)), processor
    made["text_config"] |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**made)), processor


def _mistral3():
    """Its own processor demands torchvision: LLaVA's takes its place, which puts no breaks between rows of patches."""
    words = tokenizer({"image_token": "[IMG]"})
    eyes = {"model_type": "pixtral", **EYES, "head_dim": 8, "image_size": 16, "patch_size": 4}
    config = Mistral3Config(
        vision_config=eyes, text_config={"model_type": "mistral", **TEXT, "head_dim": 8, "vocab_size": len(words)},
        image_token_index=words.convert_tokens_to_ids("[IMG]"), spatial_merge_size=2, vision_feature_layer=-1,
    )  # fmt: skip
    images = PixtralImageProcessorPil(size={"longest_edge": 16}, patch_size=4)
    processor = LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="full", num_additional_image_tokens=0
    )
    return Mistral3ForConditionalGeneration(config), processor


def _internvl():
    words = tokenizer(
        {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
         "video_token": "<video>"}
    )  # fmt: skip
    config = InternVLConfig(
        vision_config={**EYES, "image_size": 16, "patch_size": 4},
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(words)},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
    )  # fmt: skip
    images = GotOcr2ImageProcessorPil(**_size(16), crop_to_patches=True, min_patches=1, max_patches=4)
    processor = images_only(InternVLProcessor)(images, words, image_seq_length=4)
    return InternVLForConditionalGeneration(config), processor


def _llava_onevision():
    words = tokenizer({"image_token": "<image>", "video_token": "<video>"})
    pins = [[16, 16], [16, 32], [32, 16], [32, 32]]
    config = LlavaOnevisionConfig(
        vision_config={**EYES, "image_size": 16, "patch_size": 8, "model_type": "siglip_vision_model"},
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(words)},
        image_token_id=words.convert_tokens_to_ids("<image>"), video_token_id=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pins,
    )  # fmt: skip
    images = LlavaOnevisionImageProcessorPil(**_size(16), image_grid_pinpoints=pins)
    processor = images_only(LlavaOnevisionProcessor)(
        images, words, num_image_tokens=4, vision_feature_select_strategy="full"
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _paligemma():
    words = tokenizer({"image_token": "<image>"})
    words.add_special_tokens({"bos_token": "<bos>"})
    images = SiglipImageProcessorPil(**_size(16))
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, words)  # it adds tokens for places and parts
    config = PaliGemmaConfig(
        vision_config={**EYES, "image_size": 16, "patch_size": 4, "model_type": "siglip_vision_model"},
        text_config={"model_type": "gemma", **TEXT, "vocab_size": len(words), "head_dim": 8},
        image_token_id=words.convert_tokens_to_ids("<image>"), projection_dim=32,
    )  # fmt: skip
    return PaliGemmaForConditionalGeneration(config), processor


def _gemma3():
    words = tokenizer({"image_token": "<pic>", "boi_token": "<boi>", "eoi_token": "<eoi>"})
    config = Gemma3Config(
        vision_config={**EYES, "image_size": 16, "patch_size": 4, "model_type": "siglip_vision_model"},
        text_config={**TEXT, "vocab_size": len(words), "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8,
                     "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        mm_tokens_per_image=4, image_token_id=words.convert_tokens_to_ids("<pic>"),
        boi_token_id=words.convert_tokens_to_ids("<boi>"), eoi_token_id=words.convert_tokens_to_ids("<eoi>"),
    )  # fmt: skip
    processor = Gemma3Processor(Gemma3ImageProcessorPil(**_size(16)), words, image_seq_length=4)
    return Gemma3ForConditionalGeneration(config), processor


_OPT = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 256, "word_embed_proj_dim": 32}  # fmt: skip
T5 = {"model_type": "t5", "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 3, "num_heads": 4}


def blip(kind: str = "blip_2", text: dict = _OPT):
    """BLIP-2 or InstructBLIP, unprepared: a Q-Former makes four features of a picture."""
    words = tokenizer({})  # the processor adds its image token
    images = BlipImageProcessorPil(**_size(16))
    of_words = (words, tokenizer({})) if kind == "instructblip" else (words,)
    process = InstructBlipProcessor if kind == "instructblip" else Blip2Processor
    processor = process(images, *of_words, num_query_tokens=4)
    config = (InstructBlipConfig if kind == "instructblip" else Blip2Config)(
        vision_config={**EYES, "image_size": 16, "patch_size": 8},
        qformer_config={**EYES, "vocab_size": len(words)}, text_config={**text, "vocab_size": len(words)},
        num_query_tokens=4, image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    of_kind = (
        InstructBlipForConditionalGeneration if kind == "instructblip" else Blip2ForConditionalGeneration
    )
    return of_kind(config), processor


BUILDERS = {
    "idefics3": _idefics3, "qwen2_vl": _qwen2_vl, "gemma3": _gemma3, "blip_2": blip, "internvl": _internvl,
    "llava_onevision": _llava_onevision, "paligemma": _paligemma, "mistral3": _mistral3,
    **{kind: partial(_idefics3, kind) for kind in ("idefics3-tiles", "smolvlm-tiles")},
    **{kind: partial(_later_qwen, kind) for kind in ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", *HYBRIDS)},
}  # fmt: skip


@cache
def make_vlm(family: str, routed: bool = True) -> VisionLanguageModel:
    """A random model of a family, with weights large enough for attention to be far from uniform."""
    torch.manual_seed((*FAMILIES, *ONE_IMAGE, *MORE, *MERGED).index(family))
    model, processor = BUILDERS[family]() if family in BUILDERS else _llava(family)
    enliven(model)
    return prepare_vlm(model, processor, f"tiny {family}", "float32", routed=routed)


def enliven(model: torch.nn.Module) -> None:
    """Random weights large enough for attention to be far from uniform."""
    for weight in model.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, std=0.15)


def picture(seed: int = 0) -> Image.Image:
    """A small random picture."""
    pixels = torch.randint(
        0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(pixels.numpy())
