"""Confusion foretold from keys, confusion measured, and how well one tells the other."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from common import plainly
from families import DENSE
from sklearn.metrics import roc_auc_score

from anchors.analyses.classification import Classification
from anchors.analyses.diagnosis import Diagnosis
from anchors.attention.seam import seam
from anchors.context import answer, encode, queries
from anchors.diagnosis import TargetQueries, label_keys, predicted_confusion
from anchors.errors import AnchorsError
from anchors.stats import mantel
from anchors.summaries import actual_confusion, diagnosis_summary, sentence


def literal_confusion(vectors, keys, components):
    """Section 3.3, entry by entry: centred singular value decomposition, projected keys, scaled distances."""
    _, singular, directions = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    projected = [[singular[m] * float(directions[m] @ key) for m in range(components)] for key in keys]
    count = len(keys)
    distance = [
        [
            sum((a - b) ** 2 for a, b in zip(projected[i], projected[j], strict=True)) ** 0.5
            for j in range(count)
        ]
        for i in range(count)
    ]
    largest = max(max(row) for row in distance)
    return [[1.0 if i == j else distance[i][j] / largest for j in range(count)] for i in range(count)]


def test_predicted_confusion_equals_the_definition():
    rng = np.random.default_rng(0)
    vectors, keys = rng.normal(size=(30, 12)) * np.arange(1, 13), rng.normal(size=(5, 12))
    found = predicted_confusion(vectors, keys, (1, 3, 10, 99))
    assert set(found) == {1, 3, 10}
    for m, matrix in found.items():
        np.testing.assert_allclose(matrix, literal_confusion(vectors, keys, m), rtol=1e-9)
    assert np.abs(found[1] - found[10]).max() > 0.05


def test_confusion_that_cannot_be_foretold():
    rng = np.random.default_rng(0)
    with pytest.raises(AnchorsError, match="cannot be fitted on 6 queries"):
        predicted_confusion(rng.normal(size=(6, 9)), rng.normal(size=(3, 9)), (7,))
    with pytest.raises(AnchorsError, match="all label words are the same"):
        predicted_confusion(rng.normal(size=(6, 9)), np.ones((3, 9)), (2,))


def test_actual_confusion_equals_sklearns():
    rng = np.random.default_rng(0)
    probabilities, gold = rng.dirichlet(np.ones(4), size=60), rng.integers(4, size=60)
    weights = np.concatenate([np.ones((1, 60)), rng.integers(3, size=(5, 60))])
    found = actual_confusion(probabilities, gold, weights)
    for own, matrix in zip(weights, found, strict=True):
        for i, j in itertools.product(range(4), repeat=2):
            if i == j:
                assert matrix[i, j] == 1
                continue
            both = np.isin(gold, (i, j))
            ratio = probabilities[both, i] / probabilities[both, j]
            expected = roc_auc_score(gold[both] == i, ratio, sample_weight=own[both])
            assert matrix[i, j] == pytest.approx(expected)


def test_a_class_without_prompts_has_no_actual_confusion():
    found = actual_confusion(np.full((4, 3), 1 / 3), np.array([0, 0, 1, 1]), np.ones((1, 4)))[0]
    assert found[0, 1] == 0.5
    assert np.isnan([found[0, 2], found[1, 2]]).all()


def test_mantel_tries_every_order_of_three_labels():
    one = np.array([[1.0, 0.1, 0.5], [0.1, 1.0, 0.9], [0.5, 0.9, 1.0]])
    # Six orders of three labels are the six orders of their three pairs: one of them agrees entirely.
    rho, p = mantel(one, one)
    assert rho == pytest.approx(1)
    assert p == pytest.approx(1 / 6)
    # Pairs ranked 1, 2, 3 against 1, 3, 2: correlation 0.5, reached by the orders with correlation 0.5 (two) and 1.
    other = np.array([[1.0, 0.1, 0.9], [0.1, 1.0, 0.5], [0.9, 0.5, 1.0]])
    rho, p = mantel(one, other)
    assert rho == pytest.approx(0.5)
    assert p == pytest.approx(3 / 6)
    assert mantel(one, 2 - one)[1] == 1


def test_mantel_of_many_labels_samples_the_orders():
    rng = np.random.default_rng(0)
    one = rng.random((9, 9))
    one = one + one.T
    rho, p = mantel(one, one, permutations=199)
    assert rho == pytest.approx(1)
    assert p == 1 / 200
    noise = rng.random((9, 9))
    assert 0.01 < mantel(one, noise + noise.T, permutations=199)[1] < 1


def test_mantel_of_matrices_that_do_not_vary():
    assert np.isnan(mantel(np.ones((3, 3)), np.random.default_rng(0).random((3, 3)))).all()
    assert np.isnan(mantel(np.ones((2, 2)), np.ones((2, 2)))).all()


@pytest.mark.parametrize("family", DENSE, indirect=True)
def test_label_keys_are_as_wide_as_the_queries(lm, make_cell):
    """Each query head finds, at its own place, the key that it reads: the mean over the label words of a class."""
    prompt = make_cell(shots=2).prompts[0].prompt
    context = encode(lm, prompt.ids[: prompt.query])
    keys = context.keys[1]
    heads, dim = lm.model.config.get_text_config().num_attention_heads, keys.shape[-1]
    found = label_keys(keys, heads // keys.shape[1], prompt.label_positions, prompt.label_classes)
    assert found.shape == (2, heads * dim)
    for c, head in itertools.product(range(2), range(heads)):
        own = [p for p, k in zip(prompt.label_positions, prompt.label_classes, strict=True) if k == c]
        mean = sum(keys[0, head * keys.shape[1] // heads, p] for p in own) / len(own)
        torch.testing.assert_close(found[c, head * dim : (head + 1) * dim], mean)


@pytest.mark.parametrize("family", DENSE, indirect=True)
def test_queries_and_keys_are_those_of_the_models_attention(lm, family, make_cell):
    """log A(q, i) is ⟨q, k_i⟩ times the scale, up to a constant of the row, in transformers' own attention."""
    prompts = [d.prompt for d in make_cell(shots=2).prompts]
    start = prompts[0].query
    context = encode(lm, prompts[0].ids[:start])
    batch = queries(prompts, start, lm.device)
    layer = 1
    probe = TargetQueries(frozenset([layer]), batch.target)
    with seam(lm.modules, probes=[probe]):
        answer(lm, context, batch)
    heads, dim = lm.model.config.get_text_config().num_attention_heads, context.keys[layer].shape[-1]
    groups = heads // context.keys[layer].shape[1]
    cap = getattr(lm.model.config, "attn_logit_softcapping", None)
    seen = 0
    for i, prompt in enumerate(prompts):
        _, matrices = plainly(lm, prompt.ids)
        for head in range(heads):
            row = matrices[layer][head, prompt.target, :start].double()
            visible = row > 0
            q = probe.found[i, head * dim : (head + 1) * dim].double()
            products = context.keys[layer][0, head // groups, visible].double() @ q
            if visible.sum() < 3:
                continue
            scale = 8**-0.5 if cap else None
            scores = cap * torch.tanh(products * scale / cap) if cap else products
            corr = torch.corrcoef(torch.stack([scores, row[visible].log()]))[0, 1]
            assert corr > 0.9999
            seen += 1
    assert seen or "window" in family


def test_diagnosis_by_hand(gpt2, make_cell):
    cell = make_cell("agnews", 12)
    analysis = Diagnosis(components=(2, 5), layer=2)
    state = analysis.prepare(gpt2, cell)
    prompts = [d.prompt for d in cell.prompts]
    vanilla = Classification()
    plain = vanilla.measure(gpt2, vanilla.prepare(gpt2, cell), cell.task, cell.prompts)
    found = analysis.measure(gpt2, state, cell.task, cell.prompts[3:7])
    for own, expected in zip(found, plain[3:7], strict=True):
        assert [(r.metric, r.condition) for r in own] == [(r.metric, r.condition) for r in expected]
        assert [r.value for r in own] == pytest.approx([r.value for r in expected], rel=1e-4)
    # GPT-2's queries and keys, from the hidden states that transformers returns.
    block, vectors = gpt2.model.transformer.h[2], []
    for prompt in prompts:
        with torch.no_grad():
            hidden = gpt2.model.transformer(
                torch.tensor([prompt.ids]), output_hidden_states=True
            ).hidden_states[2]
            mixed = block.attn.c_attn(block.ln_1(hidden))[0].double().numpy()
        vectors.append(mixed[prompt.target, :32])
    keys = [mixed[prompts[0].label_positions[prompts[0].label_classes.index(c)], 32:64] for c in range(4)]
    said = analysis.once(gpt2, state, cell)
    assert len(said) == 2 * 6
    for m in (2, 5):
        expected = literal_confusion(np.array(vectors), np.array(keys), m)
        for i, j in itertools.combinations(range(4), 2):
            name = f"predicted_confusion/{cell.task.labels[i]}/{cell.task.labels[j]}"
            (value,) = (r.value for r in said if r.metric == name and r.condition == f"components-{m}")
            assert value == pytest.approx(expected[i][j], rel=1e-3)


def test_the_layer_two_thirds_up_unless_named(gpt2):
    assert Diagnosis().depth(gpt2) == 2
    assert Diagnosis(layer=0).depth(gpt2) == 0
    with pytest.raises(AnchorsError, match="no layer 3"):
        Diagnosis(layer=3).depth(gpt2)
    with pytest.raises(AnchorsError):
        Diagnosis(components=(0,))


def test_summary_of_a_diagnosis():
    """Both seeds count; the pair with the smallest AUC is the one the sentence names."""
    rng = np.random.default_rng(0)
    labels, rows = ["A", "B", "C"], []
    common = {"task": "t", "shots": 1, "control": "none", "layer": None}
    every, golds = [], []
    for seed, number in itertools.product((1, 2), range(30)):
        gold = number % 3
        p = rng.dirichlet(np.ones(3) + 4 * np.eye(3)[gold] * [0.2, 0.2, 3][gold])
        every.append(p)
        golds.append(gold)
        unit = common | {"seed": seed, "number": number, "example": number, "condition": "none"}
        rows += [unit | {"metric": f"probability/{x}", "value": v} for x, v in zip(labels, p, strict=True)]
        rows.append(unit | {"metric": "gold", "value": float(gold)})
    foretold = {("A", "B"): (0.1, 0.3), ("A", "C"): (1.0, 0.8), ("B", "C"): (0.9, 1.0)}
    for (one, other), pair in foretold.items():
        rows += [
            common
            | {"seed": seed, "number": -1, "condition": "components-4", "value": value}
            | {"metric": f"predicted_confusion/{one}/{other}"}
            for seed, value in zip((1, 2), pair, strict=True)
        ]
    pairs, agreement = diagnosis_summary(pd.DataFrame(rows), resamples=200)
    table = pairs.set_index(["one", "other"])
    halves = [slice(0, 30), slice(30, 60)]
    each = [actual_confusion(np.array(every)[h], np.array(golds)[h], np.ones((1, 30)))[0] for h in halves]
    actual = np.mean(each, 0)
    for (one, other), pair in foretold.items():
        assert table.loc[(one, other), "predicted"] == pytest.approx(np.mean(pair))
        assert table.loc[(one, other), "actual"] == pytest.approx(
            actual[labels.index(one), labels.index(other)]
        )
        assert (
            table.loc[(one, other), "low"]
            <= table.loc[(one, other), "actual"]
            <= table.loc[(one, other), "high"]
        )
    assert agreement["examples"].tolist() == [60]
    assert agreement["seeds"].tolist() == [2]
    worst = table["actual"].idxmin()
    assert worst == ("A", "B")
    said = sentence(pairs, agreement, "components-4")
    assert said.startswith("A and B are confused most")
    assert "texts: 10 of A and 10 of B" in said  # the same ones in both seeds
    assert "Caution" not in said


def of_two_labels(golds: list[int], right: list[bool]) -> pd.DataFrame:
    """Rows of one seed with two labels; a right answer is sure of itself, a wrong one is as sure of the other label."""
    facts = {"task": "t", "shots": 1, "control": "none", "layer": None, "seed": 1}
    rows = [
        facts | {"number": -1, "condition": "components-4", "metric": "predicted_confusion/A/B", "value": 1.0}
    ]
    for number, (gold, good) in enumerate(zip(golds, right, strict=True)):
        p = (0.9 if gold == 0 else 0.1) if good else (0.1 if gold == 0 else 0.9)
        for metric, value in (("probability/A", p), ("probability/B", 1 - p), ("gold", float(gold))):
            unit = {
                "number": number,
                "example": number,
                "condition": "none",
                "metric": metric,
                "value": value,
            }
            rows.append(facts | unit)
    return pd.DataFrame(rows)


def test_a_sentence_that_rests_on_few_texts_says_so():
    pairs, agreement = diagnosis_summary(of_two_labels([0] + [1] * 12, [True] * 13), resamples=50)
    row = pairs.iloc[0]
    assert (row["one_texts"], row["other_texts"], row["actual"], row["interval"]) == (1, 12, 1.0, "score")
    assert row["low"] < 0.7
    assert row["high"] == 1
    said = sentence(pairs, agreement)
    assert "texts: 1 of A and 12 of B" in said
    assert "Caution: with fewer than 10 texts of A," in said
    enough, agreement = diagnosis_summary(of_two_labels([0] * 10 + [1] * 10, [True] * 20), resamples=50)
    assert "Caution" not in sentence(enough, agreement)
    assert row["low"] < enough.iloc[0]["low"] < 1


def test_a_pair_without_texts_says_which():
    pairs, agreement = diagnosis_summary(of_two_labels([1] * 4, [True] * 4), resamples=20)
    assert pairs["note"].tolist() == ["no text is A"]
    assert np.isnan(pairs["actual"][0])
    assert "nothing is known" in sentence(pairs, agreement)
