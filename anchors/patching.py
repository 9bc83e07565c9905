"""Putting the residual stream of one run into another, on shared demonstrations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anchors.context import Context, encode
from anchors.errors import RoutingError
from anchors.models import LanguageModel


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
