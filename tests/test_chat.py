"""Prompts through chat templates of several styles: what transformers renders, and positions that spell the label words."""

import copy
import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from anchors.cli import app
from anchors.context import answer, encode, queries, shared_demonstrations
from anchors.errors import AnchorsError
from anchors.flow import flow
from anchors.model.language import load
from anchors.tasks.data import Example, read
from anchors.tasks.drawing import Draw, draw
from anchors.tasks.prompts import QUERY, build, from_text, label_tokens
from anchors.tasks.task import TASKS, Chat

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "<|bos|><|header|>system<|end|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}<|eot|>"
    "{% for m in messages %}<|header|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|end|>\n\n{% endif %}"
)
MISTRAL = (
    "<|bos|>{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {% if loop.last and system is defined %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
)
GEMMA = (
    "<|bos|>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
STYLES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "gemma": GEMMA}
CONTROLS = (
    "<|bos|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|header|>",
    "<|end|>",
    "<|eot|>",
    "<turn>",
    "</turn>",
    "[INST]",
    "[/INST]",
)
RUNNER = CliRunner()
SYSTEM = "You name the mood of a review."


@pytest.fixture(scope="module")
def chatty(tokenizer):
    """The tests' tokenizer with control tokens, which puts a BOS in front by itself."""
    from tokenizers.processors import TemplateProcessing

    words = copy.deepcopy(tokenizer)
    words.add_special_tokens({"additional_special_tokens": [AddedToken(c, special=True) for c in CONTROLS]})
    bos = words.convert_tokens_to_ids("<|bos|>")
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    return words


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def pinned(template):
    return template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")


def messages_of(task, shown, query):
    """The conversation, written out plainly."""
    before, prefix, after = task.pieces
    system = [] if task.chat.system is None else [{"role": "system", "content": task.chat.system}]
    if task.chat.form == "one":
        body = "".join(f"{before}{e.text}{prefix} {task.labels[e.label]}{after}\n" for e in shown)
        return [*system, {"role": "user", "content": body + before + query + prefix}]
    turns = [
        {"role": role, "content": content}
        for e in shown
        for role, content in (("user", before + e.text + prefix), ("assistant", task.labels[e.label]))
    ]
    return [*system, *turns, {"role": "user", "content": before + query + prefix}]


TEXTS = st.lists(
    st.text("abc .,!?ßMark0Turn\n'\"{}", min_size=1, max_size=20).filter(str.strip), min_size=3, max_size=3
)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("form", ["turns", "one"])
@pytest.mark.parametrize("system", [None, SYSTEM])
@settings(max_examples=6, deadline=None)
@given(texts=TEXTS)
def test_a_prompt_is_what_the_template_makes_and_its_positions_spell_the_label_words(
    chatty, style, form, system, texts
):
    words = with_template(chatty, STYLES[style])
    task = replace(TASKS["sst2"], policy="all", chat=Chat(form, system))
    shown = [Example(text, label) for text, label in zip(texts, (1, 0), strict=False)]
    if style == "gemma" and system:
        with pytest.raises(AnchorsError, match="System role not supported") as refused:
            build(task, words, shown, texts[2], 0)
        assert refused.value.code == "chat-template"
        return
    prompt = build(task, words, shown, texts[2], 0)
    messages = messages_of(task, shown, texts[2])
    told = {"add_generation_prompt": True, "chat_template": pinned(STYLES[style])}
    assert prompt.text == words.apply_chat_template(messages, tokenize=False, **told)
    assert list(prompt.ids) == words.apply_chat_template(messages, tokenize=True, return_dict=False, **told)
    assert prompt.ids.count(words.convert_tokens_to_ids("<|bos|>")) == (style != "chatml")
    for number, example in enumerate(shown):
        at = [i for i in prompt.label_positions if prompt.demonstrations[i] == number]
        assert words.decode([prompt.ids[i] for i in at]).strip() == task.labels[example.label]
        assert words.decode(  # every token of a text, and nothing of the template
            [t for t, r, d in zip(prompt.ids, prompt.roles, prompt.demonstrations, strict=True) if (r, d) == ("text", number)]
        ).strip() == example.text.strip()  # fmt: skip
    assert prompt.demonstrations.index(QUERY) == prompt.query > max(prompt.label_positions)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("form", ["turns", "one"])
