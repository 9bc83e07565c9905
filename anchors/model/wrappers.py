"""Model objects instead of files: the transformers model inside what others have put around it.

What only changes how the model is run is taken off (torch.compile, DataParallel); what changes the function stays in
place when it stands inside the model (adapters of peft), and is refused when it stands outside, because the analyses run
the model itself. Where there is a doubt, both are asked the same tokens.
"""

import copy
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from anchors.errors import AnchorsError

TRANSPARENT = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""Wrappers that compute what they hold, by the name of their class, and where they hold it."""
OWN_TOKENIZERS: WeakKeyDictionary[Any, PreTrainedTokenizerBase] = WeakKeyDictionary()
"""Of the bridges that `LanguageModel.to_transformer_lens` made, the tokenizer of the model: a bridge keeps another."""


def is_bridge(source: Any) -> bool:
    """Whether an object is a transformer-lens `TransformerBridge`."""
    return type(source).__name__ == "TransformerBridge" and hasattr(source, "original_model")


def unwrapped(source: Any) -> PreTrainedModel:
    """The transformers model with a head over the vocabulary that an object is, or holds.

    Raises:
        AnchorsError: it is none, or what stands around it changes what is computed.
    """
    kind = type(source).__name__
    if kind in TRANSPARENT and isinstance(source, nn.Module):
        return unwrapped(getattr(source, TRANSPARENT[kind]))
    if is_bridge(source):
        return _from_bridge(source)
    if _is_peft(source):
        return _from_peft(source)
    if not isinstance(source, PreTrainedModel):
        raise AnchorsError(f"A {kind} is no model that can be analysed.", _instead(source), code="model-kind")
    if any(p.is_meta for p in source.parameters()) and not hasattr(source, "hf_device_map"):
        raise AnchorsError(
            f"This {kind} holds no numbers: it was made on the device `meta`.",
            "Load its weights first.",
            code="model-not-whole",
        )
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if not known and (source.config.is_encoder_decoder or source.get_output_embeddings() is None):
        raise AnchorsError(
            f"{kind} is no causal language model: it gives no logits of the next token.",
            "Load it with AutoModelForCausalLM.",
            code="model-kind",
        )
    _uncompile(source)
    refuse_adapters(getattr(source, "peft_config", None), kind)
    return source


def _instead(source: Any) -> str:
    """What to pass instead of an object that is no model."""
    if isinstance(source, PreTrainedConfig):
        return "It is a configuration without weights: pass the model."
    for name in (
        "model",
        "module",
        "pretrained_model",
        "base_model",
        "_fsdp_wrapped_module",
        "language_model",
    ):
        inner = getattr(source, name, None)
        if isinstance(inner, PreTrainedModel):
            return f"It holds a {type(inner).__name__}: pass its attribute `{name}`, with tokenizer=..."
    return (
        "Pass a hub id, a directory, a .gguf file, a transformers model with its tokenizer, a PeftModel or a "
        "transformer-lens TransformerBridge."
    )


def _uncompile(model: nn.Module) -> None:
    """Take torch.compile off a model and its parts: a compiled layer does not ask again which attention it runs."""
    for module in list(model.modules()):
        if getattr(module, "_compiled_call_impl", None) is not None:
            module._compiled_call_impl = None
        own = vars(module).get("forward")
        if hasattr(own, "_torchdynamo_orig_callable"):
            module.forward = own._torchdynamo_orig_callable
        for name, child in module.named_children():
            if type(child).__name__ == "OptimizedModule":
                setattr(module, name, child._orig_mod)


def _is_peft(source: Any) -> bool:
    return (
        isinstance(source, nn.Module) and hasattr(source, "peft_config") and hasattr(source, "get_base_model")
    )


def _from_peft(source: Any) -> PreTrainedModel:
    """The model that holds peft's layers, its adapters on or off as they are."""
    kind = type(source).__name__
    refuse_adapters(getattr(source, "peft_config", None), kind)
    model = unwrapped(source.get_base_model())
    source.eval()
    _agree(kind, model, source, "Merge the adapter (merge_and_unload) or save it, and load that.")
    return model


