"""Forced decoding is greedy decoding; controls show what they say; kept image features change nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from injection_suites import build
from injection_vlms import make_vlm, picture
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from anchors.errors import AnchorsError
from anchors.injection.asking import evaluate as e
from anchors.injection.asking.suite import Example, Suite, pictures
from anchors.injection.asking.vlm import PLACE as IMAGE
from anchors.injection.asking.vlm import VisionLanguageModel, load_vlm
from anchors.injection.image_flow.prompts import own_answers
from anchors.model.language import load


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return Suite.open(build(tmp_path_factory.mktemp("world")))


@pytest.fixture(scope="module")
def vlm(suite: Suite) -> VisionLanguageModel:
    return load_vlm(suite.model("vlm"), device="cpu")


@torch.no_grad()
def greedy(vlm: VisionLanguageModel, prompt: str, picture: object, tokens: int = 6) -> list[int]:
    """What the model writes, one prompt at a time, by transformers' own generation."""
    inputs = vlm.processor(text=prompt, images=picture, return_tensors="pt")
    ids = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def test_forced_decoding_is_greedy_decoding(suite: Suite, vlm: VisionLanguageModel) -> None:
    examples = suite.examples("instruction", split=None)
    for shown in ("own", "blank", "shuffled"):
        wrote = [
            greedy(vlm, suite.prompt(x), p) for x, p in zip(examples, pictures(examples, shown), strict=True)
        ]
        # Every second example asks for what the model writes in truth, if that ends.
        said = [vlm.tokenizer.decode(w, skip_special_tokens=True) for w in wrote]
        asked = [
            replace(x, answer=text if i % 2 else x.answer)
            for i, (x, text) in enumerate(zip(examples, said, strict=True))
        ]
        plain = [vlm.tokenizer(suite.written(x), add_special_tokens=False)["input_ids"] for x in asked]
        expected = [w == [*ids, vlm.end] for w, ids in zip(wrote, plain, strict=True)]
        found = e.evaluate(vlm, suite, asked, shown, batch=5)
        assert found["correct"].tolist() == expected
        assert any(expected)
        assert not all(expected)
        assert found["number"].tolist() == [x.number for x in examples]


def test_kept_features_give_the_same_answers(suite: Suite, vlm: VisionLanguageModel) -> None:
    examples = suite.examples("vision", split=None)
    prepared = e.prepare(vlm, suite, examples, batch=5, features=True)
    for batch in prepared.batches:
        plain = vlm.model.base_model(**batch.inputs).last_hidden_state
        with e.showing(vlm, batch.features):
            kept = vlm.model.base_model(**batch.inputs).last_hidden_state
            # It is these features that are seen, none that the pixels give.
            black = batch.inputs | {"pixel_values": torch.zeros_like(batch.inputs["pixel_values"])}
            assert torch.equal(vlm.model.base_model(**black).last_hidden_state, plain)
        assert torch.equal(kept, plain)
    literal = replace(prepared, batches=tuple(replace(b, features=None) for b in prepared.batches))
    assert e.score(vlm, prepared).equals(e.score(vlm, literal))
    assert "get_image_features" not in vars(vlm.model.base_model)


def test_the_batch_does_not_matter(suite: Suite, vlm: VisionLanguageModel) -> None:
    examples = suite.examples("crosslingual", split=None)
    one = e.evaluate(vlm, suite, examples, batch=1)
    for size in (None, 5):
        assert one.equals(e.evaluate(vlm, suite, examples, batch=size))


def test_same_prompts_are_computed_once(suite: Suite, vlm: VisionLanguageModel) -> None:
    examples = suite.examples("vision", split=None)
    blank = e.prepare(vlm, suite, examples, "blank")
    rows = sum(len(b.places) for b in blank.batches)
    assert rows == len({(x.question, x.answer) for x in examples}) < len(examples)


def test_text_oracle_is_greedy_decoding(suite: Suite) -> None:
    lm = load(suite.model("experts", "instruction"), device="cpu")
    examples = suite.examples("instruction", split=None)
    asked = []
    for i, x in enumerate(examples):
        ids = lm.tokenizer(suite.prompt(x, x.text), return_tensors="pt")["input_ids"]
        new = lm.model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
        asked.append(replace(x, answer=lm.tokenizer.decode(new, skip_special_tokens=True)) if i % 2 else x)
        asked[-1] = replace(asked[-1], label=str(new.tolist()))
    expected = [
        x.label == str([*lm.tokenizer(suite.written(x), add_special_tokens=False)["input_ids"], 0])
        for x in asked
    ]
    assert e.evaluate_text(lm, suite, asked, batch=4)["correct"].tolist() == expected
    assert any(expected)
    told = [x.text for x in examples]
    assert e.evaluate_text(lm, suite, asked, told)["correct"].tolist() == expected
    others = e.evaluate_text(lm, suite, asked, ["big"] * len(told))
    assert others["correct"].tolist() != expected


