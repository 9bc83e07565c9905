"""Which layers of a model attend, as its configuration counts them, and which carry a recurrent state."""

from collections.abc import Sequence
from typing import Any

WITHOUT = {"linear_attention", "conv", "moe", "mamba", "mlp"}
"""Kinds of layers, in transformers' words, in which no query looks at keys."""
STATEFUL = {"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"}
"""Those that hand something from token to token in a state: recurrent layers, convolutions, and such beside an attention."""


def kinds(config: Any) -> tuple[str, ...]:
    """The kind of each layer; none where the configuration does not tell."""
    for name in ("layer_types", "layers_block_type"):
        found = getattr(config, name, None)
        if found and len(found) == config.num_hidden_layers:
            return tuple(found)
    return ()


def attending(config: Any) -> tuple[int, ...]:
    """The layers that attend, counted from 0 among all; every one where the configuration does not tell."""
    found = kinds(config) or ("",) * config.num_hidden_layers
    return tuple(layer for layer, kind in enumerate(found) if kind not in WITHOUT)


def stateful(config: Any) -> tuple[int, ...]:
    """The layers in which tokens reach later ones through a state."""
    return tuple(layer for layer, kind in enumerate(kinds(config)) if kind in STATEFUL)


def ranges(layers: Sequence[int]) -> str:
    """Layer numbers in words: `0 to 2, 4`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def beside_attention(config: Any) -> str | None:
    """What a reader of the sums must know of a model with recurrent layers, in a sentence; None for others."""
    own, seen = stateful(config), attending(config)
    if not own:
        return None
    where = (
        "" if len(own) == config.num_hidden_layers else f"s {ranges(own)}" if len(own) > 1 else f" {own[0]}"
    )
    told = f"layer{where}" if where else "every layer"
    attend = (
        ""
        if len(seen) == config.num_hidden_layers
        else f" Attention stands in layer{'s' * (len(seen) > 1)} {ranges(seen)}."
    )
    return (
        f"Tokens reach later ones through a recurrent state, too (in {told}): what flows through it is not in these sums, and "
        f"isolation leaves that path open.{attend}"
    )
