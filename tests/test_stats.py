"""Weights of the paired bootstrap, and what the tables make of them."""

import itertools

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from anchors.errors import AnchorsError
from anchors.intervals import interval
from anchors.stats import resampling, summarise, within_seeds
from anchors.summaries import (
    classification_summary,
    compression_summary,
    reweighting_summary,
    speed_summary,
    weighted_auc,
)


def units(*sizes):
    return pd.DataFrame([(seed, n) for seed, size in enumerate(sizes, 40) for n in range(size)], columns=["seed", "number"])  # fmt: skip


def rows_of(values, condition="none", metric="accuracy", layer=None, task="t"):
    """values: by seed, one number per prompt."""
    table = [
        (task, 1, "none", "tiny", seed, number, number, condition, layer, metric, value)
        for seed, own in values.items()
        for number, value in enumerate(own)
    ]
    columns = ["task", "shots", "control", "model", "seed", "number", "example", "condition", "layer", "metric", "value"]  # fmt: skip
    return pd.DataFrame(table, columns=columns).astype({"layer": "Int32", "value": float})


def test_a_resample_draws_seeds_and_then_their_prompts():
    sizes = (5, 9, 3)
    table = units(*sizes)
    weights = resampling(table, 400, seed=1)
    assert (weights[0] == 1).all()
    assert np.array_equal(weights, resampling(table, 400, seed=1))
    assert not np.array_equal(weights, resampling(table, 400, seed=2))
    times = np.stack(
        [weights[:, (table["seed"] == seed).to_numpy()].sum(1) / size for seed, size in enumerate(sizes, 40)],
        1,
    )
    assert (times == times.astype(int)).all()
    assert (times.sum(1) == 3).all()
    assert (times[1:] == 0).any()
    assert (times[1:] == 2).any()
    assert times[1:].mean(0) == pytest.approx(1, abs=0.15)
    assert weights[1:].mean(0) == pytest.approx(1, abs=0.35)
    assert (weights >= 0).all()


def test_one_seed_resamples_its_prompts_only():
    weights = resampling(units(12), 50)
    assert (weights.sum(1) == 12).all()
    assert len(np.unique(weights, axis=0)) > 45


def test_the_order_of_the_rows_does_not_mix_up_seeds():
    table = units(4, 6)
    shuffled = table.sample(frac=1, random_state=0).reset_index(drop=True)
    weights = resampling(shuffled, 200)
    totals = np.stack(
        [weights[:, (shuffled["seed"] == s).to_numpy()].sum(1) / n for s, n in ((40, 4), (41, 6))], 1
    )
    assert (totals.sum(1) == 2).all()
    assert (totals == totals.astype(int)).all()


def test_the_interval_is_between_the_resamples():
    samples = np.concatenate([[0.3], np.arange(101)])[:, None]
    assert [float(x[0]) for x in interval(samples, 0.9)] == pytest.approx([0.3, 5, 95])
    assert np.isnan(interval(samples[:1])[1:]).all()


def test_differences_are_paired():
    """A gap that hardly varies is narrow, however much the prompts differ; one that is constant says so."""
    rng = np.random.default_rng(0)
    base = {1: rng.normal(0, 5, 20), 2: rng.normal(3, 5, 20)}
    near = {s: v + 0.5 + 1e-7 * rng.normal(size=20) for s, v in base.items()}
    rows = pd.concat([rows_of(base), rows_of(near, "changed")])
    table = summarise(rows, baseline="none", resamples=200).set_index("condition")
    mean = np.mean([*base[1], *base[2]])
    assert table.loc["none", "value"] == pytest.approx(mean)
    assert table.loc["changed", "value"] == pytest.approx(mean + 0.5)
    own = table.loc["changed", ["difference", "difference_low", "difference_high"]].astype(float)
    assert own.tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert table.loc["none", ["difference", "difference_low", "difference_high"]].isna().all()
    assert table.loc["changed", "high"] - table.loc["changed", "low"] > 1
    assert (table["examples"] == 40).all()
    assert (table["seeds"] == 2).all()
    rows = pd.concat([rows_of(base), rows_of({s: v + 0.5 for s, v in base.items()}, "changed")])
    constant = summarise(rows, baseline="none", resamples=200).set_index("condition").loc["changed"]
    assert constant["difference"] == pytest.approx(0.5)
    assert np.isnan([constant["difference_low"], constant["difference_high"]]).all()
    assert (constant["interval"], constant["difference_interval"]) == ("bootstrap", "equal values")


def test_layers_metrics_and_tasks_stay_apart():
    values = {"loss": 1.0, "accuracy": 2.0}
    rows = pd.concat(
        rows_of({1: [base + 10 * layer + (condition == "c"), 0]}, condition, metric, layer, task)
        for (metric, base), layer, condition, task in itertools.product(
            values.items(), (0, 1), ("none", "c"), "ab"
        )
    )
    table = summarise(rows, tuple(values), baseline="none", resamples=20)
    assert len(table) == 16
    for row in table.itertuples():
        expected = (values[row.metric] + 10 * row.layer + (row.condition == "c")) / 2
        assert row.value == pytest.approx(expected)
        assert np.isnan(row.difference) if row.condition == "none" else row.difference == pytest.approx(0.5)


