"""A suite of random tiny models: no skill, but everything that is exact can be seen on it."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

WORDS = ["</s>", "<unk>", "one", "two", "three", "big", "small", "what", "how", "say", "=", "<image>"]
KINDS = {"vision": ("what", ""), "instruction": ("say", "say"), "crosslingual": ("how", "how")}
TEXT = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
SIDE, PATCH = 16, 8


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["<image>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def language_model(seed: int, base: dict | None = None, spread: float = 0.05) -> LlamaForCausalLM:
    """Random, or near a base. The end of the text is likely, so that greedy answers are short."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, initializer_range=0.3))
    if base is not None:
        model.load_state_dict({k: v + spread * torch.randn_like(v) for k, v in base.items()})
    else:
        model.lm_head.weight.data[0] *= 5
    return model


def build(folder: Path, seed: int = 0, examples: int = 12) -> Path:
    """Write base, VLM, two experts, an upper bound and `suite`; returns the suite's folder."""
    words, base = tokenizer(), language_model(seed)
    base.save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    for i, name in enumerate(("instruction", "crosslingual")):
        language_model(seed + 100 + i, base.state_dict()).save_pretrained(folder / "experts" / name)
        words.save_pretrained(folder / "experts" / name)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=PATCH
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT, initializer_range=0.3), image_token_index=11,
        vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size=size, crop_size=size), words, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    for name, shift in (("vlm", 0), ("upper", 1)):
        torch.manual_seed(seed + 7 + shift)
        vlm = LlavaForConditionalGeneration(config)
        for part in (vlm.model.vision_tower, vlm.model.multi_modal_projector):
            for weight in part.parameters():
                weight.data.normal_(0, 0.3)
        tower = language_model(seed + 200 + shift, base.state_dict(), 0.02)
        vlm.model.language_model.load_state_dict(tower.model.state_dict())
        vlm.lm_head.load_state_dict(tower.lm_head.state_dict())
        vlm.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    suite = folder / "suite"
    rng = np.random.default_rng(seed)
    (suite / "images").mkdir(parents=True)
    for i in range(examples):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(
            suite / "images" / f"{i}.png"
        )
    for name, (question, more) in KINDS.items():
        lines = [
            {
                "image": f"images/{i}.png", "text": WORDS[2 + i % 3], "question": f"{question} {more if i % 2 else ''}".strip(),
                "answer": " ".join(rng.choice(WORDS[2:7], 1 + i % 2)), "kind": f"{name}-{i % 2}",
                "split": "test" if i % 3 else "tune",
            }
            for i in range(examples)
        ]  # fmt: skip
        (suite / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    experts = {name: f"../experts/{name}" for name in KINDS if name != "vision"}
    facts = {
        "name": "random", "seed": seed, "template": "{image} {question} =", "answer": " {answer}", "caption": "what",
        "vision": "vision", "models": {"vlm": "../vlm", "base": "../base", "experts": experts, "upper": {"instruction": "../upper"}},
    }  # fmt: skip
    (suite / "suite.json").write_text(json.dumps(facts))
    return suite
