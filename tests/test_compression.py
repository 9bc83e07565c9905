"""Anchors kept, text dropped: which tokens stay, what the test input sees, and the same through `generate`."""

import numpy as np
import pytest
import torch
from common import apart, plainly
from families import DENSE, make

from anchors.analyses.classification import Classification
from anchors.analyses.compression import Compression, Speed
from anchors.compression import RULES, AnchorCache, anchor_tokens, compress, random_tokens, text_anchor
from anchors.context import answer, encode, queries, shared_demonstrations
from anchors.errors import AnchorsError
from anchors.model.language import load
from anchors.tasks.data import Example
from anchors.tasks.drawing import demonstrations
from anchors.tasks.prompts import build
from anchors.tasks.task import TASKS, task


def first_position(rule, kept, whole):
    """Where the test input begins, in the words of the rules."""
    return {"after-last-anchor": kept[-1] + 1, "restart": 0, "original": whole}[rule]


def test_keeping_every_token_at_its_place_changes_nothing(lm, make_cell):
    prompts = [d.prompt for d in make_cell().prompts]
    whole = encode(lm, shared_demonstrations(prompts))
    batch = queries(prompts, len(whole.ids), lm.device)
    plain = answer(lm, whole, batch)
    every = list(reversed(range(len(whole.ids))))
    for rule in ("original", "after-last-anchor"):
        assert apart(answer(lm, compress(whole, every, rule), batch), plain) < 1e-6
    assert apart(answer(lm, compress(whole, every, "restart"), batch), plain) > 1e-4


def seen_when_compressed(lm, layer, kept, start, length):
    """What each row of the whole prompt sees, in a loop: a window counts tokens, of those that the row has before it."""
    config = lm.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None) and (
        kinds is None or kinds[layer] == "sliding_attention"
    )
    sees = torch.zeros(length, length, dtype=torch.bool)
    for row in range(length):
        before = range(row + 1) if row < start else [*kept, *range(start, row + 1)]
        for column in before[-config.sliding_window :] if sliding else before:
            sees[row, column] = True
    return sees


@pytest.mark.parametrize("family", DENSE, indirect=True)
@pytest.mark.parametrize("rule", RULES)
def test_compression_equals_a_mask_in_the_models_own_attention(lm, make_cell, rule):
    """The whole prompt, in which rows of the test input cannot see the dropped tokens, at the rule's positions."""
    prompts = [d.prompt for d in make_cell(examples=2).prompts]
    start, kept = prompts[0].query, anchor_tokens(prompts[0])
    whole = encode(lm, prompts[0].ids[:start])
    ours = answer(lm, compress(whole, kept, rule), queries(prompts, start, lm.device))
    first = first_position(rule, kept, start)
    for i, prompt in enumerate(prompts):
        length = len(prompt.ids)
        masks = {layer: seen_when_compressed(lm, layer, kept, start, length) for layer in range(lm.n_layers)}
        steps = [*range(start), *range(first, first + length - start)]
        literal, _ = plainly(lm, prompt.ids, masks, steps)
        assert apart(ours[i], literal) < 1e-5
        assert apart(ours[i], plainly(lm, prompt.ids)[0]) > 1e-4


def test_a_window_counts_kept_tokens(tokenizer, make_cell):
    """Far tokens come into reach of a window when what stood between is dropped."""
    lm = load(make("mistral_window", len(tokenizer)), tokenizer=tokenizer, device="cpu")
    cell = make_cell("agnews")
    shown = demonstrations(cell.task, cell.data, cell.how)
    prompt = build(cell.task, tokenizer, shown, "so", 0)
    assert prompt.target - prompt.query < 8
    whole = encode(lm, prompt.ids[: prompt.query])
    batch = queries([prompt], prompt.query, "cpu")
    kept = list(prompt.label_positions)
    assert prompt.target - kept[0] > 16
    near = compress(whole, kept, "original")
    without = compress(whole, kept[1:], "original")
    assert apart(answer(lm, near, batch), answer(lm, without, batch)) > 1e-4


