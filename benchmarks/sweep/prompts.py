"""Prompts for the sweep, drawn with the toolkit's own task: written down as plain numbers, so that the side that computes
the right values need not import it."""

import json
from dataclasses import asdict
from pathlib import Path

from sweep.right import Asked, Group

SHOTS = (1, 2)
WIDEST, SIZE = 40, 2000
"""Characters of the longest text that is shown, and tokens of the vocabulary."""


def write(folder: Path) -> None:
    """The tokenizer, and prompts on one and on two demonstrations of each class, in a folder.

    The edge (`sweep.tiny`) lies between the demonstrations of the longer prompts and their ends: the shorter prompts
    are below it, demonstrations of the longer ones too, the longer ones themselves above it.
    """
    import anchors
    from anchors.tasks.drawing import demonstrations
    from anchors.tasks.prompts import build

    task = anchors.task("sst2")
    everything = anchors.read(task)
    tokenizer = _tokenizer([e.text for part in (everything.train, everything.test) for e in part], task)
    tokenizer.save_pretrained(folder)
    groups, datas = [], []
    for shots in SHOTS:
        data = few(shots)
        how = anchors.Draw(shots=shots, fresh=False)
        drawn = [d.prompt for d in anchors.draw(task, data, tokenizer, how, 2)]
        shown = demonstrations(task, data, how)
        left = [e for e in data.train if e not in shown]
        extra = [build(task, tokenizer, shown, e.text, e.label) for e in sorted(left, key=lambda e: e.label)]
        groups.append(Group(*(tuple(map(_plain, part)) for part in (drawn, drawn, extra))))
        datas.append([[(e.text, e.label) for e in part] for part in (data.train, data.test)])
    groups = [Group(g.prompts, tuple(map(_exchanged, g.prompts)), g.training) for g in groups]
    edge = groups[-1].prompts[0].query + 3
    written = {"edge": edge, "size": len(tokenizer), "groups": [asdict(group) for group in groups]}
    (folder / "prompts.json").write_text(json.dumps(written))


def few(shots: int):
    """Short texts: as many of each class as are shown, and one more to fit β on; two to ask about."""
    import anchors
    from anchors.tasks.data import Data

    data = anchors.read(anchors.task("sst2"))
    short = [[e for e in part if len(e.text) <= WIDEST] for part in (data.train, data.test)]
    train = [[e for e in short[0] if e.label == c][: shots + 1] for c in (0, 1)]
    return Data(tuple(train[0] + train[1]), (short[1][0], short[1][3]), f"{shots} shots of short texts")


def read(folder: Path) -> tuple[int, int, list[Group]]:
    """What `write` wrote: the edge, the size of the vocabulary, the prompts."""
    kept = json.loads((folder / "prompts.json").read_text())

    def asked(settings: dict) -> Asked:
        return Asked(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        )

    groups = [
        Group(**{name: tuple(map(asked, part)) for name, part in group.items()}) for group in kept["groups"]
    ]
    return kept["edge"], kept["size"], groups


def _plain(prompt) -> Asked:
    anchors = [i for i in range(prompt.query) if prompt.roles[i] in ("format", "label")]
    return Asked(
        tuple(prompt.ids), tuple(prompt.label_positions), tuple(prompt.label_classes), tuple(prompt.label_ids),
        prompt.gold, prompt.query, tuple(anchors),
    )  # fmt: skip


def _exchanged(prompt: Asked) -> Asked:
    ids = list(prompt.ids)
    for p, own in zip(prompt.labels, prompt.classes, strict=True):
        assert ids[p] == prompt.label_ids[own], "a label word of several tokens"
        ids[p] = prompt.label_ids[1 - own]
    return Asked(**asdict(prompt) | {"ids": tuple(ids)})


def _tokenizer(texts: list[str], task):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<pad>"],
        show_progress=False,
    )
    raw.train_from_iterator(texts + 200 * [task.template, *(f"a {word}" for word in task.labels)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>", pad_token="<pad>")  # noqa: S106
