"""Which tensor of a vision-language model is which tensor of the language model its tower was made from.

A language model calls its tensors `model.embed_tokens.weight`, `model.layers.N.…`, `model.norm.weight` and
`lm_head.weight`. A vision-language model holds the same ones behind a prefix, which differs between families, between
generations of one library, and between disk and memory (`model.`, `language_model.model.`, `model.language_model.`,
`model.text_model.`). No family is listed here: a tower is where token embeddings are (vision towers have none), and what
follows its prefix must be the language model's names and shapes: all of them, and no other layer. What does not fit is an
error, since a merge that leaves tensors out looks just like one that works.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from anchors.errors import AnchorsError

Kind = Literal["layer", "norm", "embedding", "head"]
Shape = Sequence[int]

_EMBEDDING = "embed_tokens.weight"
_HOME = re.compile(r"(?P<prefix>(?:.+\.)?)(?:embed_tokens|tok_embeddings)\.weight")
_PLAIN = re.compile(r"(?P<prefix>(?:(?:model|language_model|text_model)\.)*)(?:layers|norm)\..+")
"""Prefixes that say no more than "the language model"; a second one in a model is a second tower."""
_HEAD = re.compile(r"(?:.+\.)?(?P<tail>lm_head\..+)|(?:language_model\.)?output\.weight")
_OTHERWISE = {"tok_embeddings.weight": _EMBEDDING}
"""InternLM2's names of what all others call alike; its head is `output`."""
_SEEING = re.compile(r"(?:^|\.)(?:vision|visual|image|mm_|multi_modal|connector)")
"""Modules that never are part of a language model, where a checkpoint puts them behind the same prefix."""
_BUFFER = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias)$")
"""Constants that old checkpoints hold as tensors."""
_EXPERT = re.compile(r"\.experts\.\d+\.")
_STACK = re.compile(r"\.experts\.(?!\d)")
"""One expert of a mixture, and all of a layer in one tensor."""
_SHOWN = 6
_ELSEWHERE = 3


@dataclass(frozen=True)
class Pair:
    """One tensor of the language model and its place in the vision-language model.

    Attributes:
        canonical: the name that both go by here, e.g. `model.layers.0.self_attn.q_proj.weight`.
        llm: its name in the language model; of a head that is tied there, the name of the embedding.
        vlm: its name in the vision-language model.
        layer: the layer it belongs to, as the language model counts; None outside layers.
        kind: `layer`, `norm` (the last one, and what else is in no layer), `embedding` or `head`, whose rows are tokens
            and may differ in number.
    """

    canonical: str
    llm: str
    vlm: str
    layer: int | None
    kind: Kind


@dataclass(frozen=True)
class Tower:
    """The language tower of a vision-language model.

    Attributes:
        pairs: all tensors of the language model, in the order embedding, layers, norm, head.
        kept: names of the vision-language model outside its tower (vision, projector, …).
        tied: the language model's own `lm_head.weight` where the vision-language model has none, because its head is
            its embedding. Merging the embedding is only right if this one equals the language model's embedding, too.
    """

    pairs: tuple[Pair, ...]
    kept: tuple[str, ...]
    tied: str | None = None


@dataclass(frozen=True)
class _Names:
    """Names of one model by what follows the prefix of its language tower, and all other names."""

    tails: Mapping[str, Sequence[str]]
    others: Sequence[str]


