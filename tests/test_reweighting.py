"""β multiplies the target's attention to the label words, and is trained as if every step ran the whole prompt."""

from dataclasses import replace

import pytest
import torch
from common import apart
from families import make

from anchors import reweighting
from anchors.analyses.classification import Classification
from anchors.analyses.reweighting import Reweighting
from anchors.attention.edits import Edit
from anchors.attention.seam import seam
from anchors.context import answer, encode, queries, shared_demonstrations
from anchors.errors import AnchorsError
from anchors.model.language import load
from anchors.reweighting import (
    Beta,
    fit,
    label_head,
    literal_fit,
    literal_loss,
    one_token_loss,
    training_prompts,
)
from anchors.study.results import provenance
from anchors.tasks.prompts import build


def random_beta(lm, prompt, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads = lm.model.config.get_text_config().num_attention_heads
    return torch.randn(lm.n_layers, heads, len(prompt.label_positions), generator=generator)


def by_hand(model, prompt, beta):
    """GPT-2 written out, with every attention matrix; A(q, p_i) times exp(β) in row q. Logits of every position."""
    body, length = model.transformer, len(prompt.ids)
    x = body.wte.weight[list(prompt.ids)] + body.wpe.weight[:length]
    for layer, block in enumerate(body.h):
        q, k, v = block.attn.c_attn(block.ln_1(x)).split(x.shape[1], dim=-1)
        outputs = []
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            scores = q[:, part] @ k[:, part].T / 8**0.5
            pattern = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
            factor = torch.ones(length, length)
            for i, p in enumerate(prompt.label_positions):
                spot = torch.zeros(length, length)
                spot[prompt.target, p] = 1
                factor = factor + spot * (beta[layer, head, i].exp() - 1)
            outputs.append((pattern * factor) @ v[:, part])
        x = x + block.attn.c_proj(torch.cat(outputs, -1))
        x = x + block.mlp(block.ln_2(x))
    return model.lm_head(body.ln_f(x))


def changed(lm, beta, prompts, context=None):
    start = 0 if context is None else len(context.ids)
    with seam(lm.modules, edits=[beta.edit(prompts, lm.device)]):
        return answer(lm, context, queries(prompts, start, lm.device))


def test_beta_of_zero_changes_nothing(lm, make_cell):
    prompts = [d.prompt for d in make_cell().prompts]
    context = encode(lm, shared_demonstrations(prompts))
    zero = Beta(0 * random_beta(lm, prompts[0]), prompts[0].label_classes)
    plain = answer(lm, context, queries(prompts, len(context.ids), lm.device))
    ours = changed(lm, zero, prompts, context)
    assert apart(ours, plain) < 3e-6  # the fused kernel rounds differently from the materialised pattern
    ones = Edit(frozenset(range(lm.n_layers)), weight=lambda _: torch.ones(1, 1, 1, 1), neutral=True)
    with seam(lm.modules, edits=[ones]):
        assert torch.equal(ours, answer(lm, context, queries(prompts, len(context.ids), lm.device)))


def test_whole_prompts_and_the_shared_context_are_edited_alike(lm, make_cell):
    """The same on the cache, where only the queries are run, as on whole prompts of different lengths."""
    cell = make_cell()
    short = build(
        cell.task, lm.tokenizer, reweighting.demonstrations(cell.task, cell.data, cell.how), "so", 0
    )
    prompts = [*(d.prompt for d in cell.prompts), short]
    context = encode(lm, shared_demonstrations(prompts))
    beta = Beta(random_beta(lm, short), short.label_classes)
    one, other = changed(lm, beta, prompts, context), changed(lm, beta, prompts)
    assert apart(one, other) < 1e-5
    assert apart(one[-1:], answer(lm, None, queries([short], 0, lm.device))) > 1e-3


def test_the_edit_equals_gpt2_written_out(gpt2, make_cell):
    prompts = [d.prompt for d in make_cell("agnews").prompts]
    context = encode(gpt2, shared_demonstrations(prompts))
    beta = Beta(random_beta(gpt2, prompts[0]), prompts[0].label_classes)
    ours = changed(gpt2, beta, prompts, context)
    for i, prompt in enumerate(prompts):
        literal = by_hand(gpt2.model, prompt, beta.beta)[prompt.target]
        assert apart(ours[i], literal) < 1e-5
        assert apart(ours[i], by_hand(gpt2.model, prompt, 0 * beta.beta)[prompt.target]) > 1e-3


def test_the_gradient_equals_that_of_gpt2_written_out(gpt2, make_cell):
    prompt = make_cell("agnews").prompts[0].prompt
    start = random_beta(gpt2, prompt)
    found = []
    before = encode(gpt2, prompt.ids[:-1])
    for loss in (
        lambda beta: torch.nn.functional.cross_entropy(
            by_hand(gpt2.model, prompt, beta)[-1, list(prompt.label_ids)], torch.tensor(prompt.gold)
        ),
        lambda beta: literal_loss(gpt2, prompt, beta),
        lambda beta: one_token_loss(gpt2, before, prompt, beta),
    ):
        beta = start.clone().requires_grad_()
        with label_head(gpt2, prompt.label_ids) if len(found) == 2 else torch.enable_grad():
            value = loss(beta)
        found.append((value.detach(), torch.autograd.grad(value, beta)[0]))
    (value, gradient), *others = found
    assert gradient.abs().min() > 0
    for own, slope in others:
        torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-6)
        assert apart(slope, gradient) < 1e-4


