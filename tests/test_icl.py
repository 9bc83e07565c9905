"""In-context learning on shared demonstrations: running them once changes no number."""

import math
from dataclasses import replace

import pytest
import torch
from common import apart, plainly
from families import make

from anchors.analyses.classification import CONTENT_FREE, Classification
from anchors.context import answer, encode, queries, shared_demonstrations
from anchors.errors import AnchorsError
from anchors.icl import jaccard, label_probabilities, loyalties
from anchors.model.language import load
from anchors.study.runner import Sample, measure
from anchors.tasks.drawing import demonstrations
from anchors.tasks.prompts import build


def asked(lm, prompts, context):
    return queries(prompts, len(context.ids), lm.device)


def values(records, condition="none"):
    """By metric, the records of one prompt under a condition."""
    return {r.metric: r.value for r in records if r.condition == condition and r.layer is None}


def test_answers_on_the_shared_context_equal_whole_prompts(lm, make_cell):
    prompts = [d.prompt for d in make_cell().prompts]
    assert len({len(p.ids) for p in prompts}) > 1
    context = encode(lm, shared_demonstrations(prompts))
    together = answer(lm, context, asked(lm, prompts, context))
    for i, prompt in enumerate(prompts):
        whole, _ = plainly(lm, prompt.ids)
        assert apart(together[i], whole) < 1e-5
        alone = answer(lm, context, asked(lm, [prompt], context))
        assert apart(together[i], alone[0]) < 1e-5
    without = answer(lm, None, queries(prompts, 0, lm.device))
    assert apart(together, without) < 1e-5


def test_a_context_may_be_encoded_in_two_steps(lm, make_cell):
    prompts = [d.prompt for d in make_cell().prompts]
    ids = shared_demonstrations(prompts)
    once = encode(lm, ids)
    cut = len(ids) // 2
    twice = encode(lm, ids[cut:], encode(lm, ids[:cut]))
    assert (twice.ids, twice.positions, twice.next) == (ids, tuple(range(len(ids))), len(ids))
    assert (once.ids, once.positions, once.next) == (twice.ids, twice.positions, twice.next)
    for kind in ("keys", "values"):
        for ours, expected in zip(getattr(twice, kind), getattr(once, kind), strict=True):
            assert apart(ours, expected) < 1e-5
    batch = asked(lm, prompts, once)
    assert apart(answer(lm, twice, batch), answer(lm, once, batch)) < 1e-5


def test_keeping_every_token_changes_nothing(lm, make_cell):
    prompts = [d.prompt for d in make_cell().prompts]
    whole = encode(lm, shared_demonstrations(prompts))
    same = whole.keep(range(len(whole.ids)), whole.next)
    batch = asked(lm, prompts, whole)
    assert apart(answer(lm, same, batch), answer(lm, whole, batch)) < 1e-6
    fewer = whole.keep(range(0, len(whole.ids), 2), whole.next)
    assert apart(answer(lm, fewer, batch), answer(lm, whole, batch)) > 1e-4
    assert fewer.bytes * len(whole.ids) == whole.bytes * len(fewer.ids)


def test_answering_leaves_the_context_as_it_was(gpt2, make_cell):
    prompts = [d.prompt for d in make_cell().prompts]
    context = encode(gpt2, shared_demonstrations(prompts))
    before = [k.clone() for k in (*context.keys, *context.values)]
    first = answer(gpt2, context, asked(gpt2, prompts, context))
    encode(gpt2, prompts[0].ids[len(context.ids) :], context)
    assert torch.equal(answer(gpt2, context, asked(gpt2, prompts, context)), first)
    for now, then in zip((*context.keys, *context.values), before, strict=True):
        assert torch.equal(now, then)


def test_nothing_to_keep_is_an_error(gpt2, make_cell):
    context = encode(gpt2, shared_demonstrations([make_cell().prompts[0].prompt]))
    with pytest.raises(AnchorsError, match="No token"):
        context.keep([], 0)


def test_other_demonstrations_are_an_error(make_cell):
    one, other = (make_cell(seed=seed).prompts[0].prompt for seed in (1, 2))
    with pytest.raises(AnchorsError, match="Prompt 2 does not begin"):
        shared_demonstrations([one, one, other])
    with pytest.raises(AnchorsError, match="Prompt 1 does not begin"):
        shared_demonstrations([d.prompt for d in make_cell(fresh=True).prompts])


def test_logits_that_are_not_numbers_are_an_error(tokenizer, make_cell):
    lm = load(make("gpt2", len(tokenizer)), tokenizer=tokenizer, device="cpu")
    lm.model.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(AnchorsError, match=r"example\(s\) \[0, 1\]"):
        answer(lm, None, queries([d.prompt for d in make_cell().prompts[:2]], 0, lm.device))


