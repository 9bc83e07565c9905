"""Questions and answers as arrays of tokens, made once before a training, so that a step only indexes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anchors.injection.demo.world import Asked, QuestionKind, Scene, World

IGNORED = -100


@dataclass(frozen=True)
class Item:
    """A question about a scene, or about a picture of it.

    Attributes:
        picture: number of the picture; None for the scene in words.
    """

    scene: Scene
    asked: Asked
    picture: int | None = None


@dataclass(frozen=True)
class Prompts:
    """Rows of the same number of items each: demonstrations that are answered, and a last one.

    Every answer is a target, also those of demonstrations, and after each the end of the text: so a row of n items
    trains prompts of 0 to n - 1 demonstrations.

    Attributes:
        ids: padded on the right; the tokens of pictures stand in place.
        positions: whose next token is a target.
        targets: `IGNORED` beyond a row's own.
        pictures: the pictures in their order; no columns for texts.
        items: of a row.
    """

    ids: Int[Tensor, "rows tokens"]
    positions: Int[Tensor, "rows targets"]
    targets: Int[Tensor, "rows targets"]
    pictures: Int[Tensor, "rows items"]
    items: int

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Int[Tensor, " taken"] | slice) -> "Prompts":
        parts = (self.ids, self.positions, self.targets, self.pictures)
        return Prompts(*(part[rows] for part in parts), self.items)

    def to(self, device: torch.device) -> "Prompts":
        parts = (self.ids, self.positions, self.targets, self.pictures)
        return Prompts(*(part.to(device) for part in parts), self.items)


@dataclass(frozen=True)
class Encoder:
    """From items to tokens.

    The parts of a prompt are encoded one by one; the templates begin and end where a tokenizer splits anyway, so the
    tokens are those of the whole text.

    Attributes:
        image_id: the token that stands for a patch of a picture.
        image_tokens: patches of a picture.
    """

    world: World
    tokenizer: PreTrainedTokenizerBase
    image_id: int | None = None
    image_tokens: int = 0

    @cached_property
    def _ids(self) -> Callable[[str], tuple[int, ...]]:
        @cache
        def encoded(text: str) -> tuple[int, ...]:
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

        return encoded

    def prompt(self, item: Item) -> tuple[int, ...]:
        """A question with its scene, up to where the answer begins."""
        if item.picture is None:
            text = item.asked.text or self.world.describe(item.scene)
            return self._ids(self.world.template.format(image=text, question=item.asked.question))
        before, after = self.world.template.split("{image}")
        shown = (cast(int, self.image_id),) * self.image_tokens
        return self._ids(before) + shown + self._ids(after.format(question=item.asked.question))

    def answer(self, item: Item) -> tuple[int, ...]:
        return self._ids(self.world.answer.format(answer=item.asked.answer))

    def prompts(self, rows: Sequence[Sequence[Item]]) -> Prompts:
        """Rows of items, each row one text."""
        separator = self._ids(self.world.separator)
        ids, positions, targets, pictures = [], [], [], []
        for row in rows:
            tokens: list[int] = []
            where: list[int] = []
            wanted: list[int] = []
            for number, item in enumerate(row):
                tokens += (separator if number else ()) + self.prompt(item)
                answer = self.answer(item)
                where += range(len(tokens) - 1, len(tokens) + len(answer))
                wanted += (*answer, self.tokenizer.eos_token_id)
                tokens += answer
            ids.append(tokens)
            positions.append(where)
            targets.append(wanted)
            pictures.append([item.picture for item in row if item.picture is not None])
        return Prompts(
            _padded(ids, self.tokenizer.pad_token_id),
            _padded(positions, 0),
            _padded(targets, IGNORED),
            torch.tensor(pictures, dtype=torch.long),
            len(rows[0]),
        )


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Int[Tensor, "rows longest"]:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], dtype=torch.long)


def drawn_rows(
    tasks: Sequence[tuple[QuestionKind, float]],
    scenes: Sequence[tuple[Scene, int | None]],
    items: int,
    rows: int,
    rng: np.random.Generator,
) -> list[list[Item]]:
    """Rows of items of one kind each.

    Args:
        tasks: kinds of questions with their weights.
        scenes: what can be asked about, each with the number of its picture, or None to ask about the words.
        items: of a row.
        rows: how many.
        rng: draws kinds, scenes, and numbers in questions.
    """
    weights = np.array([weight for _, weight in tasks])
    fitting = [[pair for pair in scenes if task.fits(pair[0])] for task, _ in tasks]
    found = []
    for kind in rng.choice(len(tasks), rows, p=weights / weights.sum()):
        task, own = tasks[kind][0], fitting[kind]
        chosen = rng.integers(0, len(own), items)
        found.append([Item(own[i][0], task(own[i][0], rng), own[i][1]) for i in chosen])
    return found