def tower(vlm: Mapping[str, Shape], llm: Mapping[str, Shape], name: str = "the language model") -> Tower:
    """Map every tensor of a language model to the one tensor of the vision-language model's tower that came from it.

    Args:
        vlm: shapes of the vision-language model by name, as on disk (of any generation) or in memory.
        llm: shapes of the language model; one that itself sits in a vision-language model will do.
        name: what to call the language model in errors.

    Raises:
        AnchorsError: a tensor of the language model is missing in the tower, is there twice or has another shape;
            the tower has tensors that the language model lacks; the language model has tensors outside its tower that
            the vision-language model does not know. The message has a table of them.
    """
    theirs, ours = _names(vlm), _names(llm)
    for model, names in (("The vision-language model", theirs), (_capital(name), ours)):
        if _EMBEDDING not in names.tails:
            raise AnchorsError(
                f"{model} has no tensor `…{_EMBEDDING}`, so where its language tower is cannot be told.",
                "Merging works on decoders of the Llama kind: Llama, Mistral, Qwen, Gemma, SmolLM, …",
                code="merge-layout",
            )
    wrong: dict[str, list[str]] = defaultdict(list)
    pairs, tied = [], None
    for tail, own in sorted(ours.tails.items(), key=lambda item: _place(item[0])):
        if len(own) > 1:
            wrong["doubled in the language model"].append(_listed(own))
            continue
        found = theirs.tails.get(tail, ())
        fitting = [other for other in found if _fits(tail, vlm[other], llm[own[0]])]
        if len(fitting) == 1:
            pairs.append(_pair(tail, own[0], fitting[0]))
        elif fitting:
            wrong["doubled in the tower"].append(f"{tail}: {_listed(fitting)}")
        elif found:
            shapes = f"{_shape(llm[own[0]])} in the language model, {_shape(vlm[found[0]])} in the tower"
            wrong["of another shape"].append(f"{tail}: {shapes}")
        elif tail == "lm_head.weight":
            tied = own[0]
        else:
            wrong["missing in the tower"].append(f"{tail} {_shape(llm[own[0]])}")
    surplus = {tail: found for tail, found in theirs.tails.items() if tail not in ours.tails}
    kept = list(theirs.others) + [
        name for tail, found in surplus.items() if _place(tail)[0] == _ELSEWHERE for name in found
    ]
    for tail, found in sorted(surplus.items(), key=lambda item: _place(item[0])):
        if _place(tail)[0] == _ELSEWHERE:
            continue
        if tail == "lm_head.weight" and len(found) == 1:
            # The language model's head is its embedding.
            pairs.append(_pair(tail, ours.tails[_EMBEDDING][0], found[0]))
        else:
            wrong["missing in the language model"].append(f"{tail}: {_listed(found)}")
    # A language model may itself have eyes, if they are those of the vision-language model.
    known = {(_end(other), tuple(vlm[other])) for other in theirs.others}
    eyes = {own for own in ours.others if _SEEING.search(own) and (_end(own), tuple(llm[own])) in known}
    wrong["outside the language tower"] += [own for own in ours.others if own not in eyes]
    _require_one_layout(name, wrong["missing in the tower"], wrong["missing in the language model"])
    if any(wrong.values()):
        raise AnchorsError(_table(name, wrong, len(pairs)), _remedy(wrong), code="merge-layout")
    return Tower(tuple(pairs), tuple(kept), tied)


def _require_one_layout(name: str, lacking: Sequence[str], surplus: Sequence[str]) -> None:
    """Refuse experts that are the same on both sides, but one tensor each on one and stacked on the other."""
    for singly, packed, mine in ((lacking, surplus, True), (surplus, lacking, False)):
        single, stacked = (
            next(filter(_EXPERT.search, singly), None),
            next(filter(_STACK.search, packed), None),
        )
        if single and stacked:
            one, other = (_capital(name), "the tower") if mine else ("The tower", name)
            raise AnchorsError(
                f"{one} holds its experts in another layout than {other}: one tensor an expert ({single.split()[0].rstrip(':')}) "
                f"where {other} has them stacked in one ({stacked.split()[0].rstrip(':')}).",
                "Load and save the one that is stored singly with a transformers that stacks experts, or the other way round, "
                "so that both hold the same tensors.",
                code="merge-layout",
            )


def agree(base: Tower, expert: Tower) -> tuple[tuple[Pair, Pair], ...]:
    """Pairs of the base and of the expert that are the same tensor of one tower, whatever each calls it.

    Raises:
        AnchorsError: they are not the same tensors.
    """
    own, other = ({pair.vlm: pair for pair in side.pairs} for side in (base, expert))
    if differing := sorted(set(own) ^ set(other)):
        raise AnchorsError(
            f"Base and expert do not hold the same tensors: only one of them has {_listed(differing)}.",
            "Give the model that the expert was fine-tuned from as --base.",
            code="merge-unrelated",
        )
    return tuple((own[name], other[name]) for name in own)


