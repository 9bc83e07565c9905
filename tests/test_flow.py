"""The streamed flow against its definition, other implementations, and the authors' numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import DENSE, make
from made_rows import rows as made

from anchors.attention import streaming
from anchors.errors import AnchorsError, CertificateError
from anchors.flow import flow, literal_flow
from anchors.flow.metrics import map_sums
from anchors.flow.saliency import collate, target_loss
from anchors.model.language import load
from anchors.stats import flow_summary
from anchors.tasks.data import read
from anchors.tasks.drawing import Draw, draw
from anchors.tasks.prompts import from_text
from anchors.tasks.task import TASKS

SUMS = ("s_wp", "s_pq", "s_ww")


def stacked(lm, result):
    return torch.stack([result.maps[layer] for layer in range(lm.n_layers)], dim=1)


def test_streamed_maps_equal_the_definition(lm, prompts):
    result = flow(lm, prompts, maps=range(lm.n_layers))
    maps = stacked(lm, result)
    for i, prompt in enumerate(prompts):
        literal = literal_flow(lm, prompt)
        n = len(prompt.ids)
        assert literal.abs().max() > 0
        torch.testing.assert_close(maps[i, :, :n, :n], literal, rtol=1e-4, atol=1e-6 * float(literal.max()))
        assert maps[i, :, n:].abs().max() == 0 if n < maps.shape[-1] else True


@pytest.mark.parametrize("family", DENSE, indirect=True)
def test_literal_flow_equals_the_gradient_of_transformers_own_attention(family, tokenizer, prompts):
    """An oracle that shares no code with the seam: eager attention, matrices returned by the model."""
    plain = make(family, len(tokenizer)).requires_grad_(False)
    prompt = prompts[0]
    batch = collate([prompt])
    embedded = plain.get_input_embeddings()(batch.ids).requires_grad_()
    output = plain(inputs_embeds=embedded, output_attentions=True, use_cache=False)
    loss, _ = target_loss(output.logits[:, -1], batch)
    gradients = torch.autograd.grad(loss.sum(), output.attentions)
    expected = torch.stack(
        [(a * g)[0].sum(0).abs().fill_diagonal_(0) for a, g in zip(output.attentions, gradients, strict=True)]
    ).detach()
    ours = literal_flow(load(make(family, len(tokenizer)), tokenizer=tokenizer, device="cpu"), prompt)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_sums_equal_a_loop_over_pairs(lm, prompts):
    result = flow(lm, prompts, maps=range(lm.n_layers))
    maps = stacked(lm, result).double()
    for i, prompt in enumerate(prompts):
        loop = map_sums(maps[i], list(prompt.label_positions), prompt.target)
        for name in SUMS:
            torch.testing.assert_close(
                getattr(result.sums, name)[i], getattr(loop, name)[0], rtol=1e-5, atol=1e-12
            )


@pytest.mark.parametrize("policy", ["first", "last", "all"])
def test_what_s_pq_leaves_out_equals_a_sum_over_the_other_tokens(gpt2, tokenizer, policy):
    """TREC's Abbreviation has several tokens. By the definition, from the whole map of autograd."""
    spec = replace(TASKS["trec"], policy=policy)
    prompts = [d.prompt for d in draw(spec, read(spec), tokenizer, Draw(), 2)]
    result = flow(gpt2, prompts)
    for i, prompt in enumerate(prompts):
        literal = literal_flow(gpt2, prompt).double()
        spans = [k for k, role in enumerate(prompt.roles) if role == "label"]
        others = [k for k in spans if k not in prompt.label_positions]
        assert (len(others) > 0) == (policy != "all")
        expected = literal[:, prompt.target, others].sum(-1) / len(prompt.label_positions)
        torch.testing.assert_close(result.rest[i], expected, rtol=1e-4, atol=1e-10)
        assert (result.rest[i].max() > 0) == (policy != "all")


def test_s_pq_leaves_nothing_out_where_it_is_not_about_label_words(gpt2, tokenizer):
    spec = TASKS["trec"]
    prompts = [d.prompt for d in draw(spec, read(spec), tokenizer, Draw(control="random-positions"), 2)]
    assert (flow(gpt2, prompts).rest == 0).all()


def test_of_the_last_layer_s_wp_is_not_defined(lm, prompts):
    """What label words take in there reaches no target: it is zero for any weights, and no result."""
    sums = flow(lm, prompts).sums
    assert (sums.s_wp[:, -1] == 0).all()
    rows = [
        (n, "none", layer, metric, float(getattr(sums, metric)[n, layer]))
        for n in range(len(prompts))
        for layer in range(lm.n_layers)
        for metric in SUMS
    ]
    table = flow_summary(made(rows), resamples=20).set_index(["metric", "layer"])["note"]
    said = table[table != ""]
    assert ("s_wp", lm.n_layers - 1) in said.index
    assert set(said.index.get_level_values(0)) == {"s_wp"}
    assert set(said) == {"not defined here"}


def test_batched_equals_one_by_one(lm, prompts):
    together = flow(lm, prompts).sums
    for i, prompt in enumerate(prompts):
        alone = flow(lm, [prompt]).sums
        for name in SUMS:
            torch.testing.assert_close(
                getattr(together, name)[i], getattr(alone, name)[0], rtol=1e-4, atol=1e-10
            )