@pytest.mark.parametrize("policy", ["first", "last", "all"])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_anchors_are_label_words_and_format(make_cell, tokenizer, name, policy):
    spec = task(name, policy=policy)
    cell = make_cell(name, 1, shots=2)
    shown = demonstrations(spec, cell.data, cell.how)
    prompt = build(spec, tokenizer, shown, "so so", 0)
    kept = anchor_tokens(prompt)
    assert kept == sorted(set(kept))
    # The text that is kept spells the demonstrations with nothing in them.
    opening, prefix, _ = spec.pieces
    spelled = "".join(tokenizer.decode([prompt.ids[i]]) for i in kept)
    expected = "".join(f"{opening}{prefix} {spec.labels[e.label]}\n" for e in shown)
    assert spelled.replace(" ", "") == expected.replace(" ", "")
    assert set(prompt.label_positions) < set(kept)
    for i in range(prompt.query):
        assert (i in kept) == (prompt.roles[i] in ("label", "format"))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_random_tokens_replace_label_words_by_text_of_the_same_demonstration(make_cell, name):
    for seed in range(4):
        prompt = make_cell(name, 1, shots=2, seed=seed).prompts[0].prompt
        anchors = set(anchor_tokens(prompt))
        draws = set()
        for number in range(5):
            kept = random_tokens(prompt, np.random.default_rng([seed, number]))
            assert len(kept) == len(set(kept)) == len(anchors)
            assert all(prompt.roles[i] != "label" for i in kept)
            assert {i for i in kept if prompt.roles[i] == "format"} == {
                i for i in anchors if prompt.roles[i] == "format"
            }
            for d in range(max(prompt.demonstrations) + 1):
                words = [i for i in anchors if prompt.demonstrations[i] == d and prompt.roles[i] == "label"]
                texts = [i for i in kept if prompt.demonstrations[i] == d and prompt.roles[i] == "text"]
                assert len(texts) == len(words) > 0
            draws.add(tuple(kept))
        assert len(draws) > 1


def test_a_demonstration_too_short_for_random_tokens_is_an_error(tokenizer):
    spec = TASKS["trec"]
    prompt = build(spec, tokenizer, [Example("so", 0), Example("why is this so", 1)], "so", 0)
    assert sum(prompt.demonstrations[i] == 0 and r == "label" for i, r in enumerate(prompt.roles)) > 1
    with pytest.raises(AnchorsError, match="Demonstration 1 has fewer text tokens"):
        random_tokens(prompt, np.random.default_rng(0))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_text_anchors_spell_format_and_label_words(gpt2, make_cell, name):
    cell = make_cell(name, 1)
    opening, prefix, _ = cell.task.pieces
    shown = demonstrations(cell.task, cell.data, cell.how)
    expected = "".join(f"{opening.rstrip()}{prefix} {cell.task.labels[e.label]}\n" for e in shown)
    ids = text_anchor(gpt2, cell)
    assert gpt2.tokenizer.decode(ids) == expected
    assert list(ids) == gpt2.tokenizer(expected)["input_ids"]
    if name == "sst2":
        assert sorted(expected.split("Review:\n")) == ["", "Sentiment: Negative\n", "Sentiment: Positive\n"]


@pytest.mark.parametrize("rule", RULES)
def test_positions_of_the_test_input(gpt2, make_cell, rule):
    prompt = make_cell().prompts[0].prompt
    whole = encode(gpt2, prompt.ids[: prompt.query])
    kept = anchor_tokens(prompt)[:-1]
    small = compress(whole, kept[::-1] + kept, rule)
    assert small.positions == tuple(kept)
    assert small.ids == tuple(prompt.ids[i] for i in kept)
    assert small.next == first_position(rule, kept, prompt.query)
    for own, full in zip((*small.keys, *small.values), (*whole.keys, *whole.values), strict=True):
        assert torch.equal(own, full[:, :, kept])


@pytest.mark.usefixtures("wrong_types")
def test_rules_and_tokens_that_cannot_work(gpt2, make_cell):
    prompt = make_cell().prompts[0].prompt
    whole = encode(gpt2, prompt.ids[: prompt.query])
    for rule in RULES:
        with pytest.raises(AnchorsError, match="No token"):
            compress(whole, [], rule)
    for settings in ({"methods": ("zip",)}, {"methods": ()}, {"draws": 0}, {"top": 0}):
        with pytest.raises(AnchorsError, match="cannot be used"):
            Compression(**settings)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "mistral_window"])
