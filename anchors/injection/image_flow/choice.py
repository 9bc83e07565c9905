"""Two questions to the flow of merged models, asked whichever way they come out.

Does vision damage go with lost image flow in shallow layers? And does a λ that is chosen without labels of its
expert, as the largest that leaves the image flow close to what it was, come near the best one?
"""

from collections.abc import Callable, Iterator
from itertools import permutations as orders
from itertools import product
from math import factorial, prod
from typing import cast

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, rankdata

from anchors.injection.image_flow.rows import GOLD, NOBODY, OWN, MeasuredFlow
from anchors.injection.image_flow.tables import MEASURES, profiles, tables
from anchors.intervals import interval
from anchors.stats import parts_by, resampling

PERMUTATIONS = 9999
EPSILONS = np.geomspace(0.003, 30, 121)
"""Bounds on the relative change of the image flow that are tried."""
FACTORS = np.geomspace(0.02, 50, 121)
"""Factors c of the norm-ratio rule that are tried."""
KEY = ["seed", "expert"]


def all_tables(
    rows: pd.DataFrame, *, ratios: pd.DataFrame, resamples: int = 1000, **_: object
) -> dict[str, pd.DataFrame]:
    """What the rows come to by name: layers, strengths, accuracy; damage and points where vision was asked; choices and
    regret where the experts' own scenarios were, too."""
    found = tables(rows, resamples)
    own = rows.loc[rows["labels"] == OWN, "scenario"]  # only of vision
    if len(own):
        measured = MeasuredFlow(rows, ratios, own.iloc[0], [])
        found["damage"], found["points"] = damage(measured)
        chosen, regret = choices(measured)
        found |= {"choices": chosen, "regret": regret} if len(chosen) else {}
    return found


def accuracies(rows: pd.DataFrame, vision: str) -> pd.DataFrame:
    """By training, expert and strength: accuracy on vision and on the expert's own scenario; strength 0 is the VLM alone."""
    right = rows[(rows["metric"] == "accuracy") & (rows["labels"] == GOLD)]
    mean = right.groupby([*KEY, "scenario", "strength"], as_index=False)["value"].mean()
    found = []
    for seed, expert in mean[KEY].drop_duplicates().itertuples(index=False):
        if expert == NOBODY:
            continue
        own = mean[(mean["seed"] == seed) & mean["expert"].isin([expert, NOBODY])]
        for name, scenario in (("vision", vision), ("skill", expert)):
            part = own[own["scenario"] == scenario][["strength", "value"]]
            found.append(part.assign(seed=seed, expert=expert, what=name))
    long = pd.concat(found, ignore_index=True)
    wide = long.pivot(index=[*KEY, "strength"], columns="what", values="value")
    wide = wide.reindex(columns=["skill", "vision"]).reset_index()  # either may not have been measured
    return wide.rename_axis(columns=None).sort_values([*KEY, "strength"], ignore_index=True)


def _with_before(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of each expert, with those of the VLM alone as its strength 0."""
    experts = table[table["expert"] != NOBODY]
    alone = table[table["expert"] == NOBODY].drop(columns="expert")
    pairs = experts[KEY].drop_duplicates()
    return pd.concat([experts, alone.merge(pairs, on="seed")], ignore_index=True)


def losses(measured: MeasuredFlow, labels: str = GOLD) -> pd.DataFrame:
    """Relative loss of image flow, 1 − S(λ) / S(0), of every training, expert, λ > 0, measure, metric and half.

    Metric `s_ip+s_iq` adds both profiles; halves are the first and the last half of the layers that attend.
    """
    found = []
    for measure, table in profiles(measured.rows, labels, measured.vision).items():
        table = _with_before(table)
        both = (
            table.groupby([*KEY, "strength", "layer"], as_index=False)["value"]
            .sum()
            .assign(metric="s_ip+s_iq")
        )
        if table["metric"].nunique() > 1:
            table = pd.concat([table, both], ignore_index=True)
        own = sorted(table["layer"].unique())
        middle = own[len(own) // 2]
        table = table.assign(part=np.where(table["layer"] < middle, "shallow", "deep"))
        total = table.groupby([*KEY, "metric", "part", "strength"])["value"].sum().unstack("strength")
        lost = (1 - total.div(total[0.0], axis=0)).drop(columns=0.0).stack().rename("lost").reset_index()
        found.append(lost.assign(measure=measure))
    return pd.concat(found, ignore_index=True)


def damage(measured: MeasuredFlow, permutations: int = PERMUTATIONS) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Does the drop of vision accuracy go with lost image flow? By measure, metric and half of the layers.

    `rho` is Spearman's over all settings (training, expert, λ > 0); its p permutes settings freely, which is generous,
    since both grow with λ. `within` is the correlation of the ranks after the mean of each training at each λ is taken off,
    and its p permutes the whole curves of a training's experts among each other, since trainings differ by more than
    chance: does flow say more about damage than λ does? Both p are two-sided. T trainings of E experts have (E!)^T such
    orders, all of which are tried when they are no more than asked for, and `within_p` cannot be below `least_p`, one
    over the orders tried. The rows are correlated tests of one question (18 of them, where all was measured): `q` and
    `within_q` are the p of Benjamini and Yekutieli (2001), who bound the false discovery rate whatever the dependence.

    Returns:
        The correlations, and the points (columns of `losses` and `drop`).
    """
    accuracy = accuracies(measured.rows, measured.vision)
    alone = accuracy[accuracy["strength"] == 0].set_index(KEY)["vision"]
    drop = accuracy[accuracy["strength"] > 0].copy()
    drop["drop"] = alone.reindex(pd.MultiIndex.from_frame(drop[KEY])).to_numpy() - drop["vision"]
    points = losses(measured).merge(drop[[*KEY, "strength", "drop"]], on=[*KEY, "strength"])
    found = []
    for (measure, metric, part), own in parts_by(points, ["measure", "metric", "part"]):
        wide = own.pivot(index=KEY, columns="strength", values=["lost", "drop"])
        lost, dropped = wide["lost"].to_numpy(), wide["drop"].to_numpy()
        facts = {
            "measure": measure,
            "metric": metric,
            "part": part,
            "settings": lost.size,
            "curves": len(lost),
        }
        trainings = wide.index.get_level_values("seed").to_numpy()
        found.append(facts | _correlations(lost, dropped, trainings, permutations))
    table = pd.DataFrame(found)
    return table.assign(q=_corrected(table["p"]), within_q=_corrected(table["within_p"])), points


def _correlations(
    lost: np.ndarray, dropped: np.ndarray, trainings: np.ndarray, permutations: int
) -> dict[str, float]:
    """Of two [curves, strengths] arrays, and the training of each curve."""
    if np.isnan(lost).any() or np.ptp(lost) == 0 or np.ptp(dropped) == 0:
        return dict.fromkeys(("rho", "p", "within", "within_p", "least_p"), np.nan)
    rng = np.random.default_rng(0)
    a, b = (rankdata(x).reshape(x.shape) for x in (lost, dropped))
    flat = rng.permuted(np.broadcast_to(b.ravel(), (permutations, b.size)), axis=1)
    rho, free = _correlation(a, b), _correlation(a, flat.reshape(-1, *b.shape))
    left, right = (x - pd.DataFrame(x).groupby(trainings).transform("mean").to_numpy() for x in (a, b))
    order = _within(trainings, permutations, rng)
    within, curves = _correlation(left, right), _correlation(left, right[order])
    enough = len(order) > 1 and not np.isnan(within)
    return {
        "rho": float(rho), "p": _p(free, rho), "within": float(within) if enough else np.nan,
        "within_p": float(_as_large(curves, within).mean()) if enough else np.nan,
        "least_p": 1 / len(order) if enough else np.nan,
    }  # fmt: skip


def _within(trainings: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """[orders, curves] that keep every curve in its training: all, or what was found and so many random ones."""
    members = [np.flatnonzero(trainings == t) for t in np.unique(trainings)]

    def drawn() -> Iterator[list[np.ndarray]]:
        yield members
        for _ in range(most):
            yield [rng.permutation(own) for own in members]

    few = prod(factorial(len(own)) for own in members) <= most
    found = list(product(*(orders(own) for own in members)) if few else drawn())
    made = np.empty((len(found), len(trainings)), int)
    made[:, np.concatenate(members)] = [np.concatenate(parts) for parts in found]
    return made


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's over the last two axes; one for each leading entry of y."""
    x, y = (z - z.mean((-1, -2), keepdims=True) for z in (x, y))
    size = np.sqrt((x**2).sum() * (y**2).sum((-1, -2)))
    return np.where(size > 1e-9, (x * y).sum((-1, -2)) / np.maximum(size, 1e-9), np.nan)


def _p(drawn: np.ndarray, found: np.ndarray) -> float:
    return float((1 + _as_large(drawn, found).sum()) / (1 + len(drawn)))


def _as_large(drawn: np.ndarray, found: np.ndarray) -> np.ndarray:
    return np.abs(drawn) >= abs(found) - 1e-12


def _corrected(p: pd.Series) -> pd.Series:
    """For the number of tests that there are."""
    known = p.dropna()
    return pd.Series(false_discovery_control(known, method="by") if len(known) else [], known.index, float)


def distances(measured: MeasuredFlow) -> pd.DataFrame:
    """By measure, training, expert and λ: Σ_l |P_λ(l) − P_0(l)| / Σ_l P_0(l) of the profile P = S_ip + S_iq.

    The profiles are those of prompts whose answers are the VLM's own: no label is used.
    """
    found = []
    for measure, table in profiles(measured.rows, OWN, measured.vision).items():
        both = _with_before(table).groupby([*KEY, "strength", "layer"])["value"].sum().unstack("layer")
        first = both.xs(0.0, level="strength").reindex(both.index.droplevel("strength")).to_numpy()
        distance = np.abs(both.to_numpy() - first).sum(1) / first.sum(1)
        found.append(both.index.to_frame(index=False).assign(measure=measure, distance=distance))
    return pd.concat(found, ignore_index=True)


def choices(measured: MeasuredFlow) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Which λ each rule chooses, and its regret: the best utility over the grid minus that of the chosen λ.

    Utility is the mean of the skill's accuracy and vision retention (accuracy over that of the VLM alone). Rules:

        flow      the largest λ of the grid up to which the distance stays within ε (by measure)
        norms     the λ of the grid nearest to c ‖τ_v‖ / ‖τ_e‖
        fixed     the λ of the grid nearest to 0.3, to 1 (named by the one that was taken), or the one that is best for the
                  other experts

    ε, c and the best fixed λ are those with the least mean regret on all *other* experts, over all trainings: no labels
    of the expert itself are used, but those of the others are. With a single expert only the fixed rules are left. Of
    several equally good ones the middle one is taken.

    Returns:
        One row per rule, training and expert: parameter, strength, utility, regret, best; and one row per rule: mean
        regret with its bootstrap interval over trainings, and experts within them. Both are empty where no expert was
        measured on its own scenario.
    """
    accuracy = accuracies(measured.rows, measured.vision).dropna()
    alone = accuracy[accuracy["strength"] == 0].set_index(KEY)["vision"].clip(lower=1e-9)
    kept = accuracy["vision"] / alone.reindex(pd.MultiIndex.from_frame(accuracy[KEY])).to_numpy()
    utility = accuracy.assign(utility=(accuracy["skill"] + kept) / 2).pivot(
        index=KEY, columns="strength", values="utility"
    )
    utility = utility.dropna()
    if utility.empty:
        return pd.DataFrame(), pd.DataFrame()
    grid = utility.columns.to_numpy(float)
    regret = utility.max(axis=1).to_numpy()[:, None] - utility.to_numpy()
    experts = utility.index.get_level_values("expert").to_numpy()
    rules = _rules(measured, cast(pd.MultiIndex, utility.index), grid)
    found = []
    for rule, (parameters, places) in rules.items():
        costs = np.take_along_axis(regret, places, axis=1)  # units, parameters
        for row, (seed, expert) in enumerate(utility.index):
            others = experts != expert
            if len(parameters) > 1 and not others.any():
                continue
            mean = costs[others].mean(0) if len(parameters) > 1 else np.zeros(1)
            best = np.flatnonzero(mean <= mean.min() + 1e-12)
            taken = best[len(best) // 2]
            place = places[row, taken]
            found.append(
                {
                    "rule": rule, "seed": seed, "expert": expert, "parameter": parameters[taken], "strength": grid[place],
                    "utility": utility.to_numpy()[row, place], "regret": costs[row, taken],
                    "best": grid[utility.to_numpy()[row].argmax()],
                }
            )  # fmt: skip
    table = pd.DataFrame(found)
    return table, _mean_regret(table)


def _rules(
    measured: MeasuredFlow, units: pd.MultiIndex, grid: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By rule: its parameters, and [units, parameters] places of the chosen λ in the grid."""
    nearest: Callable[[np.ndarray], np.ndarray] = lambda x: np.abs(grid - x[..., None]).argmin(-1)  # noqa: E731
    rules = {}
    table = distances(measured)
    for measure in MEASURES:
        wide = table[table["measure"] == measure].pivot(index=KEY, columns="strength", values="distance")
        far = wide.reindex(index=units, columns=grid).to_numpy()
        within = far[:, :, None] <= EPSILONS
        rules[f"flow ({measure})"] = (EPSILONS, np.cumprod(within, axis=1).sum(1).clip(min=1) - 1)
    ratio = measured.ratios.set_index(KEY)["ratio"].reindex(units).to_numpy()
    rules["norm ratio"] = (FACTORS, nearest(ratio[:, None] * FACTORS))
    everywhere = np.broadcast_to(np.arange(len(grid)), (len(units), len(grid)))
    rules["best fixed"] = (grid, everywhere)
    for value in (0.3, 1.0):
        place = int(nearest(np.array(value)))
        rules[f"fixed {grid[place]:g}"] = (grid[[place]], np.full((len(units), 1), place))
    return rules


def _mean_regret(table: pd.DataFrame, resamples: int = 9999) -> pd.DataFrame:
    wide = table.pivot(index=KEY, columns="rule", values="regret")[list(dict.fromkeys(table["rule"]))]
    # Experts of one training share its base and its VLM: the training is drawn, then its experts.
    weights = resampling(wide.index.to_frame(index=False), resamples if len(wide) > 1 else 0)
    regret, low, high = interval(weights @ wide.to_numpy() / weights.sum(1, keepdims=True))
    return pd.DataFrame(
        {"rule": wide.columns, "regret": regret, "low": low, "high": high, "units": len(wide)}
    )
