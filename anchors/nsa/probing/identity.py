"""Can one tell from a compressed value which label word is in it? A linear probe against the uncompressed ones."""

import warnings

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from anchors.intervals import interval
from anchors.stats import parts_by, resampling

FOLDS = 4
MOST = 1500
"""Label words that a probe is fitted on, at most."""


def identity_table(vectors: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Accuracy of telling label words apart from the vectors that stand for them, by layer and kind.

    Prompts of the fitted and the tested part differ. `shuffled` is the same with label words permuted within each
    prompt; its accuracy is what can be had without any information.

    Args:
        vectors: see `anchors.nsa.probing.probe.Probed`.

    Returns:
        layer, kind, accuracy, low, high (bootstrap over prompts), shuffled, label_words, examples. Empty where there are
        fewer than two prompts or label words.
    """
    columns = ["layer", "kind", "accuracy", "low", "high", "shuffled", "label_words", "examples"]
    tables = []
    for (layer, kind), own in parts_by(vectors, ["layer", "kind"], sort=True):
        if len(own) > MOST:
            own = own.iloc[np.linspace(0, len(own) - 1, MOST).round().astype(int)]
        x, y, prompt = np.stack(own["vector"].to_list()), own["token"].to_numpy(), own["number"].to_numpy()
        if len(np.unique(prompt)) < 2 or len(np.unique(y)) < 2:
            continue
        rng = np.random.default_rng(seed)
        shuffled = y.copy()
        for number in np.unique(prompt):
            at = np.flatnonzero(prompt == number)
            shuffled[at] = rng.permutation(y[at])
        hits = predicted(x, y, prompt) == y
        by_luck = float((predicted(x, shuffled, prompt) == shuffled).mean())
        tables.append((layer, kind, *_span(hits, prompt), by_luck, len(np.unique(y)), len(y)))
    return pd.DataFrame(tables, columns=columns)


def predicted(
    x: Float[np.ndarray, "examples width"],
    y: Int[np.ndarray, " examples"],
    prompt: Int[np.ndarray, " examples"],
) -> Int[np.ndarray, " examples"]:
    """What a logistic regression says of each example, having been fitted on other prompts."""
    found = np.zeros_like(y)
    for fit, held in GroupKFold(min(FOLDS, len(np.unique(prompt)))).split(x, y, prompt):
        if len(np.unique(y[fit])) < 2:
            found[held] = y[fit][0]
            continue
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, C=0.1))
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # a probe that stops early is a weaker probe, no error
            found[held] = probe.fit(x[fit], y[fit]).predict(x[held])
    return found


def _span(hits: np.ndarray, prompt: np.ndarray) -> tuple[float, float, float]:
    numbers = np.unique(prompt)
    right, count = (
        np.array([part[prompt == n].sum() for n in numbers]) for part in (hits, np.ones_like(prompt))
    )
    weights = resampling(pd.DataFrame({"seed": 0, "number": numbers}))
    # Vectors of one prompt are no examples of their own: as many as there are prompts were drawn.
    value, low, high = interval((weights @ right) / (weights @ count), count=len(numbers))
    return float(value), float(low), float(high)
