"""The one exception a user is meant to read."""

import difflib
import errno
import json
import re
from collections.abc import Collection, Iterable
from typing import Any


class AnchorsError(ValueError):
    """Something the user can mend: what happened, to what, and how to mend it.

    The command line prints the message and leaves with exit code 2. Everything else that is raised is a defect
    of the toolkit.

    Args:
        message: what happened, and to what.
        remedy: what to do about it, as a sentence.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}\n{remedy}" if remedy else message)
        self.message = message
        self.remedy = remedy


class RoutingError(AnchorsError):
    """A model whose attention does not pass through the seam: edits on it would silently do nothing."""


class CertificateError(AnchorsError):
    """A number that must agree did not: the analysis on this model is not to be trusted."""


def nearest(name: object, known: Iterable[object]) -> str:
    """The remedy for a name that is not known: the nearest one there is, and all of them."""
    names = [str(one) for one in known]
    meant = closest(name, names)
    return (f"Did you mean {meant!r}? " if meant else "") + f"There are: {', '.join(names)}."


def closest(name: object, names: Iterable[str]) -> str | None:
    """The name that is meant, upper and lower case aside; None where none is near."""
    lower = {one.lower(): one for one in names}
    found = difflib.get_close_matches(str(name).lower(), lower, 1, 0.6)
    return lower[found[0]] if found else None


def require_known(what: str, names: Iterable[object], known: Collection[object]) -> None:
    """Refuse names that are not known.

    Args:
        what: what they name, such as "task".
        names: those given.
        known: those there are.

    Raises:
        AnchorsError: with the nearest one there is.
    """
    for name in names:
        if name not in known:
            raise AnchorsError(f"There is no {what} {name!r}.", nearest(name, known))


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
_SAYS_ERRNO = re.compile(r"\(os error (\d+)\)")


def errno_of(error: BaseException) -> int | None:
    """The system's number of an error, also of libraries that only print it (safetensors, tokenizers)."""
    if isinstance(error, OSError):
        return error.errno
    printed = _SAYS_ERRNO.search(str(error))
    return int(printed[1]) if printed else None


def full(error: BaseException) -> bool:
    """Whether a disk, a quota or a limit on the size of files was reached."""
    return errno_of(error) in _FULL


def of_the_machine(error: BaseException) -> AnchorsError | None:
    """What an exception says where memory, a disk or a permission was lacking; None where it says something else."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(
        said in text
        for said in ("out of memory", "can't allocate memory", "not enough memory", "unable to allocate")
    ):
        return AnchorsError(
            f"There is not enough memory: {brief(error)}",
            "Use a smaller --batch-size, fewer tokens or a smaller model.",
        )
    if full(error):
        return AnchorsError(f"The disk is full: {brief(error)}.", "Make room; what is finished is kept.")
    if errno_of(error) in _CLOSED:
        return AnchorsError(
            f"A file cannot be read or written: {brief(error)}.", "Look at its path and permissions."
        )
    return None