def test_only_the_targets_row_depends_on_beta(lm, make_cell):
    prompt = min((d.prompt for d in make_cell(examples=20).prompts), key=lambda p: p.target - p.query)
    ids = torch.tensor([prompt.ids])
    beta = random_beta(lm, prompt).requires_grad_()
    with (
        torch.enable_grad(),
        seam(lm.modules, edits=[Beta(beta, prompt.label_classes).edit([prompt], "cpu")]),
    ):
        logits = lm.model(input_ids=ids, use_cache=False).logits[0]
    with torch.no_grad():
        plain = lm.model(input_ids=ids, use_cache=False).logits[0]
    assert apart(logits[:-1].detach(), plain[:-1]) < 1e-6
    (elsewhere,) = torch.autograd.grad(logits[:-1].square().sum(), beta, retain_graph=True)
    assert (elsewhere == 0).all()
    (there,) = torch.autograd.grad(logits[-1].square().sum(), beta)
    if prompt.target - prompt.label_positions[-1] < 16:  # else a window hides it in some families
        assert there.abs().max() > 0
        assert apart(logits[-1].detach(), plain[-1]) > 1e-4


CHANGED = {
    "gpt2": lambda model: None,
    "llama": lambda model: None,
    "gemma2_softcap_window": lambda model: setattr(model.config, "final_logit_softcapping", 2.0),
    "gptj": lambda model: torch.nn.init.normal_(model.lm_head.bias, std=2.0),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", sorted(CHANGED))
def test_fitting_follows_its_literal_twin(name, batch, tokenizer, make_cell):
    """Losses and β after each of two epochs: one token at a time, with label logits only, against whole prompts."""
    model = make(name, len(tokenizer))
    CHANGED[name](model)
    lm = load(model, tokenizer=tokenizer, device="cpu")
    cell = make_cell()
    prompts = training_prompts(lm, cell, 2)
    context = encode(lm, shared_demonstrations(prompts))
    for epochs in (1, 2):
        options = {"learning_rate": 0.05, "epochs": epochs, "batch": batch, "seed": 3}
        ours, literal = fit(lm, context, prompts, **options), literal_fit(lm, prompts, **options)
        assert ours.losses == pytest.approx(literal.losses, rel=1e-4)
        assert ours.classes == literal.classes == prompts[0].label_classes
        torch.testing.assert_close(ours.beta, literal.beta, rtol=0, atol=1e-4)
        assert ours.beta.abs().max() > 0.04


def test_fitting_lowers_the_loss_and_leaves_the_model_alone(lm, make_cell):
    cell = make_cell()
    prompts = training_prompts(lm, cell, 2)
    context = encode(lm, shared_demonstrations(prompts))
    batch = queries(prompts, len(context.ids), lm.device)
    before, head = answer(lm, context, batch), lm.model.get_output_embeddings()
    beta = fit(lm, context, prompts, 0.1, 5)
    assert lm.model.get_output_embeddings() is head
    assert torch.equal(answer(lm, context, batch), before)
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    if any(p.target - p.label_positions[-1] < 16 for p in prompts):
        assert min(beta.losses) < beta.losses[0]


def test_the_output_matrix_comes_back_after_an_exception(gpt2, prompts):
    before = answer(gpt2, None, queries(prompts, 0, "cpu"))
    with label_head(gpt2, prompts[0].label_ids):
        assert gpt2.model(torch.tensor([prompts[0].ids])).logits.shape[-1] == 2
    with pytest.raises(KeyError), label_head(gpt2, prompts[0].label_ids):
        raise KeyError
    assert torch.equal(answer(gpt2, None, queries(prompts, 0, "cpu")), before)


def test_training_that_diverges_is_an_error(gpt2, make_cell):
    prompts = training_prompts(gpt2, make_cell(), 1)
    context = encode(gpt2, shared_demonstrations(prompts))
    with pytest.raises(AnchorsError, match=r"diverged|not a number"):
        fit(gpt2, context, prompts, learning_rate=1e30, epochs=3)


@pytest.mark.parametrize("control", ["none", "random-positions", "permuted-labels"])
@pytest.mark.parametrize("name", ["sst2", "trec"])
def test_training_prompts_are_extra_examples_on_the_same_demonstrations(gpt2, make_cell, name, control):
    cell = make_cell(name, 2, control=control)
    asked = cell.prompts[0].prompt
    prompts = training_prompts(gpt2, cell, 3)
    count = len(cell.task.labels)
    assert [p.gold for p in prompts] == [c for c in range(count) for _ in range(3)]
    assert shared_demonstrations([asked, *prompts]) == asked.ids[: asked.query]
    assert {p.label_positions for p in prompts} == {asked.label_positions}
    assert {p.label_classes for p in prompts} == {asked.label_classes}
    opening, closing = cell.task.pieces[0], cell.task.prefix
    texts = [p.text.rsplit("\n" + opening, 1)[1].removesuffix(closing) for p in prompts]
    assert len(set(texts)) == len(texts)
    train, shown = {e.text: e.label for e in cell.data.train}, asked.text.rsplit("\n" + opening, 1)[0]
    for prompt, text in zip(prompts, texts, strict=True):
        assert train[text] == prompt.gold
        assert opening + text + closing not in shown
    assert training_prompts(gpt2, cell, 3) == prompts


def test_too_few_training_examples_are_an_error(gpt2, make_cell):
    with pytest.raises(AnchorsError, match="training examples of 'Negative', not 999"):
        training_prompts(gpt2, make_cell(), 999)


def test_beta_goes_to_the_label_words_of_its_class(gpt2, make_cell):
    """Fitted on one order of demonstrations, applied to another: the n-th word of a class gets the n-th β of it."""
    cell = make_cell(shots=2)
    shown = reweighting.demonstrations(cell.task, cell.data, cell.how)
    zeros, ones = ([e for e in shown if e.label == c] for c in (0, 1))
    first, second = (
        build(cell.task, gpt2.tokenizer, order, "so so", 0)
        for order in ([zeros[0], zeros[1], ones[0], ones[1]], [ones[0], zeros[0], ones[1], zeros[1]])
    )
    beta = Beta(random_beta(gpt2, first), first.label_classes)
    assert (first.label_classes, second.label_classes) == ((0, 0, 1, 1), (1, 0, 1, 0))
    moved = beta.beta[:, :, [2, 0, 3, 1]]
    together = changed(gpt2, beta, [first, second])
    assert apart(together[0], by_hand(gpt2.model, first, beta.beta)[first.target]) < 1e-5
    assert apart(together[1], by_hand(gpt2.model, second, moved)[second.target]) < 1e-5
    assert apart(together[1], by_hand(gpt2.model, second, beta.beta)[second.target]) > 1e-3


def test_beta_of_other_label_words_is_refused(gpt2, make_cell):
    one, two = (make_cell(shots=shots).prompts[0].prompt for shots in (1, 2))
    with pytest.raises(AnchorsError, match="β was fitted for label words of the classes"):
        Beta(random_beta(gpt2, one), one.label_classes).edit([one, two], "cpu")


def test_beta_survives_the_disk_with_its_provenance(gpt2, make_cell, tmp_path):
    prompt = make_cell("trec").prompts[0].prompt
    beta = Beta(random_beta(gpt2, prompt), prompt.label_classes, (0.9, 0.25))
    path = tmp_path / "beta.safetensors"
    beta.save(path, provenance(model="tiny", seed=42))
    again = Beta.load(path)
    assert torch.equal(again.beta, beta.beta)
    assert (again.classes, again.losses) == (beta.classes, beta.losses)
    assert again.facts["model"] == "tiny"
    assert again.facts["seed"] == 42
    assert again.facts["versions"]["torch"]


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "other tensors", "not finite", "absent"])
def test_a_file_without_beta_is_an_error(kind, gpt2, make_cell, tmp_path):
    from safetensors.torch import save_file

    prompt = make_cell().prompts[0].prompt
    path = tmp_path / "beta.safetensors"
    beta = Beta(random_beta(gpt2, prompt), prompt.label_classes)
    if kind == "not finite":
        beta.beta[0, 0, 0] = torch.nan
    beta.save(path, {})
    if kind == "absent":
        path.unlink()
    elif kind == "other tensors":
        save_file({"weights": torch.ones(2)}, path)
    elif kind != "not finite":
        path.write_bytes({"empty": b"", "text": b"hello", "cut": path.read_bytes()[:-8]}[kind])
    with pytest.raises(AnchorsError, match=r"β") as caught:
        Beta.load(path)
    assert "fitted anew" in caught.value.remedy


