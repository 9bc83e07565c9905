"""Tokenizers of models that are trained here: made-up words for episodes, bytes for text files."""

from dataclasses import dataclass
from functools import cached_property
from itertools import product

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from anchors.errors import AnchorsError

SPECIALS = ("<pad>", "<unk>", "<s>", ":", ";")
PAD, UNKNOWN, BEGIN, COLON, SEMICOLON = range(len(SPECIALS))
"""Ids of the special tokens and of the two that frame a label word."""

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = tuple("".join(pair) for pair in product(_CONSONANTS, _VOWELS))
_STRIDE = 1009  # prime to every power of 70 = 2 · 5 · 7, so that the words are distinct and neighbours look different


@dataclass(frozen=True)
class Vocabulary:
    """The words of episodes. Ids: `SPECIALS`, then label words, then the words of texts.

    Attributes:
        label_words: how many words can stand for a class; they look like `Tak`.
        words: how many words texts are made of; they look like `moda`.
    """

    label_words: int = 32
    words: int = 256

    def __post_init__(self) -> None:
        if self.label_words < 2 or self.words < 8:
            raise AnchorsError(
                f"A vocabulary of {self.label_words} label words and {self.words} words is too small.",
                "Take at least 2 label words and 8 words.",
                code="option-value",
            )
        if self.label_words > len(_SYLLABLES) * len(_CONSONANTS) or self.words > len(_SYLLABLES) ** 3:
            raise AnchorsError(
                f"There are not {self.label_words} label words and {self.words} words to make up.",
                f"At most {len(_SYLLABLES) * len(_CONSONANTS)} label words and {len(_SYLLABLES) ** 3} words.",
                code="option-value",
            )

    @property
    def first_label(self) -> int:
        """Id of the first label word."""
        return len(SPECIALS)

    @property
    def first_word(self) -> int:
        """Id of the first word of texts."""
        return self.first_label + self.label_words

    def __len__(self) -> int:
        return self.first_word + self.words

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """All tokens in the order of their ids."""
        return SPECIALS + tuple(map(_label, range(self.label_words))) + _made_up(self.words)

    def text(self, ids: tuple[int, ...] | list[int]) -> str:
        """Tokens joined by spaces; the tokenizer puts BOS before them and gives the same ids again."""
        return " ".join(self.tokens[i] for i in ids if i != BEGIN)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Splits at whitespace and around punctuation, one token a word, BOS in front; with offsets."""
        raw = Tokenizer(
            models.WordLevel({token: i for i, token in enumerate(self.tokens)}, unk_token=SPECIALS[UNKNOWN])
        )
        raw.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
        )
        return _finished(raw, unk_token=SPECIALS[UNKNOWN])


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, 256 of them, after `<pad>` and `<s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", SPECIALS[BEGIN], *alphabet]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return _finished(raw)


def _finished(raw: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    begin = SPECIALS[BEGIN]
    raw.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A $B",
        special_tokens=[(begin, raw.token_to_id(begin))],
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=begin, pad_token=SPECIALS[PAD], **special)


def _label(number: int) -> str:
    end, syllable = divmod(number * 67 % (len(_SYLLABLES) * len(_CONSONANTS)), len(_SYLLABLES))
    return (_SYLLABLES[syllable] + _CONSONANTS[end]).capitalize()


def _made_up(count: int) -> tuple[str, ...]:
    """Two syllables while they last for all, else three."""
    length = 2 if count <= len(_SYLLABLES) ** 2 else 3
    total = len(_SYLLABLES) ** length
    found = []
    for number in range(count):
        code = number * _STRIDE % total
        parts = []
        for _ in range(length):
            code, syllable = divmod(code, len(_SYLLABLES))
            parts.append(_SYLLABLES[syllable])
        found.append("".join(parts))
    return tuple(found)
