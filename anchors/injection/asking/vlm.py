"""Vision-language models: loaded, their prompts with images encoded, and on request their language tower on the seam.

What differs between families (how an image token multiplies, which tensors go along) is left to each model's own
processor; what a mask or a position is, to the model itself.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from anchors.errors import AnchorsError
from anchors.injection.asking.routing import prove, route_tower, witness_of_tower
from anchors.model.identity import Identity, identity
from anchors.model.lengths import without_memory
from anchors.model.loading import Origin, processor_of, vision_language_model
from anchors.model.preparation import apply, beyond, guarded
from anchors.model.routed import DTYPES, Routed, placed
from anchors.model.soundness import sound
from anchors.places import refuse_revision

PLACE = "<image>"
"""Stands for an image in texts given to `VisionLanguageModel.encode`."""
TINY = "tiny-vlm"
"""The name of the model that comes with the package: it reads handwritten digits."""
TINY_FOLDER = Path(__file__).parents[1] / "tiny_vlm"
FRAMES = {"<|image_pad|>": "<|vision_start|><|image_pad|><|vision_end|>"}
"""What a family's chat template writes around its image token and its processor does not."""


@dataclass(frozen=True)
class Inputs:
    """Prompts with images, and answers after them where there are any, padded on the right.

    Attributes:
        tensors: what the model's forward takes: `input_ids`, `attention_mask`, pixels and what else the family has.
        prompts: length of each row's prompt, in tokens; its last token stands at `prompts - 1`.
        answers: positions of the answer's tokens (the last is the end of the text), -1 where a row has fewer; token
            `ids[answers]` is what the logits at `answers - 1` should name.
        marked: by row and asked range of characters, the positions of the tokens that hold some of it.
    """

    tensors: dict[str, Tensor]
    prompts: Int[Tensor, " batch"]
    answers: Int[Tensor, "batch answer"]
    marked: tuple[tuple[tuple[int, ...], ...], ...] = ()

    @property
    def ids(self) -> Int[Tensor, "batch tokens"]:
        return self.tensors["input_ids"]


