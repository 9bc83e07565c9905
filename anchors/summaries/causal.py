"""How far the answer follows a patch, from the rows of `anchors.causal`."""

import numpy as np
import pandas as pd

from anchors.errors import AnchorsError
from anchors.intervals import interval, method
from anchors.stats import GROUP, RESAMPLES, refuse_doubles, resampling


def causal_summary(
    rows: pd.DataFrame, *, confidence: float = 0.95, resamples: int = RESAMPLES
) -> pd.DataFrame:
    """How far the answer follows the patch, by layer, with paired bootstrap intervals.

        follow_l = Σ_n ⟨z_l − z_A, z_B − z_A⟩ / Σ_n ‖z_B − z_A‖²        n: prompts

    a ratio of sums, since single prompts on which A and B hardly differ would have unstable ratios of their own.
    `released` of a layer is the decrease of the label words' follow up to the next measured one (or the end), in the
    same resamples. `flipped` is the share of B's predictions among the prompts on which A and B predict differently.

    Args:
        rows: of `Causal`, of one task or several.

    Returns:
        One row per task, condition, metric (`follow`, `flipped`, `released`, `differs`) and layer: value, low, high,
        `interval` (how the bounds were made, see `anchors.intervals`), examples, seeds. Layer n of n layers is the end, where nothing is left to patch.
    """
    refuse_doubles(rows)
    tables = []
    for key, group in rows[rows["number"] >= 0].groupby(GROUP, sort=False):
        whole = group[group["metric"].isin(["follow_denominator", "differs"])]
        whole = whole.pivot(index=["seed", "number"], columns="metric", values="value")
        units = whole.index.to_frame(index=False)
        weights = resampling(units, resamples)[: 1 if len(units) == 1 else None]
        size, differs = whole["follow_denominator"].to_numpy(), whole["differs"].to_numpy()
        share = weights @ differs[:, None] / weights.sum(1, keepdims=True)
        counts = {"differs": len(units), "flipped": int(differs.sum())}
        found = [("none", "differs", [None], share)]
        patched = group[group["metric"].isin(["follow_numerator", "flipped"])]
        for condition, own in patched.groupby("condition", sort=False):
            wide = own.pivot(index=["seed", "number"], columns=["metric", "layer"], values="value")
            wide = wide.loc[whole.index].sort_index(axis=1)
            layers = wide["follow_numerator"].columns.tolist()
            follow = ratio(weights, wide["follow_numerator"].to_numpy(), size)
            flipped = ratio(weights, wide["flipped"].to_numpy() * differs[:, None], differs)
            found += [(condition, "follow", layers, follow), (condition, "flipped", layers, flipped)]
            if condition == "label":
                found.append((condition, "released", layers[:-1], -np.diff(follow, axis=1)))
        for condition, metric, layers, samples in found:
            count = counts.get(metric)
            value, low, high = interval(samples, confidence, count)
            table = pd.DataFrame({"layer": layers, "value": value, "low": low, "high": high})
            table["interval"] = method(samples, count)
            names = dict(zip(GROUP, key, strict=True)) | {"condition": condition, "metric": metric}
            tables.append(table.assign(**names, examples=len(units), seeds=units["seed"].nunique()))
    if not tables:
        raise AnchorsError(
            "The rows hold no patched prompts.", "Were they made by another verb?", code="rows"
        )
    columns = [
        *GROUP,
        "condition",
        "metric",
        "layer",
        "value",
        "low",
        "high",
        "interval",
        "examples",
        "seeds",
    ]
    return pd.concat([t.astype({"layer": "Int32"}) for t in tables], ignore_index=True)[columns]


def ratio(weights: np.ndarray, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Ratio of weighted sums over prompts, by resample and layer; missing where there is nothing below."""
    total = weights @ below[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, weights @ above / total, np.nan)


def agreement(summary: pd.DataFrame, flows: pd.DataFrame) -> pd.DataFrame:
    """How alike `released` and the saliency's S_pq are over the layers: their correlations, by task.

    Args:
        summary: of `causal_summary`, every layer patched.
        flows: of `anchors.stats.flow_summary` on the same tasks.

    Returns:
        One row per task: Pearson's and Spearman's correlation over the layers. The layers of one model are no sample
        of anything, so there is no interval.
    """
    found = []
    for key, own in summary[summary["metric"] == "released"].groupby(GROUP, sort=False):
        match = (flows[GROUP] == list(key)).all(axis=1) & (flows["metric"] == "s_pq")
        both = (
            own.set_index("layer")["value"].to_frame("released").join(flows[match].set_index("layer")["mean"])
        )
        found.append(
            dict(zip(GROUP, key, strict=True))
            | {name: both["released"].corr(both["mean"], method=name) for name in ("pearson", "spearman")}
            | {"layers": len(both.dropna())}
        )
    return pd.DataFrame(found)
