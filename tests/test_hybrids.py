"""Models whose layers do not all attend: true layer numbers, states carried on or prompts run whole, and what is refused."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from sweep import tiny
from test_viewer_browser import quiet, viewer  # noqa: F401 - fixtures
from torch.utils.flop_counter import FlopCounterMode

from anchors import task as task_of
from anchors.analyses.classification import Classification
from anchors.analyses.compression import Compression
from anchors.analyses.flow import InformationFlow
from anchors.analyses.isolation import Isolation
from anchors.analyses.readout import Readout
from anchors.analyses.reweighting import Reweighting
from anchors.attention.edits import isolate
from anchors.attention.layers import attending, beside_attention, ranges
from anchors.attention.seam import seam
from anchors.certificate.agreement import beside_witness
from anchors.context import answer, cache_argument, encode, queries
from anchors.errors import AnchorsError
from anchors.flow import flow
from anchors.model.language import load
from anchors.model.loading import without_gpu_kernels
from anchors.model.witness import ROWS, TOLERANCE, apart
from anchors.study.cost import Cost
from anchors.study.plan import outlook
from anchors.study.prompted import Part, notes_on
from anchors.study.runner import Sample, measure
from anchors.tasks.data import read
from anchors.viewer.payload import payload, prompt_payload

CARRIED = {"lfm2": True, "qwen3_next": True, "nemotron_h": True, "falcon_h1": True, "jamba": False}


@pytest.fixture(scope="module")
def hybrid(tokenizer):
    made = {}

    def get(name, precision="float32"):
        if (name, precision) not in made:
            with without_gpu_kernels():
                model = tiny.wide(tiny.build(name, len(tokenizer), 400))
            made[name, precision] = load(model, tokenizer=tokenizer, device="cpu", precision=precision)
        return made[name, precision]

    return get


@pytest.mark.parametrize("name", CARRIED)
def test_what_a_model_carries_on_is_found_out(hybrid, name):
    assert hybrid(name).carries == CARRIED[name]


@pytest.mark.parametrize(("name", "said"), [("jamba", 0.1), ("lfm2", 1.0)])
def test_a_lost_state_is_noticed_where_its_loss_drowns_in_rounding(tokenizer, name, said):
    """Recurrent layers that say little: in bfloat16 Jamba's logits without their state are within tolerance of those with it."""
    with without_gpu_kernels():
        own = tiny.wide(tiny.build(name, len(tokenizer), 400))
    for part, weight in own.named_parameters():
        if "mamba.out_proj" in part or "conv.out_proj" in part:
            weight.data *= said
    lm = load(own, tokenizer=tokenizer, device="cpu", precision="bfloat16")
    ids = torch.arange(10, 90)[None]
    context = encode(replace(lm, carries=True), ids[0, :67].tolist())
    with torch.no_grad():
        found = lm.logits(ids[:, 67:], None, context)
    assert apart(found, lm.witness.logits(ids)[:, 67:]) <= TOLERANCE["bfloat16"]
    assert lm.carries == CARRIED[name]


@pytest.mark.parametrize("batch", [1, 3])
def test_one_token_after_a_state_is_that_of_the_prompt(tokenizer, batch):
    """Nemotron-H keeps its time step above a limit for several tokens and not for one; the limit is made to tell."""
    with without_gpu_kernels():
        own = tiny.wide(tiny.build("nemotron_h", len(tokenizer), 400))
    for module in own.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.1, float("inf"))
    lm = load(own, tokenizer=tokenizer, device="cpu")
    ids = torch.arange(30, 54).expand(batch, -1)
    context = encode(lm, ids[0, :-1].tolist())
    whole = lm.witness.logits(ids)[:, -1:]
    with torch.no_grad():
        past = {cache_argument(own): context.cache(batch), **lm.positions(ids[:, -1:], context)}
        alone = own(input_ids=ids[:, -1:], use_cache=True, **past).logits
        found = lm.logits(ids[:, -1:], None, context)
    assert lm.carries
    assert apart(alone, whole) > 3e-4
    assert apart(found, whole) < 1e-5
    with pytest.raises(AnchorsError, match="one token on"):
        encode(lm, [5], context)
    assert encode(lm, [5, 6], context).length == context.length + 2


