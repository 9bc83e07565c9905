"""The language tower of a vision-language model on the seam, and nothing else of it.

Masks and positions stay the model's own (images that see each other, positions in three dimensions): the seam takes each
call as it comes. The vision tower keeps its attention.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchors.attention.layers import attending, ranges
from anchors.attention.seam import NAME, seam
from anchors.errors import AnchorsError, RoutingError
from anchors.families import known
from anchors.model.routed import testify
from anchors.model.witness import TOLERANCE, Witness, apart

if TYPE_CHECKING:
    from anchors.injection.asking.vlm import VisionLanguageModel


PICTURE = Image.new("RGB", (64, 64), (200, 60, 20))
"""What a model is shown when it is put on the seam."""


def demanded(model: PreTrainedModel) -> tuple[str, ...]:
    """What a model's forward cannot do without, beside the tokens (pixels, in the BLIP families)."""
    taken = inspect.signature(model.forward).parameters
    return tuple(
        name
        for name, own in taken.items()
        if own.default is own.empty and own.kind is own.POSITIONAL_OR_KEYWORD and name != "input_ids"
    )


def witness_of_tower(vlm: "VisionLanguageModel", shown: Mapping[str, Tensor] | None = None) -> Witness:
    """The witness of a model before its tower is put on the seam: asked a text, or, where its forward demands pictures, a
    text with one.

    Args:
        vlm: as it came.
        shown: that text with a picture, encoded; None leaves it to the processor.

    Raises:
        AnchorsError: an encoder reads its texts, or its image features are made of the text, too; see
            `anchors.model.routed.testify`.
    """
    model, needs = vlm.model, demanded(vlm.model)
    if model.config.is_encoder_decoder:
        raise AnchorsError(
            f"{type(model).__name__} reads a prompt in an encoder and writes the answer in a decoder, so that no token of the "
            "prompt is attended to as in a language model.",
            "Give a model whose language tower is a decoder alone (of BLIP-2 those with OPT, not those with Flan-T5).",
            code="model-kind",
        )
    if read := [name for name in needs if name.startswith("qformer_input")]:
        raise AnchorsError(
            f"{type(model).__name__} makes its image features of the prompt's text, too (its forward demands {read[0]}): another "
            "last word moves the logits at every token before it, and what comes from an image cannot be told from what comes "
            "from the text.",
            "Give a model whose image features are made of the image alone: BLIP-2, LLaVA, Idefics3, Qwen2-VL, Gemma 3.",
            code="not-causal",
        )
    if needs and shown is None:
        shown = vlm.encode(["<image> a b"], [[PICTURE]]).tensors
    return testify(model, vlm.tokenizer, vlm.precision, shown if needs else None)


def _attends(modules: set[nn.Module]) -> bool:
    """Whether an attention on the seam is among some modules."""
    return any(
        type(m).__name__.endswith("Attention")
        and getattr(getattr(m, "config", None), "_attn_implementation", None) == NAME
        for m in modules
    )


def route_tower(model: PreTrainedModel) -> tuple[nn.Module | None, ...]:
    """Put the language tower of a model on the seam, and nothing else; returns its attention modules, by layer: None for a layer
    that has none by its configuration.

    Raises:
        RoutingError: the family computes attention in its own code, or not once in each layer.
    """
    decoder = model.get_decoder()
    if not decoder._can_set_attn_implementation():
        raise RoutingError(
            f"{type(decoder).__name__} computes attention in its own code, not through transformers' "
            "AttentionInterface: what flows there cannot be seen.",
            known("image-text"),
        )
    decoder.set_attn_implementation(NAME)
    config = model.config.get_text_config()
    layers, places = config.num_hidden_layers, attending(config)
    # A recurrent layer may call itself an attention, too; `demand_each_layer` sees whether it arrives at the seam.
    found = [
        m
        for m in decoder.modules()
        if getattr(m, "layer_idx", None) in places and type(m).__name__.endswith("Attention")
    ]
    there = sorted(module.layer_idx for module in found)
    if there != list(places):
        told = (
            f"{layers} layers"
            if len(places) == layers
            else f"attention in layers {ranges(places)} of {layers}"
        )
        raise RoutingError(
            f"{type(decoder).__name__} has {told} by its configuration, but {len(found)} attention modules were found in it"
            f"{f' (of layers {ranges(sorted(set(there)))})' if there else ''}.",
            "Models in which every layer that attends does so once can be analysed.",
        )
    inside = set(decoder.modules())
    others = [
        type(m).__name__
        for m in model.modules()
        if isinstance(m, PreTrainedModel)
        and m not in inside
        and m.config._attn_implementation == NAME
        and (decoder not in (own := set(m.modules())) or _attends(own - inside))
    ]
    if others:
        raise RoutingError(
            f"Setting the attention of {type(decoder).__name__} set that of {', '.join(others)}, too.",
            "The language tower must have a configuration of its own.",
        )
    own = {module.layer_idx: module for module in found}
    return tuple(own.get(layer) for layer in range(layers))


def _reads_alone(vlm: "VisionLanguageModel") -> bool:
    """Whether the processor takes a text without a picture (PaliGemma's does not)."""
    try:
        return bool(vlm.processor(text=["a b"]))
    except (ValueError, TypeError):
        return False


def prove(vlm: "VisionLanguageModel") -> None:
    """Run a text (where the family takes one alone) and an image with text: each layer of the tower must arrive at the seam
    exactly once, and the logits be those of the model as it came.

    Raises:
        RoutingError: it does not, or they are not.
    """
    alone = [] if demanded(vlm.model) or not _reads_alone(vlm) else [("a b", [])]
    for text, images in (*alone, ("<image> a", [PICTURE])):
        tensors = vlm.encode([text], [images]).tensors
        ours = demand_each_layer(vlm, tensors, f"{len(images)} images")
        assert vlm.witness is not None  # noqa: S101 - a routed model has one
        off = apart(ours, vlm.witness.answer(**tensors))
        if not off <= TOLERANCE[vlm.precision]:
            raise RoutingError(
                f"On the seam the logits of {type(vlm.model).__name__} with {len(images)} images differ from its own by "
                f"{off:.1e} of their size.",
                "This family does something around its attention that the toolkit does not know.",
                code="not-itself",
            )


def demand_each_layer(vlm: "VisionLanguageModel", tensors: dict[str, Tensor], what: str) -> Tensor:
    """The logits of a run in which each layer of the tower arrived at the seam exactly once.

    Raises:
        RoutingError: one did not.
    """
    with torch.no_grad(), seam(vlm.modules) as reached, vlm.arithmetic():
        logits = vlm.model(**tensors, use_cache=False).logits
    times = [reached.count(module) for module in vlm.modules if module is not None]
    if set(times) != {1} or len(reached) != len(times):
        other = sorted(
            {type(module).__name__ for module in reached} - {type(m).__name__ for m in vlm.modules}
        )
        raise RoutingError(
            f"In a run of {vlm.name!r} with {what}, its layers {ranges(vlm.layers)} arrived at the seam {times} times"
            f"{', and ' + ', '.join(other) if other else ''}.",
            "Each must arrive exactly once: layers with attention of another kind, or with none, cannot be analysed.",
        )
    return logits
