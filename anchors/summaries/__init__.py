"""What the rows of each analysis come to, with intervals. Nothing here imports torch: tables and figures need rows alone."""

from collections.abc import Callable

import pandas as pd

from anchors.stats import flow_summary, summarise
from anchors.summaries.causal import agreement, causal_summary
from anchors.summaries.diagnosis import actual_confusion, diagnosis_summary, sentence
from anchors.summaries.nsa_probe import probe_tables
from anchors.summaries.readout import aucroc, readout_summary, weighted_auc
from anchors.summaries.tables import (
    LOYALTIES,
    classification_summary,
    compression_sizes,
    compression_summary,
    flow_pattern,
    map_tables,
    marked,
    reduced,
    reweighting_summary,
    speed_summary,
    word_tables,
)

__all__ = [
    "LOYALTIES",
    "SUMMARIES",
    "Rows",
    "Tables",
    "actual_confusion",
    "agreement",
    "aucroc",
    "causal_summary",
    "classification_summary",
    "compression_sizes",
    "compression_summary",
    "diagnosis_summary",
    "flow_pattern",
    "map_tables",
    "marked",
    "probe_tables",
    "readout_summary",
    "reduced",
    "reweighting_summary",
    "sentence",
    "speed_summary",
    "tables_of",
    "weighted_auc",
    "word_tables",
]


Rows = dict[str, pd.DataFrame]
"""Rows by kind of analysis."""
Tables = dict[str, pd.DataFrame]
"""Tables by name."""


def tables_of(rows: Rows) -> Tables:
    """The tables of the first kind of rows; of other kinds their summary, by the kind's name."""
    (main, own), *others = rows.items()
    return SUMMARIES[main](own) | {kind: SUMMARIES[kind](more)["summary"] for kind, more in others}


def _pairs(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    pairs, agreement = diagnosis_summary(rows)
    return {"summary": agreement, "pairs": pairs}


def _flow(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    summary = flow_summary(rows)
    return {"summary": summary, "pattern": flow_pattern(summary)}


SUMMARIES: dict[str, Callable[[pd.DataFrame], dict[str, pd.DataFrame]]] = {
    "flow": _flow,
    "classify": classification_summary,
    "isolate": lambda rows: {"summary": summarise(rows, LOYALTIES, baseline="none")},
    "readout": lambda rows: {"summary": readout_summary(rows)},
    "reweight": reweighting_summary,
    "compress": compression_summary,
    "speed": speed_summary,
    "diagnose": _pairs,
    "causal": lambda rows: {"summary": causal_summary(rows)},
    "map": map_tables,
    "words": word_tables,
    "nsa_probe": probe_tables,
}
"""By kind of analysis: from its rows to tables. The main one is `summary`, save for single prompts (`map`, `words`)."""