def test_prompts_on_two_sides_of_a_length_are_asked_as_each_alone(suite: Suite, tmp_path: Path) -> None:
    """Dynamic NTK encodes the positions of a batch by its longest row: a short prompt beside a long one is another one."""
    folder = tmp_path / "expert"
    shutil.copytree(suite.model("experts", "instruction"), folder)
    words = AutoTokenizer.from_pretrained(folder)

    def tokens(x: Example) -> tuple[list[int], list[int]]:
        answer = words(suite.written(x), add_special_tokens=False)["input_ids"]
        return words(suite.prompt(x, x.text))["input_ids"], [*answer, words.eos_token_id]

    asked = [
        replace(x, text=" ".join([x.text] * (1 + 9 * (i % 3))), label=str(i))
        for i, x in enumerate(suite.examples("instruction", split=None)[:12])
    ]
    lengths = [len(prompt) + len(answer) for prompt, answer in map(tokens, asked)]
    config = json.loads((folder / "config.json").read_text())
    config |= {"max_position_embeddings": int(np.median(lengths))}
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 30.0}
    (folder / "config.json").write_text(json.dumps(config))

    def said(x: Example) -> list[int]:
        """What a fresh model finds most likely at each place of the answer, asked this alone."""
        fresh = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        prompt, answer = tokens(x)
        return fresh(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()

    # As answer what the model says first, so that it is near to right.
    asked = [replace(x, answer=words.decode(said(x)[0])) for x in asked]
    right = [said(x) == tokens(x)[1] for x in asked]
    lm = load(str(folder), device="cpu")
    assert {len(prompt) + len(answer) > lm.context for prompt, answer in map(tokens, asked)} == {True, False}
    assert e.evaluate_text(lm, suite, asked, batch=len(asked))["correct"].tolist() == right


def test_captions_are_what_the_model_writes(suite: Suite, vlm: VisionLanguageModel) -> None:
    examples = suite.examples("vision", split=None)
    found = e.captions(vlm, suite, examples, batch=5)
    for x, p, text in zip(examples, pictures(examples), found, strict=True):
        ids = greedy(vlm, suite.prompt(question="what"), p, e.CAPTION)
        assert text == vlm.tokenizer.decode(ids, skip_special_tokens=True).strip(), x


def test_pictures(suite: Suite) -> None:
    examples = suite.examples("vision", split=None)
    own, blank, other = (pictures(examples, shown) for shown in ("own", "blank", "shuffled"))
    assert all(np.ptp(np.asarray(p)) == 0 for p in blank)
    assert [p.size for p in blank] == [p.size for p in own]
    own, other = ([p.tobytes() for p in ps] for ps in (own, other))
    assert all(a != b for a, b in zip(own, other, strict=True))
    assert sorted(own) == sorted(other)
    assert other == [p.tobytes() for p in pictures(examples, "shuffled")]


def test_suite_refuses(suite: Suite, tmp_path: Path) -> None:
    with pytest.raises(AnchorsError, match="no suite"):
        Suite.open(tmp_path)
    (tmp_path / "suite.json").write_text("{}")
    with pytest.raises(AnchorsError, match="does not describe"):
        Suite.open(tmp_path)
    facts = json.loads((suite.folder / "suite.json").read_text())
    (tmp_path / "suite.json").write_text(json.dumps(facts))
    with pytest.raises(AnchorsError, match="has no file"):
        Suite.open(tmp_path)
    (tmp_path / "vision.jsonl").write_text('{"question": "q"}\n')
    with pytest.raises(AnchorsError, match="Line 1 of"):
        Suite.open(tmp_path)
    with pytest.raises(AnchorsError, match="has no scenario"):
        suite.examples("mathematics")
    with pytest.raises(AnchorsError, match="in split 'demonstration'"):
        suite.examples("vision", "demonstration")
    with pytest.raises(AnchorsError, match="names no upper for crosslingual"):
        suite.model("upper", "crosslingual")
    with pytest.raises(AnchorsError, match="is not there"):
        replace(suite, models=suite.models | {"vlm": "../gone"}).model("vlm")


def test_prompts(suite: Suite) -> None:
    x = replace(suite.examples("vision")[0], question="what is {image}")
    assert suite.prompt(x) == "<image> what is {image} ="
    assert suite.prompt(x, "three") == "three what is {image} ="
    assert suite.written(replace(x, answer="{answer}")) == " {answer}"


def test_greedy_obeys_no_generation_config(
    suite: Suite, vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = suite.examples("vision", split=None)
    shown = replace(suite, scenarios={"vision": tuple(replace(x, split="demonstration") for x in examples)})
    before = e.captions(vlm, suite, examples), own_answers(vlm, shown, "vision")
    assert any(
        len(set(text.split())) < len(text.split()) for text in before[0]
    )  # which a penalty would forbid
    odd = GenerationConfig(repetition_penalty=50.0, num_beams=3, min_new_tokens=9, suppress_tokens=[2, 3, 4])
    monkeypatch.setattr(vlm.model, "generation_config", odd)
    assert (e.captions(vlm, suite, examples), own_answers(vlm, shown, "vision")) == before
    assert vlm.model.generation_config is odd


def test_a_model_that_must_see_is_asked_like_any_other(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """BLIP-2 hands generation to its language model, and has no part that ends before the output matrix."""
    vlm = make_vlm("blip_2")
    odd = GenerationConfig(repetition_penalty=50.0, max_length=9)
    monkeypatch.setattr(vlm.model.language_model, "generation_config", odd)
    inputs = vlm.encode(
        [f"{IMAGE}what is it ?", f"{IMAGE}is it big"], [[picture(0)], [picture(1)]], [" yes no", " one"]
    )
    for row in range(2):
        tensors = vlm.encode([f"{IMAGE}{('what is it ?', 'is it big')[row]}"], [[picture(row)]]).tensors
        ids = tensors["input_ids"]
        for _ in range(24):
            logits = vlm.witness.answer(
                **tensors | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            )
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        new = ids[0, tensors["input_ids"].shape[1] :].tolist()
        new = new[: new.index(vlm.end)] if vlm.end in new else new
        (said,) = e.greedy(vlm, tensors, 24)
        assert said == vlm.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert len(new) > 9
    batch = e._image_batch((0, 1), inputs)
    most = e._most_likely(vlm.model, batch)
    kept = replace(batch, features=e.image_features(vlm, batch.inputs))
    with e.showing(vlm, kept.features):
        assert torch.equal(e._most_likely(vlm.model, kept), most)
    alone = vlm.witness.answer(**inputs.tensors)[batch.rows, batch.columns].argmax(-1)
    assert torch.equal(most, alone)
    assert vlm.model.language_model.generation_config is odd


def test_truncated_weights_are_refused(suite: Suite, tmp_path: Path) -> None:
    for role, loader in (("vlm", load_vlm), ("base", load)):
        folder = shutil.copytree(suite.model(role), tmp_path / role)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(AnchorsError, match="could not be loaded"):
            loader(str(folder), device="cpu")


@pytest.fixture
def copied(suite: Suite, tmp_path: Path) -> Path:
    return shutil.copytree(suite.folder, tmp_path / "suite")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"seed": "x"}, "does not describe"),
        ({"seed": None}, "does not describe"),
        ({"template": 3}, "The template 3"),
        ({"template": "{image} ="}, "lacks"),
        ({"answer": None}, "The answer None"),
        ({"answer": " answer"}, "lacks {answer}"),
        ({"experts": ["instruction"]}, "experts in models"),
        ({"experts": None}, "experts in models"),
        ({"upper": "../upper"}, "upper in models"),
        ({"vision": ["vision"]}, "is called"),
        ({"vision": "../vision"}, "is called"),
    ],
)
def test_suite_refuses_facts(copied: Path, changed: dict, match: str) -> None:
    facts = json.loads((copied / "suite.json").read_text())
    inside = {k: v for k, v in changed.items() if k in facts["models"]}
    facts["models"] |= inside
    (copied / "suite.json").write_text(
        json.dumps(facts | {k: v for k, v in changed.items() if k not in inside})
    )
    with pytest.raises(AnchorsError, match=match):
        Suite.open(copied)


