"""Tables of a sweep, on rows whose truth is known."""

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from anchors.cli import inject_sweep as cli
from anchors.injection.merging.recipe import Recipe
from anchors.injection.sweeping.grid import facts_of, setting_of
from anchors.injection.sweeping.report import _forgetful
from anchors.injection.sweeping.sweep import Swept
from anchors.injection.sweeping.tables import between, chosen_apart, front, tables


def made(accuracies: dict[tuple[Recipe | str, str], float], seeds: int = 2, examples: int = 400) -> Swept:
    """Rows in which exactly this share of the answers is right, in tune as in test, unless given as (tune, test)."""
    rows, settings = [], {}
    for (what, condition), value in accuracies.items():
        name, mask = (what, 0) if isinstance(what, str) else (setting_of(what), what.seed)
        facts = (
            {"setting": name, "mask": mask, "family": "reference"}
            if isinstance(what, str)
            else facts_of(what)
        )
        dose = 0.0 if isinstance(what, str) else what.strength * (2 if what.method == "dare" else 1)
        for seed in range(seeds):
            settings[name, mask, seed] = {
                "seed": seed,
                "scenario": "s",
                "changed": 1,
                "norm": dose,
                "relative": dose,
                "dose": dose,
                **facts,
            }
            for split, share in zip(("tune", "test"), np.broadcast_to(value, 2), strict=True):
                right = np.arange(examples) < round(share * examples)
                rows.append(pd.DataFrame({
                    "seed": seed, "scenario": "s", "setting": name, "mask": mask, "condition": condition, "split": split,
                    "number": np.arange(examples) + 1000 * (split == "tune"), "correct": right,
                }))  # fmt: skip
    return Swept(pd.concat(rows, ignore_index=True), pd.DataFrame(settings.values()), [], [])


TA = {s: Recipe("task-arithmetic", s) for s in (0.5, 1.0, 1.5)}
DARE = {(s, m): Recipe("dare", s, seed=m, density=0.5) for s in (0.5, 1.0) for m in (0, 1)}
TRUTH = {
    ("VLM alone", "skill"): 0.0, ("VLM alone", "vision"): 1.0, ("VLM alone", "blank"): 0.0, ("text oracle", "skill"): 0.8,
    (TA[0.5], "skill"): 0.2, (TA[0.5], "vision"): 0.98, (TA[0.5], "blank"): 0.1,
    (TA[1.0], "skill"): (0.3, 0.5), (TA[1.0], "vision"): (0.96, 0.6), (TA[1.0], "blank"): 0.1,
    (TA[1.5], "skill"): 0.4, (TA[1.5], "vision"): 0.5, (TA[1.5], "blank"): 0.1,
    **{(DARE[0.5, m], "skill"): 0.1 + 0.1 * m for m in (0, 1)}, **{(DARE[0.5, m], "vision"): 0.99 for m in (0, 1)},
    **{(DARE[1.0, m], "skill"): 0.35 for m in (0, 1)}, **{(DARE[1.0, m], "vision"): 0.5 for m in (0, 1)},
}  # fmt: skip


@pytest.fixture(scope="module")
def known() -> dict[str, pd.DataFrame]:
    found = made(TRUTH)
    return tables(found.rows, found.settings, resamples=50)


def test_summary(known: dict[str, pd.DataFrame]) -> None:
    found = known["summary"].set_index("setting")
    assert found.loc["task-arithmetic λ=1", ["skill", "vision", "net", "loss"]].tolist() == pytest.approx(
        [0.5, 0.6, 0.4, -0.4]
    )
    dare = found.loc["dare λ=0.5 d=0.5"]
    assert dare["skill"] == pytest.approx(0.15)
    assert dare["masks"] == 2
    assert np.isnan(dare["blank"])
    assert found.index[found["front"]].tolist() == [
        "VLM alone",
        "task-arithmetic λ=0.5",
        "task-arithmetic λ=1",
        "dare λ=0.5 d=0.5",
    ]
    inside = found[["skill_low", "skill", "skill_high"]].dropna()
    assert inside.apply(lambda row: row.is_monotonic_increasing, axis=1).all()
    assert found["examples"].eq(800).all()


def test_the_best_is_chosen_without_the_test_examples(known: dict[str, pd.DataFrame]) -> None:
    found = known["best"].set_index("family")
    own = found.loc["task-arithmetic"]
    # On the test split it does not even keep the vision: that is what honest choosing costs.
    assert own["setting"] == "task-arithmetic λ=1"
    assert own["chosen_on"] == "tune"
    assert (own["tune_skill"], own["skill"], own["vision"], own["ceiling"]) == pytest.approx(
        (0.3, 0.5, 0.6, 0.2)
    )
    # It was chosen for keeping vision on tune; on test 60 % of it is left, and that is said.
    assert (own["split"], own["vision_kept"], own["kept"]) == ("test", pytest.approx(0.6), False)
    assert found["kept"].to_dict() == {"any": False, "task-arithmetic": False, "dare": True}
    shown = Console(width=250)
    with shown.capture() as text:
        shown.print(cli._best(known, "s"))
    printed = " ".join(text.get().split())
    assert "that keep 95 % of the VLM's vision on tune; what it does on test" in printed
    assert "✗: kept on tune, but not on test" in printed
    assert printed.count("✗") == 3  # any, task arithmetic, and the caption
    assert _forgetful(known["best"]) == [
        "s: task-arithmetic λ=1 was chosen because it keeps 95 % of the VLM's vision on tune; on test it keeps 60 %."
    ]
    assert found.loc["any", "setting"] == "task-arithmetic λ=1"
    assert found.loc["dare", "setting"] == "dare λ=0.5 d=0.5"
    assert found.loc["dare", "difference"] == pytest.approx(-0.35)
    worse = made(TRUTH | {(r, "vision"): 0.5 for r in TA.values()})
    chosen = tables(worse.rows, worse.settings, resamples=0)["best"].set_index("family")
    assert chosen.loc["task-arithmetic", "setting"] == "VLM alone"
    assert not found["edge"].any()
    assert not chosen["edge"].any()
    more = made(TRUTH | {(TA[1.5], "vision"): 1.0})
    edge = tables(more.rows, more.settings, resamples=0)["best"].set_index("family")["edge"]
    assert edge.to_dict() == {"any": True, "task-arithmetic": True, "dare": False}
    loose = tables(worse.rows, worse.settings, resamples=0, retention=0.4)
    assert loose["best"].set_index("family").loc["task-arithmetic", "setting"] != "VLM alone"
    assert set(loose["best"]["retention"]) == {0.4}
    tuneless = worse.rows[worse.rows["split"] == "test"]
    assert set(tables(tuneless, worse.settings, resamples=0)["best"]["chosen_on"]) == {"test"}