def _names(model: Mapping[str, Shape]) -> _Names:
    """Names by tail. Layers of cross-attention, which a vision-language model put between the others, are none of it."""
    names = [name for name in model if not _BUFFER.search(name)]
    found = [m for name in names if (m := _HOME.fullmatch(name) or _PLAIN.fullmatch(name))]
    homes = sorted({m["prefix"] for m in found if not _SEEING.search(m["prefix"])}, key=len, reverse=True)
    split: dict[str, tuple[str, str]] = {}
    tails, others = defaultdict(list), []
    for name in names:
        home = next((prefix for prefix in homes if name.startswith(prefix)), None)
        if head := _HEAD.fullmatch(name):
            tails[head["tail"] or "lm_head.weight"].append(name)
        elif home is None or _SEEING.search(name):
            others.append(name)
        else:
            tail = name.removeprefix(home)
            split[name] = home, _OTHERWISE.get(tail, tail)
    numbers = {home: _numbers(tail for prefix, tail in split.values() if prefix == home) for home in homes}
    for name, (home, tail) in split.items():
        if (layer := _layer(tail)) is None:
            tails[tail].append(name)
        elif layer in numbers[home]:
            tails[f"layers.{numbers[home][layer]}.{tail.split('.', 2)[2]}"].append(name)
        else:
            others.append(name)
    return _Names(tails, others)


def _numbers(tails: Iterable[str]) -> dict[int, int]:
    """What the language model calls each layer of a tower, where layers of cross-attention are left out."""
    tails = list(tails)
    layers = {layer for tail in tails if (layer := _layer(tail)) is not None}
    crossing = {_layer(tail) for tail in tails if ".cross_attn." in tail}
    return (
        {old: new for new, old in enumerate(sorted(layers - crossing))}
        if crossing
        else {n: n for n in layers}
    )


def _layer(tail: str) -> int | None:
    first, number, *_ = f"{tail}..".split(".")
    return int(number) if first == "layers" and number.isdigit() else None


def _pair(tail: str, llm: str, vlm: str) -> Pair:
    head = tail.startswith("lm_head.")
    canonical, order = tail if head else f"model.{tail}", _place(tail)[0]
    kinds: tuple[Kind, ...] = ("embedding", "layer", "norm", "norm", "head")
    return Pair(canonical, llm, vlm, _layer(tail), kinds[order])


def _fits(tail: str, one: Shape, other: Shape) -> bool:
    rows = tail.startswith(("embed_tokens", "lm_head."))  # vocabularies may differ
    return len(one) == len(other) and tuple(one[rows:]) == tuple(other[rows:])


def _place(tail: str) -> tuple[int, int, str]:
    """Embedding, layers, last norm, whatever else there is, head."""
    first = tail.split(".", 1)[0]
    if first.startswith("embed_tokens"):
        return 0, 0, tail
    if (layer := _layer(tail)) is not None:
        return 1, layer, tail
    return {"norm": 2, "lm_head": 4}.get(first, _ELSEWHERE), 0, tail


def _end(name: str) -> str:
    return ".".join(name.split(".")[-4:])


def _shape(shape: Shape) -> str:
    return "×".join(str(size) for size in shape) or "scalar"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _table(name: str, wrong: Mapping[str, Sequence[str]], fitting: int) -> str:
    counts = ", ".join(f"{len(rows)} {what}" for what, rows in wrong.items() if rows)
    lines = [
        f"{_capital(name)} is not what the language tower was made from: {fitting} tensors fit, {counts}."
    ]
    for what, rows in wrong.items():
        if rows:
            lines += [f"{what}:", *(f"    {row}" for row in rows[:_SHOWN])]
            lines += [f"    … and {len(rows) - _SHOWN} more"] * (len(rows) > _SHOWN)
    return "\n".join(lines)


def _remedy(wrong: Mapping[str, Sequence[str]]) -> str:
    if wrong["of another shape"]:
        return "Give a model of the size that the tower was made from."
    if wrong["doubled in the tower"] or wrong["doubled in the language model"]:
        return "The checkpoint holds more than one language tower; save it again from the model you mean."
    if wrong["outside the language tower"]:
        return "Give a plain language model: merge adapters into it first; classifiers and other towers are not merged."
    return "Give a model of the architecture and depth that the tower was made from, with all of its shards."
