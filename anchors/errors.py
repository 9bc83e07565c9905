"""The one exception a user is meant to read."""


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
