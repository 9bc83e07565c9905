"""What makes a pass faster or smaller, against the pass as it stands: blocks computed twice, norms in one kernel, recordings."""

from dataclasses import replace
from typing import NamedTuple
from weakref import WeakSet

import pytest
import torch
from common import apart
from families import DENSE, make
from gpu import needs_cuda

from anchors import context as contexts
from anchors.attention import call as attention_call
from anchors.context import answer, encode, queries
from anchors.flow import saliency
from anchors.flow.saliency import Flow, flow, literal_flow
from anchors.model.language import LanguageModel, load
from anchors.model.memory import kept
from anchors.model.recompute import blocks_of, recomputing
from anchors.model.replay import State, replays_of
from anchors.reweighting import fit
from anchors.tasks.prompts import Prompt

TILED = {"gemma2_softcap_window", "gpt_oss_sinks"}
"""Families whose scores are capped or have sinks: the kernels know neither."""
WINDOWED = TILED | {"gemma3_window", "mistral_window"}
"""Those whose mask on a context is no band: what it hides would have to be waited for."""


class Numbers(NamedTuple):
    sums: torch.Tensor
    maps: torch.Tensor
    loss: torch.Tensor


def numbers(found: Flow) -> Numbers:
    sums = torch.stack([found.sums.s_wp, found.sums.s_pq, found.sums.s_ww])
    return Numbers(sums, torch.stack([found.maps[layer] for layer in sorted(found.maps)]), found.loss)


@pytest.mark.parametrize("keep", [True, False])
def test_blocks_that_are_computed_twice_give_the_same_bits(
    lm: LanguageModel, prompts: list[Prompt], keep: bool
) -> None:
    blocks = blocks_of(lm.model, lm.modules)
    assert len(blocks) == lm.n_layers
    plain = numbers(flow(lm, prompts[:2], maps=[0, lm.n_layers - 1]))
    own = [block.forward for block in blocks]
    with recomputing(blocks, lm.arithmetic, keep=keep):
        again = numbers(flow(lm, prompts[:2], maps=[0, lm.n_layers - 1]))
    assert all(map(torch.equal, plain, again))
    assert [block.forward for block in blocks] == own


def test_what_a_pass_keeps_is_counted(gpt2: LanguageModel) -> None:
    found = kept(gpt2)
    assert len(found.blocks) == gpt2.n_layers
    width, layers = gpt2.model.config.hidden_size, gpt2.n_layers
    assert found.inputs == 4 * width * layers
    assert found.attention == 4 * (width + gpt2.heads[0]) * layers
    # q, k, v, both norms' inputs and outputs, z, the residual stream, four widths twice: of each layer.
    assert 10 * width * layers * 4 < found.plainly < 20 * width * layers * 4


def test_a_long_prompt_is_computed_twice_by_itself(gpt2, prompts, monkeypatch) -> None:
    """As little is kept as the plan says: while one block is differentiated, the graphs of those behind it are gone."""
    from anchors.model import memory

    alive: list[int] = []
    graphs = WeakSet()

    def seen(call, taps):
        graphs.add(call)
        alive.append(len(graphs))
        return streaming(call, taps)

    streaming = attention_call.streaming
    plain = numbers(flow(gpt2, prompts[:1], maps=[0]))
    monkeypatch.setattr(attention_call, "streaming", seen)
    monkeypatch.setattr(memory, "CPU_TOKENS", 0)
    monkeypatch.setattr(memory, "CPU_BYTES", 0)
    kept(gpt2)
    alive.clear()
    again = numbers(flow(gpt2, prompts[:1], maps=[0]))
    assert all(map(torch.equal, plain, again))
    # The first block is differentiated as it is: below it nothing needs a gradient.
    assert len(alive) == 2 * gpt2.n_layers - 1
    assert max(alive[gpt2.n_layers :]) <= 2


def test_any_change_of_a_model_is_noticed(tokenizer) -> None:
    """A record is of the model as it was: weights moved, hooks, attributes and submodules make another of it."""
    model = make("gpt2", len(tokenizer))
    block = model.transformer.h[0]
    weight = block.mlp.c_fc.weight
    old = weight.data
    changes = {
        "weights elsewhere": (
            lambda: setattr(weight, "data", old.clone()),
            lambda: setattr(weight, "data", old),
        ),
        "an attribute": (
            lambda: setattr(block.attn, "layer_idx", 7),
            lambda: setattr(block.attn, "layer_idx", 0),
        ),
        "a forward": (
            lambda: setattr(block, "forward", block.mlp.forward),
            lambda: delattr(block, "forward"),
        ),
        "a mode": (model.train, model.eval),
    }
    state = State(model)
    assert state.same()
    assert not state.one_device  # it lies on the CPU
    for name, (change, back) in changes.items():
        change()
        assert not state.same(), name
        back()
        assert state.same(), name
    handle = block.register_forward_hook(lambda *_: None)
    assert not state.same()
    handle.remove()
    weight.data.mul_(2)  # in place: the same memory is read
    assert state.same()
    block.mlp.c_fc.weight = torch.nn.Parameter(old.clone())
    assert not state.same()


