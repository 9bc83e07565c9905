"""From a task and examples to token ids and the positions that matter.

A prompt is joined from pieces whose roles are known; the tokenizer's character offsets carry the roles over to tokens.
Token ids are never searched. A label word is tokenised in its place, and the query as if its label followed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from anchors.errors import AnchorsError
from anchors.tasks.chat import Answer, Turn, answer, between, opening
from anchors.tasks.data import Example
from anchors.tasks.task import Policy, Task

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
class Loss:
    """What is differentiated: log probabilities of tokens that may come after the target, summed.

        L = Σ_k w_k log p(t_k)

    Attributes:
        tokens: t_k, as ids.
        weights: w_k.
        whole: whether p is over the whole vocabulary, or over these tokens alone.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    whole: bool = True

    @classmethod
    def of_class(cls, label_ids: tuple[int, ...], gold: int) -> "Loss":
        """The cross-entropy over label words: −log p of the right one, p over label words alone (2.1)."""
        return cls(label_ids, tuple(-float(c == gold) for c in range(len(label_ids))), whole=False)

    @classmethod
    def of_token(cls, token: int, against: int | None = None) -> "Loss":
        """−log p(token), p over the whole vocabulary; against another token minus their log-odds, log p(against) − log p(token).

        Raises:
            AnchorsError: both are the same token.
        """
        if against == token:
            raise AnchorsError(
                f"The target and what it stands against are one token, #{token}: their log-odds are always 0.",
                "Name two tokens.",
                code="target",
            )
        return cls((token,), (-1.0,)) if against is None else cls((token, against), (-1.0, 1.0))


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
        spans: per token, where its characters stand in the text (first, after last); empty where they are those of the
            text tokenised by itself.
        aim: what is differentiated instead of the cross-entropy over the label words, or None.
    """

    text: str
    ids: tuple[int, ...]
    roles: tuple[Role, ...]
    demonstrations: tuple[int, ...]
    label_positions: tuple[int, ...]
    label_classes: tuple[int, ...]
    label_ids: tuple[int, ...]
    gold: int | None
    spans: tuple[tuple[int, int], ...] = ()
    aim: Loss | None = None

    @property
    def loss(self) -> Loss | None:
        """What is differentiated; None where neither a right answer nor an aim is known."""
        return self.aim or (None if self.gold is None else Loss.of_class(self.label_ids, self.gold))

    @property
    def target(self) -> int:
        """The target position q: the last token."""
        return len(self.ids) - 1

    @property
    def query(self) -> int:
        """Where the query begins: the number of tokens of all demonstrations."""
        return self.demonstrations.index(QUERY)


STAND_IN = "x"
"""A text before which and behind which label words are tokenised when there is no prompt yet."""


def label_tokens(task: Task, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """The tokens of every label word in its place: between the template's prefix and what follows in a demonstration.

    Raises:
        AnchorsError: two labels share the token at which the prediction is read, or their tokens coincide under
            the policy; or a label word melts with the template into one token.
    """
    if task.chat is None:
        before, prefix, _ = task.pieces
        return _words(before + STAND_IN + prefix, task, tokenizer, _plain(task))
    around = answer(task.chat, tokenizer)
    shown = pieces(task, [Example(STAND_IN, 0)], STAND_IN, tokenizer)
    at = next(i for i, piece in enumerate(shown) if piece.role == "label")
    inner = around if task.chat.form == "turns" else _plain(task)
    words = _words("".join(piece.text for piece in shown[:at]), task, tokenizer, inner)
    if task.chat.form == "turns":
        for label, ids in enumerate(_answers(task, tokenizer)):
            _demand_same(ids, task, label, tokenizer, words)
    return words


def _plain(task: Task) -> Answer:
    """What stands around a label word in a plain prompt."""
    before, _, after = task.pieces
    return Answer(task.space, after + task.separator + before)


def _answers(task: Task, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """The tokens of every label word where a chat's model is to answer."""
    assert task.chat is not None  # noqa: S101 - plain prompts end as their demonstrations do
    shown = pieces(task, [Example(STAND_IN, 0)], STAND_IN, tokenizer)
    text = "".join(piece.text for piece in shown)
    return _words(text, task, tokenizer, answer(task.chat, tokenizer))


