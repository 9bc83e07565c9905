"""Figures 5 and 11: reading the prediction off the attention to the label words."""

from anchors.experiments.grid import Cells, Experiment

FIGURE_5 = Experiment(
    name="figure5",
    title="AUCROC_l and R_l by layer, 1 shot, per task and mean",
    finding="AUCROC_l reaches about 0.8 in deep layers; R_l rises in the middle and deep layers.",
    cells=(Cells("readout"),),
    figure="readout",
)
FIGURE_11 = Experiment(
    name="figure11",
    title="Figure 5 with 2 shots",
    finding="As with one shot.",
    cells=(Cells("readout", shots=2),),
    figure="readout",
)
