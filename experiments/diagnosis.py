"""Figures 6 and 14: predicted against actual confusion of labels on TREC."""

from anchors.experiments.grid import Cells, Experiment

FIGURE_6 = Experiment(
    name="figure6",
    title="Predicted and actual confusion on TREC, 10 components",
    finding="The closest pair of keys, Description and Entity, is also the most confused one.",
    cells=(Cells("diagnose", tasks=("trec",), examples=500),),
    figure="diagnose",
)
FIGURE_14 = Experiment(
    name="figure14",
    title="Figure 6 with 5 to 200 components",
    finding="The pattern does not depend much on the number of components.",
    cells=(Cells("diagnose", {"components": (5, 10, 20, 50, 100, 200)}, tasks=("trec",), examples=500),),
    figure="diagnose",
)
