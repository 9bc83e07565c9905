"""Tables of three questions that critics ask of label words: what an AUC over several orders of the demonstrations measures, whether
answers follow labels that contradict what was known before, and what more demonstrations do to the flow from label words."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from anchors.errors import AnchorsError
from anchors.intervals import interval
from anchors.stats import ENTROPY, GROUP, SUMS, parts_by, refuse_doubles, resampling, shares, within_seeds
from anchors.summaries.readout import aucroc, layers_of, scores_of

RESAMPLES = 200
"""Of an AUC over all seeds, whose pairs of prompts grow with the square of the seeds."""


def pooled_samples(rows: pd.DataFrame, resamples: int = RESAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """AUCROC_l over the prompts of all seeds at once, and the mean over seeds of that within each: [1 + resamples, layers]."""
    scores, predicted, units = scores_of(rows)
    weights = resampling(units, resamples)
    within = within_seeds(units, weights, lambda own, w: aucroc(scores[own], predicted[own], w))
    return aucroc(scores, predicted, weights), within


def pooled_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """What an AUC gains or loses by comparing prompts with other demonstrations, or the same in another order.

        gap_l = AUCROC_l over all prompts − mean over seeds of AUCROC_l within a seed

    Args:
        rows: of `Readout`, with seeds that show other demonstrations (`none`) or the same in another order (`order-only`).

    Returns:
        One row per task, shots, control, metric (`pooled`, `within`, `gap`) and layer: value, low, high, examples, seeds.
    """
    refuse_doubles(rows)
    found = []
    for key, group in parts_by(rows[rows["number"] >= 0], GROUP):
        pooled, within = pooled_samples(group)
        counts = {
            "examples": len(group[["seed", "number"]].drop_duplicates()),
            "seeds": group["seed"].nunique(),
        }
        for metric, samples in (("pooled", pooled), ("within", within), ("gap", pooled - within)):
            value, low, high = interval(samples)
            table = pd.DataFrame({"layer": layers_of(group), "value": value, "low": low, "high": high})
            found.append(table.assign(**dict(zip(GROUP, key, strict=True)), metric=metric, **counts))
    table = pd.concat(found, ignore_index=True)
    return table[[*GROUP, "metric", "layer", "value", "low", "high", "examples", "seeds"]]


def follows(rows: pd.DataFrame) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """By task, shots and control, of every prompt whether its answer is the label that the demonstrations show its class under
    (`shown`), the true one (`true`), or another one (`other`).

    Raises:
        AnchorsError: rows that do not say which label stands for which class.
    """
    for key, group in parts_by(rows, GROUP):
        moved = group[group["metric"].str.startswith("shown_as/")]
        labels = [m.split("/", 1)[1] for m in dict.fromkeys(group["metric"]) if m.startswith("probability/")]
        own = group[(group["number"] >= 0) & group["metric"].isin(["gold", "predicted"])]
        wide = own.pivot_table(index=["seed", "number"], columns="metric", values="value").astype(int)
        places = moved["metric"].str.split("/", n=1).str[1].map(labels.index)
        where = {(s, c): int(v) for s, c, v in zip(moved["seed"], places, moved["value"], strict=True)}
        if lacking := set(wide.index.get_level_values("seed")) - {seed for seed, _ in where}:
            raise AnchorsError(
                f"The rows of seed {min(lacking)} do not say which label word stands for which class.",
                "Measure again with --control permuted-labels.",
                code="rows",
            )
        shown = np.array(
            [where[seed, gold] for (seed, _), gold in zip(wide.index, wide["gold"], strict=True)]
        )
        said, true = wide["predicted"].to_numpy(), wide["gold"].to_numpy()
        yield key, pd.DataFrame({"shown": said == shown, "true": said == true, "other": (said != shown) & (said != true)},
            index=wide.index, dtype=float)  # fmt: skip


def followed(rows: pd.DataFrame) -> pd.DataFrame:
    """Shares of answers that follow permuted labels, that stay true, and that do neither.

    Args:
        rows: of `Classification` under the control `permuted-labels`.

    Returns:
        One row per task, shots, control and metric (`shown`, `true`, `other`, and `override` = shown − true): value, low, high,
        examples, seeds; condition `none`.
    """
    refuse_doubles(rows)
    found = []
    for key, own in follows(rows):
        weights = resampling(own.index.to_frame(index=False))
        samples = (
            weights
            @ own.assign(override=own["shown"] - own["true"]).to_numpy()
            / weights.sum(1, keepdims=True)
        )
        value, low, high = interval(samples, count=np.array([len(own)] * 3 + [np.nan]))
        table = pd.DataFrame({"metric": [*own.columns, "override"], "value": value, "low": low, "high": high})
        counts = {"examples": len(own), "seeds": own.index.get_level_values("seed").nunique()}
        found.append(
            table.assign(**dict(zip(GROUP, key, strict=True)), condition="none", layer=None, **counts)
        )
    table = pd.concat(found, ignore_index=True)
    return table[[*GROUP, "condition", "metric", "layer", "value", "low", "high", "examples", "seeds"]]


def flow_samples(group: pd.DataFrame, resamples: int = 1000) -> dict[str, np.ndarray]:
    """Shares of the three sums, and the mean evenness of S_pq where rows hold it, by layer: [1 + resamples, layers]."""
    wide = {
        metric: part.pivot_table(index=["seed", "number"], columns="layer", values="value", dropna=False)
        for metric, part in group[group["metric"].isin((*SUMS, ENTROPY))].groupby("metric")
    }
    weights = resampling(wide["s_wp"].index.to_frame(index=False), resamples)
    mean = weights / weights.sum(1, keepdims=True)
    parts = shares(np.stack([mean @ wide[name].to_numpy() for name in SUMS]))
    found = dict(zip(SUMS, parts, strict=True))
    if ENTROPY in wide:
        own = wide[ENTROPY].reindex(index=wide["s_wp"].index, columns=wide["s_wp"].columns).to_numpy()
        known = ~np.isnan(own)
        with np.errstate(invalid="ignore", divide="ignore"):
            found[ENTROPY] = (weights @ np.where(known, own, 0)) / (weights @ known)
    return found


def shots_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """The share of S_pq among the three sums, and how evenly label words share in it, by shots and layer.

    Args:
        rows: of `InformationFlow` with several numbers of shots.

    Returns:
        One row per task, shots, control, metric (`s_pq`, `s_pq_entropy`) and layer: value, low, high, examples, seeds.
    """
    found = []
    for key, group in parts_by(rows[rows["number"] >= 0], GROUP):
        layers = sorted({int(x) for x in group.loc[group["metric"] == "s_pq", "layer"]})
        counts = {
            "examples": len(group[["seed", "number"]].drop_duplicates()),
            "seeds": group["seed"].nunique(),
        }
        for metric, samples in flow_samples(group).items():
            if metric in ("s_pq", ENTROPY):
                value, low, high = interval(samples)
                table = pd.DataFrame({"layer": layers, "value": value, "low": low, "high": high})
                found.append(table.assign(**dict(zip(GROUP, key, strict=True)), metric=metric, **counts))
    table = pd.concat(found, ignore_index=True)
    return table[[*GROUP, "metric", "layer", "value", "low", "high", "examples", "seeds"]]
