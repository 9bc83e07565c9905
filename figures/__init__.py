"""Figures: each a function from tables to a picture, in a file of its own. Nothing here imports torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

KINDS = (
    "flow",
    "map",
    "classify",
    "isolate",
    "words",
    "readout",
    "causal",
    "reweight",
    "compress",
    "speed",
    "diagnose",
    "nsa_probe",
)
"""Kinds of analysis that have a picture; each is drawn by the module of its name."""


def draw(kind: str, tables: "dict[str, pd.DataFrame]", model: str) -> "Figure | None":
    """Draw what `anchors.summaries.SUMMARIES[kind]` made of a run; None for a kind without a picture.

    Args:
        kind: of the analysis.
        tables: its tables by name.
        model: its name, for the title.
    """
    if kind not in KINDS:
        return None
    module = import_module(f"{__name__}.{kind}")
    if kind == "causal":
        return module.draw(tables["summary"], tables.get("flow"), model)
    return module.draw(tables, model)
