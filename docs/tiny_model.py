"""A random model of a few thousand weights and a tokenizer of the built-in texts, saved to a folder.

    python tiny_model.py FOLDER

Its answers mean nothing; everything that runs on a model runs on it, in seconds and without a network.
"""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import anchors


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every label word is a token or two."""
    texts = []
    for name in ("sst2", "trec", "agnews", "emo"):
        task = anchors.task(name)
        data = anchors.read(task)
        texts += [example.text for part in (data.train, data.test) for example in part]
        texts += [task.template, *(f"a {word}" for word in task.labels for _ in range(100))]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=["<s>"], initial_alphabet=alphabet)
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def save(folder: str) -> None:
    words = tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words),
        n_layer=3,
        n_head=4,
        n_embd=32,
        n_positions=1024,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    for weight in model.parameters():
        if weight.dim() >= 2:  # attention far from uniform
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


if __name__ == "__main__":
    save(sys.argv[1])
