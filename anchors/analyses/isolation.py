"""Isolating the label words (2.2): do shallow layers gather the demonstrations there?"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from anchors.errors import AnchorsError
from anchors.study.analysis import Cell, Costs, Record, Sizes

if TYPE_CHECKING:
    from anchors.context import Context
    from anchors.model.language import LanguageModel
    from anchors.tasks.drawing import Drawn
    from anchors.tasks.task import Task


Side = Literal["first", "last"]
Target = Literal["label", "random"]
SIDES: tuple[Side, ...] = get_args(Side)


TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True)
class Isolation:
    """Cut the label words off from what stands before them, in some layers, and see what changes.

        A_l(p, i) = 0 for i < p, before the softmax, at every label-word position p, in the first or last k layers

    so that the label word sees only itself there. Metrics against the untouched run on the same prompt: label
    loyalty (share of unchanged predictions) and word loyalty (mean Jaccard similarity of the top words). If label
    words gather their demonstrations in shallow layers, isolating them in the first layers must hurt, in the last
    layers not, and isolating as many random other positions must hurt less (section 2.2, Figure 4).

    Attributes:
        layers: how many layers, k, e.g. 5 or 1,3,5,7.
        sides: which of them: `first`, `last` or both.
        positions: `label`: the label words; `random`: as many other positions of the demonstrations.
        top: words that word loyalty compares (the reference: 10 here).
    """

    kind: ClassVar[str] = "isolate"
    version: ClassVar[int] = 1
    fresh: ClassVar[bool] = False

    layers: tuple[int, ...] = field(default=(5,), metadata={"option": ("--layers", "-k"), "min": 1})
    sides: tuple[Side, ...] = SIDES
    positions: tuple[Target, ...] = TARGETS
    top: int = field(default=10, metadata={"min": 1})

    def __post_init__(self) -> None:
        if not set(self.sides) <= set(SIDES) or not set(self.positions) <= set(TARGETS):
            raise AnchorsError(
                f"Sides are {SIDES}, positions {TARGETS}; got {self.sides}, {self.positions}.",
                code="unknown-name",
            )
        if not self.sides or not self.positions:
            raise AnchorsError(
                f"No sides or no positions are to be isolated: {self.sides}, {self.positions}.",
                f"Sides are {', '.join(SIDES)}; positions {', '.join(TARGETS)}.",
                code="option-value",
            )
        if not self.layers or min(self.layers) < 1 or self.top < 1:
            raise AnchorsError(
                f"layers = {self.layers}, top = {self.top}: each must be at least 1.", code="option-value"
            )

    def costs(self, sizes: Sizes) -> Costs:
        each = len(self.sides) * len(self.positions)
        contexts = 1 + each * len(self.layers)
        edited = (sizes.encoded(each, edited=k) for k in self.layers)
        return Costs((sizes.asked(times=contexts),), (sizes.encoded(), *edited), contexts * sizes.shared)

    def prepare(self, model: "LanguageModel", cell: Cell) -> "dict[str, Context]":
        return isolated_contexts(model, cell, self)

    def once(self, model: "LanguageModel", state: "dict[str, Context]", cell: Cell) -> list[Record]:
        return []

    def measure(
        self, model: "LanguageModel", state: "dict[str, Context]", task: "Task", batch: "Sequence[Drawn]"
    ) -> list[list[Record]]:
        from anchors.icl import compared

        return compared(model, state, task, batch, self.top)


def isolated_contexts(model: "LanguageModel", cell: Cell, how: Isolation) -> "dict[str, Context]":
    """The demonstrations of a seed run once untouched (`none`) and once under each condition."""
    import torch

    from anchors.attention.edits import isolate
    from anchors.attention.layers import ranges
    from anchors.attention.seam import seam
    from anchors.context import encode, shared_demonstrations
    from anchors.streams import Stream, stream
    from anchors.tasks.drawing import random_positions

    prompt = cell.prompts[0].prompt
    ids = shared_demonstrations([d.prompt for d in cell.prompts])
    rng = stream(Stream.ISOLATED_POSITIONS, cell.how.seed)
    where = {"label": prompt.label_positions, "random": random_positions(prompt, rng)}
    contexts = {"none": encode(model, ids)}
    for k in how.layers:
        if k > model.n_layers:
            raise AnchorsError(
                f"{k} layers cannot be isolated: {model.name} has {model.n_layers}.",
                "Use a smaller k.",
                code="layers",
            )
        for side in how.sides:
            span = range(k) if side == "first" else range(model.n_layers - k, model.n_layers)
            chosen = [layer for layer in model.layers if layer in span]
            if not chosen:
                raise AnchorsError(
                    f"None of the {side} {k} layers of {model.name} attends: there is nothing to isolate in them.",
                    f"Attention stands in the layers {ranges(model.layers)} of {model.n_layers}: use a larger k.",
                    code="layers",
                )
            for target in how.positions:
                name = f"{side}-{k}/{target}"
                edit = isolate(chosen, torch.tensor([where[target]], device=model.device), name)
                with seam(model.modules, edits=[edit]):
                    contexts[name] = encode(model, ids)
    return contexts


@dataclass(frozen=True)
class TopWords:
    """The most probable next words with and without isolated label words, one prompt at a time (Table 5).

    Attributes:
        isolation: conditions.
        top: how many words.
    """

    kind: ClassVar[str] = "words"
    version: ClassVar[int] = 1
    fresh: ClassVar[bool] = False

    isolation: Isolation = Isolation(sides=("first",))
    top: int = 5

    def costs(self, sizes: Sizes) -> Costs:
        return self.isolation.costs(sizes)

    def prepare(self, model: "LanguageModel", cell: Cell) -> "tuple[dict[str, Context], Any]":
        return isolated_contexts(model, cell, self.isolation), model.tokenizer

    def once(self, model: "LanguageModel", state: tuple, cell: Cell) -> list[Record]:
        return []

    def measure(
        self, model: "LanguageModel", state: tuple, task: "Task", batch: "Sequence[Drawn]"
    ) -> list[list[Record]]:
        from anchors.context import answer, queries
        from anchors.icl import best_words, joined

        contexts, tokenizer = state
        asked = queries([d.prompt for d in batch], len(contexts["none"].ids), model.device)
        parts = []
        for name, context in contexts.items():
            best = best_words(answer(model, context, asked).softmax(-1), self.top)
            parts.append(
                [
                    [
                        Record(f"word/{rank}/{tokenizer.decode([word])}", value, name)
                        for rank, (word, value) in enumerate(zip(words, values, strict=True), start=1)
                    ]
                    for words, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                ]
            )
        return joined(*parts)
