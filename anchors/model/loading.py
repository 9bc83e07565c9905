"""Models from files: whole, or not at all.

transformers fills what a checkpoint lacks with random numbers, leaves out what it has no place for, and says so in a
table that nobody sees. Here each of these is a refusal that names the tensors. What a family has declared to be no part
of the function (`_keys_to_ignore_on_load_unexpected`) and what its class computes itself (masks, rotary frequencies,
position ids) may stand in a checkpoint; a tied head need not.
"""

import re
import sys
import tempfile
import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import get_session
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from anchors.errors import AnchorsError, brief, parsed
from anchors.model.architectures import known
from anchors.model.wrappers import refuse_adapters, unwrapped
from anchors.model.written import as_written

CONSTANTS = re.compile(
    r"(^|\.)(attn|attention|self_attn|self_attention)\.(masked_)?bias$|rotary_(pos_)?emb\.inv_freq$|(^|\.)position_ids$"
)
"""Names under which old checkpoints keep what their classes compute: causal masks, rotary frequencies, positions."""
WRAPPERS = (
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_forward_module.",
)
"""What data parallel, compiled, sharded and checkpointed modules and DeepSpeed put before the names of their weights."""
PLAIN = (
    "The directory must hold config.json, tokenizer files and weights as safetensors (pickled .bin weights are never "
    "opened)."
)
REMOTE = (
    "Check the spelling and the network; or give a local directory or a .gguf file. Only safetensors weights are "
    "read: for a repository without them, --revision can name a branch or pull request that has them."
)


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Attributes:
        source: hub id or directory.
        name: what the user called it.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with it.
        instead: how else to have it where the hub is not reached.
    """

    source: str
    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    instead: str = "Check the network and HF_HUB_OFFLINE; or give a local directory or a .gguf file."

    @property
    def remedy(self) -> str:
        return PLAIN if Path(self.source).is_dir() else REMOTE

    @cached_property
    def offline(self) -> bool:
        """Whether it is of a hub that does not answer: asked once, where transformers asks for a minute, file by file."""
        if Path(self.source).is_dir():
            return False
        try:
            get_session().head(ENDPOINT, timeout=10)
        except Exception:  # noqa: BLE001 - of whatever library speaks to the hub, or the hub's own in offline mode
            return True
        return False

    @property
    def options(self) -> dict[str, Any]:
        """For `from_pretrained`; without a hub only what its cache holds is looked for."""
        found = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return found | ({"local_files_only": True} if self.offline else {})


def language_model(origin: Origin, **options: Any) -> PreTrainedModel:
    """A causal language model with all of its weights.

    Args:
        origin: where it comes from.
        options: for `from_pretrained`: `dtype`, `device_map`.

    Raises:
        AnchorsError: files, configuration or weights that make no whole language model.
    """
    with without_gpu_kernels():
        return _whole(AutoModelForCausalLM, origin, demand_decoder(origin), options)


@contextmanager
def without_gpu_kernels() -> Generator[None]:
    """Where there is no GPU, let transformers not find flash-linear-attention, which it would take without asking whether it runs.

    It chooses when a family's code is first read: what a process has read before stays as it is.
    """
    found = sys.modules.get("fla", _MISSING)
    if not torch.cuda.is_available():
        sys.modules["fla"] = cast(Any, None)
    try:
        yield
    finally:
        sys.modules.pop("fla", None)
        if found is not _MISSING:
            sys.modules["fla"] = cast(Any, found)


_MISSING = object()


def demand_decoder(origin: Origin) -> str | None:
    """Refuse what is no causal language model by its configuration; returns how it is quantised, see `_quantised`.

    Raises:
        AnchorsError: it is of another kind, or its configuration cannot be read.
    """
    config = configuration(_base(origin))
    kind, method = config.model_type, _quantised(config, origin)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not remote and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise AnchorsError(
                f"{origin.name!r} is a vision-language model ({kind}): it needs images and a processor, which this verb "
                "does not have.",
                "`anchors inject` takes such models (`inject flow` looks into them), in Python "
                "anchors.injection.load_vlm(...); here give the language model that it was made from.",
                code="model-kind",
            )
        raise AnchorsError(
            f"{origin.name!r} is a {kind} model, which transformers has no causal language model for.",
            "Give a decoder with a head over the vocabulary.",
            code="model-kind",
        )
    return method


def vision_language_model(origin: Origin, **options: Any) -> PreTrainedModel:
    """A vision-language model with all of its weights; arguments and errors as in `language_model`."""
    config = configuration(origin)
    kind, method = config.model_type, _quantised(config, origin)
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        language = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        raise AnchorsError(
            f"{origin.name!r} is no vision-language model: its configuration is that of "
            f"{'the language model' if language else 'a'} {kind}.",
            "Load a language model with anchors.load(...) and the verbs for language models."
            if language
            else "Give a model that takes images and answers in text.",
            code="model-kind",
        )
    with without_gpu_kernels():
        return _whole(AutoModelForImageTextToText, origin, method, options)


def configuration(origin: Origin) -> PreTrainedConfig:
    """A model's configuration, with at least one layer.

    Raises:
        AnchorsError: it cannot be read, or makes no model.
    """
    known()
    try:
        config = AutoConfig.from_pretrained(origin.source, **origin.options)
    except Exception as error:
        raise _unreadable(origin, "its configuration could not be read", error) from error
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not isinstance(layers, int) or layers < 1:
        raise AnchorsError(
            f"The model {origin.name!r} has no layers to look into: num_hidden_layers is {layers!r} in its configuration.",
            "It must be a whole number from 1.",
            code="model-kind",
        )
    return config


def tokenizer_of(origin: Origin) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Raises:
        AnchorsError: it cannot be read, or the files are not there (transformers then makes one that knows no word).
    """
    try:
        tokenizer = cast(
            PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(origin.source, **origin.options)
        )
        known = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())
    except Exception as error:
        raise _unreadable(origin, "its tokenizer could not be read", error) from error
    if not known:
        raise AnchorsError(
            f"The model {origin.name!r} came without tokenizer files.",
            "Copy tokenizer.json and tokenizer_config.json beside its weights, or pass tokenizer=...",
            code="tokenizer",
        )
    return tokenizer