def _words(
    text: str, task: Task, tokenizer: PreTrainedTokenizerBase, around: Answer
) -> tuple[tuple[int, ...], ...]:
    """The tokens of every label word behind a text."""
    words, heads = [], set()
    followed = [_followed(text, task, label, around) for label in range(len(task.labels))]
    for label, (ids, spans) in enumerate(_encoded(tokenizer, followed, special=task.chat is None)):
        first, last = _place_of(text, task, label, around, spans)
        words.append(tuple(ids[first:last]))
        heads.add(tuple(ids[:first]))
    if len(heads) > 1:
        raise AnchorsError(
            f"Which label word follows changes the tokens of {text[-8:]!r} before it.",
            "End the part before {label} with a character that stays a token of its own, such as ':'.",
            code="label-words",
        )
    _refuse_collisions(task, tokenizer, words)
    return tuple(words)


def _followed(text: str, task: Task, label: int, around: Answer) -> str:
    """A prompt that goes on with a label and what follows one."""
    return text + around.space + task.labels[label] + around.tail


def _place_of(
    text: str, task: Task, label: int, around: Answer, spans: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Which tokens of a text that `_followed` gives are the label's.

    Raises:
        AnchorsError: a token of the label word reaches beyond it.
    """
    start = len(text)
    end = start + len(around.space + task.labels[label])
    seen = [(i, a, b) for i, (a, b) in enumerate(spans) if a < b]
    first = 1 + next((i for i, a, _ in reversed(seen) if a < start), -1)
    last = 1 + next((i for i, a, _ in reversed(seen) if a < end), -1)
    if last <= first or (first and spans[first - 1][1] > start):
        raise AnchorsError(
            f"The tokenizer melts the label word {task.labels[label]!r} with the template's {text[-8:]!r}.",
            "End the part before {label} with a character that stays a token of its own, such as ':'.",
            code="label-words",
        )
    if spans[last - 1][1] > end:
        raise AnchorsError(
            f"The tokenizer melts the label word {task.labels[label]!r} with what follows it, {around.tail[:8]!r}.",
            "Begin what follows {label} with a character that stays a token of its own, such as a line break.",
            code="label-words",
        )
    return first, last


def _refuse_collisions(task: Task, tokenizer: PreTrainedTokenizerBase, words: list[tuple[int, ...]]) -> None:
    chosen = {"first": lambda w: w[:1], "last": lambda w: w[-1:], "all": lambda w: w}[task.policy]
    for i, one in enumerate(words):
        for j in range(i):
            other = words[j]
            names = f"{task.labels[j]!r} and {task.labels[i]!r}"
            shown = [tokenizer.convert_ids_to_tokens(list(w)) for w in (other, one)]
            if one[0] == other[0] and not cast(str, tokenizer.decode([one[0]])).strip():
                raise AnchorsError(
                    f"The tokenizer keeps the white space before the labels {names} as a token of its own, "
                    f"{shown[1][0]!r}: the prediction is read at that token, so they cannot be told apart.",
                    "Put a line break instead of white space right before {label}.",
                    code="label-words",
                )
            if one[0] == other[0]:
                raise AnchorsError(
                    f"The labels {names} begin with the same token: {shown[0]} and {shown[1]}. "
                    "The prediction is read at that token, so they cannot be told apart.",
                    "Choose label words with different first tokens (--labels).",
                    code="label-words",
                )
            if chosen(one) == chosen(other):
                raise AnchorsError(
                    f"The labels {names} coincide under the policy {task.policy!r}: {shown[0]} and {shown[1]}.",
                    "Use the policy `first` or `all`, or other label words.",
                    code="label-words",
                )


def encoded(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a text, and where each stands in it; a chat template writes its special tokens itself.

    Raises:
        AnchorsError: they stand where there is no text.
    """
    return _encoded(tokenizer, [text], special=special)[0]


def _encoded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """`encoded` of many texts at once."""
    found = tokenizer(list(texts), return_offsets_mapping=True, add_special_tokens=special)
    if any(
        b > len(text) for text, spans in zip(texts, found["offset_mapping"], strict=True) for _, b in spans
    ):
        raise AnchorsError(
            "The tokenizer's offsets run past the text.",
            "Its offset mapping cannot be used.",
            code="tokenizer",
        )
    return [
        (list(ids), [tuple(span) for span in spans])
        for ids, spans in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]


def tokenise(
    pieces: Sequence[Piece],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    words: tuple[tuple[int, ...], ...],
    gold: int | None,
    *,
    typed: bool = False,
) -> Prompt:
    """`tokenise_all` of one prompt."""
    return tokenise_all([(pieces, gold)], task, tokenizer, words, typed=typed)[0]


def tokenise_all(
    asked: Sequence[tuple[Sequence[Piece], int | None]],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    words: tuple[tuple[int, ...], ...],
    *,
    typed: bool = False,
) -> list[Prompt]:
    """Tokenise joined pieces and carry their roles over to tokens by character offsets.

    The tokens are those of the prompt when its label follows, so that the last one is what stands before a label word
    in the demonstrations, too. A token that touches a label word is `label`; one that touches text and format is what
    its first visible character belongs to; one without characters (BOS) is `format`.

    Args:
        asked: pieces and the right class of each prompt.
        task: whose template they are of.
        words: of `label_tokens`.
        typed: somebody wrote the whole prompt, so that control tokens in its texts are meant.

    Raises:
        AnchorsError: a label word has other tokens here than `words` says, or melts with its neighbours; a control
            token in a text, or one that the tokenizer puts in front by itself.
    """
    around = _plain(task) if task.chat is None else answer(task.chat, tokenizer)
    answers = _answers(task, tokenizer) if task.chat and task.chat.form == "one" else words
    how = _Reading(task, tokenizer, words, answers, around, typed)
    texts = ["".join(piece.text for piece in pieces) for pieces, _ in asked]
    followed = [_followed(text, task, 0, around) for text in texts]
    tokens = _encoded(tokenizer, followed, special=task.chat is None)
    return [_tokenised(text, *own, *of, how) for text, own, of in zip(texts, tokens, asked, strict=True)]


class _Reading(NamedTuple):
    """How the prompts of a task are read; `answers` are the tokens of what may follow one."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    words: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    around: Answer
    typed: bool


def _tokenised(
    text: str,
    ids: list[int],
    spans: list[tuple[int, int]],
    pieces: Sequence[Piece],
    gold: int | None,
    how: _Reading,
) -> Prompt:
    """See `tokenise_all`; `ids` and `spans` are those of the prompt when its first label follows."""
    task, tokenizer, words, answers, around, typed = how
    owner = [p for p, piece in enumerate(pieces) for _ in piece.text]
    first, last = _place_of(text, task, 0, around, spans)
    _demand_same(ids[first:last], task, 0, tokenizer, answers)
    ids, spans = ids[:first], spans[:first]
    refuse_controls(text, ids, spans, [] if typed else [pieces[p].role == "text" for p in owner], tokenizer)
    roles: list[Role] = []
    demonstrations: list[int] = []
    members: dict[int, list[int]] = {}
    for token, (a, b) in enumerate(spans):
        inside = owner[a:b]
        touched = inside[:1] if not inside or inside[0] == inside[-1] else sorted(set(inside))
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
            roles.append(pieces[owner[min(first, b - 1)]].role)
    roles[-1], demonstrations[-1] = "target", QUERY
    positions, classes = [], []
    for piece, tokens in sorted(members.items()):
        label = pieces[piece].label
        assert label is not None  # noqa: S101 - a piece with the role `label` has one
        _demand_same([ids[t] for t in tokens], task, label, tokenizer, words)
        kept = {"first": tokens[:1], "last": tokens[-1:], "all": tokens}[task.policy]
        positions += kept
        classes += [label] * len(kept)
    expected = sum(piece.role == "label" for piece in pieces)
    if len(members) != expected:
        raise AnchorsError(
            f"{expected} label words stand in the prompt, but {len(members)} were found in its tokens.",
            code="label-words",
        )
    return Prompt(
        text=text,
        ids=tuple(ids),
        roles=tuple(roles),
        demonstrations=tuple(demonstrations),
        label_positions=tuple(positions),
        label_classes=tuple(classes),
        label_ids=tuple(word[0] for word in answers),
        gold=gold,
        spans=tuple(spans),
    )


def _demand_same(
    ids: Sequence[int],
    task: Task,
    label: int,
    tokenizer: PreTrainedTokenizerBase,
    words: tuple[tuple[int, ...], ...],
) -> None:
    if tuple(ids) != words[label]:
        raise AnchorsError(
            f"The label word {task.labels[label]!r} is {tokenizer.convert_ids_to_tokens(list(ids))} in this prompt, but "
            f"{tokenizer.convert_ids_to_tokens(list(words[label]))} behind {STAND_IN + task.prefix!r}.",
            "What stands around the label word changes its tokens; put it between a colon and a line break.",
            code="label-words",
        )


def refuse_controls(
    text: str,
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    is_text: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Refuse a typed BOS beside the tokenizer's own, and control tokens in texts."""
    controls = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id, tokenizer.mask_token_id}
    if controls.isdisjoint(ids):
        return
    own = {i for i, (a, b) in zip(ids, spans, strict=True) if a == b}
    for i, (a, b) in zip(ids, spans, strict=True):
        if a < b and i in controls & own:
            raise AnchorsError(
                f"The prompt holds {text[a:b]!r}, which the tokenizer puts in front by itself: the model would see it twice.",
                "Leave it out.",
                code="prompt",
            )
        if a < b and i in controls and any(is_text[a:b]):
            raise AnchorsError(
                f"A text holds {text[a:b]!r}, which is a control token of this tokenizer, not text: "
                f"{text[max(0, a - 30) : b + 10]!r}.",
                "Remove it from the data, or write it otherwise.",
                code="prompt",
            )


