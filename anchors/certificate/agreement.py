"""A model on the seam against its witness (`anchors.model.witness`), on the prompts of a run and at the lengths that matter."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anchors.model.language import LanguageModel
from anchors.model.lengths import Change, alike, changes, side
from anchors.model.witness import EAGER_BYTES, ROWS, TOLERANCE, Witness, apart
from anchors.tasks.prompts import Prompt

SECONDS = 60.0
"""Time that the witness may take for one prompt that no run has asked for."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        name: what.
        ok: whether it holds; None where it was not asked, and `detail` says why.
        detail: the number it rests on, or what went wrong.
    """

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True)
class Asked:
    """What the witness says on two prompts of a run, each asked alone.

    Attributes:
        long: the longest prompt, or as much of its beginning as is affordable.
        short: the shortest one that may share a batch with it.
        own, few: the witness's logits on these.
        seconds: that `own` took.
    """

    long: tuple[int, ...]
    short: tuple[int, ...]
    own: Float[Tensor, "long vocabulary"]
    few: Float[Tensor, "short vocabulary"]
    seconds: float


def ask(model: LanguageModel, prompts: Sequence[Prompt]) -> Asked:
    """Ask the witness on the longest and on the shortest prompt.

    Raises:
        AnchorsError: the model by itself does not run.
    """
    rows = [prompt.ids for prompt in prompts]
    long = affordable(model.witness, max(rows, key=len))
    short = _shorter(rows, long, changes(model.model.config))
    start = time.perf_counter()
    own = model.witness.logits(_padded([long], model))[0]
    seconds = time.perf_counter() - start
    return Asked(long, short, own, model.witness.logits(_padded([short], model))[0], seconds)


def agreement(
    model: LanguageModel, prompts: Sequence[Prompt], *, quick: bool, asked: Asked | None = None
) -> Iterator[Finding]:
    """The findings of a model against its witness.

    The witness is asked on the longest prompt and on the shortest one, each alone, and on one of them with other tokens at
    the end (the shortest in the quick form: attention changes at no length between them); the model on both in one batch,
    padded in our way and without a mask.

    Args:
        model: on the seam.
        prompts: those of the run.
        quick: of the lengths at which attention changes, only those that the prompts reach.
        asked: what the witness said on them, where that is known (`ask`).

    Raises:
        AnchorsError: the model by itself does not run.
    """
    allowed = TOLERANCE[model.precision]
    yield _came_back(model)
    asked = ask(model, prompts) if asked is None else asked
    row = max((prompt.ids for prompt in prompts), key=len)
    long, short, own, few = asked.long, asked.short, asked.own, asked.few
    ours = _routed(model, _padded([short, long], model))
    yield _causal(model, *((short, few) if quick else (long, own)), quick=quick)
    error = apart(ours[1], own)
    yield Finding(
        "logits are the model's own", error <= allowed, _said(len(long), error, cut=len(long) < len(row))
    )
    if len(long) < len(row):
        yield beside_witness(model, "… on the longest prompt", row)
    error = apart(ours[0, : len(short)], few)
    lengths = f"{len(short)} beside {len(long)} tokens, padded"
    yield Finding("… in one batch", error <= allowed, f"{lengths}: relative difference {error:.1e}")
    yield positions(model)
    pace = asked.seconds / _work(model, len(long))
    for change in changes(model.model.config):
        if quick and change.length < len(row):
            yield beside_witness(model, _side(change), row[: change.length])
        elif not quick:
            yield from _both_sides(model, change, row, pace)


def _causal(
    model: LanguageModel,
    row: tuple[int, ...],
    own: Float[Tensor, "tokens vocabulary"],
    *,
    quick: bool,
) -> Finding:
    """Whether tokens move earlier logits of the witness: the last one of a prompt's first half, with nothing behind it, and
    in the full form the last one of all. Some families see ahead only within the first half."""
    found = changes(model.model.config)
    half = max(2, len(row) // 2)
    ends = [half] if alike(found, half) == alike(found, len(row)) else []
    ends += [len(row)] if not (quick and ends) else []
    moved = 0.0
    for end in ends:
        other = model.witness.logits(_padded([_another_last(row[:end])], model))[0]
        moved = max(moved, apart(other[: end - 1], own[: end - 1]))
    said = f"other tokens from {' and '.join(map(str, ends))} on move earlier logits by {moved:.1e} of their size"
    return Finding("the model by itself is causal", moved <= TOLERANCE[model.precision], said)


def _said(tokens: int, error: float, cut: bool = False, rows: int | None = None) -> str:
    some = f", its last {rows} rows" if rows is not None and rows < tokens else ""
    start = " (the beginning of the longest prompt)" if cut else ""
    return f"{tokens} tokens{start}{some}: relative difference {error:.1e}"


def _side(change: Change) -> str:
    return f"… below {change.length} tokens ({change.what})"


def _came_back(model: LanguageModel) -> Finding:
    """What the witness says now is what it said before anything was done to the model, to the bit."""
    name, witness = "the witness is the model as it came", model.witness
    now = witness.logits(witness.ids)
    if torch.equal(now, witness.said):
        return Finding(name, True, "the same bits as before it was put on the seam")
    error = apart(now, witness.said)
    # Kernels of other devices add in any order.
    ok = model.device.type != "cpu" and error <= TOLERANCE[model.precision]
    return Finding(name, ok, f"relative difference {error:.1e} to before it was put on the seam")


def positions(model: LanguageModel) -> Finding:
    """How the family counts positions, and whether it lets one set them."""
    if model.first_position is None:
        said = "by the family itself: forward() takes no others, so that demonstrations cannot be cut"
    else:
        said = f"counted from {model.first_position}, as the family does"
    return Finding("positions", True, said)


def beside_witness(model: LanguageModel, name: str, row: Sequence[int]) -> Finding:
    """One prompt; where the witness's attention matrices would be too large, its last rows."""
    own = last_rows(model, row)
    if isinstance(own, str):
        return Finding(name, None, f"not asked: {own}")
    columns = torch.arange(len(row) - len(own), len(row), device=model.device)
    error = apart(_routed(model, _padded([row], model), columns)[0], own)
    return Finding(name, error <= TOLERANCE[model.precision], _said(len(row), error, rows=len(own)))


