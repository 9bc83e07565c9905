"""Intervals: never a bare mean."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import rankdata

from anchors.errors import AnchorsError
from anchors.intervals import WILSON, interval, method, paired_gap

SUMS = ("s_wp", "s_pq", "s_ww")
REST = "s_pq_rest"
"""What S_pq leaves out of the flow from the label words to the target, see `anchors.flow.metrics.left_out`."""
ENTROPY = "s_pq_entropy"
"""How evenly the label words share in S_pq, see `anchors.flow.metrics.evenness`."""
RESAMPLES = 1000
PROPORTIONS = frozenset({"accuracy", "label_loyalty", "flipped", "differs"})
"""Metrics that are 0 or 1 for each prompt, so that their mean is a proportion."""
UNDEFINED = "not defined here"


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


def baselines(rows: pd.DataFrame) -> pd.DataFrame:
    """What an accuracy has to be compared with, from rows that tell the right class of each prompt.

    Returns:
        By task, shots and control: `chance` (one over the number of label words) and `majority` (the share of the prompts'
        most frequent class, which always naming that one would get right).
    """
    told = rows[(rows["metric"] == "gold") & (rows["number"] >= 0)]
    said = rows[rows["metric"].str.startswith("probability/") & (rows["number"] >= 0)]
    classes = said.groupby(GROUP, sort=False)["metric"].nunique()
    found = []
    for key, own in told.groupby(GROUP, sort=False):
        gold = own.drop_duplicates(["seed", "number"])["value"]
        share = gold.value_counts(normalize=True).max()
        found.append((*key, 1 / classes[key] if key in classes.index else np.nan, share))
    return pd.DataFrame(found, columns=[*GROUP, "chance", "majority"])


GROUP = ["task", "shots", "control"]


def refuse_models(rows: pd.DataFrame) -> None:
    """Raises:
    AnchorsError: rows of several models.
    """
    models = sorted(set(rows["model"])) if "model" in rows else []
    if len(models) > 1:
        raise AnchorsError(
            f"The rows are of several models: {models}.", "Summarise one model at a time.", code="mixed"
        )


PLACE = (*GROUP, "seed", "number", "condition", "metric", "layer", "group", "head", "place")
"""The columns that tell one value of a study of tasks from another."""


def refuse_doubles(rows: pd.DataFrame, place: Sequence[str] = PLACE) -> None:
    """Rows must be of one model and every value there once: nothing is averaged over models or over two label sets under one
    name. Every summary calls this first.

    Args:
        rows: of one model.
        place: the columns that tell one value from another; those that the rows lack do not.

    Raises:
        AnchorsError: rows of several models, or values that are there several times.
    """
    refuse_models(rows)
    doubles = rows.duplicated([name for name in place if name in rows])
    if doubles.any():
        raise AnchorsError(
            f"{int(doubles.sum())} values stand there more than once for the same prompt, condition and metric.",
            "Summarise one run and one set of label words at a time.",
            code="mixed",
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
        rows: of `anchors.study.runner.measure`, of one run or several.
        metrics: which of them.
        baseline: condition that the others are compared with; the prompts must be the same.
        mean: also the mean over tasks, as the task `mean`; each task weighs alike, and in each resample the same
            seeds are drawn in all of them.
        missing: what to do with prompts that lack a condition (too long with more shots, say).

    Returns:
        One row per task, shots, control, condition, metric and layer: value, low, high, difference,
        difference_low, difference_high, examples, seeds; `interval` and `difference_interval` say how the bounds were made
        (`method`); beside an accuracy stand `chance` and `majority` (`baselines`). With a single example there are no
        intervals.

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
                code="rows",
            )
        wide = wide[~holes]
        units = wide.index.to_frame(index=False)
        weights = resampling(units, resamples)[: 1 if len(units) == 1 else None]
        samples = weights @ wide.to_numpy() / weights.sum(1, keepdims=True)
        facts = dict(zip(GROUP, key, strict=True))
        facts |= {"examples": len(units), "seeds": units["seed"].nunique()}
        columns = wide.columns.to_frame(index=False)
        binary = columns["metric"].isin(PROPORTIONS) & np.isin(wide.to_numpy(), (0, 1)).all(0)
        counts = np.where(binary, len(units), np.nan)
        tables.append(_estimates(columns, samples, baseline, confidence, counts).assign(**facts))
        drawn.append((facts, wide.columns, samples))
    if not tables:
        raise AnchorsError(
            f"The rows hold none of the metrics {list(metrics)}.",
            "Were they made by another verb?",
            code="rows",
        )
    if mean:
        tables += _means(drawn, baseline, confidence)
    table = pd.concat(tables, ignore_index=True)
    if "accuracy" in metrics:
        table = _beside(table, baselines(rows))
    return table[GROUP + [c for c in table.columns if c not in GROUP]]


def _beside(table: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    """Chance and majority beside every accuracy; those of a mean over tasks are the means of the tasks' own."""
    own = table.loc[table["task"] == "mean", ["shots", "control"]].drop_duplicates()
    mean = known.groupby(["shots", "control"], as_index=False, sort=False)[["chance", "majority"]].mean()
    known = pd.concat([known, own.merge(mean, on=["shots", "control"]).assign(task="mean")])
    found = table[GROUP].merge(known, how="left", on=GROUP)[["chance", "majority"]].astype(float)
    found.index = table.index
    return table.join(found.where(table["metric"] == "accuracy"))


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


