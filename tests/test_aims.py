"""The flow of any next token: against transformers' own eager attention, and which token a text is."""

import copy
import json

import pytest
import torch
import transformers as hf
from families import WIDE, make, randomised
from test_lengths import LATENT, SMALL
from test_viewer import embedded
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from anchors.certificate.sight import hidden_labels
from anchors.check import demand
from anchors.cli import app
from anchors.errors import AnchorsError
from anchors.flow import flow
from anchors.flow.aiming import aim_said, likeliest, likelihoods, spaced
from anchors.flow.metrics import target_sums
from anchors.model.language import load
from anchors.tasks.aims import Place, aimed, next_token, of_task, of_text
from anchors.tasks.prompts import Loss, from_text
from anchors.tasks.task import TASKS, Chat
from anchors.viewer import render_page
from anchors.viewer.payload import page, payload, prompt_payload

TEXT = "a film of wit and warmth , and the best of the year in which it was made is a"
LABELLED = (
    "Review: fine fun\nSentiment: Positive\nReview: dull\nSentiment: Negative\nReview: so so\nSentiment:"
)
FAMILIES = ("llama", "mistral_window", "latent")


def own_model(family: str, vocabulary: int):
    if family != "latent":
        return make(family, vocabulary)
    latent = {k: v for k, v in LATENT.items() if "index" not in k}
    config = hf.DeepseekV3Config(**WIDE, **SMALL | {"vocab_size": vocabulary}, **latent)
    config._attn_implementation = "eager"
    return randomised(hf.DeepseekV3ForCausalLM(config).eval(), seed=7)


def witness(model, ids, scalar):
    """|Σ_h A ⊙ ∂s/∂A| by layer, from the matrices that the untouched model returns, of any scalar s of its last logits."""
    tokens = torch.tensor([ids])
    found = copy.deepcopy(model).requires_grad_(True)(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, output_attentions=True
    )
    gradients = torch.autograd.grad(scalar(found.logits[0, -1]), found.attentions)
    maps = [
        (a * g)[0].sum(0).abs().fill_diagonal_(0) for a, g in zip(found.attentions, gradients, strict=True)
    ]
    return torch.stack(maps).detach()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tokenizer):
    """A model as transformers made it, and the same one on the seam."""
    own = own_model(request.param, len(tokenizer))
    return own, load(copy.deepcopy(own), tokenizer=tokenizer, device="cpu")


def near(ours, right):
    assert right.max() > 0
    torch.testing.assert_close(ours, right.to(ours), rtol=1e-4, atol=1e-6 * float(right.max()))


def mapped(lm, prompt):
    found = flow(lm, [prompt], maps=lm.layers)
    return torch.stack([found.maps[layer][0] for layer in lm.layers]), found


def plain(lm, target="the", against=None, text=TEXT):
    prompt, place = of_text(text, lm.tokenizer)
    return aimed(prompt, place, lm.tokenizer, target, against, likeliest=likeliest(lm))


