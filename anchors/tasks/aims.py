"""What may come after a prompt: any token of the model, named as text or as id, and prompts that need no label words."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from anchors.errors import AnchorsError
from anchors.tasks.chat import Turn, answer, between, opening
from anchors.tasks.prompts import QUERY, Loss, Prompt, Role, encoded, refuse_controls
from anchors.tasks.task import Chat, Task, without_spaces

TOP = "top"
"""Stands for the token that the model itself finds most likely."""

Likeliest = Callable[[Sequence[int]], Sequence[int]]
"""From the ids of a prompt to the tokens that the model finds most likely after it, the likeliest first."""


class Asked(NamedTuple):
    """A row of a file of prompts: its text, what is aimed at, where it stands."""

    text: str
    target: str
    against: str | None
    place: str


@dataclass(frozen=True)
class Place:
    """Where a prompt ends and a token is to come.

    Attributes:
        text: up to there, without the white space that the token carries.
        space: that white space; None where the prompt does not say, so that it depends on the word.
        special: whether the tokenizer puts its special tokens in front.
    """

    text: str
    space: str | None = None
    special: bool = True


def of_text(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat | None = None,
    *,
    before: Sequence[str | None] = ("",),
) -> tuple[Prompt, Place]:
    """A prompt of any text, in the tokens that the text has by itself.

    Spaces at its end belong to the text that comes after it; where none does, only an id or `top`, they are the prompt's.

    Args:
        text: as it stands; with a chat, what the user says.
        tokenizer: the model's.
        chat: through the model's own chat template, or None.
        before: what is aimed at, and what that stands against, see `aimed`; by default some text.

    Raises:
        AnchorsError: it is empty, or holds a control token that the tokenizer puts in front by itself; the template refuses it.
    """
    if not text.strip():
        raise AnchorsError("The prompt is empty.", "Give some text.", code="prompt")
    if chat is None:
        body = text.rstrip(" ") if any(one is not None and not _given(one) for one in before) else text
        place, inside = Place(body, text[len(body) :] or None), (0, len(body))
    else:
        said = text.strip()
        turns = [*opening(chat), Turn("user", said)]
        found = between(turns, tokenizer)
        parts = [turns[part].content if isinstance(part, int) else part for part in found]
        start = len("".join(parts[: found.index(len(turns) - 1)]))
        place = Place("".join(parts), answer(chat, tokenizer).space, special=False)
        inside = (start, start + len(said))
    ids, spans = encoded(tokenizer, place.text, special=place.special)
    last = 1 + max(i for i, (a, b) in enumerate(spans) if a < b)  # some tokenizers put an end behind
    ids, spans = ids[:last], spans[:last]
    if last < 2:
        raise AnchorsError(
            "The prompt is a single token: nothing can flow into it.", "Give a longer one.", code="prompt"
        )
    refuse_controls(place.text, ids, spans, [], tokenizer)
    roles: list[Role] = ["text" if a < b and inside[0] < b and a < inside[1] else "format" for a, b in spans]
    roles[-1] = "target"
    return Prompt(
        place.text, tuple(ids), tuple(roles), (QUERY,) * len(ids), (), (), (), None, tuple(spans)
    ), place


def _given(wanted: str) -> bool:
    """Whether a token is named by its id, or by the model, so that no text says how it is written."""
    return wanted == TOP or (wanted.startswith("#") and wanted[1:].isdecimal())


def of_task(prompt: Prompt, task: Task, tokenizer: PreTrainedTokenizerBase) -> Place:
    """Where a prompt of a task ends: what comes after it stands where its label word would."""
    space = task.space if task.chat is None else answer(task.chat, tokenizer).space
    return Place(prompt.text, space, special=task.chat is None)


def aimed(
    prompt: Prompt,
    place: Place,
    tokenizer: PreTrainedTokenizerBase,
    target: str,
    against: str | None = None,
    *,
    likeliest: Likeliest,
) -> Prompt:
    """The prompt with the loss of a token, or of its log-odds against another one.

    Args:
        prompt, place: what the token comes after.
        tokenizer: the model's.
        target, against: text, `#` and an id, or `top`: the token that the model finds most likely, of the target; the most likely
            other one, of what it stands against.
        likeliest: asked where one of them is `top`.

    Raises:
        AnchorsError: see `next_token` and `Loss.of_token`.
    """
    top = list(likeliest(prompt.ids)) if TOP in (target, against) else []
    token = top[0] if target == TOP else next_token(place, target, tokenizer)
    other = None
    if against is not None:
        other = (
            next(one for one in top if one != token)
            if against == TOP
            else next_token(place, against, tokenizer)
        )
    return replace(prompt, aim=Loss.of_token(token, other))


def next_token(place: Place, wanted: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text is where it comes after a prompt.

    A text that begins with white space is taken as it stands. Another one has the prompt's own space before it, or, where the
    prompt ends without one, a space if a word would go on with another (`is` and `Paris`), or after a mark such as `:`.

    Args:
        place: the end of the prompt.
        wanted: the text, or `#` and an id.
        tokenizer: the model's.

    Raises:
        AnchorsError: it is several tokens, melts with the prompt's end, or is none at all.
    """
    if wanted != TOP and _given(wanted):
        token = int(wanted[1:])
        if token >= len(tokenizer):
            raise AnchorsError(
                f"There is no token {wanted}: the tokenizer has {len(tokenizer)}.",
                f"Ids go from #0 to #{len(tokenizer) - 1}.",
                code="target",
            )
        return token
    if not wanted:
        raise AnchorsError("The target is empty.", "Give a word, or a token's id as #1234.", code="target")
    space = spacing(place, wanted)
    whole = place.text + space + wanted
    ids, spans = encoded(tokenizer, whole, special=place.special)
    own = [(token, a) for token, (a, b) in zip(ids, spans, strict=True) if a < b and b > len(place.text)]
    shown = [str(piece) for piece in tokenizer.convert_ids_to_tokens([token for token, _ in own])]
    if own[0][1] < len(place.text):
        raise AnchorsError(
            f"The tokenizer melts the target {wanted!r} with the prompt's {place.text[-8:]!r}.",
            "Give its token's id as #1234, or a space before it.",
            code="target",
        )
    if len(own) > 1:
        raise AnchorsError(
            f"The target {space + wanted!r} is {len(own)} tokens here: {shown}.",
            f"Give one of them, such as the first: '#{own[0][0]}'"
            + (
                f"; {wanted!r} without the space before it is #{alone}."
                if space and (alone := _sole(replace(place, space=""), wanted, tokenizer)) is not None
                else "."
            ),
            code="target",
        )
    if own[0][0] == tokenizer.unk_token_id:
        raise AnchorsError(
            f"The tokenizer does not know the target {wanted!r}.", "Give another one.", code="target"
        )
    return own[0][0]


def spacing(place: Place, wanted: str) -> str:
    """The white space that is put between a prompt and what comes after it."""
    if wanted[:1].isspace():
        return ""
    if place.space is not None:
        return place.space
    before, after = place.text[-1:], wanted[:1]
    apart = before.isalnum() or before in ".,:;!?"
    return (
        " " if apart and after.isalnum() and not without_spaces(before) and not without_spaces(after) else ""
    )


def otherwise(place: Place, wanted: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int] | None:
    """The same text with a space before it where none was put, or without one: as text, and its token if it is one."""
    if _given(wanted):
        return None
    space = spacing(place, wanted)
    bare = wanted.lstrip(" ")
    other = "" if space == " " or wanted != bare else " "
    token = _sole(replace(place, space=other), bare, tokenizer)
    return None if token is None else (other + bare, token)


def _sole(place: Place, wanted: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    with suppress(AnchorsError):
        return next_token(place, wanted, tokenizer)
    return None
