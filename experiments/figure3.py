"""Figures 3 and 7: the shares of S_wp, S_pq and S_ww by layer, one demonstration per class.

    uv run python -m anchors.experiments.figure3 DATASETS

DATASETS is a directory with `sst2`, `trec` and `agnews`, each with a train and a test file (see `anchors flow --help`).
Writes rows, figure and pages under `results/figure3`, and prints for each task whether the paper's pattern is there.
"""

import sys
from pathlib import Path

import pandas as pd

GRID = {"tasks": ("sst2", "trec", "agnews"), "shots": 1, "seeds": (42,), "examples": 100}
OUT = Path("results/figure3")


def pattern(summary: pd.DataFrame) -> pd.DataFrame:
    """The paper's finding in numbers, by task.

    Returns:
        Per task: the mean share of each sum over the first and the last third of the layers, and the first layer
        from which S_pq stays the largest of the three up to the end (missing when it never does).
    """
    found = []
    for task, part in summary.groupby("task", sort=False):
        share = part.pivot_table(index="layer", columns="metric", values="share").sort_index()
        third = len(share) // 3
        led = share["s_pq"] > share[["s_wp", "s_ww"]].max(axis=1)
        tail = led[::-1].cumprod()[::-1].astype(bool)
        found.append(
            {"task": task, "s_pq_leads_from": int(tail.idxmax()) if tail.any() else None}
            | {f"{name}_first_third": share[name].head(third).mean() for name in share}
            | {f"{name}_last_third": share[name].tail(third).mean() for name in share}
        )
    return pd.DataFrame(found)


def accuracy(rows: pd.DataFrame) -> pd.Series:
    """Share of prompts whose most probable label word is the right one, by task."""
    wide = rows[rows["metric"].isin(["gold", "predicted"])].pivot_table(
        index=["task", "seed", "number"], columns="metric", values="value"
    )
    return (wide["gold"] == wide["predicted"]).groupby("task").mean().rename("accuracy")


def main() -> None:
    from anchors.flow.report import report
    from anchors.models import load
    from anchors.results import read_table
    from anchors.tasks.data import read
    from anchors.tasks.task import TASKS

    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    tasks = [TASKS[name] for name in GRID["tasks"]]
    sets = [read(task, sys.argv[1]) for task in tasks]
    result = report(
        load(), tasks, sets, out=OUT, shots=GRID["shots"], seeds=GRID["seeds"], examples=GRID["examples"]
    )
    rows, _ = read_table(OUT / "flow.parquet")
    print(pattern(result.summary).merge(accuracy(rows), on="task").round(2).T.to_string(header=False))


if __name__ == "__main__":
    main()
