"""The authors' own numbers for in-context learning, isolation, read-out and compression (shared/conformance/icl.json)."""

import json

import numpy as np
import pytest

from anchors.analyses.classification import Classification
from anchors.analyses.compression import Compression
from anchors.analyses.isolation import Isolation
from anchors.analyses.readout import Readout
from anchors.compression import text_anchor
from anchors.context import answer, encode, queries
from anchors.icl import label_probabilities
from anchors.model.language import load
from anchors.study.runner import Cell
from anchors.summaries import aucroc
from anchors.tasks.data import Data, Example
from anchors.tasks.drawing import Draw, Drawn
from anchors.tasks.prompts import from_text
from anchors.tasks.task import TASKS

CASES = [(model, task) for model in ("tiny-gpt2", "tiny-gptj") for task in ("sst2", "agnews", "trec")]
RULES = {"tiny-gpt2": "restart", "tiny-gptj": "after-last-anchor"}


@pytest.fixture(scope="module")
def models(shared):
    return {name: load(str(shared / "conformance" / name), device="cpu") for name in RULES}


@pytest.fixture(scope="module")
def numbers(shared):
    return json.loads((shared / "conformance" / "icl.json").read_text())


@pytest.fixture(params=CASES, ids="-".join)
def case(request, models, numbers, tmp_path):
    """A model, a cell with the prompts of the file, and the authors' numbers."""
    model, task = request.param
    lm, theirs, spec = models[model], numbers[model][task], TASKS[task]
    prompts = [
        from_text(text, spec, lm.tokenizer, truth=spec.labels[gold])
        for text, gold in zip(theirs["prompts"], theirs["gold"], strict=True)
    ]
    drawn = tuple(Drawn(i, p) for i, p in enumerate(prompts))
    return lm, Cell(spec, None, Draw(fresh=False), drawn, tmp_path), theirs


def measured(analysis, lm, cell):
    """By condition and metric, one number per prompt; layers become a second axis."""
    found = analysis.measure(lm, analysis.prepare(lm, cell), cell.task, cell.prompts)
    values = {}
    for records in found:
        own = {}
        for r in records:
            own.setdefault((r.condition, r.metric), []).append(r.value)
        for key, value in own.items():
            values.setdefault(key, []).append(value)
    return {
        key: np.squeeze(np.array(value), -1 if np.shape(value)[1] == 1 else ())
        for key, value in values.items()
    }


def probabilities(values, task, condition="none"):
    return np.stack([values[condition, f"probability/{label}"] for label in task.labels], axis=-1)


def test_answers(case):
    lm, cell, theirs = case
    values = measured(Classification(), lm, cell)
    ours = probabilities(values, cell.task)
    np.testing.assert_allclose(ours, theirs["label_probs"], atol=1e-4)
    assert np.array_equal(values["none", "gold"], theirs["gold"])
    top = np.sort(ours, axis=-1)
    clear = top[:, -1] - top[:, -2] > 1e-4
    assert clear.sum() > 12
    assert np.array_equal(values["none", "predicted"][clear], np.array(theirs["predicted"])[clear])


def test_isolation(case):
    lm, cell, theirs = case
    values = measured(Isolation(layers=(1, 2), positions=("label",)), lm, cell)
    for name, expected in theirs["isolation"].items():
        condition = f"{name[:-1]}-{name[-1]}/label"
        np.testing.assert_allclose(
            probabilities(values, cell.task, condition), expected["label_probs"], atol=1e-4
        )
        assert values[condition, "label_loyalty"].mean() == pytest.approx(expected["label_loyalty"], abs=1e-6)
        assert values[condition, "word_loyalty"].mean() == pytest.approx(
            expected["word_loyalty@10"], abs=1e-6
        )
    assert min(e["word_loyalty@10"] for e in theirs["isolation"].values()) < 0.9


