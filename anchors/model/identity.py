"""What the numbers of a model depend on, as digests: another one whenever a result could be another one.

Every byte of every weight counts, wherever it lies (GPU, memory, or on disk by a device map), and so do the configuration
as it is run, the settings of all modules (adapters and their scales among them) and the tokenizer. What things are called,
where they lie, on which device they are and what this toolkit does to a model when it is loaded does not.
"""

import copy
import dataclasses
import enum
import functools
import inspect
import sys
import uuid
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import version
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN, NewGELUActivation

from anchors.digest import tensor_digests, text_digest
from anchors.errors import AnchorsError

NAMES = {
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype",
    "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "return_dict", "output_attentions",
    "output_hidden_states", "output_router_logits", "use_cache", "initializer_range", "torchscript", "pretraining_tp",
    "chunk_size_feed_forward", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "_attn_implementation_autoset", "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
    "tokenizer_class", "image_processor_type", "processor_class", "_processor_class",
}  # fmt: skip
"""Entries of a configuration that say what things are called, how they are written or what else is given out. The type of the
weights is theirs: it counts with their bytes."""

STATES = {
    "training", "gradient_checkpointing", "is_gradient_checkpointing", "hf_device_map", "all_tied_weights_keys", "loss_type",
    "kernel_config", "use_kernels", "warnings_issued", "model_tags", "max_seq_len_cached", "attention_type",
    "layers_are_rescaled", "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "hpu",
}  # fmt: skip
"""Attributes of modules that say where or how often something was run."""

LIBRARIES = {
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "torchao",
    "bitsandbytes",
    "gptqmodel",
    "awq",
    "anchors",
}
"""Code that is known by its version; other code that decides numbers is known by its text."""

_SAME = 1e-6


@dataclass(frozen=True)
class Identity:
    """Digests of what numbers depend on.

    Attributes:
        parts: thirty-two hex digits by part: `weights`, `configuration`, `tokenizer` (and `images` of a vision-language model).
        unknown: code that is part of the model and cannot be known again, as a reader may find it: hooks, mostly. Results
            with it are never taken up.
    """

    parts: Mapping[str, str]
    unknown: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Thirty-two hex digits over all parts."""
        return text_digest(dict(self.parts))


def fingerprint(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """Thirty-two hex digits over everything that the numbers of a model depend on, as it is now."""
    return identity(model, tokenizer).digest


def identity(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, processor: Any = None
) -> Identity:
    """Digests of a model as it is now: every weight is read.

    Args:
        model: of transformers, mostly; with adapters, hooks and weights that are elsewhere.
        tokenizer: its tokenizer.
        processor: of a vision-language model, which prepares images.

    Raises:
        AnchorsError: a weight has no numbers, or its bytes cannot be read.
    """
    held = _held.get().get(id(model))
    if held is not None:
        return held
    unknown = tuple(_unknown(model))
    told = configuration(model)
    parts = {
        "weights": text_digest(tensor_digests(tensors(model))),
        # What cannot be known again is like nothing else, itself in another run included.
        "configuration": text_digest([told, uuid.uuid4().hex] if unknown else told),
    }
    if tokenizer is not None:
        parts["tokenizer"] = text_digest(vocabulary(tokenizer))
    if processor is not None:
        images = plain(processor.image_processor.to_dict())
        parts["images"] = text_digest([images, plain(vars(processor))])
    return Identity(MappingProxyType(parts), unknown)


_held: ContextVar[Mapping[int, Identity]] = ContextVar("anchors_identities", default=MappingProxyType({}))


@contextmanager
def held(model: nn.Module, found: Identity) -> Generator[None]:
    """Inside, a model keeps this identity without being read again: for whoever knows that nobody changes it meanwhile."""
    token = _held.set({**_held.get(), id(model): found})
    try:
        yield
    finally:
        _held.reset(token)


def software() -> dict[str, str]:
    """Major and minor version of what computes: within these, numbers agree up to rounding."""
    return {name: ".".join(version(name).split(".")[:2]) for name in ("torch", "transformers")}


# ------------------------------------------------------------------------------------------------ weights
def tensors(model: nn.Module) -> dict[str, Tensor]:
    """By name everything a model computes with: its state dict, offloaded weights from where they lie, and those of its
    other buffers that are not what the configuration makes them."""
    found = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            found[name] = _brought(model, name) if value.is_meta else value
    for prefix, module in model.named_modules():
        own = {
            name: buffer
            for name, buffer in module._buffers.items()
            if buffer is not None and name in module._non_persistent_buffers_set
        }
        made = _made_anew(model, prefix, module, own)
        for name, buffer in own.items():
            if not _rewritten(module, name) and not _alike(buffer, made.get(name)):
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _brought(model: nn.Module, name: str) -> Tensor:
    """A weight that accelerate keeps elsewhere, from the map of the hook that brings it for each use."""
    *path, own = name.split(".")
    for depth in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:depth]))
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            where = getattr(one, "weights_map", None)
            key = ".".join([*path[depth:], own])
            if where is not None and key in where:
                return where[key]
    raise AnchorsError(
        f"{name} has no numbers (device meta), and nothing brings it when it is used.",
        "Load the model whole: from_pretrained, or load() with a device_map.",
        code="model-not-whole",
    )


def _rewritten(module: nn.Module, name: str) -> bool:
    """Whether a buffer is rewritten in every run, from the length of the prompts: it is no part of the model."""
    kinds = getattr(module, "rope_type", "")
    kinds = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    dynamic = any("dynamic" in str(kind) or kind == "longrope" for kind in kinds)
    return dynamic and name.endswith("inv_freq") and not name.endswith("original_inv_freq")


def _made_anew(
    model: nn.Module, prefix: str, module: nn.Module, buffers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Buffers as the family's own initialisation makes them from the configuration, on the CPU; none where it fails.

    Their last bits depend on the device and the processor that computed them, which must not count.
    """
    if not buffers:
        return {}
    path = prefix.split(".") if prefix else []
    above = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1)]
    owner = next((one for one in above if isinstance(one, PreTrainedModel)), None)
    if owner is None:
        return {}
    twin = copy.copy(module)
    # Without parameters and children: nothing that is in use may be initialised.
    twin._parameters, twin._modules = {}, {}
    # In double precision: a buffer that was rounded to the weights' type is another one.
    twin._buffers = {
        name: torch.full(buffer.shape, torch.nan, dtype=torch.float64)
        for name, buffer in buffers.items()
        if buffer.is_floating_point()
    }
    try:
        with torch.random.fork_rng(devices=[]):
            owner._init_weights(twin)
    except Exception:  # noqa: BLE001 - a family may ask for what the twin lacks; its buffers count by their bytes then
        return {}
    return {name: buffer for name, buffer in twin._buffers.items() if buffer is not None}


