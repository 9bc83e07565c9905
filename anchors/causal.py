"""Patching the label words: in which layers does the prediction take what it needs from them?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from anchors.context import Context, Queries, answer, encode, queries, shared_demonstrations
from anchors.errors import AnchorsError, CertificateError
from anchors.icl import joined, outcomes
from anchors.models import LanguageModel
from anchors.patching import demand_one_stream, patch, streams
from anchors.runner import Cell, Record
from anchors.streams import Stream, stream
from anchors.tasks.drawing import Drawn, demonstrations, derangement, random_positions
from anchors.tasks.prompts import Prompt, build, label_tokens
from anchors.tasks.task import Task

POSITIONS = ("label", "random", "others")


@dataclass(frozen=True)
class Contexts:
    """What the queries of a seed are answered on.

    Attributes:
        own: the demonstrations with their labels, prompt A.
        exchanged: the same with exchanged label words, prompt B.
        patched: by condition and layer, A with B's residual stream put in there.
    """

    own: Context
    exchanged: Context
    patched: dict[tuple[str, int], Context]


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
        layers: before which layers the stream is exchanged; None for every `stride`-th.
        stride: used with layers = None.
        positions: `label`, all tokens of the label words; `random`, as many other positions of the demonstrations;
            `others`, all positions of the demonstrations but the label words.

    Example:
        >>> rows = measure(model, Causal(stride=3), task, data, Sample(examples=50), out=Path("results")).rows
        >>> causal_summary(rows)
    """

    kind: ClassVar[str] = "causal"
    version: ClassVar[int] = 2
    fresh: ClassVar[bool] = False

    layers: tuple[int, ...] | None = None
    stride: int = 1
    positions: tuple[str, ...] = ("label", "random")

    def __post_init__(self) -> None:
        if not self.positions or not set(self.positions) <= set(POSITIONS):
            raise AnchorsError(f"Positions are {POSITIONS}; got {self.positions}.")
        if self.stride < 1 or (self.layers is not None and (not self.layers or min(self.layers) < 0)):
            raise AnchorsError(
                f"layers = {self.layers}, stride = {self.stride}: at least one layer from 0 on."
            )

    @property
    def passes(self) -> float:
        return 2.0 + 20 / self.stride * len(self.positions)

    def prepare(self, model: LanguageModel, cell: Cell) -> Contexts:
        if cell.how.control == "random-positions":
            raise AnchorsError(
                "The control random-positions does not apply here: the label words themselves are exchanged.",
                "The condition `random` is that control; use the control none.",
            )
        chosen = sorted(set(self.layers or range(0, model.n_layers, self.stride)))
        if chosen[-1] >= model.n_layers:
            raise AnchorsError(f"{model.name} has no layer {chosen[-1]}; they are 0 to {model.n_layers - 1}.")
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
            _demand_equal(patched["label", 0], exchanged)
        # After the last layer there is nothing left to exchange: known without a run.
        return Contexts(own, exchanged, patched | {(c, model.n_layers): own for c in self.positions})

    def once(self, model: LanguageModel, state: Contexts, cell: Cell) -> list[Record]:
        return []

    def measure(
        self, model: LanguageModel, state: Contexts, task: Task, batch: Sequence[Drawn]
    ) -> list[list[Record]]:
        asked = queries([d.prompt for d in batch], len(state.own.ids), model.device)
        own, exchanged = (_label_logits(model, c, asked) for c in (state.own, state.exchanged))
        gap = exchanged - own
        size = gap.square().sum(-1)
        before, after = own.softmax(-1), exchanged.softmax(-1)
        differs = before.argmax(-1) != after.argmax(-1)
        parts = [
            outcomes(task, asked, before),
            outcomes(task, asked, after, "exchanged"),
            _records({"differs": differs, "follow_denominator": size}, "none", None),
        ]
        for (condition, layer), context in state.patched.items():
            logits = own if context is state.own else _label_logits(model, context, asked)
            numerator = ((logits - own) * gap).sum(-1)
            found = {
                "follow": numerator / size,
                "follow_numerator": numerator,
                "flipped": logits.argmax(-1) == after.argmax(-1),
                "shift": (logits.softmax(-1) - before).abs().sum(-1) / 2,
            }
            parts.append(_records(found, condition, layer))
        return joined(*parts)


