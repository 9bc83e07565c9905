"""Few-shot prompts with images, drawn from a suite.

A prompt is written as the suite's models were trained: demonstrations of the query's own kind, each prompt followed by
its answer, the suite's separator between them. The label word is the word of the answer that depends on the image
(`Example.label`), or else the whole answer; what stands before it in the query's answer goes into the prompt, so that
the target is the last token before the model has to know what it saw.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from anchors.errors import AnchorsError, demand_seed
from anchors.injection.asking.evaluate import greedy
from anchors.injection.asking.suite import Example, Suite, pictures
from anchors.injection.asking.vlm import VisionLanguageModel
from anchors.injection.image_flow.flow import ImagePrompt

NEW_TOKENS = 16
"""The longest answer that a model gives by itself."""


@dataclass(frozen=True)
class ImagePrompts:
    """Prompts of one scenario.

    Attributes:
        prompts: one per query.
        kinds: of the queries.
    """

    prompts: tuple[ImagePrompt, ...]
    kinds: tuple[str, ...]


def image_prompts(
    vlm: VisionLanguageModel,
    suite: Suite,
    scenario: str,
    *,
    shots: int,
    count: int,
    seed: int = 0,
    said: Mapping[int, str] | None = None,
) -> ImagePrompts:
    """Prompts about the first test examples of a scenario, each with demonstrations of its own.

    Demonstrations come from the split `demonstration`, are of the query's kind, and are drawn so that no two different
    label words of a prompt begin with the same token.

    Args:
        vlm: its tokenizer tells which first tokens are the same.
        suite: whose examples.
        scenario: its name.
        shots: demonstrations of each prompt.
        count: prompts; the kinds take turns.
        seed: of the drawing.
        said: by number of a demonstration what the model itself answers there; then no right answer is used, and the
            query's answer is nobody's.

    Raises:
        AnchorsError: too few demonstrations of a kind, or too few that the model itself answers.
    """
    demand_seed(seed)
    queries = _in_turns(suite.examples(scenario, "test"), count)
    pool: dict[str, list[Example]] = {}
    for example in suite.examples(scenario, "demonstration") if shots else ():
        answer = example if said is None else replace(example, answer=said[example.number], label=None)
        if answer.answer:
            pool.setdefault(example.kind, []).append(answer)
    first = _first_tokens(vlm, suite)
    rng = np.random.default_rng([seed, shots])
    chosen = []
    for query in queries:
        taken = [] if said is not None else [query]
        own = pool.get(query.kind, [])
        if said is not None and len(own) < shots:
            raise AnchorsError(
                f"{vlm.name!r} itself answers {len(own)} demonstrations of kind {query.kind!r} with any word at all: too few "
                f"for {shots}.",
                "Is it trained? Show fewer with --shots, or add examples with the split `demonstration`.",
                code="too-few",
            )
        for place in rng.permutation(len(own)):
            if len(taken) == shots + (said is None):
                break
            other = own[place]
            clash = any(_word(e) != _word(other) and first(e) == first(other) for e in taken)
            if not clash and other.image != query.image:
                taken.append(other)
        demonstrations = taken[said is None :]
        if len(demonstrations) < shots:
            raise AnchorsError(
                f"{suite.name!r} has {len(demonstrations)} demonstrations of kind {query.kind!r} whose label words "
                f"begin with different tokens than the others': too few for {shots}.",
                "Show fewer with --shots, or add examples with the split `demonstration`.",
                code="too-few",
            )
        chosen.append((query, demonstrations))
    images = _opened([e for query, own in chosen for e in (*own, query)])
    prompts = tuple(_written(suite, query, own, images, said is None) for query, own in chosen)
    return ImagePrompts(prompts, tuple(query.kind for query in queries))


def _in_turns(examples: Sequence[Example], count: int) -> list[Example]:
    """The first examples, the kinds taking turns: a file may hold one kind after the other."""
    by_kind: dict[str, list[Example]] = {}
    for example in examples:
        by_kind.setdefault(example.kind, []).append(example)
    turns = [(place, kind, e) for kind, own in enumerate(by_kind.values()) for place, e in enumerate(own)]
    return [e for _, _, e in sorted(turns, key=lambda turn: turn[:2])[:count]]


def _place(example: Example) -> tuple[int, int]:
    """Where the label word stands in the answer: the last place where the label is a whole word, or else all of it."""
    whole = (0, len(example.answer))
    if not example.label:
        return whole
    found = re.finditer(rf"(?<!\w){re.escape(example.label)}(?!\w)", example.answer)
    return [whole, *(match.span() for match in found)][-1]


def _word(example: Example) -> str:
    """The label word of an example."""
    start, end = _place(example)
    return example.answer[start:end]


def _span(suite: Suite, example: Example) -> tuple[int, int]:
    """Where the label word stands in the written answer, in which the template's own words are no label."""
    before = suite.answer.index("{answer}")
    start, end = _place(example)
    return before + start, before + end


def _first_tokens(vlm: VisionLanguageModel, suite: Suite) -> Callable[[Example], int]:
    known: dict[tuple[str, str], int] = {}

    def first(example: Example) -> int:
        key = (example.answer, _word(example))
        if key not in known:
            start, end = _span(suite, example)
            found = vlm.tokenizer(
                suite.written(example), add_special_tokens=False, return_offsets_mapping=True
            )
            known[key] = next(
                token
                for token, (a, b) in zip(found["input_ids"], found["offset_mapping"], strict=True)
                if b > start and a < end
            )
        return known[key]

    return first


def _opened(examples: Sequence[Example]) -> dict[int, Image.Image]:
    """The picture of each example, by identity."""
    return {id(e): p for e, p in zip(examples, pictures(examples), strict=True)}


def _written(
    suite: Suite,
    query: Example,
    demonstrations: Sequence[Example],
    images: Mapping[int, Image.Image],
    answered: bool,
) -> ImagePrompt:
    text, labels = "", []
    for example in demonstrations:
        text += suite.prompt(example)
        start, end = _span(suite, example)
        labels.append((len(text) + start, len(text) + end))
        text += suite.written(example) + suite.separator
    begins = len(text)
    text += suite.prompt(query)
    answer = None
    if answered:
        start, end = _span(suite, query)
        answer = (len(text) + start, len(text) + end)
        text += suite.written(query)[:end]
    shown = tuple(images[id(e)] for e in (*demonstrations, query))
    return ImagePrompt(text, shown, tuple(labels), begins, answer, query.number)


def own_answers(
    vlm: VisionLanguageModel, suite: Suite, scenario: str, batch: int = 32, limit: int | None = None
) -> dict[int, str]:
    """What the model, as it is now, answers to the demonstrations of a scenario, or the first of them, by greedy decoding."""
    examples = suite.examples(scenario, "demonstration", limit)
    shown = _opened(examples)
    by_length: dict[int, list[Example]] = {}
    for example in examples:
        length = vlm.encode([suite.prompt(example)], [[shown[id(example)]]]).ids.shape[1]
        by_length.setdefault(length, []).append(example)
    said = {}
    for own in by_length.values():  # as many tokens: no padding
        for start in range(0, len(own), batch):
            part = own[start : start + batch]
            inputs = vlm.encode([suite.prompt(e) for e in part], [[shown[id(e)]] for e in part])
            texts = greedy(vlm, inputs.tensors, NEW_TOKENS)
            said |= {e.number: text for e, text in zip(part, texts, strict=True)}
    return said
