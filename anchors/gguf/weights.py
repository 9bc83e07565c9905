"""The tensors of a GGUF file as the parameters of a transformers model, each accounted for on both sides.

Which tensor belongs to which parameter is gguf's own table (`get_tensor_name_map`). What llama.cpp's converter does to
the numbers of some (conversion/*.py, `modify_tensors`) is undone here.
"""

import re
from collections.abc import Callable

import gguf
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from anchors.gguf.architectures import NO_MODEL, first_line
from anchors.gguf.reading import GGUFFile

# Read by `architectures` into the configuration.
_FREQUENCIES = {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}
_FUSED = re.compile(r"(.*\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)$")

Array = Float[np.ndarray, "..."]


def parameters(
    file: GGUFFile, config: PreTrainedConfig, told: Callable[[int, int], object] = lambda done, total: None
) -> tuple[str, dict[str, Tensor]]:
    """The name of the model's class and its parameters in float32.

    Args:
        file, config: the file, and what its keys make.
        told: hears of (numbers turned, numbers in all).

    Raises:
        AnchorsError: a parameter without a tensor, a tensor without a parameter, or one of another shape, by name.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except NO_MODEL as error:
        file.refuse(f"its keys make no model of the architecture {file.architecture} ({first_line(error)})")
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    wanted = {name: tuple(w.shape) for name, w in model.state_dict().items() if name not in tied}
    sources = _sources(file, config, list(wanted))
    read = _FREQUENCIES if getattr(config, "rope_parameters", None) else set()
    unused = set(file.tensors) - read - {name for names in sources.values() for name in names}
    if unused:
        file.refuse(
            f"its {_list(unused)} {'has' if len(unused) == 1 else 'have'} no place in a {type(model).__name__}"
        )
    undo = _UNDO.get(file.architecture, _as_it_is)
    weights: dict[str, Tensor] = {}
    told(0, file.elements)
    for name, shape in wanted.items():
        parts = [undo(source, file.array(source), config) for source in sources[name]]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        if name.endswith("shared_expert_gate.weight"):
            whole = whole.reshape(1, -1)
        if whole.shape != shape:
            file.refuse(f"{_list(sources[name])} has the shape {whole.shape}, and its keys want {shape}")
        weights[name] = torch.from_numpy(np.ascontiguousarray(whole))
        told(sum(w.numel() for w in weights.values()), file.elements)
    return type(model).__name__, weights


def _sources(file: GGUFFile, config: PreTrainedConfig, names: list[str]) -> dict[str, list[str]]:
    """Which tensors of the file make up each parameter."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[file.architecture], config.num_hidden_layers)
    sources, missing = {}, []
    for name in names:
        if fused := _FUSED.match(name):
            stem, last = fused.groups()
            found = [f"{stem}.{part}_proj.weight" for part in last.removesuffix("_proj").split("_")]
        else:
            found = [name]
        tensors = []
        for parameter in found:
            stem, _, suffix = parameter.rpartition(".")
            # Bloom is converted from its model without a head.
            tensor = table.get_name(stem) or table.get_name(stem.removeprefix("transformer."))
            tensors.append(f"{tensor}.{suffix}" if tensor else "")
        sources[name] = tensors
        if not all(tensor in file.tensors for tensor in tensors):
            missing.append(name)
    if missing:
        named = {f"{s} for {name}" for name in missing for s in sources[name] if s not in file.tensors}
        file.refuse(f"it has no tensor {_list(named)}")
    return sources


def _list(names: set[str] | list[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _as_it_is(name: str, values: Array, config: PreTrainedConfig) -> Array:
    return values


def _halves(name: str, values: Array, config: PreTrainedConfig) -> Array:
    """llama.cpp rotates neighbouring dimensions of queries and keys, transformers those half a head apart."""
    if ".attn_q." in name:
        heads = config.num_attention_heads
    elif ".attn_k." in name:
        heads = config.num_key_value_heads
    else:
        return values
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _less_one(name: str, values: Array, config: PreTrainedConfig) -> Array:
    """The file holds 1 + w of norms whose module adds the one itself."""
    return values - 1 if name.endswith("norm.weight") else values


def _turned(name: str, values: Array, config: PreTrainedConfig) -> Array:
    """GPT-2's `Conv1D` holds its matrices as input × output."""
    return values.T if values.ndim == 2 and re.match(r"blk\.\d+\.(attn|ffn)_", name) else values


def _one_head_after_another(name: str, values: Array, config: PreTrainedConfig) -> Array:
    """Bloom's queries, keys and values stand together head by head; the file has all queries first."""
    if ".attn_qkv." not in name:
        return values
    width = config.hidden_size // config.n_head
    return values.reshape(3, config.n_head, width, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)


def _one_group_after_another(name: str, values: Array, config: PreTrainedConfig) -> Array:
    """Falcon's queries of a key-value head stand before this head's key and value."""
    if ".attn_qkv." not in name:
        return values
    heads, groups = config.num_attention_heads, config.num_kv_heads
    rows = values.reshape(heads + 2 * groups, -1, *values.shape[1:])
    queries = rows[:heads].reshape(groups, heads // groups, *rows.shape[1:])
    keys, entries = rows[heads : heads + groups, None], rows[heads + groups :, None]
    return np.concatenate([queries, keys, entries], axis=1).reshape(values.shape)


_UNDO: dict[str, Callable[[str, Array, PreTrainedConfig], Array]] = {
    "llama": _halves,
    "granite": _halves,
    "gemma": _less_one,
    "gemma2": _less_one,
    "gemma3": _less_one,
    "nemotron": _less_one,
    "gpt2": _turned,
    "bloom": _one_head_after_another,
    "falcon": _one_group_after_another,
}
