"""Predicted against actual confusion of labels (3.3) from the rows of `anchors.diagnosis`."""

import itertools

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import rankdata

from anchors.intervals import EQUAL, SCORE, auc_interval, interval, method
from anchors.stats import GROUP, mantel, parts_by, refuse_doubles, resampling, within_seeds
from anchors.summaries.readout import weighted_auc

FEWEST = 10
"""Texts of a label below which the sentence on the most confused pair cautions its reader."""


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
        Pairs: task, condition (number of components), one, other, predicted (mean over seeds), actual with low, high
        and `interval` (how these were made, see `anchors.intervals`), `one_texts` and `other_texts` (different texts of
        each label, over the seeds that have both), a `note` that says why there is no actual confusion, examples, seeds.
        Agreement: task, condition, rank correlation with low and high (bootstrap of the actual confusion, over seeds and
        examples) and Mantel's one-sided permutation p-value.
    """
    pairs, agreement = [], []
    refuse_doubles(rows)
    for key, group in parts_by(rows, GROUP):
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
        how, texts = method(actual), _texts(each, len(labels))
        upper = np.triu_indices(len(labels), 1)
        for i, j in zip(*upper, strict=True):
            if how[i, j] == EQUAL and mean[i, j] in (0, 1):
                counts = int(texts[i, j]), int(texts[j, i])
                low[i, j], high[i, j] = auc_interval(float(mean[i, j]), *counts, confidence)
                how[i, j] = SCORE
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
                    | {"actual": mean[i, j], "low": low[i, j], "high": high[i, j], "interval": how[i, j]}
                    | {"one_texts": texts[i, j], "other_texts": texts[j, i]}
                    | {"note": _why_missing(float(mean[i, j]), labels, gold, int(i), int(j))}
                )
            rho, p = mantel(predicted[have], mean[have])
            samples = np.array([_spearman(predicted[upper], a[upper]) for a in actual])
            _, rho_low, rho_high = interval(samples[:, None], confidence)
            agreement.append(
                facts
                | {"condition": condition, "correlation": rho, "low": rho_low[0], "high": rho_high[0], "p": p}
            )
    return pd.DataFrame(pairs), pd.DataFrame(agreement)


def label_counts(rows: pd.DataFrame) -> pd.DataFrame:
    """How often each label is true, said and both: task, shots, control, label, texts, said, right, in prompts."""
    found = []
    for key, group in parts_by(rows[(rows["number"] >= 0) & (rows["condition"] == "none")], GROUP):
        labels = [m.split("/", 1)[1] for m in dict.fromkeys(group["metric"]) if m.startswith("probability/")]
        wide = group.pivot_table(index=["seed", "number"], columns="metric", values="value")
        gold, said = (wide[name].to_numpy().astype(int) for name in ("gold", "predicted"))
        for number, label in enumerate(labels):
            true, told = gold == number, said == number
            counts = {"texts": int(true.sum()), "said": int(told.sum()), "right": int((true & told).sum())}
            found.append(dict(zip(GROUP, key, strict=True)) | {"label": label} | counts)
    return pd.DataFrame(found)


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    both = ~np.isnan(other)
    if both.sum() < 2 or np.ptp(one[both]) == 0 or np.ptp(other[both]) == 0:
        return np.nan
    return float(np.corrcoef(rankdata(one[both]), rankdata(other[both]))[0, 1])


def _texts(each: pd.DataFrame, count: int) -> Int[np.ndarray, "classes classes"]:
    """At [i, j]: how many different texts of class i there are in the seeds that have class j, too."""
    gold = each[each["metric"] == "gold"].astype({"value": int})
    by_seed = {seed: own.groupby("value")["example"].unique() for seed, own in gold.groupby("seed")}
    found = np.zeros((count, count), int)
    for i, j in itertools.product(range(count), repeat=2):
        own = [texts[i] for texts in by_seed.values() if {i, j} <= set(texts.index)]
        found[i, j] = len(np.unique(np.concatenate(own))) if own else 0
    return found


def _why_missing(actual: float, labels: list[str], gold: np.ndarray, i: int, j: int) -> str:
    if not np.isnan(actual):
        return ""
    none = " or ".join(labels[k] for k in (i, j) if k not in gold)
    return f"no text is {none}" if none else "no seed has texts of both"


def sentence(pairs: pd.DataFrame, agreement: pd.DataFrame, condition: str | None = None) -> str:
    """In plain words: which labels the model confuses most, by how much, from how many texts, and whether the keys
    foretell it. Fewer than `FEWEST` texts of a label are a caution."""
    condition = condition or agreement["condition"].iloc[0]
    own = pairs[pairs["condition"] == condition].dropna(subset=["actual"])
    if not len(own):
        return "No two labels have texts on the same demonstrations, so that nothing is known of their confusion."
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
    between = "" if pd.isna(worst["low"]) else f" [{worst['low']:.2f}, {worst['high']:.2f}]"
    texts = {worst["one"]: int(worst["one_texts"]), worst["other"]: int(worst["other_texts"])}
    counted = " and ".join(f"{count} of {label}" for label, count in texts.items())
    few = [label for label, count in texts.items() if count < FEWEST]
    caution = (
        f" Caution: with fewer than {FEWEST} texts of {' and of '.join(few)}, one text more could make another pair the "
        "most confused."
        if few
        else ""
    )
    return (
        f"{worst['one']} and {worst['other']} are confused most: given one text of each, the model prefers the right "
        f"label for the right text with probability {worst['actual']:.2f}{between} (0.5 is guessing; texts: {counted}){told}."
        f"{caution}"
    )