def test_seed_level_rows_do_not_enter_the_means():
    rows = rows_of({1: [1, 0, 1, 0]})
    whole = rows.iloc[:1].assign(number=-1, value=100.0)
    assert summarise(pd.concat([rows, whole]), resamples=10)["value"].tolist() == [0.5]


def test_one_prompt_has_no_interval():
    rows = pd.concat([rows_of({1: [1.0]}), rows_of({1: [0.0]}, "c")])
    table = summarise(rows, baseline="none").set_index("condition")
    assert table[["low", "high", "difference_low", "difference_high"]].isna().all(axis=None)
    assert table.loc["c", "difference"] == -1


def test_prompts_that_lack_a_condition_are_an_error():
    rows = pd.concat([rows_of({1: [1, 0, 1]}), rows_of({1: [1, 0]}, "c")])
    with pytest.raises(AnchorsError, match="1 of 3 prompts of t lack"):
        summarise(rows, baseline="none")
    kept = summarise(rows, baseline="none", missing="leave out")
    assert kept["examples"].tolist() == [2, 2]
    assert kept["value"].tolist() == [0.5, 0.5]
    with pytest.raises(AnchorsError, match="none of the metrics"):
        summarise(rows, ("loss",))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits, widths = [], []
    for _ in range(100):
        base = rng.binomial(1, 0.7, 60).astype(float)
        other = np.where(rng.random(60) < 0.3, rng.binomial(1, 0.2, 60), base)
        rows = pd.concat([rows_of({1: base}), rows_of({1: other}, "c")])
        table = summarise(rows, baseline="none", resamples=200).set_index("condition")
        gap = 0.3 * 0.2 - 0.3 * 0.7
        own = table.loc["c"]
        hits.append(
            (
                table.loc["none", "low"] <= 0.7 <= table.loc["none", "high"],
                own["difference_low"] <= gap <= own["difference_high"],
            )
        )
        widths.append(table.loc["none", "high"] - table.loc["none", "low"])
    covered = np.mean(hits, 0)
    assert ((covered > 0.88) & (covered < 0.99)).all(), covered
    assert np.mean(widths) == pytest.approx(2 * 1.96 * (0.7 * 0.3 / 60) ** 0.5, rel=0.1)


def test_class_scores_are_sklearns():
    rng = np.random.default_rng(0)
    gold, said = rng.integers(3, size=(2, 50))
    said = np.where(rng.random(50) < 0.5, gold, said)
    labels = ["A", "B", "C"]
    parts = [
        rows_of({1: gold}, metric="gold"),
        rows_of({1: said}, metric="predicted"),
        rows_of({1: gold == said}),
        rows_of({1: rng.random(50)}, metric="loss"),
        *(rows_of({1: rng.random(50)}, metric=f"probability/{x}") for x in labels),
    ]
    tables = classification_summary(pd.concat(parts))
    expected = precision_recall_fscore_support(gold, said)
    found = tables["classes"].set_index(["metric", "label"])
    for name, own in zip(("precision", "recall", "f1"), expected, strict=False):
        for label, value in zip(labels, own, strict=True):
            row = found.loc[(name, label)]
            assert row["value"] == pytest.approx(value)
            assert row["low"] < row["value"] < row["high"]
    counts = tables["confusion"].pivot_table(index="gold", columns="predicted", values="prompts")
    assert np.array_equal(counts.to_numpy(), confusion_matrix(gold, said))
    accuracy = tables["summary"].set_index("metric").loc["accuracy"]
    assert accuracy["value"] == pytest.approx((gold == said).mean())


def test_random_draws_are_averaged_and_the_best_of_each_seed_kept():
    loyal = {"00": {1: [1, 1, 0, 0], 2: [0, 0, 0, 1]}, "01": {1: [0, 0, 0, 1], 2: [1, 1, 1, 0]}}
    words = {"00": {1: [0.1] * 4, 2: [0.2] * 4}, "01": {1: [0.3] * 4, 2: [0.6] * 4}}
    parts = []
    for draw in loyal:
        name = f"hidden_random/{draw}"
        parts += [
            rows_of(loyal[draw], name, "label_loyalty"),
            rows_of(words[draw], name, "word_loyalty"),
            rows_of(loyal[draw], name),
        ]
    parts.append(rows_of({1: [1, 0, 1, 0], 2: [0, 1, 1, 1]}))
    sizes = rows_of({1: [0.0], 2: [0.0]}, "hidden_anchor", "kept_tokens").assign(
        number=-1, value=[10.0, 14.0]
    )
    tables = compression_summary(pd.concat([*parts, sizes]))
    found = tables["summary"].set_index(["condition", "metric"])["value"]
    assert found["hidden_random", "label_loyalty"] == pytest.approx(7 / 16)
    assert found["hidden_random", "word_loyalty"] == pytest.approx(0.3)
    # The best by label loyalty: draw 00 of seed 1 and draw 01 of seed 2.
    assert found["hidden_random_top", "label_loyalty"] == pytest.approx(5 / 8)
    assert found["hidden_random_top", "word_loyalty"] == pytest.approx((0.1 + 0.6) / 2)
    assert not [c for c, _ in found.index if "/" in c]
    assert tables["sizes"]["value"].tolist() == [12]


