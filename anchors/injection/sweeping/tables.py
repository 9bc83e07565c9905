"""What the rows of a sweep come to: settings with intervals, Pareto fronts, comparisons at equal strength and equal norm.

Random masks are averaged within an example; intervals are of a bootstrap over trainings (seeds) and examples, in which
everything of one scenario is paired; where all answers are right, or all wrong, they are Wilson's. Nothing here imports
torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from anchors.errors import AnchorsError
from anchors.intervals import interval
from anchors.stats import RESAMPLES, refuse_doubles, resampling

RETENTION = 0.95
"""Of the uninjected VLM's vision: what a setting must keep to be chosen, unless another share is asked for."""

NEAR = 0.9
"""Of the best skill: what counts as near it."""
CONDITIONS = ("skill", "vision", "blank", "shuffled")
VLM, ORACLE, REFERENCE, PLAIN = "VLM alone", "text oracle", "reference", "task-arithmetic"
RECIPE = ["family", "method", "strength", "density", "layers", "embeddings", "options"]
PLACE = ("seed", "scenario", "setting", "mask", "condition", "split", "kind", "number")
"""The columns that tell one answer from another."""
SIZES = ["changed", "norm", "relative", "dose"]


@dataclass(frozen=True)
class Samples:
    """Accuracies of one scenario on one split, resampled.

    Attributes:
        settings: names, references among them.
        values: by condition [1 + resamples, settings]; row 0 is the estimate, NaN where a setting has no such answers.
        counts: by condition [settings]: how many answers, each right or wrong, a value rests on that is 0 or 1; missing
            for others (`anchors.intervals.interval`).
        examples: questions of the scenario, over all trainings.
        seeds: trainings.
    """

    settings: tuple[str, ...]
    values: dict[str, Float[np.ndarray, "draws settings"]]
    counts: dict[str, Float[np.ndarray, " settings"]]
    examples: int
    seeds: int

    @classmethod
    def of(cls, rows: pd.DataFrame, settings: Sequence[str], resamples: int = RESAMPLES) -> "Samples":
        """From rows of one scenario and one split."""
        values, counts, examples, seeds = {}, {}, 0, rows["seed"].nunique()
        for names in (("skill", "blank", "shuffled"), ("vision",)):
            own = rows[rows["condition"].isin(names)]
            keys = ["seed", "number", "condition", "setting"]
            mean = own.groupby(keys, observed=True)["correct"].mean()
            wide = mean.unstack(["condition", "setting"])
            units = wide.index.to_frame(index=False)
            # The same trainings are drawn for vision and for every scenario, since only their number matters to the draw.
            weights = resampling(units, resamples)
            drawn = weights @ wide.to_numpy() / weights.sum(1, keepdims=True)
            for name in names:
                place = {c[1]: i for i, c in enumerate(wide.columns) if c[0] == name}
                values[name] = np.full((len(drawn), len(settings)), np.nan)
                there = [i for i, s in enumerate(settings) if s in place]
                values[name][:, there] = drawn[:, [place[settings[i]] for i in there]]
                counts[name] = np.where(np.isin(values[name][0], (0, 1)), len(units), np.nan)
            examples = examples or len(units)
        return cls(tuple(settings), values, counts, examples, seeds)

    def at(self, setting: str, condition: str = "skill") -> Float[np.ndarray, " draws"]:
        """Accuracy of one setting; `net` is skill minus blank."""
        if condition == "net":
            return self.at(setting) - self.at(setting, "blank")
        return self.values[condition][:, self.settings.index(setting)]

    def count(self, setting: str, condition: str) -> float | None:
        """Of the answers behind `at`, see `counts`."""
        return None if condition == "net" else self.counts[condition][self.settings.index(setting)]


def all_tables(
    rows: pd.DataFrame, *, settings: pd.DataFrame, facts: Mapping[str, Any], **_: object
) -> dict[str, pd.DataFrame]:
    """`tables`, with the split and the retention that the provenance names."""
    part = facts["parts"][0]
    return tables(rows, settings, part["split"], retention=part["retention"])


