"""Tables 2, 3 and 6: compressing demonstrations into their anchors."""

from anchors.experiments.grid import TASKS, Cells, Experiment, Reported, Rows, Tables
from anchors.stats import summarise
from anchors.summaries import LOYALTIES, compression_sizes, reduced, speed_summary

METRICS = ("accuracy", "label_loyalty", "word_loyalty")


def averaged(rows: Rows) -> Tables:
    """Table 6 by task, and the mean over tasks (Table 2)."""
    own = rows["compress"]
    summary = summarise(reduced(own), LOYALTIES, baseline="none", mean=True)
    return {"summary": summary, "sizes": compression_sizes(own)}


def _reported(model: str, condition: str, *values: float) -> tuple[Reported, ...]:
    metrics = ("label_loyalty", "word_loyalty", "accuracy")
    return tuple(
        Reported(model, "mean", condition, metric, value / 100)
        for metric, value in zip(metrics, values, strict=True)
    )


PAPER = (
    *_reported("GPT2-XL", "none", 100, 100, 51.90),
    *_reported("GPT2-XL", "text_anchor", 51.05, 36.65, 38.77),
    *_reported("GPT2-XL", "hidden_random", 48.96, 5.59, 39.96),
    *_reported("GPT2-XL", "hidden_random_top", 57.52, 4.49, 41.72),
    *_reported("GPT2-XL", "hidden_anchor", 79.47, 62.17, 45.04),
    *_reported("GPT-J", "none", 100, 100, 56.82),
    *_reported("GPT-J", "text_anchor", 53.45, 43.85, 40.83),
    *_reported("GPT-J", "hidden_random", 49.03, 2.16, 31.51),
    *_reported("GPT-J", "hidden_random_top", 71.10, 11.36, 52.34),
    *_reported("GPT-J", "hidden_anchor", 89.06, 75.04, 55.59),
)

TABLE_2 = Experiment(
    name="table2",
    title="Compression: loyalties and accuracy of the four methods, mean over tasks (Table 6: by task)",
    finding="Hidden anchors keep most of the answer; text anchors and random hidden states do not.",
    cells=(Cells("compress", {"rule": "reference"}),),
    figure="compress",
    tables=averaged,
    metrics=METRICS,
    paper=PAPER,
)
TABLE_6 = Experiment(
    name="table6",
    title="Table 2 by task, with the lengths L_demo and L_x",
    finding="As in Table 2, on every task.",
    cells=(Cells("compress", {"rule": "reference"}),),
    figure="compress",
    metrics=METRICS,
)
TABLE_3 = Experiment(
    name="table3",
    title="Speed-up of inference by compression",
    finding="1.1 to 2.9 times, growing with the ratio of demonstration to input length.",
    cells=(Cells("speed", {"rule": "reference"}, examples=100),),
    seeds=(42,),
    figure="speed",
    tables=lambda rows: speed_summary(rows["speed"]),
    metrics=("speed_up",),
    paper=tuple(
        Reported(model, task, "hidden_anchor", "speed_up", value)
        for model, values in (("GPT2-XL", (1.1, 1.5, 2.5, 1.4)), ("GPT-J", (1.5, 2.2, 2.9, 1.9)))
        for task, value in zip(TASKS, values, strict=True)
    ),
)