@dataclass(frozen=True, kw_only=True)
class VisionLanguageModel(Routed):
    """A frozen vision-language model with its processor; its language tower on the seam, or not.

    Attributes:
        tokenizer: the processor's, a fast one.
        processor: turns texts and images into tensors.
        image_token_id: the token at whose places the model puts image features.
    """

    processor: ProcessorMixin
    image_token_id: int

    @property
    def identity(self) -> Identity:
        """As of a language model; how images are prepared belongs to it, too."""
        return identity(self.model, self.tokenizer, self.processor)

    @property
    def n_layers(self) -> int:
        """Layers of the language tower."""
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def end(self) -> int:
        """The token that ends an answer.

        Raises:
            AnchorsError: the tokenizer has none.
        """
        if self.tokenizer.eos_token_id is None:
            raise AnchorsError(
                f"The tokenizer of {self.name!r} has no end-of-text token.",
                "Set its eos_token: without one an answer never ends.",
                code="tokenizer",
            )
        return self.tokenizer.eos_token_id

    def encode(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        answers: Sequence[str] | None = None,
        *,
        marks: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> Inputs:
        """Tensors of some prompts on the model's device.

        Args:
            texts: prompts; each `<image>` in them stands for an image. BLIP-2's processor puts one image before each text:
                there a prompt begins with `<image>` and has no other.
            images: of each prompt, in this order.
            answers: what comes after each prompt; tokenised by itself without special tokens, then the end of the text,
                so that the prompt's tokens do not depend on it.
            marks: of each prompt, ranges of characters (first, after last) whose tokens are to be found.

        Raises:
            AnchorsError: other numbers of images than places; image tokens that are not the images'; a prompt longer
                than the model's positions; a mark that no token holds.
        """
        place = str(self.processor.image_token)  # ty: ignore[missing-attribute] - of every processor of images
        rows = self._rows(texts, images, place)
        ids: list[list[int]] = rows["input_ids"]
        marked = () if marks is None else self._marked(texts, rows, place, marks)
        written = (
            [] if answers is None else self.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
        )
        written = [[*tokens, self.end] for tokens in written]
        after = written or [[] for _ in ids]
        length = max(len(row) + len(own) for row, own in zip(ids, after, strict=True))
        if self.context is not None and length > self.context:
            raise AnchorsError(
                f"A prompt of {length} tokens is longer than the {self.context} that {self.name!r} has positions for.",
                "Show fewer demonstrations, or smaller images.",
                code="length",
            )

        def padded(row: Sequence[int], more: Sequence[int], fill: int, size: int = length) -> list[int]:
            return [*row, *more, *[fill] * (size - len(row) - len(more))]

        # Which token pads is of no account, as long as it asks for no image.
        tensors = {
            "input_ids": torch.tensor([padded(r, a, self._filling) for r, a in zip(ids, after, strict=True)]),
            "attention_mask": torch.tensor(
                [padded([1] * len(r), [1] * len(a), 0) for r, a in zip(ids, after, strict=True)]
            ),
        }
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in rows and name in self._taken:
                kinds = [padded(r, [0] * len(a), 0) for r, a in zip(rows[name], after, strict=True)]
                tensors[name] = torch.tensor(kinds)
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            if name in rows and name in self._taken:  # of the prompts alone: no answer stands in them
                most = max(map(len, rows[name]))
                tensors[name] = torch.tensor([padded(r, [], 0, most) for r in rows[name]])
        pixels = {name: x for name, x in rows.items() if isinstance(x, Tensor)}
        most = max(map(len, after))
        return Inputs(
            tensors={name: x.to(self.device) for name, x in (tensors | pixels).items()},
            prompts=torch.tensor([len(row) for row in ids], device=self.device),
            answers=torch.tensor(
                [
                    padded(range(len(r), len(r) + len(a)), [], -1, most)
                    for r, a in zip(ids, after, strict=True)
                ],
                dtype=torch.long,
                device=self.device,
            ).view(len(ids), most),
            marked=marked,
        )

    @property
    def _taken(self) -> set[str]:
        """Names of the tensors that the model's forward takes."""
        return set(inspect.signature(self.model.forward).parameters)

    @property
    def _before_texts(self) -> bool:
        """Whether the processor puts the tokens of one image before each text, wherever that names one (BLIP-2)."""
        return hasattr(self.processor, "num_query_tokens")

    @property
    def _filling(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0, 1)
        return next(i for i in known if i is not None and i != self.image_token_id)

    def _rows(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], place: str
    ) -> dict[str, Any]:
        """What the processor makes of prompts: lists of tokens, unpadded, and tensors of pixels."""
        for i, (text, own) in enumerate(zip(texts, images, strict=True)):
            if text.count(PLACE) != len(own):
                raise AnchorsError(
                    f"Prompt {i} has {text.count(PLACE)} places for images and {len(own)} images.",
                    f"Write {PLACE} once for each image.",
                    code="prompt",
                )
            if place != PLACE and place in text:
                raise AnchorsError(
                    f"Prompt {i} holds the model's image token {place!r} as text.",
                    f"Write {PLACE} for an image.",
                    code="prompt",
                )
            if self._before_texts and (len(own) != 1 or not text.startswith(PLACE)):
                raise AnchorsError(
                    f"Prompt {i} does not begin with its only image: {type(self.processor).__name__} puts one before each "
                    "text, and none elsewhere.",
                    f"Begin each prompt with {PLACE}, and show no more images.",
                    code="prompt",
                )
        framed = "" if self._before_texts else self._framed(place)
        shown = [text.replace(PLACE, framed) for text in texts]
        some = any(images)
        if some and not all(images):
            raise AnchorsError(
                "Some prompts of the batch have images and others have none.",
                "Encode them apart.",
                code="prompt",
            )
        try:
            # Only the images become tensors: rows of tokens differ in length until the answers stand behind them.
            rows = dict(
                self.processor(
                    text=shown,
                    images=[list(own) for own in images] if some else None,
                    text_kwargs={"padding": False, "truncation": False, "return_offsets_mapping": True},
                    images_kwargs={"return_tensors": "pt"},
                    return_text_replacement_offsets=True,
                )
            )
        except (ValueError, IndexError) as error:
            raise AnchorsError(
                f"The processor of {self.name!r} refuses these prompts: {error}",
                "Are the images of a size that it knows?",
                code="prompt",
            ) from error
        if self._before_texts:
            self._set_before(rows)
        return rows

    def _set_before(self, rows: dict[str, Any]) -> None:
        """Make the offsets of a processor that puts an image before each text those of a text that has grown there.

        Raises:
            AnchorsError: the processor puts other image tokens there than the model makes features for.
        """
        made, grown = self.model.config.num_query_tokens, []
        for ids, offsets in zip(rows["input_ids"], rows["offset_mapping"], strict=True):
            if ids[:made] != [self.image_token_id] * made or self.image_token_id in ids[made:]:
                raise AnchorsError(
                    f"The processor of {self.name!r} puts {ids.count(self.image_token_id)} image tokens ({self.image_token_id}) "
                    f"before a prompt, and {type(self.model).__name__} makes {made} features of an image.",
                    "Give the processor the num_query_tokens of the model's config.json, and the config the number of the "
                    "processor's image token.",
                    code="tokenizer",
                )
            end = offsets[made - 1][1]
            offsets[made:] = [(a + end, b + end) for a, b in offsets[made:]]
            grown.append([{"new_span": (0, end)}])
        rows["text_replacement_offsets"] = grown

    def _framed(self, place: str) -> str:
        framed = FRAMES.get(place, place)
        known = self.tokenizer.get_vocab()
        return framed if "<|vision_start|>" in known else place

    def _marked(
        self,
        texts: Sequence[str],
        rows: dict[str, Any],
        place: str,
        marks: Sequence[Sequence[tuple[int, int]]],
    ) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Positions of the tokens that hold some of each asked range of characters."""
        found = []
        around = 0 if self._before_texts else len(self._framed(place)) - len(place)
        grown = rows.get("text_replacement_offsets") or [[] for _ in texts]
        for i, (text, own) in enumerate(zip(texts, marks, strict=True)):
            # How much longer the text became at each image.
            longer = [around + g["new_span"][1] - g["new_span"][0] - len(PLACE) for g in grown[i]]
            row = []
            for place_of in own:
                first, last = (at + sum(longer[: text[:at].count(PLACE)]) for at in place_of)
                tokens = tuple(
                    at
                    for at, (a, b) in enumerate(rows["offset_mapping"][i])
                    if a < last and b > first and b > a
                )
                if not tokens:
                    raise AnchorsError(
                        f"No token of prompt {i} holds {text[slice(*place_of)]!r}.",
                        "Does the tokenizer drop it?",
                        code="tokenizer",
                    )
                row.append(tokens)
            found.append(tuple(row))
        return tuple(found)


def load_vlm(
    source: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    revision: str | None = None,
    routed: bool = False,
) -> VisionLanguageModel:
    """Load a vision-language model and its processor, from safetensors only and without code of its own.

    Args:
        source: hub id or local directory; `tiny-vlm` is the small one that comes with the package.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: one of `anchors.model.routed.DTYPES`, or auto: float32, on CUDA tf32.
        revision: branch, tag or commit of a hub model.
        routed: put the language tower on the seam (see `route_tower`).

    Raises:
        AnchorsError: it cannot be found or read, is not whole (see `anchors.load`), or is no vision-language model.
        RoutingError: the tower's attention does not pass through the seam.

    Example:
        >>> vlm = load_vlm("HuggingFaceTB/SmolVLM-256M-Instruct", routed=True)
        >>> inputs = vlm.encode(["<image> What is this? Answer:"], [[picture]], [" a cat"])
    """
    where, precision = placed(device, precision)
    name = str(source)
    refuse_revision(source, revision)
    place = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not place.is_dir():
        raise AnchorsError(
            f"The model {name!r} is not a directory.", "Give a hub id or a directory.", code="model-not-found"
        )
    here = TINY_FOLDER if name == TINY and not place.exists() else place
    origin = Origin(str(here) if here.is_dir() else name, name, revision)
    model = vision_language_model(origin, dtype=DTYPES[precision])
    processor = processor_of(origin)
    return prepare_vlm(model.to(where), processor, name, precision, routed=routed)


def prepare_vlm(
    model: PreTrainedModel, processor: ProcessorMixin, name: str, precision: str, *, routed: bool = False
) -> VisionLanguageModel:
    """Freeze a loaded model; with `routed`, put its language tower on the seam.

    Raises:
        AnchorsError: the processor has no image token, or no fast tokenizer; to be routed: see `witness_of_tower`.
        RoutingError: see `route_tower`, `prove`.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    config = model.config
    image_token_id = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if tokenizer is None or image_token_id is None or getattr(processor, "image_token", None) is None:
        raise AnchorsError(
            f"{name!r} has no image token: {type(model).__name__} with {type(processor).__name__}.",
            "Models that put image features at places of their own token are understood.",
            code="model-kind",
        )
    if not tokenizer.is_fast:
        raise AnchorsError(
            f"The tokenizer of {name!r} is a slow one and gives no character offsets.",
            "Convert it to a fast tokenizer (tokenizer.json).",
            code="tokenizer",
        )
    model.eval().requires_grad_(False)
    sound(model, name)
    vlm = VisionLanguageModel(
        model=model,
        processor=processor,
        tokenizer=tokenizer,
        name=name,
        precision=precision,
        image_token_id=image_token_id,
    )
    witness = witness_of_tower(vlm) if routed else None
    without_memory(model)
    embedding = model.get_input_embeddings()
    made = apply([guarded(embedding, name)]) if beyond(tokenizer, embedding, name) else ()
    modules = route_tower(model) if routed else ()
    vlm = replace(vlm, modules=modules, altered=made, witness=witness)
    if routed:
        prove(vlm)
    return vlm
