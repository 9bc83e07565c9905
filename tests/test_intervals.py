"""Intervals that know how few examples they rest on, against statsmodels' formulas by hand and simulation."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rows import classified, isolated, rows

from anchors.cli.common import caption_of, estimate_of, summary_table
from anchors.intervals import auc_interval, interval, method, paired_gap, wilson
from anchors.stats import baselines, resampling, summarise
from anchors.summaries import classification_summary, marked

Z = 1.959963984540054


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=50, deadline=None)
def test_wilsons_interval_solves_its_equation(counts):
    """Its bounds are where |p − k/n| = z √(p (1 − p) / n)."""
    right, n = counts
    low, high = wilson(right / n, n)
    for bound in (low, high):
        assert abs(bound - right / n) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / n), abs=1e-7)
    assert 0 <= low <= right / n + 1e-12
    assert right / n - 1e-12 <= high <= 1
    assert high - low > 0.9 / (n + Z**2)


@given(st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_the_interval_of_an_auc_narrows_with_both_classes(m, n):
    low, high = auc_interval(1.0, m, n)
    assert high == 1
    assert 0 <= low < auc_interval(1.0, m + 1, n)[0] < 1
    mirrored = auc_interval(0.0, m, n)
    assert mirrored == pytest.approx((0, 1 - auc_interval(1.0, n, m)[0]), abs=1e-6)
    shared = (m - 1) * (1 - low) / (2 - low) + (n - 1) * low / (1 + low)
    assert (1 - low) ** 2 == pytest.approx(Z**2 * low * (1 - low) * (1 + shared) / (m * n), rel=1e-4)


def test_an_auc_of_one_excludes_what_would_hardly_give_it():
    """Normal scores whose AUC is the lower bound are wholly apart in at most a few of a hundred samples."""
    rng = np.random.default_rng(0)
    low, _ = auc_interval(1.0, 6, 8)
    from scipy.stats import norm

    shift = math.sqrt(2) * norm.ppf(low)
    apart = np.mean([rng.normal(shift, 1, 6).min() > rng.normal(0, 1, 8).max() for _ in range(4000)])
    assert 0.001 < apart < 0.08


def test_a_bootstrap_without_variation_is_no_interval():
    units = pd.DataFrame({"seed": 1, "number": range(3)})
    weights = resampling(units)
    data = np.array([[1.0, 0.0, 1.0, 0.3], [1, 0, 0, 0.3], [1, 0, 1, 0.3]])
    samples = weights @ data / weights.sum(1, keepdims=True)
    counts = np.array([3, 3, 3, np.nan])
    value, low, high = interval(samples, count=counts)
    assert list(method(samples, counts)) == ["Wilson", "Wilson", "bootstrap", "equal values"]
    # Of 3 out of 3: n / (n + z²).
    assert (low[0], high[0]) == (pytest.approx(3 / (3 + Z**2)), 1)
    assert (low[1], high[1]) == (0, pytest.approx(Z**2 / (3 + Z**2)))
    assert np.isnan([low[3], high[3]]).all()
    assert value.tolist() == pytest.approx([1, 0, 2 / 3, 0.3])
    bare = interval(samples)
    assert np.isnan(bare[1][[0, 1, 3]]).all()  # nobody says that these are proportions
    assert list(method(samples[:1], counts)) == [""] * 4


def test_a_difference_that_is_the_same_on_every_prompt():
    most = Z**2 / (5 + Z**2)
    assert paired_gap(0.0, 5) == pytest.approx((-most, most))
    assert paired_gap(1.0, 5) == pytest.approx((1 - 2 * most, 1))
    assert paired_gap(-1.0, 5) == pytest.approx((-1, 2 * most - 1))


def outcomes(right, condition="none", gold=(0, 0, 1), task="t"):
    found = []
    for n, (good, g) in enumerate(zip(right, gold, strict=True)):
        found += [(n, condition, None, f"probability/{label}", 1 / 3) for label in "abc"]
        found += [(n, condition, None, "gold", g), (n, condition, None, "accuracy", good)]
        found += [(n, condition, None, "loss", 0.5)]
    return rows(found, task)


def test_an_accuracy_of_one_at_three_prompts():
    table = summarise(
        pd.concat([outcomes([1, 1, 1]), outcomes([1, 1, 1], "c")]), ("accuracy", "loss"), baseline="none"
    ).set_index(["condition", "metric"])
    accuracy, loss = table.loc[("c", "accuracy")], table.loc[("c", "loss")]
    assert (accuracy["value"], accuracy["high"], accuracy["interval"]) == (1, 1, "Wilson")
    assert accuracy["low"] == pytest.approx(0.4385, abs=1e-4)
    assert accuracy["difference"] == 0
    assert (accuracy["difference_low"], accuracy["difference_high"]) == pytest.approx(
        (-0.5615, 0.5615), abs=1e-4
    )
    assert loss["interval"] == loss["difference_interval"] == "equal values"
    assert np.isnan([loss["low"], loss["difference_high"]]).all()
    assert estimate_of(accuracy) == "1.00 [.44, 1.00]"
    assert estimate_of(loss) == ".50 (3 equal)"


def test_chance_and_majority_stand_beside_an_accuracy_and_nothing_else():
    both = pd.concat([outcomes([1, 0, 1]), outcomes([1, 0, 0], gold=(2, 2, 2), task="u")])
    known = baselines(both).set_index("task")
    assert known.loc["t", ["chance", "majority"]].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert known.loc["u", ["chance", "majority"]].tolist() == pytest.approx([1 / 3, 1])
    table = summarise(both, ("accuracy", "loss"), mean=True).set_index(["task", "metric"])
    assert table.loc[("t", "accuracy"), "majority"] == pytest.approx(2 / 3)
    assert table.loc[("mean", "accuracy"), ["chance", "majority"]].tolist() == pytest.approx([1 / 3, 5 / 6])
    assert table.xs("loss", level=1)[["chance", "majority"]].isna().all(axis=None)
    assert "accuracy by chance .33, of always naming the most frequent class .67" in caption_of(
        table.xs("t", level=0)
    )


def test_the_majority_counts_every_seed_and_each_prompt_once():
    found = baselines(rows(classified("xy", prompts=9)))
    assert found["majority"].tolist() == pytest.approx([5 / 9])  # gold is n % 2


def test_recall_of_a_label_with_one_prompt_is_hardly_known():
    table = classification_summary(outcomes([1, 1, 1]).pipe(lambda t: pd.concat([t, said(t)])))["classes"]
    found = table.set_index(["metric", "label"])
    b = found.loc[("recall", "b")]
    assert (b["value"], b["prompts"], b["interval"]) == (1, 1, "Wilson")
    assert (b["low"], b["high"]) == (pytest.approx(1 / (1 + Z**2)), 1)
    assert found.loc[("recall", "a"), "low"] == pytest.approx(2 / (2 + Z**2))
    c = found.loc[("precision", "c")]
    assert (c["prompts"], c["interval"]) == (0, "")
    assert np.isnan(c["value"])


def said(table):
    """As predictions, what is gold."""
    return table[table["metric"] == "gold"].assign(metric="predicted")


def test_a_condition_that_changes_nothing_is_marked():
    """Below twice the arithmetic error on every prompt, a difference is none."""
    base, far = outcomes([1, 0, 1]), outcomes([1, 0, 1], "far")
    near = outcomes([1, 0, 1], "near")
    far.loc[(far["metric"] == "loss") & (far["number"] == 1), "value"] += 1e-3
    near.loc[near["metric"] == "loss", "value"] += 1e-6
    table = pd.concat([base, near, far])
    tables = classification_summary(pd.concat([table, *(said(x) for x in (base, near, far))]))
    found = marked(tables, {"classify": table}, 1e-6)["summary"].set_index(["condition", "metric"])
    assert found["indistinct"].to_dict() == {
        (c, m): c == "near" for c in ("none", "near", "far") for m in ("accuracy", "loss")
    }
    shown = summary_table(found.reset_index(), ["accuracy", "loss"], "t")
    cells = {row[0]: row[-1] for row in zip(*(column._cells for column in shown.columns), strict=True)}
    assert cells["near"].startswith("≈ ")
    assert not cells["far"].startswith("≈")
    assert "≈: the loss differs" in shown.below
    assert marked(tables, {"classify": table}, None) is tables


def test_old_rows_without_what_an_accuracy_is_compared_with():
    table = summarise(rows(isolated()), baseline="none")
    assert table[["chance", "majority"]].isna().all(axis=None)
