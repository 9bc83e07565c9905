"""From a task and examples to token ids and the positions that matter.

A prompt is joined from pieces whose roles are known; the tokenizer's character offsets carry the roles over to tokens.
Token ids are never searched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from anchors.errors import AnchorsError
from anchors.tasks.data import Example
from anchors.tasks.task import Task

Role = Literal["text", "format", "label", "target"]


QUERY = -1
"""Stands in for the number of a demonstration where something belongs to the query."""


class Piece(NamedTuple):
    """A stretch of a prompt's text: its role, the demonstration it belongs to, its class if it is a label word."""

    text: str
    role: Role
    demonstration: int
    label: int | None = None


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt and its positions, all counted from 0.

    Attributes:
        text: the whole prompt.
        ids: its token ids.
        roles: one per token: `text` (of a demonstration or the query), `format` (template and special tokens),
            `label` (a label word of a demonstration), `target` (the last token, where the label is predicted).
        demonstrations: one per token: the number of the demonstration it belongs to, or `QUERY`.
        label_positions: the label-word positions p_1 … p_C', ascending.
        label_classes: the class of each of them.
        label_ids: per class, the token that stands for it at the target.
        gold: class of the query, or None when it is not known.
    """

    text: str
    ids: tuple[int, ...]
    roles: tuple[Role, ...]
    demonstrations: tuple[int, ...]
    label_positions: tuple[int, ...]
    label_classes: tuple[int, ...]
    label_ids: tuple[int, ...]
    gold: int | None

    @property
    def target(self) -> int:
        """The target position q: the last token."""
        return len(self.ids) - 1

    @property
    def query(self) -> int:
        """Where the query begins: the number of tokens of all demonstrations."""
        return self.demonstrations.index(QUERY)


def label_tokens(task: Task, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """The tokens of every label word, as they are where the word follows the template's prefix.

    Raises:
        AnchorsError: two labels share the token at which the prediction is read, or their tokens coincide under
            the policy; or a label word melts with the template into one token.
    """
    words = []
    for label in task.labels:
        ids, spans = _encode(tokenizer, task.prefix + task.space + label)
        start = len(task.prefix)
        own = [i for i, (a, b) in enumerate(spans) if b > max(a, start)]
        if not own or spans[own[0]][0] < start:
            raise AnchorsError(
                f"The tokenizer melts the label word {label!r} with the template's {task.prefix[-8:]!r}.",
                "End the part before {label} with a character that stays a token of its own, such as ':'.",
            )
        words.append(tuple(ids[i] for i in own))
    _refuse_collisions(task, tokenizer, words)
    return tuple(words)


def _refuse_collisions(task: Task, tokenizer: PreTrainedTokenizerBase, words: list[tuple[int, ...]]) -> None:
    chosen = {"first": lambda w: w[:1], "last": lambda w: w[-1:], "all": lambda w: w}[task.policy]
    for i, one in enumerate(words):
        for j in range(i):
            other = words[j]
            names = f"{task.labels[j]!r} and {task.labels[i]!r}"
            shown = [tokenizer.convert_ids_to_tokens(list(w)) for w in (other, one)]
            if one[0] == other[0]:
                raise AnchorsError(
                    f"The labels {names} begin with the same token: {shown[0]} and {shown[1]}. "
                    "The prediction is read at that token, so they cannot be told apart.",
                    "Choose label words with different first tokens (--labels).",
                )
            if chosen(one) == chosen(other):
                raise AnchorsError(
                    f"The labels {names} coincide under the policy {task.policy!r}: {shown[0]} and {shown[1]}.",
                    "Use the policy `first` or `all`, or other label words.",
                )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=True)
    return list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]


def tokenise(
    pieces: Sequence[Piece],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    words: tuple[tuple[int, ...], ...],
    gold: int | None,
) -> Prompt:
    """Tokenise joined pieces and carry their roles over to tokens by character offsets.

    A token that touches a label word is `label`; one that touches text and format is what its first visible
    character belongs to; one without characters (BOS) is `format`.
    """
    text = "".join(piece.text for piece in pieces)
    owner = np.repeat(np.arange(len(pieces)), [len(piece.text) for piece in pieces])
    ids, spans = _encode(tokenizer, text)
    if any(b > len(text) for _, b in spans):
        raise AnchorsError("The tokenizer's offsets run past the text.", "Its offset mapping cannot be used.")
    # A trailing special token (EOS) would stand behind the target.
    while spans and spans[-1][0] == spans[-1][1]:
        ids, spans = ids[:-1], spans[:-1]
    roles: list[Role] = []
    demonstrations: list[int] = []
    members: dict[int, list[int]] = {}
    for token, (a, b) in enumerate(spans):
        touched = sorted({int(p) for p in owner[a:b]})
        labelled = [p for p in touched if pieces[p].role == "label"]
        demonstrations.append(
            pieces[touched[0]].demonstration if touched else demonstrations[-1] if demonstrations else 0
        )
        if labelled:
            members.setdefault(labelled[0], []).append(token)
            roles.append("label")
        elif not touched:
            roles.append("format")
        else:
            first = a + len(text[a:b]) - len(text[a:b].lstrip())
            roles.append(pieces[int(owner[min(first, b - 1)])].role)
    roles[-1], demonstrations[-1] = "target", QUERY
    positions, classes = [], []
    for piece, tokens in sorted(members.items()):
        label = pieces[piece].label
        assert label is not None  # noqa: S101 - a piece with the role `label` has one
        if tuple(ids[t] for t in tokens) != words[label]:
            raise AnchorsError(
                f"The label word {task.labels[label]!r} is {tokenizer.convert_ids_to_tokens([ids[t] for t in tokens])} "
                f"in this prompt, but {tokenizer.convert_ids_to_tokens(list(words[label]))} by itself.",
                "What follows the label word in the template changes its tokens; end the demonstration with a newline.",
            )
        kept = {"first": tokens[:1], "last": tokens[-1:], "all": tokens}[task.policy]
        positions += kept
        classes += [label] * len(kept)
    expected = sum(piece.role == "label" for piece in pieces)
    if len(members) != expected:
        raise AnchorsError(
            f"{expected} label words stand in the prompt, but {len(members)} were found in its tokens."
        )
    return Prompt(
        text=text,
        ids=tuple(ids),
        roles=tuple(roles),
        demonstrations=tuple(demonstrations),
        label_positions=tuple(positions),
        label_classes=tuple(classes),
        label_ids=tuple(word[0] for word in words),
        gold=gold,
    )


def pieces(task: Task, demonstrations: Sequence[Example], query: str) -> list[Piece]:
    """The prompt as pieces: each demonstration filled in, joined by the separator, then the query without a label."""
    before, prefix, after = task.pieces
    parts: list[Piece] = []
    for number, example in enumerate(demonstrations):
        parts += _filled(before, example.text, prefix, number)
        parts += [Piece(task.space + task.labels[example.label], "label", number, example.label)]
        parts += [Piece(after + task.separator, "format", number)]
    parts += _filled(before, query, prefix, QUERY)
    return [part for part in parts if part.text]


def _filled(before: str, text: str, prefix: str, number: int) -> list[Piece]:
    return [Piece(before, "format", number), Piece(text, "text", number), Piece(prefix, "format", number)]


def build(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Example],
    query: str,
    gold: int | None,
) -> Prompt:
    """The prompt of some demonstrations and one query."""
    words = label_tokens(task, tokenizer)
    return tokenise(pieces(task, demonstrations, query), task, tokenizer, words, gold)


def from_text(
    text: str, task: Task, tokenizer: PreTrainedTokenizerBase, *, truth: str | None = None
) -> Prompt:
    """A prompt that somebody wrote as a whole: label words are found where they follow the template's prefix.

    Args:
        text: demonstrations and query; it must end where the label is to be predicted.
        task: its label words are looked for after its prefix (`\\nSentiment:` for `Review: {text}\\nSentiment:{label}`).
        truth: the right label of the query, if known.

    Raises:
        AnchorsError: no label word found, or the text does not end with the prefix.
    """
    text = text.rstrip()
    prefix = task.prefix
    if not text.endswith(prefix.strip()):
        raise AnchorsError(
            f"The prompt must end with the template's {prefix.strip()!r}; it ends with {text[-20:]!r}.",
            "The label is predicted after the last character of the prompt.",
        )
    if truth is not None and truth not in task.labels:
        raise AnchorsError(f"{truth!r} is not one of the labels {list(task.labels)}.")
    parts: list[Piece] = []
    rest, number = text, 0
    while (cut := rest.find(prefix)) >= 0 and rest[cut + len(prefix) :]:
        head, tail = rest[: cut + len(prefix)], rest[cut + len(prefix) :]
        found = [(i, word) for i, word in enumerate(task.labels) if tail.startswith(task.space + word)]
        if not found:
            raise AnchorsError(
                f"After {prefix.strip()!r} stands {tail[:20]!r}, which is not one of the labels {list(task.labels)}.",
                "Check --labels and the spelling in the prompt.",
            )
        label, word = max(found, key=lambda pair: len(pair[1]))
        parts += [*_roles(head, task, number), Piece(task.space + word, "label", number, label)]
        rest, number = tail[len(task.space + word) :], number + 1
    parts += _roles(rest, task, number, QUERY)
    if not any(part.role == "label" for part in parts):
        raise AnchorsError(
            "The prompt holds no demonstration: no label word stands after the template's prefix.",
            f"Write each demonstration as {task.template!r}.",
        )
    words = label_tokens(task, tokenizer)
    gold = None if truth is None else task.labels.index(truth)
    return tokenise([part for part in parts if part.text], task, tokenizer, words, gold)


def _roles(chunk: str, task: Task, number: int, owner: int | None = None) -> list[Piece]:
    """Cut a chunk `\\nReview: some text\\nSentiment:` into separator, format, text, format.

    The separator belongs to the demonstration before.
    """
    before, prefix, _ = task.pieces
    opening = chunk.find(before) if before and before in chunk else 0
    start = opening + len(before) if before and before in chunk else 0
    end = len(chunk) - len(prefix) if chunk.endswith(prefix) else len(chunk)
    start = min(start, end)
    opening = min(opening, start)
    separator = Piece(chunk[:opening], "format", max(number - 1, 0))
    own = number if owner is None else owner
    return [separator, *_filled(chunk[opening:start], chunk[start:end], chunk[end:], own)]