def pieces(
    task: Task,
    demonstrations: Sequence[Example],
    query: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Piece]:
    """The prompt as pieces: each demonstration filled in, joined by the separator, then the query without a label.

    Of a chat they are what the tokenizer's template makes of them: what it puts before, between and after turns is format,
    and belongs to the demonstration before it.

    Raises:
        AnchorsError: see `anchors.tasks.chat.between`.
    """
    if task.chat is not None:
        assert tokenizer is not None  # noqa: S101 - a chat is laid out by its template
        return _conversation(task, demonstrations, query, tokenizer)
    before, prefix, after = task.pieces
    parts: list[Piece] = []
    for number, example in enumerate(demonstrations):
        parts += _filled(before, example.text, prefix, number)
        parts += [Piece(task.space + task.labels[example.label], "label", number, example.label)]
        parts += [Piece(after + task.separator, "format", number)]
    parts += _filled(before, query, prefix, QUERY)
    return [part for part in parts if part.text]


def _conversation(
    task: Task, demonstrations: Sequence[Example], query: str, tokenizer: PreTrainedTokenizerBase
) -> list[Piece]:
    """A prompt through the chat template, as pieces."""
    assert task.chat is not None  # noqa: S101
    before, prefix, _ = task.pieces
    spoken: list[tuple[str, list[Piece]]] = []
    if task.chat.form == "one":
        spoken = [("user", pieces(replace(task, chat=None), demonstrations, query))]
    else:
        for number, example in enumerate(demonstrations):
            label = Piece(task.labels[example.label], "label", number, example.label)
            spoken += [
                ("user", _filled(before, example.text, prefix, number)),
                ("assistant", [label]),
            ]
        spoken += [("user", _filled(before, query, prefix, QUERY))]
    spoken = [(role, _stripped(parts)) for role, parts in spoken]
    system = [(turn.role, [Piece(turn.content, "format", 0)]) for turn in opening(task.chat)]
    said = system + spoken
    turns = [Turn(role, "".join(part.text for part in parts)) for role, parts in said]
    space = answer(task.chat, tokenizer).space
    parts, number = [], 0
    for stretch in between(turns, tokenizer):
        if isinstance(stretch, str):
            parts.append(Piece(stretch, "format", number))
        elif said[stretch][0] == "assistant":
            (label,) = said[stretch][1]
            # White space before an answer is a part of it, as where the model answers: `[/INST] Positive`.
            parts[-1] = parts[-1]._replace(text=parts[-1].text.removesuffix(space))
            parts.append(label._replace(text=space + label.text))
        else:
            parts += (
                [part._replace(demonstration=number) for part in said[stretch][1]]
                if stretch < len(system)
                else said[stretch][1]
            )
            number = parts[-1].demonstration
    return [part for part in parts if part.text]


