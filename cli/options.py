"""Options from the fields of a frozen class: one text, one default, one name for what Python and the command line both take.

A field's type says how its option is read, the class's docstring (`Attributes:`) what it is for. Metadata say what differs:
`option`, its names (None: it has none), and what else `typer.Option` takes, e.g. `min`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from anchors.cli import common
from anchors.errors import AnchorsError, nearest, whole_number
from anchors.study.docstring import attributes


@dataclass(frozen=True)
class Option:
    """One option of a class.

    Attributes:
        field: name of the field.
        names: on the command line.
        parameter: for typer.
        read: from what typer hands over to the field's value.
    """

    field: str
    names: tuple[str, ...]
    parameter: inspect.Parameter
    read: Callable[[Any], Any]


def options_of(kind: type, panel: str | None = None) -> list[Option]:
    """The options of a frozen class, in the order of its fields.

    Args:
        kind: the class.
        panel: of the help in which they stand.

    Raises:
        AnchorsError: a field that no option can stand for.
    """
    types, said = get_type_hints(kind), attributes(kind)
    shown = [field for field in fields(kind) if field.init and field.metadata.get("option", "") is not None]
    return [_option(field, types[field.name], said.get(field.name, ""), panel) for field in shown]


def _option(field: Field, type_: Any, said: str, panel: str | None) -> Option:
    more = dict(field.metadata)
    names = more.pop("option", "--" + field.name.replace("_", "-"))
    names = (names,) if isinstance(names, str) else tuple(names)
    default = field.default
    if default is MISSING:
        raise AnchorsError(f"The setting {field.name!r} has no default.", "Give it one.")
    choice, taken, read = _reader(field.name, type_, names[0], more)
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    flags = names if taken is not bool or not default else (f"{names[0]}/--no-{names[0][2:]}", *names[1:])
    text = said[:1].upper() + said[1:]
    how = typer.Option(*flags, help=escape(text.replace("`", "")), rich_help_panel=panel, **choice)
    annotated = Annotated[taken if default is not None or taken is bool else taken | None, how]
    place = inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotated
    )
    return Option(field.name, names, place, read)


def _reader(
    name: str, type_: Any, option: str, more: dict[str, Any]
) -> tuple[dict[str, Any], type, Callable]:
    """What typer is told, the type it hands over, and how that becomes the field's value."""
    parts = [
        t
        for t in (get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,))
        if t is not NoneType
    ]
    if Path in parts:
        # What a setting names is read.
        return {"exists": True, "dir_okay": False} | more, Path, _same
    if all(get_origin(t) is Literal for t in parts):
        known = [word for t in parts for word in get_args(t)]
        return more, str, partial(_one_of, known=known, option=option)
    (only,) = parts if len(parts) == 1 else (None,)
    if only in (bool, int, float, str):
        return more, only, _same
    if get_origin(only) is tuple and get_args(only)[1:] == (...,):
        (entry, _), least = get_args(only), more.pop("min", None)
        if entry is int:
            return more, str, partial(numbers, option=option, least=1 if least is None else least)
        if entry is float:
            return more, str, partial(common.numbers, option=option)
        if entry is str:
            return more, str, partial(common.words, option=option)
        if get_origin(entry) is Literal:
            return more, str, partial(_each_of, known=get_args(entry), option=option)
    raise AnchorsError(
        f"The setting {name!r} is a {type_}, which no option can be read as.",
        'Give its field the metadata {"option": None}, and a default.',
    )


def _same(value: Any) -> Any:
    return value


def _one_of(text: str | None, *, known: Sequence[str], option: str) -> str | None:
    if text is not None and text not in known:
        raise AnchorsError(f"{option} {text!r} is not one of those there are.", nearest(text, known))
    return text


def _each_of(text: str | None, *, known: Sequence[str], option: str) -> tuple[str, ...] | None:
    found = common.words(text, option)
    for word in found or ():
        _one_of(word, known=known, option=option)
    return found


def numbers(text: str | None, option: str, least: int = 1) -> tuple[int, ...] | None:
    """`1,3,5` as numbers; None where nothing was given."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    found = [whole_number(part) for part in parts]
    if not found or not all(number is not None and number >= least for number in found):
        raise AnchorsError(
            f"{option} {text!r} is not a list of numbers from {least} on.", f"For example: {option} 1,3,5"
        )
    if len(set(found)) < len(found):
        raise AnchorsError(f"{option} {text!r} names a number twice.")
    return tuple(found)
