"""Intervals that know how few examples they rest on.

A percentile bootstrap draws from what was seen. Where nothing differed, 3 right answers out of 3, no resample differs either
and the interval would have no width, as if they were 3000. There a proportion gets Wilson's interval, a ROC AUC of 0 or 1
its like, a difference of proportions a bound from Wilson's, and any other number none.
"""

import math
import warnings

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm

BOOTSTRAP, WILSON, SCORE, EQUAL = "bootstrap", "Wilson", "score", "equal values"
"""How an interval was made. `equal values`: there is none, since nothing varied and nothing is known of what could."""
EQUAL_TO = 1e-12
"""Relative: numbers closer than this are the same number, rounded."""


def interval(
    samples: np.ndarray, confidence: float = 0.95, count: np.ndarray | float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The estimate (row 0) and the interval that the resamples (the other rows) give.

    Percentiles of the resamples. Where these are all the same number, as those of 3 right answers out of 3 are, a
    bootstrap knows nothing of how few they were: a proportion gets Wilson's interval instead, anything else none.

    Args:
        samples: [1 + resamples, ...].
        confidence: of the interval.
        count: of the 0s and 1s that each estimate is the mean of; missing or None for what is no proportion.

    Returns:
        Estimate, lower and upper bound; bounds are missing without resamples, and where there is no interval.
    """
    tail = (1 - confidence) / 2
    bounds = np.full((2, *samples.shape[1:]), np.nan)
    if len(samples) > 1:
        known = ~np.isnan(samples[1:]).all(0)
        bounds[:, known] = np.nanquantile(samples[1:, known], [tail, 1 - tail], axis=0)
        same = settled(samples)
        bounds[:, same] = np.nan
        if count is not None:
            counts = np.broadcast_to(count, same.shape)
            for place in map(tuple, np.argwhere(same & (counts > 0))):
                bounds[(slice(None), *place)] = wilson(samples[(0, *place)], int(counts[place]), confidence)
    return np.asarray(samples[0]), np.asarray(bounds[0]), np.asarray(bounds[1])


def settled(samples: np.ndarray) -> np.ndarray:
    """Which estimates no resample differs from."""
    if len(samples) < 2:
        return np.zeros(samples.shape[1:], bool)
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # columns without any number
        gap = np.nanmax(samples, 0) - np.nanmin(samples, 0)
        return np.asarray(gap <= EQUAL_TO * np.nanmax(np.abs(samples), 0))


def method(samples: np.ndarray, count: np.ndarray | float | None = None) -> np.ndarray:
    """How `interval` makes its bounds, by estimate: a name, or nothing where there is no estimate or only one example."""
    same = settled(samples)
    counts = np.broadcast_to(np.nan if count is None else count, same.shape)
    found = np.where(same, np.where(counts > 0, WILSON, EQUAL), BOOTSTRAP)
    return np.where(np.isnan(samples[0]) | (len(samples) < 2), "", found)


def widened(
    value: float, low: float, high: float, tests: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Bounds of one of several intervals all of which are to hold at once (Bonferroni), from those of it alone.

        value − (value − low) z_m / z_1,   value + (high − value) z_m / z_1,   z_m = Φ⁻¹(1 − (1 − confidence) / 2m)

    Each side is stretched as a normal one would be: resamples alone do not reach so far out.

    Args:
        value, low, high: of the interval alone.
        tests: m, how many there are.
        confidence: of it alone, and of all together.
    """
    tail = (1 - confidence) / 2
    stretch = norm.ppf(1 - tail / tests) / norm.ppf(1 - tail)
    return float(value - (value - low) * stretch), float(value + (high - value) * stretch)


def estimate(
    value: float | None, low: float | None, high: float | None, *, signed: bool = False, digits: int = 2
) -> str:
    """`.61 [.57, .66]`, as papers print shares; empty where there is no value, alone where there is no interval."""
    if value is None or value != value:
        return ""

    def short(x: float) -> str:
        text = f"{x:{'+' if signed else ''}.{digits}f}"
        return text.replace("0.", ".", 1) if abs(x) < 1 and text.lstrip("+-").startswith("0.") else text

    return (
        short(value)
        if low is None or high is None or low != low
        else f"{short(value)} [{short(low)}, {short(high)}]"
    )


def wilson(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22:209–212)."""
    found = binomtest(round(float(share) * count), count).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def paired_gap(gap: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """An interval of the difference of two proportions on the same prompts, on all of which it was the same.

    Wilson's upper bound u of a share of 0 out of n bounds the share of prompts with another difference, each of which is
    from −1 to 1. Around 0 the difference of the proportions is then from −u to u, and around ±1 no farther than 2u away.
    """
    most = wilson(0.0, count, confidence)[1] * (1 + abs(gap))
    return max(-1.0, gap - most), min(1.0, gap + most)


def auc_interval(auc: float, positive: int, negative: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a ROC AUC θ: where |θ − AUC| = z √V(θ).

        V(θ) = θ(1 − θ) [1 + (m − 1)(1 − θ)/(2 − θ) + (n − 1) θ/(1 + θ)] / (m n)

    Hanley and McNeil's variance (1982, Radiology 143:29–36) taken at the bound, not at the estimate, as Wilson's interval
    does (Newcombe 2006, Stat. Med. 25:559–573): two classes that are wholly apart have an interval that knows how few
    they are.

    Args:
        auc: of the samples.
        positive, negative: m and n, the numbers of examples of both classes.
    """
    z = norm.ppf((1 + confidence) / 2)

    def excess(theta: float) -> float:
        shared = (positive - 1) * (1 - theta) / (2 - theta) + (negative - 1) * theta / (1 + theta)
        spread = theta * (1 - theta) * (1 + shared) / (positive * negative)
        return abs(theta - auc) - z * math.sqrt(max(spread, 0.0))

    # At an AUC of 0 or 1 the equation holds there, too: the other root is meant.
    near = 1e-9
    low = brentq(excess, 0.0, auc - near) if auc > near else 0.0
    high = brentq(excess, auc + near, 1.0) if auc < 1 - near else 1.0
    return low, high
