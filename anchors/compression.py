"""Compressing demonstrations into their anchors (3.2): keep the keys and values of label words and format, drop the text."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from anchors.context import Context, answer, encode, queries, shared_demonstrations
from anchors.errors import AnchorsError, nearest
from anchors.icl import compared
from anchors.lengths import Change, demand_one_side
from anchors.models import LanguageModel
from anchors.runner import Cell, Record
from anchors.streams import Stream, stream
from anchors.tasks.drawing import Drawn, demonstrations
from anchors.tasks.prompts import Prompt, build
from anchors.tasks.task import Task

Rule = Literal["after-last-anchor", "restart", "original"]
RULES: tuple[Rule, ...] = ("after-last-anchor", "restart", "original")
"""Where the test input stands: after the last kept position (the reference for GPT-J), at 0 (the reference for
GPT2-XL), or where it stood in the whole prompt. `reference` is the reference's choice for a family like this one."""


def resolve(rule: str, model: LanguageModel) -> Rule:
    """The reference implementation's rule: `restart` with learned absolute positions, else `after-last-anchor`."""
    if rule != "reference":
        return rule  # type: ignore[return-value]
    learned = any(
        isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] in ("wpe", "embed_positions")
        for name, module in model.model.named_modules()
    )
    return "restart" if learned else "after-last-anchor"


METHODS = ("hidden_anchor", "text_anchor", "hidden_random")


def compress(context: Context, tokens: Sequence[int], rule: Rule = "after-last-anchor") -> Context:
    """Keep some tokens' keys and values in every layer; the rule says at which position the test input begins.

    In layers with a sliding window or attention chunks, these count kept tokens.
    """
    if rule not in RULES:
        raise AnchorsError(f"Unknown position rule {rule!r}.", nearest(rule, RULES))
    kept = sorted(set(tokens))
    start = {"restart": 0, "original": context.next}.get(rule)
    if start is None:
        start = context.positions[kept[-1]] + 1 if kept else 0
    return context.keep(kept, start)


def anchor_tokens(prompt: Prompt) -> list[int]:
    """The anchors of a prompt: its label words, with all their tokens, and the format tokens of its demonstrations."""
    return sorted({*_label_tokens(prompt), *_format_tokens(prompt)})


def random_tokens(prompt: Prompt, rng: np.random.Generator) -> list[int]:
    """The anchors, with each token of a label word replaced by a random text token of the same demonstration."""
    chosen = set(_format_tokens(prompt))
    for p in _label_tokens(prompt):
        own = [i for i in range(prompt.query) if prompt.demonstrations[i] == prompt.demonstrations[p]]
        free = [i for i in own if prompt.roles[i] == "text" and i not in chosen]
        if not free:
            raise AnchorsError(
                f"Demonstration {prompt.demonstrations[p] + 1} has fewer text tokens than its label word has tokens.",
                "Leave hidden_random out (--methods), or use longer demonstrations.",
            )
        chosen.add(int(rng.choice(free)))
    return sorted(chosen)


def _format_tokens(prompt: Prompt) -> list[int]:
    return [i for i in range(prompt.query) if prompt.roles[i] == "format"]


def _label_tokens(prompt: Prompt) -> set[int]:
    """The label-word positions and the other tokens of these words (none where a control put them elsewhere)."""
    words = {prompt.demonstrations[p] for p in prompt.label_positions if prompt.roles[p] == "label"}
    rest = {
        i for i in range(prompt.query) if prompt.roles[i] == "label" and prompt.demonstrations[i] in words
    }
    return rest | set(prompt.label_positions)


class AnchorCache(DynamicCache):
    """Compressed demonstrations as a cache for `model.generate`.

    Attributes:
        context: the kept keys and values.
        full_bytes: memory of the whole demonstrations' keys and values.
        changes: of the model; see `anchors.lengths`.
        first_position: what the family calls the position of the first token.

    Raises:
        AnchorsError: when it grows beyond a length at which the family encodes positions otherwise.

    Example:
        >>> cache = AnchorCache.of(lm, prompt)
        >>> lm.model.generate(**cache.inputs(query_ids), max_new_tokens=5)
        >>> cache.saved_bytes
    """

    def __init__(
        self, context: Context, full_bytes: int, changes: tuple[Change, ...] = (), first_position: int = 0
    ) -> None:
        super().__init__()
        self.layers = context.cache().layers
        self.context = context
        self.full_bytes = full_bytes
        self.changes = changes
        self.first_position = first_position

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        reached = self.context.next + keys.shape[-2] - len(self.context.ids)
        demand_one_side(self.changes, [reached], self.context.length)
        return keys, values

    @classmethod
    def of(cls, model: LanguageModel, prompt: Prompt, rule: Rule = "after-last-anchor") -> "AnchorCache":
        """Run the demonstrations of a prompt once and keep their anchors.

        Raises:
            AnchorsError: the family takes no positions, see `LanguageModel.positions`.
        """
        whole = encode(model, prompt.ids[: prompt.query])
        kept = compress(whole, anchor_tokens(prompt), rule)
        model.positions(torch.tensor([prompt.ids[prompt.query :]]), kept)
        return cls(kept, whole.bytes, model.changes, model.first_position or 0)

    @property
    def saved_bytes(self) -> int:
        """Memory that the dropped keys and values would have taken."""
        return self.full_bytes - self.context.bytes

    def inputs(self, query: Sequence[int] | Int[Tensor, " tokens"]) -> dict[str, Any]:
        """What `generate` needs to go on with a query: the kept tokens and the query, at their positions.

        Each call hands out a fresh copy of the cache, so that one AnchorCache serves many queries.
        """
        device = self.context.keys[0].device
        query = [int(i) for i in query]
        positions = [*self.context.positions, *range(self.context.next, self.context.next + len(query))]
        ids = torch.tensor([[*self.context.ids, *query]], device=device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.tensor([positions], device=device) + self.first_position,
            "past_key_values": AnchorCache(self.context, self.full_bytes, self.changes, self.first_position),
        }


