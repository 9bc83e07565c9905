"""Figures 12 and 13, with unrelated labels, and experiments that the paper lacks."""

from functools import partial

import pandas as pd

from anchors.experiments.grid import Cells, Experiment, Rows, Tables
from anchors.stats import summarise
from anchors.summaries import agreement, readout_summary, tables_of

UNRELATED = partial(Cells, tasks=("sst2",), shots=8, labels=("A", "B"))

FIGURE_12 = Experiment(
    name="figure12",
    title="Isolation with the unrelated labels A and B, SST-2, 8 shots",
    finding="Label words that mean nothing are anchors, too (in the paper, in a 33B model).",
    cells=(UNRELATED("isolate"),),
    figure="isolate",
    metrics=("accuracy", "label_loyalty", "word_loyalty"),
)
FIGURE_13 = Experiment(
    name="figure13",
    title="AUCROC_l and R_l with the unrelated labels A and B, SST-2, 8 shots",
    finding="As with meaningful labels (in the paper, in a 33B model).",
    cells=(UNRELATED("readout"),),
    figure="readout",
)


def beside_flow(rows: Rows) -> Tables:
    """How far the answer follows the patch, the flow, and how alike both are over the layers."""
    tables = tables_of(rows)
    return tables | {"agreement": agreement(tables["summary"], tables["flow"])}


CAUSAL = Experiment(
    name="patching",
    title="Patching the label words' residual stream between prompts with exchanged labels, beside S_pq",
    finding="Ours: do the layers in which the answer is really taken from the label words agree with the saliency?",
    cells=(
        Cells("causal", examples=50),
        Cells("flow", examples=200),
    ),
    figure="causal",
    tables=beside_flow,
    metrics=("follow", "released"),
)


def by_shots(rows: Rows) -> Tables:
    """Accuracy by number of shots, compared with one shot on the same test examples."""
    own = rows["classify"]
    named = own.assign(condition=own["shots"].map("{}-shot".format), shots=0)
    return {"summary": summarise(named, ("accuracy", "loss"), baseline="1-shot", missing="leave out")}


MANY_SHOT = Experiment(
    name="many-shot",
    title="Accuracy with 1, 2, 4 and 8 shots",
    finding="Ours: does the model learn more from more demonstrations?",
    cells=tuple(Cells("classify", shots=n) for n in (1, 2, 4, 8)),
    tables=by_shots,
    metrics=("accuracy", "loss"),
)


def by_control(rows: Rows) -> Tables:
    """Accuracy with permuted labels against true ones, and AUCROC_l of label words against random positions."""
    shown = rows["classify"]
    named = shown.assign(condition=shown["control"].replace("none", "true labels"), control="none")
    both = [
        readout_summary(part).assign(condition=c)
        for c, part in rows["readout"].groupby("control", sort=False)
    ]
    return {
        "summary": summarise(named, ("accuracy", "loss"), baseline="true labels"),
        "readout": pd.concat(both, ignore_index=True),
    }


CONTROLS = Experiment(
    name="controls",
    title="Permuted labels for accuracy, random positions for the readout",
    finding="Ours: how much of the result is due to which label stands where?",
    cells=(
        Cells("classify"),
        Cells("classify", control="permuted-labels"),
        Cells("readout"),
        Cells("readout", control="random-positions"),
    ),
    tables=by_control,
    metrics=("accuracy", "loss"),
)
