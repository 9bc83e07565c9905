"""The page of the kinds of error, from the kinds and from where they are raised.

uv run python docs/error_page.py
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from anchors import errors
from anchors.kinds import KINDS

HERE = Path(__file__).parent
ROOMS = {"anchors": "anchors", "cli": "anchors.cli", "figures": "anchors.figures", "experiments": "anchors.experiments"}  # fmt: skip
"""By folder: the package it is once installed."""
CLASSES = {"AnchorsError", "RoutingError", "CertificateError"}
OPENING = """# Errors

What you can mend is said in two sentences, what happened and what to do about it, with the code of its *kind* before them:
`error: [label-words] …`. In Python the code is the error's `code` ([`AnchorsError`][anchors.errors.AnchorsError]). The exit
code is 2, or 1 where a certificate failed. An error without a code comes from a package that is not this one; what begins
with `unforeseen:` is a defect of the toolkit, not yours.
"""


def raised() -> Iterator[tuple[str, int, str | None]]:
    """Module, line and code of every error that is made; None for a code that is not written out or is missing."""
    for room, package in ROOMS.items():
        for path in sorted((HERE.parent / room).rglob("*.py")):
            parts = path.relative_to(HERE.parent / room).with_suffix("").parts
            module = ".".join([package, *(part for part in parts if part != "__init__")])
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and (name := getattr(node.func, "attr", getattr(node.func, "id", ""))) in CLASSES
                ):
                    given = [word.value for word in node.keywords if word.arg in ("code", None)]
                    code = getattr(given[0], "value", None) if given else getattr(errors, name).code or None
                    yield module, node.lineno, code


def page() -> str:
    """One heading a code."""
    modules = defaultdict(set)
    for module, _, code in raised():
        modules[code].add(f"`{module}`")
    kinds = (
        f"\n## {kind.code}\n\n**Symptom.** {kind.symptom}\n\n**Cause.** {kind.cause}\n\n**Mend.** {kind.mend}\n\n"
        f"Raised in {', '.join(sorted(modules[code]))}.\n"
        for code, kind in KINDS.items()
    )
    return OPENING + "".join(kinds)


if __name__ == "__main__":
    (HERE / "errors.md").write_text(page(), encoding="utf-8")
