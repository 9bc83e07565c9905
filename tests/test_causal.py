"""Patching the label words: the fast path against transformer-lens, and what must hold of any model."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from families import make, randomised
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from anchors import causal
from anchors.analyses.causal import Causal
from anchors.causal import centred, exchange, literal, places
from anchors.context import answer, encode, queries
from anchors.errors import AnchorsError, CertificateError, RoutingError
from anchors.figures.causal import draw as draw_figure
from anchors.model.language import load
from anchors.patching import block, patch, streams
from anchors.study.runner import Cell, Sample, measure
from anchors.summaries import agreement, causal_summary
from anchors.tasks.data import read
from anchors.tasks.drawing import Draw, demonstrations, draw
from anchors.tasks.prompts import build
from anchors.tasks.task import TASKS, Task

SST2 = TASKS["sst2"]


def pair(task, tokenizer, moved, seed=42):
    """Prompt A and prompt B with label words exchanged as `moved` says."""
    data, how = read(task), Draw(seed=seed, fresh=False)
    drawn = draw(task, data, tokenizer, how, 1)[0]
    shown = [replace(e, label=moved[e.label]) for e in demonstrations(task, data, how)]
    return drawn.prompt, build(task, tokenizer, shown, data.test[drawn.example].text, None)


def cell_of(task, tokenizer, tmp_path, examples=2, control="none"):
    data, how = read(task), Draw(fresh=False, control=control)
    return Cell(task, data, how, tuple(draw(task, data, tokenizer, how, examples)), tmp_path)


def fast(lm, own, exchanged, positions, layer):
    """The label words' logits of one prompt on patched demonstrations."""
    context = encode(lm, own.ids[: own.query])
    with streams(lm, [layer]) as entering:
        encode(lm, exchanged.ids[: own.query])
    patched = patch(lm, context, layer, positions, entering[layer].stream)
    return answer(lm, patched, queries([own], own.query, lm.device))[0, list(own.label_ids)]


@pytest.mark.parametrize("family_name", ["gpt2", "gptj", "llama"])
def test_patched_contexts_equal_transformer_lens(family_name, tokenizer):
    pytest.importorskip("transformer_lens", reason="transformer-lens is not installed (extra `lens`)")
    lm = load(make(family_name, len(tokenizer)), tokenizer=tokenizer, device="cpu")
    bridge = lm.to_transformer_lens()
    # Six classes, one of them of several tokens, so that whole label words are patched.
    own, exchanged = pair(TASKS["trec"], tokenizer, [0, 2, 3, 4, 5, 1])
    where = places(own, exchanged, causal.POSITIONS, np.random.default_rng(0))
    assert len(where["label"]) > 6
    seen = []
    for layer in range(lm.n_layers):
        for positions in where.values():
            expected = literal(bridge, own, exchanged, positions, layer)
            found = fast(lm, own, exchanged, positions, layer)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            seen.append(expected)
    # The patches are told apart: no two of them (but the neutral ones at the input) give the same logits.
    gaps = torch.cdist(torch.stack(seen), torch.stack(seen)) + torch.eye(len(seen))
    assert (gaps < 1e-3).sum() <= 2


def test_through_the_runner_on_every_family(lm, tmp_path):
    data, analysis = read(SST2), Causal(positions=causal.POSITIONS)
    rows = measure(lm, analysis, SST2, data, Sample(examples=3), out=tmp_path).rows
    follow = rows[rows["metric"] == "follow"].pivot_table(
        index="number", columns=["condition", "layer"], values="value"
    )
    layers = range(lm.n_layers + 1)
    assert set(follow.columns) == {(c, n) for c in causal.POSITIONS for n in layers}
    np.testing.assert_allclose(follow["label"][0], 1, atol=1e-4)
    # At the input the other positions are the same in A and B.
    assert (follow["random"][0] == 0).all()
    assert (follow["others"][0] == 0).all()
    assert (follow.xs(lm.n_layers, axis=1, level="layer") == 0).all(axis=None)
    # One layer up they have read the label words, which have lost some of their effect (a sliding window may let
    # a query read the label words itself only).
    assert (follow["others"][1].abs() > 1e-6).any()
    assert (follow["label"][1] - 1).abs().min() > 1e-4
    one = rows[rows["metric"].isin(["follow_numerator", "follow_denominator"])].set_index("number")
    ratio = (
        one[(one["condition"] == "label") & (one["layer"] == 1)]["value"] / one[one["layer"].isna()]["value"]
    )
    np.testing.assert_allclose(ratio, follow["label"][1], rtol=1e-12)
    assert {"accuracy", "predicted", "differs", "flipped", "shift"} <= set(rows["metric"])


