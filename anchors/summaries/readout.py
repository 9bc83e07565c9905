"""AUCROC_l and R_l (2.3) from the rows of `anchors.readout`."""

import itertools
from collections.abc import Hashable

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from anchors.intervals import EQUAL, SCORE, auc_interval, interval, method
from anchors.stats import GROUP, UNDEFINED, refuse_doubles, resampling, within_seeds

ONE_LABEL = "the model predicts one label only: there is no AUC"
GROUNDLESS = f"{UNDEFINED}: Σ (AUCROC − 0.5) over all layers is not above 0"


def readout_summary(
    rows: pd.DataFrame,
    *,
    confidence: float = 0.95,
    resamples: int = 500,
) -> pd.DataFrame:
    """AUCROC_l and R_l by layer, per task and averaged over tasks, with paired bootstrap intervals.

        R_l = Σ_{i≤l} (AUCROC_i − 0.5) / Σ_{i≤N} (AUCROC_i − 0.5)

    AUCROC_l is the mean over seeds: prompts are only compared with prompts on the same demonstrations. Seeds in which
    the model predicts one label only are left out. R_l is a ratio, and defined as far as its denominator is above 0: where
    the interval of Σ_{i≤N} (AUCROC_i − 0.5) reaches down to 0, any ratio at all is in keeping with what was seen
    (Fieller 1954, J. R. Stat. Soc. B 16:175–185).

    Args:
        rows: of `Readout`, of one task or several.

    Returns:
        One row per task (and `mean`), metric (`aucroc`, `r`) and layer: value, low, high, `interval` (how the bounds were
        made, see `anchors.intervals`), examples, seeds, and a `note` that says why a value is missing.
    """
    tables: list[pd.DataFrame] = []
    curves: dict[tuple, list[tuple[list[int], np.ndarray]]] = {}
    refuse_doubles(rows)
    for key, group in rows[rows["number"] >= 0].groupby(GROUP, sort=False):
        scores, predicted, units = scores_of(group)
        weights = resampling(units, resamples)
        if len(units) == 1:
            weights = weights[:1]
        auc = within_seeds(units, weights, lambda own, w, s=scores, p=predicted: aucroc(s[own], p[own], w))
        curves.setdefault(tuple(key[1:]), []).append((layers_of(group), auc))
        tables.append(
            _curves(auc, layers_of(group), confidence, _fewest(predicted, units)).assign(
                **dict(zip(GROUP, key, strict=True)), examples=len(units), seeds=units["seed"].nunique()
            )
        )
    for (shots, control), own in curves.items():
        alike = [t for t in tables if t["shots"].iloc[0] == shots and t["control"].iloc[0] == control]
        layers = own[0][0]
        if len(own) > 1 and all(at == layers for at, _ in own):
            tables.append(
                _curves(np.mean([auc for _, auc in own], 0), layers, confidence).assign(
                    task="mean",
                    shots=shots,
                    control=control,
                    examples=sum(t["examples"].iloc[0] for t in alike),
                    seeds=alike[0]["seeds"].iloc[0],
                )
            )
    return pd.concat(tables, ignore_index=True)[
        [*GROUP, "metric", "layer", "value", "low", "high", "interval", "examples", "seeds", "note"]
    ]


