"""Whether the numbers of a loaded model are those of its files: looked up there, not in what the loader says of itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchors.errors import AnchorsError

ROWS = 8
"""Rows at either end of a tensor that are compared."""


@torch.no_grad()
def as_written(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Hold the ends of every tensor, and the padding rows of embeddings, against the files that they were read from.

    A class whose initialisation zeroes the padding row of its embedding does so after loading, too (Youtu in transformers
    5.23): that row gets its numbers back. Tensors that are renamed, cut, joined or turned while they are read are left
    out.

    Raises:
        AnchorsError: a tensor holds other numbers than the file.
    """
    held = model.state_dict()
    padded = {
        f"{key}.weight": module.padding_idx
        for key, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
    }
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                own = next((k for k in (key, f"{model.base_model_prefix}.{key}") if k in held), None)
                if own is None or not _comparable(held[own], file.get_slice(key)):
                    continue
                there, here = file.get_slice(key), held[own]
                if own in padded:
                    row = padded[own] % len(here)
                    here[row] = there[row : row + 1][0].to(here)
                if all(_same(a, b) for a, b in _ends(there, here)):
                    continue
                # Turned or reordered on the way, as the class asks, a tensor still holds the same numbers.
                whole = file.get_tensor(key).to(here).flatten().sort().values
                if not _same(whole, here.flatten().sort().values):
                    raise AnchorsError(
                        f"The weight {own} of {name!r} does not hold the numbers of its file {path.name}: "
                        f"{type(model).__name__} of this transformers changes them while it loads.",
                        "Try another version of transformers.",
                        code="not-itself",
                    )


@runtime_checkable
class _Slice(Protocol):
    """A tensor in a file, of which nothing is read yet."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


def _comparable(here: Tensor, there: _Slice) -> bool:
    plain = type(here) is Tensor and here.is_floating_point() and not here.is_meta and here.dim() > 0
    # Types of one byte are quantised, and scaled while they are read.
    return (
        plain
        and list(here.shape) == list(there.get_shape())
        and there.get_dtype() in ("F64", "F32", "F16", "BF16")
    )


def _ends(there: _Slice, here: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for part in (slice(0, ROWS), slice(max(0, len(here) - ROWS), len(here))):
        yield there[part].to(here), here[part]


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
