"""What is foretold of a run, held to what torch counts, saves and allocates while it runs."""

import sys
from pathlib import Path

import pytest
import torch
from families import CONFIGS, make
from torch.utils.flop_counter import FlopCounterMode

from anchors import task as task_of
from anchors.analyses.causal import Causal
from anchors.analyses.classification import Classification
from anchors.analyses.compression import Compression, Speed
from anchors.analyses.diagnosis import Diagnosis
from anchors.analyses.flow import FlowMap, InformationFlow
from anchors.analyses.isolation import Isolation, TopWords
from anchors.analyses.readout import Readout
from anchors.analyses.reweighting import Reweighting
from anchors.attention import streaming
from anchors.model.language import LanguageModel, prepare
from anchors.study.analysis import Pass
from anchors.study.cost import Cost, Held, _pairs, rounded
from anchors.study.plan import outlook
from anchors.study.prompted import Part
from anchors.study.runner import Sample, measure
from anchors.tasks.data import read

sys.path.append(str(Path(__file__).parents[1] / "docs"))
import cost_table

PASSES = {
    "context": Pass(150, kept=True),
    "queries": Pass(20, past=100, rows=6, columns=3),
    "flow": Pass(150, backward=True),
    "flows": Pass(60, rows=4, backward=True, columns=4),
    "edited": Pass(150, edited=2, kept=True),
    "step": Pass(1, past=150, backward=True, edited=3),
}
# A window hides most rows of a tiny model from the gradient: what is foretold of it is an upper bound.
PLAIN = ["gpt2", "gptj", "llama", "phi3"]
PARALLEL = {"gptj"}
"""Beside the first attention stands an MLP that no gradient reaches; in three layers that is much."""


@pytest.fixture(scope="module", params=PLAIN)
def cost(request, tokenizer) -> Cost:
    return Cost(prepare(make(request.param, len(tokenizer)), tokenizer, request.param, "float32"))


@pytest.mark.parametrize("name", PASSES)
def test_operations_and_memory_of_a_pass(cost, name):
    p = PASSES[name]
    cost._context(p.past)
    cost.activations  # noqa: B018 - weighed before, not beside
    with FlopCounterMode(display=False) as counter, Held() as held:
        cost._run(p)
    rough = cost.model.name in PARALLEL and p.backward
    assert cost.flop(p) == pytest.approx(counter.get_total_flops(), rel=0.1 if rough else 0.005)
    peak = cost.peak(p)
    assert peak.total - peak.weights == pytest.approx(held.most, rel=0.25)


@pytest.mark.parametrize(
    ("family", "name"), [("mistral_window", "context"), ("gemma2_softcap_window", "flow")]
)
def test_under_a_window_no_less_is_foretold_than_is_needed(family, name, tokenizer):
    cost, p = Cost(prepare(make(family, len(tokenizer)), tokenizer, family, "float32")), PASSES[name]
    cost._context(p.past)
    cost.activations  # noqa: B018
    with FlopCounterMode(display=False) as counter, Held() as held:
        cost._run(p)
    assert 0.995 <= cost.flop(p) / counter.get_total_flops() <= 1.6
    peak = cost.peak(p)
    assert (peak.total - peak.weights) / held.most >= 0.75