def test_rows_equal_the_definition_on_whole_prompts(gpt2, tmp_path):
    """Without contexts and hooks on demonstrations: both prompts as a whole, the last metric by hand."""
    rows = measure(gpt2, Causal(layers=(1,)), SST2, read(SST2), Sample(examples=3), out=tmp_path).rows
    data, how = read(SST2), Draw(fresh=False)
    shown = [replace(e, label=1 - e.label) for e in demonstrations(SST2, data, how)]
    kept = {}

    def keep(module, args):
        kept["b"] = args[0]

    def swap(module, args):
        hidden = args[0].clone()
        hidden[:, label] = kept["b"][:, label]
        return (hidden, *args[1:])

    def logits(prompt, hook=None):
        handle = gpt2.model.transformer.h[1].register_forward_pre_hook(hook) if hook else None
        with torch.no_grad():
            z = gpt2.model(torch.tensor([prompt.ids]), use_cache=False).logits[0, -1, list(prompt.label_ids)]
        if handle:
            handle.remove()
        return centred(z)

    for number, drawn in enumerate(draw(SST2, data, gpt2.tokenizer, how, 3)):
        label = [i for i, role in enumerate(drawn.prompt.roles) if role == "label"]
        other = build(SST2, gpt2.tokenizer, shown, data.test[drawn.example].text, None)
        a, b = logits(drawn.prompt), logits(other, keep)
        z = logits(drawn.prompt, swap)
        own = rows[(rows["number"] == number) & rows["condition"].isin(["none", "label"])]
        found = own[own["layer"].isna() | (own["layer"] == 1)].set_index("metric")["value"]
        assert found["follow"] == pytest.approx(float((z - a) @ (b - a) / (b - a).square().sum()), abs=1e-4)
        assert found["follow_denominator"] == pytest.approx(float((b - a).square().sum()), rel=1e-3)
        assert found["differs"] == (a.argmax() != b.argmax())
        assert found["flipped"] == (z.argmax() == b.argmax())
        assert found["shift"] == pytest.approx(float((z.softmax(0) - a.softmax(0)).abs().sum() / 2), abs=1e-5)
        assert found["predicted"] == a.argmax()


def test_layers_below_the_patch_share_memory(gpt2, tmp_path):
    state = Causal().prepare(gpt2, cell_of(SST2, gpt2.tokenizer, tmp_path))
    context = state.patched["label", 2]
    assert [k is own for k, own in zip(context.keys, state.own.keys, strict=True)] == [True, True, False]
    assert not torch.equal(context.values[2], state.own.values[2])
    # What is patched at the input is prompt B.
    assert torch.equal(state.patched["label", 0].values[2], state.exchanged.values[2])
    with pytest.raises(CertificateError, match="differ by"):
        causal.demand_equal(context, state.exchanged)


@pytest.mark.usefixtures("wrong_types")
def test_label_words_are_exchanged_within_equal_lengths():
    task = SimpleNamespace(name="own", labels=tuple("abcde"))
    for seed in range(20):
        moved = exchange(task, [3, 1, 1, 1, 2], np.random.default_rng(seed))
        assert moved[0] == 0
        assert moved[4] == 4
        assert sorted(moved) == list(range(5))
        assert all(moved[c] != c for c in (1, 2, 3))
    assert len({tuple(exchange(task, [1] * 5, np.random.default_rng(s))) for s in range(20)}) > 5


def test_label_words_of_unequal_lengths_are_refused(gpt2, tmp_path):
    task = Task("own", SST2.template, ("Abbreviation", "Positive"))
    with pytest.raises(AnchorsError, match=r"'Abbreviation' [2-9], 'Positive' 1") as error:
        measure(gpt2, Causal(), task, read(SST2), Sample(examples=2), out=tmp_path)
    assert "--labels" in error.value.remedy


def test_prompts_that_differ_elsewhere_are_refused(tokenizer):
    own, exchanged = pair(SST2, tokenizer, [1, 0])
    rng = np.random.default_rng(0)
    label = {i for i, (a, b) in enumerate(zip(own.ids, exchanged.ids, strict=True)) if a != b}
    assert set(places(own, exchanged, (), rng)["label"]) == label
    free = next(i for i in range(own.query) if i not in label)
    moved = replace(
        exchanged, ids=(*exchanged.ids[:free], exchanged.ids[free] + 1, *exchanged.ids[free + 1 :])
    )
    for other in (moved, replace(exchanged, ids=exchanged.ids[:-1])):
        with pytest.raises(AnchorsError, match="other tokens"):
            places(own, other, (), rng)


