"""A model's files as a lazy view: names, shapes and types at once, tensors one by one. Safetensors only, no pickle.

A tensor that is read is a view into the file (memory-mapped), so that it takes none of the process's own memory
until it is computed with.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anchors.errors import AnchorsError, parsed
from anchors.injection.merging.stacks import Apart, apart
from anchors.places import refuse_revision, require_inside

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What peft writes."""
PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
"""Types whose numbers mean what they are, as safetensors calls them: narrower floats go with scales."""
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
_UNWANTED = ("consolidated*", "*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SAMPLES, _SAMPLE = 8, 512


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what it is.

    Attributes:
        file: the safetensors file.
        dtype: as safetensors calls it: BF16, F32, …
        shape: of the tensor.
        nbytes: its size on disk.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def itemsize(self) -> int:
        return self.nbytes // max(1, math.prod(self.shape))


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        name: what the user called it: a directory or hub id.
        folder: where its files lie.
        entries: its tensors in the order of files and of places in them, which is the quickest to read.
        config: its config.json.
        commit: of a hub model, else None.
        notes: what whoever uses it must know.
    """

    name: str
    folder: Path
    entries: Mapping[str, Entry]
    config: Mapping[str, Any]
    commit: str | None
    _files: Mapping[Path, Any] = field(repr=False, compare=False)
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, source: "str | Path | Checkpoint", revision: str | None = None) -> "Checkpoint":
        """Open a directory, or a model of the hub (downloaded on first use).

        Args:
            source: directory or hub id; what is open already is returned as it is.
            revision: branch, tag or commit of a hub model.

        Raises:
            AnchorsError: nothing there; no safetensors; a shard is missing or cannot be read; index and shards
                disagree; the weights are quantised; it is an adapter, or has one beside it.
        """
        if isinstance(source, Checkpoint):
            return source
        folder, commit = located(source, revision)
        if (folder / ADAPTER).is_file():
            raise AnchorsError(
                f"{str(source)!r} holds an adapter ({ADAPTER}), which is no whole model and would be left out.",
                "Only an expert may be an adapter; as another model give it merged and saved, or the folder without it.",
                code="adapter",
            )
        return cls.whole(str(source), folder, commit)

    @classmethod
    def whole(cls, source: str, folder: Path, commit: str | None) -> "Checkpoint":
        """Open the whole model in a folder, whatever lies beside it; see `open`."""
        config = read_json(folder / "config.json", "Give the folder that save_pretrained wrote.")
        quantised = config.get("quantization_config")
        if quantised:
            how = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else "unknown"
            raise AnchorsError(
                f"{source!r} is quantised ({how}); its tensors are not weights that can be added up.",
                "Give the model it was quantised from, in bfloat16, float16 or float32.",
                code="quantised",
            )
        entries: dict[str, Entry] = {}
        files = {}
        weights = _weights(folder)
        require_inside(folder, weights)
        for file, wanted in weights.items():
            files[file], found = opened(file)
            if absent := sorted(wanted - set(found)) if wanted is not None else ():
                raise AnchorsError(
                    f"{file.name} in {str(folder)!r} lacks {len(absent)} tensors that the index says it has: "
                    f"{', '.join(absent[:3])}{', …' * (len(absent) > 3)}.",
                    "Download or save the model again.",
                    code="model-not-whole",
                )
            entries |= {name: entry for name, entry in found.items() if wanted is None or name in wanted}
        return Checkpoint(source, folder, entries, config, commit, files)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @cached_property
    def apart(self) -> Apart:
        """Its tensors with experts of a mixture one by one."""
        return apart(self.shapes)

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: entry.dtype for name, entry in self.entries.items()}

    def tensor(self, name: str) -> Tensor:
        """A tensor as it lies on disk: a view into the file."""
        entry = self.entries[name]
        try:
            return self._files[entry.file].get_tensor(name)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise AnchorsError(
                f"{name} in {str(entry.file)!r} cannot be read: {error}",
                "Download or save the model again.",
                code="model-broken",
            ) from error

    def weight(self, name: str) -> Tensor:
        """A tensor that can be computed with, or the matrix of one expert in a stack of them.

        Raises:
            AnchorsError: it is of a quantised type.
        """
        if (place := self.apart.slices.get(name)) is not None:
            return place.of(self.weight(place.stack)).contiguous()
        entry = self.entries[name]
        if entry.dtype not in PLAIN:
            raise AnchorsError(
                f"{name} in {self.name!r} is of type {entry.dtype}, which is quantised.",
                "Give the model it was quantised from, in bfloat16, float16 or float32.",
                code="quantised",
            )
        return self.tensor(name)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits over configuration, names, types, shapes and a sample of every tensor.

        The sample is 8 pieces of 512 bytes, evenly spread: whole models would take minutes. Two models that differ
        in a few numbers only may thus go by the same fingerprint; fine-tuned ones do not.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
            raw = as_bytes(self.tensor(name))
            starts = np.linspace(0, max(0, len(raw) - _SAMPLE), _SAMPLES, dtype=np.int64)
            for start in sorted(set(starts.tolist())):
                digest.update(raw[start : start + _SAMPLE].tobytes())
        return digest.hexdigest()[:16]

    def stamp(self) -> str | dict[str, list[int]]:
        """What changes whenever the weights are written again, if only in one number: the commit of a hub model, else
        size and time (ns) of each file."""
        if self.commit is not None:
            return self.commit
        found = {file.name: file.stat() for file in self._files}
        return {name: [own.st_size, own.st_mtime_ns] for name, own in found.items()}


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor as a flat array of bytes, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _weights(folder: Path) -> Mapping[Path, set[str] | None]:
    """The weight files of a model, and what the index, if there is one, says each of them holds."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for kind in _PICKLES for path in folder.glob(kind))
        if pickles:
            raise AnchorsError(
                f"{str(folder)!r} has its weights only as pickles ({pickles[0]}), which can run code when opened.",
                "Convert them where you trust them: load the model and save_pretrained it again.",
                code="model-broken",
            )
        raise AnchorsError(
            f"{str(folder)!r} has neither {SINGLE} nor {INDEX}.",
            "Give the folder of a whole model.",
            code="model-not-whole",
        )
    index = read_json(folder / INDEX, "Download the model again.")
    held: dict[Path, set[str]] = {}
    try:
        for name, file in index["weight_map"].items():
            if Path(file).name != file:
                raise AnchorsError(
                    f"{str(folder / INDEX)!r} points out of its folder, to {file!r}.", code="outside"
                )
            held.setdefault(folder / file, set()).add(name)
    except (KeyError, TypeError, AttributeError) as error:
        raise AnchorsError(
            f"{str(folder / INDEX)!r} is not an index of shards.",
            "Download the model again.",
            code="model-broken",
        ) from error
    if missing := [file.name for file in held if not file.is_file()]:
        raise AnchorsError(
            f"{str(folder)!r} lacks {len(missing)} of its {len(held)} shards: "
            f"{', '.join(sorted(missing)[:3])}{', …' * (len(missing) > 3)}.",
            "Download or copy the missing files.",
            code="model-not-whole",
        )
    return dict(sorted(held.items()))


def opened(file: Path) -> tuple[Any, dict[str, Entry]]:
    """A safetensors file, checked, and its tensors in the order in which they lie there.

    Raises:
        AnchorsError: it is not whole.
    """
    try:
        handle = safe_open(file, framework="pt", device="cpu")
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    except (OSError, ValueError, SafetensorError) as error:
        raise AnchorsError(
            f"{str(file)!r} is no whole safetensors file: {error}",
            "It may have been cut off while it was copied; get it again.",
            code="model-broken",
        ) from error
    header.pop("__metadata__", None)
    spans = sorted((*tensor["data_offsets"], name) for name, tensor in header.items())
    return handle, {
        name: Entry(file, header[name]["dtype"], tuple(header[name]["shape"]), end - begin)
        for begin, end, name in spans
    }


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        AnchorsError: it does not, or is not there.
    """
    try:
        found = parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AnchorsError(
            f"{str(path.parent)!r} has no {path.name}.", remedy, code="model-not-whole"
        ) from None
    except (OSError, ValueError) as error:
        raise AnchorsError(f"{str(path)!r} cannot be read: {error}", remedy, code="model-broken") from error
    if not isinstance(found, dict):
        raise AnchorsError(f"{str(path)!r} holds no JSON object.", remedy, code="model-broken")
    return found


def located(source: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a model, downloaded if need be, and its commit on the hub."""
    refuse_revision(source, revision)
    if Path(source).is_dir():
        return Path(source), None
    folder = _downloaded(str(source), revision)
    return folder, folder.name


def _downloaded(source: str, revision: str | None) -> Path:
    """The folder of a hub model: weights in safetensors, configuration, tokenizer and processor, and no code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(
            source, revision=revision, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)
        )
    except HFValidationError:
        raise AnchorsError(
            f"{source!r} is not a directory, and no hub id either.", "Check the path.", code="model-not-found"
        ) from None
    except (OSError, ValueError) as error:  # the hub's errors are among these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AnchorsError(
            f"{source!r} is not a directory, and the hub does not give it: {reason}",
            "Check the path or id, the revision, and the network; gated models need `hf auth login`.",
            code="model-not-found",
        ) from error
    return Path(folder)
