"""The attention that the target pays to the label words, and what it tells about the prediction."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from common import plainly
from families import DENSE
from sklearn.metrics import roc_auc_score

from anchors.analyses.readout import Readout
from anchors.context import answer, queries
from anchors.readout import TargetAttention
from anchors.summaries import aucroc, readout_summary, weighted_auc
from anchors.tasks.drawing import Drawn, demonstrations
from anchors.tasks.prompts import build


def attention(records, labels, layers):
    own = {(r.layer, r.metric): r.value for r in records}
    return torch.tensor([[own[layer, f"attention/{label}"] for label in labels] for layer in range(layers)])


@pytest.mark.parametrize("family", DENSE, indirect=True)
def test_the_probe_reads_the_models_own_attention(lm, make_cell):
    cell = make_cell(shots=2)
    # Short enough for the last label word to stand inside every family's window.
    short = build(cell.task, lm.tokenizer, demonstrations(cell.task, cell.data, cell.how), "so", 0)
    asked = (*cell.prompts, Drawn(-1, short))
    analysis = Readout()
    found = analysis.measure(lm, analysis.prepare(lm, cell), cell.task, asked)
    largest = 0
    for drawn, records in zip(asked, found, strict=True):
        prompt = drawn.prompt
        assert prompt.label_classes.count(0) == 2
        _, matrices = plainly(lm, prompt.ids)
        expected = torch.zeros(lm.n_layers, len(cell.task.labels))
        for layer, head in itertools.product(range(lm.n_layers), range(matrices[0].shape[0])):
            for p, c in zip(prompt.label_positions, prompt.label_classes, strict=True):
                expected[layer, c] += matrices[layer][head, prompt.target, p]
        ours = attention(records, cell.task.labels, lm.n_layers)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
        largest = max(largest, float(expected.max()))
    assert largest > 1e-3


def test_the_probe_changes_no_answer(lm, make_cell):
    from anchors.attention.seam import seam

    cell = make_cell()
    prompts = [d.prompt for d in cell.prompts]
    context, batch = Readout().prepare(lm, cell), queries(prompts, prompts[0].query, lm.device)
    places = torch.tensor([p.label_positions for p in prompts])
    with seam(lm.modules, probes=[TargetAttention(frozenset([1]), batch.target, places)]):
        watched = answer(lm, context, batch)
    assert torch.equal(watched, answer(lm, context, batch))


def random_scores(prompts, layers, classes, ties=False, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.gamma(1.0, size=(prompts, layers, classes))
    predicted = rng.integers(classes, size=prompts)
    scores[np.arange(prompts), :, predicted] += 0.5  # so that the scores tell something
    return np.round(scores, 1) + 0.1 if ties else scores, predicted


@pytest.mark.parametrize("ties", [False, True])
def test_weighted_auc_equals_sklearns(ties):
    scores, predicted = random_scores(40, 1, 2, ties)
    score, positive = scores[:, 0, 1], predicted == 1
    weights = np.concatenate([np.ones((1, 40)), np.random.default_rng(1).integers(4, size=(20, 40))])
    found = weighted_auc(score, positive, weights)
    for value, own in zip(found, weights, strict=True):
        assert value == pytest.approx(roc_auc_score(positive, score, sample_weight=own))
    assert len(set(found)) > 10


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [3, 4, 6])
def test_aucroc_of_several_classes_equals_sklearns(classes, ties):
    scores, predicted = random_scores(60, 3, classes, ties)
    found = aucroc(scores, predicted, np.ones((1, 60)))
    for layer in range(3):
        share = scores[:, layer] / scores[:, layer].sum(-1, keepdims=True)
        expected = roc_auc_score(predicted, share, multi_class="ovo", average="macro")
        assert found[0, layer] == pytest.approx(expected, abs=1e-12)
        assert expected > 0.55


def test_aucroc_of_two_classes_is_that_of_the_second_ones_raw_score():
    scores, predicted = random_scores(50, 2, 2)
    found = aucroc(scores, predicted, np.ones((1, 50)))
    for layer in range(2):
        raw, share = scores[:, layer, 1], scores[:, layer, 1] / scores[:, layer].sum(-1)
        assert found[0, layer] == pytest.approx(roc_auc_score(predicted, raw))
        assert found[0, layer] != pytest.approx(roc_auc_score(predicted, share))


@pytest.mark.parametrize("kept", [(0, 2, 3), (1, 3)])
def test_classes_that_are_never_predicted_are_left_out(kept):
    scores, predicted = random_scores(80, 2, 4)
    scores, predicted = scores[np.isin(predicted, kept)], predicted[np.isin(predicted, kept)]
    found = aucroc(scores, predicted, np.ones((1, len(predicted))))
    for layer in range(2):
        own = scores[:, layer][:, kept]
        expected = (
            roc_auc_score(predicted, own / own.sum(-1, keepdims=True), multi_class="ovo", labels=kept)
            if len(kept) > 2
            else roc_auc_score(predicted == kept[1], own[:, 1])
        )
        assert found[0, layer] == pytest.approx(expected)


def test_one_predicted_class_has_no_aucroc():
    scores, _ = random_scores(10, 2, 3)
    assert np.isnan(aucroc(scores, np.full(10, 1), np.ones((4, 10)))).all()


def test_a_resample_counts_prompts_as_often_as_it_drew_them():
    """Weights against prompts written down as often as they say; a class that was not drawn is left out."""
    scores, predicted = random_scores(24, 2, 3)
    rng = np.random.default_rng(3)
    weights = rng.integers(3, size=(6, 24)).astype(float)
    weights[5, predicted == 2] = 0
    found = aucroc(scores, predicted, weights)
    for own, row in zip(weights[:5], found[:5], strict=True):
        again = np.repeat(np.arange(24), own.astype(int))
        expected = aucroc(scores[again], predicted[again], np.ones((1, len(again))))
        np.testing.assert_allclose(row, expected[0])
    share = scores / scores.sum(-1, keepdims=True)  # over all three: the third was predicted in the sample
    for layer in range(2):
        pairs = []
        for i, j in ((0, 1), (1, 0)):
            both = np.isin(predicted, (i, j)) & (weights[5] > 0)
            own = share[both, layer, i]
            pairs.append(roc_auc_score(predicted[both] == i, own, sample_weight=weights[5][both]))
        assert found[5, layer] == pytest.approx(np.mean(pairs))


def rows_of(scores, predicted, name="t", seeds=1):
    labels = [f"L{c}" for c in range(scores.shape[2])]
    common = {"task": name, "shots": 1, "control": "none", "condition": "none"}
    rows = []
    for n, c in itertools.product(range(len(scores)), range(len(labels))):
        rows += [
            common
            | {
                "seed": n % seeds,
                "number": n // seeds,
                "layer": layer,
                "metric": f"attention/{labels[c]}",
                "value": v,
            }
            for layer, v in enumerate(scores[n, :, c])
        ]
    rows += [
        common
        | {"seed": n % seeds, "number": n // seeds, "layer": None, "metric": "predicted", "value": float(p)}
        for n, p in enumerate(predicted)
    ]
    return pd.DataFrame(rows).astype({"layer": "Int32"})


def test_r_by_hand():
    # Two prompts of each class; AUCROC by layer: 1, 0.5, 0.75.
    second = np.array([[0.1, 0.3, 0.1], [0.2, 0.3, 0.3], [0.8, 0.3, 0.2], [0.9, 0.3, 0.9]])
    scores = np.stack([np.full_like(second, 0.5), second], axis=-1)
    rows = rows_of(np.tile(scores, (10, 1, 1)), [0, 0, 1, 1] * 10)
    table = readout_summary(rows, resamples=50).set_index(["metric", "layer"])
    values = table["value"]
    assert [values["aucroc", layer] for layer in range(3)] == pytest.approx([1, 0.5, 0.75])
    assert [values["r", layer] for layer in range(3)] == pytest.approx([0.5 / 0.75, 0.5 / 0.75, 1])
    assert (table["examples"] == 40).all()
    assert (table["note"] == "").all()
    # Wholly apart, wholly alike, and in between: only the last has something to draw from.
    assert table.loc["aucroc", "interval"].tolist() == ["score", "equal values", "bootstrap"]
    first, again = table.loc[("aucroc", 0)], readout_summary(rows_of(scores, [0, 0, 1, 1]), resamples=50)
    few = again.set_index(["metric", "layer"]).loc[("aucroc", 0)]
    assert (few["value"], few["high"]) == (first["value"], first["high"]) == (1, 1)
    assert few["low"] < 0.6 < 0.8 < first["low"] < 1


def test_r_is_not_defined_beyond_its_denominator():
    """Scores that tell nothing: Σ (AUCROC − 0.5) may as well be 0, and a ratio to it anything."""
    scores = np.random.default_rng(3).random((40, 5, 2))
    table = readout_summary(rows_of(scores, [0, 1] * 20), resamples=200).set_index("metric")
    assert table.loc["aucroc", "value"].notna().all()
    assert table.loc["r", ["value", "low", "high"]].isna().all(axis=None)
    assert table.loc["r", "note"].str.startswith("not defined here: ").all()


def test_an_auc_with_one_class_says_why_it_is_missing():
    scores, _ = random_scores(12, 2, 3)
    table = readout_summary(rows_of(scores, [1] * 12), resamples=20)
    assert table["value"].isna().all()
    assert set(table["note"]) == {"the model predicts one label only: there is no AUC"}


def test_tasks_are_averaged_and_seeds_counted():
    parts, expected = [], []
    for i, classes in enumerate((2, 4)):
        scores, predicted = random_scores(40, 3, classes, seed=i)
        parts.append(rows_of(scores, predicted, f"t{i}", seeds=2))
        halves = [slice(0, 40, 2), slice(1, 40, 2)]
        expected.append(np.mean([aucroc(scores[h], predicted[h], np.ones((1, 20)))[0] for h in halves], 0))
    table = readout_summary(pd.concat(parts), resamples=100)
    mean = table[(table["task"] == "mean") & (table["metric"] == "aucroc")]
    assert mean["value"].tolist() == pytest.approx(np.mean(expected, 0).tolist())
    gain = np.cumsum(np.mean(expected, 0) - 0.5)
    r = table[(table["task"] == "mean") & (table["metric"] == "r")]
    assert r["value"].tolist() == pytest.approx((gain / gain[-1]).tolist())
    assert (mean["low"] < mean["value"]).all()
    assert (mean["value"] < mean["high"]).all()
    assert (table["seeds"] == 2).all()
    assert mean["examples"].tolist() == [80] * 3


def test_one_prompt_has_no_interval():
    scores, _ = random_scores(1, 2, 2)
    assert readout_summary(rows_of(scores, [1]))[["low", "high"]].isna().all(axis=None)
