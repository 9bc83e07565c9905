"""Exact match of whole answers, by forced decoding.

The prompt and the right answer run through the model once. Where the most likely token is the answer's at every place,
end of text included, greedy decoding would have written exactly this answer; where it is not, greedy decoding leaves the
answer at the first such place. So one forward pass of a batch gives what generating would, exactly.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from anchors.errors import AnchorsError, CertificateError
from anchors.injection.asking.suite import Example, Shown, Suite, pictures
from anchors.injection.asking.vlm import Inputs, VisionLanguageModel
from anchors.model.language import LanguageModel
from anchors.model.lengths import CHOOSING, Change, alike, changes
from anchors.model.witness import TOLERANCE

TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens of a batch by device: about 1 GB of activations in a model of width 576."""
CAPTION = 48
"""The most new tokens of a caption."""


@dataclass(frozen=True)
class Batch:
    """Prompts with their right answers, ready for a model.

    Attributes:
        places: [batch] which of the prompts these are.
        inputs: what the model takes, on its device.
        rows, columns: [answer tokens] where each answer token is predicted: one place before its own.
        targets: [answer tokens] the answer tokens.
        features: what the vision tower and the projector make of the images; None where not computed.
    """

    places: tuple[int, ...]
    inputs: dict[str, Tensor]
    rows: Int[Tensor, " answers"]
    columns: Int[Tensor, " answers"]
    targets: Int[Tensor, " answers"]
    features: Any = None


@dataclass(frozen=True)
class Prepared:
    """Examples encoded once, to be scored again and again while the weights of the language tower change.

    Attributes:
        examples: of one scenario.
        which: for each example the prompt that is its; prompts that are the same to the model are there once.
        batches: of prompts.
    """

    examples: tuple[Example, ...]
    which: tuple[int, ...]
    batches: tuple[Batch, ...]


def evaluate(
    vlm: VisionLanguageModel,
    suite: Suite,
    examples: Sequence[Example],
    image: Shown = "own",
    batch: int | None = None,
) -> pd.DataFrame:
    """Which examples a VLM answers right.

    Args:
        vlm: the model.
        suite: how prompts are written.
        examples: of it.
        image: what is shown, see `anchors.injection.asking.suite.pictures`.
        batch: prompts at once; None chooses by their length.

    Returns:
        Columns number, kind, correct: one row per example, in their order.
    """
    return score(vlm, prepare(vlm, suite, examples, image, batch))


def prepare(
    vlm: VisionLanguageModel,
    suite: Suite,
    examples: Sequence[Example],
    image: Shown = "own",
    batch: int | None = None,
    *,
    features: bool = False,
) -> Prepared:
    """Encode prompts, images and right answers.

    Args:
        vlm, suite, examples, image, batch: as in `evaluate`.
        features: compute the image features, too. They stay right as long as only the language tower changes.
    """
    shown = pictures(examples, image)
    keys = [(id(p), suite.prompt(e), suite.written(e)) for p, e in zip(shown, examples, strict=True)]
    unique = dict.fromkeys(keys)
    place = {key: i for i, key in enumerate(unique)}
    images = {id(p): p for p in shown}
    prompts = [(text, images[i], answer) for i, text, answer in unique]

    def encoded(chosen: Sequence[int]) -> Batch:
        texts, own, answers = zip(*(prompts[i] for i in chosen), strict=True)
        return _image_batch(chosen, vlm.encode(texts, [[picture] for picture in own], answers))

    # Prompts of similar length go together, so that little is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0]) + len(prompts[i][2]))
    if batch is None:
        batch = _fitting(vlm.device, encoded(order[-1:]).inputs["input_ids"].shape[1])
    kinds = tuple(c for c in changes(vlm.model.config) if c.rotary or c.what in CHOOSING)
    # How many tokens an image takes is the processor's affair: where it matters, each prompt is encoded to know.
    sized = (
        {i: encoded([i]).inputs["input_ids"].shape[1] for i in order} if kinds else dict.fromkeys(order, 0)
    )
    batches = tuple(encoded(chosen) for chosen in _together(order, sized, batch, kinds))
    if features:
        batches = tuple(replace(b, features=image_features(vlm, b.inputs)) for b in batches)
    return Prepared(tuple(examples), tuple(place[key] for key in keys), batches)


@torch.no_grad()
def score(vlm: VisionLanguageModel, prepared: Prepared) -> pd.DataFrame:
    """Which prepared examples the VLM, as it is now, answers right: columns number, kind, correct."""
    found = {}
    for batch in prepared.batches:
        held = nullcontext() if batch.features is None else showing(vlm, batch.features)
        with held, vlm.arithmetic():
            found |= _right(vlm.model, batch)
    return _table(prepared.examples, [found[i] for i in prepared.which])


