"""How annotations are checked while tests run: by jaxtyping's import hook, in every module of the package."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Literal, get_args, get_origin

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, config, install_import_hook
from jaxtyping._import_hook import Typechecker

ROOT = Path(__file__).parents[1]
ROOMS = {"anchors": ROOT / "anchors", "anchors.cli": ROOT / "cli", "anchors.figures": ROOT / "figures"}
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int will do for a float, as Python's type checkers read it."""
jaxtyped = jaxtyping.jaxtyped


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
    jaxtyping.jaxtyped = decorator  # what the hook writes above every function
    install_import_hook(modules, "checking.check")


def decorator(*given: object, **how: object) -> Callable:
    """jaxtyping's own for others; for the hook `checked`."""
    ours = not given and how.get("typechecker") in Typechecker.lookup.values()
    return checked if ours else jaxtyped(*given, **how)


def checked(one: Callable | type) -> Callable | type:
    """What names a shape is for jaxtyping; the rest beartype checks alone, in a tenth of the time."""
    if inspect.isclass(one):
        if dataclasses.is_dataclass(one) and one.__init__.__globals__["__name__"] != __name__:
            one.__init__ = checked(one.__init__)
        return one
    if inspect.isgeneratorfunction(one) or any(map(shaped, one.__annotations__.values())):
        return jaxtyped(one, typechecker=check)
    strict = check(one)

    @wraps(one)
    def either(*args: object, **options: object) -> object:
        return (one if config.jaxtyping_disable else strict)(*args, **options)

    return either


def shaped(hint: object) -> bool:
    """Whether an annotation may hold a shape; of one that is still a string nothing is known."""
    if isinstance(hint, str) or (inspect.isclass(hint) and issubclass(hint, AbstractArray)):
        return True
    return get_origin(hint) is not Literal and any(map(shaped, get_args(hint)))


@contextmanager
def unchecked() -> Iterator[None]:
    """For what a test gives wrongly on purpose, to hear what the package says of it."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)