def _label_logits(model: LanguageModel, context: Context, asked: Queries) -> Float[Tensor, "batch classes"]:
    logits = answer(model, context, asked)
    return centred(logits.gather(1, asked.label_ids.to(logits.device)))


def centred(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
    """Without what all labels have in common, which changes no probability; in float64, for their differences."""
    return logits.double() - logits.double().mean(-1, keepdim=True)


def _records(found: dict[str, Tensor], condition: str, layer: int | None) -> list[list[Record]]:
    columns = [[Record(name, v, condition, layer) for v in values.tolist()] for name, values in found.items()]
    return [list(own) for own in zip(*columns, strict=True)]


def exchange(task: Task, lengths: Sequence[int], rng: np.random.Generator) -> list[int]:
    """For each class, the class whose label word its demonstrations get: another one with as many tokens.

    Label words of different lengths cannot be exchanged, since all that follows would move; a class whose label
    word has a length of its own keeps it.

    Raises:
        AnchorsError: no two label words have the same length.
    """
    moved = list(range(len(lengths)))
    for length in sorted(set(lengths)):
        group = [c for c, own in enumerate(lengths) if own == length]
        if len(group) > 1:
            for c, other in zip(group, derangement(len(group), rng), strict=True):
                moved[c] = group[other]
    if moved == list(range(len(lengths))):
        counts = ", ".join(f"{label!r} {n}" for label, n in zip(task.labels, lengths, strict=True))
        raise AnchorsError(
            f"No label words of {task.name!r} can be exchanged: their numbers of tokens all differ ({counts}).",
            "Choose label words of which two at least have as many tokens as each other (--labels).",
        )
    return moved


def places(
    own: Prompt, exchanged: Prompt, conditions: Sequence[str], rng: np.random.Generator
) -> dict[str, tuple[int, ...]]:
    """The positions that each condition patches.

    Raises:
        AnchorsError: the two prompts differ elsewhere than at label words, or the demonstrations are too short.
    """
    label = tuple(i for i, role in enumerate(own.roles) if role == "label")
    pairs = zip(own.ids, exchanged.ids, strict=False)
    if len(own.ids) != len(exchanged.ids) or not {i for i, (a, b) in enumerate(pairs) if a != b} <= set(
        label
    ):
        raise AnchorsError(
            "Exchanging the label words changes other tokens of the prompt, too.",
            "Follow {label} in the template by a newline, so that the tokenizer keeps it apart.",
        )
    found = {"label": label, "others": tuple(i for i in range(own.query) if i not in label)}
    if "random" in conditions:
        found["random"] = random_positions(replace(own, label_positions=label), rng)
    return found


def _demand_equal(patched: Context, exchanged: Context) -> None:
    """All that differs was exchanged before the first layer: the keys and values must be B's."""
    pairs = zip((*patched.keys, *patched.values), (*exchanged.keys, *exchanged.values), strict=True)
    error = max(float((a - b).norm() / b.norm()) for a, b in pairs if a is not None and b is not None)
    if not error < 1e-3:
        raise CertificateError(
            f"With all that differs patched before layer 0, keys and values differ by {error:.1e} from prompt B's.",
            "Layers of this model see the tokens by another way than the residual stream.",
        )


@torch.no_grad()
def literal(
    bridge: Any, own: Prompt, exchanged: Prompt, positions: Sequence[int], layer: int
) -> Float[Tensor, " classes"]:
    """The label words' logits of one patched prompt by transformer-lens, both prompts run as a whole.

    Args:
        bridge: of `LanguageModel.to_transformer_lens`.
        own, exchanged: prompts A and B, of the same length.
        positions: where the residual stream before `layer` is taken from B.
    """
    name, where = f"blocks.{layer}.hook_in", list(positions)
    a, b = (torch.tensor([p.ids], device=bridge.cfg.device) for p in (own, exchanged))
    _, cache = bridge.run_with_cache(b, names_filter=name)

    def swap(stream: Tensor, hook: Any) -> Tensor:
        stream = stream.clone()
        stream[:, where] = cache[name][:, where]
        return stream

    logits = bridge.run_with_hooks(a, fwd_hooks=[(name, swap)])
    return logits[0, own.target, list(own.label_ids)]
