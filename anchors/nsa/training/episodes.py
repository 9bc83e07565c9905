"""Few-shot classification made on the fly: every episode has classes, keywords and label words of its own.

    <s> w w w w : L ; w w w w w : L ; …

A text holds words of its class among random ones. Which words make a class and which label word names it is drawn anew
for every episode, so nothing can be learnt by heart: to foretell a label, a model must gather a text's words somewhere
and look up the label word of earlier texts with the same words. Every label of the sequence is foretold.

Episode e of seed s is a pure function of (s, e): its random numbers are those of Philox keyed with (s, e), so that a
training that goes on after a break needs no generator's state.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedTokenizerFast

from anchors.errors import AnchorsError
from anchors.nsa.training.data import Sequences, uniform
from anchors.nsa.training.vocabulary import BEGIN, COLON, SEMICOLON, Vocabulary
from anchors.tasks.prompts import QUERY, Prompt, Role

BEGINNING, WORD, PREFIX, LABEL, SEPARATOR = range(5)
"""What a token is: BOS, a word of a text, `:`, a label word, `;`."""

_FRAME = 3  # tokens of a demonstration that are not its text


@dataclass(frozen=True)
class Batch:
    """Episodes side by side.

    Attributes:
        ids: tokens.
        kinds: what each token is, `BEGINNING` to `SEPARATOR`.
        numbers: the demonstration each token belongs to, -1 for BOS.
        classes: the class of each demonstration, as a number within its episode.
        labels: the label word of each class, as a token; -1 where an episode has fewer classes.
        keys: for each token the keyword it is, as a number within its episode, or -1.
    """

    ids: Int[np.ndarray, "batch tokens"]
    kinds: Int[np.ndarray, "batch tokens"]
    numbers: Int[np.ndarray, "batch tokens"]
    classes: Int[np.ndarray, "batch demonstrations"]
    labels: Int[np.ndarray, "batch classes"]
    keys: Int[np.ndarray, "batch tokens"]

    @cached_property
    def knowable(self) -> Bool[np.ndarray, "batch demonstrations"]:
        """Whether a demonstration's label can be known: one of its keywords stood in an earlier text.

        What is not knowable can only be guessed, so the mean over this is about the best accuracy there is.
        """
        rows, columns = np.nonzero(self.keys >= 0)
        keys, numbers = self.keys[rows, columns], self.numbers[rows, columns]
        first = np.full((len(self.ids), int(self.keys.max(initial=0)) + 1), np.iinfo(np.int64).max)
        np.minimum.at(first, (rows, keys), numbers)
        known = np.zeros(self.classes.shape, bool)
        seen = first[rows, keys] < numbers
        known[rows[seen], numbers[seen]] = True
        return known


@dataclass(frozen=True)
class Episode:
    """One sequence of demonstrations: `Batch`'s arrays without their first axis."""

    ids: Int[np.ndarray, " tokens"]
    kinds: Int[np.ndarray, " tokens"]
    numbers: Int[np.ndarray, " tokens"]
    classes: Int[np.ndarray, " demonstrations"]
    labels: Int[np.ndarray, " classes"]
    knowable: Bool[np.ndarray, " demonstrations"]
    vocabulary: Vocabulary

    @property
    def length(self) -> int:
        """Demonstrations whose label word stands in the sequence."""
        return int((self.kinds == LABEL).sum())

    def prompt(self, demonstrations: int | None = None) -> Prompt:
        """The first demonstrations, with the text after them as the query.

        Args:
            demonstrations: how many; all but the last whole one by default.

        Raises:
            AnchorsError: there are not that many, or none.
        """
        count = self.length - 1 if demonstrations is None else demonstrations
        if not 1 <= count < self.length:
            raise AnchorsError(
                f"{count} demonstrations and a query are wanted from an episode of {self.length} labelled texts.",
                f"Ask for 1 to {self.length - 1}.",
                code="option-value",
            )
        target = int(np.flatnonzero((self.numbers == count) & (self.kinds == PREFIX))[0])
        ids = tuple(int(i) for i in self.ids[: target + 1])
        kinds, numbers = self.kinds[: target + 1], self.numbers[: target + 1]
        names: dict[int, Role] = {WORD: "text", LABEL: "label"}
        positions = np.flatnonzero(kinds == LABEL)
        return Prompt(
            text=self.vocabulary.text(ids),
            ids=ids,
            roles=(*(names.get(int(kind), "format") for kind in kinds[:-1]), "target"),
            demonstrations=tuple(QUERY if n == count else max(int(n), 0) for n in numbers),
            label_positions=tuple(int(p) for p in positions),
            label_classes=tuple(int(c) for c in self.classes[:count]),
            label_ids=tuple(int(i) for i in self.labels),
            gold=int(self.classes[count]),
        )


