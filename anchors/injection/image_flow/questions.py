"""Questions about pictures as they come from a user: a picture and a question, a folder of pictures, a file of both."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from anchors.errors import AnchorsError, parsed
from anchors.injection.asking.suite import FORMATS, UNREADABLE, in_rgb
from anchors.injection.asking.vlm import PLACE, TINY, TINY_FOLDER
from anchors.injection.image_flow.flow import ImagePrompt

TEMPLATE = f"{PLACE}\nQuestion: {{question}}\nAnswer: {{answer}}\n\n"
TEMPLATES = {TINY: f"{PLACE} {{question}} = {{answer}} ; "}
"""Of models that were taught one, by name."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MOST = 50
"""Prompts on a page."""


@dataclass(frozen=True)
class Question:
    """A question about a picture; without an answer nobody knows it."""

    image: Path
    question: str
    answer: str | None = None

    @property
    def name(self) -> str:
        return f"{self.image.name}: {self.question}"


def questions_in(source: str, ask: str | None = None, answer: str | None = None) -> list[Question]:
    """The questions that a user names.

    Args:
        source: a picture, or a folder whose pictures are all asked the same; a file of JSON lines with `image` (beside the
            file), `question` and perhaps `answer`; or the name of the model that comes along, with questions of its own.
        ask: the question, about a picture or a folder.
        answer: the right one.

    Raises:
        AnchorsError: nothing is there, or it cannot be read; a question too few or too many; more than `MOST`.
    """
    path = TINY_FOLDER / "questions.jsonl" if source == TINY and not Path(source).exists() else Path(source)
    if path.suffix == ".jsonl" and ask is None and answer is None:
        found = _lines(path)
    elif ask is None:
        raise AnchorsError(
            f"Nothing is asked about {source!r}.", "Give the question with --ask.", code="prompt"
        )
    elif path.is_dir():
        found = [
            Question(one, ask, answer) for one in sorted(path.iterdir()) if one.suffix.lower() in SUFFIXES
        ]
    elif path.suffix == ".jsonl":
        raise AnchorsError(
            f"{source!r} holds questions of its own; --ask and --truth are for a picture or a folder of pictures.",
            "Leave them out.",
            code="options-together",
        )
    else:
        found = [Question(path, ask, answer)]
    if not 0 < len(found) <= MOST:
        raise AnchorsError(
            f"{source!r} holds {len(found)} questions or pictures; a page shows 1 to {MOST}.",
            f"Name a picture ({', '.join(SUFFIXES)}), a folder of some, or a file with fewer lines.",
            code="prompt",
        )
    return found


def _lines(path: Path) -> list[Question]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise AnchorsError(
            f"The questions {str(path)!r} cannot be read: {error}.",
            "Name a file of JSON lines in UTF-8.",
            code="file-unreadable",
        ) from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            x = parsed(line)
            texts = (x["image"], x["question"], x.get("answer", ""))
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("image, question and answer must be texts")
            found.append(Question(path.parent / x["image"], x["question"], x.get("answer")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AnchorsError(
                f"Line {number} of {str(path)!r} is no question about a picture: {type(error).__name__} {error}.",
                'Each line is an object with "image" (a file beside this one), "question" and perhaps "answer".',
                code="data-row",
            ) from error
    return found


def opened(path: Path) -> Image.Image:
    """A picture in RGB, turned upright as its file says.

    Raises:
        AnchorsError: it cannot be read.
    """
    try:
        return in_rgb(path, upright=True)
    except UNREADABLE as error:
        raise AnchorsError(
            f"The picture {str(path)!r} cannot be read: {error}",
            f"Give a picture as {', '.join(FORMATS)}.",
            code="file-unreadable",
        ) from error


def written(template: str, asked: Question, demonstrations: Sequence[Question] = ()) -> ImagePrompt:
    """A prompt: answered demonstrations, then the question.

    Args:
        template: with `<image>`, `{question}` and `{answer}` once each, the answer last; what stands behind it parts one
            demonstration from the next.
        asked: with an answer, the loss is that of the answer's first token.
        demonstrations: all with answers.

    Raises:
        AnchorsError: another template; a demonstration without an answer, or a picture that cannot be read.
    """
    parts = (PLACE, "{question}", "{answer}")
    if any(template.count(part) != 1 for part in parts) or not all(
        template.index(part) < template.index("{answer}") for part in parts[:2]
    ):
        raise AnchorsError(
            f"The template {template!r} does not hold <image>, {{question}} and {{answer}} once each, the answer last.",
            r"For example: '<image>\nQuestion: {question}\nAnswer: {answer}\n\n'.",
            code="task",
        )
    before, after = template.split("{answer}")
    text, labels = "", []
    for one in demonstrations:
        if not one.answer:
            raise AnchorsError(
                f"The demonstration {one.name!r} has no answer.", 'Give its line an "answer".', code="prompt"
            )
        text += _put(before, one.question)
        labels.append((len(text), len(text) + len(one.answer)))
        text += one.answer + after
    begins = len(text)
    text += _put(before, asked.question)
    answer = (len(text), len(text) + len(asked.answer)) if asked.answer else None
    text = text + (asked.answer or "") if answer else text.rstrip()
    images = tuple(opened(one.image) for one in (*demonstrations, asked))
    return ImagePrompt(text, images, tuple(labels), begins, answer)


def _put(before: str, question: str) -> str:
    return re.sub(r"\{question\}", lambda _: question, before)
