"""GGUF files as directories of safetensors: dequantised once, kept in the user's cache, checked by checksum."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from platformdirs import user_cache_path
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from anchors.errors import AnchorsError

log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """Where converted models are kept: $ANCHORS_CACHE, else the user's cache directory."""
    chosen = os.environ.get("ANCHORS_CACHE")
    return Path(chosen) if chosen else user_cache_path("label-anchors")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def converted(path: Path) -> Path:
    """A GGUF file as a directory of safetensors, dequantised once and kept, with its checksum."""
    if not path.is_file():
        raise AnchorsError(f"The GGUF file {str(path)!r} does not exist.", "Check the path.")
    target = cache_directory() / "gguf" / _sha256(path)[:32]
    if intact(target):
        return target
    log.info("converting %s to safetensors (once, about a minute)", path.name)
    try:
        if path.open("rb").read(4) != b"GGUF":
            raise ValueError("it does not begin with the letters GGUF")
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        quantised = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    except Exception as error:
        raise AnchorsError(
            f"The GGUF file {str(path)!r} cannot be read: {error}", "Download it again; it may be cut short."
        ) from error
    # transformers refuses save_pretrained on a model that came from GGUF: write config and weights ourselves.
    config = AutoConfig.for_model(
        **{key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    )
    config.architectures = [type(quantised).__name__]
    tied = set(getattr(quantised, "all_tied_weights_keys", {}) or {})
    weights = {k: w.contiguous() for k, w in quantised.state_dict().items() if k not in tied}
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=".draft-"))
    try:
        config.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
        checksum = {"file": path.name, "model.safetensors": _sha256(draft / "model.safetensors")}
        (draft / "checksum.json").write_text(json.dumps(checksum))
        if target.exists():
            shutil.rmtree(target)
        try:
            draft.rename(target)
        except OSError:
            # Another process finished the same conversion meanwhile.
            if not intact(target):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def intact(target: Path) -> bool:
    """Whether a converted model is whole: its weights match the checksum written with them."""
    try:
        wanted = json.loads((target / "checksum.json").read_text())["model.safetensors"]
        return _sha256(target / "model.safetensors") == wanted
    except (OSError, ValueError, KeyError):
        return False