def _alike(buffer: Tensor, made: Tensor | None) -> bool:
    if made is None or made.shape != buffer.shape or not buffer.is_floating_point() or buffer.is_meta:
        return False
    live = buffer.detach().cpu().double()
    scale = float(made.abs().max()) if made.numel() else 0.0
    return bool(torch.allclose(live, made, rtol=_SAME, atol=_SAME * scale))


# ------------------------------------------------------------------------------------------------ configuration
def configuration(model: nn.Module) -> dict[str, Any]:
    """Plain data: the configurations of a model as they are, and kind and settings of all of its modules."""
    configs: dict[int, tuple[str, Any]] = {}
    modules = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and id(config) not in configs:
            configs[id(config)] = name, plain(config.to_dict())
        # `fuse_gelu` puts another form of the same function in its place.
        gelu = isinstance(module, (NewGELUActivation, type(ACT2FN["gelu_pytorch_tanh"])))
        modules[name] = "GELU by tanh" if gelu else [_kind(module), settings(module)]
    return {"configurations": list(configs.values()), "modules": modules}


def settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module, its functions by their names, and the state of an adapter."""
    own = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in STATES | NAMES
        and not name.endswith("_max_seq_len_cached")
    }
    if hasattr(type(module), "disable_adapters"):
        own |= {
            "adapters/active": getattr(module, "active_adapters", None)
            or getattr(module, "active_adapter", None),
            "adapters/disabled": module.disable_adapters,
            "adapters/merged": list(getattr(module, "merged_adapters", ())),
        }
    found = {
        name: _name(value) if _function(value) else plain(value, _NOTHING) for name, value in own.items()
    }
    return {name: value for name, value in found.items() if value is not _NOTHING and value is not None}


_NOTHING = object()


def _function(value: Any) -> bool:
    return isinstance(value, functools.partial) or inspect.isroutine(value)


def _name(called: Any) -> Any:
    """What a function is called; nothing for those that only bring weights or lead through the seam."""
    home = _home(called)
    while isinstance(called, functools.partial):
        called = called.func
    if home.startswith("transformers_modules."):
        home = home.rpartition(".")[2]  # what stands before it names the folder that the code was read from
    hidden = home.split(".")[0] in ("accelerate", "anchors")
    return _NOTHING if hidden else f"{home}.{getattr(called, '__qualname__', '')}"


def plain(value: Any, otherwise: Any = None) -> Any:
    """A value as JSON has it, without what is only a name; `otherwise` for what is no plain data.

    Numbers that are equal are written alike, and what is None counts as absent.
    """
    if isinstance(value, enum.Enum):
        return plain(value.value, otherwise)
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else repr(float(value))
    if isinstance(value, (torch.dtype, torch.Size)):
        return str(value)
    if isinstance(value, Mapping):
        kept = {str(key): plain(own, otherwise) for key, own in value.items() if key not in NAMES}
        return {key: own for key, own in kept.items() if own is not None and own is not otherwise}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    if isinstance(value, (list, tuple)):
        return [None if (own := plain(v, otherwise)) is otherwise else own for v in value]
    if (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and not isinstance(value, PreTrainedConfig)
    ):
        names = [field.name for field in dataclasses.fields(value)]
        return plain({name: getattr(value, name) for name in names}, otherwise)
    return otherwise


def _kind(module: nn.Module) -> list[str]:
    """The class of a module, with its text and that of what lies beside it where no version of a library stands for it."""
    kind = type(module)
    return [kind.__qualname__, *_text(kind)]


@functools.cache
def _text(kind: type) -> tuple[str, ...]:
    if kind.__module__.split(".")[0] in LIBRARIES:
        return ()
    home = sys.modules.get(kind.__module__)
    try:
        if home is None or kind.__module__ == "__main__":
            return (inspect.getsource(kind),)
        return tuple(map(inspect.getsource, [home, *_beside(home)]))
    except (OSError, TypeError):
        return ()


def _beside(home: ModuleType) -> list[ModuleType]:
    """The other modules of its package that have been imported: code that comes with a model is often several files."""
    package = getattr(home, "__package__", None)
    names = sorted(name for name in sys.modules if package and name.startswith(f"{package}."))
    found = [sys.modules[name] for name in names]
    return [one for one in found if one is not home and getattr(one, "__file__", None)]


def _unknown(model: nn.Module) -> Iterator[str]:
    """Code that runs with a model and is neither of a library nor of a class whose text is known."""
    everywhere = [
        *nn.modules.module._global_forward_hooks.values(),
        *nn.modules.module._global_forward_pre_hooks.values(),
    ]
    for one in everywhere:
        yield f"{getattr(one, '__qualname__', type(one).__qualname__)} (of {_home(one)}) on all modules"
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.split(".")[0] not in LIBRARIES and not _text(kind):
            yield f"class {kind.__qualname__} of {name or 'the model'}"
        hooks = (
            module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
        )  # fmt: skip
        called = [hook for own in hooks for hook in own.values()]
        called += [value for value in vars(module).values() if _function(value)]
        for one in called:
            if getattr(one, "__self__", None) is module:
                continue  # a method of its own, whose text goes with its class
            if (home := _home(one)).split(".")[0] not in LIBRARIES:
                what = getattr(one, "__qualname__", type(one).__qualname__)
                yield f"{what} (of {home}) on {name or 'the model'}"


def _home(called: Any) -> str:
    """The module of Python that a function or callable object comes from."""
    while isinstance(called, functools.partial):
        called = called.func
    if inspect.ismethod(called):
        called = type(called.__self__)
    home = getattr(called, "__module__", None) or type(called).__module__
    return str(home)


# ------------------------------------------------------------------------------------------------ tokenizer
def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Plain data: how text becomes tokens. Padding and truncation are left out, which every call sets anew."""
    special = [plain(dict(tokenizer.special_tokens_map)), *_text(type(tokenizer))]
    if getattr(tokenizer, "split_special_tokens", False):
        special.append("special tokens are split as text")  # no part of the backend's own file
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [*special, type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items())]
    text = backend.to_str()
    return [*special, text[max(0, text.find('"added_tokens"')) :]]


__all__ = ["Identity", "fingerprint", "held", "identity", "software"]
