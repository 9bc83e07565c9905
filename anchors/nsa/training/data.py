"""What training reads: rows of tokens by (seed, number), from episodes or from a text file."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from anchors.errors import AnchorsError
from anchors.nsa.training.vocabulary import bytes_tokenizer

HELD_OUT_SHARE = 20
"""One in this many tokens at the end of a text is held out."""


@dataclass(frozen=True)
class Sequences:
    """Sequences to train on.

    Attributes:
        ids: tokens.
        labels: which of them are label words.
        numbers: the demonstration each token belongs to.
        knowable: for label words, whether they can be known from what stands before.
    """

    ids: Int[np.ndarray, "batch tokens"]
    labels: Bool[np.ndarray, "batch tokens"]
    numbers: Int[np.ndarray, "batch tokens"]
    knowable: Bool[np.ndarray, "batch tokens"]


@runtime_checkable
class Corpus(Protocol):
    """Anything a model can be trained on: rows depend on (seed, number, held_out) alone."""

    @property
    def tokens(self) -> int: ...

    def rows(self, seed: int, numbers: range, *, held_out: bool = False) -> Sequences:
        """Some rows; those held out are of another stream."""
        ...

    def lesson(self, share: float) -> "Corpus":
        """Easier data to begin with: the easiest at 0, nearly this at 1; sequences may be shorter."""
        ...

    def facts(self) -> dict[str, Any]:
        """What tells this data from other data, as JSON."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that is saved with the model."""
        ...


@dataclass(frozen=True)
class Windows:
    """Random windows of a text.

    Attributes:
        ids: the whole text.
        tokens: length of a window.
        kind: its tokenizer.
        name: of the file.
    """

    ids: Int[np.ndarray, " text"]
    tokens: int
    kind: PreTrainedTokenizerBase
    name: str = "text"

    def __post_init__(self) -> None:
        least = HELD_OUT_SHARE * (self.tokens + 1)
        if len(self.ids) < least:
            raise AnchorsError(
                f"{self.name!r} has {len(self.ids)} tokens, too few for windows of {self.tokens}.",
                f"One in {HELD_OUT_SHARE} is held out, so {least} are needed: give a longer text or fewer --tokens.",
                code="too-few",
            )

    @classmethod
    def read(cls, path: Path, tokens: int, tokenizer: str | None = None) -> "Windows":
        """Tokenise a file.

        Args:
            path: a UTF-8 text file.
            tokens: length of a window.
            tokenizer: directory or hub id; a token per byte by default.

        Raises:
            AnchorsError: the file or tokenizer cannot be read, or the text is too short.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AnchorsError(
                f"The text {str(path)!r} cannot be read: {error}",
                "Give a UTF-8 text file.",
                code="file-unreadable",
            ) from error
        try:
            kind = (
                bytes_tokenizer()
                if tokenizer is None
                else cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(tokenizer))
            )
        except (OSError, ValueError) as error:
            raise AnchorsError(
                f"The tokenizer {tokenizer!r} could not be loaded: {error}",
                "Leave it out for a token per byte.",
                code="tokenizer",
            ) from error
        lines = text.splitlines(keepends=True)
        # Lines by themselves: a tokenizer takes a whole book at once only slowly.
        ids = kind(lines, add_special_tokens=False)["input_ids"] if lines else []
        return cls(np.array([i for line in ids for i in line], dtype=np.int64), tokens, kind, path.name)

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.ids.tobytes()).hexdigest()[:16]

    def rows(self, seed: int, numbers: range, *, held_out: bool = False) -> Sequences:
        """Windows that begin anywhere, in the last part of the text where held out."""
        cut = len(self.ids) - max(len(self.ids) // HELD_OUT_SHARE, self.tokens)
        low, high = (cut, len(self.ids)) if held_out else (0, cut)
        drawn = uniform(seed, numbers, 1, held_out)[:, 0]
        starts = low + (drawn * (high - low - self.tokens + 1)).astype(np.int64)
        ids = self.ids[starts[:, None] + np.arange(self.tokens)]
        none = np.zeros(ids.shape, bool)
        return Sequences(ids, none, np.zeros_like(ids), none)

    def lesson(self, share: float) -> "Windows":
        return self

    def facts(self) -> dict[str, Any]:
        return {"data": "text", "tokens": self.tokens, "text": self._digest, "length": len(self.ids)}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.kind


def uniform(seed: int, numbers: range, count: int, held_out: bool) -> np.ndarray:
    """Numbers in [0, 1), `count` for each row: Philox's words keyed by (seed, number), which no numpy changes.

    Args:
        seed: from 0 on.
        numbers: of rows.
        count: how many for each.
        held_out: take another stream.
    """
    words = [
        np.random.Philox(key=np.array([seed, n], np.uint64), counter=[0, 0, 0, int(held_out)]).random_raw(
            count
        )
        for n in numbers
    ]
    return (np.stack(words) >> np.uint64(11)).astype(np.float64) * 2.0**-53
