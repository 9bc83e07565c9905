"""What the rows of `anchors nsa probe` come to: intervals by a bootstrap over prompts, tests by permutation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import false_discovery_control

from anchors.intervals import interval
from anchors.nsa.probing import metrics
from anchors.stats import refuse_doubles, resampling

PERMUTATIONS = 1000
BRANCHES = ("cmp", "slc", "win")
PAIRS = ("wp", "pq", "ww")
PLAIN = (
    "auc", "rank", "purity", "purity_even", "anchors_per_block", "recall", "recall_candidates", "mass_recall",
    "anchor_recall", "rank_drop", "jaccard_label", "jaccard_other", "dilution_label", "dilution_other", "wp_rate",
    "wp_rate_chance", "wp_mass", "pq_mass", "gate_entropy_label", "gate_entropy_last", "gate_entropy_other",
)  # fmt: skip
"""Metrics whose means by layer and group are all there is to say."""
OUTCOMES = ("accuracy", "probability", "margin", "logit")


class Samples(NamedTuple):
    """Bootstrap means: a table of what each column is, and [1 + resamples, columns], the estimate first; and how many
    prompts each rests on."""

    columns: pd.DataFrame
    values: Float[np.ndarray, "samples columns"]
    prompts: np.ndarray

    def table(self) -> pd.DataFrame:
        value, low, high = interval(self.values)
        return self.columns.assign(value=value, low=low, high=high, prompts=self.prompts)

    def at(self, **key: object) -> Float[np.ndarray, "samples columns"]:
        """The columns of a key, in their order."""
        return self.values[:, self.where(**key)]

    def where(self, **key: object) -> np.ndarray:
        same = np.ones(len(self.columns), bool)
        for name, value in key.items():
            same &= (self.columns[name] == value).to_numpy(bool)
        return np.flatnonzero(same)


def probe_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Tables by name; `summary` is the accuracy under interventions. Tables without rows are left out."""
    refuse_doubles(rows)
    places = ("layer", "group", "head", "place")
    rows = rows.assign(**{name: rows[name].astype("Int32").fillna(-1).astype(int) for name in places})
    made = {
        "summary": _interventions, "branches": _branches, "selection": _selection, "stages": _stages, "gates": _gates,
        "gate_saliency": _gate_saliency, "measures": _plain,
    }  # fmt: skip
    tables = {name: make(rows) for name, make in made.items()}
    return {name: table for name, table in tables.items() if len(table)}


def all_tables(rows: pd.DataFrame, **_: object) -> dict[str, pd.DataFrame]:
    """`probe_tables`, of which what is kept beside the rows is no part."""
    return probe_tables(rows)


def bootstrap(rows: pd.DataFrame, by: Sequence[str]) -> Samples:
    """Bootstrap means over prompts of every combination of `by`; a prompt that lacks one does not count for it.

    All columns are resampled alike, so that differences between them are paired.
    """
    units = pd.MultiIndex.from_frame(
        rows[["seed", "number"]].drop_duplicates().sort_values(["seed", "number"])
    )
    wide = rows.pivot_table(index=["seed", "number"], columns=list(by), values="value", sort=True).reindex(
        units
    )
    weights = resampling(units.to_frame(index=False))[: 1 if len(units) == 1 else None]
    data = wide.to_numpy(float)
    known = ~np.isnan(data)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (weights @ np.where(known, data, 0)) / (weights @ known)
    return Samples(wide.columns.to_frame(index=False), values, known.sum(0))