def last_rows(model: LanguageModel, row: Sequence[int]) -> Float[Tensor, "rows vocabulary"] | str:
    """The witness's logits of a prompt: all rows, the last `ROWS` where its attention matrices would be too large, or why
    even these cannot be asked."""
    witness, ids = model.witness, _padded([row], model)
    if len(affordable(witness, row)) == len(row):
        return witness.logits(ids)[0]
    if crossed := [c for c in changes(model.model.config) if c.rotary and _cut_by(c, len(row))]:
        return f"{len(row)} tokens at once are too many, and {crossed[0].what} allows no cut before the last"
    if not model.carries:
        return f"{len(row)} tokens at once are too many, and the cache of {model.name} does not go on from its recurrent state"
    return witness.last_logits(ids, model.first_position)[0]


def _cut_by(change: Change, length: int) -> bool:
    """Whether a prompt's beginning, run without its last rows, would have its positions encoded otherwise."""
    return length > change.length and (change.each or length - ROWS <= change.length)


def _both_sides(model: LanguageModel, change: Change, row: Sequence[int], pace: float) -> Iterator[Finding]:
    """The longest prompt before a change, and one well beyond it, made of a run's prompt over and over."""
    beyond = change.length + max(ROWS + 1, change.length // 8)
    end = model.context or beyond
    names = _side(change), f"… beyond {change.length} tokens ({change.what})"
    for name, length, least in zip(
        names, (change.length, min(beyond, end)), (1, change.length + 1), strict=True
    ):
        seconds = pace * _work(model, length)
        if not least <= length <= end:
            yield Finding(name, None, f"not asked: the model's context ends at {end} tokens")
        elif seconds > SECONDS:
            yield Finding(
                name, None, f"not asked: {length} tokens would take the witness about {seconds:.0f} s"
            )
        else:
            yield beside_witness(model, name, (tuple(row) * (length // len(row) + 1))[:length])


def affordable(witness: Witness, row: Sequence[int]) -> tuple[int, ...]:
    """The beginning of a prompt on which the witness's attention matrices fit into `EAGER_BYTES`: as a rule all of it."""
    length = len(row)
    while length > ROWS and 2 * witness.bytes(length) > EAGER_BYTES:
        length = length * 7 // 8
    return tuple(row[:length])


def _work(model: LanguageModel, tokens: int) -> float:
    """Multiplications of a prompt in eager attention, up to a factor."""
    width = model.model.config.get_text_config().hidden_size
    return tokens * (model.model.num_parameters() + 2.0 * tokens * width * model.n_layers)


def _shorter(
    rows: Sequence[tuple[int, ...]], long: tuple[int, ...], found: tuple[Change, ...]
) -> tuple[int, ...]:
    """The shortest prompt that may share a batch with `long`; of prompts of one length, a part."""
    alike = [row for row in rows if len(row) < len(long) and side(found, len(row)) == side(found, len(long))]
    if alike:
        return min(alike, key=len)
    half = long[: max(2, len(long) // 2)]  # whose first token sees nothing of another last one
    return half if side(found, len(half)) == side(found, len(long)) else long


def _another_last(row: tuple[int, ...]) -> tuple[int, ...]:
    return (*row[:-1], next((i for i in row if i != row[-1]), int(row[-1] == 0)))


def _padded(rows: Sequence[Sequence[int]], model: LanguageModel) -> Int[Tensor, "batch tokens"]:
    """Padded in the way of every analysis: the last token again and again."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=model.device)


@torch.no_grad()
def _routed(
    model: LanguageModel, ids: Int[Tensor, "batch tokens"], columns: Int[Tensor, " columns"] | None = None
) -> Float[Tensor, "batch columns vocabulary"]:
    return model.logits(ids, columns)
