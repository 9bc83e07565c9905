"""How annotations are checked while tests run: by jaxtyping's import hook, in every module of the package."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beartype import BeartypeConf, beartype
from jaxtyping import config, install_import_hook

ROOT = Path(__file__).parents[1]
ROOMS = {"anchors": ROOT / "anchors", "anchors.cli": ROOT / "cli", "anchors.figures": ROOT / "figures"}
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int will do for a float, as Python's type checkers read it."""


def install() -> None:
    """Hook all but the files of Triton's kernels: what the hook makes of a function, `triton.jit` cannot read."""
    modules = [
        ".".join([room, *file.relative_to(folder).with_suffix("").parts])
        for room, folder in ROOMS.items()
        for file in sorted(folder.rglob("*.py"))
        if file.name != "__init__.py" and "@triton.jit" not in file.read_text()
    ]
    modules.remove("anchors.nsa.config")  # transformers makes the constructor of a configuration itself
    modules.remove("anchors._names")  # its warnings count frames, and the hook adds some
    install_import_hook(modules, "checking.check")


@contextmanager
def unchecked() -> Iterator[None]:
    """For what a test gives wrongly on purpose, to hear what the package says of it."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)
