"""What fewer bits of the weights change: the flow and the accuracy beside those of the model that they were made of, in pairs.

uv run python -m anchors.experiments.quantisation experiments/results/quantisation
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from anchors.intervals import estimate, interval
from anchors.stats import parts_by, resampling
from anchors.study.results import read_table, write_atomic
from anchors.summaries.critiques import flow_samples

REFERENCE = "reference"
NUMBERS = {
    "S_wp, first third": ("s_wp", "first"),
    "S_ww, first third": ("s_ww", "first"),
    "S_pq, last third": ("s_pq", "last"),
}


def numbers(flow: pd.DataFrame, classify: pd.DataFrame) -> Iterator[tuple[str, str, np.ndarray]]:
    """By task and name, a number and its resamples: shares of the flow in a third of the layers, and the accuracy."""
    for (task,), group in parts_by(flow[flow["number"] >= 0], ["task"]):
        shares = flow_samples(group)
        third = shares["s_pq"].shape[1] // 3
        for name, (metric, side) in NUMBERS.items():
            yield (
                str(task),
                name,
                shares[metric][:, : third if side == "first" else None][
                    :, 0 if side == "first" else -third :
                ].mean(1),
            )
    own = classify[(classify["number"] >= 0) & (classify["metric"] == "accuracy")]
    for (task,), group in parts_by(own, ["task"]):
        wide = group.set_index(["seed", "number"])["value"].sort_index()
        weights = resampling(wide.index.to_frame(index=False))
        yield str(task), "accuracy", weights @ wide.to_numpy() / weights.sum(1)


def compared(root: Path) -> pd.DataFrame:
    """Every number under the reference, and how far each quantised model is from it on the same prompts.

    Returns:
        One row per task (`mean` among them), number and folder: value, difference, low, high; of the reference no difference.
    """
    made = {}
    for folder in sorted(root.glob("*/"), key=lambda path: path.name != REFERENCE):
        rows = [read_table(folder / f"{kind}.parquet")[0] for kind in ("flow", "classify")]
        made[folder.name] = {(task, name): samples for task, name, samples in numbers(*rows)}
        names = list(dict.fromkeys(name for _, name in made[folder.name]))
        for name in names:
            own = [s for (_, n), s in made[folder.name].items() if n == name]
            made[folder.name]["mean", name] = np.mean(own, 0)
    found = []
    for kind, own in made.items():
        for key, samples in own.items():
            gap = samples - made[REFERENCE][key]
            difference, low, high = (float(x[0]) for x in interval(gap[:, None]))
            told = {"task": key[0], "number": key[1], "weights": kind, "value": samples[0]}
            found.append(
                told | ({} if kind == REFERENCE else {"difference": difference, "low": low, "high": high})
            )
    return pd.DataFrame(found)


def table(found: pd.DataFrame) -> str:
    """The mean over tasks as Markdown."""
    mean = found[found["task"] == "mean"]
    kinds = list(dict.fromkeys(mean["weights"]))
    lines = ["| mean of tasks | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    for name, own in mean.groupby("number", sort=False):
        rows = own.set_index("weights")
        cells = [estimate(rows.loc[REFERENCE, "value"], None, None, digits=3)] + [
            estimate(*rows.loc[kind, ["difference", "low", "high"]], signed=True, digits=3)
            for kind in kinds[1:]
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", type=Path, help="a folder for each kind of weights, `reference` among them"
    )
    asked = parser.parse_args()
    found = compared(asked.results)
    write_atomic(
        asked.results / "changes.csv", lambda draft: found.to_csv(draft, index=False, float_format="%.5f")
    )
    print(table(found))


if __name__ == "__main__":
    main()
