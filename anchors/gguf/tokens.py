"""The tokenizer that a GGUF file states.

The file holds a vocabulary and, for byte-level ones, merges; how text is cut before the merging it only names
(`tokenizer.ggml.pre`). The patterns of each name are those of llama.cpp's src/llama-vocab.cpp. A name that is not in
`PRE_TOKENIZERS`, another kind of vocabulary, or a key that is not understood is refused by its name. Ids are llama.cpp's
(experiments/gguf/llama_cpp.json) but where it departs from the file:

- Its engine has no classes for upper and lower case, and it rewrites patterns that have them (tekken, gpt-4o and kin);
  here they are as in the original tokenizer.json. Capital letters outside ASCII tell.
- It takes some words that end turns elsewhere, such as </s>, for control tokens whatever their type in the file.

Nothing is normalised, as in llama.cpp, while some original tokenizers (Qwen's) compose characters first (NFC).
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from anchors.gguf.reading import GGUFFile

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SHORTENED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SHORTENED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _SHORTENED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_QWEN35 = (
    _SHORTENED
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASES % ("", "") + r"|\p{N}" + _SLASHED
_GPT4O = _CASES % (_SHORTENED + "?", _SHORTENED + "?") + r"|\p{N}{1,3}" + _SLASHED
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before the merging.

    Args:
        patterns: applied one after the other; what a pattern leaves between its matches stays a piece.
        whole_words: whether a piece that is a word of the vocabulary is taken without merging.
        begins: whether a beginning-of-text token is put in front where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False


def _same(pre: PreTokenizer, *names: str) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names, pre)


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **_same(
        PreTokenizer((_LLAMA3,), whole_words=True, begins=True),
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    **_same(PreTokenizer((_LLAMA3,)), "dbrx", "smaug-bpe"),
    **_same(
        PreTokenizer((_QWEN2,)),
        *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"),
    ),
    "qwen35": PreTokenizer((_QWEN35,)),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, begins=True),
    **_same(PreTokenizer((_GPT4O,)), "gpt-4o", "llama4", "kanana2"),
    **_same(
        PreTokenizer((_GPT2,)),
        *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0"),
        *("mellum", "exaone4"),
    ),
    **_same(
        PreTokenizer((r"\p{N}", _GPT2)),
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    **_same(PreTokenizer((_BLOOM,)), "bloom", "gpt3-finnish", "poro-chat"),
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file.

    Raises:
        AnchorsError: a vocabulary, a pre-tokenizer or a key that is not understood, by its name.
    """
    left = {name: value for name, value in file.keys.items() if name.startswith("tokenizer.")}
    kind = left.pop("tokenizer.ggml.model", None)
    if kind not in ("gpt2", "llama"):
        file.refuse(f"tokenizer.ggml.model is {kind!r}, and only 'gpt2' and 'llama' are understood")
    words = left.pop("tokenizer.ggml.tokens", None)
    if not words:
        file.refuse("it has no tokenizer.ggml.tokens")
    rows = file.tensors["token_embd.weight"].shape[0]
    if len(words) > rows:
        file.refuse(f"its tokenizer has {len(words)} tokens, and its embedding {rows} rows")
    types = left.pop("tokenizer.ggml.token_type", [1] * len(words))
    if len(types) < len(words):
        file.refuse(f"tokenizer.ggml.token_type has {len(types)} entries for {len(words)} tokens")
    pre = left.pop("tokenizer.ggml.pre", None)
    if kind == "gpt2":
        backend, begins = _byte_level(file, left, words, pre)
        defaults = {"bos": None, "eos": None, "unknown": None}
    else:
        if pre not in (None, "default", "llama-spm"):
            file.refuse(f"tokenizer.ggml.pre is {pre!r} for a vocabulary of the kind 'llama'")
        backend, begins = _sentencepiece(file, left, words, types), True
        defaults = {"bos": 1, "eos": 2, "unknown": 0}

    special = {}
    for name in ("bos", "eos", "unknown", "padding", "seperator", "mask"):
        number = left.pop(f"tokenizer.ggml.{name}_token_id", defaults.get(name))
        if number is not None and not 0 <= number < len(words):
            file.refuse(f"tokenizer.ggml.{name}_token_id is {number}, and there are {len(words)} tokens")
        special[name] = None if number is None else words[number]
    added = [
        AddedToken(word, normalized=False, special=type_ != _USER_DEFINED)
        for word, type_ in zip(words, types, strict=False)
        if type_ in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)
    if backend.get_vocab_size() > len(set(words)):
        file.refuse("its added tokens are not in its vocabulary")

    if left.pop("tokenizer.ggml.add_bos_token", begins):
        if special["bos"] is None:
            file.refuse("tokenizer.ggml.add_bos_token is true, and there is no tokenizer.ggml.bos_token_id")
        bos = special["bos"]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, words.index(bos))]
        )
    for name in ("add_eos_token", "add_sep_token", "remove_extra_whitespaces"):
        if left.pop(f"tokenizer.ggml.{name}", False):
            file.refuse(f"tokenizer.ggml.{name} is true, which is not done here")
    template = left.pop("tokenizer.chat_template", None)
    left = {name: value for name, value in left.items() if not _harmless(name)}
    if left:
        file.refuse(f"what {', '.join(sorted(left)[:5])} would change is not understood")

    parts = {
        "bos": "bos",
        "eos": "eos",
        "unk": "unknown",
        "pad": "padding",
        "sep": "seperator",
        "mask": "mask",
    }
    named = {f"{part}_token": special[name] for part, name in parts.items() if special[name] is not None}
    built = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **named,
    )
    if isinstance(template, str):
        built.chat_template = template
    return built