def scores_of(group: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Attention by prompt, layer and class; the predicted class; the prompts."""
    attention = group[group["metric"].str.startswith("attention/")]
    labels = list(dict.fromkeys(attention["metric"]))
    wide = attention.pivot_table(index=["seed", "number"], columns=["layer", "metric"], values="value")
    layers = layers_of(group)
    scores = np.stack([wide[layer][labels].to_numpy() for layer in layers], axis=1)
    predicted = group[group["metric"] == "predicted"].set_index(["seed", "number"])["value"]
    return scores, predicted.loc[wide.index].to_numpy().astype(int), wide.index.to_frame(index=False)


def layers_of(group: pd.DataFrame) -> list[int]:
    """The layers whose attention was read."""
    return sorted({int(x) for x in group.loc[group["metric"].str.startswith("attention/"), "layer"]})


def _fewest(predicted: Int[np.ndarray, " prompts"], units: pd.DataFrame) -> tuple[int, int] | None:
    """How many prompts the two rarest of the predicted labels have, over the seeds that predict several."""
    counts: dict[Hashable, int] = {}
    for _, own in pd.Series(predicted).groupby(units["seed"].to_numpy()):
        if own.nunique() > 1:
            for label, count in own.value_counts().items():
                counts[label] = counts.get(label, 0) + count
    few = sorted(counts.values())[:2]
    return (few[0], few[1]) if len(few) == 2 else None


def aucroc(
    scores: Float[np.ndarray, "prompts layers classes"],
    predicted: Int[np.ndarray, " prompts"],
    weights: Float[np.ndarray, "resamples prompts"],
) -> Float[np.ndarray, "resamples layers"]:
    """One-versus-one ROC AUC of the scores against the model's own prediction, by layer.

    Classes never predicted are left out. Of two classes, the AUC of the second one's raw score; of more, the scores
    of a prompt are divided by their sum and the AUC is the mean over all ordered pairs (Hand and Till 2001).
    Missing where fewer than two classes are predicted.
    """
    present = np.unique(predicted)
    layers = range(scores.shape[1])
    found = np.full((len(weights), len(layers)), np.nan)
    if len(present) < 2:
        return found
    if len(present) == 2:
        second = scores[:, :, present[1]]
        positive = predicted == present[1]
        return np.stack([weighted_auc(second[:, layer], positive, weights) for layer in layers], 1)
    kept = scores[:, :, present]
    total = kept.sum(-1, keepdims=True)
    # A layer whose window hides all label words says nothing: every class alike.
    share = np.where(total > 0, kept / np.where(total > 0, total, 1), 1 / len(present))
    for layer in layers:
        pairs = []
        for i, j in itertools.permutations(range(len(present)), 2):
            pair = np.isin(predicted, present[[i, j]])
            pairs.append(weighted_auc(share[pair, layer, i], predicted[pair] == present[i], weights[:, pair]))
        stack = np.stack(pairs)
        # A resample may lack a class; its pairs are left out there.
        filled = ~np.isnan(stack)
        found[:, layer] = np.where(
            filled.any(0), np.where(filled, stack, 0).sum(0) / np.maximum(filled.sum(0), 1), np.nan
        )
    return found


def weighted_auc(
    score: Float[np.ndarray, " prompts"],
    positive: np.ndarray,
    weights: Float[np.ndarray, "resamples prompts"],
) -> Float[np.ndarray, " resamples"]:
    """P(score of a positive > score of a negative) + ½ P(equal), each prompt counted by its weight.

    Missing where there is no positive or no negative, or a score is not a number.
    """
    if np.isnan(score).any():
        return np.full(len(weights), np.nan)
    above = score[positive][:, None] - score[~positive][None]
    wins = (above > 0) + 0.5 * (above == 0)
    plus, minus = weights[:, positive], weights[:, ~positive]
    pairs = plus.sum(1) * minus.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, ((plus @ wins) * minus).sum(1) / pairs, np.nan)


def _curves(
    auc: np.ndarray, layers: list[int], confidence: float, few: tuple[int, int] | None = None
) -> pd.DataFrame:
    """AUCROC_l and R_l with their intervals; `few` are the numbers of prompts behind an AUC of 0 or 1."""
    gain = np.cumsum(auc - 0.5, axis=1)
    total, low, _ = interval(gain[:, -1:], confidence)
    founded = bool(total[0] > 0 and not low[0] <= 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.where(gain[:, -1:] == 0, np.nan, gain / gain[:, -1:])
    one_label = bool(np.isnan(auc[0]).all())
    notes = {
        "aucroc": ONE_LABEL if one_label else "",
        "r": ONE_LABEL if one_label else "" if founded else GROUNDLESS,
    }
    tables = []
    for name, samples in (("aucroc", auc), ("r", r if founded else np.full_like(r, np.nan))):
        value, low, high = interval(samples, confidence)
        how = method(samples)
        if name == "aucroc" and few is not None:
            for place in np.flatnonzero((how == EQUAL) & np.isin(value, (0, 1))):
                low[place], high[place] = auc_interval(float(value[place]), *few, confidence)
                how[place] = SCORE
        table = {"value": value, "low": low, "high": high, "interval": how, "note": notes[name]}
        tables.append(pd.DataFrame(table).assign(metric=name, layer=layers))
    return pd.concat(tables, ignore_index=True)
