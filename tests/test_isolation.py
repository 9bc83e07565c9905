"""Isolated label words see only themselves, in the layers named and nowhere else."""

import numpy as np
import pytest
import torch
from common import apart, plainly
from families import DENSE

from anchors.analyses.classification import Classification
from anchors.analyses.isolation import Isolation, TopWords, isolated_contexts
from anchors.attention.edits import isolate
from anchors.attention.seam import seam
from anchors.attention.taps import Probe
from anchors.context import answer, encode, queries, shared_demonstrations
from anchors.errors import AnchorsError
from anchors.tasks.drawing import random_positions

BOTH = Isolation(layers=(1, 2))


def before(positions):
    return [(p, i) for p in positions for i in range(p)]


@pytest.mark.parametrize("family", DENSE, indirect=True)
def test_isolation_equals_a_mask_in_the_models_own_attention(lm, make_cell):
    """Every condition against transformers' eager attention, in which A(p, i) for i < p is masked out by hand."""
    cell = make_cell(examples=2)
    prompts = [d.prompt for d in cell.prompts]
    contexts = isolated_contexts(lm, cell, BOTH)
    batch = queries(prompts, prompts[0].query, lm.device)
    ours = {name: answer(lm, context, batch) for name, context in contexts.items()}
    where = {
        "label": prompts[0].label_positions,
        "random": random_positions(prompts[0], np.random.default_rng([cell.how.seed, 3])),
    }
    assert len(ours) == 9
    for k in (1, 2):
        for side, layers in (("first", range(k)), ("last", range(lm.n_layers - k, lm.n_layers))):
            for target, positions in where.items():
                banned = {layer: before(positions) for layer in layers}
                for i, prompt in enumerate(prompts):
                    literal, _ = plainly(lm, prompt.ids, banned)
                    assert apart(ours[f"{side}-{k}/{target}"][i], literal) < 1e-5
    # Nothing reads the label words after the last layer: isolating them there cannot matter. Before it, it must.
    assert apart(ours["last-1/label"], ours["none"]) < 1e-6
    assert apart(ours["first-1/label"], ours["none"]) > 1e-4
    assert apart(ours["first-1/label"], ours["first-1/random"]) > 1e-4


class Pattern(Probe):
    """Keeps the edited pattern of the first layer as the model's output shows it."""

    layers = frozenset([0])

    def see(self, call):
        self.call = call


@pytest.mark.parametrize("family", DENSE, indirect=True)
def test_exactly_the_named_entries_are_zero(lm, make_cell):
    prompt = make_cell().prompts[0].prompt
    ids = prompt.ids[: prompt.query]
    positions = torch.tensor([prompt.label_positions])
    probe, edit = Pattern(), isolate([0], positions)
    with seam(lm.modules, edits=[edit], probes=[probe]):
        encode(lm, ids)
    call = probe.call
    untouched = call.pattern()[0]
    edited = call.softmax(
        call.scores(call.q, call.k) + edit.bias(call),
        call.visible(torch.arange(len(ids)), slice(0, len(ids))),
    )[0]
    _, literal = plainly(lm, ids, {0: before(prompt.label_positions)})
    torch.testing.assert_close(edited, literal[0][..., : len(ids)], rtol=1e-4, atol=1e-6)
    for p in range(len(ids)):
        if p in prompt.label_positions:
            assert (edited[:, p, :p] == 0).all()
            assert (untouched[:, p, :p] > 0).any()
            assert (edited[:, p, p] > untouched[:, p, p]).all()
        else:
            assert torch.equal(edited[:, p], untouched[:, p])


def test_layers_before_the_isolated_ones_are_untouched(lm, make_cell):
    contexts = isolated_contexts(lm, make_cell(), BOTH)
    depth = lm.n_layers
    first = {"first-1": 0, "first-2": 0, "last-1": depth - 1, "last-2": depth - 2}
    for name, context in contexts.items():
        start = first.get(name.split("/")[0], depth)
        for layer in range(depth):
            same = torch.equal(context.keys[layer], contexts["none"].keys[layer])
            assert same == (layer <= start), (name, layer)


def test_rows_that_are_not_isolated_keep_their_keys_in_the_next_layer(lm, make_cell):
    """Positions before the first isolated one cannot see it; the isolated ones must change."""
    cell = make_cell()
    p = cell.prompts[0].prompt.label_positions
    contexts = isolated_contexts(lm, cell, Isolation(layers=(1,), sides=("first",), positions=("label",)))
    plain, cut = (contexts[name].keys[1][0] for name in ("none", "first-1/label"))
    other = [i for i in range(plain.shape[1]) if i not in p]
    assert apart(cut[:, other], plain[:, other]) < 1e-6
    assert all(apart(cut[:, i], plain[:, i]) > 1e-4 for i in p)