def _stripped(parts: Sequence[Piece]) -> list[Piece]:
    """Pieces without white space at both ends, which templates cut off, some of them."""
    left = [part for part in parts if part.text]
    for end, strip in ((0, str.lstrip), (-1, str.rstrip)):
        while left and not strip(left[end].text):
            left.pop(end)
        if left:
            left[end] = left[end]._replace(text=strip(left[end].text))
    return left


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
    return tokenise(pieces(task, demonstrations, query, tokenizer), task, tokenizer, words, gold)


def from_text(
    text: str, task: Task, tokenizer: PreTrainedTokenizerBase, *, truth: str | None = None
) -> Prompt:
    """A prompt that somebody wrote as a whole, in tokens; see `found_in` for what is found in it and refused.

    Raises:
        AnchorsError: see `found_in`, `label_tokens` and `tokenise`.
    """
    parts, words = found_in(text, task, truth), label_tokens(task, tokenizer)
    gold = None if truth is None else task.labels.index(truth)
    if task.chat is not None:
        texts = {part.demonstration: part.text for part in parts if part.role == "text"}
        shown = [Example(texts.get(p.demonstration, ""), p.label) for p in parts if p.label is not None]
        return build(task, tokenizer, shown, texts.get(QUERY, ""), gold)
    return tokenise(parts, task, tokenizer, words, gold, typed=True)