def test_records_and_the_kept_beta(gpt2, make_cell, monkeypatch):
    cell = make_cell(examples=4)
    analysis = Reweighting(epochs=2, per_class=1, learning_rate=0.3)
    context, beta = analysis.prepare(gpt2, cell)
    kept = cell.folder / f"beta-{cell.how.seed}.safetensors"
    assert Beta.load(kept).facts["task"]["template"] == cell.task.template
    prompts = training_prompts(gpt2, cell, 1)
    assert torch.equal(beta.beta, fit(gpt2, context, prompts, 0.3, 2, 1, cell.how.seed).beta)
    monkeypatch.setattr(reweighting, "fit", lambda *_: pytest.fail("fitted again"))
    again = analysis.prepare(gpt2, cell)[1]
    assert torch.equal(again.beta, beta.beta)

    vanilla = Classification()
    plain = vanilla.measure(gpt2, vanilla.prepare(gpt2, cell), cell.task, cell.prompts)
    found = analysis.measure(gpt2, (context, beta), cell.task, cell.prompts)
    for own, expected, drawn in zip(found, plain, cell.prompts, strict=True):
        assert [r for r in own if r.condition == "none"] == expected
        logits = by_hand(gpt2.model, drawn.prompt, beta.beta)[-1, list(drawn.prompt.label_ids)]
        said = [r.value for r in own if r.condition == "reweighted" and r.metric.startswith("probability/")]
        assert said == pytest.approx(logits.softmax(-1).tolist(), rel=1e-4)
    values = {(r.metric, r.layer, r.condition): r.value for r in analysis.once(gpt2, (context, beta), cell)}
    for i, c in enumerate(beta.classes):
        name = f"beta/{cell.task.labels[c]}/3"
        assert values[name, 1, "reweighted"] == pytest.approx(float(beta.beta[1, 3, i]))
    assert values["training_loss", None, "epoch-01"] == pytest.approx(beta.losses[1])


def test_the_control_moves_the_edited_positions(gpt2, make_cell):
    cell = make_cell(examples=2, control="random-positions")
    prompt = cell.prompts[0].prompt
    beta = Beta(random_beta(gpt2, prompt), prompt.label_classes)
    back = replace(prompt, label_positions=tuple(i for i, r in enumerate(prompt.roles) if r == "label"))
    assert back.label_positions != prompt.label_positions
    ours = changed(gpt2, beta, [prompt])[0]
    columns = beta._columns(prompt)
    assert sorted(columns) == list(prompt.label_positions)
    assert apart(ours, by_hand(gpt2.model, prompt, beta.beta)[-1]) < 1e-5
    assert apart(ours, by_hand(gpt2.model, back, beta.beta)[-1]) > 1e-4


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"per_class": 0}, {"batch": 0}, {"learning_rate": 0.0}])
def test_settings_that_cannot_work(settings):
    with pytest.raises(AnchorsError, match="must be positive"):
        Reweighting(**settings)