@pytest.mark.parametrize("name", ["sst2", "trec"])
def test_classification_by_hand(gpt2, make_cell, name):
    cell = make_cell(name, 4)
    analysis = Classification()
    found = analysis.measure(gpt2, analysis.prepare(gpt2, cell), cell.task, cell.prompts)
    for drawn, records in zip(cell.prompts, found, strict=True):
        prompt, own = drawn.prompt, values(records)
        logits, _ = plainly(gpt2, prompt.ids)
        powers = [math.exp(float(logits[i])) for i in prompt.label_ids]
        expected = [p / sum(powers) for p in powers]
        said = [own[f"probability/{label}"] for label in cell.task.labels]
        assert said == pytest.approx(expected, rel=1e-4)
        guess = max(range(len(expected)), key=expected.__getitem__)
        assert own["predicted"] == guess
        assert own["gold"] == prompt.gold
        assert own["accuracy"] == (guess == prompt.gold)
        assert own["loss"] == pytest.approx(-math.log(expected[prompt.gold]), rel=1e-4)


def test_contextual_calibration_by_hand(gpt2, make_cell, tokenizer):
    cell = make_cell("agnews", 6)
    analysis = Classification(calibrate=True)
    state = analysis.prepare(gpt2, cell)
    shown = demonstrations(cell.task, cell.data, cell.how)

    def probabilities(prompt):
        powers = [math.exp(float(plainly(gpt2, prompt.ids)[0][i])) for i in prompt.label_ids]
        return [p / sum(powers) for p in powers]

    empty = [probabilities(build(cell.task, tokenizer, shown, text, None)) for text in CONTENT_FREE]
    favour = [sum(column) / len(empty) for column in zip(*empty, strict=True)]
    said = values(analysis.once(gpt2, state, cell), "calibrated")
    assert list(said.values()) == pytest.approx(favour, rel=1e-4)
    changed = 0
    found = analysis.measure(gpt2, state, cell.task, cell.prompts)
    for drawn, records in zip(cell.prompts, found, strict=True):
        plain, own = values(records), values(records, "calibrated")
        raw = [p / f for p, f in zip(probabilities(drawn.prompt), favour, strict=True)]
        expected = [p / sum(raw) for p in raw]
        assert [own[f"probability/{label}"] for label in cell.task.labels] == pytest.approx(
            expected, rel=1e-4
        )
        assert own["predicted"] == max(range(len(raw)), key=raw.__getitem__)
        changed += own["predicted"] != plain["predicted"]
    assert changed


def test_jaccard_of_sets():
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randperm(12, generator=generator)[:5] for _ in range(20)] for _ in range(2)]
    found = jaccard(*(torch.stack(own) for own in rows))
    for value, one, other in zip(found.tolist(), *rows, strict=True):
        a, b = set(one.tolist()), set(other.tolist())
        assert value == pytest.approx(len(a & b) / len(a | b))


def test_loyalties_by_hand(gpt2, make_cell):
    prompts = [d.prompt for d in make_cell("trec", 8).prompts]
    batch = queries(prompts, 0, "cpu")
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(8, 2000, generator=generator)
    other = one + 0.2 * torch.randn(8, 2000, generator=generator)
    labels = []
    for i, own in enumerate(loyalties(one, other, batch, 10, "c")):
        labels.append(
            one[i, list(prompts[i].label_ids)].argmax() == other[i, list(prompts[i].label_ids)].argmax()
        )
        a, b = (set(torch.argsort(x[i], descending=True)[:10].tolist()) for x in (one, other))
        assert values(own, "c") == pytest.approx(
            {"label_loyalty": float(labels[-1]), "word_loyalty": len(a & b) / len(a | b)}
        )
    assert 0 < sum(labels) < 8


def test_rows_do_not_depend_on_the_batch_size(gpt2, make_cell, tmp_path):
    cell = make_cell("agnews")
    tables = [
        measure(
            gpt2, Classification(calibrate=True), cell.task, cell.data,
            Sample(seeds=(1, 2), examples=7, batch_size=size), out=tmp_path / str(size),
        ).rows
        for size in (1, 3, None)
    ]  # fmt: skip
    key = ["seed", "number", "condition", "metric"]
    first, *others = (t.set_index(key)["value"].sort_index() for t in tables)
    assert first.index.is_unique
    for other in others:
        assert (other.index == first.index).all()
        assert (other - first).abs().max() < 1e-4


def test_a_query_without_a_known_answer_has_no_accuracy_and_no_loss(gpt2, make_cell):
    cell = make_cell(examples=1)
    unknown = replace(cell.prompts[0], prompt=replace(cell.prompts[0].prompt, gold=None))
    analysis = Classification()
    found = analysis.measure(gpt2, analysis.prepare(gpt2, cell), cell.task, [unknown])
    own = values(found[0])
    assert not {"accuracy", "loss"} & own.keys() or math.isnan(own["loss"])
    assert label_probabilities(torch.zeros(1, 2000), queries([unknown.prompt], 0, "cpu")).sum() == 1