def test_tiles_change_nothing(lm, prompts, monkeypatch):
    whole = flow(lm, prompts).sums
    # A few rows per tile, so that every prompt needs many of them.
    monkeypatch.setitem(streaming.TILE_BYTES, "cpu", 4 * 4 * 3 * 100 * 7)
    tiled = flow(lm, prompts).sums
    for name in SUMS:
        torch.testing.assert_close(getattr(tiled, name), getattr(whole, name), rtol=1e-4, atol=1e-10)


def test_the_certificate_holds(lm, prompts):
    assert 0 < float(flow(lm, prompts).identity_error.max()) < 1e-5


def test_the_certificate_refuses_an_attention_it_does_not_know(gpt2, prompts, monkeypatch):
    original = streaming.DenseCall.fused
    monkeypatch.setattr(streaming.DenseCall, "fused", lambda call: original(call) * 1.01)
    with pytest.raises(CertificateError, match="not the model's"):
        flow(gpt2, prompts)


def test_double_precision_agrees_to_rounding(tokenizer, prompts):
    lm = load(make("llama", len(tokenizer)), tokenizer=tokenizer, device="cpu", precision="float64")
    maps = stacked(lm, flow(lm, prompts[:1], maps=range(lm.n_layers)))[0]
    torch.testing.assert_close(maps, literal_flow(lm, prompts[0]).float(), rtol=1e-6, atol=0)


def test_a_label_word_outside_the_window_has_no_flow(tokenizer, prompts):
    lm = load(make("mistral_window", len(tokenizer)), tokenizer=tokenizer, device="cpu")
    prompt = max(prompts, key=lambda p: p.target - p.label_positions[0])
    first = prompt.label_positions[0]
    assert prompt.target - first >= 16
    maps = stacked(lm, flow(lm, [prompt], maps=range(lm.n_layers)))[0]
    assert (maps[:, prompt.target, first] == 0).all()
    assert maps[:, prompt.target, prompt.target - 1].min() > 0


def test_loss_that_is_not_a_number_is_an_error(tokenizer, prompts):
    lm = load(make("gpt2", len(tokenizer)), tokenizer=tokenizer, device="cpu")
    lm.model.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(AnchorsError, match="not a number"):
        flow(lm, prompts)


def test_prompt_without_an_answer_is_an_error(gpt2, prompts):
    with pytest.raises(AnchorsError, match="no right answer"):
        flow(gpt2, [replace(prompts[0], gold=None)])


def test_unknown_layer_is_an_error(gpt2, prompts):
    with pytest.raises(AnchorsError, match="no layers"):
        flow(gpt2, prompts, maps=[99])


@pytest.mark.parametrize("task", ["sst2", "agnews", "trec"])
def test_conformance_with_the_authors_code(shared: Path, task: str):
    """S_wp, S_pq and S_ww of the reference implementation on a tiny GPT-2, to a relative 1e-4."""
    lm = load(str(shared / "conformance" / "tiny-gpt2"), device="cpu")
    cases = json.loads((shared / "conformance" / "flow.json").read_text())["tiny-gpt2"][task]
    spec = TASKS[task]
    built = [from_text(c["prompt"], spec, lm.tokenizer, truth=spec.labels[c["gold"]]) for c in cases]
    sums = flow(lm, built).sums
    for name in SUMS:
        expected = torch.tensor([c[name] for c in cases], dtype=torch.float64)
        torch.testing.assert_close(getattr(sums, name), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("family_name", ["gpt2", "llama", "qwen2", "gptj", "gpt_neox"])
def test_transformer_lens_finds_the_same_saliency(family_name, tokenizer, prompts):
    """An independent oracle: transformer-lens's hooked patterns and their gradients, to 1e-5."""
    pytest.importorskip("transformer_lens", reason="transformer-lens is not installed (extra `lens`)")
    lm = load(make(family_name, len(tokenizer)), tokenizer=tokenizer, device="cpu")
    bridge = lm.to_transformer_lens()
    prompt = prompts[0]
    patterns: dict[str, torch.Tensor] = {}

    def keep(pattern, hook):
        pattern.requires_grad_()
        pattern.retain_grad()
        patterns[hook.name] = pattern
        return pattern

    with torch.enable_grad():
        logits = bridge.run_with_hooks(
            torch.tensor([prompt.ids]), fwd_hooks=[(lambda name: name.endswith("attn.hook_pattern"), keep)]
        )
        loss, _ = target_loss(logits[:, prompt.target], collate([prompt]))
        loss.sum().backward()
    assert len(patterns) == lm.n_layers
    maps = stacked(lm, flow(lm, [prompt], maps=range(lm.n_layers)))[0]
    for layer in range(lm.n_layers):
        pattern = patterns[f"blocks.{layer}.attn.hook_pattern"]
        expected = (pattern * pattern.grad)[0].sum(0).abs().detach().fill_diagonal_(0)
        torch.testing.assert_close(maps[layer], expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_a_bridge_is_accepted_as_a_model(tokenizer, prompts):
    pytest.importorskip("transformer_lens", reason="transformer-lens is not installed (extra `lens`)")
    lm = load(make("qwen2", len(tokenizer)), tokenizer=tokenizer, device="cpu")
    again = load(lm.to_transformer_lens(), tokenizer=tokenizer, device="cpu")
    assert again.fingerprint == lm.fingerprint
    for name in SUMS:
        assert torch.equal(getattr(flow(again, prompts).sums, name), getattr(flow(lm, prompts).sums, name))
