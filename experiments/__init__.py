"""One frozen grid per figure and table of the paper, and a few of ours. Listing them needs no torch."""

from anchors.experiments import beyond, compression, diagnosis, flow, isolation, readout, reweighting
from anchors.experiments.grid import Cells, Experiment, Reported

CATALOGUE: dict[str, Experiment] = {
    e.name: e
    for e in (
        flow.FIGURE_1,
        flow.FIGURE_3,
        isolation.FIGURE_4,
        readout.FIGURE_5,
        diagnosis.FIGURE_6,
        flow.FIGURE_7,
        isolation.FIGURE_8,
        flow.FIGURE_9,
        isolation.FIGURE_10,
        readout.FIGURE_11,
        beyond.FIGURE_12,
        beyond.FIGURE_13,
        diagnosis.FIGURE_14,
        reweighting.TABLE_1,
        compression.TABLE_2,
        compression.TABLE_3,
        isolation.TABLE_5,
        compression.TABLE_6,
        beyond.CAUSAL,
        beyond.MANY_SHOT,
        beyond.CONTROLS,
        beyond.CHAT,
        beyond.ORDER,
        beyond.OVERRIDE,
        beyond.FLOW_SHOTS,
        beyond.QUANTISATION,
    )
}
"""By name, in the paper's order, ours last."""

SUITES: dict[str, tuple[str, ...]] = {
    "scale": (
        *("figure3", "figure7", "figure4", "figure5", "table2", "many-shot", "table1"),
        *("chat", "controls", "override", "patching", "figure6", "figure14", "figure12", "figure13", "order"),
        *("flow-shots", "figure9", "figure8", "figure10", "figure11", "figure1", "table5"),
    ),
}
"""Names that stand for several, in the order in which they are run: what a study of scale needs of a model, the weightiest first."""

__all__ = ["CATALOGUE", "SUITES", "Cells", "Experiment", "Reported"]