def processor_of(origin: Origin) -> ProcessorMixin:
    """What turns texts and images into a vision-language model's tensors, with its tokenizer.

    Raises:
        AnchorsError: it cannot be read.
    """
    try:
        return AutoProcessor.from_pretrained(origin.source, **origin.options)
    except Exception as error:
        raise _unreadable(origin, "its processor could not be read", error) from error


def _quantised(config: PreTrainedConfig, origin: Origin) -> str | None:
    """How a model is quantised, by name; None when it is not.

    Raises:
        AnchorsError: transformers would read its numbers as if it were not.
    """
    stated = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not stated:
        return None
    stated = stated if isinstance(stated, dict) else stated.to_dict()
    method = stated.get("quant_method")
    if method is None and (stated.get("load_in_8bit") or stated.get("load_in_4bit")):
        method = "bitsandbytes"
    name = str(getattr(method, "value", method))
    if name != "bitsandbytes" and name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise AnchorsError(
            f"The model {origin.name!r} is quantised by a method that transformers does not know: {name!r}.",
            "Use the model that it was made from.",
            code="quantised",
        )
    return name


def _base(origin: Origin) -> Origin:
    """Where the weights are: of a folder with nothing but an adapter, the model that the adapter was trained on."""
    if (path := _adapter(origin)) is None or (Path(origin.source) / "config.json").is_file():
        return origin
    try:
        base = parsed(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except Exception as error:
        raise _unreadable(origin, "its adapter_config.json could not be read", error) from error
    if not isinstance(base, str) or not base:
        raise AnchorsError(
            f"The adapter {origin.name!r} does not say which model it belongs to.",
            "Write base_model_name_or_path into its adapter_config.json.",
            code="adapter",
        )
    return Origin(base, base, None, origin.trust_remote_code)


def _adapter(origin: Origin) -> Path | None:
    """The file that describes an adapter of peft, where there is one."""
    try:
        path = find_adapter_config_file(
            origin.source, revision=origin.revision, local_files_only=origin.offline
        )
    except Exception:  # noqa: BLE001 - what cannot be found or read is said by who needs it
        return None
    return None if path is None else Path(path)


def _whole(kind: Any, origin: Origin, method: str | None, options: dict[str, Any]) -> PreTrainedModel:
    """Read a model and refuse what does not fit."""
    check_files(origin)
    base, adapter = _base(origin), _adapter(origin)
    if base is not origin:
        check_files(base)
    with tempfile.TemporaryDirectory() as scratch:
        # transformers would load the adapter, too, and report on nothing else.
        place = base if adapter is None or base is not origin else _without_adapter(origin, Path(scratch))
        try:
            model, found = kind.from_pretrained(
                place.source, **base.options, **options,
                use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
        except Exception as error:
            how = f" (quantised: {method})" if method else ""
            raise _unreadable(base, f"its weights could not be read{how}", error, bool(method)) from error
    model.name_or_path = model.config.name_or_path = base.source
    refuse_parts(model, found, base.name)
    if method is None:
        as_written(model, _folder(base), base.name)
    return model if adapter is None else _with_adapter(model, origin)


def _folder(origin: Origin) -> Path:
    """Where the files of a model are on this machine."""
    path = Path(origin.source)
    return path if path.is_dir() else Path(cast(str, _cached(origin, "config.json"))).parent


def _cached(origin: Origin, name: str) -> str | None:
    """The place of a file of a model of the hub."""
    return cached_file(origin.source, name, revision=origin.revision, local_files_only=origin.offline)


def _without_adapter(origin: Origin, scratch: Path) -> Origin:
    """A view of a folder in which a whole model and an adapter lie side by side, of the model alone."""
    for path in Path(origin.source).iterdir():
        if not path.name.startswith("adapter_"):
            (scratch / path.name).symlink_to(path.resolve())
    return Origin(str(scratch), origin.name, None, origin.trust_remote_code)


def _with_adapter(model: PreTrainedModel, origin: Origin) -> PreTrainedModel:
    """Put an adapter into a model by peft itself: transformers' own way loses the magnitudes of DoRA."""
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict

        config = PeftConfig.from_pretrained(origin.source, revision=origin.revision)
        refuse_adapters({"default": config}, origin.name)
        # Without this file peft would open a pickle.
        path = _cached(origin, "adapter_model.safetensors")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(
                model, origin.source, config=config, revision=origin.revision,
                torch_device=str(model.device), autocast_adapter_dtype=False,
            )  # fmt: skip
        with safe_open(path, "pt") as file:
            extra = sorted(set(file.keys()) - set(get_peft_model_state_dict(adapted)))
    except Exception as error:
        raise _unreadable(origin, "its adapter could not be read", error) from error
    missing = [str(one.message) for one in said if "missing adapter keys" in str(one.message)]
    if missing or extra:
        parts = [
            brief(missing[0]).rstrip(".") if missing else "",
            f"{_count(extra)} in the file that the model has no place for: {_some(extra)}" if extra else "",
        ]
        raise AnchorsError(
            f"The adapter {origin.name!r} is not whole: {'; '.join(filter(None, parts))}.",
            "Does it belong to this base model (adapter_config.json names it)?",
            code="adapter",
        )
    return unwrapped(adapted)


def refuse_parts(model: PreTrainedModel, found: dict[str, Any], name: str) -> None:
    """Refuse a model whose weights and whose checkpoint are not one to one.

    Args:
        model: as `from_pretrained` made it.
        found: what it reported beside it.
        name: of the model.

    Raises:
        AnchorsError: names what is missing, left over or of another shape.
    """
    computed = {key for key, _ in model.named_buffers()} - set(model.state_dict())
    missing = sorted(found["missing_keys"])
    extra = sorted(
        key
        for key in found["unexpected_keys"]
        if not CONSTANTS.search(key) and not any(own == key or own.endswith("." + key) for own in computed)
    )
    shapes = sorted(
        f"{key} is {_shape(there)} in the file and {_shape(here)} in the model"
        for key, there, here in found["mismatched_keys"]
    )
    if not (missing or extra or shapes or found["error_msgs"]):
        return
    kind = type(model).__name__
    if missing and (prefix := _prefix(extra)):
        raise AnchorsError(
            f"The weights of {name!r} were saved from inside a wrapper: their names hold {prefix!r}, so that {kind} finds "
            f"{len(missing)} of its weights missing.",
            "Save the model that the wrapper holds (model.module, model._orig_mod), or take the prefix out of the names.",
            code="model-not-whole",
        )
    parts = [
        f"{_count(missing)} of {kind} not in the file: {_some(missing)}" if missing else "",
        f"{_count(extra)} in the file that {kind} has no place for: {_some(extra)}" if extra else "",
        f"{_count(shapes)} of another shape: {_some(shapes)}" if shapes else "",
        *map(brief, found["error_msgs"][:1]),
    ]
    raise AnchorsError(
        f"The model {name!r} is not whole: {'; '.join(filter(None, parts))}.",
        "What is missing would be random numbers. Do config.json (layers, sizes, architectures, tie_word_embeddings) and "
        "the weights belong together, and is it a checkpoint of a language model?",
        code="model-not-whole",
    )


def _prefix(names: Iterable[str]) -> str | None:
    names = list(names)
    return next((w for w in WRAPPERS if names and all(f".{w}" in f".{name}" for name in names)), None)


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} weight{'s' * (len(names) > 1)}"


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def check_files(origin: Origin) -> None:
    """Refuse a directory whose weights lie elsewhere: what is read is what was given.

    Links within a snapshot of the hub's cache, which keeps its files in a folder beside it, are its own.

    Raises:
        AnchorsError: a shard outside, an index that is none.
    """
    folder = Path(origin.source)
    if not folder.is_dir():
        return
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    names = {path.name for path in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = parsed(index.read_text(encoding="utf-8"))["weight_map"]
            if not (isinstance(shards, dict) and all(isinstance(x, str) for x in shards.values())):
                raise TypeError("its weight_map is no table from names of weights to names of files")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AnchorsError(
                f"The model {origin.name!r} could not be loaded: {index.name} cannot be read: {brief(error)}.",
                "Download it again.",
                code="model-broken",
            ) from error
        names |= set(shards.values())
    for name in sorted(names):
        if not any((folder / name).resolve().is_relative_to(place) for place in homes):
            raise AnchorsError(
                f"The weights {name!r} of the model {origin.name!r} lie outside its directory and are not read.",
                "Copy them into it.",
                code="outside",
            )


def _unreadable(origin: Origin, what: str, error: Exception, quantised: bool = False) -> AnchorsError:
    """What went wrong while something was read, in a sentence."""
    if isinstance(error, AnchorsError):
        return error
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return AnchorsError(
            f"The model {origin.name!r} does not fit into memory.",
            "Use --precision bfloat16 or --device-map auto.",
            code="memory",
        )
    if origin.offline and isinstance(error.__cause__, LocalEntryNotFoundError):
        return AnchorsError(
            f"The model {origin.name!r} could not be loaded: it is not on this machine, and the hub ({ENDPOINT}) was not "
            "reached.",
            origin.instead,
            code="model-not-found",
        )
    remedy = (
        "Install the reader that it names, or use the model before quantisation."
        if quantised
        else origin.remedy
    )
    return AnchorsError(
        f"The model {origin.name!r} could not be loaded: {what}: {brief(error)}", remedy, code="model-broken"
    )
