"""Compressing demonstrations into their anchors (3.2): loyalties and accuracy, and the speed-up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from anchors.errors import AnchorsError
from anchors.rules import RULES, Rule
from anchors.study.analysis import Cell, Costs, Pass, Record, Sizes

if TYPE_CHECKING:
    from anchors.context import Context
    from anchors.model.language import LanguageModel
    from anchors.tasks.drawing import Drawn
    from anchors.tasks.task import Task


Method = Literal["hidden_anchor", "text_anchor", "hidden_random"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Compression:
    """Answer test inputs on compressed demonstrations, and compare with the whole ones.

    The demonstrations are run once; in every layer only the keys and values at the kept tokens remain, and the test
    input attends to these. In Python, `anchors.compression.AnchorCache` gives such a cache to `model.generate`. Methods
    (section 3.2, Table 2):

    - `hidden_anchor`: label words and format tokens;
    - `text_anchor`: format and label words alone, as text;
    - `hidden_random`: each label word replaced by a random text token of its demonstration, format kept; `draws`
      random choices, of which the summary gives the mean and the best by label loyalty (`hidden_random_top`).

    Attributes:
        methods: `hidden_anchor`, `text_anchor`, `hidden_random`, with commas.
        rule: where the test input stands: `after-last-anchor`, `restart` (at 0), `original`, or `reference` (the authors' choice
            for a family like this).
        draws: random choices of `hidden_random`.
        top: words that word loyalty compares (the reference: 5 here).
    """

    kind: ClassVar[str] = "compress"
    version: ClassVar[int] = 1
    fresh: ClassVar[bool] = False

    methods: tuple[Method, ...] = METHODS
    rule: Rule | Literal["reference"] = field(
        default="after-last-anchor", metadata={"option": ("--positions",)}
    )
    draws: int = field(default=20, metadata={"min": 1})
    top: int = field(default=5, metadata={"min": 1})

    def __post_init__(self) -> None:
        unknown = set(self.methods) - set(METHODS)
        if (
            unknown
            or not self.methods
            or self.draws < 1
            or self.top < 1
            or self.rule not in (*RULES, "reference")
        ):
            raise AnchorsError(
                f"Methods {self.methods}, rule {self.rule!r}, draws {self.draws}, top {self.top} cannot be used.",
                f"Methods are {', '.join(METHODS)}; rules {', '.join((*RULES, 'reference'))}; numbers at least 1.",
                code="option-value",
            )

    def costs(self, sizes: Sizes) -> Costs:
        compressed = len(self.methods) + ("hidden_random" in self.methods) * (self.draws - 1)
        text = (Pass(sizes.anchors, kept=True),) if "text_anchor" in self.methods else ()
        return Costs(
            (sizes.asked(), sizes.asked(sizes.anchors, times=compressed)),
            (sizes.encoded(), *text),
            sizes.shared + compressed * sizes.anchors,
        )

    def prepare(self, model: "LanguageModel", cell: Cell) -> "dict[str, Context]":
        from anchors.compression import anchor_tokens, compress, random_tokens, resolve, text_anchor
        from anchors.context import encode, shared_demonstrations
        from anchors.streams import Stream, stream

        prompt = cell.prompts[0].prompt
        whole = encode(model, shared_demonstrations([d.prompt for d in cell.prompts]))
        rule = resolve(self.rule, model)
        contexts = {"none": whole}
        if "hidden_anchor" in self.methods:
            contexts["hidden_anchor"] = compress(whole, anchor_tokens(prompt), rule)
        if "text_anchor" in self.methods:
            contexts["text_anchor"] = encode(model, text_anchor(model, cell))
        if "hidden_random" in self.methods:
            for draw in range(self.draws):
                rng = stream(Stream.KEPT_TOKENS, cell.how.seed, draw)
                contexts[f"hidden_random/{draw:02}"] = compress(whole, random_tokens(prompt, rng), rule)
        return contexts

    def once(self, model: "LanguageModel", state: "dict[str, Context]", cell: Cell) -> list[Record]:
        own = [len(d.prompt.ids) - d.prompt.query for d in cell.prompts]
        said = [
            Record("demonstration_tokens", len(state["none"].ids)),
            Record("input_tokens", sum(own) / len(own)),
            Record("cache_bytes", state["none"].bytes),
        ]
        for name, context in state.items():
            if name in METHODS:
                said += [
                    Record("kept_tokens", len(context.ids), name),
                    Record("cache_bytes", context.bytes, name),
                ]
        return said

    def measure(
        self, model: "LanguageModel", state: "dict[str, Context]", task: "Task", batch: "Sequence[Drawn]"
    ) -> list[list[Record]]:
        from anchors.icl import compared

        return compared(model, state, task, batch, self.top)


@dataclass(frozen=True)
class Speed:
    """Seconds per prompt: vanilla in-context learning on whole prompts, on the anchors kept once (Table 3), and on the whole
    demonstrations kept once (`whole_cached`: the same answers as vanilla, and what compression has to be weighed against).

    All are batched alike; vanilla shares no cache. Each batch is run `repeats` times by each in turn, and the
    median counts. What happens once per seed (running the demonstrations, keeping their anchors) is not counted.

    Attributes:
        repeats: of each batch.
        rule: see `RULES`.
    """

    kind: ClassVar[str] = "speed"
    version: ClassVar[int] = 3
    fresh: ClassVar[bool] = False
    timed: ClassVar[bool] = True

    repeats: int = 3
    rule: Rule | Literal["reference"] = "after-last-anchor"

    def costs(self, sizes: Sizes) -> Costs:
        whole = Pass(sizes.shared + sizes.tokens, 0, sizes.rows, self.repeats, columns=sizes.columns)
        asked = (sizes.asked(past, times=self.repeats) for past in (sizes.anchors, sizes.shared))
        return Costs((whole, *asked), (sizes.encoded(), whole._replace(rows=2)), sizes.shared + sizes.anchors)

    def prepare(self, model: "LanguageModel", cell: Cell) -> "tuple[Context, Context]":
        from anchors.compression import anchor_tokens, compress, resolve
        from anchors.context import encode, shared_demonstrations

        whole = encode(model, shared_demonstrations([d.prompt for d in cell.prompts]))
        kept = compress(whole, anchor_tokens(cell.prompts[0].prompt), resolve(self.rule, model))
        for run in self._sides((whole, kept), cell.prompts[:2], model):
            run()
        return whole, kept

    def once(self, model: "LanguageModel", state: "tuple[Context, Context]", cell: Cell) -> list[Record]:
        whole, kept = state
        own = [len(d.prompt.ids) - d.prompt.query for d in cell.prompts]
        return [
            Record("demonstration_tokens", len(whole.ids)),
            Record("input_tokens", sum(own) / len(own)),
            Record("kept_tokens", len(kept.ids)),
        ]

    def measure(
        self, model: "LanguageModel", state: "tuple[Context, Context]", task: "Task", batch: "Sequence[Drawn]"
    ) -> list[list[Record]]:
        import numpy as np

        from anchors.model.routed import seconds

        sides = self._sides(state, batch, model)
        taken = np.array([[seconds(run, model) for run in sides] for _ in range(self.repeats)])
        vanilla, *faster = np.median(taken, 0) / len(batch)
        kept = [
            Record("seconds", s, c) for s, c in zip(faster, ("hidden_anchor", "whole_cached"), strict=True)
        ]
        # Prompts of a batch share one measurement: the summary draws batches, not prompts.
        name = Record("batch", batch[0].example)
        return [[Record("seconds", vanilla), *kept, name] for _ in batch]

    def _sides(
        self, state: "tuple[Context, Context]", batch: "Sequence[Drawn]", model: "LanguageModel"
    ) -> tuple[Callable[[], object], ...]:
        from anchors.context import answer, queries

        whole, kept = state
        prompts = [d.prompt for d in batch]
        entire = queries(prompts, 0, model.device)
        rest = queries(prompts, len(whole.ids), model.device)
        return (
            lambda: answer(model, None, entire),
            lambda: answer(model, kept, rest),
            lambda: answer(model, whole, rest),
        )
