"""Names of 0.4.0 that have moved: importing one still works, and says where it is now."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


def moved(module: str, names: Mapping[str, tuple[str, Callable[[], Any]]]) -> Callable[[str], Any]:
    """The `__getattr__` of a module from which names have moved.

    Args:
        module: its name.
        names: by name, where it is now, in words, and what gets it.
    """

    def getter(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        where, get = names[name]
        warnings.warn(f"{module}.{name} has moved: use {where}.", DeprecationWarning, stacklevel=2)
        return get()

    return getter


def hidden_labels() -> Any:
    """Of `anchors.check`."""
    from anchors.sight import hidden_labels

    return hidden_labels


def fuse_gelu() -> "Callable[[nn.Module], None]":
    """Of `anchors.models`."""
    from anchors.preparation import apply, fused_gelu

    def fuse_gelu(model: "nn.Module") -> None:
        apply(fused_gelu(model))

    return fuse_gelu


def suffixes() -> tuple[str, ...]:
    """Of `anchors.tasks.data`."""
    from anchors.tasks.files import READERS

    return tuple(READERS)


def write_rows() -> Callable[..., list[Path]]:
    """Of `anchors.report`."""

    def write_rows(
        out: Path, rows: "dict[str, pd.DataFrame]", facts: dict[str, Any], *, csv: bool = False
    ) -> list[Path]:
        from anchors.shelf import Shelf

        shelf = Shelf(out, next(iter(rows), "rows"))
        for kind, table in rows.items():
            shelf.table(kind, table, csv=csv)
        return shelf.write(facts)[0]

    return write_rows


def write_tables() -> Callable[..., list[Path]]:
    """Of `anchors.report`."""

    def write_tables(
        out: Path, name: str, tables: "dict[str, pd.DataFrame]", facts: dict[str, Any]
    ) -> list[Path]:
        from anchors.shelf import Shelf

        shelf = Shelf(out, name)
        for key, table in tables.items():
            shelf.table(f"{name}_{key}", table)
        return shelf.write(facts)[0]

    return write_tables


def write_figure() -> Callable[..., list[Path]]:
    """Of `anchors.report`."""

    def write_figure(
        out: Path, name: str, kind: str, tables: "dict[str, pd.DataFrame]", model: str
    ) -> list[Path]:
        from anchors.figures import draw
        from anchors.figures.style import save

        drawn = draw(kind, tables, model)
        return [] if drawn is None else save(drawn, out / name)

    return write_figure
