"""What the rows of each analysis come to, with intervals. Nothing here imports torch: tables and figures need rows alone."""

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from anchors.stats import GROUP, flow_summary, interval, mantel, resampling, summarise

LOYALTIES = ("accuracy", "label_loyalty", "word_loyalty")


def classification_summary(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Accuracy and loss by condition, per-class scores, and the confusion matrix in counts.

    `classes`: precision, recall and F1 of every label with intervals. `confusion`: task, condition, gold, predicted,
    prompts.
    """
    classes, confusion = [], []
    for key, group in rows[rows["number"] >= 0].groupby([*GROUP, "condition"], sort=False):
        facts = dict(zip([*GROUP, "condition"], key, strict=True))
        labels = [m.split("/", 1)[1] for m in dict.fromkeys(group["metric"]) if m.startswith("probability/")]
        wide = group.pivot_table(index=["seed", "number"], columns="metric", values="value")
        gold, predicted = (wide[name].to_numpy().astype(int) for name in ("gold", "predicted"))
        weights = resampling(wide.index.to_frame(index=False))
        true_one_hot, said_one_hot = (np.eye(len(labels))[own] for own in (gold, predicted))
        hit = weights @ (true_one_hot * said_one_hot)
        true, said = weights @ true_one_hot, weights @ said_one_hot
        with np.errstate(invalid="ignore", divide="ignore"):
            scores = {"precision": hit / said, "recall": hit / true, "f1": 2 * hit / (said + true)}
        for name, samples in scores.items():
            for label, value, low, high in zip(labels, *interval(samples), strict=True):
                classes.append(
                    facts | {"label": label, "metric": name, "value": value, "low": low, "high": high}
                )
        confusion += [
            facts
            | {
                "gold": labels[i],
                "predicted": labels[j],
                "prompts": int(((gold == i) & (predicted == j)).sum()),
            }
            for i, j in itertools.product(range(len(labels)), repeat=2)
        ]
    return {
        "summary": summarise(rows, ("accuracy", "loss"), baseline="none"),
        "classes": pd.DataFrame(classes),
        "confusion": pd.DataFrame(confusion),
    }


def compression_summary(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Loyalties and accuracy by method; `hidden_random` is the mean over draws, `hidden_random_top` the best one.

    `sizes`: L_demo, L_x, kept tokens and saved bytes, by task and method, means over seeds.
    """
    draws = rows["condition"].str.startswith("hidden_random/")
    parts = [rows[~draws]]
    if draws.any():
        own = rows[draws & rows["metric"].isin([*LOYALTIES, "loss"])]
        names = [*GROUP, "model", "seed", "number", "example", "metric"]
        mean = own.groupby(names, as_index=False, sort=False)["value"].mean()
        # One draw per seed, as the draws of different seeds have nothing to do with each other.
        loyal = own[own["metric"] == "label_loyalty"].groupby([*GROUP, "seed", "condition"])["value"].mean()
        best = loyal.groupby([*GROUP, "seed"]).idxmax()
        top = own[pd.MultiIndex.from_frame(own[[*GROUP, "seed", "condition"]]).isin(list(best))]
        parts += [mean.assign(condition="hidden_random"), top.assign(condition="hidden_random_top")]
    every = pd.concat(parts, ignore_index=True)
    seed_level = rows[(rows["number"] < 0) & (rows["metric"] != "prompts")]
    sizes = seed_level.groupby([*GROUP, "condition", "metric"], as_index=False)["value"].mean()
    return {"summary": summarise(every, LOYALTIES, baseline="none"), "sizes": sizes}


def speed_summary(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Speed-up of compressed over vanilla in-context learning, beside the limit set by the number of tokens.

    limit = (L_demo + L_x) / (L_x + anchors)
    """
    found = []
    for key, group in rows.groupby(GROUP, sort=False):
        timed = group[group["metric"] == "seconds"]
        wide = timed.pivot_table(index=["seed", "number"], columns="condition", values="value")
        weights = resampling(wide.index.to_frame(index=False))
        total = weights @ wide.to_numpy()
        vanilla = total[:, list(wide.columns).index("none")]
        tokens = group[group["number"] < 0].groupby("metric")["value"].mean()
        for condition in wide.columns.drop("none"):
            samples = vanilla / total[:, list(wide.columns).index(condition)]
            value, low, high = interval(samples[:, None])
            demo, own, kept = (tokens[n] for n in ("demonstration_tokens", "input_tokens", "kept_tokens"))
            found.append(
                dict(zip(GROUP, key, strict=True))
                | {"condition": condition, "metric": "speed_up", "layer": None}
                | {"value": value[0], "low": low[0], "high": high[0], "limit": (demo + own) / (own + kept)}
                | {"demonstration_tokens": demo, "input_tokens": own, "kept_tokens": kept}
                | {"seconds": timed[timed["condition"] == condition]["value"].mean()}
                | {"examples": len(wide), "seeds": wide.index.get_level_values("seed").nunique()}
            )
    return {"summary": pd.DataFrame(found)}


def reweighting_summary(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Accuracy and loss with and without β, and β itself: mean over seeds by layer, head and label word."""
    beta = rows[rows["metric"].str.startswith("beta/")]
    parts = beta["metric"].str.split("/", expand=True)
    table = (
        beta.assign(label=parts[1], head=parts[2].astype(int)) if len(beta) else beta.assign(label="", head=0)
    )
    means = table.groupby([*GROUP, "label", "layer", "head"], as_index=False, sort=False)["value"].mean()
    return {"summary": summarise(rows, ("accuracy", "loss"), baseline="none"), "beta": means}


def readout_summary(
    rows: pd.DataFrame,
    labels: dict[str, Sequence[str]] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 500,
) -> pd.DataFrame:
    """AUCROC_l and R_l by layer, per task and averaged over tasks, with paired bootstrap intervals.

        R_l = Σ_{i≤l} (AUCROC_i − 0.5) / Σ_{i≤N} (AUCROC_i − 0.5)

    Args:
        rows: of `Readout`, of one task or several.

    Returns:
        One row per task (and `mean`), metric (`aucroc`, `r`) and layer: value, low, high, examples, seeds.
    """
    tables, curves = [], []
    for key, group in rows[rows["number"] >= 0].groupby(GROUP, sort=False):
        scores, predicted, units = _scores(group)
        weights = resampling(units, resamples)
        if len(units) == 1:
            weights = weights[:1]
        auc = aucroc(scores, predicted, weights)
        curves.append(auc)
        tables.append(
            _curves(auc, confidence).assign(
                **dict(zip(GROUP, key, strict=True)), examples=len(units), seeds=units["seed"].nunique()
            )
        )
    if len(curves) > 1 and len({c.shape for c in curves}) == 1:
        total = sum(t["examples"].iloc[0] for t in tables)
        tables.append(
            _curves(np.mean(curves, 0), confidence).assign(
                task="mean",
                shots=tables[0]["shots"].iloc[0],
                control=tables[0]["control"].iloc[0],
                examples=total,
                seeds=tables[0]["seeds"].iloc[0],
            )
        )
    return pd.concat(tables, ignore_index=True)[
        [*GROUP, "metric", "layer", "value", "low", "high", "examples", "seeds"]
    ]


def _scores(group: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Attention by prompt, layer and class; the predicted class; the prompts."""
    attention = group[group["metric"].str.startswith("attention/")]
    labels = list(dict.fromkeys(attention["metric"]))
    wide = attention.pivot_table(index=["seed", "number"], columns=["layer", "metric"], values="value")
    layers = sorted(set(attention["layer"]))
    scores = np.stack([wide[layer][labels].to_numpy() for layer in layers], axis=1)
    predicted = group[group["metric"] == "predicted"].set_index(["seed", "number"])["value"]
    return scores, predicted.loc[wide.index].to_numpy().astype(int), wide.index.to_frame(index=False)


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
    share = kept / kept.sum(-1, keepdims=True)
    for layer in layers:
        pairs = []
        for i, j in itertools.permutations(range(len(present)), 2):
            pair = np.isin(predicted, present[[i, j]])
            pairs.append(weighted_auc(share[pair, layer, i], predicted[pair] == present[i], weights[:, pair]))
        stack = np.stack(pairs)
        # A resample may lack a class; its pairs are left out there.
        filled = ~np.isnan(stack)
        found[:, layer] = np.where(filled, stack, 0).sum(0) / np.maximum(filled.sum(0), 1)
    return found


def weighted_auc(
    score: Float[np.ndarray, " prompts"],
    positive: np.ndarray,
    weights: Float[np.ndarray, "resamples prompts"],
) -> Float[np.ndarray, " resamples"]:
    """P(score of a positive > score of a negative) + ½ P(equal), each prompt counted by its weight."""
    above = score[positive][:, None] - score[~positive][None]
    wins = (above > 0) + 0.5 * (above == 0)
    plus, minus = weights[:, positive], weights[:, ~positive]
    pairs = plus.sum(1) * minus.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, ((plus @ wins) * minus).sum(1) / pairs, np.nan)


def _curves(auc: np.ndarray, confidence: float) -> pd.DataFrame:
    gain = np.cumsum(auc - 0.5, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = gain / gain[:, -1:]
    return pd.concat(
        [
            pd.DataFrame(
                dict(zip(("value", "low", "high"), interval(samples, confidence), strict=True))
            ).assign(metric=name, layer=np.arange(auc.shape[1]))
            for name, samples in (("aucroc", auc), ("r", r))
        ],
        ignore_index=True,
    )


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
    for key, group in rows.groupby(GROUP, sort=False):
        each = group[(group["number"] >= 0) & (group["condition"] == "none")]
        wide = each.pivot_table(index=["seed", "number"], columns="metric", values="value")
        labels = [m.split("/", 1)[1] for m in dict.fromkeys(each["metric"]) if m.startswith("probability/")]
        units = wide.index.to_frame(index=False)
        weights = resampling(units, resamples)
        probabilities = wide[[f"probability/{label}" for label in labels]].to_numpy()
        actual = actual_confusion(probabilities, wide["gold"].to_numpy().astype(int), weights)
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
            rho, p = mantel(predicted, mean)
            samples = np.array([_spearman(predicted[upper], a[upper]) for a in actual])
            _, rho_low, rho_high = interval(samples[:, None], confidence)
            agreement.append(
                facts
                | {"condition": condition, "correlation": rho, "low": rho_low[0], "high": rho_high[0], "p": p}
            )
    return pd.DataFrame(pairs), pd.DataFrame(agreement)


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    both = ~np.isnan(other)
    if both.sum() < 2:
        return np.nan
    return float(pd.Series(one[both]).corr(pd.Series(other[both]), method="spearman"))


def sentence(pairs: pd.DataFrame, agreement: pd.DataFrame, condition: str) -> str:
    """In plain words: which labels the model confuses most, by how much, and whether the keys foretell it."""
    own = pairs[pairs["condition"] == condition].dropna(subset=["actual"])
    worst, foretold = own.loc[own["actual"].idxmin()], own.loc[own["predicted"].idxmin()]
    found = agreement[agreement["condition"] == condition].iloc[0]
    same = (worst["one"], worst["other"]) == (foretold["one"], foretold["other"])
    keys = (
        "the keys foretell the same pair"
        if same
        else f"the keys foretell {foretold['one']} and {foretold['other']}"
    )
    return (
        f"{worst['one']} and {worst['other']} are confused most: given one text of each, the model prefers the right "
        f"label for the right text with probability {worst['actual']:.2f} [{worst['low']:.2f}, {worst['high']:.2f}] "
        f"(0.5 is guessing); {keys}. Over all {len(own)} pairs the rank correlation of foretold and actual confusion is "
        f"{found['correlation']:.2f} (p = {found['p']:.3f})."
    )


def _pair(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    pairs, agreement = diagnosis_summary(rows)
    return {"summary": agreement, "pairs": pairs}


SUMMARIES: dict[str, Callable[[pd.DataFrame], dict[str, pd.DataFrame]]] = {
    "flow": lambda rows: {"summary": flow_summary(rows)},
    "classify": classification_summary,
    "isolate": lambda rows: {"summary": summarise(rows, LOYALTIES, baseline="none")},
    "readout": lambda rows: {"summary": readout_summary(rows)},
    "reweight": reweighting_summary,
    "compress": compression_summary,
    "speed": speed_summary,
    "diagnose": _pair,
}
"""By kind of analysis: from its rows to tables; the first is always `summary`."""