def test_an_anchor_cache_generates_what_one_would_answer_step_by_step(name, rule, tokenizer, make_cell):
    lm = load(make(name, len(tokenizer)), tokenizer=tokenizer, device="cpu")
    prompts = [d.prompt for d in make_cell(examples=2).prompts]
    start = prompts[0].query
    cache = AnchorCache.of(lm, prompts[0], rule)
    small = compress(encode(lm, prompts[0].ids[:start]), anchor_tokens(prompts[0]), rule)
    for prompt in (*prompts, prompts[0]):
        query = list(prompt.ids[start:])
        expected, tokens = [], list(query)
        for _ in range(4):
            row = torch.tensor([tokens])
            with torch.no_grad():
                best = int(lm.logits_at(row, torch.tensor([len(tokens) - 1]), small).argmax())
            expected.append(best)
            tokens.append(best)
        assert expected[0] == int(answer(lm, small, queries([prompt], start, "cpu")).argmax())
        inputs = cache.inputs(query if prompt is prompts[0] else torch.tensor(query))
        width = inputs["input_ids"].shape[1]
        assert width == len(small.ids) + len(query)
        out = lm.model.generate(
            **inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert out[0, width:].tolist() == expected
        assert cache.get_seq_length() == len(small.ids)


def test_saved_bytes(tokenizer, make_cell):
    lm = load(make("llama", len(tokenizer)), tokenizer=tokenizer, device="cpu")
    prompt = make_cell().prompts[0].prompt
    cache = AnchorCache.of(lm, prompt)
    dropped = prompt.query - len(anchor_tokens(prompt))
    layers, kinds, kv_heads, dim, size = 3, 2, 2, 8, 4
    assert cache.saved_bytes == layers * kinds * kv_heads * dim * size * dropped > 0
    assert cache.inputs([1])["past_key_values"].saved_bytes == cache.saved_bytes


def test_records_by_hand(gpt2, make_cell):
    cell = make_cell("agnews", 5)
    prompts = [d.prompt for d in cell.prompts]
    analysis = Compression(draws=3, top=3)
    state = analysis.prepare(gpt2, cell)
    start = prompts[0].query
    batch = queries(prompts, start, "cpu")
    assert set(state) == {"none", "hidden_anchor", "text_anchor", *(f"hidden_random/0{d}" for d in range(3))}
    # Text anchors are a prompt of their own: nothing of the demonstrations' texts was ever run.
    text = text_anchor(gpt2, cell)
    for i, prompt in enumerate(prompts):
        literal, _ = plainly(gpt2, [*text, *prompt.ids[start:]])
        assert apart(answer(gpt2, state["text_anchor"], batch)[i], literal) < 1e-5
    vanilla = Classification()
    plain = vanilla.measure(gpt2, vanilla.prepare(gpt2, cell), cell.task, cell.prompts)
    found = analysis.measure(gpt2, state, cell.task, cell.prompts)
    best = {n: answer(gpt2, c, batch).argsort(descending=True)[:, :3].tolist() for n, c in state.items()}
    for i, records in enumerate(found):
        assert [r for r in records if r.condition == "none"] == plain[i]
        own = {(r.condition, r.metric): r.value for r in records}
        for name in state.keys() - {"none"}:
            a, b = set(best[name][i]), set(best["none"][i])
            assert own[name, "word_loyalty"] == pytest.approx(len(a & b) / len(a | b))
            assert own[name, "label_loyalty"] == (own[name, "predicted"] == own["none", "predicted"])
    said = {(r.condition, r.metric): r.value for r in analysis.once(gpt2, state, cell)}
    per_token = 3 * 2 * 32 * 4
    assert said["none", "demonstration_tokens"] == start
    assert said["none", "input_tokens"] == pytest.approx(sum(len(p.ids) - start for p in prompts) / 5)
    assert said["hidden_anchor", "kept_tokens"] == len(anchor_tokens(prompts[0]))
    assert said["hidden_anchor", "cache_bytes"] == len(anchor_tokens(prompts[0])) * per_token
    assert said["text_anchor", "kept_tokens"] == len(text)
    assert said["none", "cache_bytes"] == start * per_token
    again = analysis.prepare(gpt2, cell)
    assert [again[n].positions for n in state] == [state[n].positions for n in state]
    assert len({state[f"hidden_random/0{d}"].positions for d in range(3)}) > 1


def test_speed_times_whole_prompts_against_kept_anchors(gpt2, make_cell, monkeypatch):
    cell = make_cell(examples=2)
    analysis = Speed(repeats=3)
    state = analysis.prepare(gpt2, cell)
    prompts = [d.prompt for d in cell.prompts]
    whole, kept, cached = (run() for run in analysis._sides(state, cell.prompts, gpt2))
    assert apart(whole, answer(gpt2, None, queries(prompts, 0, "cpu"))) < 1e-6
    small = compress(encode(gpt2, prompts[0].ids[: prompts[0].query]), anchor_tokens(prompts[0]))
    assert apart(kept, answer(gpt2, small, queries(prompts, prompts[0].query, "cpu"))) < 1e-6
    assert apart(cached, whole) < 1e-6
    clock = iter([5.0, 1.0, 3.0, 7.0, 4.0, 2.0, 9.0, 2.0, 4.0])
    monkeypatch.setattr("anchors.model.routed.seconds", lambda run, model: next(clock))
    found = analysis.measure(gpt2, state, cell.task, cell.prompts)
    for own in found:
        assert {r.condition: r.value for r in own if r.metric == "seconds"} == {
            "none": 3.5,
            "hidden_anchor": 1.0,
            "whole_cached": 1.5,
        }
        assert [r.value for r in own if r.metric == "batch"] == [cell.prompts[0].example]