def test_the_label_ids_are_what_the_model_would_say_next(chatty, style, form):
    """An answer that is given is tokenised by the template itself; its first token is the label's."""
    words = with_template(chatty, STYLES[style])
    task = replace(TASKS["agnews"], chat=Chat(form))
    shown = [Example(f"text {label}", label) for label in range(4)]
    prompt = build(task, words, shown, "asked", None)
    for label, word in enumerate(task.labels):
        answered = [*messages_of(task, shown, "asked"), {"role": "assistant", "content": word}]
        whole = words.apply_chat_template(
            answered, tokenize=True, return_dict=False, chat_template=pinned(STYLES[style])
        )
        assert whole[: len(prompt.ids)] == list(prompt.ids)
        assert whole[len(prompt.ids)] == prompt.label_ids[label]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        (CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), "not what comes next"),
        (CHATML.replace("{% if add_generation_prompt", "{% if false"), "not what comes next"),
        ("{{ ['a', 'b'] | random }}" + CHATML, "at random"),
        ("{{ lipsum(n=1, min=2, max=3) }}" + CHATML, "at random"),
        ("{{ now() }}" + CHATML, "'now' is undefined"),
        ("{% set day = '%d' %}{{ strftime_now(day) }}" + CHATML, "date of today"),
        ("{% set now = strftime_now %}{{ now('%d') }}" + CHATML, "date of today"),
        ("{{ strftime_now('%d' ~ '%b') }}" + CHATML, "date of today"),
        (CHATML.replace("m.content", "m.content | upper"), "leaves out, repeats"),
        (CHATML.replace("m.content }}", "m.content }}{{ m.content }}"), "leaves out, repeats"),
        (
            CHATML.replace("{{ m.content", "{{ m.content if loop.index0 % 2 == 0 else ''"),
            "leaves out, repeats",
        ),
    ],
)
def test_what_is_not_understood_is_refused(chatty, template, said):
    words = with_template(chatty, template)
    with pytest.raises(AnchorsError, match=said) as refused:
        label_tokens(replace(TASKS["sst2"], chat=Chat()), words)
    assert refused.value.code == "chat-template"
    assert refused.value.remedy


@pytest.mark.parametrize(
    "asked",
    [
        "{{ strftime_now('%d %b %Y') }}",
        '{{ strftime_now ( format = "%d %b %Y" ) }}',
        "{% macro day() %}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}{% endmacro %}{{ day() }}",
    ],
)
def test_the_day_is_the_same_tomorrow_however_the_template_asks(chatty, asked):
    words = with_template(chatty, f"On {asked}:" + CHATML)
    prompt = build(replace(TASKS["sst2"], chat=Chat()), words, [Example("a", 0), Example("b", 1)], "c", 0)
    assert prompt.text.startswith("On 26 Jul 2024:<|im_start|>")


def test_an_empty_thought_may_stand_before_the_answer(chatty):
    closed = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")
    words = with_template(chatty, closed)
    prompt = build(replace(TASKS["sst2"], chat=Chat()), words, [Example("a", 0), Example("b", 1)], "c", 0)
    assert prompt.text.endswith("</think>\n\n")
    assert prompt.label_ids == tuple(
        word[0] for word in label_tokens(replace(TASKS["sst2"], chat=Chat()), words)
    )


def test_a_text_that_holds_a_control_token_is_refused(chatty):
    words = with_template(chatty, CHATML)
    with pytest.raises(AnchorsError, match="control token"):
        build(
            replace(TASKS["sst2"], chat=Chat()), words, [Example("a<|im_end|>", 0), Example("b", 1)], "c", 0
        )


def test_a_typed_prompt_is_the_one_that_is_built(chatty):
    words = with_template(chatty, LLAMA)
    task = replace(TASKS["sst2"], chat=Chat(system=SYSTEM))
    typed = "Review: bad\nSentiment: Negative\nReview: good\nSentiment: Positive\nReview: fine\nSentiment:"
    built = build(task, words, [Example("bad", 0), Example("good", 1)], "fine", 1)
    assert from_text(typed, task, words, truth="Positive") == built


