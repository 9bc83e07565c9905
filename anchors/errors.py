"""The one exception a user is meant to read."""

import re


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


def brief(error: object, most: int = 400) -> str:
    """What an error says, on one line and not for ever."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    text = re.sub(r"\s+", " ", text).strip() or type(error).__name__
    return text if len(text) <= most else text[:most].rstrip() + " …"
