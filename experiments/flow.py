"""Figures 1, 3, 7 and 9: the information flow."""

from anchors.experiments.grid import Cells, Experiment

FIGURE_1 = Experiment(
    name="figure1",
    title="One prompt: the flow in a shallow and in a deep layer, as arcs",
    finding="In a shallow layer words flow to label words, in a deep layer label words flow to the target.",
    cells=(Cells("map", tasks=("sst2",), examples=1),),
    seeds=(42,),
    figure="map",
)
FIGURE_3 = Experiment(
    name="figure3",
    title="Shares of S_wp, S_pq and S_ww by layer, 1 shot",
    finding="Shallow layers: S_wp high, S_pq low; deep layers: S_pq dominant; both above S_ww.",
    cells=(Cells("flow", tasks=("sst2", "agnews")),),
    figure="flow",
)
FIGURE_7 = Experiment(
    name="figure7",
    title="Figure 3 for the other two tasks",
    finding="As in Figure 3.",
    cells=(Cells("flow", tasks=("trec", "emo")),),
    figure="flow",
)
FIGURE_9 = Experiment(
    name="figure9",
    title="Figures 3 and 7 with 2 shots",
    finding="As with one shot.",
    cells=(Cells("flow", shots=2),),
    figure="flow",
)
