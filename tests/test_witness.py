"""The model as it came is the witness: asked without our positions, our mask or our seam, it says what is right."""

import copy

import pytest
import torch
import transformers
from families import make, randomised

from anchors.attention.seam import attend, seam
from anchors.certificate.agreement import agreement
from anchors.check import check, failed
from anchors.compression import AnchorCache, anchor_tokens, compress
from anchors.context import answer, encode, queries
from anchors.errors import AnchorsError, RoutingError
from anchors.flow import flow
from anchors.model.language import load
from anchors.model.witness import apart

WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
ENCODERS = {
    "Bert": "BertLMHeadModel", "Roberta": "RobertaForCausalLM", "Electra": "ElectraForCausalLM",
    "MegatronBert": "MegatronBertForCausalLM", "RobertaPreLayerNorm": "RobertaPreLayerNormForCausalLM",
}  # fmt: skip
COUNTED = {
    "Roberta": "RobertaForCausalLM", "Camembert": "CamembertForCausalLM", "XLMRoberta": "XLMRobertaForCausalLM",
    "XLMRobertaXL": "XLMRobertaXLForCausalLM", "Data2VecText": "Data2VecTextForCausalLM",
    "RobertaPreLayerNorm": "RobertaPreLayerNormForCausalLM",
}  # fmt: skip
"""Families that count positions from padding_idx + 1."""
SWALLOWING = {
    "Bart": "BartForCausalLM", "MBart": "MBartForCausalLM", "Pegasus": "PegasusForCausalLM",
    "Blenderbot": "BlenderbotForCausalLM", "PLBart": "PLBartForCausalLM",
}  # fmt: skip
"""Decoders whose forward takes no position_ids."""


def built(config: str, model: str, size: int, **options: object):
    kind = getattr(transformers, f"{config}Config")
    return randomised(getattr(transformers, model)(kind(vocab_size=size, **options)).eval(), seed=1)


def plain(model, ids):
    """The untouched model's own eager logits."""
    twin = type(model)(copy.deepcopy(model.config))
    twin.load_state_dict(model.state_dict())
    twin.eval().set_attn_implementation("eager")
    ids = torch.tensor([list(ids)])
    with torch.no_grad():
        return twin(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]