def found_in(text: str, task: Task, truth: str | None = None) -> list[Piece]:
    """The pieces of a prompt that somebody wrote as a whole: label words are found where the template puts them.

    Args:
        text: demonstrations and query; it must end where the label is to be predicted (white space there is ignored).
        task: its label words are looked for between what its template has before and after them (`\\nSentiment: ` for
            `Review: {text}\\nSentiment:{label}`). Where that is white space alone, a label word ends its line.
        truth: the right label of the query, if known.

    Raises:
        AnchorsError: no label word found, or the text does not end with the prefix.
    """
    prefix, body = task.prefix, text.rstrip()
    closing = prefix.rstrip()
    if not body.endswith(closing):
        raise AnchorsError(
            f"The prompt must end with the template's {closing!r}; it ends with {body[-20:]!r}.",
            "The label is predicted after the last character of the prompt. A prompt without label words needs --target TOKEN, "
            "such as --target top.",
            code="prompt",
        )
    if truth is not None and truth not in task.labels:
        raise AnchorsError(f"{truth!r} is not one of the labels {list(task.labels)}.", code="prompt")
    text = body.removesuffix(closing) + prefix
    parts: list[Piece] = []
    mark = prefix if prefix.strip() else prefix + task.space
    start, cut, number = 0, text.find(mark), 0
    while 0 <= cut < len(text) - len(prefix):
        at = cut + len(prefix)
        label = _label_at(text, at, task)
        line_end = text.find("\n", at) + 1 or len(text)
        # One that is followed by another in its line is a part of the text: `a film (and funny) (good)`.
        if label is None and prefix.strip() and text.find(mark, at, line_end) < 0:
            written = [f"{task.space}{word}{task.pieces[2]}" for word in task.labels]
            raise AnchorsError(
                f"After {prefix.strip()!r} stands {text[at : at + 20]!r}, which is not one of the labels {written}.",
                "Check --labels, --template and the spelling in the prompt.",
                code="prompt",
            )
        if label is not None:
            parts += [*_roles(text[start:at], task, number)]
            parts += [Piece(task.space + task.labels[label], "label", number, label)]
            start, number = at + len(task.space + task.labels[label]), number + 1
            cut = start - 1
        cut = text.find(mark, cut + 1)
    parts += _roles(text[start:], task, number, QUERY)
    if not number:
        raise AnchorsError(
            "The prompt holds no demonstration: no label word stands after the template's prefix.",
            f"Write each demonstration as {task.template!r}; a prompt without label words needs --target TOKEN, such as --target top.",
            code="prompt",
        )
    return [part for part in parts if part.text]