def test_speed_up_is_the_ratio_of_total_times():
    vanilla, fast = {1: [4.0, 2.0, 6.0]}, {1: [1.0, 1.0, 1.0]}
    parts = [rows_of(vanilla, "none", "seconds"), rows_of(fast, "hidden_anchor", "seconds")]
    parts.append(rows_of({1: [0.0, 1.0, 2.0]}, "none", "batch"))
    for name, value in (("demonstration_tokens", 90.0), ("input_tokens", 10.0), ("kept_tokens", 15.0)):
        parts.append(rows_of({1: [value]}, "none", name).assign(number=-1))
    (row,) = speed_summary(pd.concat(parts))["summary"].itertuples()
    assert row.value == pytest.approx(4)
    assert row.limit == pytest.approx(100 / 25)
    assert 2 <= row.low <= 4 <= row.high <= 6
    assert row.seconds == 1
    assert row.bound == pytest.approx(10)
    assert (row.examples, row.seeds) == (3, 1)


def test_prompts_of_a_batch_count_as_one_timing():
    """Forty prompts timed in two batches are two timings: the interval reaches from one to the other."""
    vanilla, batch = {1: [2.0] * 20 + [6.0] * 20}, {1: [0.0] * 20 + [20.0] * 20}
    parts = [rows_of(vanilla, "none", "seconds"), rows_of({1: [1.0] * 40}, "hidden_anchor", "seconds")]
    parts.append(rows_of(batch, "none", "batch"))
    for name, value in (("demonstration_tokens", 90.0), ("input_tokens", 10.0), ("kept_tokens", 15.0)):
        parts.append(rows_of({1: [value]}, "none", name).assign(number=-1))
    (row,) = speed_summary(pd.concat(parts))["summary"].itertuples()
    assert (row.value, row.low, row.high) == (4, 2, 6)


def test_rows_of_two_models_are_refused():
    both = pd.concat([rows_of({1: [1, 0]}).assign(model="one"), rows_of({1: [0, 0]}).assign(model="other")])
    with pytest.raises(AnchorsError, match=r"several models.*one.*other"):
        summarise(both)


def test_the_mean_over_tasks_weighs_each_alike_whatever_their_sizes():
    parts = [rows_of({1: [1, 1, 1, 1], 2: [1, 0, 1, 1]}), rows_of({1: [0, 0], 2: [0, 1]}).assign(task="u")]
    table = summarise(pd.concat(parts), mean=True).set_index("task")
    assert table.loc["mean", "value"] == pytest.approx((7 / 8 + 1 / 4) / 2)
    assert table.loc["mean", "examples"] == 12
    assert table.loc["mean", "low"] < table.loc["mean", "value"] < table.loc["mean", "high"]


def test_a_statistic_within_seeds_never_compares_prompts_of_two_seeds():
    """Two seeds, perfect each, with shifted scores: pooled, their AUC would be far from 1."""
    score = np.concatenate([np.linspace(0, 1, 10), 5 + np.linspace(0, 1, 10)])
    positive = np.concatenate([np.arange(10) >= 8, np.arange(10) >= 8])
    units = pd.DataFrame({"seed": np.repeat([1, 2], 10), "number": np.tile(np.arange(10), 2)})
    weights = resampling(units, 50)
    found = within_seeds(units, weights, lambda own, w: weighted_auc(score[own], positive[own], w))
    assert (found[~np.isnan(found)] == 1).all()
    assert found[0] == 1
    assert weighted_auc(score, positive, weights)[0] < 0.8


def test_beta_is_averaged_over_seeds():
    parts = [
        rows_of({1: [1, 0]}),
        rows_of({1: [1, 1]}, "reweighted"),
        rows_of({1: [0.4, 0.2]}, metric="loss"),
    ]
    parts.append(rows_of({1: [0.1, 0.1]}, "reweighted", "loss"))
    for seed, layer, head, label in itertools.product((1, 2), (0, 1), (0, 1), "AB"):
        value = seed + 10 * layer + 100 * head + 1000 * (label == "B")
        own = rows_of({seed: [value]}, "reweighted", f"beta/{label}/{head}", layer)
        parts.append(own.assign(number=-1))
    tables = reweighting_summary(pd.concat(parts))
    beta = tables["beta"].set_index(["label", "layer", "head"])["value"]
    for (label, layer, head), value in beta.items():
        assert value == 1.5 + 10 * layer + 100 * head + 1000 * (label == "B")
    assert len(beta) == 8
    change = tables["summary"].set_index(["condition", "metric"])["difference"]
    assert change["reweighted", "accuracy"] == 0.5
    assert change["reweighted", "loss"] == pytest.approx(-0.2)