def test_a_chat_is_a_part_of_the_key_and_no_chat_is_not():
    plain = TASKS["sst2"].identity()
    keys = [
        json.dumps(replace(TASKS["sst2"], chat=c).identity())
        for c in (Chat(), Chat("one"), Chat(system=SYSTEM))
    ]
    assert "chat" not in plain
    assert len({json.dumps(plain), *keys}) == 4


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("form", ["turns", "one"])
def test_flow_of_a_chat_is_the_gradient_of_the_models_own_attention(chatty, style, form):
    """Σ_h A ∂L/∂A of eager attention, with transformers' own tokens of the messages and its own loss."""
    model, eager = _twins(chatty, style)
    task = replace(TASKS["sst2"], chat=Chat(form))
    shown, gold = [Example("a good one", 1), Example("a bad one", 0)], 1
    prompt = build(task, model.tokenizer, shown, "not bad", gold)
    messages = messages_of(task, shown, "not bad")
    ids = chatty.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=False,
        add_generation_prompt=True,
        chat_template=pinned(STYLES[style]),
    )
    found = eager(torch.tensor([ids]), output_attentions=True)
    for attention in found.attentions:
        attention.retain_grad()
    logits = found.logits[0, -1, list(prompt.label_ids)]
    torch.nn.functional.cross_entropy(logits[None], torch.tensor([gold])).backward()
    maps = flow(model, [prompt], maps=range(2)).maps
    for layer, attention in enumerate(found.attentions):
        # What a token gives itself is not in the map.
        theirs = (attention * attention.grad).detach().sum(1).abs()[0].tril(-1)
        assert float(theirs.max()) > 0
        torch.testing.assert_close(maps[layer][0], theirs, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("form", ["turns", "one"])
def test_shared_demonstrations_of_a_chat_give_the_logits_of_whole_prompts(chatty, form):
    model, eager = _twins(chatty, "llama")
    task = replace(TASKS["sst2"], chat=Chat(form, SYSTEM))
    shown = [Example("a good one", 1), Example("a bad one", 0)]
    asked = [build(task, model.tokenizer, shown, text, 0) for text in ("fine", "not so good")]
    context = encode(model, shared_demonstrations(asked))
    batch = queries(asked, len(context.ids), model.device)
    with torch.no_grad():
        for row, prompt in zip(answer(model, context, batch), asked, strict=True):
            torch.testing.assert_close(
                row, eager(torch.tensor([prompt.ids])).logits[0, -1], rtol=1e-4, atol=1e-5
            )


@pytest.fixture(scope="module")
def conversing(chatty, tmp_path_factory):
    """A tiny model with a chat template, in a folder."""
    folder = tmp_path_factory.mktemp("models") / "conversing"
    _, own = _twins(chatty, "chatml")
    own.save_pretrained(folder)
    with_template(chatty, CHATML).save_pretrained(folder)
    return folder


RUN = {
    "classify": ("--calibrate",),
    "readout": (),
    "reweight": ("--epochs", 1, "--per-class", 1),
    "compress": ("--draws", 1),
    "diagnose": ("--components", 2, "-t", "sst2"),
}


@pytest.mark.parametrize("verb", RUN)
def test_every_study_runs_on_a_chat_and_says_so(conversing, tmp_path, verb):
    """The prompts it asked are those of the template: the tokens of the run are theirs, and the loss is their own."""
    how = (
        "--model",
        conversing,
        "--device",
        "cpu",
        "-n",
        2,
        "--chat",
        "turns",
        "--system",
        SYSTEM,
        "-o",
        tmp_path,
    )
    done = RUNNER.invoke(app, [verb, *map(str, (*how, *RUN[verb]))], env={"COLUMNS": "180"})
    assert done.exit_code == 0, done.output
    assert "sst2 (chat, system)" in done.stdout
    rows = pd.read_parquet(tmp_path / f"{verb}.parquet")
    assert set(rows["task"]) == {"sst2 (chat, system)"}
    if verb == "classify":
        model, task = load(conversing, device="cpu"), replace(TASKS["sst2"], chat=Chat(system=SYSTEM))
        drawn = draw(task, read(task), model.tokenizer, Draw(fresh=False, seed=int(rows["seed"].iloc[0])), 2)
        for one in drawn:
            said = model.witness.logits(torch.tensor([one.prompt.ids]))[0, -1, list(one.prompt.label_ids)]
            own = rows[
                (rows["example"] == one.example) & (rows["metric"] == "loss") & (rows["condition"] == "none")
            ]
            assert own["value"].item() == pytest.approx(
                float(-said.log_softmax(0)[one.prompt.gold]), rel=1e-3
            )


def test_an_experiment_runs_on_a_chat(conversing, tmp_path):
    how = ("--model", conversing, "--device", "cpu", "-n", 1, "--chat", "one", "-t", "sst2", "-o", tmp_path)
    done = RUNNER.invoke(app, ["run", "many-shot", *map(str, how)])
    assert done.exit_code == 0, done.output
    (rows,) = tmp_path.rglob("classify.parquet")
    assert set(pd.read_parquet(rows)["task"]) == {"sst2 (chat, one turn)"}


def test_a_chat_is_certified(conversing):
    """The prompts of the check are those of the template, of which the longest is said."""
    lengths = {}
    for name, chat in {"plain": (), "chat": ("--chat", "turns")}.items():
        done = RUNNER.invoke(
            app, ["check", str(conversing), "--device", "cpu", "-t", "sst2", *chat, "--json"]
        )
        assert done.exit_code == 0, done.output
        found = {one["name"]: one for one in json.loads(done.stdout)}
        assert all(one["ok"] is not False for one in found.values())
        lengths[name] = int(found["logits are the model's own"]["detail"].split()[0])
    assert lengths["chat"] > lengths["plain"] + 20


def _twins(chatty, style):
    """A tiny random model on the seam, and the same in transformers' own eager attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chatty),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    own = LlamaForCausalLM(config).eval()
    for weight in own.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, std=0.3)
    eager = copy.deepcopy(own)
    eager.set_attn_implementation("eager")
    return load(own, tokenizer=with_template(chatty, STYLES[style]), device="cpu"), eager
