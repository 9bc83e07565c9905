"""Predicted against actual confusion of labels (3.3) from the rows of `anchors.diagnosis`."""

import itertools

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import rankdata

from anchors.stats import GROUP, interval, mantel, refuse_doubles, resampling, within_seeds
from anchors.summaries.readout import weighted_auc


def actual_confusion(
    probabilities: Float[np.ndarray, "prompts classes"],
    gold: Int[np.ndarray, " prompts"],
    weights: Float[np.ndarray, "resamples prompts"],
) -> Float[np.ndarray, "resamples classes classes"]:
    """Confusion_ij: ROC AUC of p_i / p_j on the prompts of true class i or j; the diagonal is 1.

    Missing where a class has no prompt.
    """
    count = probabilities.shape[1]
    found = np.ones((len(weights), count, count))
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log(probabilities)
    for i, j in itertools.combinations(range(count), 2):
        pair = np.isin(gold, [i, j])
        ratio = log[pair, i] - log[pair, j]
        found[:, i, j] = found[:, j, i] = weighted_auc(ratio, gold[pair] == i, weights[:, pair])
    return found


def diagnosis_summary(
    rows: pd.DataFrame, *, confidence: float = 0.95, resamples: int = 1000
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both confusions pair by pair, and how well one predicts the other.

    Returns:
        Pairs: task, condition (number of components), one, other, predicted (mean over seeds), actual with low and
        high, examples, seeds. Agreement: task, condition, rank correlation with low and high (bootstrap of the actual
        confusion, over seeds and examples) and Mantel's one-sided permutation p-value.
    """
    pairs, agreement = [], []
    refuse_doubles(rows)
    for key, group in rows.groupby(GROUP, sort=False):
        each = group[(group["number"] >= 0) & (group["condition"] == "none")]
        wide = each.pivot_table(index=["seed", "number"], columns="metric", values="value")
        labels = [m.split("/", 1)[1] for m in dict.fromkeys(each["metric"]) if m.startswith("probability/")]
        units = wide.index.to_frame(index=False)
        weights = resampling(units, resamples)
        probabilities = wide[[f"probability/{label}" for label in labels]].to_numpy()
        gold = wide["gold"].to_numpy().astype(int)
        actual = within_seeds(
            units, weights, lambda own, w, p=probabilities, g=gold: actual_confusion(p[own], g[own], w)
        )
        # Labels that no test example has are confused with nothing.
        have = np.ix_(*[np.unique(gold)] * 2)
        mean, low, high = interval(actual, confidence)
        upper = np.triu_indices(len(labels), 1)
        said = group[group["metric"].str.startswith("predicted_confusion/")]
        facts = dict(zip(GROUP, key, strict=True)) | {
            "examples": len(units),
            "seeds": units["seed"].nunique(),
        }
        for condition, part in said.groupby("condition", sort=False):
            means = part.groupby("metric")["value"].mean()
            predicted = np.ones((len(labels), len(labels)))
            for i, j in zip(*upper, strict=True):
                predicted[i, j] = predicted[j, i] = means[f"predicted_confusion/{labels[i]}/{labels[j]}"]
                pairs.append(
                    facts
                    | {
                        "condition": condition,
                        "one": labels[i],
                        "other": labels[j],
                        "predicted": predicted[i, j],
                    }
                    | {"actual": mean[i, j], "low": low[i, j], "high": high[i, j]}
                )
            rho, p = mantel(predicted[have], mean[have])
            samples = np.array([_spearman(predicted[upper], a[upper]) for a in actual])
            _, rho_low, rho_high = interval(samples[:, None], confidence)
            agreement.append(
                facts
                | {"condition": condition, "correlation": rho, "low": rho_low[0], "high": rho_high[0], "p": p}
            )
    return pd.DataFrame(pairs), pd.DataFrame(agreement)


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    both = ~np.isnan(other)
    if both.sum() < 2 or np.ptp(one[both]) == 0 or np.ptp(other[both]) == 0:
        return np.nan
    return float(np.corrcoef(rankdata(one[both]), rankdata(other[both]))[0, 1])


def sentence(pairs: pd.DataFrame, agreement: pd.DataFrame, condition: str | None = None) -> str:
    """In plain words: which labels the model confuses most, by how much, and whether the keys foretell it."""
    condition = condition or agreement["condition"].iloc[0]
    own = pairs[pairs["condition"] == condition].dropna(subset=["actual"])
    worst, foretold = own.loc[own["actual"].idxmin()], own.loc[own["predicted"].idxmin()]
    found = agreement[agreement["condition"] == condition].iloc[0]
    same = (worst["one"], worst["other"]) == (foretold["one"], foretold["other"])
    if pd.isna(found["correlation"]):
        told = "; with so few pairs of labels there is no saying whether the keys foretell it"
    else:
        told = (
            "; the keys foretell the same pair"
            if same
            else f"; the keys foretell {foretold['one']} and {foretold['other']}"
        ) + (
            f". Over all {len(own)} pairs the rank correlation of foretold and actual confusion is "
            f"{found['correlation']:.2f} (p = {found['p']:.3f})"
        )
    return (
        f"{worst['one']} and {worst['other']} are confused most: given one text of each, the model prefers the right "
        f"label for the right text with probability {worst['actual']:.2f} [{worst['low']:.2f}, {worst['high']:.2f}] "
        f"(0.5 is guessing){told}."
    )
