"""Intervals: never a bare mean."""

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

SUMS = ("s_wp", "s_pq", "s_ww")


def flow_summary(
    rows: pd.DataFrame, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """S_wp, S_pq and S_ww by layer: means over examples with bootstrap intervals.

    The three sums of one example stay together in every resample (paired bootstrap over examples, percentile
    intervals). `share` is a sum's mean divided by the three means' total in that layer, as the paper plots it.

    Args:
        rows: tidy rows of a flow run, of one task or several.
        confidence: of the intervals.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        One row per task, layer and metric: mean, low, high, share, share_low, share_high, examples. With a single
        example there are no intervals: low and high are missing.
    """
    tables = []
    for task, group in rows[rows["metric"].isin(SUMS)].groupby("task", sort=False):
        wide = {
            metric: part.pivot_table(index=["seed", "number"], columns="layer", values="value")
            for metric, part in group.groupby("metric")
        }
        layers = wide["s_wp"].columns.to_numpy()
        data = np.stack([wide[metric].to_numpy() for metric in SUMS])  # sums, examples, layers
        mean = data.mean(1)
        found = np.stack([mean, shares(mean)])
        low, high = np.full_like(found, np.nan), np.full_like(found, np.nan)
        if data.shape[1] > 1:
            interval = bootstrap(
                tuple(data),
                lambda *sums, axis: np.stack([m := np.stack([s.mean(axis) for s in sums]), shares(m)]),
                paired=True,
                vectorized=True,
                axis=0,
                n_resamples=resamples,
                batch=50,
                confidence_level=confidence,
                method="percentile",
                rng=np.random.default_rng(seed),
            ).confidence_interval
            low, high = interval.low, interval.high
        tables += [
            pd.DataFrame(
                {
                    "task": task,
                    "layer": layers,
                    "metric": metric,
                    "mean": found[0, i],
                    "low": low[0, i],
                    "high": high[0, i],
                    "share": found[1, i],
                    "share_low": low[1, i],
                    "share_high": high[1, i],
                    "examples": data.shape[1],
                }
            )
            for i, metric in enumerate(SUMS)
        ]
    return pd.concat(tables, ignore_index=True)


def shares(means: np.ndarray) -> np.ndarray:
    """Each of the first axis' entries divided by their total; equal shares where all are zero."""
    total = means.sum(0, keepdims=True)
    return np.where(total > 0, means / np.where(total > 0, total, 1), 1 / len(means))
