"""Intervals: never a bare mean."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, rankdata

from anchors.errors import AnchorsError

SUMS = ("s_wp", "s_pq", "s_ww")
RESAMPLES = 1000


def resampling(units: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Weights of a paired bootstrap over seeds and examples.

    Each resample draws seeds with replacement, and then, within each drawn seed, as many of its examples with
    replacement. Everything that is computed from the same row of weights is paired. With one seed only examples
    are drawn; with few seeds the variance between them is underestimated (by (S − 1)/S for S seeds).

    Args:
        units: columns `seed` and `number`, one row per prompt.
        resamples: how many.
        seed: of the resampling.

    Returns:
        [1 + resamples, prompts]: how often each prompt counts. Row 0 counts each once and gives the estimate.
    """
    rng = np.random.default_rng(seed)
    seeds = units["seed"].to_numpy()
    members = [np.flatnonzero(seeds == s) for s in np.unique(seeds)]
    weights = np.zeros((1 + resamples, len(units)))
    weights[0] = 1
    drawn = rng.integers(len(members), size=(resamples, len(members)))
    for own in range(len(members)):
        times = (drawn == own).sum(1)
        index = members[own]
        weights[1:, index] = rng.multinomial(times * len(index), np.full(len(index), 1 / len(index)))
    return weights


def within_seeds(
    units: pd.DataFrame, weights: np.ndarray, statistic: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """The mean over seeds of a statistic that may only compare prompts with the same demonstrations.

    A rank statistic over prompts of several seeds would mostly measure the seeds: another order of the demonstrations
    shifts all scores and all predictions at once.

    Args:
        units: columns `seed` and `number`.
        weights: of `resampling`; a seed weighs as often as it was drawn.
        statistic: from the places of a seed's prompts and their weights to [resamples, ...]; missing values of a seed
            are left out.
    """
    seeds = units["seed"].to_numpy()
    total: np.ndarray | float = 0.0
    count: np.ndarray | float = 0.0
    for seed in np.unique(seeds):
        own = np.flatnonzero(seeds == seed)
        found = statistic(own, weights[:, own])
        times = (weights[:, own].sum(1) / len(own)).reshape(-1, *[1] * (found.ndim - 1))
        known = ~np.isnan(found)
        total = total + np.where(known, found, 0) * times
        count = count + known * times
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, total / count, np.nan)


