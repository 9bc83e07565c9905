"""Figures 4, 8, 10 and Table 5: isolating the label words."""

from anchors.experiments.grid import Cells, Experiment

METRICS = ("accuracy", "label_loyalty", "word_loyalty")

FIGURE_4 = Experiment(
    name="figure4",
    title="Label and word loyalty with label words or random words isolated in the first or last 5 layers",
    finding="Isolating label words in the first layers hurts most; in the last layers, or at random words, little.",
    cells=(Cells("isolate"),),
    figure="isolate",
    metrics=METRICS,
)
FIGURE_8 = Experiment(
    name="figure8",
    title="Figure 4 with 1, 3, 5 and 7 isolated layers",
    finding="The more of the first layers, the larger the loss.",
    cells=(Cells("isolate", {"layers": (1, 3, 5, 7)}),),
    figure="isolate",
    metrics=METRICS,
)
FIGURE_10 = Experiment(
    name="figure10",
    title="Figure 8 with 2 shots",
    finding="As with one shot.",
    cells=(Cells("isolate", {"layers": (1, 3, 5, 7)}, shots=2),),
    figure="isolate",
    metrics=METRICS,
)
TABLE_5 = Experiment(
    name="table5",
    title="The five most probable words of one AG News example with and without isolation",
    finding="Without isolation the label words lead; isolated in the first layers, other words do.",
    cells=(Cells("words", tasks=("agnews",), examples=1),),
    seeds=(42,),
    figure="words",
)