def parts_by(
    table: pd.DataFrame, columns: list[str], *, sort: bool = False
) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """The values that some columns take together, each with its rows; in the order of the table unless sorted."""
    for values, part in table.groupby(columns, sort=sort):
        yield cast(tuple, values), part


def _estimates(
    table: pd.DataFrame,
    samples: np.ndarray,
    baseline: str | None,
    confidence: float,
    counts: Float[np.ndarray, " columns"] | None = None,
) -> pd.DataFrame:
    """Estimates and intervals of the columns of `samples`, which `table` names, and differences to the baseline."""
    counts = np.full(len(table), np.nan) if counts is None else counts
    value, low, high = interval(samples, confidence, counts)
    table = table.assign(value=value, low=low, high=high, interval=method(samples, counts))
    if baseline is None:
        return table
    places = {tuple(c): i for i, c in enumerate(_plain(table))}
    other = [places.get((baseline, *c[1:])) for c in _plain(table)]
    gap, how = np.full((3, len(table)), np.nan), np.full(len(table), "", dtype=object)
    compared = {i: o for i, o in enumerate(other) if o is not None and table["condition"][i] != baseline}
    found = list(compared)
    if found:
        apart = samples[:, found] - samples[:, list(compared.values())]
        gap[:, found], how[found] = interval(apart, confidence), method(apart, counts[found])
        for i in found:
            # Only a difference of −1, 0 or 1 can be the same on every prompt.
            if how[i] == WILSON:
                gap[0, i] = np.round(gap[0, i])
                gap[1:, i] = paired_gap(gap[0, i], int(counts[i]), confidence)
    return table.assign(
        difference=gap[0], difference_low=gap[1], difference_high=gap[2], difference_interval=how
    )


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
    """S_wp, S_pq and S_ww by layer, and what S_pq leaves out: means over examples with bootstrap intervals.

    The three sums of one example stay together in every resample, and seeds are drawn, then examples within them
    (`resampling`; percentile intervals). `share` is a sum's mean divided by the three means' total in that layer, as the paper plots it. That of
    `s_pq_rest` is the part that S_pq leaves out of the flow from the label words to the target: its mean divided by the
    sum of its own and that of S_pq.

    Where no prompt has any S_wp at all, as in the last layer, nothing that a label word takes in reaches the target any
    more: the sum is zero whatever the model does, and its `note` says that it is not defined here.

    Args:
        rows: tidy rows of a flow run, of one task or several.
        confidence: of the intervals.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        One row per task, shots, control, layer and metric: mean, low, high, share, share_low, share_high, examples, seeds, note.
        With a single example there are no intervals: low and high are missing. Rows that were measured before there was
        `s_pq_rest` have none.

    Raises:
        AnchorsError: rows of several models, or values that are there several times.
    """
    rows = rows[rows["metric"].isin((*SUMS, REST))]
    refuse_doubles(rows)
    tables = []
    for key, group in rows.groupby(GROUP, sort=False):
        wide = {
            metric: part.pivot_table(index=["seed", "number"], columns="layer", values="value")
            for metric, part in group.groupby("metric")
        }
        layers = wide["s_wp"].columns.to_numpy()
        names = [metric for metric in (*SUMS, REST) if metric in wide]
        data = np.stack([wide[metric].to_numpy() for metric in names], 1)  # examples, sums, layers
        units = wide["s_wp"].index.to_frame(index=False)
        weights = resampling(units, resamples, seed)[: 1 if len(units) == 1 else None]
        means = np.einsum("re,esl->srl", weights / weights.sum(1, keepdims=True), data)
        samples = np.stack([means, _parts(means)])  # mean and share, sums, resamples, layers
        found, spread = samples[:, :, 0], samples[:, :, 1:]
        low, high = np.full_like(found, np.nan), np.full_like(found, np.nan)
        if len(units) > 1:
            low, high = np.quantile(spread, [(1 - confidence) / 2, (1 + confidence) / 2], axis=2)
        dead = (data == 0).all(0)
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
                    "examples": len(units),
                    "seeds": units["seed"].nunique(),
                    "note": np.where(dead[i] & (metric == "s_wp"), UNDEFINED, ""),
                }
            )
            for i, metric in enumerate(names)
        ]
    return pd.concat(tables, ignore_index=True)


def _parts(means: np.ndarray) -> np.ndarray:
    """The shares of the three sums among themselves, and of what S_pq leaves out beside S_pq."""
    own = shares(means[: len(SUMS)])
    if len(means) == len(SUMS):
        return own
    beside = means[[SUMS.index("s_pq"), len(SUMS)]]
    total = beside.sum(0)
    left = np.where(total > 0, beside[1] / np.where(total > 0, total, 1), 0.0)
    return np.concatenate([own, left[None]])


def shares(means: np.ndarray) -> np.ndarray:
    """Each of the first axis' entries divided by their total; equal shares where all are zero."""
    total = means.sum(0, keepdims=True)
    return np.where(total > 0, means / np.where(total > 0, total, 1), 1 / len(means))