def test_what_is_saved_is_what_the_graph_saves(cost):
    """Distinct storages that autograd is handed to keep, of another length than the one that was weighed."""
    p, kept = Pass(150, rows=2, columns=2, backward=True), {}
    weights = {w.untyped_storage().data_ptr() for w in cost.model.model.state_dict().values()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        back = cost._forward(p)
    found = sum(size for where, size in kept.items() if where not in weights)
    assert cost.peak(p).saved == pytest.approx(found, rel=0.25)
    back()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_page_on_cost_says_the_same_from_the_shape_alone(family, tokenizer):
    lm = prepare(make(family, len(tokenizer)), tokenizer, family, "float32")
    c, inner = lm.model.config, 128 if family == "gpt2" else 48
    groups = getattr(c, "num_key_value_heads", c.num_attention_heads)
    width = c.hidden_size // c.num_attention_heads
    shape = cost_table.Shape(
        c.num_hidden_layers,
        c.hidden_size,
        inner,
        c.vocab_size,
        c.num_attention_heads,
        groups,
        width,
        family != "gpt2",
    )
    cost, p = Cost(lm), Pass(90, past=40)
    assert cost.multiplied == shape.P
    assert cost.flop(p) == shape.forward(90, 40)
    assert cost.flop(Pass(90, backward=True)) == shape.forward(90) + shape.backward(90)
    assert cost.cached == 4 * shape.cached
    assert cost.activations["saved"] == pytest.approx(4 * shape.saved, rel=0.1)


@pytest.mark.parametrize(("tokens", "past", "tile"), [(7, 0, 3), (12, 5, 4), (5, 2, 9), (1, 8, 1)])
def test_pairs_of_tiles_are_those_that_a_loop_meets(tokens, past, tile):
    seen = 0
    for start in range(0, tokens, tile):
        rows = range(start, min(start + tile, tokens))
        seen += len(rows) * (rows[-1] + 1 + past)
    assert _pairs(tokens, tokens + past, tile) == seen


def test_many_tiles_are_counted(gpt2, monkeypatch):
    monkeypatch.setitem(streaming.TILE_BYTES, "cpu", 1 << 15)
    p, cost = Pass(200, backward=True), Cost(gpt2)
    with FlopCounterMode(display=False) as counter:
        cost._run(p)
    assert cost.flop(p) == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_experts_that_are_chosen_are_counted(tokenizer, monkeypatch):
    """Half of the experts' matrices, since one of two is chosen; biases and the head aside."""
    lm = prepare(make("gpt_oss_sinks", len(tokenizer)), tokenizer, "gpt_oss_sinks", "float32")
    own = {n: w.numel() for n, w in lm.model.named_parameters() if w.dim() >= 2 and "layers" in n}
    experts = sum(size for name, size in own.items() if ".experts." in name)
    assert Cost(lm).multiplied == sum(own.values()) - experts / 2
    monkeypatch.setattr("anchors.study.cost._chosen", lambda _: None)
    assert Cost(lm).multiplied is None
    assert Cost(lm).flop(Pass(5)) is None


ANALYSES = [
    InformationFlow(),
    FlowMap(layers=(0,)),
    Classification(),
    Isolation(layers=(1, 2)),
    TopWords(Isolation(layers=(1,), sides=("first",))),
    Readout(),
    Reweighting(epochs=2, per_class=2),
    Compression(draws=3),
    Speed(repeats=2),
    Diagnosis(components=(2,)),
    Causal(stride=2),
]


@pytest.mark.parametrize("analysis", ANALYSES, ids=lambda a: a.kind)
def test_a_run_takes_as_many_operations_as_were_foretold(
    analysis, gpt2: LanguageModel, tmp_path, monkeypatch
):
    monkeypatch.setattr(Cost, "seconds", lambda *_: 0.0)
    monkeypatch.setattr(Cost, "activations", dict.fromkeys(("forward", "saved", "backward"), 1.0))
    task = task_of("sst2")
    few = Sample(examples=2, seeds=(1,)) if analysis.kind == "map" else Sample(examples=4, seeds=(1, 2))
    part = Part(analysis, task, read(task), few)
    (foretold,) = outlook(gpt2, [part], tmp_path)
    with FlopCounterMode(display=False) as counter:
        measure(gpt2, analysis, task, part.data, part.how, out=tmp_path)
    # Examples that β is fitted on are as long as those that are asked, on average.
    rough = 0.1 if analysis.kind == "reweight" else 0.05
    assert foretold.flop == pytest.approx(counter.get_total_flops(), rel=rough)


def test_time_is_of_what_runs(gpt2, monkeypatch):
    """Lengths that are close share a timing, long ones lie on the parabola through two."""
    cost = Cost(gpt2)
    monkeypatch.setattr(Cost, "_timed", lambda _, p: 2.0 * p.tokens + 0.5 * p.tokens**2)
    assert cost.seconds(Pass(4000)) == pytest.approx(2.0 * 4000 + 0.5 * 4000**2)
    monkeypatch.undo()
    ran: list[Pass] = []
    run = Cost._run
    monkeypatch.setattr(Cost, "_run", lambda self, p: (ran.append(p), run(self, p)))
    one, other = cost.seconds(Pass(66)), cost.seconds(Pass(70))
    assert other / one == pytest.approx(cost.flop(Pass(70)) / cost.flop(Pass(66)))
    assert {p.tokens for p in ran} == {8, 64}
    assert [rounded(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 47, 48)] == [
        0,
        1,
        2,
        3,
        4,
        4,
        6,
        6,
        8,
        8,
        12,
        32,
        48,
    ]
    assert set(PLAIN) < set(CONFIGS)