_LINE_END = re.compile(r"[ \t]*(\n|\Z)")


def _label_at(text: str, at: int, task: Task) -> int | None:
    """The class of the longest label word that stands here as the template writes it, and ends here."""
    before, prefix, after = task.pieces
    joint = task.separator + before
    found = []
    for label, word in enumerate(task.labels):
        written = task.space + word + after
        end = at + len(written)
        ends = (joint and text.startswith(joint, end)) or _LINE_END.match(text, end)
        if prefix.strip():
            ends = ends or after or not (word[-1].isalnum() and text[end : end + 1].isalnum())
        if ends and text.startswith(written, at):
            found.append((len(word), label))
    return max(found)[1] if found else None


def task_of(text: str, labels: Sequence[str], policy: str | None = None) -> Task:
    """The task of a prompt that somebody wrote, from its label words: its last line is what stands before them.

    What is written between that line and a label word, and after it, is read from the demonstrations.

    Raises:
        AnchorsError: the prompt is a single line.
    """
    *before, last = text.rstrip().split("\n")
    if not before:
        raise AnchorsError(
            f"The prompt is one line, {last[-40:]!r}; no demonstration stands before it.",
            "Put each demonstration on lines of its own, or say with --template how they are written; a prompt without label words "
            "needs --target TOKEN in place of --labels.",
            code="prompt",
        )
    words = "|".join(re.escape(word) for word in sorted(labels, key=len, reverse=True))
    found = re.findall(rf"^{re.escape(last)}([ \t]*\n?)(?:{words})(?!\w)(.*)$", text, re.MULTILINE)
    gaps, afters = ({pair[side].rstrip(" \t") if side else pair[side] for pair in found} for side in (0, 1))
    gap, after = (each.pop() if len(each) == 1 else "" for each in (gaps, afters))
    return Task(
        "own",
        "{text}\n" + last + gap + "{label}" + after,
        tuple(labels),
        cast(Policy, policy or "first"),
        colon_space=not found or bool(gap),
    )


def _roles(chunk: str, task: Task, number: int, owner: int | None = None) -> list[Piece]:
    """Cut a chunk `\\nReview: some text\\nSentiment:` into separator, format, text, format.

    The separator, and what the template has after the label word, belong to the demonstration before.
    """
    before, prefix, after = task.pieces
    joint = after + task.separator if number else ""
    opening = chunk.find(before) if before else -1
    begins = opening >= 0
    if not begins:
        opening = len(joint) if chunk.startswith(joint) else 0
    start = opening + len(before) if begins else opening
    end = max(len(chunk) - len(prefix) if chunk.endswith(prefix) else len(chunk), 0)
    start = min(start, end)
    opening = min(opening, start)
    separator = Piece(chunk[:opening], "format", max(number - 1, 0))
    own = number if owner is None else owner
    return [separator, *_filled(chunk[opening:start], chunk[start:end], chunk[end:], own)]