def tables(
    rows: pd.DataFrame,
    settings: pd.DataFrame,
    split: str = "test",
    resamples: int = RESAMPLES,
    retention: float = RETENTION,
) -> dict[str, pd.DataFrame]:
    """All tables of a sweep.

    Args:
        rows, settings: of `anchors.injection.sweeping.sweep.Swept`.
        split: on which results are reported.
        resamples: of the bootstrap.
        retention: the share of the VLM's vision that a setting must keep to be chosen.

    Returns:
        summary: every setting and reference of every scenario; best: the setting of each family that was chosen on
        `tune` (on `split` itself where `chosen_apart` says no) with what it does on `split`, see `best_table`; matched, sensitivity and scenarios:
        see the functions of these names.

    Raises:
        AnchorsError: rows of several models, or answers that are there several times (of two runs, say).
    """
    refuse_doubles(rows, PLACE)
    parts: dict[str, list[pd.DataFrame]] = {}
    chosen: dict[str, tuple[Samples, pd.DataFrame, str]] = {}
    for scenario in dict.fromkeys(settings["scenario"]):
        own = _merged(settings[settings["scenario"] == scenario])
        mine = rows[rows["scenario"] == scenario]
        names = list(own["setting"])
        test = Samples.of(mine[mine["split"] == split], names, resamples)
        apart = chosen_apart(mine, split)
        ahead = Samples.of(mine[mine["split"] == "tune"], names, 0) if apart else test
        summary = summary_table(own, test)
        best = best_table(own, ahead, test, "tune" if apart else split, retention).assign(split=split)
        found = {
            "summary": summary, "best": best, "matched": matched_table(own, test), "sensitivity": sensitivity_table(own, test, retention)
        }  # fmt: skip
        for name, table in found.items():
            parts.setdefault(name, []).append(table.assign(scenario=scenario))
        chosen[scenario] = (test, own, best.loc[best["family"] == "any", "setting"].item())
    made = {
        name: pd.concat(
            [t[["scenario", *t.columns.drop("scenario")]] for t in found if len(t)] or found[:1],
            ignore_index=True,
        )
        for name, found in parts.items()
    }
    return made | {"scenarios": scenario_table(chosen)}


def chosen_apart(rows: pd.DataFrame, split: str) -> bool:
    """Whether settings of a scenario can be chosen on other examples than those that are reported on: every training
    has `tune` examples of the skill and of vision, and `tune` is not itself what is reported on."""
    tune = rows[rows["split"] == "tune"]
    there = set(zip(tune["seed"], tune["condition"], strict=True))
    wanted = {(seed, condition) for seed in rows["seed"].unique() for condition in ("skill", "vision")}
    return split != "tune" and wanted <= there


def summary_table(settings: pd.DataFrame, test: Samples) -> pd.DataFrame:
    """Every setting: accuracy by condition, `net` (skill − blank), `loss` (vision − the VLM's), whether it stands on the
    Pareto front of (vision, skill), and in which share of the resamples it does."""
    table = settings.copy()
    for name in CONDITIONS:
        _put(table, name, test.values[name], test.counts[name])
    _put(table, "net", test.values["skill"] - test.values["blank"])
    _put(table, "loss", test.values["vision"] - test.at(VLM, "vision")[:, None])
    runs = _injected(settings) | (settings["setting"] == VLM).to_numpy()
    fronts = np.zeros((len(test.values["skill"]), len(table)), bool)
    for draw, found in enumerate(fronts):
        found[runs] = front(test.values["vision"][draw, runs], test.values["skill"][draw, runs])
    return table.assign(
        front=fronts[0], front_share=_share(fronts[1:]), examples=test.examples,
        seeds=test.seeds,
    )  # fmt: skip