def text_anchor(model: LanguageModel, cell: Cell) -> tuple[int, ...]:
    """The tokens of format and label words alone, as text: `Review:\\nSentiment: Positive\\n…`."""
    before, _, _ = cell.task.pieces
    bare = replace(cell.task, template=before.rstrip(" ") + cell.task.template[len(before) :])
    shown = [replace(e, text="") for e in demonstrations(cell.task, cell.data, cell.how)]
    prompt = build(bare, model.tokenizer, shown, "", None)
    return prompt.ids[: prompt.query]


@dataclass(frozen=True)
class Compression:
    """Answer test inputs on compressed demonstrations, and compare with the whole ones.

    The demonstrations are run once; in every layer only the keys and values at the kept tokens remain, and the test
    input attends to these. Methods (section 3.2, Table 2):

    - `hidden_anchor`: label words and format tokens;
    - `text_anchor`: format and label words alone, as text;
    - `hidden_random`: each label word replaced by a random text token of its demonstration, format kept; `draws`
      random choices, of which the summary gives the mean and the best by label loyalty (`hidden_random_top`).

    Attributes:
        methods: which of them.
        rule: where the test input stands, see `RULES`.
        draws: of `hidden_random`.
        top: of how many words word loyalty is taken (the reference: 5 here).
    """

    kind: ClassVar[str] = "compress"
    version: ClassVar[int] = 1
    fresh: ClassVar[bool] = False

    methods: tuple[str, ...] = METHODS
    rule: Rule | Literal["reference"] = "after-last-anchor"
    draws: int = 20
    top: int = 5

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
            )

    @property
    def passes(self) -> float:
        return 1.0 + len(self.methods) + ("hidden_random" in self.methods) * (self.draws - 1)

    def prepare(self, model: LanguageModel, cell: Cell) -> dict[str, Context]:
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

    def once(self, model: LanguageModel, state: dict[str, Context], cell: Cell) -> list[Record]:
        own = [len(d.prompt.ids) - d.prompt.query for d in cell.prompts]
        said = [
            Record("demonstration_tokens", len(state["none"].ids)),
            Record("input_tokens", float(np.mean(own))),
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
        self, model: LanguageModel, state: dict[str, Context], task: Task, batch: Sequence[Drawn]
    ) -> list[list[Record]]:
        return compared(model, state, task, batch, self.top)


@dataclass(frozen=True)
class Speed:
    """Seconds per prompt: vanilla in-context learning on whole prompts, and on the anchors kept once (Table 3).

    Both are batched alike; vanilla shares no cache. Each batch is run `repeats` times by each in turn, and the
    median counts. What happens once per seed (running the demonstrations, keeping their anchors) is not counted.

    Attributes:
        repeats: of each batch.
        rule: see `RULES`.
    """

    kind: ClassVar[str] = "speed"
    version: ClassVar[int] = 2
    fresh: ClassVar[bool] = False
    timed: ClassVar[bool] = True

    repeats: int = 3
    rule: Rule | Literal["reference"] = "after-last-anchor"

    @property
    def passes(self) -> float:
        return 5.0 * self.repeats

    def prepare(self, model: LanguageModel, cell: Cell) -> tuple[Context, Context]:
        whole = encode(model, shared_demonstrations([d.prompt for d in cell.prompts]))
        kept = compress(whole, anchor_tokens(cell.prompts[0].prompt), resolve(self.rule, model))
        for run in self._sides((whole, kept), cell.prompts[:2], model):
            run()
        return whole, kept

    def once(self, model: LanguageModel, state: tuple[Context, Context], cell: Cell) -> list[Record]:
        whole, kept = state
        own = [len(d.prompt.ids) - d.prompt.query for d in cell.prompts]
        return [
            Record("demonstration_tokens", len(whole.ids)),
            Record("input_tokens", float(np.mean(own))),
            Record("kept_tokens", len(kept.ids)),
        ]

    def measure(
        self, model: LanguageModel, state: tuple[Context, Context], task: Task, batch: Sequence[Drawn]
    ) -> list[list[Record]]:
        sides = self._sides(state, batch, model)
        taken = np.array([[seconds(run, model) for run in sides] for _ in range(self.repeats)])
        vanilla, compressed = np.median(taken, 0) / len(batch)
        # Prompts of a batch share one measurement: the summary draws batches, not prompts.
        name = Record("batch", batch[0].example)
        return [
            [Record("seconds", vanilla), Record("seconds", compressed, "hidden_anchor"), name] for _ in batch
        ]

    def _sides(
        self, state: tuple[Context, Context], batch: Sequence[Drawn], model: LanguageModel
    ) -> tuple[Callable[[], object], Callable[[], object]]:
        whole, kept = state
        prompts = [d.prompt for d in batch]
        entire = queries(prompts, 0, model.device)
        rest = queries(prompts, len(whole.ids), model.device)
        return lambda: answer(model, None, entire), lambda: answer(model, kept, rest)


def seconds(run: Callable[[], object], model: LanguageModel) -> float:
    """Wall-clock seconds of a call, the device's queue included."""
    start = time.perf_counter()
    run()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start
