"""NSA as a module and a language model: causality, caches, packing, saving, and the toolkit on top."""

import gc

import pytest
import torch
from families import CONFIGS, make
from transformers import AutoModelForCausalLM

from anchors.attention.edits import Edit, isolate
from anchors.attention.seam import route, seam
from anchors.context import encode
from anchors.errors import AnchorsError
from anchors.nsa.attention import BRANCHES
from anchors.nsa.call import Intervention, NSACall
from anchors.nsa.config import ROPE, NSAConfig
from anchors.nsa.model import NativeSparseAttention, NSAForCausalLM
from anchors.nsa.phi import PHI

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "eos_token_id": None,
}
SPARSE = {"l": 8, "d": 4, "lp": 16, "n": 4, "w": 12, "num_attention_heads": 4, "num_key_value_heads": 2}


def model(dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = NSAForCausalLM(NSAConfig(**(SIZES | SPARSE | options))).to(dtype).eval()
    for weight in made.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, std=0.3)
    return made


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 50, (2, 90), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("kind", PHI)
def test_the_future_changes_nothing(ids, rope, kind):
    """Through projections, rotary embedding, φ and selection: earlier logits are the same bits, and the gradient of a
    row by later inputs is exactly zero."""
    lm = model(phi=kind, compressed_rope=rope, value_head_dim=5)
    embedded = lm.get_input_embeddings()(ids).detach().requires_grad_()
    logits = lm(inputs_embeds=embedded).logits
    other = embedded.detach().clone()
    other[:, 53:] = torch.randn_like(other[:, 53:])
    assert torch.equal(lm(inputs_embeds=other).logits[:, :53], logits[:, :53])
    (slope,) = torch.autograd.grad(logits[:, 52].square().sum(), embedded)
    assert not slope[:, 53:].any()
    assert slope[:, :53].any(-1).all()


def test_generation_is_the_greedy_continuation(ids):
    lm = model()
    start = ids[:1, :20]
    found = lm.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=25, do_sample=False, pad_token_id=0
    )
    for _ in range(25):
        start = torch.cat([start, lm(start).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, start)


def test_packed_sequences_do_not_see_each_other():
    torch.manual_seed(0)
    layer = NativeSparseAttention(NSAConfig(**SIZES, **SPARSE)).double()
    x = torch.randn(1, 60, 24, dtype=torch.float64)
    packed, _ = layer(x, cu_seqlens=torch.tensor([0, 5, 5, 41, 60]))
    alone = torch.cat([layer(x[:, a:b])[0] for a, b in ((0, 5), (5, 41), (41, 60))], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    with pytest.raises(AnchorsError, match="one row"):
        layer(x.expand(2, -1, -1), cu_seqlens=torch.tensor([0, 60]))


@pytest.mark.parametrize("rope", ROPE)
def test_packed_and_padded_texts_are_those_of_the_model_alone(ids, rope):
    """By bounds, by positions and by a mask, on either side."""
    lm, close = model(compressed_rope=rope), {"rtol": 1e-9, "atol": 1e-9}
    edges = [(0, 33), (33, 34), (34, 71), (71, 90)]
    alone = torch.cat([lm(ids[:1, a:b]).logits for a, b in edges], dim=1)
    bounds = torch.tensor([0, 33, 34, 71, 90])
    positions = torch.cat([torch.arange(b - a) for a, b in edges])[None]
    torch.testing.assert_close(lm(ids[:1], cu_seqlens=bounds).logits, alone, **close)
    torch.testing.assert_close(lm(ids[:1], position_ids=positions).logits, alone, **close)
    mask = torch.ones_like(ids)
    mask[0, :19], mask[1, 40:] = 0, 0
    padded = lm(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[:1, 19:], lm(ids[:1, 19:]).logits, **close)
    torch.testing.assert_close(padded[1:, :40], lm(ids[1:, :40]).logits, **close)
    layer, x = lm.model.layers[0].self_attn, torch.randn(2, 90, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x, attention_mask=mask)[0][:1, 19:], layer(x[:1, 19:])[0], **close)


def test_a_cache_of_several_texts_is_not_continued(ids):
    lm = model()
    out = lm(ids[:1], cu_seqlens=torch.tensor([0, 40, 90]), use_cache=True)
    with pytest.raises(AnchorsError, match="several texts in a row, was to be continued"):
        lm(ids[:1, :1], past_key_values=out.past_key_values)
    with pytest.raises(AnchorsError, match="one row"):
        lm(ids[:1], cu_seqlens=torch.tensor([0, 90]), past_key_values=out.past_key_values)


def test_an_analysis_is_not_given_several_texts(ids):
    lm, mask = model(torch.float32), torch.ones_like(ids)
    mask[0, :3] = 0
    route(lm)
    with pytest.raises(AnchorsError, match="hides tokens"):
        lm(ids, attention_mask=mask)
    with pytest.raises(AnchorsError, match="one text a row"):
        lm(ids[:1], cu_seqlens=torch.tensor([0, 40, 90]))


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_saved_and_loaded_it_is_the_same_model(ids, tmp_path, attention):
    lm = model(torch.float32, attention=attention)
    lm.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, NSAForCausalLM)
    assert torch.equal(again(ids).logits, lm(ids).logits)