@pytest.mark.parametrize("name", ["bamba", "nemotron_h", "roberta", "bart"])
def test_the_witness_of_a_long_prompts_end_counts_on(hybrid, name):
    """Bamba counts from zero again after its cache, RoBERTa from two, and BART takes no positions."""
    lm, ids = hybrid(name), torch.arange(10, 160)[None]
    own = lm.witness.logits(ids)[:, -ROWS:]
    assert apart(lm.witness.last_logits(ids, lm.first_position), own) < 1e-5
    assert name != "bamba" or apart(lm.witness.last_logits(ids), own) > 0.1


def test_a_lost_state_is_no_witness(hybrid, monkeypatch):
    monkeypatch.setattr("anchors.certificate.agreement.EAGER_BYTES", 1 << 20)
    row = range(10, 160)
    found = {name: beside_witness(hybrid(name), "long", row) for name in ("jamba", "bamba")}
    assert found["jamba"].ok is None
    assert "does not go on from its recurrent state" in found["jamba"].detail
    assert found["bamba"].ok
    assert "its last 64 rows" in found["bamba"].detail


@pytest.mark.parametrize("name", ["qwen3_next", "jamba"])
def test_demonstrations_under_an_edit_serve_a_batch(hybrid, make_cell, name):
    """Each row of a batch gets them: against whole prompts of one row, edited in the same places."""
    lm, prompts = hybrid(name), [d.prompt for d in make_cell(examples=2).prompts]
    start, where = prompts[0].query, torch.tensor([prompts[0].label_positions])
    edit = isolate(lm.layers, where)
    with seam(lm.modules, edits=[edit]):
        context = encode(lm, prompts[0].ids[:start])
    found = answer(lm, context, queries(prompts, start, "cpu"))
    assert (context.again is None) == CARRIED[name]
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids])
        with torch.no_grad(), seam(lm.modules, edits=[edit]):
            whole = lm.model(input_ids=ids, use_cache=False).logits[0, -1]
        torch.testing.assert_close(found[row], whole, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(whole, lm.logits(ids)[0, -1], rtol=1e-2, atol=1e-2)


def test_rows_have_the_numbers_of_the_layers(hybrid, make_cell):
    lm, cell = hybrid("nemotron_h"), make_cell(examples=2)
    assert (lm.layers, lm.n_layers) == ((2,), 4)
    assert flow(lm, [cell.prompts[0].prompt], maps=[2]).sums.s_wp.shape == (1, 1)
    rows = measure(lm, Readout(), cell.task, cell.data, Sample(shots=1, examples=2)).rows
    assert set(rows["layer"].dropna()) == {2}
    shown = prompt_payload(lm, cell.task, cell.prompts[0].prompt, "a prompt", lm.layers)
    assert [value is None for value in shown["s_wp"]] == [True, True, False, True]
    assert shown["notes"] == [lm.beside_attention]


def test_the_page_keys_through_the_layers_that_attend(hybrid, make_cell, viewer):
    """Two prompts side by side: no layer without attention is stopped at, and its row says so."""
    lm, cell = hybrid("lfm2"), make_cell(examples=2)
    made = [
        prompt_payload(lm, cell.task, d.prompt, f"prompt {n}", lm.layers) for n, d in enumerate(cell.prompts)
    ]
    viewer.open(payload("a hybrid", lm, cell.task, made, {}), "#prompt=1&layer=1&beside=2:3")
    assert viewer.text("#at") == "1 / 3"
    assert viewer.text("#at2") == "3 / 3"
    for key, layer in (("k", "3"), ("k", "3"), ("j", "1"), ("j", "1")):
        viewer.keys(key)
        viewer.settle()
        assert viewer.layer == layer
        assert viewer.arcs
    assert viewer.text("#status").startswith("Layer 1: ")
    rows = viewer.each("#sums tbody tr", "[...e.children].map(c => c.textContent)")
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [row[1:] == ["no attention"] for row in rows] == [True, False, True, False]
    shown = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
    for layer in (1, 3):
        value = float(rows[layer][2].translate(shown).replace("×10", "e"))
        assert value == pytest.approx(made[0]["s_pq"][layer], rel=0.01)
    ticks = viewer.each("#chart svg text[text-anchor=middle]")
    assert ticks == ["1", "3", "layer"]
    viewer.keys("b", "c", "f")
    assert viewer.text("#notes").startswith("Tokens reach later ones through a recurrent state")
    viewer.open(payload("a hybrid", lm, cell.task, made, {}), "#layer=0")
    assert viewer.layer in ("1", "3")


def test_layers_without_attention_are_refused_by_number(hybrid, make_cell):
    lm, cell = hybrid("nemotron_h"), make_cell(examples=1)
    with pytest.raises(AnchorsError, match=r"(?s)no attention in layers \[0\].*of which 2 attend"):
        flow(lm, [cell.prompts[0].prompt], maps=[0])
    with pytest.raises(AnchorsError, match=r"None of the first 2 layers .* attends"):
        Isolation(layers=(2,)).prepare(lm, cell)
    assert set(Isolation(layers=(3,), positions=("label",)).prepare(lm, cell)) == {
        "none", "first-3/label", "last-3/label"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["lfm2", "jamba"])
def test_a_state_cannot_be_compressed(hybrid, make_cell, name):
    with pytest.raises(AnchorsError, match="in which all tokens are mixed"):
        Compression().prepare(hybrid(name), make_cell(examples=1))


def test_notes_say_what_the_sums_leave_out(hybrid, make_cell):
    lm, cell = hybrid("jamba"), make_cell(examples=1)
    part = Part(Readout(), cell.task, cell.data, Sample(shots=1, examples=1))
    notes = notes_on(lm, part, measure(lm, part.analysis, part.task, part.data, part.how))
    assert any("in layers 0, 2" in note and "isolation leaves that path open" in note for note in notes)
    assert any("are run again with every query" in note for note in notes)


def test_layers_are_those_of_the_configuration():
    config = tiny.config("granitemoehybrid", 100, 400)
    assert attending(config) == (1, 3)
    assert attending(tiny.config("gemma2", 100, 400)) == (0, 1, 2, 3)
    assert beside_attention(tiny.config("llama", 100, 400)) is None
    assert ranges((0, 1, 2, 4, 6, 7)) == "0 to 2, 4, 6, 7"


@pytest.mark.parametrize(
    "analysis",
    [InformationFlow(), Classification(), Reweighting(epochs=2, per_class=6)],
    ids=lambda own: own.kind,
)
def test_what_runs_is_what_was_foretold(hybrid, tmp_path, monkeypatch, analysis):
    """No gradient goes below the first layer that attends, and a step of re-weighting is a whole prompt."""
    lm, task = hybrid("lfm2"), task_of("sst2")
    monkeypatch.setattr(Cost, "seconds", lambda *_: 0.0)
    monkeypatch.setattr(Cost, "activations", dict.fromkeys(("forward", "saved", "backward"), 1.0))
    part = Part(analysis, task, read(task), Sample(shots=1, examples=6, seeds=(1,)))
    (foretold,) = outlook(lm, [part], tmp_path)
    with FlopCounterMode(display=False) as counter:
        found = measure(lm, analysis, task, part.data, part.how, out=tmp_path)
    # Examples that β is fitted on are as long as those that are asked, on average.
    rough = 0.15 if analysis.kind == "reweight" else 0.02
    assert foretold.flop == pytest.approx(counter.get_total_flops(), rel=rough)
    said = [note for note in notes_on(lm, part, found) if "steps of re-weighting run whole prompts" in note]
    assert len(said) == (analysis.kind == "reweight")