@torch.no_grad()
def image_features(vlm: VisionLanguageModel, inputs: dict[str, Tensor]) -> Any:
    """What the vision tower and the projector make of the images of a batch, as the model itself takes it in."""
    inner: Any = vlm.model.base_model
    original, taken = inner.get_image_features, []

    def record(*args: Any, **options: Any) -> Any:
        taken.append(original(*args, **options))
        return taken[-1]

    inner.get_image_features = record
    try:
        with vlm.arithmetic():
            inner(**inputs, use_cache=False)
    finally:
        del inner.get_image_features
    if len(taken) != 1:
        raise AnchorsError(
            f"{vlm.name} asked {len(taken)} times for the features of one batch of images.",
            "Its features cannot be kept; this family cannot be swept.",
            code="model-kind",
        )
    if not isinstance(taken[0], ModelOutput):
        return taken[0]
    # The states of every layer of the vision tower go along with some outputs, and nobody reads them.
    return type(taken[0])(**{k: v for k, v in taken[0].items() if k not in ("hidden_states", "attentions")})


@contextmanager
def showing(vlm: VisionLanguageModel, features: Any) -> Generator[None]:
    """Inside, the VLM sees these features and computes none."""
    inner: Any = vlm.model.base_model
    inner.get_image_features = lambda *args, **options: features
    try:
        yield
    finally:
        del inner.get_image_features


@torch.no_grad()
def evaluate_text(
    model: LanguageModel,
    suite: Suite,
    examples: Sequence[Example],
    texts: Sequence[str] | None = None,
    batch: int | None = None,
) -> pd.DataFrame:
    """Which examples a language model answers right when it is told what the image shows.

    Args:
        model: the language model.
        suite: how prompts are written.
        examples: of it.
        texts: what stands in the place of each image; None for the true `Example.text` (the text oracle). With captions
            of the VLM this is the cascade.
        batch: prompts at once; None chooses by their length.

    Returns:
        Columns number, kind, correct.
    """
    given = [e.text for e in examples] if texts is None else list(texts)
    keys = [(suite.prompt(e, text), suite.written(e)) for e, text in zip(examples, given, strict=True)]
    place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    ends = model.tokenizer.eos_token_id
    if ends is None:
        raise AnchorsError(
            f"The tokenizer of {model.name} has no end-of-text token: no answer ever ends.", code="tokenizer"
        )
    pairs = [
        (model.tokenizer(prompt)["input_ids"], [*_plain(model.tokenizer, answer), ends])
        for prompt, answer in place
    ]
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)
    batch = batch or _fitting(model.device, max(lengths))
    found: dict[int, bool] = {}
    for chosen in _together(order, dict(enumerate(lengths)), batch, model.changes):
        with model.arithmetic():
            found |= _right(model.model, _text_batch(chosen, pairs, model.device))
    return _table(examples, [found[place[key]] for key in keys])


@torch.no_grad()
def captions(
    vlm: VisionLanguageModel, suite: Suite, examples: Sequence[Example], batch: int | None = None
) -> list[str]:
    """What the VLM says the image of each example shows, by greedy decoding.

    Raises:
        AnchorsError: the suite has no caption question.
    """
    if suite.caption is None:
        raise AnchorsError(
            f"The suite {suite.name!r} has no question that makes the VLM describe an image.",
            'Add "caption" to suite.json, or measure without the cascade.',
            code="suite",
        )
    shown = {e.image: p for e, p in zip(examples, pictures(examples), strict=True)}
    prompt = suite.prompt(question=suite.caption)
    said: dict[Any, str] = {}
    for size in dict.fromkeys(p.size for p in shown.values()):  # of one size: as many tokens, no padding
        files = [f for f, p in shown.items() if p.size == size]
        length = vlm.encode([prompt], [[shown[files[0]]]]).ids.shape[1]
        step = batch or _fitting(vlm.device, length + CAPTION)
        for i in range(0, len(files), step):
            own = files[i : i + step]
            inputs = vlm.encode([prompt] * len(own), [[shown[f]] for f in own]).tensors
            said |= dict(zip(own, greedy(vlm, inputs, CAPTION), strict=True))
    return [said[e.image] for e in examples]


@torch.no_grad()
def greedy(vlm: VisionLanguageModel, inputs: dict[str, Tensor], tokens: int) -> list[str]:
    """What the VLM, as it is now, writes: the most likely token each time, and nothing else decides.

    Args:
        vlm: the model.
        inputs: encoded prompts of equal length.
        tokens: the most that it writes.
    """
    # Whatever a call leaves open `generate` fills in from here: a repetition penalty, a number of beams. Some (BLIP-2) leave
    # it to the `generate` of their language model, which reads its own.
    asked: Any = vlm.model
    models: list[Any] = [m for m in asked.modules() if hasattr(m, "generation_config")]
    own = [m.generation_config for m in models]
    try:
        for model in models:
            model.generation_config = GenerationConfig(
                do_sample=False, max_new_tokens=tokens, eos_token_id=vlm.end, pad_token_id=vlm.end
            )
        with vlm.arithmetic():
            ids = asked.generate(**inputs)
    finally:
        for model, config in zip(models, own, strict=True):
            model.generation_config = config
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in vlm.tokenizer.batch_decode(new, skip_special_tokens=True)]