def test_nothing_is_left_behind_after_an_exception(gpt2, make_cell, monkeypatch):
    cell = make_cell()
    ids = shared_demonstrations([d.prompt for d in cell.prompts])
    plain = encode(gpt2, ids)
    calls = []

    def failing(model, ids):
        calls.append(ids)
        if len(calls) == 3:
            raise KeyError("in the middle")
        return encode(model, ids)

    monkeypatch.setattr("anchors.context.encode", failing)
    with pytest.raises(KeyError):
        isolated_contexts(gpt2, cell, BOTH)
    batch = queries([d.prompt for d in cell.prompts], len(ids), "cpu")
    after = encode(gpt2, ids)
    assert torch.equal(answer(gpt2, after, batch), answer(gpt2, plain, batch))


def test_isolating_what_stands_in_the_cache_is_an_error(gpt2, make_cell):
    prompt = make_cell().prompts[0].prompt
    context = encode(gpt2, prompt.ids[: prompt.query])
    edit = isolate([0], torch.tensor([prompt.label_positions]))
    with pytest.raises(AnchorsError, match="in the cache"), seam(gpt2.modules, edits=[edit]):
        answer(gpt2, context, queries([prompt], prompt.query, "cpu"))


@pytest.mark.parametrize("sides", [("first",), ("last",)])
def test_more_layers_than_the_model_has_are_an_error(gpt2, make_cell, sides):
    with pytest.raises(AnchorsError, match="4 layers cannot be isolated"):
        isolated_contexts(gpt2, make_cell(), Isolation(layers=(1, 4), sides=sides))
    assert len(isolated_contexts(gpt2, make_cell(), Isolation(layers=(3,), sides=sides))) == 3


@pytest.mark.parametrize(
    "settings",
    [{"layers": ()}, {"layers": (0,)}, {"sides": ("middle",)}, {"positions": ("text",)}, {"top": 0}],
)
@pytest.mark.usefixtures("wrong_types")
def test_settings_that_cannot_work(settings):
    with pytest.raises(AnchorsError):
        Isolation(**settings)


@pytest.mark.parametrize("name", ["sst2", "trec", "agnews", "emo"])
def test_random_positions_are_never_label_words_nor_the_first(gpt2, make_cell, name, monkeypatch):
    seen = {"label": [], "random": []}

    def recorded(layers, positions, condition):
        seen[condition.split("/")[1]].append(tuple(positions[0].tolist()))
        return isolate(layers, positions, condition)

    monkeypatch.setattr("anchors.attention.edits.isolate", recorded)
    for seed in range(6):
        cell = make_cell(name, 1, seed=seed)
        prompt = cell.prompts[0].prompt
        isolated_contexts(gpt2, cell, Isolation(layers=(1,), sides=("first",)))
        label, random = seen["label"][-1], seen["random"][-1]
        assert label == prompt.label_positions
        assert len(set(random)) == len(label)
        assert 0 not in random
        assert max(random) < prompt.query
        assert all(prompt.roles[i] in ("text", "format") for i in random)
    assert len(set(seen["random"])) > 3


def test_records_by_hand(gpt2, make_cell):
    cell = make_cell("agnews", 6)
    prompts = [d.prompt for d in cell.prompts]
    analysis = Isolation(layers=(2,), top=4)
    state = analysis.prepare(gpt2, cell)
    found = analysis.measure(gpt2, state, cell.task, cell.prompts)
    vanilla = Classification()
    plain = vanilla.measure(gpt2, vanilla.prepare(gpt2, cell), cell.task, cell.prompts)
    batch = queries(prompts, prompts[0].query, "cpu")
    loyal = []
    for i, records in enumerate(found):
        assert [r for r in records if r.condition == "none"] == plain[i]
        own = {(r.condition, r.metric): r.value for r in records}
        assert {c for c, _ in own} == {
            "none",
            *(f"{s}-2/{t}" for s in ("first", "last") for t in ("label", "random")),
        }
        words = {
            name: set(answer(gpt2, context, batch)[i].argsort(descending=True)[:4].tolist())
            for name, context in state.items()
        }
        for name in words.keys() - {"none"}:
            a, b = words[name], words["none"]
            assert own[name, "word_loyalty"] == pytest.approx(len(a & b) / len(a | b))
            same = own[name, "predicted"] == own["none", "predicted"]
            assert own[name, "label_loyalty"] == same
            loyal.append(own[name, "word_loyalty"])
    assert 0 <= min(loyal) < 1


def test_top_words_are_those_of_the_isolated_contexts(gpt2, make_cell):
    cell = make_cell(examples=2)
    analysis = TopWords(Isolation(layers=(2,), sides=("first",)), top=3)
    state = analysis.prepare(gpt2, cell)
    found = analysis.measure(gpt2, state, cell.task, cell.prompts)
    prompt = cell.prompts[1].prompt
    for name, banned in (
        ("none", {}),
        ("first-2/label", {0: before(prompt.label_positions), 1: before(prompt.label_positions)}),
    ):
        best = plainly(gpt2, prompt.ids, banned)[0].softmax(-1).topk(3)
        own = [r for r in found[1] if r.condition == name]
        assert [r.metric for r in own] == [
            f"word/{rank}/{gpt2.tokenizer.decode([word])}"
            for rank, word in enumerate(best.indices.tolist(), 1)
        ]
        assert [r.value for r in own] == pytest.approx(best.values.tolist(), rel=1e-4)