def test_the_witness_is_the_model_as_it_came(lm, prompts, family, tokenizer):
    fresh = make(family, len(tokenizer))
    ids = torch.tensor([prompts[0].ids])
    with torch.no_grad():
        right = fresh(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(lm.witness.logits(ids), right)
    before = flow(lm, prompts[:1]).sums.s_pq
    lm.witness.logits(ids)
    assert torch.equal(flow(lm, prompts[:1]).sums.s_pq, before)


def test_every_family_agrees_with_its_witness(lm, prompts):
    found = list(agreement(lm, prompts, quick=False))
    assert not failed(found), found
    assert len(found) >= 5


@pytest.mark.parametrize("config", ENCODERS)
def test_an_encoder_is_refused_because_later_tokens_move_earlier_logits(config, tokenizer):
    model = built(config, ENCODERS[config], len(tokenizer), **WIDE, is_decoder=False, pad_token_id=1)
    ids = torch.arange(5, 13)
    other = torch.cat([ids[:-1], torch.tensor([40])])
    assert apart(plain(model, other)[:-1], plain(model, ids)[:-1]) > 1e-3
    with pytest.raises(AnchorsError, match=r"not causal.*later tokens move its earlier logits"):
        load(model, tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize("config", COUNTED)
def test_positions_are_counted_as_the_family_counts_them(config, tokenizer, prompts):
    options = WIDE | {"is_decoder": True, "pad_token_id": 1, "max_position_embeddings": 514}
    model = built(config, COUNTED[config], len(tokenizer), **options)
    right = [plain(model, p.ids)[-1] for p in prompts]
    lm = load(model, tokenizer=tokenizer, device="cpu")
    assert lm.first_position == 2
    assert lm.context == 512
    got = flow(lm, prompts).probabilities
    for row, prompt, own in zip(got, prompts, right, strict=True):
        torch.testing.assert_close(row.float(), own[list(prompt.label_ids)].softmax(-1), atol=1e-4, rtol=1e-3)
    # On demonstrations that were run once, too.
    prompt = prompts[0]
    context = encode(lm, prompt.ids[: prompt.query])
    assert apart(answer(lm, context, queries([prompt], prompt.query, "cpu"))[0], right[0]) < 1e-4


@pytest.mark.parametrize("config", SWALLOWING)
def test_a_decoder_that_takes_no_positions_is_right_or_refuses(config, tokenizer, prompts):
    model = built(config, SWALLOWING[config], len(tokenizer), **BART)
    prompt = prompts[0]
    right = plain(model, prompt.ids)[-1]
    lm = load(model, tokenizer=tokenizer, device="cpu")
    context = encode(lm, prompt.ids[: prompt.query])
    query = queries([prompt], prompt.query, "cpu")
    assert apart(answer(lm, context, query)[0], right) < 1e-4
    if lm.first_position is None:
        with pytest.raises(AnchorsError, match="takes no position_ids"):
            answer(lm, compress(context, anchor_tokens(prompt), "original"), query)
        with pytest.raises(AnchorsError, match="takes no position_ids"):
            AnchorCache.of(lm, prompt, "original")


def test_a_decoder_that_says_its_layers_are_not_causal(tokenizer, prompts):
    model = built("BigBirdPegasus", "BigBirdPegasusForCausalLM", len(tokenizer), **BART)
    right = plain(model, prompts[0].ids)
    lm = load(model, tokenizer=tokenizer, device="cpu")
    assert apart(lm.logits(torch.tensor([prompts[0].ids]))[0].detach(), right) < 1e-5


@pytest.mark.parametrize(
    "value", [torch.ones(2), torch.tensor([1]), torch.tensor([True]), [torch.tensor([1])]]
)
def test_a_tensor_that_is_not_understood_is_refused_whatever_its_type(value):
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(RoutingError, match="something"):
        attend(torch.nn.Identity(), q, q, q, None, something=value)


def test_a_model_that_is_another_one_on_the_seam_fails(gpt2, prompts, monkeypatch):
    """The certificate has teeth: a product that is off by a hundredth in one layer is noticed."""
    layer = gpt2.model.transformer.h[1].attn.c_proj
    own = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: own(x) * 1.01, raising=False)
    wrong = failed(list(agreement(gpt2, prompts, quick=True)))
    assert [finding.name for finding in wrong][:1] == ["logits are the model's own"]
    assert failed(check(gpt2, prompts, [], quick=True))


def test_a_prompt_too_long_for_the_witness_is_asked_in_its_last_rows(gpt2, prompts, monkeypatch):
    import anchors.certificate.agreement as module

    monkeypatch.setattr(module, "EAGER_BYTES", 2 * gpt2.witness.bytes(70))
    long = max(prompts, key=lambda p: len(p.ids))
    assert len(long.ids) > 64
    found = {finding.name: finding for finding in agreement(gpt2, [long, *prompts], quick=True)}
    assert not failed(found.values())
    if len(long.ids) > 70:
        assert "last 64 rows" in found["… on the longest prompt"].detail


def test_what_rounding_does_is_asked_of_long_prompts_in_their_last_rows(
    gpt2, prompts, tokenizer, monkeypatch
):
    import anchors.certificate.agreement as module
    from anchors.check import arithmetic_error

    long = max(prompts, key=lambda p: len(p.ids))
    ids = torch.tensor([long.ids])
    assert len(long.ids) > 64
    right = plain(make("gpt2", len(tokenizer)), long.ids)[-1, list(long.label_ids)]
    ours = gpt2.logits_at(ids, torch.tensor([long.target]))[0, list(long.label_ids)]
    whole = arithmetic_error(gpt2, long)
    monkeypatch.setattr(module, "EAGER_BYTES", 2 * gpt2.witness.bytes(64))
    monkeypatch.setattr(module.Witness, "logits", lambda *_: pytest.fail("the whole prompt at once"))
    for found in (whole, arithmetic_error(gpt2, long)):
        assert found == pytest.approx(float((ours - right).abs().max()), abs=1e-5)


def test_an_edit_is_undone_for_the_witness(gpt2, prompts):
    """Inside the seam the witness hears of no edit."""
    ids = torch.tensor([prompts[0].ids])
    alone = gpt2.witness.logits(ids)
    with seam(gpt2.modules, edits=()):
        assert torch.equal(gpt2.witness.logits(ids), alone)
