"""Putting the residual stream of one run into another, on shared demonstrations."""

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anchors.context import Context, encode
from anchors.errors import AnchorsError, RoutingError
from anchors.model.language import LanguageModel


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
        AnchorsError: several residual streams.
    """

    def replaced(hidden: Tensor, beside: dict[str, Tensor]) -> Tensor:
        index = torch.tensor(list(positions), device=hidden.device)
        return hidden.index_copy(1, index, stream.to(hidden).index_select(1, index))

    if own.again is not None:
        raise AnchorsError(
            f"{model.name} does not go on from the state of its recurrent layers: a patched run of the demonstrations would be "
            "lost before the query.",
            "Use another model for causal; flow, isolate and readout run whole prompts.",
            code="no-shared-context",
        )
    with _entering(model, layer, replaced):
        found = encode(model, own.ids)
    return replace(
        found,
        keys=own.keys[:layer] + found.keys[layer:],
        values=own.values[:layer] + found.values[layer:],
        indices=own.indices[:layer] + found.indices[layer:],
        states=own.states[:layer] + found.states[layer:],
    )


@dataclass(frozen=True)
class Entering:
    """What enters a layer in one run.

    Attributes:
        stream: the residual stream.
        beside: the other tensors that the layer is handed, by name.
    """

    stream: Float[Tensor, "1 tokens width"]
    beside: dict[str, Tensor]


@contextmanager
def streams(model: LanguageModel, layers: Sequence[int]) -> Generator[dict[int, Entering]]:
    """Keep what enters each of some layers, in the one run inside."""
    found: dict[int, Entering] = {}

    def kept(layer: int, hidden: Tensor, beside: dict[str, Tensor]) -> Tensor:
        found[layer] = Entering(hidden, beside)
        return hidden

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_entering(model, layer, partial(kept, layer)))
        yield found


def demand_one_stream(model: LanguageModel, own: dict[int, Entering], other: dict[int, Entering]) -> None:
    """Make sure that two prompts which differ at some tokens differ before a layer in its residual stream alone.

    Raises:
        AnchorsError: a layer is handed more that depends on the tokens (per-layer embeddings, keys and values or an
            index shared with an earlier layer), so that patching the stream would leave half of prompt A in place.
    """
    for layer, entering in own.items():
        beside = other[layer].beside
        differing = [
            name
            for name, tensor in entering.beside.items()
            if name not in beside
            or tensor.shape != beside[name].shape
            or not torch.equal(tensor, beside[name])
        ]
        if differing:
            raise AnchorsError(
                f"Layer {layer} of {type(model.model).__name__} sees the tokens by another way than the residual stream "
                f"({', '.join(differing)}): patching the stream would exchange only a part of what enters it.",
                "Use another model for causal; flow, isolate and readout do not rest on this.",
                code="model-kind",
            )


Change = Callable[[Tensor, dict[str, Tensor]], Tensor]


@contextmanager
def _entering(model: LanguageModel, layer: int, change: Change) -> Generator[None]:
    """Put `change(stream, other tensors)` in the place of the residual stream entering a layer, in the one run inside."""
    fired = 0

    def changed(stream: Tensor, beside: dict[str, Tensor]) -> Tensor:
        if stream.dim() != 3:
            raise AnchorsError(
                f"{type(model.model).__name__} carries several residual streams side by side through its layers (a tensor of "
                f"shape {list(stream.shape)}, not [batch, tokens, width]): with one of them exchanged, the others would still "
                "be those of prompt A.",
                "Use another model for causal; flow, isolate and readout do not rest on this.",
                code="model-kind",
            )
        return change(stream, beside)

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        nonlocal fired
        fired += 1
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        name = next(iter(bound.arguments)) if args else "hidden_states"
        others = {key: value for key, value in bound.arguments.items() if key != name}
        bound.arguments[name] = changed(bound.arguments[name], dict(_tensors("", others)))
        return bound.args, bound.kwargs

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


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested arguments, with their names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value, 1):
            yield from _tensors(f"{name} {key}".strip(), part)


def block(model: LanguageModel, layer: int) -> nn.Module:
    """The decoder layer that holds the attention of `layer`: the outermost entry of a module list that it belongs to.

    Raises:
        AnchorsError: the decoder layer holds an earlier attention, too (LongCat), so that nothing enters it just before this one.
        RoutingError: the attention stands in no list.
    """
    lists = {name for name, module in model.model.named_modules() if isinstance(module, nn.ModuleList)}
    names = {module: name for name, module in model.model.named_modules()}

    def home(own: int) -> str | None:
        module = model.modules[own]
        if module is None:  # beside those that attend
            near = home(model.layers[0])
            return near and f"{near.rpartition('.')[0]}.{own}"
        parts = names[module].split(".")
        prefixes = (".".join(parts[: n + 1]) for n in range(1, len(parts)))
        return next((prefix for prefix in prefixes if prefix.rpartition(".")[0] in lists), None)

    found = home(layer)
    if found is None:
        raise RoutingError(
            f"The layers of {type(model.model).__name__} stand in no list: they cannot be patched."
        )
    first = next(own for own in range(model.n_layers) if home(own) == found)
    if first != layer:
        step = sum(home(own) == found for own in range(model.n_layers))
        raise AnchorsError(
            f"A decoder layer of {type(model.model).__name__} holds {step} attentions, one after the other: the residual "
            f"stream enters it before attention {first}, and nothing enters a layer before attention {layer}.",
            f"Patch every {step}-th (--stride {step}).",
            code="layers",
        )
    return model.model.get_submodule(found)
