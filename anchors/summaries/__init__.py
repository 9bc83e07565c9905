"""What the rows of each analysis come to, with intervals. Nothing here imports torch: tables and figures need rows alone."""

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from anchors.errors import AnchorsError
from anchors.stats import flow_summary
from anchors.study.registry import Summaries, study
from anchors.summaries.causal import agreement, causal_summary
from anchors.summaries.diagnosis import actual_confusion, diagnosis_summary, label_counts, sentence
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
    "causal_tables",
    "classification_summary",
    "compression_sizes",
    "compression_summary",
    "diagnosis_summary",
    "diagnosis_tables",
    "flow_pattern",
    "flow_tables",
    "label_counts",
    "map_tables",
    "marked",
    "readout_summary",
    "readout_tables",
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


def tables_of(rows: Rows, facts: Mapping[str, Any] | None = None) -> Tables:
    """The tables of the first kind of rows, and what was measured `more` with them; of other kinds their summary, by the
    kind's name."""
    (main, own), *others = rows.items()
    line = study(main)
    if line.more:
        if lacking := [name for name in line.needed if name not in rows]:
            raise AnchorsError(
                f"Beside the rows of {main} those of {' and '.join(lacking)} are not there.",
                f"Run `anchors {line.command}` again, with the same --out.",
                code="rows",
            )
        return line.tabulate(own, facts=facts, **dict(others)) | dict(others)
    return line.tabulate(own) | {kind: study(kind).tabulate(more)["summary"] for kind, more in others}


def flow_tables(rows: pd.DataFrame) -> Tables:
    """The three sums by layer, and the paper's finding about them in numbers."""
    summary = flow_summary(rows)
    return {"summary": summary, "pattern": flow_pattern(summary)}


def readout_tables(rows: pd.DataFrame) -> Tables:
    """AUCROC_l and R_l by layer."""
    return {"summary": readout_summary(rows)}


def diagnosis_tables(rows: pd.DataFrame) -> Tables:
    """How well the foretold confusion agrees with the actual one, both of every pair of labels, and how often each label is
    true and said."""
    pairs, agreement = diagnosis_summary(rows)
    return {"summary": agreement, "pairs": pairs, "labels": label_counts(rows)}


def causal_tables(rows: pd.DataFrame) -> Tables:
    """How far the answer follows a patch before each layer, and what each layer releases."""
    return {"summary": causal_summary(rows)}


SUMMARIES: Mapping[str, Callable[[pd.DataFrame], Tables]] = Summaries()
"""By kind of study: from its rows to tables, see `anchors.study.registry`."""