def refuse_adapters(adapters: Any, name: str) -> None:
    """Refuse adapters that act outside the layers they were put into.

    Raises:
        AnchorsError: a prompt of trained vectors, an adapter that reads the input before the model does.
    """
    if not isinstance(adapters, dict):
        return
    for label, config in adapters.items():
        method = str(getattr(config.peft_type, "value", config.peft_type))
        why = None
        if config.is_prompt_learning:
            why = "puts trained vectors before the prompt, which are no tokens"
        elif method in ("XLORA", "POLY"):
            why = "chooses its weights by the whole input, outside the model"
        elif getattr(config, "alora_invocation_tokens", None):
            why = "is switched on by tokens of the prompt, outside the model"
        if why:
            raise AnchorsError(
                f"The adapter {label!r} ({method}) of {name!r} {why}: its numbers would not be those of peft.",
                "LoRA and other adapters that act inside the layers are understood.",
                code="adapter",
            )


@torch.no_grad()
def _agree(kind: str, model: PreTrainedModel, other: Any, remedy: str) -> None:
    """Refuse a wrapper that answers otherwise than the model in it."""
    rows = model.config.get_text_config().vocab_size
    ids = torch.arange(8, device=model.device)[None] * (rows // 8)
    own, outer = model(input_ids=ids).logits, other(input_ids=ids)
    outer = outer if isinstance(outer, Tensor) else outer.logits
    if own.shape != outer.shape or not float((own - outer).abs().max()) <= 1e-3 * (
        1 + float(own.abs().max())
    ):
        raise AnchorsError(
            f"This {kind} does not answer as the transformers model in it.", remedy, code="not-itself"
        )


def twin(kind: type, config: Any, state: dict[str, Tensor], device: torch.device) -> PreTrainedModel:
    """A plain model object over the same weight tensors."""
    config = copy.deepcopy(config)
    config._attn_implementation_internal = "eager"
    with torch.device(device):
        model = kind(config)
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    if missing:
        raise AnchorsError(
            f"{len(missing)} weights are missing, for example {missing[0]!r}.",
            "Only a whole model can be copied: merge adapters first.",
            code="model-not-whole",
        )
    model.load_state_dict({key: state[key] for key in wanted}, assign=True)
    model.tie_weights()
    return model.eval()


def _from_bridge(bridge: Any) -> PreTrainedModel:
    """The transformers model inside a transformer-lens bridge, as a plain object over the same weights."""
    original = bridge.original_model
    if not isinstance(original, PreTrainedModel):
        raise AnchorsError(
            "This bridge does not hold a transformers model.",
            "Boot it with boot_transformers.",
            code="model-kind",
        )
    state = {key.replace("_original_component.", ""): weight for key, weight in original.state_dict().items()}
    model = twin(type(original), original.config, state, original.device)
    ids = torch.arange(4, device=original.device)[None]
    with torch.no_grad():
        error = float((model(ids).logits - bridge(ids)).abs().max())
    if not error < 1e-3:
        raise AnchorsError(
            f"The bridge's logits differ from those of its own transformers model by {error:.2g}.",
            "Its weights were processed (compatibility mode folds the layer norms); pass the bridge as booted.",
            code="not-itself",
        )
    return model


def tokenizer_of_bridge(bridge: Any) -> PreTrainedTokenizerBase:
    """The model's own tokenizer: a bridge keeps one that puts a BOS token in front whether the model's does or not.

    Raises:
        AnchorsError: the model's own cannot be found.
    """
    if bridge in OWN_TOKENIZERS:
        return OWN_TOKENIZERS[bridge]
    theirs = bridge.tokenizer
    if theirs is None or theirs.bos_token_id is None or theirs("a")["input_ids"][:1] != [theirs.bos_token_id]:
        return theirs
    try:
        revision = getattr(bridge.original_model.config, "_commit_hash", None)
        own = cast(
            PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(theirs.name_or_path, revision=revision)
        )
    except Exception as error:
        raise AnchorsError(
            f"The tokenizer of this bridge puts {theirs.bos_token!r} in front of every prompt, and whether the model's own "
            f"does cannot be seen: {theirs.name_or_path!r} cannot be read.",
            "Pass the model's own: tokenizer=AutoTokenizer.from_pretrained(...).",
            code="tokenizer",
        ) from error
    if own.get_vocab() != theirs.get_vocab():
        raise AnchorsError(
            f"The tokenizer in {theirs.name_or_path!r} is another than the bridge's.",
            "Pass tokenizer=...",
            code="tokenizer",
        )
    return own