def test_flow_is_the_gradient_of_materialised_attention(pair):
    """−log p over the vocabulary, and the log-odds, of a prompt without label words; the sums by loops over pairs."""
    own, lm = pair
    one, two = plain(lm), plain(lm, "the", "and")
    token, other = two.aim.tokens
    for prompt, scalar, value in (
        (one, lambda z: -z.log_softmax(-1)[token], lambda z: -z.log_softmax(-1)[token]),
        (two, lambda z: z[token] - z[other], lambda z: z[other] - z[token]),
    ):
        right = witness(own, prompt.ids, scalar)
        maps, found = mapped(lm, prompt)
        near(maps, right)
        near(found.into[0], right[:, -1])
        near(found.total[0], right.sum((1, 2)))
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            logits = own(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
        assert float(found.loss[0]) == pytest.approx(float(value(logits)), rel=1e-4, abs=1e-5)
        assert found.probabilities[0].tolist() == pytest.approx(
            logits.softmax(-1)[list(prompt.aim.tokens)].tolist(), rel=1e-3
        )
        q = prompt.target
        tq, ww = target_sums(found.into, found.total, torch.tensor([q]))
        near(tq[0], right[:, q, :q].mean(-1))
        rest = [right[:, i, j] for i in range(q) for j in range(i)]
        near(ww[0], torch.stack(rest).mean(0))
        # In the last layer only the target takes in what counts.
        assert float(ww[0, -1]) < 1e-6 * float(tq[0, -1])


def test_a_label_word_as_target_has_the_flow_of_the_loss_over_the_vocabulary(pair):
    """The three sums stay, and only the loss is another one."""
    own, lm = pair
    built = from_text(LABELLED, TASKS["sst2"], lm.tokenizer, truth="Positive")
    prompt = aimed(
        built, of_task(built, TASKS["sst2"], lm.tokenizer), lm.tokenizer, "Positive", likeliest=likeliest(lm)
    )
    assert prompt.aim.tokens == (built.label_ids[1],)
    gold = torch.tensor(built.label_ids[1])
    right = witness(own, prompt.ids, lambda z: torch.nn.functional.cross_entropy(z, gold))
    maps, found = mapped(lm, prompt)
    near(maps, right)
    before = flow(lm, [built])
    assert not torch.allclose(before.sums.s_pq, found.sums.s_pq, rtol=1e-2)
    pq = right[:, prompt.target, list(prompt.label_positions)].mean(-1)
    near(found.sums.s_pq[0], pq)


def test_log_odds_flow_both_ways_alike_and_beside_others_as_alone(pair):
    _, lm = pair
    one, back = plain(lm, "the", "and"), plain(lm, "and", "the")
    forth, found = mapped(lm, one)
    assert torch.equal(forth, mapped(lm, back)[0])
    short = plain(lm, "the", text="the best of the")
    together = flow(
        lm, [one, short, plain(lm)]
    )  # with and without something to stand against, long and short
    for row, prompt in enumerate((one, short, plain(lm))):
        alone = flow(lm, [prompt])
        n = len(prompt.ids)
        near(together.into[row, :, :n], alone.into[0])
        assert (together.into[row, :, n:] == 0).all()
        assert float(together.loss[row]) == pytest.approx(float(alone.loss[0]), rel=1e-5)
    assert float(found.loss[0]) == -float(flow(lm, [back]).loss[0])


def test_the_certificate_is_asked_of_such_prompts_and_hidden_tokens_are_told(tokenizer):
    window = load(make("mistral_window", len(tokenizer)), tokenizer=tokenizer, device="cpu")
    prompt = plain(window)
    assert 0 <= demand(window, [prompt]) < 1e-3
    unseen = len(prompt.ids) - 16
    assert unseen > 0
    assert hidden_labels(window, [prompt]).startswith(
        f"{unseen} of {prompt.target} tokens of prompts that are longer"
    )
    assert hidden_labels(window, [plain(window, text="the best")]) is None


@pytest.mark.parametrize("text", ["a film", "a film of"])
def test_prompts_of_two_and_three_tokens_are_certified_and_shown(gpt2, text):
    prompt = plain(gpt2, text=text)
    assert len(prompt.ids) == len(text.split())
    assert 0 <= demand(gpt2, [prompt]) < 1e-3
    shown = prompt_payload(gpt2, None, prompt, "a", gpt2.layers)
    assert shown["pairs"] == {"tq": prompt.target, "ww": prompt.target - 1}
    assert max(shown["s_tq"]) > 0
    render_page(payload("a", gpt2, None, [shown], {}))


def test_losses_of_two_kinds_share_no_batch(gpt2, prompts):
    with pytest.raises(AnchorsError, match="over the whole vocabulary"):
        flow(gpt2, [prompts[0], plain(gpt2)])


# ------------------------------------------------------------------------------------------------ which token
def words(*known: str):
    """A tokenizer that knows words with and without a space before them."""
    pieces = {piece: i for i, piece in enumerate(["<s>", *known])}
    raw = Tokenizer(models.WordLevel(pieces, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<s>")


KNOWN = words("Paris", "ĠParis", "Ġis", "is", ":", "4", "Ġ4", "=", "Ċ", "(", "Ġ", '"')


@pytest.mark.parametrize(
    ("text", "wanted", "token"),
    [
        ("it is", "Paris", "ĠParis"),  # a word goes on with another
        ("it is ", "Paris", "ĠParis"),  # the space at the end belongs to what comes
        ("it is:", "Paris", "ĠParis"),
        ("2=", "4", "4"),
        ("is (", "Paris", "Paris"),
        ("is:\n", "Paris", "Paris"),
        ("is:", " Paris", "ĠParis"),
        ("is: ", " Paris", "ĠParis"),
        ("it is", "\n", "Ċ"),
        ("is:", "#1", "Paris"),
    ],
)
def test_which_token_a_text_is_depends_on_where_it_stands(text, wanted, token):
    prompt, place = of_text(text, KNOWN)
    found = next_token(place, wanted, KNOWN)
    assert KNOWN.convert_ids_to_tokens(found) == token
    # By the tokenizer itself: the prompt's tokens, and this one behind them.
    written = text.rstrip(" ") + KNOWN.decode([found])
    assert KNOWN(written)["input_ids"] == [*prompt.ids, found]


@pytest.mark.parametrize(
    ("text", "wanted", "said"),
    [
        ("it is a", "unheard-of", "tokens here"),
        ("it is a", "", "empty"),
        ("it is a", "#99999", "There is no token #99999"),
    ],
)
def test_what_is_not_one_token_is_refused(tokenizer, text, wanted, said):
    _, place = of_text(text, tokenizer)
    with pytest.raises(AnchorsError, match=said) as caught:
        next_token(place, wanted, tokenizer)
    assert caught.value.code == "target"
    if said == "tokens here":
        pieces = tokenizer.tokenize(" unheard-of")
        assert str(pieces) in caught.value.message
        assert f"#{tokenizer.convert_tokens_to_ids(pieces[0])}" in caught.value.remedy


def test_an_unknown_word_and_one_that_melts_are_refused(tokenizer):
    with pytest.raises(AnchorsError, match="does not know"):
        next_token(Place("is:", ""), "Rome", KNOWN)
    joined = next(
        piece for piece in tokenizer.get_vocab() if len(piece) > 5 and piece.isascii() and piece.isalpha()
    )
    with pytest.raises(AnchorsError, match="melts"):
        next_token(Place(joined[:3], ""), joined[3:], tokenizer)


def test_a_token_stands_not_against_itself(gpt2):
    with pytest.raises(AnchorsError, match="log-odds are always 0") as caught:
        plain(gpt2, "the", "the")
    assert caught.value.code == "target"
    assert Loss.of_token(3, 4) == Loss((3, 4), (-1.0, 1.0))


@pytest.mark.parametrize("wanted", ["top", "#16"])
def test_spaces_at_the_end_are_the_prompts_where_no_text_comes_after(gpt2, wanted):
    ids = gpt2.tokenizer("2 + 2 = ").input_ids
    prompt, place = of_text("2 + 2 = ", gpt2.tokenizer, before=(wanted, None))
    assert list(prompt.ids) == ids
    own = gpt2.model(input_ids=torch.tensor([ids])).logits[0, -1]
    found = aimed(prompt, place, gpt2.tokenizer, wanted, likeliest=likeliest(gpt2))
    assert found.loss.tokens == (16 if wanted == "#16" else int(own.argmax()),)
    assert (
        list(of_text("2 + 2 = ", gpt2.tokenizer, before=("4", None))[0].ids)
        == gpt2.tokenizer("2 + 2 =").input_ids
    )


def test_top_is_the_models_own_next_token(gpt2):
    prompt = plain(gpt2, "top", "top")
    with torch.no_grad():
        logits = gpt2.model(torch.tensor([prompt.ids])).logits[0, -1]
    assert list(prompt.aim.tokens) == logits.topk(2).indices.tolist()
    chances = likelihoods(gpt2, prompt.ids)
    assert chances.exp().sum() == pytest.approx(1)
    odds = float(logits[prompt.aim.tokens[0]] - logits[prompt.aim.tokens[1]])
    assert f"{odds:+.3g} nats" in aim_said(gpt2, prompt.aim, chances)


def test_the_likelier_spacing_is_told(gpt2):
    """Both spellings of a word that is a token with and without its space; the less likely one is noted, the other not."""
    told = []
    for text in ("the best of", "the best of the"):
        prompt, place = of_text(text, gpt2.tokenizer)
        for wanted in ("in", " in"):
            at = place if wanted == " in" else Place(place.text, "")
            aim = aimed(prompt, at, gpt2.tokenizer, wanted, likeliest=likeliest(gpt2))
            chances = likelihoods(gpt2, prompt.ids)
            bare, with_space = (gpt2.tokenizer.convert_tokens_to_ids(t) for t in ("in", "Ġin"))
            own, other = (with_space, bare) if wanted == " in" else (bare, with_space)
            assert aim.aim.tokens == (own,)
            notes = spaced(gpt2, aim, at, (wanted, None))
            assert bool(notes) == bool(chances[other] > chances[own])
            told += notes
    assert len(told) == 2
    assert "is likelier here" in told[0]


def test_any_text_through_a_chat_template(tokenizer):
    spoken = copy.deepcopy(tokenizer)
    spoken.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    prompt, place = of_text("what is it ", spoken, Chat(system="be brief"))
    assert prompt.text == "[system] be brief\n[user] what is it\n[assistant]"
    assert place.space == " "
    said = [spoken.decode([t]) for t, role in zip(prompt.ids, prompt.roles, strict=True) if role == "text"]
    assert "".join(said).strip() == "what is it"
    token = next_token(place, "the", spoken)
    assert spoken(prompt.text + " the", add_special_tokens=False)["input_ids"] == [*prompt.ids, token]


@pytest.mark.parametrize("text", ["", "  \n", "a"])
def test_a_prompt_into_which_nothing_can_flow_is_refused(tokenizer, text):
    with pytest.raises(AnchorsError, match=r"empty|single token"):
        of_text(text, tokenizer)


# ---------------------------------------------------------------------------------------------------- the page
def view(*words_: object, given: str | None = None):
    return CliRunner().invoke(app, ["view", *map(str, words_), "--device", "cpu"], input=given)


def page_of(path):
    return json.loads(embedded(path.read_text(encoding="utf-8")))


def test_view_any_text(model_directory, tmp_path):
    out = tmp_path / "page.html"
    done = view(TEXT, "--target", "the", "--against", "and", "-m", model_directory, "-o", out)
    assert done.exit_code == 0, done.output
    data = page_of(out)
    (shown,) = data["prompts"]
    assert data["kinds"] == ["tq", "ww"]
    assert data["task"] == ""
    assert "".join(shown["tokens"]) == TEXT
    assert "s_wp" not in shown
    assert [c for c in shown["classes"] if c is not None] == []
    lm = load(str(model_directory), device="cpu")
    prompt = plain(lm, "the", "and")
    maps, found = mapped(lm, prompt)
    assert shown["s_tq"] == pytest.approx((found.into[0].sum(-1) / prompt.target).tolist(), rel=1e-4)
    counts = shown["pairs"]
    for layer in range(lm.n_layers):
        whole = counts["tq"] * shown["s_tq"][layer] + counts["ww"] * shown["s_ww"][layer]
        assert whole == pytest.approx(float(found.total[0, layer]), rel=1e-4)
        for i, j, value in shown["edges"][layer]:
            assert value == pytest.approx(float(maps[layer, i, j]), rel=1e-3)
    words_ = [lm.tokenizer.decode([token]) for token in prompt.aim.tokens]
    assert [shown["labels"][at] for at in shown["aims"]] == words_
    assert any("' the' (#" in note and "against ' and' (#" in note for note in shown["notes"])
    assert "' the' (#" in done.output


def test_view_takes_text_from_files_and_keeps_the_sums_of_label_words(model_directory, tmp_path):
    (tmp_path / "p.txt").write_text(TEXT + "\n")
    out = tmp_path / "page.html"
    model = ("-m", model_directory, "-o", out)
    assert view(tmp_path / "p.txt", "--target", "top", *model).exit_code == 0
    assert page_of(out)["prompts"][0]["name"] == "p.txt"
    assert "".join(page_of(out)["prompts"][0]["tokens"]) == TEXT
    done = view("-", "--labels", "Negative,Positive", "--target", "the", *model, given=LABELLED)
    assert done.exit_code == 0, done.output
    (shown,) = page_of(out)["prompts"]
    assert shown["labels"] == ["Negative", "Positive"]
    assert max(shown["s_pq"]) > 0
    assert "s_tq" not in shown
    assert sum(shown["probabilities"]) == pytest.approx(1)
    assert any("−log p of ' the'" in note for note in shown["notes"])
    maps = tmp_path / "maps.safetensors"
    assert view(TEXT, "--target", "the", "--maps", maps, *model).exit_code == 0
    from safetensors.torch import load_file

    lm = load(str(model_directory), device="cpu")
    near(load_file(maps)["layer_1"], mapped(lm, plain(lm))[0][1])


def test_view_names_the_target_as_the_mend(model_directory, tmp_path):
    out = ("-m", model_directory, "-o", tmp_path / "x.html")
    for more in ((), ("--labels", "good,bad")):
        done = view(TEXT, *more, *out)
        assert done.exit_code == 2
        assert "--target TOKEN" in " ".join(done.output.split())
    done = view(TEXT, "--against", "the", *out)
    assert "--against without --target" in done.output
    done = view("no prompt.txt", "--target", "the", *out)
    assert "[file-unreadable]" in done.output
    assert not (tmp_path / "x.html").exists()
    done = view(TEXT, "--target", "top", "--dry-run", *out)
    assert done.exit_code == 0
    assert "flow" in done.stdout


def test_the_page_from_python_says_what_is_lacking(gpt2):
    prompt = plain(gpt2)
    assert (
        "−log p of ' the'" in json.loads(embedded(page(gpt2, None, [prompt], [0])))["prompts"][0]["notes"][0]
    )
    from dataclasses import replace

    with pytest.raises(AnchorsError, match="something to aim at"):
        page(gpt2, None, [replace(prompt, aim=None)])
    shown = prompt_payload(gpt2, None, prompt, "a", [0])
    with pytest.raises(ValueError, match="aims"):
        render_page(payload("a", gpt2, None, [shown | {"aims": [99]}], {}))
