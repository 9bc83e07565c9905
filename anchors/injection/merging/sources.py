"""The three models of an injection, opened together: which tensors belong together, and which rows of embeddings."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from anchors.errors import AnchorsError
from anchors.injection.merging.adapter import HEAD, Adapted, open_expert
from anchors.injection.merging.checkpoint import Checkpoint
from anchors.injection.merging.embeddings import POLICIES, SharedRows, Vocabulary, align
from anchors.injection.merging.mapping import Pair, Tower, agree, tower

Source = str | Path | Checkpoint
"""A directory, a hub id, or what was opened from one."""
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "merges.txt")


@dataclass(frozen=True)
class Sources:
    """Vision-language model, base and expert.

    Attributes:
        vlm: the vision-language model.
        base: the language model that both others were made from.
        expert: the language model whose skill is injected, or a LoRA folder that makes one of the base.
        pairs: by name in the vision-language model (of experts in a stack, each matrix by itself): the tensor's place in
            the base and in the expert.
        rows: the rows of embedding and head that are merged; None where these stay as they are.
    """

    vlm: Checkpoint
    base: Checkpoint
    expert: Checkpoint
    pairs: Mapping[str, tuple[Pair, Pair]]
    rows: SharedRows | None

    @classmethod
    def open(cls, vlm: Source, expert: Source, base: Source | None, embeddings: str = "keep") -> "Sources":
        """Open the three and find out how they belong together; weights only where tied heads must be told.

        Without a base it is the model that the expert, an adapter, was trained on.

        Raises:
            AnchorsError: a model cannot be opened; one is given twice; the vision-language model is a language model;
                base or expert do not fit the tower; no such policy, or one that these models do not allow.
        """
        own, theirs = Checkpoint.open(vlm), open_expert(expert, base)
        if base is None:
            if not isinstance(theirs, Adapted):
                raise AnchorsError(
                    f"{theirs.name!r} is no adapter, so what it was made from must be said.",
                    "Give the language model that both were made from as --base.",
                    code="option-value",
                )
            base = theirs.base
        base = Checkpoint.open(base)
        others = (base, theirs)
        for model, role in zip(others, ("base", "expert"), strict=True):
            _require_another(own, model, role)
        towers = [
            tower(own.apart.shapes, model.apart.shapes, name)
            for model, name in zip(others, ("the base", "the expert"), strict=True)
        ]
        if not towers[0].kept:
            raise AnchorsError(
                f"{own.name!r} has no eyes: there is no tensor outside its language tower.",
                "Give a vision-language model first, then the expert.",
                code="model-kind",
            )
        pairs = {pair.vlm: (pair, other) for pair, other in agree(*towers)}
        if embeddings != "keep":
            pairs = _tied(own, others, towers, pairs)
        elif isinstance(theirs, Adapted):
            others = base, _left_out(theirs, pairs)
        return cls(own, *others, pairs, _rows(own, others, pairs, embeddings))

    @property
    def n_layers(self) -> int:
        """Layers of the tower."""
        return 1 + max(pair.layer for pair, _ in self.pairs.values() if pair.layer is not None)

    def merged(self) -> Iterator[str]:
        """Names, in the vision-language model, of the tensors that a merge may change."""
        for name, (pair, _) in self.pairs.items():
            if self.rows is not None or not by_rows(pair):
                yield name

    def weights(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A tensor of the tower in base, vision-language model and expert, as it lies on disk.

        Raises:
            AnchorsError: one of them is quantised.
        """
        pair, other = self.pairs[name]
        return self.base.weight(pair.llm), self.vlm.weight(name), self.expert.weight(other.llm)

    def shared(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The same, of embedding and head only the rows that are merged."""
        b, v, e = self.weights(name)
        if self.rows is not None and by_rows(self.pairs[name][0]):
            return b[self.rows.base], v[self.rows.vlm], e[self.rows.expert]
        return b, v, e

    def part(self, name: str) -> str:
        """What a tensor of the vision-language model is: attention, mlp, norm, embedding or head of the tower, or the
        name of the module outside of it."""
        name, *_ = self.vlm.apart.stacks.get(name, (name,))
        if name in self.pairs:
            return part_of(self.pairs[name][0])
        words = [word for word in name.split(".") if word != "model"]
        return words[0]

    def roles(self) -> dict[str, Checkpoint]:
        """The three models by what they are here."""
        return {"vlm": self.vlm, "base": self.base, "expert": self.expert}

    def facts(self) -> dict[str, Any]:
        """JSON-able: what the three models are, and which rows of embeddings are merged."""
        facts: dict[str, Any] = {role: model.fingerprint for role, model in self.roles().items()}
        if self.rows is not None:
            columns = (self.rows.vlm, self.rows.base, self.rows.expert)
            facts["rows"] = hashlib.sha256(torch.stack(columns).numpy().tobytes()).hexdigest()[:16]
        return facts


def by_rows(pair: Pair) -> bool:
    """Whether a tensor has one row for each token."""
    return pair.kind in ("embedding", "head")


def part_of(pair: Pair) -> str:
    """attention, mlp or norm of a layer (of the last norm, too), embedding or head."""
    if pair.kind != "layer":
        return pair.kind
    module = pair.canonical.split(".")[3]
    if "norm" in module:
        return "norm"
    return "attention" if "attn" in module or "attention" in module else "mlp"


def _require_another(vlm: Checkpoint, model: Checkpoint, role: str) -> None:
    alike = (vlm.shapes, vlm.dtypes) == (model.shapes, model.dtypes)
    if vlm.folder.resolve() == model.folder.resolve() or (alike and vlm.fingerprint == model.fingerprint):
        raise AnchorsError(
            f"{model.name!r} is given as the {role}, but is the vision-language model.",
            "Base and expert are language models; the base is the one that both others were made from.",
            code="model-kind",
        )


def _left_out(expert: Adapted, pairs: Mapping[str, tuple[Pair, Pair]]) -> Adapted:
    """The same with a note on what it changes in embedding and head, which the policy `keep` leaves to the tower.

    Raises:
        AnchorsError: it changes nothing else.
    """
    changed = {other for _, other in pairs.values() if other.llm in expert.changes}
    kept = sorted(other.llm for other in changed if by_rows(other)) + [HEAD] * (expert.tied is not None)
    if not kept:
        return expert
    if all(map(by_rows, changed)):
        raise AnchorsError(
            f"The adapter {expert.lora.name!r} changes embedding and head only, which --embeddings keep leaves as they are: "
            "nothing of it would be merged.",
            "Take --embeddings shared-rows or by-token; where these refuse it, it cannot be merged into this model.",
            code="adapter",
        )
    note = (
        f"The adapter also changes {', '.join(dict.fromkeys(kept))}, which --embeddings keep leaves out of the merge "
        "(shared-rows and by-token take it)."
    )
    return replace(expert, notes=(*expert.notes, note))


def _tied(
    vlm: Checkpoint,
    others: Sequence[Checkpoint],
    towers: Sequence[Tower],
    pairs: Mapping[str, tuple[Pair, Pair]],
) -> dict[str, tuple[Pair, Pair]]:
    """A head that is the embedding, bit for bit, is merged as the embedding: random masks would part the two.

    Raises:
        AnchorsError: so it is in the vision-language model, but not in one of the others.
    """
    names = {own.kind: name for name, (own, _) in pairs.items() if by_rows(own)}
    embedding, head = names["embedding"], names.get("head")
    twins = head is not None and torch.equal(vlm.tensor(embedding), vlm.tensor(head))
    for i, (model, place) in enumerate(zip(others, towers, strict=True)):
        own = pairs[head][i].llm if twins else place.tied
        if own is not None and not _equal(model.weight(own), model.weight(pairs[embedding][i].llm)):
            raise AnchorsError(
                f"The head of {vlm.name!r} is its embedding, but {model.name!r} has a head of its own.",
                "Take --embeddings keep.",
                code="merge-layout",
            )
    return {**pairs, head: pairs[embedding]} if twins else dict(pairs)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bits."""
    return one.dtype == other.dtype and torch.equal(one, other)


def _rows(
    vlm: Checkpoint, others: Sequence[Checkpoint], pairs: Mapping[str, tuple[Pair, Pair]], policy: str
) -> SharedRows | None:
    name, own = next((name, own) for name, own in pairs.items() if own[0].kind == "embedding")
    base, expert = (model.shapes[pair.llm][0] for model, pair in zip(others, own, strict=True))
    sizes = (vlm.shapes[name][0], base, expert)
    if policy not in POLICIES or policy == "keep":
        return align(policy, sizes)
    models = (vlm, *others)
    vocabularies = tuple(_vocabulary(model.folder) for model in models)
    known = tuple(own for own in vocabularies if own is not None)
    if len(known) < len(models):
        lacking = [repr(model.name) for model, own in zip(models, vocabularies, strict=True) if own is None]
        raise AnchorsError(
            f"The embedding policy {policy} needs the tokenizers of all three models, to prove which rows are the same "
            f"token; there is none in {' and '.join(lacking)}.",
            "Put the tokenizer's files beside the model, or take --embeddings keep.",
            code="tokenizer",
        )
    return align(policy, sizes, known)


def _vocabulary(folder: Path) -> Vocabulary | None:
    """Of the tokenizer beside a model; None where there is none."""
    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return cast(PreTrainedTokenizerBase, tokenizer).get_vocab()
    except Exception as error:  # whatever the files, or a package that is missing, make of it
        raise AnchorsError(
            f"The tokenizer in {str(folder)!r} cannot be read: {error}",
            "Take --embeddings keep.",
            code="tokenizer",
        ) from error