def test_inputs_of_several_dtypes_are_copied_by_one_order_each() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from anchors.model.replay import copy_all

    orders = []

    class Orders(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            orders.append(func)
            return func(*args, **(kwargs or {}))

    given = [
        torch.randn(2, 3), torch.tensor([[7]]), torch.randn(5).bfloat16(), torch.randn(4), torch.tensor([1, 2])
    ]  # fmt: skip
    held = [torch.zeros_like(x) for x in given]
    with Orders():
        copy_all(held, given)
    assert all(map(torch.equal, held, given))
    assert orders == 3 * [torch.ops.aten._foreach_copy_.default]


def test_no_record_is_made_into_a_pool_that_died(monkeypatch) -> None:
    """With its last record, or with the first one's failure."""
    from anchors.model import replay

    pools, handles = [], iter("abcd")

    class Record(replay._Record):
        def __init__(self, step, inputs, pool) -> None:
            pools.append(pool)
            step()

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(replay, "_share", lambda device: 0.1)
    monkeypatch.setattr(replay, "_Record", Record)
    kind, x = replay.Replays(), torch.zeros(1)

    def recorded(key: str, step) -> bool:
        kind._widths[key] = {}
        return kind._recorded(key, step, [x]) is not None

    def full() -> None:
        raise RuntimeError("no memory is left\nat all")

    assert not recorded("first", full)
    assert kind.refused == {"first": "no memory is left"}
    assert recorded("second", list)
    assert not recorded("third", full)
    assert recorded("fourth", list)
    kind.forget()
    assert recorded("fifth", list)
    assert pools == ["a", "b", "b", "b", "c"]


def test_records_take_no_more_than_their_share_and_give_it_back(monkeypatch) -> None:
    from anchors.model import replay

    def unknown(device: torch.device) -> float:
        raise RuntimeError("this allocator tells nothing\nat all")

    held = iter([0.1, 0.3, 0.1])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(replay, "_share", lambda device: next(held))
    monkeypatch.setattr(replay._Record, "__init__", lambda *_: None)
    model, x = torch.nn.Linear(1, 1), torch.zeros(1)
    kind = replay.replays_of(model)

    def recorded(key: str) -> bool:
        kind._widths[key] = {}
        return kind._recorded(key, list, [x]) is not None

    assert [recorded(key) for key in "abc"] == [True, True, False]
    assert kind.refused == {"c": "records hold 30% of the GPU's memory"}
    assert replay.released()
    assert not kind.recorded
    assert not replay.released()
    assert set(kind.refused) == {"a", "b"}
    kind._runs = {"a": replay.PLAIN_RUNS, "c": replay.PLAIN_RUNS}
    ran: list[str] = []
    assert kind._run("a", lambda _: ran.append("a") or (x,), [x]) == (x,)
    assert ran == ["a"]
    assert recorded("c")
    monkeypatch.setattr(replay, "_share", unknown)
    assert [recorded(key) for key in "de"] == [True, False]
    assert kind.refused["e"] == "this allocator tells nothing"


def test_what_records_hold_is_counted_over_all_models(monkeypatch) -> None:
    """Pools, and the inputs of records, which lie outside of them; nothing of a pool that is gone."""
    from types import SimpleNamespace

    from anchors.model import replay

    models = [torch.nn.Linear(1, 1) for _ in range(3)]
    for number, model in enumerate(models[:2]):
        kind = replay.replays_of(model)
        kind._pool = (0, number)
        kind._records["a step"] = SimpleNamespace(inputs=[torch.zeros(10), torch.zeros(5).expand(3, 5)])
    replay.replays_of(models[2])._pool = (0, 2)
    segments = [{"total_size": 100 * (n + 1), "segment_pool_id": (0, n)} for n in range(4)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1000))
    monkeypatch.setattr(replay, "_REPLAYS", {model: replay.replays_of(model) for model in models})
    assert replay._share(torch.device("cuda")) == (100 + 200 + 2 * 4 * (10 + 5)) / 1000


def on_cuda(family: str, tokenizer, precision: str) -> LanguageModel:
    return load(make(family, len(tokenizer)), tokenizer=tokenizer, device="cuda", precision=precision)


@needs_cuda
@pytest.mark.parametrize("family", DENSE)
def test_recorded_passes_are_the_pass(family, tokenizer, prompts, monkeypatch) -> None:
    """Each prompt of a bucket is answered by itself, and the plain pass is the witness."""
    from anchors.model import replay

    lm = on_cuda(family, tokenizer, "float32")
    plain = [numbers(flow(lm, [p], maps=[0])) for p in prompts]
    kind = replay.replays_of(lm.model)
    for _ in range(3):
        for p in prompts:
            flow(lm, [p], maps=[0])
    tiled = any("tiles" in why for why in kind.refused.values())
    assert tiled == (family in TILED)
    assert bool(kind.recorded) != tiled
    for p, own in zip(prompts, plain, strict=True):
        found = numbers(flow(lm, [p], maps=[0]))
        assert max(map(apart, found, own)) < 1e-6
    other = replace(prompts[0], gold=1 - prompts[0].gold)
    with monkeypatch.context() as patch:
        patch.setattr(saliency, "TOKENS", 0)
        own = numbers(flow(lm, [other], maps=[0]))
    assert max(map(apart, numbers(flow(lm, [other], maps=[0])), own)) < 1e-6


