"""The models of the demonstration: a small language model, and a LLaVA whose language tower it is."""

from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AddedToken,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from anchors.errors import AnchorsError
from anchors.injection.demo.scales import Scale, TowerSize
from anchors.injection.demo.world import World
from anchors.model.language import origin_of
from anchors.model.loading import language_model, tokenizer_of

IMAGE_TOKEN = "<image>"  # noqa: S105 - no password
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def tiny_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """One token per word of the world."""
    words = sorted(_words(world))
    vocabulary = {word: i for i, word in enumerate([PAD, EOS, UNKNOWN, *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


def _words(world: World) -> set[str]:
    """Every word that can stand in a prompt or an answer."""
    rng = np.random.default_rng(0)
    skills = [task for skill in world.skills.values() for task in skill]
    tasks = [world.caption, *world.vision, *world.lore, *skills]
    found = set(world.template.format(image="", question="").split()) | set(world.separator.split())
    for scene in world.scenes():
        found |= set(world.describe(scene).split())
        for task in tasks:
            if task.fits(scene):
                for _ in range(200):  # some of it is drawn
                    asked = task(scene, rng)
                    found |= set(f"{asked.text or ''} {asked.question} {asked.answer}".split())
    return found


def new_language_model(scale: Scale, tokenizer: PreTrainedTokenizerBase, context: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    tower = cast(TowerSize, scale.language)  # None stands for a model that is given
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=tower.width,
        intermediate_size=tower.hidden,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        num_key_value_heads=tower.heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def given_language_model(source: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model from a directory, a GGUF file or the hub; SmolLM2-135M-Instruct by default. In float32.

    Raises:
        AnchorsError: it cannot be read, is not whole, or has no end-of-text token.
    """
    origin = origin_of(source)
    tokenizer, model = tokenizer_of(origin), language_model(origin, dtype=torch.float32)
    if tokenizer.eos_token_id is None:
        raise AnchorsError(
            f"The tokenizer of {origin.name!r} has no end-of-text token.",
            "Give another --base.",
            code="tokenizer",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def vision_config(scale: Scale) -> SiglipVisionConfig:
    tower = scale.vision
    return SiglipVisionConfig(
        hidden_size=tower.width,
        intermediate_size=tower.hidden,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        image_size=scale.image,
        patch_size=scale.patch,
        vision_use_head=False,
    )


def with_eyes(
    scale: Scale,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vision: nn.Module,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of a vision tower, a new projector and a language model; its vocabulary has one row more, for pictures.

    The tokenizer is the LLM's with `<image>` added at the end, so that ids of both agree.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(IMAGE_TOKEN, special=True)]})
    image_id = cast(int, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    text: dict[str, Any] = base.config.to_dict() | {"vocab_size": max(base.config.vocab_size, image_id + 1)}
    config = LlavaConfig(
        vision_config=vision_config(scale),
        text_config=type(base.config)(**text),
        image_token_index=image_id,
        image_seq_length=scale.tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    tower, source = model.model.language_model, base.model
    rows = base.config.vocab_size
    with torch.no_grad():
        weights = dict(source.state_dict())
        embeddings = weights.pop("embed_tokens.weight")
        missing, unexpected = tower.load_state_dict(weights, strict=False)
        if missing != ["embed_tokens.weight"] or unexpected:
            raise AnchorsError(
                "The base model's layers do not fit.", "Give a Llama as --base.", code="model-kind"
            )
        tower.embed_tokens.weight[:rows] = embeddings
        tower.embed_tokens.weight[rows:] = embeddings.mean(0)
        if not base.config.tie_word_embeddings:
            model.lm_head.weight[:rows] = base.lm_head.weight
            model.lm_head.weight[rows:] = base.lm_head.weight.mean(0)
    model.generation_config = base.generation_config
    return model, processor_of(scale, tokenizer)


def processor_of(scale: Scale, tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """What turns text and pictures into a LLaVA's input."""
    images = SiglipImageProcessorPil(size={"height": scale.image, "width": scale.image})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=scale.patch,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=0,
    )