def test_random_positions_are_as_many_others(tokenizer):
    own, exchanged = pair(TASKS["trec"], tokenizer, [0, 2, 3, 4, 5, 1])
    where = places(own, exchanged, ("random",), np.random.default_rng(0))
    assert len(where["random"]) == len(where["label"])
    assert not set(where["random"]) & set(where["label"])
    assert sorted(where["label"] + where["others"]) == list(range(own.query))


def test_hooks_are_removed_after_an_exception(gpt2, prompts, monkeypatch):
    context = encode(gpt2, prompts[0].ids[:20])
    wrong_width = torch.zeros(1, 20, 7)
    with pytest.raises(RuntimeError):
        patch(gpt2, context, 1, [3], wrong_width)
    with pytest.raises(ZeroDivisionError), streams(gpt2, range(3)):
        raise ZeroDivisionError
    assert not any(block(gpt2, layer)._forward_pre_hooks for layer in range(3))
    again = encode(gpt2, prompts[0].ids[:20])
    assert torch.equal(again.keys[2], context.keys[2])


def test_a_stream_that_is_not_met_exactly_once_is_refused(gpt2, prompts):
    with pytest.raises(RoutingError, match="0 times"), streams(gpt2, [0]):
        pass
    with pytest.raises(RoutingError, match="2 times"), streams(gpt2, [0]):
        gpt2.model.generate(torch.tensor([prompts[0].ids]), max_new_tokens=2, do_sample=False)


@pytest.mark.usefixtures("wrong_types")
def test_settings_that_cannot_work_are_refused(gpt2, tmp_path):
    for wrong in (
        {"positions": ("labels",)},
        {"positions": ()},
        {"stride": 0},
        {"layers": ()},
        {"layers": (-1,)},
    ):
        with pytest.raises(AnchorsError):
            Causal(**wrong)
    with pytest.raises(AnchorsError, match="no layer 3"):
        Causal(layers=(0, 3)).prepare(gpt2, cell_of(SST2, gpt2.tokenizer, tmp_path))
    with pytest.raises(AnchorsError, match="random-positions"):
        Causal().prepare(gpt2, cell_of(SST2, gpt2.tokenizer, tmp_path, control="random-positions"))
    state = Causal(stride=2, positions=("label",)).prepare(gpt2, cell_of(SST2, gpt2.tokenizer, tmp_path))
    assert list(state.patched) == [("label", 0), ("label", 2), ("label", 3)]


def made_rows(numerators, size, differs, flipped):
    """Rows of prompts × layers, with the same numbers halved for the control."""
    records = []
    for n, own in enumerate(numerators):
        records += [
            (n, "none", None, "differs", differs[n]),
            (n, "none", None, "follow_denominator", size[n]),
        ]
        records += [(n, "label", layer, "follow_numerator", v) for layer, v in enumerate(own)]
        records += [(n, "random", layer, "follow_numerator", v / 2) for layer, v in enumerate(own)]
        records += [
            (n, c, layer, "flipped", v) for c in ("label", "random") for layer, v in enumerate(flipped[n])
        ]
    rows = pd.DataFrame(records, columns=["number", "condition", "layer", "metric", "value"])
    return rows.astype({"layer": "Int32", "value": float}).assign(
        task="a", shots=1, control="none", seed=1, example=0
    )


def test_no_stream_enters_between_two_attentions_of_a_layer(tokenizer, tmp_path):
    config = LongcatFlashConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_hidden_size=48, num_layers=2, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, head_dim=8, n_routed_experts=4,
        zero_expert_num=1, moe_topk=2, expert_ffn_hidden_size=16, max_position_embeddings=512, pad_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    lm = load(randomised(LongcatFlashForCausalLM(config), seed=0), tokenizer=tokenizer, device="cpu")
    cell = cell_of(SST2, tokenizer, tmp_path)
    with pytest.raises(
        AnchorsError, match=r"holds 2 attentions[^$]*before attention 2[^$]*before attention 3[^$]*--stride 2"
    ):
        Causal(layers=(3,)).prepare(lm, cell)
    assert block(lm, 2) is lm.model.model.layers[1]