def _harmless(name: str) -> bool:
    """Whether a key of the tokenizer changes no token of a text: numbers of further tokens, chat templates."""
    return name.startswith("tokenizer.chat_template") or (
        name.startswith("tokenizer.ggml.") and name.endswith("_token_id")
    )


def _byte_level(
    file: GGUFFile, left: dict[str, Any], words: list[str], pre: str | None
) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, as GPT-2 has it."""
    if pre is None:
        file.refuse(
            "it does not say how text is cut into words (tokenizer.ggml.pre)",
            "Convert the model again with a newer llama.cpp, or give it as a directory of safetensors.",
        )
    if pre not in PRE_TOKENIZERS:
        file.refuse(f"tokenizer.ggml.pre is {pre!r}, and how that cuts text into words is not known here")
    if left.pop("tokenizer.ggml.add_space_prefix", False):
        file.refuse("tokenizer.ggml.add_space_prefix is true in a byte-level vocabulary")
    left.pop("tokenizer.ggml.scores", None)
    merges = []
    for merge in left.pop("tokenizer.ggml.merges", ()):
        cut = merge.find(" ", 1)
        merges.append((merge[:cut], merge[cut + 1 :]))
    if not merges:
        file.refuse("it has no tokenizer.ggml.merges")
    how = PRE_TOKENIZERS[pre]
    vocabulary = {word: number for number, word in enumerate(words)}
    for first, second in merges:
        if not {first, second, first + second} <= vocabulary.keys():
            file.refuse(f"tokenizer.ggml.merges joins {first!r} and {second!r}, and not all three are tokens")
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=how.whole_words))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in how.patterns]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_])
    backend.decoder = decoders.ByteLevel()
    return backend, how.begins


def _sentencepiece(file: GGUFFile, left: dict[str, Any], words: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece's BPE, as Llama 2 and Gemma have it: of all neighbours the pair that makes the best word is joined.

    The word with the higher score is the better one. A character that is no word becomes its bytes.
    """
    left.pop("tokenizer.ggml.merges", None)
    scores = left.pop("tokenizer.ggml.scores", None)
    if scores is None or len(scores) < len(words):
        file.refuse("tokenizer.ggml.scores does not have an entry for each of tokenizer.ggml.tokens")
    vocabulary = {word: number for number, word in enumerate(words)}
    pairs = [
        (-scores[number], number, word[:cut], word[cut:])
        for word, number in vocabulary.items()
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    unknown = next((word for word, type_ in zip(words, types, strict=False) if type_ == _UNKNOWN), None)
    model = BPE(
        vocab=vocabulary,
        merges=[(first, second) for *_, first, second in sorted(pairs)],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    prefix = left.pop("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend
