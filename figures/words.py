"""Table 5 of the paper: the most probable next words of one prompt, untouched and with isolated label words."""

import pandas as pd
from matplotlib.figure import Figure

from anchors.figures.isolate import named
from anchors.figures.style import BLUE, GREY, ORANGE, plain, token


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure:
    """The first prompt: one column per condition, words by rank, beside them bars as long as their probabilities."""
    words = tables["words"]
    for column in ("task", "seed", "example"):
        if column in words:
            words = words[words[column] == words[column].iloc[0]]
    conditions = list(dict.fromkeys(words["condition"]))
    ranks = int(words["rank"].max())
    figure = Figure(figsize=(0.3 + 2.3 * len(conditions), 1.1 + 0.24 * ranks), layout="constrained")
    panels = figure.subplots(1, len(conditions), sharey=True, squeeze=False)[0]
    longest = float(words["probability"].max())
    for panel, condition in zip(panels, conditions, strict=True):
        own = words[words["condition"] == condition].sort_values("rank")
        colour = GREY if condition == "none" else ORANGE if condition.endswith("/random") else BLUE
        panel.barh(own["rank"], own["probability"] / longest, 0.7, color=colour, alpha=0.6)
        for rank, word, probability in zip(own["rank"], own["word"], own["probability"], strict=True):
            panel.text(-0.06, rank, token(word, 18), ha="right", va="center", fontsize=8)
            panel.text(1.06, rank, f"{probability:.3f}", va="center", fontsize=8)
        panel.set(xlim=(-1.3, 1.6), ylim=(ranks + 0.6, 0.4))
        panel.set_title(named(condition).replace(": ", ":\n"), fontsize=8.5)
        panel.axis("off")
    which = f"{plain(words['task'].iloc[0])}, " if "task" in words else ""
    example = f"test example {words['example'].iloc[0]}"
    figure.suptitle(f"Most probable next words in {plain(model)} ({which}{example})", fontsize=10)
    return figure
