"""Patching the label words: in which layers does the prediction take what it needs from them?"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from anchors.context import Context, Queries, answer, encode, queries, shared_demonstrations
from anchors.errors import AnchorsError, CertificateError, RoutingError
from anchors.icl import joined, outcomes
from anchors.models import LanguageModel
from anchors.runner import Cell, Record
from anchors.stats import GROUP, RESAMPLES, interval, resampling
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
    version: ClassVar[int] = 1
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
        rng = np.random.default_rng([cell.how.seed, 4])
        moved = exchange(cell.task, [len(word) for word in label_tokens(cell.task, model.tokenizer)], rng)
        shown = [replace(e, label=moved[e.label]) for e in demonstrations(cell.task, cell.data, cell.how)]
        query = cell.data.test[cell.prompts[0].example]
        other = build(cell.task, model.tokenizer, shown, query.text, query.label)
        where = places(prompt, other, self.positions, rng)

        own = encode(model, ids)
        with streams(model, chosen) as entering:
            exchanged = encode(model, other.ids[: len(ids)])
        # All contexts of a seed are held at once, because its batches come one after the other. Layers below the
        # patched one are A's own tensors, not copies: half of the memory of one context per layer and condition.
        patched = {
            (condition, layer): patch(model, own, layer, where[condition], entering[layer])
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


def patch(
    model: LanguageModel,
    own: Context,
    layer: int,
    positions: Sequence[int],
    stream: Float[Tensor, "1 tokens width"],
) -> Context:
    """Run the tokens of `own` again with the residual stream before `layer` taken from `stream` at some positions.

    Raises:
        RoutingError: the patch did not take place exactly once.
    """

    def replaced(hidden: Tensor) -> Tensor:
        index = torch.tensor(list(positions), device=hidden.device)
        return hidden.index_copy(1, index, stream.to(hidden).index_select(1, index))

    with _entering(model, layer, replaced):
        found = encode(model, own.ids)
    return replace(
        found,
        keys=own.keys[:layer] + found.keys[layer:],
        values=own.values[:layer] + found.values[layer:],
    )


@contextmanager
def streams(
    model: LanguageModel, layers: Sequence[int]
) -> Iterator[dict[int, Float[Tensor, "1 tokens width"]]]:
    """Keep the residual stream entering each of some layers, in the one run inside."""
    found: dict[int, Tensor] = {}

    def kept(layer: int, hidden: Tensor) -> Tensor:
        found[layer] = hidden
        return hidden

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_entering(model, layer, partial(kept, layer)))
        yield found


@contextmanager
def _entering(model: LanguageModel, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put `change(stream)` in the place of the residual stream entering a layer, in the one run inside."""
    fired = 0

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        nonlocal fired
        fired += 1
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    handle = block(model, layer).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if fired != 1:
        raise RoutingError(
            f"The residual stream entered layer {layer} {fired} times instead of once.",
            "Run the model exactly once inside; a model that shares layers cannot be patched.",
        )


def block(model: LanguageModel, layer: int) -> nn.Module:
    """The decoder layer that holds the attention of `layer`: the entry of a module list that it belongs to."""
    name = next(n for n, module in model.model.named_modules() if module is model.modules[layer])
    while name:
        parent = name.rpartition(".")[0]
        if isinstance(model.model.get_submodule(parent), nn.ModuleList):
            return model.model.get_submodule(name)
        name = parent
    raise RoutingError(
        f"The layers of {type(model.model).__name__} stand in no list: they cannot be patched."
    )


def _demand_equal(patched: Context, exchanged: Context) -> None:
    """All that differs was exchanged before the first layer: the keys and values must be B's."""
    pairs = zip((*patched.keys, *patched.values), (*exchanged.keys, *exchanged.values), strict=True)
    error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
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


def causal_summary(
    rows: pd.DataFrame, *, confidence: float = 0.95, resamples: int = RESAMPLES
) -> pd.DataFrame:
    """How far the answer follows the patch, by layer, with paired bootstrap intervals.

        follow_l = Σ_n ⟨z_l − z_A, z_B − z_A⟩ / Σ_n ‖z_B − z_A‖²        n: prompts

    a ratio of sums, since single prompts on which A and B hardly differ would have unstable ratios of their own.
    `released` of a layer is the decrease of the label words' follow up to the next measured one (or the end), in the
    same resamples. `flipped` is the share of B's predictions among the prompts on which A and B predict differently.

    Args:
        rows: of `Causal`, of one task or several.

    Returns:
        One row per task, condition, metric (`follow`, `flipped`, `released`, `differs`) and layer: value, low, high,
        examples, seeds. Layer n of n layers is the end, where nothing is left to patch.
    """
    tables = []
    for key, group in rows[rows["number"] >= 0].groupby(GROUP, sort=False):
        whole = group[group["metric"].isin(["follow_denominator", "differs"])]
        whole = whole.pivot(index=["seed", "number"], columns="metric", values="value")
        units = whole.index.to_frame(index=False)
        weights = resampling(units, resamples)[: 1 if len(units) == 1 else None]
        size, differs = whole["follow_denominator"].to_numpy(), whole["differs"].to_numpy()
        found = [("none", "differs", [None], weights @ differs[:, None] / weights.sum(1, keepdims=True))]
        patched = group[group["metric"].isin(["follow_numerator", "flipped"])]
        for condition, own in patched.groupby("condition", sort=False):
            wide = own.pivot(index=["seed", "number"], columns=["metric", "layer"], values="value")
            wide = wide.loc[whole.index].sort_index(axis=1)
            layers = wide["follow_numerator"].columns.tolist()
            follow = _ratio(weights, wide["follow_numerator"].to_numpy(), size)
            flipped = _ratio(weights, wide["flipped"].to_numpy() * differs[:, None], differs)
            found += [(condition, "follow", layers, follow), (condition, "flipped", layers, flipped)]
            if condition == "label":
                found.append((condition, "released", layers[:-1], -np.diff(follow, axis=1)))
        for condition, metric, layers, samples in found:
            value, low, high = interval(samples, confidence)
            table = pd.DataFrame({"layer": layers, "value": value, "low": low, "high": high})
            names = dict(zip(GROUP, key, strict=True)) | {"condition": condition, "metric": metric}
            tables.append(table.assign(**names, examples=len(units), seeds=units["seed"].nunique()))
    if not tables:
        raise AnchorsError("The rows hold no patched prompts.", "Were they made by another verb?")
    columns = [*GROUP, "condition", "metric", "layer", "value", "low", "high", "examples", "seeds"]
    return pd.concat([t.astype({"layer": "Int32"}) for t in tables], ignore_index=True)[columns]


def _ratio(weights: np.ndarray, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Ratio of weighted sums over prompts, by resample and layer; missing where there is nothing below."""
    total = weights @ below[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, weights @ above / total, np.nan)