def test_attention_to_label_words(case):
    """The file says [example][layer][class], but each example's numbers stand there in the order [class][layer].

    So the axes are mislabelled, not transposed: the flat order must be read anew.
    """
    lm, cell, theirs = case
    values = measured(Readout(), lm, cell)
    ours = np.stack([values["none", f"attention/{label}"] for label in cell.task.labels], axis=-1)
    stored = np.array(theirs["target_attention_to_labels"])
    assert ours.shape == stored.shape
    count, layers, classes = stored.shape
    expected = stored.reshape(count, classes, layers).transpose(0, 2, 1)
    np.testing.assert_allclose(ours, expected, rtol=5e-6, atol=1e-6)
    assert np.abs(ours - stored).max() > 1e-3


def test_aucroc_and_r(case):
    """The authors' AUCROC and R were computed on the array as it is stored, mislabelled axes and all.

    They are a test of the two formulas, not of the attention: given the same numbers, ours are the same. Where the
    model predicts one class only, the file has none, and ours is missing.
    """
    _, _, theirs = case
    stored, predicted = np.array(theirs["target_attention_to_labels"]), np.array(theirs["predicted"])
    found = aucroc(stored, predicted, np.ones((1, len(predicted))))[0]
    if not theirs["aucroc"]:
        assert len(set(predicted)) == 1
        assert np.isnan(found).all()
        return
    np.testing.assert_allclose(found, theirs["aucroc"], atol=1e-6)
    gain = np.cumsum(found - 0.5)
    np.testing.assert_allclose(gain / gain[-1], theirs["r"], atol=1e-6)


def test_hidden_anchors(case):
    lm, cell, theirs = case
    rule = next(rule for name, rule in RULES.items() if lm.name.endswith(name))
    values = measured(Compression(methods=("hidden_anchor",), rule=rule), lm, cell)
    expected = theirs["compression"]
    np.testing.assert_allclose(probabilities(values, cell.task), expected["icl_label_probs"], atol=1e-4)
    compare(values, cell, expected["hidden_anchor"], "hidden_anchor")


def compare(values, cell, expected, name):
    np.testing.assert_allclose(probabilities(values, cell.task, name), expected["label_probs"], atol=1e-4)
    for metric, own in (("label_loyalty", "label_loyalty"), ("word_loyalty@5", "word_loyalty")):
        assert values[name, own].mean() == pytest.approx(expected[metric], abs=1e-6)


def test_text_anchors(case):
    """The demonstrations of the file become a set of data whose only draw they are, in their order."""
    lm, cell, theirs = case
    first = theirs["compression"]["text_anchor_prompts"][0]
    prompt = cell.prompts[0].prompt
    query = lm.tokenizer.decode(prompt.ids[prompt.query :])
    train = tuple(Example(f"demonstration {c}", c) for c in prompt.label_classes)
    data = Data(train, (Example("x", 0),), "here")
    order = next(
        seed for seed in range(10_000) if shown_order(cell.task, data, seed) == list(prompt.label_classes)
    )
    text = text_anchor(lm, Cell(cell.task, data, Draw(seed=order, fresh=False), cell.prompts, cell.folder))
    assert lm.tokenizer.decode(text) + query == first
    asked = [d.prompt for d in cell.prompts]
    batch = queries(asked, prompt.query, "cpu")
    logits = answer(lm, encode(lm, text), batch)
    expected = theirs["compression"]["text_anchor"]
    np.testing.assert_allclose(label_probabilities(logits, batch).numpy(), expected["label_probs"], atol=1e-4)
    whole = answer(lm, encode(lm, prompt.ids[: prompt.query]), batch)
    best, plain = (x.topk(5).indices.tolist() for x in (logits, whole))
    word = [len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in zip(best, plain, strict=True)]
    assert np.mean(word) == pytest.approx(expected["word_loyalty@5"], abs=1e-6)
    same = label_probabilities(logits, batch).argmax(-1) == label_probabilities(whole, batch).argmax(-1)
    assert float(same.float().mean()) == pytest.approx(expected["label_loyalty"], abs=1e-6)


def shown_order(task, data, seed):
    from anchors.tasks.drawing import demonstrations

    return [e.label for e in demonstrations(task, data, Draw(seed=seed, fresh=False))]