def test_matched(known: dict[str, pd.DataFrame]) -> None:
    found = known["matched"].set_index(["family", "by", "at"])
    assert found.loc[("dare", "strength", 1.0), "skill"] == pytest.approx(0.35)
    # DARE's doses are 1 and 2: at 1 it is its setting of λ 0.5, at 0.5 half of the way to it, at 1.5 between its two.
    assert found.loc[("dare", "dose", 1.0), "skill"] == pytest.approx(0.15)
    assert found.loc[("dare", "dose", 0.5), "vision"] == pytest.approx(0.995)
    assert found.loc[("dare", "dose", 1.5), ["skill", "skill_difference"]].tolist() == pytest.approx(
        [0.25, -0.15]
    )
    plain = found.loc["task-arithmetic"]
    assert np.allclose(plain["skill_difference"], 0)
    assert ("dare", "strength", 1.5) not in found.index


def test_sensitivity_and_scenarios(known: dict[str, pd.DataFrame]) -> None:
    own = known["sensitivity"].set_index("family").loc["task-arithmetic"]
    assert (own["settings"], own["lowest"], own["highest"]) == (3, 0.2, 0.5)
    assert own[["spread", "near", "keep", "both"]].tolist() == pytest.approx([0.3, 1 / 3, 1 / 3, 1 / 3])
    row = known["scenarios"].set_index("how").loc["task-arithmetic λ=1"]
    assert (row["recovered"], row["rank"], row["rank_share"]) == pytest.approx((0.5 / 0.8, 1, 1))


def joined(**scenarios: Swept) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and settings of several scenarios."""
    parts = [
        (s.rows.assign(scenario=name), s.settings.assign(scenario=name)) for name, s in scenarios.items()
    ]
    return tuple(pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))


def test_what_has_no_recovery_has_no_rank() -> None:
    none = TRUTH | {("text oracle", "skill"): 0.0}
    rows, settings = joined(none=made(none), s=made(TRUTH))
    found = tables(rows, settings, resamples=20)["scenarios"].set_index(["how", "scenario"])
    for how in ("task-arithmetic λ=1", "best"):
        assert found.loc[(how, "none"), ["recovered", "rank", "rank_share"]].isna().all()
        assert found.loc[(how, "s"), ["rank", "rank_share"]].tolist() == [1, 1]
    shown = Console(width=200)
    with shown.capture() as text:
        shown.print(cli._scenarios(found.reset_index()))
    assert "nan" not in text.get()


def test_resamples_without_recovery_do_not_count() -> None:
    """An oracle with a single right answer is no better than the VLM alone in a third of the resamples."""
    rare = TRUTH | {("text oracle", "skill"): 1 / 20}
    rows, settings = joined(rare=made(rare, seeds=1, examples=20), s=made(TRUTH, seeds=1, examples=20))
    found = tables(rows, settings, resamples=200)["scenarios"].set_index(["how", "scenario"])
    assert found.loc["best", "rank"].tolist() == [1, 2]
    assert found.loc["best", "rank_share"].tolist() == [1, 1]


@pytest.mark.parametrize("condition", ["skill", "vision"])
def test_choosing_apart_needs_both(condition: str) -> None:
    found = made(TRUTH)
    for lacking in (found.rows["seed"] >= 0, found.rows["seed"] == 1):
        gone = (found.rows["split"] == "tune") & (found.rows["condition"] == condition) & lacking
        best = tables(found.rows[~gone], found.settings, resamples=0)["best"]
        assert set(best["chosen_on"]) == {"test"}
        assert best["tune_skill"].tolist() == best["skill"].tolist()
    assert chosen_apart(found.rows, "test")
    assert not chosen_apart(found.rows, "tune")


def test_front_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 5, (2, 12)) / 4.0
        naive = [
            not any(a >= c and b >= d and (a > c or b > d) for a, b in zip(x, y, strict=True))
            for c, d in zip(x, y, strict=True)
        ]
        assert front(x, y).tolist() == naive


def test_between() -> None:
    points = np.array([0.0, 1.0, 1.0, 3.0])
    for at in (0.0, 0.25, 2.0, 3.0):
        assert between(points, at) @ points == pytest.approx(at)
    assert between(points, 3.0 + 1e-6) @ points == pytest.approx(3.0)
    assert not between(points, 3.1).any()
    assert not between(points, -0.1).any()
