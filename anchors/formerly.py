"""Functions of 0.4.0 that nothing here calls any more, for those who do: `anchors._names.forwarding` leads to them."""

from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from anchors.model.preparation import apply, fused_gelu
from anchors.study.shelf import Shelf
from anchors.tasks.files import READERS

SUFFIXES = tuple(READERS)
"""Of files that are read as data."""
CHUNK = 64
"""Of unions of blocks, when their entries were compared in pairs; they are sorted now."""
FUSED = 8192
"""Compressed tokens whose patterns one program summed in a decode step; several do now, of which the last chooses."""


def fuse_gelu(model: nn.Module) -> None:
    """Put the one-kernel form of `gelu_new` into a model, see `anchors.model.preparation.fused_gelu`."""
    apply(fused_gelu(model))


def write_rows(
    out: Path, rows: dict[str, pd.DataFrame], facts: dict[str, Any], *, csv: bool = False
) -> list[Path]:
    """Write rows as parquet, one file per kind of analysis; returns what was written.

    Results of something else stay where they are, see `anchors.study.shelf`.
    """
    shelf = Shelf(out, next(iter(rows), "rows"))
    for kind, table in rows.items():
        shelf.table(kind, table, csv=csv)
    return shelf.write(facts)[0]


def write_tables(out: Path, name: str, tables: dict[str, pd.DataFrame], facts: dict[str, Any]) -> list[Path]:
    """Write tables as parquet, as `write_rows` does; returns what was written."""
    shelf = Shelf(out, name)
    for key, table in tables.items():
        shelf.table(f"{name}_{key}", table)
    return shelf.write(facts)[0]


def write_figure(out: Path, name: str, kind: str, tables: dict[str, pd.DataFrame], model: str) -> list[Path]:
    """Draw tables as PNG and PDF; nothing where a kind has no picture."""
    from anchors.figures import draw
    from anchors.figures.style import save

    drawn = draw(kind, tables, model)
    drawn = drawn if isinstance(drawn, dict) else {name: drawn}
    return [path for stem, one in drawn.items() if one is not None for path in save(one, out / stem)]
