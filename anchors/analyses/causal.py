"""Patching the label words: in which layers does the prediction take what it needs from them?"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from anchors.errors import AnchorsError
from anchors.study.analysis import Cell, Costs, Record, Sizes

if TYPE_CHECKING:
    from anchors.causal import Contexts
    from anchors.model.language import LanguageModel
    from anchors.tasks.drawing import Drawn
    from anchors.tasks.task import Task


Position = Literal["label", "random", "others"]
POSITIONS: tuple[Position, ...] = get_args(Position)


@dataclass(frozen=True)
class Causal:
    """Exchange the residual stream at the label words just before a layer, and see how far the answer follows.

    Prompt A shows the demonstrations with their labels, B the same with the label words exchanged among the classes;
    only tokens of label words differ. A runs with the stream at some positions, just before layer l, taken from B:

        follow_l = ⟨z_l − z_A, z_B − z_A⟩ / ‖z_B − z_A‖²        z: the label words' logits, centred over the labels

    For the label words follow_0 = 1, because all that differs is exchanged, and follow_n = 0 after the last of n
    layers, because nothing reads them there. The decrease

        released_l = follow_l − follow_{l+1}

    is the share of the effect that leaves the label words in layer l. The shares add up to 1; one is negative where
    what has left and what is still there work against each other. Unlike S_pq of the saliency (2.1) it counts what
    is passed on to any later token, not to the target alone, and only what depends on which label stands where.

    `flipped` says whether the patched prediction is B's: it tells something only where A and B predict differently
    (`differs`). `shift` is ½ Σ |p_l − p_A| over the label probabilities. The method is activation patching (Meng et
    al. 2022, "Locating and Editing Factual Associations in GPT") between two prompts. B's own outcomes stand under
    the condition `exchanged`.

    Attributes:
        layers: before which layers the stream is exchanged, e.g. 0,5,11; default: every `stride`-th.
        stride: patch every so many layers, where none are named.
        positions: `label`: all tokens of the label words; `random`: as many other positions of the demonstrations; `others`:
            all positions of the demonstrations but the label words.

    Example:
        >>> rows = measure(model, Causal(stride=3), task, data, Sample(examples=50), out=Path("results")).rows
        >>> causal_summary(rows)
    """

    kind: ClassVar[str] = "causal"
    version: ClassVar[int] = 2
    fresh: ClassVar[bool] = False

    layers: tuple[int, ...] | None = field(default=None, metadata={"min": 0})
    stride: int = field(default=1, metadata={"min": 1})
    positions: tuple[Position, ...] = ("label", "random")

    def __post_init__(self) -> None:
        if not self.positions or not set(self.positions) <= set(POSITIONS):
            raise AnchorsError(f"Positions are {POSITIONS}; got {self.positions}.", code="unknown-name")
        if self.stride < 1 or (self.layers is not None and (not self.layers or min(self.layers) < 0)):
            raise AnchorsError(
                f"layers = {self.layers}, stride = {self.stride}: at least one layer from 0 on.",
                code="option-value",
            )

    def costs(self, sizes: Sizes) -> Costs:
        chosen = sorted(set(self.layers or range(0, sizes.layers, self.stride)))
        times = 2 + len(self.positions) * len(chosen)
        # Below the patched layer a context is prompt A's own.
        own = sum(sizes.layers - layer for layer in chosen) / sizes.layers
        held = (2 + len(self.positions) * own) * sizes.shared
        return Costs((sizes.asked(times=times),), (sizes.encoded(times),), held)

    def prepare(self, model: "LanguageModel", cell: Cell) -> "Contexts":
        from anchors.causal import Contexts, demand_equal, exchange, places
        from anchors.context import encode, shared_demonstrations
        from anchors.patching import demand_one_stream, patch, streams
        from anchors.streams import Stream, stream
        from anchors.tasks.drawing import demonstrations
        from anchors.tasks.prompts import build, label_tokens

        if cell.how.control == "random-positions":
            raise AnchorsError(
                "The control random-positions does not apply here: the label words themselves are exchanged.",
                "The condition `random` is that control; use the control none.",
                code="options-together",
            )
        chosen = sorted(set(self.layers or range(0, model.n_layers, self.stride)))
        if chosen[-1] >= model.n_layers:
            raise AnchorsError(
                f"{model.name} has no layer {chosen[-1]}; they are 0 to {model.n_layers - 1}.", code="layers"
            )
        prompt = cell.prompts[0].prompt
        ids = shared_demonstrations([d.prompt for d in cell.prompts])
        rng = stream(Stream.EXCHANGED_LABELS, cell.how.seed)
        moved = exchange(cell.task, [len(word) for word in label_tokens(cell.task, model.tokenizer)], rng)
        shown = [replace(e, label=moved[e.label]) for e in demonstrations(cell.task, cell.data, cell.how)]
        query = cell.data.test[cell.prompts[0].example]
        other = build(cell.task, model.tokenizer, shown, query.text, query.label)
        where = places(prompt, other, self.positions, rng)

        with streams(model, chosen) as own_entering:
            own = encode(model, ids)
        with streams(model, chosen) as entering:
            exchanged = encode(model, other.ids[: len(ids)])
        demand_one_stream(model, own_entering, entering)
        del own_entering
        # All contexts of a seed are held at once, because its batches come one after the other. Layers below the
        # patched one are A's own tensors, not copies: half of the memory of one context per layer and condition.
        patched = {
            (condition, layer): patch(model, own, layer, where[condition], entering[layer].stream)
            for condition in self.positions
            for layer in chosen
        }
        if ("label", 0) in patched:
            demand_equal(patched["label", 0], exchanged)
        # After the last layer there is nothing left to exchange: known without a run.
        return Contexts(own, exchanged, patched | {(c, model.n_layers): own for c in self.positions})

    def once(self, model: "LanguageModel", state: "Contexts", cell: Cell) -> list[Record]:
        return []

    def measure(
        self, model: "LanguageModel", state: "Contexts", task: "Task", batch: "Sequence[Drawn]"
    ) -> list[list[Record]]:
        from anchors.causal import by_prompt, label_logits
        from anchors.context import queries
        from anchors.icl import joined, outcomes

        asked = queries([d.prompt for d in batch], len(state.own.ids), model.device)
        own, exchanged = (label_logits(model, c, asked) for c in (state.own, state.exchanged))
        gap = exchanged - own
        size = gap.square().sum(-1)
        before, after = own.softmax(-1), exchanged.softmax(-1)
        differs = before.argmax(-1) != after.argmax(-1)
        parts = [
            outcomes(task, asked, before),
            outcomes(task, asked, after, "exchanged"),
            by_prompt({"differs": differs, "follow_denominator": size}, "none", None),
        ]
        for (condition, layer), context in state.patched.items():
            logits = own if context is state.own else label_logits(model, context, asked)
            numerator = ((logits - own) * gap).sum(-1)
            found = {
                "follow": numerator / size,
                "follow_numerator": numerator,
                "flipped": logits.argmax(-1) == after.argmax(-1),
                "shift": (logits.softmax(-1) - before).abs().sum(-1) / 2,
            }
            parts.append(by_prompt(found, condition, layer))
        return joined(*parts)