@torch.no_grad()
def demand_alone(vlm: VisionLanguageModel, suite: Suite, examples: Sequence[Example]) -> None:
    """Hold what `score` reads of the shortest and the longest prompt, side by side and with kept image features, against the
    whole model, asked for each alone.

    Raises:
        CertificateError: what is most likely at a place of an answer is less likely there to the whole model.
    """
    by_length = sorted(examples, key=lambda e: len(suite.prompt(e) + suite.written(e)))
    pair = [by_length[0], by_length[-1]]
    ours: dict[int, Tensor] = {}
    together = prepare(vlm, suite, pair, batch=2, features=True)
    for batch in together.batches:
        with showing(vlm, batch.features), vlm.arithmetic():
            most = _most_likely(vlm.model, batch)
        ours |= {place: most[batch.rows == row] for row, place in enumerate(batch.places)}
    for example, place in zip(pair, together.which, strict=True):
        (alone,) = prepare(vlm, suite, [example], batch=1).batches
        with vlm.arithmetic():
            theirs = vlm.model(**alone.inputs, use_cache=False).logits[alone.rows, alone.columns].float()
        lost = theirs.amax(-1) - theirs.gather(-1, ours[place][:, None])[:, 0]
        if not (error := float((lost / theirs.abs().amax(-1)).max())) <= TOLERANCE[vlm.precision]:
            raise CertificateError(
                f"{vlm.name} failed: beside another prompt, and with kept features of its image, it answers example "
                f"{example.number} otherwise than alone: logits differ by {error:.1e} of their size.",
                f"Allowed at {vlm.precision}: {TOLERANCE[vlm.precision]:.0e}. Try --precision float32, or --batch 1.",
                code="not-itself",
            )


def _together(
    order: Sequence[int], lengths: Mapping[int, int], size: int, found: tuple[Change, ...]
) -> Iterator[list[int]]:
    """Batches in an order, none of them across a length at which the family changes, see `anchors.model.lengths.alike`."""
    for _, same in groupby(order, key=lambda i: alike(found, lengths[i])):
        own = list(same)
        yield from (own[i : i + size] for i in range(0, len(own), size))


def _right(model: Any, batch: Batch) -> dict[int, bool]:
    """For each prompt of a batch, whether every token of its answer is the most likely one at its place."""
    most = _most_likely(model, batch)
    wrong = torch.zeros(len(batch.places), device=most.device).index_add_(
        0, batch.rows, (most != batch.targets).float()
    )
    return dict(zip(batch.places, (wrong == 0).tolist(), strict=True))


def _most_likely(model: Any, batch: Batch) -> Int[Tensor, " answers"]:
    if model.base_model is model:  # no part of it ends before the output matrix
        return model(**batch.inputs, use_cache=False).logits[batch.rows, batch.columns].argmax(-1)
    hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
    # Only these rows of the output matrix are needed, and monotone scalings of logits change no argmax.
    return model.get_output_embeddings()(hidden[batch.rows, batch.columns]).argmax(-1)


def _image_batch(places: Sequence[int], inputs: Inputs) -> Batch:
    rows, number = (inputs.answers >= 0).nonzero(as_tuple=True)
    at = inputs.answers[rows, number]
    return Batch(tuple(places), inputs.tensors, rows, at - 1, inputs.ids[rows, at])


def _text_batch(
    chosen: Sequence[int], pairs: Sequence[tuple[list[int], list[int]]], device: torch.device
) -> Batch:
    """Right-padded prompts with their answers: padding is seen by no real token, so there is no mask."""
    width = max(len(pairs[i][0]) + len(pairs[i][1]) for i in chosen)
    ids = torch.zeros(len(chosen), width, dtype=torch.long)
    rows, columns, targets = [], [], []
    for row, (prompt, answer) in enumerate(pairs[i] for i in chosen):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        rows += [row] * len(answer)
        columns += range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        targets += answer
    places = torch.tensor([rows, columns, targets]).to(device)
    steps = torch.arange(width).expand_as(ids)
    return Batch(tuple(chosen), {"input_ids": ids.to(device), "position_ids": steps.to(device)}, *places)


def _plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _fitting(device: torch.device, tokens: int) -> int:
    """How many prompts of so many tokens go together."""
    return max(1, TOKENS.get(device.type, TOKENS["cpu"]) // tokens)


def _table(examples: Sequence[Example], correct: Sequence[bool]) -> pd.DataFrame:
    return pd.DataFrame(
        {"number": [e.number for e in examples], "kind": [e.kind for e in examples], "correct": list(correct)}
    )