def _of(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    return rows[rows["metric"].isin(list(names))]


def _missing(table: pd.DataFrame) -> pd.DataFrame:
    """-1 as a missing layer, group or head."""
    for name in ("layer", "group", "head"):
        if name in table:
            table[name] = table[name].astype("Int32").mask(table[name] < 0)
    return table


def _plain(rows: pd.DataFrame) -> pd.DataFrame:
    own = _of(rows, PLAIN)
    if not len(own):
        return own
    return _missing(bootstrap(own, ("metric", "condition", "layer", "group")).table())


def _branches(rows: pd.DataFrame) -> pd.DataFrame:
    """Columns layer, pair, branch, value (S^c), share (S^c / Σ S^c), coverage, support (S^c over attended pairs only),
    cancellation (1 − |Σ_c| / Σ_c |·|), each with its interval; branch `all` is |Σ_c|."""
    names = [f"{kind}_{pair}" for kind in ("s", "support", "coverage") for pair in PAIRS]
    own = _of(rows, names)
    if not len(own):
        return own
    found = bootstrap(own, ("metric", "condition", "layer"))
    tables = []
    for layer in sorted(own["layer"].unique()):
        for pair in PAIRS:
            whole = found.at(metric=f"s_{pair}", condition="all", layer=layer)
            parts = [found.at(metric=f"s_{pair}", condition=c, layer=layer) for c in BRANCHES]
            split = all(part.shape[1] for part in parts)
            total = sum(parts) if split else whole
            for branch, value in zip((*BRANCHES, "all"), (*parts, whole), strict=True):
                if not value.shape[1]:
                    continue
                row = {"layer": layer, "pair": pair, "branch": branch} | _span("value", value)
                with np.errstate(invalid="ignore", divide="ignore"):
                    if split and branch == "all":
                        row |= _span("cancellation", 1 - whole / total)
                    elif split:
                        row |= _span("share", value / total)
                for kind in ("support", "coverage"):
                    own_kind = found.at(metric=f"{kind}_{pair}", condition=branch, layer=layer)
                    if own_kind.shape[1]:
                        row |= _span(kind, own_kind)
                tables.append(row)
    return pd.DataFrame(tables)


def _span(name: str, samples: np.ndarray, count: float | None = None) -> dict[str, float]:
    value, low, high = interval(samples[:, 0] if samples.ndim > 1 else samples, count=count)
    return {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}


class Choices(NamedTuple):
    """Which candidate blocks each prompt chose, and where its label words are.

    Attributes:
        chosen: by prompt, [layers, groups, blocks].
        weight: by prompt, label words per block.
        candidate: by prompt.
    """

    chosen: list[np.ndarray]
    weight: list[np.ndarray]
    candidate: list[np.ndarray]


def choices(rows: pd.DataFrame, which: str) -> Choices:
    """From rows to masks."""
    home = _of(rows, ["recall"])
    layers, groups = sorted(home["layer"].unique()), sorted(home["group"].unique())
    held = _of(rows, ["label_words"])
    held = held[held["condition"] == which]
    blocks = int(held["place"].max()) + 1 if len(held) else 0
    found = Choices([], [], [])
    taken = dict(list(_of(rows, ["chosen"]).groupby(["seed", "number"])))
    for unit, own in held.groupby(["seed", "number"]):
        weight, candidate = np.zeros(blocks), np.zeros(blocks, bool)
        weight[own["place"]], candidate[own["place"]] = own["value"], True
        chosen = np.zeros((len(layers), len(groups), blocks), bool)
        if unit in taken:
            part = taken[unit]
            place = np.searchsorted(layers, part["layer"]), np.searchsorted(groups, part["group"])
            chosen[*place, part["place"]] = True
        found.chosen.append(chosen)
        found.weight.append(weight)
        found.candidate.append(candidate)
    return found


def _selection(rows: pd.DataFrame) -> pd.DataFrame:
    """By which label words, layer and group: asr, chance, lift, control and excess over it, AUC, and p (q after Benjamini
    and Hochberg). Prompts without a control count for neither it nor the excess."""
    home = _of(rows, ["recall"])
    if not len(home):
        return home
    layers, groups = sorted(home["layer"].unique()), sorted(home["group"].unique())
    told = _of(rows, ["chance"])
    # Not a number: no block to choose; 1: all of them are read anyway. Neither says anything of the choice.
    told = told[told["value"] < 1].sort_values(["seed", "number"])
    if not len(told):
        return told
    rows = rows.merge(told[["seed", "number"]], on=["seed", "number"])
    units, expected = told[["seed", "number"]], told["value"].to_numpy()
    weights = resampling(units)[: 1 if len(units) == 1 else None]
    tables = []
    for which in ("label", "answer"):
        found = choices(rows, which)
        rate = np.array([metrics.selection_rate(c, w, v) for c, w, v in zip(*found, strict=True)])
        if np.isnan(rate).all():
            continue
        near = [metrics.control_weights(w, v) for _, w, v in zip(*found, strict=True)]
        control = np.array(list(map(metrics.selection_rate, found.chosen, near, found.candidate)))
        null = null_rates(found)
        p = (1 + (null >= np.nanmean(rate, 0) - 1e-12).sum(0)) / (1 + len(null))
        q = false_discovery_control(p.ravel()).reshape(p.shape)
        by_chance = np.broadcast_to(expected[:, None, None], rate.shape)
        asr, chance = _mean(weights, rate), _mean(weights, np.where(np.isnan(rate), np.nan, by_chance))
        controls, excess = _mean(weights, control), _mean(weights, rate - control)
        with np.errstate(invalid="ignore", divide="ignore"):
            lift = asr / chance
        for i, layer in enumerate(layers):
            for j, group in enumerate(groups):
                row = {"which": which, "layer": layer, "group": group, "p": p[i, j], "q": q[i, j]}
                row["prompts"] = int((~np.isnan(rate[:, i, j])).sum())
                spans = {"asr": asr, "chance": chance, "lift": lift, "control": controls, "excess": excess}
                for name, own in spans.items():
                    row |= _span(name, own[:, i, j])
                row |= {
                    "null_low": np.quantile(null[:, i, j], 0.025),
                    "null_high": np.quantile(null[:, i, j], 0.975),
                }
                tables.append(row)
    if not tables:
        return pd.DataFrame()
    table = pd.DataFrame(tables)
    ranked = _plain(_of(rows, ["auc"]))
    if len(ranked):
        ranked = ranked.rename(
            columns={"condition": "which", "value": "auc", "low": "auc_low", "high": "auc_high"}
        )
        own = ranked[["which", "layer", "group", "auc", "auc_low", "auc_high"]].astype(
            {"layer": int, "group": int}
        )
        table = table.merge(own, how="left", on=["which", "layer", "group"])
    return table


def null_rates(
    found: Choices, permutations: int = PERMUTATIONS, seed: int = 0
) -> Float[np.ndarray, "permutations l g"]:
    """Mean selection rates over prompts with label words moved to blocks near by, see `probe_metrics.permuted`.

    At least one prompt must have label words in candidate blocks.
    """
    rng = np.random.default_rng(seed)
    total, count = 0.0, 0
    for chosen, weight, candidate in zip(*found, strict=True):
        mass = (weight * candidate).sum()
        if mass:
            moved = metrics.permuted(weight, candidate, permutations, rng)
            total = total + np.einsum("pb,lgb->plg", moved, chosen) / mass
            count += 1
    return np.asarray(total / count)


def _mean(
    weights: np.ndarray, values: Float[np.ndarray, "prompts *more"]
) -> Float[np.ndarray, "samples *more"]:
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.tensordot(weights, np.where(known, values, 0), 1) / np.tensordot(
            weights, known.astype(float), 1
        )


def _stages(rows: pd.DataFrame) -> pd.DataFrame:
    """By measure (rate of selected blocks; mass of attention) and layer: wp, what label words take of their own text, and
    pq, what the last position takes of label words; `leads` where pq is larger from this layer on."""
    parts = []
    for measure, branch in (("mass", "slc"), ("mass", "all"), ("rate", "slc")):
        if measure == "mass":
            own = _of(rows, ["wp_mass", "pq_mass"])
            own = own[own["condition"] == branch]
        else:
            wp = _of(rows, ["wp_rate"])
            own = pd.concat([wp, _rates(rows)]) if len(wp) else wp
        if not len(own):
            continue
        found = bootstrap(own, ("metric", "layer"))
        layers = sorted(own["layer"].unique())
        gap = []
        for layer in layers:
            wp, pq = (found.at(metric=f"{x}_{measure}", layer=layer) for x in ("wp", "pq"))
            if wp.shape[1] and pq.shape[1]:
                row: dict[str, Any] = (
                    {"measure": measure, "branch": branch, "layer": layer} | _span("wp", wp) | _span("pq", pq)
                )
                gap.append(row | _span("gap", pq - wp))
        above = [row["gap"] > 0 for row in gap]
        for i, row in enumerate(gap):
            row["leads"] = all(above[i:])
        parts += gap
    return pd.DataFrame(parts)


def _rates(rows: pd.DataFrame) -> pd.DataFrame:
    """The anchor selection rate of every prompt and layer, as rows."""
    home = _of(rows, ["recall"])
    layers = sorted(home["layer"].unique())
    units = _of(rows, ["label_words"])[["seed", "number"]].drop_duplicates().sort_values(["seed", "number"])
    found = choices(rows, "label")
    rate = [metrics.selection_rate(c, w, v).mean(1) for c, w, v in zip(*found, strict=True)]
    table = [
        (seed, number, "pq_rate", layer, value)
        for (seed, number), own in zip(units.itertuples(index=False), rate, strict=True)
        for layer, value in zip(layers, own, strict=True)
    ]
    return pd.DataFrame(table, columns=["seed", "number", "metric", "layer", "value"])


def _gates(rows: pd.DataFrame) -> pd.DataFrame:
    """By layer, head and branch: the mean gate at label words, last position and elsewhere. `effect` is the difference
    of label words (or last) to elsewhere in standard deviations of the gate over the prompt's tokens; p, q and the null
    interval are of flipped signs."""
    own = _of(rows, ["gate_label", "gate_last", "gate_other", "gate_sd"])
    if not len(own):
        return own
    keys = ["layer", "head", "condition"]
    wide = own.pivot_table(index=["seed", "number", *keys], columns="metric", values="value")
    sd = wide["gate_sd"].where(wide["gate_sd"] > 0)
    table = None
    for where in ("label", "last", "other"):
        part = bootstrap(own[own["metric"] == f"gate_{where}"], keys).table()
        part = part.rename(columns={"value": where, "low": f"{where}_low", "high": f"{where}_high"})
        table = part if table is None else table.merge(part.drop(columns="prompts"), on=keys)
    for where in ("label", "last"):
        effect = ((wide[f"gate_{where}"] - wide["gate_other"]) / sd).rename("value").reset_index()
        data = effect.pivot_table(
            index=["seed", "number"], columns=keys, values="value", dropna=False
        ).dropna(axis=1, how="all")
        tested = data.columns.to_frame(index=False).assign(
            **sign_test(data.to_numpy(float), f"{where}_effect")
        )
        table = table.merge(tested, how="left", on=keys)
    return table.rename(columns={"condition": "branch"})


def sign_test(data: Float[np.ndarray, "prompts columns"], name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Means of the columns, and how they would lie if signs were random: interval, two-sided p, and q."""
    data = np.where(np.isnan(data), 0, data)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(PERMUTATIONS, len(data)))
    null, mean = signs @ data / len(data), data.mean(0)
    p = (1 + (np.abs(null) >= np.abs(mean) - 1e-12).sum(0)) / (1 + PERMUTATIONS)
    low, high = np.quantile(null, [0.025, 0.975], axis=0)
    return {
        name: mean, f"{name}_null_low": low, f"{name}_null_high": high, f"{name}_p": p,
        f"{name}_q": false_discovery_control(p),
    }  # fmt: skip


def _gate_saliency(rows: pd.DataFrame) -> pd.DataFrame:
    own = _of(rows, [f"gate_saliency_{where}" for where in ("label", "last", "other")])
    if not len(own):
        return own
    table = bootstrap(own, ("metric", "layer", "head", "condition")).table()
    table["metric"] = table["metric"].str.removeprefix("gate_saliency_")
    return table.rename(columns={"metric": "where", "condition": "branch"})


def _interventions(rows: pd.DataFrame) -> pd.DataFrame:
    """By condition and metric: value, difference to the untouched run, and `beyond`, the difference to the control's
    effect on the same prompts; all paired."""
    own = _of(rows, (*OUTCOMES, "touched"))
    if not len(own):
        return own
    order = ("none", "ban", "force", "cut", "isolate")
    names = sorted(own["condition"].unique(), key=lambda name: order.index(name.partition("-")[0]))
    # An episode has classes of its own: its chance is one over how many they are.
    classes = _of(rows, ["classes"])["value"]
    chance = float((1 / classes).mean()) if len(classes) else np.nan
    tables = []
    for condition in names:
        control = control_of(condition)
        common = own
        if control in names:  # prompts that have both
            has = own[own["condition"] == control][["seed", "number"]].drop_duplicates()
            common = own.merge(has, on=["seed", "number"])
        part, both = bootstrap(own[own["condition"].isin([condition, "none"])], ("metric", "condition")), None
        if control in names:
            both = bootstrap(common, ("metric", "condition"))
        has = own[own["condition"] == condition][["seed", "number"]].drop_duplicates()
        paired = bootstrap(own.merge(has, on=["seed", "number"]), ("metric", "condition"))
        for metric in (*OUTCOMES, "touched"):
            value = part.at(metric=metric, condition=condition)
            if not value.shape[1]:
                continue
            count = len(has) if metric == "accuracy" else None
            row = {"condition": condition, "metric": metric, "prompts": len(has)} | _span(
                "value", value, count
            )
            row["chance"] = chance if metric == "accuracy" else np.nan
            before = paired.at(metric=metric, condition="none")
            if condition != "none" and before.shape[1]:
                row |= _span("difference", paired.at(metric=metric, condition=condition) - before)
            if both is not None and metric != "touched":
                row |= _span(
                    "beyond",
                    both.at(metric=metric, condition=condition) - both.at(metric=metric, condition=control),
                )
            tables.append(row)
    table = pd.DataFrame(tables)
    return table.rename(columns={"value_low": "low", "value_high": "high"})


def control_of(condition: str) -> str:
    """The name of an intervention's control; empty for one without."""
    kind, _, rest = condition.partition("-")
    if kind in ("ban", "force") and not condition.endswith("-control"):
        return f"{condition}-control"
    if kind == "isolate" and rest == "label":
        return "isolate-control"
    if kind == "cut" and condition.endswith("-label"):
        return condition.removesuffix("label") + "control"
    return ""
