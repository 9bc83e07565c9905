"""Demonstrations through a model's own chat template: pieces of the rendered text, known by construction."""

import re
from collections.abc import Sequence
from datetime import datetime
from itertools import count, pairwise
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from anchors.errors import AnchorsError
from anchors.tasks.task import Chat

TODAY = datetime(2024, 7, 26)
"""The day that templates are told, so that prompts are the same tomorrow."""

_DATE = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(["'])([^"'\\]*)\1\s*\)""")
_ASKED = re.compile(r"strftime_now\s+is\s+(?:not\s+)?defined")
_CHANCE = re.compile(r"\|\s*random\b|\blipsum\b")
"""What Jinja has of chance."""
_EMPTY_THOUGHT = re.compile(r"\s*<(\w+)>\s*</\1>\s*")


class Turn(NamedTuple):
    """A message: who speaks, and what."""

    role: str
    content: str


def render(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the chat template makes of messages, up to where the model is to answer.

    The only clock that transformers gives to templates is `strftime_now`, which says `TODAY`.

    Raises:
        AnchorsError: the tokenizer has no chat template, it refuses the messages, draws at random, or asks for the date in a way
            that is not seen through.
    """
    if not tokenizer.chat_template:
        raise AnchorsError(
            "The tokenizer has no chat template.",
            "Leave --chat out, or take the model that was trained on conversations (often called -Instruct or -it).",
            code="chat-template",
        )
    template = _DATE.sub(lambda call: repr(TODAY.strftime(call[2])), tokenizer.get_chat_template())
    if "strftime_now" in _ASKED.sub("", template):
        raise AnchorsError(
            "The chat template puts the date of today into the prompt: tomorrow's numbers would be others.",
            "Save the tokenizer with a template that names a fixed day.",
            code="chat-template",
        )
    if _CHANCE.search(template):
        raise AnchorsError(
            "The chat template draws at random: the same prompt would be another the next time.",
            "Save the tokenizer with a template that does not.",
            code="chat-template",
        )
    messages = [turn._asdict() for turn in turns]
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError, TypeError) as error:
        system = any(turn.role == "system" for turn in turns)
        raise AnchorsError(
            f"The chat template refuses the prompt: {error}.",
            "Leave --system out." if system else "Leave --chat out, or put all in one turn: --chat one.",
            code="chat-template",
        ) from error
    return str(text)


def between(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[str | int]:
    """The rendered text as stretches of the template's own and numbers of turns, whose contents stand there.

    Marks stand in for the contents, so that nothing is searched for that could occur twice; what is then put together
    must be what the template makes of the contents themselves.

    Raises:
        AnchorsError: a content does not come through once and unchanged; see also `render`.
    """
    whole = render(turns, tokenizer)
    stem = next(s for s in (f"Mark{n}Turn" for n in count()) if s not in whole)
    marked = render([turn._replace(content=f"{stem}{i}.") for i, turn in enumerate(turns)], tokenizer)
    parts: list[str | int] = [
        int(part) if i % 2 else part for i, part in enumerate(re.split(rf"{stem}(\d+)\.", marked))
    ]
    places = [part for part in parts if isinstance(part, int)]
    spoken = [i for i in places if turns[i].role != "system"]
    joined = "".join(turns[part].content if isinstance(part, int) else part for part in parts)
    if sorted(places) != list(range(len(turns))) or spoken != sorted(spoken) or joined != whole:
        raise AnchorsError(
            "The chat template leaves out, repeats, moves or changes what a turn says.",
            "Leave out --system, or --chat.",
            code="chat-template",
        )
    return parts


class Answer(NamedTuple):
    """What stands around an answer: white space that its first token carries, and what ends its turn."""

    space: str
    tail: str


def answer(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Answer:
    """What the chat template puts around an answer.

    Raises:
        AnchorsError: where the model is to answer stands something else than before an answer that was given, so that the
            label word is not what comes next; see also `between`.
    """
    turns = [*opening(chat), Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three")]
    first = len(turns) - 3
    parts = between(turns, tokenizer)
    at = [parts.index(i) for i in range(first, len(turns))]
    before, after = (
        "".join(map(str, (p for p in parts[a + 1 : b] if isinstance(p, str)))) for a, b in pairwise(at)
    )
    asked = str(parts[-1])
    space = before.removeprefix(asked)
    thought = _EMPTY_THOUGHT.fullmatch(asked.removeprefix(before))
    same = before.startswith(asked) and not space.strip(" ")
    if not (same or (asked.startswith(before) and thought)) or not asked.strip():
        raise AnchorsError(
            f"Where the model is to answer, the chat template puts {asked!r}, and before an answer that was given {before!r}.",
            "The label word is not what comes next there, as with models that always think first; leave --chat out.",
            code="chat-template",
        )
    return Answer(space if same else "", after)


def opening(chat: Chat) -> list[Turn]:
    """The system's turn, if there is one."""
    return [] if chat.system is None else [Turn("system", chat.system)]