def front(x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"]) -> Bool[np.ndarray, " points"]:
    """Which points no other one beats in x or y without being worse in the other."""
    better = (
        (x[None] >= x[:, None]) & (y[None] >= y[:, None]) & ((x[None] > x[:, None]) | (y[None] > y[:, None]))
    )
    return ~np.any(better, axis=1)


def best_table(
    settings: pd.DataFrame, tune: Samples, test: Samples, split: str, retention: float
) -> pd.DataFrame:
    """Of each family, and of all (`any`), the setting of highest skill that keeps the share `retention` of the VLM's vision, both
    in the samples `tune`; its accuracies in the samples `test`. `split` names what `tune` was drawn from.

    The VLM alone is a candidate, too: where no setting keeps enough, it is chosen. `difference` is the skill minus the
    one of the setting chosen for task arithmetic, paired; `ceiling` the best that could have been chosen with a look
    at the test split. `vision_kept` is the share of the VLM's vision that is left in the samples `test`: a setting that
    kept enough where it was chosen need not do so there (`kept`). `edge` says that the chosen λ is the largest of several: a larger one may be better.
    """
    rows = []
    families = dict.fromkeys(settings.loc[_injected(settings), "family"])
    picked = {f: _choose(settings, tune, None if f == "any" else f, retention) for f in ["any", *families]}
    for family, name in picked.items():
        row = {
            "family": family, "setting": name, "chosen_on": split, "retention": retention, "tune_skill": tune.at(name)[0]
        }  # fmt: skip
        for condition in (*CONDITIONS, "net"):
            row |= _estimate(condition, test.at(name, condition), test.count(name, condition))
        with np.errstate(invalid="ignore", divide="ignore"):
            row |= _estimate("vision_kept", test.at(name, "vision") / test.at(VLM, "vision"))
        row["kept"] = bool(test.at(name, "vision")[0] >= retention * test.at(VLM, "vision")[0])
        row["ceiling"] = test.at(_choose(settings, test, None if family == "any" else family, retention))[0]
        if PLAIN in picked:
            row |= _estimate("difference", test.at(name) - test.at(picked[PLAIN]))
        rows.append(row | {"edge": _at_the_edge(settings, name)})
    return pd.DataFrame(rows)


def matched_table(settings: pd.DataFrame, test: Samples) -> pd.DataFrame:
    """Methods at equal strength and at equal norm of what was added.

    A line is a family at one density. `by` strength: its setting with λ_e = `at`. `by` dose: skill and vision at
    ‖m − v‖ = at · ‖τ_e‖, interpolated along the line between its settings and the VLM alone (dose 0), and missing beyond
    its last one. Task arithmetic has dose λ_e (more, where embeddings are merged, too: ‖τ_e‖ is without them). Differences are paired, to task arithmetic.
    """
    own = settings[_injected(settings)]
    plain = own[(own["family"] == PLAIN)].sort_values("strength")
    columns = {name: i for i, name in enumerate(test.settings)}
    rows = []
    for (family, density), line in own.groupby(["family", "density"], sort=False, dropna=False):
        line = line.sort_values("dose")
        places = [columns[VLM], *(columns[s] for s in line["setting"])]
        by_strength = {s: columns[n] for s, n in zip(line["strength"], line["setting"], strict=True)}
        for at, name in zip(plain["strength"], plain["setting"], strict=True):
            weights = np.zeros((2, len(columns)))
            if at in by_strength:
                weights[0, by_strength[at]] = 1
            weights[1, places] = between(np.array([0.0, *line["dose"]]), at)
            for by, weight in zip(("strength", "dose"), weights, strict=True):
                if not weight.any():
                    continue
                used = weight > 0
                row = {"family": family, "density": density, "by": by, "at": at}
                for condition in ("skill", "vision"):
                    values = test.values[condition][:, used] @ weight[used]
                    row |= _estimate(condition, values)
                    row |= _estimate(f"{condition}_difference", values - test.at(name, condition))
                rows.append(row)
    return pd.DataFrame(rows)


def between(points: Float[np.ndarray, " points"], at: float) -> Float[np.ndarray, " points"]:
    """Weights of linear interpolation at a place between sorted points; all 0 outside of them."""
    weights = np.zeros(len(points))
    if not points[0] <= at <= points[-1] * (1 + 1e-6):  # a dose is a norm in float32
        return weights
    after = int(np.clip(np.searchsorted(points, at), 1, len(points) - 1))
    width = points[after] - points[after - 1]
    share = min(1.0, (at - points[after - 1]) / width) if width > 0 else 1.0
    weights[after - 1 : after + 1] = 1 - share, share
    return weights


def sensitivity_table(settings: pd.DataFrame, test: Samples, retention: float) -> pd.DataFrame:
    """How much of each family hangs on its numbers: lowest and highest skill over its settings, and the shares of settings
    that come near (`NEAR`) the family's best skill, that keep the share `retention` of the VLM's vision, and that do both, where
    the best is then the best of those that keep it. No skill beyond the VLM's own is near any."""
    rows = []
    for family in dict.fromkeys(settings.loc[_injected(settings), "family"]):
        mask = (settings["family"] == family).to_numpy()
        skill = test.values["skill"][:, mask]
        kept = test.values["vision"][:, mask] >= retention * test.at(VLM, "vision")[:, None]
        most = np.where(kept, skill, -np.inf).max(1, keepdims=True)
        row = {
            "family": family,
            "settings": int(mask.sum()),
            "lowest": skill[0].min(),
            "highest": skill[0].max(),
        }
        row |= _estimate("spread", skill.max(1) - skill.min(1))
        gained = skill > test.at(VLM)[:, None]
        row |= _estimate("near", (gained & (skill >= NEAR * skill.max(1, keepdims=True))).mean(1))
        row |= _estimate("keep", kept.mean(1))
        row |= _estimate("both", (kept & gained & (skill >= NEAR * most)).mean(1))
        rows.append(row)
    return pd.DataFrame(rows)


def scenario_table(chosen: dict[str, tuple[Samples, pd.DataFrame, str]]) -> pd.DataFrame:
    """Which scenarios can be injected: at task arithmetic with λ 1, and at the setting chosen on the tune split.

    `recovered` is (skill − VLM alone) / (text oracle − VLM alone): how much of what the expert knows arrives; missing
    where the oracle is no better than the VLM alone. `rank` is by it, among the scenarios that have one, and
    `rank_share` the share of resamples with this very rank, of those in which all of them have one.
    """
    tables = []
    for how in ("task-arithmetic λ=1", "best"):
        found: dict[str, tuple[Samples, str]] = {
            scenario: (test, best if how == "best" else how)
            for scenario, (test, _, best) in chosen.items()
            if how == "best" or how in test.settings
        }
        if not found:
            continue
        recovered = []
        for test, name in found.values():
            before, oracle = test.at(VLM), test.at(ORACLE)
            with np.errstate(invalid="ignore", divide="ignore"):
                recovered.append(
                    (test.at(name) - before) / np.where(oracle > before, oracle - before, np.nan)
                )
        values = np.stack(recovered, axis=1)
        # Equal ones share the better rank.
        ranks = np.where(np.isnan(values), np.nan, 1 + (values[:, None, :] > values[:, :, None]).sum(2))
        ranked = ~np.any(np.isnan(values[:, ~np.isnan(values[0])]), axis=1)
        rows = []
        for i, (scenario, (test, name)) in enumerate(found.items()):
            row: dict[str, Any] = {"scenario": scenario, "how": how, "setting": name}
            for condition in ("skill", "vision", "net"):
                row |= _estimate(condition, test.at(name, condition), test.count(name, condition))
            row |= _estimate("recovered", values[:, i])
            there = not np.isnan(ranks[0, i])
            same = (ranks[1:, i] == ranks[0, i])[ranked[1:]]
            row |= {"rank": ranks[0, i], "rank_share": _share(same) if there else np.nan}
            rows.append(row)
        tables.append(pd.DataFrame(rows))
    return pd.concat(tables, ignore_index=True)


def _merged(settings: pd.DataFrame) -> pd.DataFrame:
    """One row per setting: sizes averaged over trainings and masks."""
    order = list(dict.fromkeys(settings["setting"]))
    sizes = settings.groupby("setting")[SIZES].mean()
    masks = settings.groupby("setting").agg(masks=("mask", "nunique"))
    first = settings.drop_duplicates("setting").set_index("setting")[RECIPE]
    if VLM not in first.index:
        raise AnchorsError(f"The rows lack the {VLM}, with which everything is compared.", code="rows")
    return first.join(sizes).join(masks).loc[order].reset_index()


def _injected(settings: pd.DataFrame) -> Bool[np.ndarray, " settings"]:
    return (settings["family"] != REFERENCE).to_numpy()


def _choose(settings: pd.DataFrame, samples: Samples, family: str | None, retention: float) -> str:
    mask = _injected(settings) if family is None else (settings["family"] == family).to_numpy()
    kept = samples.values["vision"][0] >= retention * samples.at(VLM, "vision")[0]
    allowed = np.flatnonzero((mask & kept) | (settings["setting"] == VLM).to_numpy())
    # Of equally skilled ones the one that forgot least.
    skill, vision = (samples.values[name][0, allowed] for name in ("skill", "vision"))
    return settings["setting"].iloc[allowed[np.lexsort((vision, skill))[-1]]]


def _at_the_edge(settings: pd.DataFrame, name: str) -> bool:
    chosen = settings[settings["setting"] == name].iloc[0]
    tried = settings.loc[settings["family"] == chosen["family"], "strength"]
    return bool(tried.nunique() > 1 and chosen["strength"] == tried.max())


def _share(found: np.ndarray) -> np.ndarray | float:
    """Of the resamples; missing where there are none."""
    return found.mean(0) if len(found) else np.nan


def _estimate(
    name: str, samples: Float[np.ndarray, " draws"], count: float | None = None
) -> dict[str, float]:
    value, low, high = interval(samples, count=count)
    return {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}


def _put(
    table: pd.DataFrame,
    name: str,
    samples: Float[np.ndarray, "draws settings"],
    count: Float[np.ndarray, " settings"] | None = None,
) -> None:
    names: Iterable[str] = (name, f"{name}_low", f"{name}_high")
    for column, values in zip(names, interval(samples, count=count), strict=True):
        table[column] = values
