"""How this package is put together: names that moved, and parts that must come from one place."""

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from anchors._moved import MODULES, NAMES
from anchors.errors import AnchorsError

BESIDE = ("cli", "experiments", "figures")
"""Packages that stand beside `anchors/` in a checkout and inside of it in a wheel."""


def forwarding(package: str, known: Callable[[str], Any] | None = None) -> Callable[[str], Any]:
    """A module's `__getattr__` that finds the names of 0.4.0 which are elsewhere now, with a DeprecationWarning.

    Args:
        package: whose they were.
        known: the `__getattr__` for everything else.
    """

    def look_up(name: str) -> Any:
        home = NAMES.get(package, {}).get(name) or ("" if name.startswith("__") else MODULES.get(package, ""))
        if not home:
            if known is not None:
                return known(name)
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home, _, called = home.partition(":")
        found = getattr(import_module(home), called or name)
        warnings.warn(
            f"{package}.{name} is {home}.{called or name} now; {package} forwards it for this version only.",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return look_up


class _Moved(MetaPathFinder, Loader):
    """Finds modules under the names they had in 0.4.0: empty ones that forward every name."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname in MODULES else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = f"Where `{MODULES[module.__name__]}` was in 0.4.0."
        vars(module)["__getattr__"] = forwarding(module.__name__)


def find_moved() -> None:
    """Modules that moved are found under their old names from now on."""
    sys.meta_path.append(_Moved())


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