def interval(samples: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The estimate (row 0) and the percentile interval of the resamples (the other rows)."""
    tail = (1 - confidence) / 2
    bounds = np.full((2, *samples.shape[1:]), np.nan)
    if len(samples) > 1:
        known = ~np.isnan(samples[1:]).all(0)
        bounds[:, known] = np.nanquantile(samples[1:, known], [tail, 1 - tail], axis=0)
    return samples[0], bounds[0], bounds[1]


GROUP = ["task", "shots", "control"]


def refuse_models(rows: pd.DataFrame) -> None:
    """Raises:
    AnchorsError: rows of several models.
    """
    models = sorted(set(rows["model"])) if "model" in rows else []
    if len(models) > 1:
        raise AnchorsError(f"The rows are of several models: {models}.", "Summarise one model at a time.")


def refuse_doubles(rows: pd.DataFrame) -> None:
    """Rows must be of one model and every value there once: nothing is averaged over models or over two label sets under one
    name. Every summary calls this first.

    Raises:
        AnchorsError: rows of several models, or values that are there several times.
    """
    refuse_models(rows)
    identity = [*GROUP, "seed", "number", "condition", "metric", "layer", "group", "head", "place"]
    doubles = rows.duplicated([name for name in identity if name in rows])
    if doubles.any():
        raise AnchorsError(
            f"{int(doubles.sum())} values stand there more than once for the same prompt, condition and metric.",
            "Summarise one run and one set of label words at a time.",
        )


def summarise(
    rows: pd.DataFrame,
    metrics: Sequence[str] = ("accuracy",),
    *,
    baseline: str | None = None,
    mean: bool = False,
    missing: Literal["error", "leave out"] = "error",
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> pd.DataFrame:
    """Means over prompts with paired bootstrap intervals, and differences to a baseline condition with theirs.

    Args:
        rows: of `anchors.runner.measure`, of one run or several.
        metrics: which of them.
        baseline: condition that the others are compared with; the prompts must be the same.
        mean: also the mean over tasks, as the task `mean`; each task weighs alike, and in each resample the same
            seeds are drawn in all of them.
        missing: what to do with prompts that lack a condition (too long with more shots, say).

    Returns:
        One row per task, shots, control, condition, metric and layer: value, low, high, difference,
        difference_low, difference_high, examples, seeds. With a single example there are no intervals.

    Raises:
        AnchorsError: rows of two models; prompts that lack a condition; no rows of these metrics.
    """
    kept = rows[rows["metric"].isin(metrics) & (rows["number"] >= 0)]
    refuse_doubles(kept)
    tables, drawn = [], []
    for key, group in kept.groupby(GROUP, sort=False):
        wide = group.pivot_table(
            index=["seed", "number"], columns=["condition", "metric", "layer"], values="value", dropna=False
        ).dropna(axis="columns", how="all")
        holes = wide.isna().any(axis=1)
        if holes.any() and (missing == "error" or holes.all()):
            raise AnchorsError(
                f"{int(holes.sum())} of {len(holes)} prompts of {key[0]} lack some of {sorted(set(group['metric']))}: "
                "they cannot be compared in pairs.",
                "Measure every condition on the same prompts.",
            )
        wide = wide[~holes]
        units = wide.index.to_frame(index=False)
        weights = resampling(units, resamples)[: 1 if len(units) == 1 else None]
        samples = weights @ wide.to_numpy() / weights.sum(1, keepdims=True)
        facts = dict(zip(GROUP, key, strict=True))
        facts |= {"examples": len(units), "seeds": units["seed"].nunique()}
        tables.append(
            _estimates(wide.columns.to_frame(index=False), samples, baseline, confidence).assign(**facts)
        )
        drawn.append((facts, wide.columns, samples))
    if not tables:
        raise AnchorsError(
            f"The rows hold none of the metrics {list(metrics)}.", "Were they made by another verb?"
        )
    if mean:
        tables += _means(drawn, baseline, confidence)
    table = pd.concat(tables, ignore_index=True)
    return table[GROUP + [c for c in table.columns if c not in GROUP]]


def _means(drawn: list[tuple], baseline: str | None, confidence: float) -> list[pd.DataFrame]:
    """The mean over tasks for each number of shots and control that several tasks have."""
    tables = []
    for shots, control in dict.fromkeys((f["shots"], f["control"]) for f, _, _ in drawn):
        own = [d for d in drawn if (d[0]["shots"], d[0]["control"]) == (shots, control)]
        if len(own) < 2 or len({samples.shape[0] for _, _, samples in own}) > 1:
            continue
        common = own[0][1]
        for _, columns, _ in own[1:]:
            common = common[common.isin(columns)]
        each = np.mean([s[:, [columns.get_loc(c) for c in common]] for _, columns, s in own], axis=0)
        facts = {"task": "mean", "shots": shots, "control": control, "seeds": own[0][0]["seeds"]}
        facts["examples"] = sum(f["examples"] for f, _, _ in own)
        tables.append(_estimates(common.to_frame(index=False), each, baseline, confidence).assign(**facts))
    return tables


def _estimates(
    table: pd.DataFrame, samples: np.ndarray, baseline: str | None, confidence: float
) -> pd.DataFrame:
    """Estimates and intervals of the columns of `samples`, which `table` names, and differences to the baseline."""
    value, low, high = interval(samples, confidence)
    table = table.assign(value=value, low=low, high=high)
    if baseline is None:
        return table
    places = {tuple(c): i for i, c in enumerate(_plain(table))}
    other = [places.get((baseline, *c[1:])) for c in _plain(table)]
    gap = np.full((3, len(table)), np.nan)
    found = [i for i, o in enumerate(other) if o is not None and table["condition"][i] != baseline]
    if found:
        gap[:, found] = interval(samples[:, found] - samples[:, [other[i] for i in found]], confidence)
    return table.assign(difference=gap[0], difference_low=gap[1], difference_high=gap[2])


def _plain(table: pd.DataFrame) -> list[tuple]:
    """Condition, metric and layer of each row, with missing layers as None."""
    return [
        (c, m, None if pd.isna(layer) else int(layer))
        for c, m, layer in zip(table["condition"], table["metric"], table["layer"], strict=True)
    ]


def mantel(
    one: np.ndarray, other: np.ndarray, permutations: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Rank correlation of two symmetric matrices over the off-diagonal pairs, and its permutation p-value.

    The labels of one matrix are permuted (Mantel's test), because its pairs are not independent: each label takes
    part in C − 1 of them. One-sided: the share of permutations with a correlation at least as large. With C labels
    there are C! of them, all of which are tried when they are fewer than asked for.
    """
    count = len(one)
    upper = np.triu_indices(count, 1)
    fixed = rankdata(other[upper])

    def correlation(order: np.ndarray) -> float:
        ranks = rankdata(one[np.ix_(order, order)][upper])
        if len(upper[0]) < 2 or np.ptp(ranks) == 0 or np.ptp(fixed) == 0:
            return np.nan
        return float(np.corrcoef(ranks, fixed)[0, 1])

    found = correlation(np.arange(count))
    if np.isnan(found):
        return found, np.nan
    if math.factorial(count) <= permutations:
        orders = [np.array(o) for o in itertools.permutations(range(count))]
        exact = 0
    else:
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(count) for _ in range(permutations)]
        exact = 1
    as_large = sum(correlation(order) >= found - 1e-12 for order in orders)
    return found, (as_large + exact) / (len(orders) + exact)


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
        One row per task, shots, control, layer and metric: mean, low, high, share, share_low, share_high, examples. With a single
        example there are no intervals: low and high are missing.

    Raises:
        AnchorsError: rows of several models, or values that are there several times.
    """
    rows = rows[rows["metric"].isin(SUMS)]
    refuse_doubles(rows)
    tables = []
    for key, group in rows.groupby(GROUP, sort=False):
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
                    **dict(zip(GROUP, key, strict=True)),
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
