"""Figures: each a function from tables to a picture, in a file of its own. Nothing here imports torch."""

from typing import TYPE_CHECKING

from anchors.places import titled
from anchors.study.registry import BUILT_IN, STUDIES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

KINDS = tuple(name for name, study in BUILT_IN.items() if study.asked != "suites")
"""Kinds of rows that come along and are drawn."""


def draw(kind: str, tables: "dict[str, pd.DataFrame]", model: str) -> "Figure | dict[str, Figure] | None":
    """Draw what a study's rows came to, one picture or several by name; None for a kind without.

    Args:
        kind: of the study, see `anchors.study.registry`.
        tables: its tables by name.
        model: its name; the title has its last part.
    """
    return STUDIES[kind].draw(tables, titled(model)) if kind in STUDIES else None
