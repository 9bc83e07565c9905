"""Which prompts are asked: the protocol by which demonstrations and queries are drawn, and its controls."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from anchors.errors import AnchorsError, demand_seed, nearest
from anchors.streams import Stream, stream
from anchors.tasks.data import Data, Example
from anchors.tasks.prompts import Piece, Prompt, label_tokens, pieces, tokenise_all
from anchors.tasks.task import CONTROLS, Control, Task


@dataclass(frozen=True)
class Draw:
    """The protocol by which prompts are drawn from data.

    Attributes:
        shots: demonstrations per class.
        seed: of everything random.
        fresh: draw new demonstrations for every query (2.1), instead of one set per seed (all other analyses). Another
            query may show the same ones again; no prompt shows one twice.
        control: `random-positions` puts random other tokens of the demonstrations in the place of the label words,
            as many; `permuted-labels` shows every class under the label word of another one; `order-only` shows the same
            demonstrations to every seed, each seed in an order of its own.
    """

    shots: int = 1
    seed: int = 42
    fresh: bool = True
    control: Control = "none"

    def __post_init__(self) -> None:
        if self.control not in CONTROLS:
            raise AnchorsError(
                f"Unknown control {self.control!r}.", nearest(self.control, CONTROLS), code="unknown-name"
            )
        if self.shots < 1:
            raise AnchorsError(f"shots = {self.shots}: it must be at least 1.", code="option-value")
        demand_seed(self.seed)


@dataclass(frozen=True)
class Drawn:
    """One drawn prompt: which test example it asks about, and the demonstrations it shows."""

    example: int
    prompt: Prompt


def draw(
    task: Task,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    how: Draw,
    examples: int,
    *,
    context: int | None = None,
) -> list[Drawn]:
    """The first `examples` prompts of a seed's endless, reproducible list.

    Prompt i depends on the seed and on i alone, so that asking for more keeps the earlier ones. Queries come in a
    seeded random order of the test set; the order of the demonstrations is random in every prompt. No prompt shows
    its own query as a demonstration, nor a text under two labels.

    Raises:
        AnchorsError: too few examples; more demonstrations than tokens in the model's `context`, if given, which is
            known before any of them is tokenised; see also `tokenise`.
    """
    if examples < 1:
        raise AnchorsError(f"examples = {examples}: it must be at least 1.", code="option-value")
    if context is not None and how.shots * len(task.labels) >= context:
        raise AnchorsError(
            f"{how.shots * len(task.labels)} demonstrations do not fit into the model's context of {context} tokens.",
            "Use fewer --shots.",
            code="length",
        )
    words = label_tokens(task, tokenizer)
    order = stream(Stream.QUERIES, how.seed).permutation(len(data.test))
    chosen = [int(index) for index in order[:examples]]
    asked: list[tuple[list[Piece], int | None]] = []
    shown: list[Example] = []
    for number, index in enumerate(chosen):
        query = data.test[index]
        if how.fresh or not asked:
            shown = demonstrations(task, data, how, number, query.text)
        asked.append((pieces(task, shown, query.text, tokenizer), query.label))
    prompts = tokenise_all(asked, task, tokenizer, words)
    if how.control == "random-positions":
        for number, prompt in enumerate(prompts):
            rng = stream(Stream.CONTROL_POSITIONS, how.seed, number if how.fresh else 0)
            prompts[number] = replace(prompt, label_positions=random_positions(prompt, rng))
    return [Drawn(index, prompt) for index, prompt in zip(chosen, prompts, strict=True)]


def demonstrations(
    task: Task, data: Data, how: Draw, number: int = 0, query: str | None = None
) -> list[Example]:
    """What prompt `number` of a seed shows, in order; the same for all of them unless `how.fresh`.

    Left out are texts that training examples hold under two labels, and the text that is asked about: with fresh
    demonstrations that of `query`, with shared ones every text of the test part, so that asking more moves nothing.
    """
    asked = data.repeated & {query} if how.fresh else data.repeated
    by_class = [data.train_by_class.get(c, []) for c in range(len(task.labels))]
    if asked:
        by_class = [[e for e in pool if e.text not in asked] for pool in by_class]
    if few := [task.labels[c] for c, pool in enumerate(by_class) if len(pool) < how.shots]:
        why = " that are neither asked about nor stand under two labels" if data.left_out else ""
        raise AnchorsError(
            f"Fewer than {how.shots} training examples for {few}{why}.",
            "Ask for fewer shots." if how.shots > 1 else "Add examples.",
            code="too-few",
        )
    rng = stream(Stream.DEMONSTRATIONS, how.seed, number if how.fresh else 0)
    texts = rng if how.control != "order-only" else stream(Stream.ONE_SET, 0)
    shown = [pool[i] for pool in by_class for i in _different(len(pool), how, texts)]
    shown = [shown[i] for i in rng.permutation(len(shown))]
    if how.control == "permuted-labels":
        moved = derangement(len(task.labels), rng)
        shown = [replace(e, label=moved[e.label]) for e in shown]
    return shown


def _different(count: int, how: Draw, rng: np.random.Generator) -> list[int]:
    """As many different places as there are shots, every choice alike.

    Fresh demonstrations are drawn with replacement first: a draw that repeats none is as good as one without replacement,
    and prompts stay what they were before repetitions were refused.
    """
    found = rng.choice(count, how.shots, replace=how.fresh)
    if len(set(found.tolist())) < how.shots:
        found = rng.choice(count, how.shots, replace=False)
    return [int(i) for i in found]


def derangement(count: int, rng: np.random.Generator) -> list[int]:
    """A random permutation that leaves nothing in its place."""
    while True:
        order = rng.permutation(count)
        if (order != np.arange(count)).all():
            return [int(i) for i in order]


def random_positions(prompt: Prompt, rng: np.random.Generator) -> tuple[int, ...]:
    """As many random positions of the demonstrations as the prompt has label-word positions, none of them a label.

    Position 0 is left out: it sees nothing but itself, so that nothing can be isolated there.
    """
    free = [i for i in range(1, prompt.query) if prompt.roles[i] != "label"]
    if len(free) < len(prompt.label_positions):
        raise AnchorsError(
            f"The demonstrations have {len(free)} tokens beside {len(prompt.label_positions)} label-word positions.",
            "They are too short for random positions as a control.",
            code="too-few",
        )
    return tuple(sorted(int(i) for i in rng.choice(free, len(prompt.label_positions), replace=False)))


def within_context(
    drawn: Sequence[Drawn], context: int | None, *, skip: bool = False
) -> tuple[list[Drawn], int]:
    """Refuse prompts longer than the model's context, or leave them out and count them.

    Returns:
        The prompts that fit, and the number left out.

    Raises:
        AnchorsError: a prompt is too long and `skip` is off.
    """
    if context is None:
        return list(drawn), 0
    fitting = [d for d in drawn if len(d.prompt.ids) <= context]
    if len(fitting) < len(drawn) and not skip:
        longest = max(drawn, key=lambda d: len(d.prompt.ids))
        said = (
            f"{len(drawn) - len(fitting)} of {len(drawn)} prompts are longer than the model's context of {context} "
            f"tokens; the longest "
        )
        if not longest.prompt.label_positions:
            raise AnchorsError(
                f"{said}has {len(longest.prompt.ids)} tokens.",
                "Shorten it, or leave such prompts of a file out with --skip-too-long.",
                code="length",
            )
        number, tokens = _longest_demonstration(longest.prompt)
        raise AnchorsError(
            f"{said}(test example {longest.example}) has {len(longest.prompt.ids)} tokens, "
            f"{tokens} of them in its demonstration number {number}.",
            "Use fewer --shots, or --skip-too-long to leave such examples out.",
            code="length",
        )
    return fitting, len(drawn) - len(fitting)


def _longest_demonstration(prompt: Prompt) -> tuple[int, int]:
    ends = [-1, *prompt.label_positions]
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    return longest + 1, lengths[longest]
