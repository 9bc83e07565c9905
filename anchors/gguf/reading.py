"""A GGUF file's keys and tensors, and why a file cannot be read.

The layout is that of ggml's specification (docs/gguf.md): magic, version, counts, keys, table of tensors, padding,
data. gguf's own `GGUFReader` is the literal twin of `read`; it makes an array of every single word of the vocabulary
and takes 6.7 s of processor time for the default model where this takes 0.1 s, which is why the table is read here.
The numbers of quantised types are gguf's.
"""

import mmap
import re
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np

from anchors.errors import AnchorsError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
AGAIN = "Download it again."


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in its file: shape with the fastest dimension last, ggml type, offset and size in bytes."""

    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file states: its keys as they stand, and its tensors by name."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        return self.keys["general.architecture"]

    @property
    def elements(self) -> int:
        """How many numbers all its tensors hold."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    def array(self, name: str) -> np.ndarray:
        """A tensor in float32, dequantised by gguf."""
        tensor = self.tensors[name]
        stored = np.fromfile(self.path, np.uint8, tensor.size, offset=tensor.start)
        rows = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
        try:
            return gguf.dequantize(stored.reshape(rows), tensor.type).reshape(tensor.shape)
        except NotImplementedError:
            self.refuse(f"gguf cannot turn {tensor.type.name}, the type of the tensor {name}, into numbers")

    def refuse(
        self, reason: str, remedy: str = "Give the model as a directory of safetensors instead."
    ) -> NoReturn:
        """Raise the one error for files that are whole, but whose content is not understood."""
        raise AnchorsError(
            f"The GGUF file {str(self.path)!r} cannot be converted: {reason}.", remedy, code="gguf"
        )


class _Cut(Exception):
    """More bytes are asked for than there are."""


class _Cursor:
    """Reads numbers, strings and arrays one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.end = data, 0, len(data)

    def bytes(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise _Cut
        self.at += count
        return self.data[self.at - count : self.at]

    def numbers(self, code: str, count: int = 1) -> tuple:
        size = struct.calcsize(code)
        return struct.unpack(f"<{count}{code}", self.bytes(size * count))

    def string(self) -> str:
        return self.bytes(int.from_bytes(self.bytes(8), "little")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a value has type {kind}, which GGUF does not have")
        (kind,), (count,) = self.numbers("I"), self.numbers("Q")
        if kind in _SCALARS:
            return list(self.numbers(_SCALARS[kind], count))
        if count > self.end - self.at:  # every element takes a byte at least
            raise _Cut
        return [self.value(kind) for _ in range(count)]


def read(path: Path) -> GGUFFile:
    """Keys and table of tensors of a GGUF file; its data stay on disk.

    Raises:
        AnchorsError: what is wrong with it: no GGUF file, another version, cut short, one part of several.
    """
    if path.is_dir():
        raise AnchorsError(
            f"{str(path)!r} is a directory, not a GGUF file.", "Give the .gguf file inside it.", code="gguf"
        )
    if not path.is_file():
        raise AnchorsError(
            f"The GGUF file {str(path)!r} does not exist.", "Check the path.", code="model-not-found"
        )

    def unreadable(reason: str, remedy: str = AGAIN) -> AnchorsError:
        return AnchorsError(f"The GGUF file {str(path)!r} cannot be read: {reason}.", remedy, code="gguf")

    try:
        file = path.open("rb")
    except OSError as error:
        raise unreadable(error.strerror or str(error), "Check its permissions.") from error
    with file:
        if file.read(4) != b"GGUF":
            raise unreadable("it does not begin with the letters GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            cursor.bytes(4)
            try:
                version = cursor.numbers("I")[0]
                if version not in _VERSIONS:
                    raise unreadable(
                        f"it is of version {version}, known are 2 and 3", "Convert the model again."
                    )
                keys, table = _contents(cursor)
                tensors = _located(table, cursor.at, keys.get("general.alignment", 32))
            except _Cut:
                raise unreadable(
                    f"it is cut short: its header goes on beyond its {len(data)} bytes"
                ) from None
            except ValueError as error:
                if isinstance(error, AnchorsError):
                    raise
                raise unreadable(f"it is damaged: {error}") from error
            end = max((tensor.start + tensor.size for tensor in tensors.values()), default=0)
            if end > len(data):
                raise unreadable(f"it is cut short: {len(data)} bytes of {end}")
    whole = GGUFFile(path, keys, tensors)
    _check_role(whole)
    return whole


def _contents(cursor: _Cursor) -> tuple[dict[str, Any], list[tuple]]:
    n_tensors, n_keys = cursor.numbers("Q", 2)
    pairs = []
    for _ in range(n_keys):
        name = cursor.string()
        pairs.append((name, cursor.value(cursor.numbers("I")[0])))
    table = []
    for _ in range(n_tensors):
        name = cursor.string()
        (dimensions,) = cursor.numbers("I")
        shape = cursor.numbers("Q", dimensions)[::-1]
        table.append((name, shape, *cursor.numbers("I"), *cursor.numbers("Q")))
    for what, names in (("key", [n for n, _ in pairs]), ("tensor", [row[0] for row in table])):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"it holds the {what} {twice[0]} twice")
    return dict(pairs), table


def _located(table: list[tuple], end: int, alignment: int) -> dict[str, GGUFTensor]:
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-end // alignment) * alignment
    tensors = {}
    for name, shape, number, offset in table:
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(
                f"the tensor {name} has type {number}, which the installed gguf does not have"
            ) from None
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % elements:
            raise ValueError(f"the rows of the tensor {name} are no whole blocks of {kind.name}")
        tensors[name] = GGUFTensor(shape, kind, start + offset, prod(shape) // elements * size)
    return tensors


def _check_role(file: GGUFFile) -> None:
    """Refuse what is a part of a model, or none."""
    if not isinstance(file.keys.get("general.architecture"), str):
        file.refuse("it has no key general.architecture", AGAIN)
    parts = file.keys.get("split.count", 0)
    named = _PART.search(file.path.name)
    count = int(named[2]) if named else 0
    if parts > 1 or count > 1:
        file.refuse(
            f"it is one of {parts or count} parts of a model",
            "Join them with `llama-gguf-split --merge FIRST_PART WHOLE.gguf`.",
        )
    kind = file.keys.get("general.type", "model")
    if kind != "model" or file.architecture in ("clip", "mmproj"):
        kind = "mmproj" if kind == "model" else kind
        what = {"adapter": "a LoRA adapter", "mmproj": "the vision part of a model"}.get(
            kind, f"of the type {kind}"
        )
        file.refuse(
            f"it is {what}, not a language model", "Give the file of the language model that belongs to it."
        )
