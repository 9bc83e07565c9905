"""Figures 12 and 13, with unrelated labels, and experiments that the paper lacks."""

from functools import partial

import pandas as pd

from anchors.experiments.grid import Cells, Experiment, Rows, Tables
from anchors.stats import summarise
from anchors.summaries import agreement, readout_summary, tables_of
from anchors.summaries.critiques import followed, pooled_summary, shots_summary

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


CHAT = Experiment(
    name="chat",
    title="Flow, isolation and accuracy with prompts through the model's chat template",
    finding="Ours: is what holds of a plain prompt true of a chat, too?",
    cells=tuple(Cells(study, chat="turns") for study in ("flow", "isolate", "classify")),
    figure="flow",
)

ORDER = Experiment(
    name="order",
    title="AUCROC_l over all seeds at once and within seeds, whose demonstrations differ, or their order alone",
    finding="Ours: does an AUC over several orders of the demonstrations measure these orders (Lu et al. 2022 on what orders do)?",
    cells=(
        Cells("readout"),
        Cells("readout", control="order-only"),
    ),
    tables=lambda rows: {"summary": pooled_summary(rows["readout"])},
)

OVERRIDE = Experiment(
    name="override",
    title="Answers that follow permuted labels, and those that stay with what the model knew, by shots",
    finding="Ours: do larger models, and more demonstrations, override what was known before (Wei et al. 2023)?",
    cells=tuple(Cells("classify", shots=n, control="permuted-labels") for n in (1, 2, 4, 8)),
    tables=lambda rows: {"summary": followed(rows["classify"])},
    metrics=("shown", "true", "other"),
)

FLOW_SHOTS = Experiment(
    name="flow-shots",
    title="The share of S_pq and how evenly label words share in it, with 1, 2 and 4 shots",
    finding="Ours: does the flow from label words thin out as they become more (Min et al. 2022 on what labels are needed for)?",
    cells=(Cells("flow"), Cells("flow", shots=2), Cells("flow", shots=4, examples=50)),
    tables=lambda rows: {"summary": shots_summary(rows["flow"])},
)

QUANTISATION = Experiment(
    name="quantisation",
    title="The flow and the accuracy of weights in fewer bits, beside those of the model they were made of",
    finding="Ours: how much of a number is due to the bits that the weights are kept in?",
    cells=(
        Cells("flow", examples=20),
        Cells("classify", examples=60),
    ),
    seeds=(42, 43, 44),
    figure="flow",
)