def test_suite_refuses_lines(copied: Path) -> None:
    path = copied / "vision.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    (copied.parent / "outside.png").write_bytes((copied / line["image"]).read_bytes())
    (copied / "link.png").symlink_to("../outside.png")
    outside = str(copied.parent / "outside.png")
    for image in ("../outside.png", outside, "link.png"):
        path.write_text(json.dumps(line | {"image": image}))
        with pytest.raises(AnchorsError, match="outside the suite"):
            Suite.open(copied)
    for name in ("answer", "question"):
        path.write_text(json.dumps(line | {name: None}))
        with pytest.raises(AnchorsError, match="is null"):
            Suite.open(copied)
    path.write_bytes(b'{"question": "\xff"}')
    with pytest.raises(AnchorsError, match="is not UTF-8"):
        Suite.open(copied)


def test_suite_reads_a_mark_of_byte_order_and_no_caption(copied: Path) -> None:
    facts = json.loads((copied / "suite.json").read_text())
    (copied / "suite.json").write_text(json.dumps(facts | {"caption": ""}), encoding="utf-8-sig")
    text = (copied / "vision.jsonl").read_text()
    (copied / "vision.jsonl").write_text(text, encoding="utf-8-sig")
    assert Suite.open(copied).caption is None


def test_bad_pictures_are_refused(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, path = suite.examples("vision")[0], tmp_path / "x.png"

    def refused() -> None:
        with pytest.raises(AnchorsError, match="cannot be read"):
            pictures([replace(example, image=path)])

    Image.new("RGB", (4, 4)).save(path, format="PPM")  # not of the formats that are read
    refused()
    whole = (suite.folder / "images" / "0.png").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused()
    path.write_bytes(whole[:30] + b"\xff" * 20 + whole[50:])
    refused()
    path.write_bytes(whole)
    for limit in (200, 100):  # of 256 pixels: a warning, and an error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refused()