def test_full_attention_is_transformers_llama():
    lm = model(attention="full")
    assert type(lm.model.layers[0].self_attn).__name__ == "LlamaAttention"


def test_initial_weights():
    lm = NSAForCausalLM(NSAConfig(**SIZES, **SPARSE, gate_bias=1.5))
    layer = lm.model.layers[0].self_attn
    assert (layer.gate_proj.bias == 1.5).all()
    assert not layer.phi_k.down.any()
    assert layer.q_proj.weight.std() < 0.03


def test_padding_is_refused_where_it_cannot_be_left_out(ids):
    lm, mask = model(), torch.ones_like(ids)
    mask[0, :3] = 0
    mask[0, 0] = 1
    with pytest.raises(AnchorsError, match="within a text"):
        lm(ids, attention_mask=mask)
    torch.testing.assert_close(lm(ids, attention_mask=torch.ones_like(ids)).logits, lm(ids).logits)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_key_value_heads": 3}, "cannot be divided"), ({"phi": "max"}, "no phi"), ({"attention": "half"}, "no attention"),
        ({"l": 6}, "not a multiple"), ({"backend": "cuda"}, "no backend"), ({"attention": "full", "value_head_dim": 4}, "d_v = d_k"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be(options, said):
    with pytest.raises(AnchorsError, match=said):
        NSAConfig(**SIZES, **(SPARSE | options))


class Products:
    """A tap that adds up the saliency of each branch."""

    def __init__(self, layers):
        self.layers, self.found = frozenset(range(layers)), {}

    def begin(self, call, z, dz):
        self.inner = (z * dz).sum(-1)
        self.trace = call.trace
        self.dz = dz

    def tile(self, call, rows, keys, product):
        torch.testing.assert_close(product.sum(-1), self.inner[:, :, rows], rtol=1e-9, atol=1e-12)

    def branches(self, call, rows, by_branch):
        for c, name in enumerate(BRANCHES):
            signed = self.trace.gates[..., c] * (self.dz.transpose(1, 2) * self.trace.branch_o[c]).sum(-1)
            torch.testing.assert_close(
                by_branch[name].sum(-1), signed.transpose(1, 2)[:, :, rows], rtol=1e-9, atol=1e-12
            )
        self.found[call.layer] = {name: x.clone() for name, x in by_branch.items()}


@pytest.mark.parametrize("kind", PHI)
def test_the_saliency_of_each_branch_sums_to_its_gate_slope(ids, kind):
    """Σ_j A^c ∂L/∂A^c = g^c ∂L/∂g^c = g^c ⟨dz, o^c⟩ for every row, head and branch."""
    lm = model(phi=kind)
    modules = route(lm)
    tap = Products(2)
    with seam(modules, taps=[tap]):
        lm(ids).logits[:, -1].logsumexp(-1).sum().backward()
    assert set(tap.found) == {0, 1}
    for by_branch in tap.found.values():
        assert all(torch.equal(x.triu(1), torch.zeros_like(x)) for x in by_branch.values())


def test_the_saliency_of_a_pair_is_the_derivative_by_its_weight(ids):
    """∂L/∂W_ij of a weight on every path from token j to query i, through all branches and φ."""
    lm = model(phi="mlp")
    modules = route(lm)
    tap = Products(2)
    with seam(modules, taps=[tap]):
        lm(ids).logits[:, -1].logsumexp(-1).sum().backward()
    for layer in range(2):
        ones = torch.ones(2, 4, 90, 90, dtype=torch.float64, requires_grad=True)
        edit = Edit(frozenset([layer]), weight=lambda call, w=ones: w, neutral=True)
        with seam(modules, edits=[edit]):
            (slope,) = torch.autograd.grad(lm(ids).logits[:, -1].logsumexp(-1).sum(), ones)
        torch.testing.assert_close(sum(tap.found[layer].values()), slope, rtol=1e-8, atol=1e-12)


def test_isolated_positions_see_only_themselves():
    lm = model()
    modules = route(lm)
    embedded = lm.get_input_embeddings()(torch.arange(40)[None]).detach()
    other = embedded.clone()
    other[:, 3] += 1
    edit = isolate(range(2), torch.tensor([[30]]))
    with seam(modules, edits=[edit]):
        one, two = (lm(inputs_embeds=x).logits for x in (embedded, other))
    assert torch.equal(one[:, 30], two[:, 30])
    assert not torch.equal(one[:, 31], two[:, 31])


def blocks(*chosen):
    """A field over blocks, of the last query only."""

    def made(call):
        field = torch.zeros(
            1, call.q.shape[2], 1, call.sparse.geometry.blocks(call.k.shape[2]), dtype=torch.bool
        )
        field[:, -1, :, list(chosen)] = True
        return field

    return made


def test_interventions_on_blocks_and_gates(ids):
    lm = model()
    modules = route(lm)
    with torch.no_grad():
        plain = lm(ids).logits
        for edit in (
            Intervention(frozenset([0]), ban=blocks(0)),
            Intervention(frozenset([0]), force=blocks(1, 2)),
            Intervention(frozenset([1]), gates=lambda call: torch.tensor([0.0, 1, 1])),
        ):
            with seam(modules, edits=[edit]):
                changed = lm(ids).logits
            assert not torch.equal(changed[:, -1], plain[:, -1])
            if edit.gates is None:
                torch.testing.assert_close(changed[:, :-1], plain[:, :-1])
        with (
            pytest.raises(AnchorsError, match="changed no choice"),
            seam(modules, edits=[Intervention(frozenset([0]), force=blocks(0), name="useless")]),
        ):
            lm(ids)


def test_demonstrations_kept_in_part_stand_where_they_stood(tokenizer):
    """Blocks are counted over what a cache holds, and compressed keys stand at the mean of their tokens' places."""
    from anchors.model.language import load

    lm = load(make("nsa", len(tokenizer)), tokenizer=tokenizer, device="cpu")
    context = encode(lm, list(range(60)))
    assert context.keys[0].shape[1] == 3 * CONFIGS["nsa"].num_key_value_heads
    kept = context.keep([0, *range(20, 50)], next=60)
    layer = kept.cache().layers[0]
    assert layer.positions.tolist() == [[0, *range(20, 50)]]
    longer = encode(lm, [7, 8], kept)
    assert longer.keys[0].shape[2] == 33


def test_taps_leave_nothing_behind(ids):
    """A call that was tapped, with its patterns, is freed with the graph."""
    lm = model()
    modules = route(lm)
    alive = []
    for _ in range(2):
        with seam(modules, taps=[Products(2)]):
            lm(ids).logits[:, -1].logsumexp(-1).sum().backward()
        gc.collect()
        alive.append(sum(isinstance(x, NSACall) for x in gc.get_objects()))
    assert alive == [0, 0]


class Rounding(Products):
    def tile(self, call, rows, keys, product):
        self.off = max(
            getattr(self, "off", 0.0), float((product.sum(-1) - self.inner[:, :, rows]).abs().max())
        )

    def branches(self, call, rows, by_branch):
        pass


def test_the_autocast_of_the_caller_does_not_round_the_products(ids):
    lm = model(torch.float32)
    modules, tap = route(lm), Rounding(2)
    with seam(modules, taps=[tap]):
        loss = lm(ids).logits[:, -1].logsumexp(-1).sum()
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
    assert tap.off < 1e-5


def test_interventions_that_change_no_gate_are_refused(ids):
    lm = model()
    edit = Intervention(frozenset([0]), gates=lambda call: torch.ones(3), name="nothing")
    with pytest.raises(AnchorsError, match="changed no gate"), seam(route(lm), edits=[edit]):
        lm(ids)


def test_texts_shorter_than_a_block_train_phi_by_zero():
    lm = model().train()
    lm(torch.arange(5)[None]).logits.sum().backward()
    for name, weight in lm.named_parameters():
        assert weight.grad is not None, name
        assert not ("phi" in name and weight.grad.any())


def test_inputs_that_hold_nothing_or_do_not_fit_are_refused(ids):
    layer = NativeSparseAttention(NSAConfig(**SIZES, **SPARSE))
    for empty in (torch.zeros(0, 5, 24), torch.zeros(2, 0, 24)):
        with pytest.raises(AnchorsError, match="nothing to attend to"):
            layer(empty)
    with pytest.raises(AnchorsError, match="do not divide"):
        layer(torch.zeros(1, 10, 24), cu_seqlens=torch.tensor([0, 4, 9]))
    with pytest.raises(AnchorsError, match="cache that grows"):
        model(torch.float32).generate(
            ids[:1, :9], attention_mask=torch.ones_like(ids[:1, :9]), max_new_tokens=2, cache_implementation="static",
            pad_token_id=0,
        )  # fmt: skip


def test_geometry_is_part_of_the_fingerprint():
    from anchors.model.language import fingerprint

    one, other = model(), model(n=5)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert fingerprint(one) != fingerprint(other)
