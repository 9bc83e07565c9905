"""How this package is put together: names that moved, and parts that must come from one place."""

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anchors.errors import AnchorsError

BESIDE = ("cli", "experiments", "figures")
"""Packages that stand beside `anchors/` in a checkout and inside of it in a wheel."""


def forwarding(package: str, known: Callable[[str], Any], moved: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's or module's `__getattr__` that also finds names which have left it, with a DeprecationWarning.

    Args:
        package: of whom they were.
        known: the `__getattr__` for everything else.
        moved: where they are now: a module by name.
    """

    def look_up(name: str) -> Any:
        if name not in moved:
            return known(name)
        home = moved[name]
        warnings.warn(
            f"{package}.{name} is {home}.{name} now; {package} forwards it for this version only.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(home), name)

    return look_up


def unknown(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that finds nothing, for `forwarding`."""

    def look_up(name: str) -> Any:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return look_up


def refuse_mixture(package: str, folder: Path) -> None:
    """All parts of the package must come from the folder it was itself imported from.

    Python finds `anchors` in the current folder before it finds an installed one, but `anchors.cli` only where it was
    installed: code of two checkouts would run as one program.

    Raises:
        AnchorsError: a part comes from elsewhere.
    """
    folder = folder.resolve()
    for part in BESIDE:
        spec = find_spec(f"{package}.{part}")
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin).resolve().parent
        if origin.parent not in (folder, folder.parent):
            raise AnchorsError(
                f"Two copies of {package} would run as one: {package} from {folder}, {package}.{part} from {origin}.",
                f"Run from outside of {folder.parent}, or install that checkout in this environment (`uv sync` in it).",
                code="package",
            )
