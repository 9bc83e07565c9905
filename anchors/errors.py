"""The one exception a user is meant to read."""

import difflib
import errno
import json
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

from anchors.kinds import KINDS


class AnchorsError(ValueError):
    """Something the user can mend: what happened, to what, and how to mend it.

    The command line prints the message and leaves with exit code 2. Everything else that is raised is a defect
    of the toolkit.

    Args:
        message: what happened, and to what.
        remedy: what to do about it, as a sentence.
        code: of which kind it is (`anchors.kinds`); everything that the toolkit raises has one, others may leave it out.

    Raises:
        KeyError: there is no kind of that code.
    """

    code = ""

    def __init__(self, message: str, remedy: str = "", *, code: str = "") -> None:
        super().__init__(f"{message}\n{remedy}" if remedy else message)
        self.message = message
        self.remedy = remedy
        self.code = KINDS[code].code if code else self.code

    def at(self, place: str) -> "AnchorsError":
        """The same, with where it happened before the message."""
        return type(self)(f"{place}: {self.message}", self.remedy, code=self.code)

    def __reduce__(self) -> tuple[Any, ...]:
        """An error of another process says the same."""
        return partial(type(self), code=self.code), (self.message, self.remedy)


class RoutingError(AnchorsError):
    """A model whose attention does not pass through the seam: edits on it would silently do nothing."""

    code = "off-the-seam"


class CertificateError(AnchorsError):
    """A number that must agree did not: the analysis on this model is not to be trusted."""

    code = "certificate"


def nearest(name: object, known: Iterable[object]) -> str:
    """The remedy for a name that is not known: the nearest one there is, and all of them."""
    names = [str(one) for one in known]
    close = difflib.get_close_matches(str(name).lower(), {one.lower(): one for one in names}, 1, 0.6)
    meant = next((one for one in names if close and one.lower() == close[0]), None)
    return (f"Did you mean {meant!r}? " if meant else "") + f"There are: {', '.join(names)}."


def parsed(text: str | bytes, **how: Any) -> Any:
    """`json.loads`, for which nesting too deep is one more thing that is no JSON.

    Raises:
        ValueError: the text is none.
    """
    try:
        return json.loads(text, **how)
    except RecursionError as error:
        raise ValueError(brief(error)) from error


def whole_number(text: str) -> int | None:
    """Digits 0 to 9 as a number; None for anything else (`²` is a digit, too, to Python) and for more than 18 of them."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


def demand_seed(seed: int) -> None:
    """Refuse a seed that a generator of torch does not hold, before anything is computed.

    Raises:
        AnchorsError: it is not from 0 to 2⁶³ − 1.
    """
    if not 0 <= seed < 1 << 63:
        raise AnchorsError(
            f"The seed {seed} is not from 0 to 2^63 - 1.",
            "Any number will do, such as 42.",
            code="option-value",
        )


def brief(error: object, most: int = 400) -> str:
    """What an error says, on one line and not for ever."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    text = re.sub(r"\s+", " ", text).strip() or type(error).__name__
    return text if len(text) <= most else text[:most].rstrip() + " …"


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_PARTED = ("closed by peer", "reset by peer")
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "unable to allocate")


def errno_of(error: BaseException) -> int | None:
    """The system's number of an error, also of libraries that only print it (safetensors, tokenizers)."""
    if isinstance(error, OSError):
        return error.errno
    printed = re.search(r"\(os error (\d+)\)", str(error))
    return int(printed[1]) if printed else None


def full(error: BaseException) -> bool:
    """Whether a disk, a quota or a limit on the size of files was reached."""
    return errno_of(error) in _FULL


def of_the_machine(error: BaseException) -> AnchorsError | None:
    """What an exception means where memory, room on a disk, a permission or another process was lacking; None where it means something else."""
    said = brief(error)
    if isinstance(error, MemoryError) or any(part in str(error).lower() for part in _NO_MEMORY):
        return AnchorsError(
            f"There is not enough memory: {said}",
            "Use a smaller --batch-size, fewer tokens or a smaller model.",
            code="memory",
        )
    if isinstance(error, RuntimeError) and any(part in str(error) for part in _PARTED):  # gloo's and NCCL's
        return AnchorsError(
            f"A process that worked with this one has ended: {said}",
            "What it said comes first; what is finished is kept, and the same command goes on from there.",
            code="workers",
        )
    if full(error):
        return AnchorsError(
            f"The disk is full: {said}.", "Make room; what is finished is kept.", code="disk-full"
        )
    if errno_of(error) in _CLOSED:
        return AnchorsError(
            f"A file cannot be read or written: {said}.",
            "Look at its path and permissions.",
            code="file-unwritable",
        )
    return None