@needs_cuda
@pytest.mark.parametrize("family", DENSE)
def test_recorded_answers_on_a_context_are_the_answers(family, tokenizer, make_cell, monkeypatch) -> None:
    lm = on_cuda(family, tokenizer, "float32")
    asked = [drawn.prompt for drawn in make_cell(examples=3).prompts]
    shared = asked[0].query
    context = encode(lm, asked[0].ids[:shared])
    with monkeypatch.context() as patch:
        patch.setattr(contexts, "_replayable", lambda *_: False)
        plain = [answer(lm, context, queries([p], shared, lm.device)) for p in asked]
    for _ in range(4):
        found = [answer(lm, context, queries([p], shared, lm.device)) for p in asked]
    assert max(map(apart, found, plain)) < 1e-5
    assert bool(replays_of(lm.model).recorded) == (family not in WINDOWED)


@needs_cuda
@pytest.mark.parametrize("family", DENSE)
def test_recorded_steps_of_re_weighting_are_the_steps(family, tokenizer, make_cell, monkeypatch) -> None:
    lm = on_cuda(family, tokenizer, "float32")
    asked = [drawn.prompt for drawn in make_cell(examples=3).prompts]
    context = encode(lm, asked[0].ids[: asked[0].query])
    found = fit(lm, context, asked, epochs=5)
    recorded = replays_of(lm.model).recorded
    monkeypatch.setattr(contexts, "_replayable", lambda *_: False)
    plain = fit(lm, context, asked, epochs=5)
    if family == "mistral_window":  # which ends behind the label words: no β has a slope
        assert not plain.beta.any()
        assert not found.beta.any()
    else:
        assert plain.beta.abs().max() > 1e-3
        assert apart(found.beta, plain.beta) < 1e-4
    # The mask of a single last token may be a band in a model with windows, too.
    assert bool(recorded) or family in WINDOWED


@needs_cuda
def test_a_changed_model_is_not_replayed(tokenizer, prompts) -> None:
    from anchors.model import replay

    lm = on_cuda("gpt2", tokenizer, "float32")
    kind = replay.replays_of(lm.model)

    def recorded() -> Flow:
        for _ in range(3):
            found = flow(lm, prompts[:1])
        assert kind.recorded
        return found

    before = recorded().loss
    block = blocks_of(lm.model, lm.modules)[1]
    weight = lm.model.get_input_embeddings().weight
    kept = weight.data
    weight.data = kept * 1.5
    assert not torch.equal(flow(lm, prompts[:1]).loss, before)
    assert not kind.recorded
    weight.data = kept
    assert apart(recorded().loss, before) < 1e-5
    handle = block.register_forward_hook(
        lambda _, __, y: 2 * y if isinstance(y, torch.Tensor) else (2 * y[0], *y[1:])
    )
    assert not torch.equal(flow(lm, prompts[:1]).loss, before)
    handle.remove()
    recorded()
    weight.data.mul_(1.5)  # in place: the record reads the weights where they lie
    changed = flow(lm, prompts[:1]).loss
    assert not torch.equal(changed, before)
    replay.replays_of(lm.model).forget()
    assert (
        apart(flow(lm, prompts[:1]).loss, changed) < 1e-5
    )  # while work is recorded masks are made that are not made else


@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", DENSE)
def test_norms_in_one_kernel_are_the_models_own(family, precision, tokenizer, prompts) -> None:
    from anchors.model.norms import OneKernel
    from anchors.model.preparation import undone

    lm = on_cuda(family, tokenizer, precision)
    norms = [a for a in lm.altered if isinstance(a.after, OneKernel)]
    assert norms
    found = numbers(flow(lm, prompts[:2], maps=[0]))
    with undone(norms):
        own = numbers(flow(lm, prompts[:2], maps=[0]))
    allowed = 1e-5 if precision == "float32" else 2e-2
    assert max(map(apart, found, own)) < allowed


@needs_cuda
def test_long_prompts_are_computed_twice(tokenizer, prompts, monkeypatch) -> None:
    from anchors.model import memory

    lm = on_cuda("gpt2", tokenizer, "float32")
    plain = numbers(flow(lm, prompts[:1], maps=[0]))
    monkeypatch.setattr(saliency, "TOKENS", 0)
    monkeypatch.setattr(memory, "TOKENS", 0)
    monkeypatch.setattr(memory, "SHARE", 0.0)
    assert memory.twice(lm, len(prompts[0].ids)) is not None
    found = numbers(flow(lm, prompts[:1], maps=[0]))
    assert max(map(apart, found, plain)) < 1e-6
    exact = literal_flow(lm, prompts[0])
    assert apart(found.maps[0, 0], exact[0]) < 1e-4
