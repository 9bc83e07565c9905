"""Tables of flow over layers and λ, with paired bootstrap intervals over trainings and prompts.

Three measures of the same flow, because the first has a confound: ∂L/∂A shrinks with 1 − p, so that a VLM that is sure of
its answer has next to no flow of L, and one that an injection has spoilt has much more, wherever it comes from.

    loss    the sums of L = −log p as they are (the paper's)
    odds    the sums of the log-odds log p / (1 − p): each prompt's sums divided by its 1 − p
    share   the part of the log-odds' flow into label words, or into the target, that comes from a source
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from anchors.injection.image_flow.rows import GOLD, INTO_LABELS, INTO_TARGET, NOBODY, SUMS
from anchors.intervals import interval
from anchors.stats import parts_by, refuse_doubles, resampling

MEASURES = ("loss", "odds", "share")
PARTS = ("all", "shallow", "deep")
SETTING = ["scenario", "labels", "expert", "strength"]
PLACE = (*SETTING, "seed", "number", "metric", "layer")
"""The columns that tell one value from another."""


def tables(rows: pd.DataFrame, resamples: int = 1000) -> dict[str, pd.DataFrame]:
    """Summaries of `anchors.injection.image_flow.report.measure`'s rows.

    Returns:
        `layers`: by setting, measure, metric and layer value, low, high.
        `strengths`: the same by setting, measure, metric and part of the layers (all, shallow, deep: the sum, for shares
            the mean over them), and `change`, change_low, change_high: the value over that before injection, minus 1.
        `accuracy`: by scenario, expert and strength.

    Raises:
        AnchorsError: rows of several models, or values that are there several times (of two runs, say).
    """
    refuse_doubles(rows, PLACE)
    flows, sums, changes = [], [], {}
    for setting, part in _settings(rows):
        data = _Flow.of(part, resamples)
        before = changes.setdefault(setting[:2], data) if setting[2] == NOBODY else changes[setting[:2]]
        facts = dict(zip(SETTING, setting, strict=True)) | {"examples": len(data.units)}
        for measure in MEASURES:
            own, first = data.of_measure(measure), before.of_measure(measure)
            if not own:
                continue
            metrics = np.array(list(own))
            values = np.stack(list(own.values()), axis=1)  # resamples, metrics, layers
            origin = np.stack([first[m] for m in metrics], axis=1)
            named = facts | {"measure": measure}
            flows.append(_long(named, metrics, "layer", data.layers, _three(values, "value", "low", "high")))
            halves, origin = (
                np.stack([_half(x, p, measure) for p in PARTS], axis=-1) for x in (values, origin)
            )
            with np.errstate(invalid="ignore", divide="ignore"):
                gaps = np.where(origin > 0, halves / origin - 1, np.nan)
            numbers = _three(halves, "value", "low", "high")
            numbers |= _three(gaps, "change", "change_low", "change_high")
            sums.append(_long(named, metrics, "part", PARTS, numbers))
    accuracy = []
    right = rows[(rows["metric"] == "accuracy") & (rows["labels"] == GOLD)]
    for setting, part in _settings(right):
        units = part[["seed", "number"]].reset_index(drop=True)
        weights = resampling(units, resamples)
        samples = weights @ part["value"].to_numpy() / weights.sum(1)
        facts = dict(zip(SETTING, setting, strict=True)) | {"examples": len(units)}
        spans = zip(("value", "low", "high"), interval(samples, count=len(units)), strict=True)
        accuracy.append(facts | {name: float(x) for name, x in spans})
    return {
        "layers": pd.concat(flows, ignore_index=True),
        "strengths": pd.concat(sums, ignore_index=True),
        "accuracy": pd.DataFrame(accuracy),
    }


def _three(samples: np.ndarray, *names: str) -> dict[str, np.ndarray]:
    """Estimate and bounds; the first axis is the resamples."""
    shape = samples.shape[1:]
    return {
        n: x.reshape(shape) for n, x in zip(names, interval(samples.reshape(len(samples), -1)), strict=True)
    }


def _long(
    facts: dict[str, object], metrics: np.ndarray, name: str, values: Sequence, numbers: dict[str, np.ndarray]
) -> pd.DataFrame:
    """[metrics, values] arrays as one row each."""
    named = {"metric": np.repeat(metrics, len(values)), name: np.tile(np.array(values), len(metrics))}
    return pd.DataFrame({**named, **{n: x.ravel() for n, x in numbers.items()}}).assign(**facts)


def _settings(rows: pd.DataFrame) -> Iterator[tuple[tuple, pd.DataFrame]]:
    """Each setting with its rows, what was before injection first."""
    groups = dict(parts_by(rows, SETTING))
    for setting in sorted(groups, key=lambda s: (s[2] != NOBODY, *s)):
        yield setting, groups[setting]


class _Flow:
    """Resampled flow of one setting."""

    def __init__(
        self,
        units: pd.DataFrame,
        weights: np.ndarray,
        sums: dict[str, np.ndarray],
        surprise: np.ndarray,
        layers: list[int],
    ):
        self.units, self.weights, self.sums, self.surprise, self.layers = (
            units,
            weights,
            sums,
            surprise,
            layers,
        )
        self._known: dict[str, dict[str, np.ndarray]] = {}

    @classmethod
    def of(cls, part: pd.DataFrame, resamples: int) -> "_Flow":
        wide = part[part["layer"] >= 0].pivot(
            index=["seed", "number"], columns=["metric", "layer"], values="value"
        )
        one = part[part["metric"] == "surprise"].set_index(["seed", "number"])["value"].reindex(wide.index)
        units = wide.index.to_frame(index=False)
        sums = {m: wide[m].sort_index(axis=1).to_numpy() for m in wide.columns.unique(0)}
        weights = resampling(units, resamples if len(units) > 1 else 0)
        return cls(units, weights, sums, one.to_numpy(), sorted(wide.columns.unique(1)))

    def of_measure(self, measure: str) -> dict[str, np.ndarray]:
        """By metric [1 + resamples, layers]."""
        if measure not in self._known:
            own = {
                m: self._mean(x / (1 if measure == "loss" else self.surprise[:, None]))
                for m, x in self.sums.items()
            }
            if measure == "share":
                found = {}
                for group in (INTO_LABELS, INTO_TARGET):
                    there = [m for m in group if m in own]
                    total = sum(own[m] for m in there) if there else 0
                    for m in there:
                        with np.errstate(invalid="ignore", divide="ignore"):
                            found[f"s{m[1:]}"] = np.where(total > 0, own[m] / total, np.nan)
                self._known[measure] = found
            else:
                self._known[measure] = {m: own[m] for m in SUMS if m in own}
        return self._known[measure]

    def _mean(self, data: np.ndarray) -> np.ndarray:
        return self.weights @ data / self.weights.sum(1, keepdims=True)


def _half(samples: np.ndarray, part: str, measure: str) -> np.ndarray:
    """Sum over the layers (the last axis) of a half; for shares the mean of what is there."""
    middle = samples.shape[-1] // 2
    own = samples[..., {"all": slice(None), "shallow": slice(middle), "deep": slice(middle, None)}[part]]
    if measure != "share":
        return own.sum(-1)
    there = ~np.isnan(own)  # nothing flows into label words in the last layer
    with np.errstate(invalid="ignore"):
        return np.where(there, own, 0).sum(-1) / there.sum(-1)


def profiles(rows: pd.DataFrame, labels: str, scenario: str) -> dict[str, pd.DataFrame]:
    """By measure: one row per training, expert, strength, metric (s_ip, s_iq) and layer, means over prompts."""
    found: dict[str, list[pd.DataFrame]] = {measure: [] for measure in MEASURES}
    own = rows[(rows["labels"] == labels) & (rows["scenario"] == scenario)]
    for (seed, expert, strength), part in own.groupby(["seed", "expert", "strength"], sort=False):
        data = _Flow.of(part, 0)
        for measure in MEASURES:
            for metric, values in data.of_measure(measure).items():
                if metric in ("s_ip", "s_iq"):
                    facts = {"seed": seed, "expert": expert, "strength": strength, "metric": metric}
                    found[measure].append(
                        pd.DataFrame(facts | {"layer": data.layers, "value": np.nan_to_num(values[0])})
                    )
    return {measure: pd.concat(parts, ignore_index=True) for measure, parts in found.items() if parts}