def test_the_summary_by_hand():
    rows = made_rows([[4, 3, 0], [1, 0, 0]], [4, 1], [1, 0], [[1, 0, 0], [1, 1, 1]])
    table = causal_summary(rows).set_index(["condition", "metric"])
    assert table.loc[("label", "follow"), "value"].tolist() == [1, 0.6, 0]
    assert table.loc[("random", "follow"), "value"].tolist() == [0.5, 0.3, 0]
    assert table.loc[("label", "released"), "value"].tolist() == pytest.approx([0.4, 0.6])
    assert table.loc[("label", "released"), "layer"].tolist() == [0, 1]
    # Only the first prompt's predictions differ.
    assert table.loc[("label", "flipped"), "value"].tolist() == [1, 0, 0]
    assert table.loc[[("none", "differs")], "value"].tolist() == [0.5]
    assert ("random", "released") not in table.index
    # One prompt or the other or both: 0, 0.75 or 0.6 of the effect is left.
    follow = table.loc[("label", "follow")].iloc[1]
    assert (follow["low"], follow["high"]) == (0, 0.75)
    # Patching everything moves each prompt all the way: a bootstrap has nothing to draw from.
    assert table.loc[("label", "follow"), "interval"].tolist() == [
        "equal values",
        "bootstrap",
        "equal values",
    ]
    assert table.loc[("label", "follow"), ["low", "high"]].iloc[0].isna().all()
    flipped = table.loc[("label", "flipped")].iloc[0]
    assert (flipped["interval"], flipped["value"]) == ("Wilson", 1)
    assert flipped["low"] == pytest.approx(1 / (1 + 1.959964**2), abs=1e-6)  # of one prompt
    alone = causal_summary(rows[rows["number"] == 0])
    assert alone["low"].isna().all()
    with pytest.raises(AnchorsError, match="no patched prompts"):
        causal_summary(rows[:0])


def test_the_figure_draws_every_curve_with_its_values():
    rng = np.random.default_rng(0)
    rows = made_rows(rng.random((5, 4)), np.ones(5), np.ones(5), np.ones((5, 4)))
    table = causal_summary(rows)
    flows = pd.DataFrame(
        {
            "task": "a",
            "shots": 1,
            "control": "none",
            "layer": range(3),
            "metric": "s_pq",
            "mean": [1, 2, 5],
            "low": 0.5,
            "high": 6.0,
        }
    )
    above, below = draw_figure({"summary": table, "flow": flows}, "a model").axes
    follow = table[table["metric"] == "follow"].groupby("condition")["value"].apply(list)
    assert [list(line.get_ydata()) for line in above.lines] == [follow["label"], follow["random"]]
    curves = {line.get_label(): list(line.get_ydata()) for line in below.lines}
    assert curves["released by the label words"] == table[table["metric"] == "released"]["value"].tolist()
    assert [0.125, 0.25, 0.625] in curves.values()
    assert len(draw_figure({"summary": table}, "a model").axes[1].lines) == len(below.lines) - 1
    # With layer 1 left out, what layers 0 and 1 release stands at layer 0, and so does their S_pq.
    coarse = causal_summary(rows[(rows["layer"] != 1).fillna(True)])
    below = draw_figure({"summary": coarse, "flow": flows}, "a model").axes[1]
    assert [0.375, 0.625] in [list(line.get_ydata()) for line in below.lines]


def test_drawing_loads_no_torch():
    code = "import sys, anchors.figures.causal; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_agreement_is_the_correlation_over_the_layers_that_both_have() -> None:
    released, flow = [0.1, 0.4, 0.2, 0.9], [1.0, 3.0, 2.5, 2.0]
    named = {"task": "a", "shots": 1, "control": "none"}
    patched = pd.DataFrame(
        [named | {"metric": "released", "layer": i, "value": x} for i, x in enumerate(released)]
    )
    patched = pd.concat([patched, patched.assign(metric="follow", value=0.0)])
    flows = pd.DataFrame([named | {"metric": "s_pq", "layer": i, "mean": x} for i, x in enumerate(flow)])
    flows = pd.concat([flows, flows.assign(metric="s_wp", mean=1.0), flows.assign(task="b")])
    (row,) = agreement(patched, flows).to_dict("records")
    order = [np.argsort(np.argsort(x)) for x in (released, flow)]
    assert row == named | {
        "pearson": pytest.approx(np.corrcoef(released, flow)[0, 1]),
        "spearman": pytest.approx(np.corrcoef(*order)[0, 1]),
        "layers": 4,
    }