@dataclass(frozen=True)
class Episodes:
    """What episodes are like.

    Attributes:
        tokens: length of a sequence; demonstrations fill it, the last one is cut off.
        classes: least and most classes of an episode.
        words: least and most words of a text.
        keywords: words that make a class; no two classes of an episode share one.
        keyword_rate: share of a text's words that are its class's; one always is.
        burstiness: probability that a demonstration has the class of one of the `recent` ones before it.
        recent: how far back that one may stand.
        skew: Zipf exponent of the classes' frequencies; 0 is uniform.
        vocabulary: of words and label words.
    """

    tokens: int = 1024
    classes: tuple[int, int] = (4, 8)
    words: tuple[int, int] = (5, 8)
    keywords: int = 4
    keyword_rate: float = 0.5
    burstiness: float = 0.0
    recent: int = 8
    skew: float = 0.0
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    def __post_init__(self) -> None:
        for name in ("classes", "words"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise AnchorsError(f"{name}: {low} to {high} is not a range from 1 on.", code="option-value")
        if self.classes[0] < 2:
            raise AnchorsError(
                f"An episode of {self.classes[0]} class has nothing to tell apart.", code="option-value"
            )
        most = self.classes[1]
        if most > self.vocabulary.label_words:
            raise AnchorsError(
                f"{most} classes need as many label words; there are {self.vocabulary.label_words}.",
                "Have more label words or fewer classes.",
                code="option-value",
            )
        if self.keywords < 1 or self.recent < 1:
            raise AnchorsError(
                "A class has at least one keyword, and `recent` is at least 1.", code="option-value"
            )
        if 2 * most * self.keywords > self.vocabulary.words:
            raise AnchorsError(
                f"{most} classes of {self.keywords} keywords take more than half of {self.vocabulary.words} words.",
                "Have more words, fewer classes or fewer keywords.",
                code="option-value",
            )
        for name in ("keyword_rate", "burstiness"):
            if not 0 <= getattr(self, name) <= 1:
                raise AnchorsError(f"{name} {getattr(self, name)} is not a probability.", code="option-value")
        if not 0 <= self.skew < 20:
            raise AnchorsError(f"A skew of {self.skew} is not an exponent from 0 to 20.", code="option-value")
        if self.tokens < 1 + 2 * (self.words[1] + _FRAME):
            raise AnchorsError(
                f"A sequence of {self.tokens} tokens does not hold two texts of {self.words[1]} words.",
                "Have longer sequences or shorter texts.",
                code="option-value",
            )

    @property
    def most(self) -> int:
        """Demonstrations that a sequence can hold at most, the one that is cut off included."""
        return -(-(self.tokens - 1) // (self.words[0] + _FRAME))

    def facts(self) -> dict[str, Any]:
        """What a training's numbers depend on."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "vocabulary"}
        vocabulary = {"label_words": self.vocabulary.label_words, "vocabulary": self.vocabulary.words}
        return (
            {"data": "episodes"}
            | {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()}
            | vocabulary
        )

    def batch(self, seed: int, numbers: range, *, held_out: bool = False) -> Batch:
        """Some episodes of a seed.

        Args:
            seed: from 0 on.
            numbers: which episodes.
            held_out: take them from another stream, which no training sees.
        """
        rows, most, words, tokens = len(numbers), self.most, self.vocabulary.words, self.tokens
        sizes = (1, words, self.vocabulary.label_words, 4 * most, most, tokens, tokens)
        drawn = np.split(uniform(seed, numbers, sum(sizes), held_out), np.cumsum(sizes)[:-1], axis=1)
        count = self.classes[0] + (drawn[0] * (self.classes[1] - self.classes[0] + 1)).astype(np.int64)
        vocabulary = np.argsort(drawn[1], axis=1, kind="stable") + self.vocabulary.first_word
        labels = (
            np.argsort(drawn[2], axis=1, kind="stable")[:, : self.classes[1]] + self.vocabulary.first_label
        )
        labels = np.where(np.arange(self.classes[1]) < count, labels, -1)
        classes = self._classes(drawn[3].reshape(rows, 4, most), count)
        lengths = self.words[0] + (drawn[4] * (self.words[1] - self.words[0] + 1)).astype(np.int64)

        starts = 1 + np.cumsum(lengths + _FRAME, axis=1) - (lengths + _FRAME)
        begins = np.zeros((rows, tokens + 1), np.int64)
        np.put_along_axis(begins, np.minimum(starts, tokens), 1, axis=1)
        which = np.cumsum(begins[:, :tokens], axis=1) - 1
        own = np.maximum(which, 0)
        place = np.arange(tokens) - np.take_along_axis(starts, own, 1)
        over = place - np.take_along_axis(lengths, own, 1)
        kinds = np.where(over < 0, WORD, PREFIX + over)
        kinds[:, 0] = BEGINNING

        kind_of_text = np.take_along_axis(classes, own, 1)
        certain = (drawn[3].reshape(rows, 4, most)[:, 3] * lengths).astype(np.int64)
        is_key = (drawn[5] < self.keyword_rate) | (place == np.take_along_axis(certain, own, 1))
        is_key &= kinds == WORD
        keys = kind_of_text * self.keywords + (drawn[6] * self.keywords).astype(np.int64)
        taken = self.classes[1] * self.keywords  # also where an episode has fewer classes
        noise = taken + (drawn[6] * (words - taken)).astype(np.int64)
        ids = np.take_along_axis(vocabulary, np.where(is_key, keys, noise), 1)
        ids = np.where(kinds == LABEL, np.take_along_axis(labels, kind_of_text, 1), ids)
        for kind, token in ((BEGINNING, BEGIN), (PREFIX, COLON), (SEPARATOR, SEMICOLON)):
            ids[kinds == kind] = token
        return Batch(ids, kinds, which, classes, labels, np.where(is_key, keys, -1))

    def rows(self, seed: int, numbers: range, *, held_out: bool = False) -> Sequences:
        """Episodes as training reads them."""
        batch = self.batch(seed, numbers, held_out=held_out)
        labels = batch.kinds == LABEL
        known = np.take_along_axis(batch.knowable, np.maximum(batch.numbers, 0), 1) & labels
        return Sequences(batch.ids, labels, batch.numbers, known)

    def lesson(self, share: float) -> "Episodes":
        """Easier episodes to begin with: at 0 two or three classes of one keyword, texts of one or two words.

        The loss falls only once a label word gathers its text, the query's `:` does, and the two match. What each of
        these gains without the others shrinks with the square of the tokens that attention is spread over at first:
        from short sequences training leaves that plateau in hundreds of steps, from long ones not in thousands.
        """

        def between(easy: int, own: int) -> int:
            return round(min(easy, own) + share * (own - min(easy, own)))

        words = (between(1, self.words[0]), between(2, self.words[1]))
        tokens, least = self.tokens, 8 * (words[1] + _FRAME)
        while tokens % 2 == 0 and tokens // 2 > least and tokens > least * (self.tokens / least) ** share:
            tokens //= 2
        return replace(
            self,
            tokens=tokens,
            classes=(between(2, self.classes[0]), between(3, self.classes[1])),
            words=words,
            keywords=between(1, self.keywords),
            keyword_rate=1 + share * (self.keyword_rate - 1),
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.vocabulary.tokenizer()

    def _classes(
        self, drawn: Float[np.ndarray, "batch 4 demonstrations"], count: Int[np.ndarray, "batch 1"]
    ) -> Int[np.ndarray, "batch demonstrations"]:
        """P(class c) ∝ (c + 1)^-skew, c < count; a bursty demonstration copies the class of a recent one."""
        ranks = np.arange(self.classes[1])
        weight = np.where(ranks < count, (ranks + 1.0) ** -self.skew, 0.0)
        bounds = np.cumsum(weight, axis=1) / weight.sum(axis=1, keepdims=True)
        fresh = (drawn[:, 0, :, None] >= bounds[:, None, :]).sum(axis=2)
        fresh = np.minimum(fresh, count - 1)  # the last bound may be rounded below 1
        number = np.arange(self.most)
        back = 1 + (drawn[:, 2] * np.minimum(self.recent, number)).astype(np.int64)
        source = np.where((drawn[:, 1] < self.burstiness) & (number > 0), number - back, number)
        for _ in range(int(np.ceil(np.log2(max(self.most, 2))))):  # a copy of a copy of …: halve the way
            source = np.take_along_axis(source, source, 1)
        return np.take_along_axis(fresh, source, 1)

    def episode(self, seed: int, number: int, *, held_out: bool = True) -> Episode:
        """One episode; by default of the stream that no training sees."""
        batch = self.batch(seed, range(number, number + 1), held_out=held_out)
        return Episode(
            ids=batch.ids[0],
            kinds=batch.kinds[0],
            numbers=batch.numbers[0],
            classes=batch.classes[0],
            labels=batch.labels[0][batch.labels[0] >= 0],
            knowable=batch.knowable[0],
            vocabulary=self.vocabulary,
        )
