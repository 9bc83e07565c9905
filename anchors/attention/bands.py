"""Masks that are bands: each row sees its last w keys, itself included.

That a mask is a band is read off its numbers, which on a GPU have to be waited for. While work is recorded nothing can be
waited for; the widths are then those that were found when the same work ran before (`widths`).
"""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_BANDS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_found: ContextVar[dict[int, int | None] | None] = ContextVar("anchors_widths", default=None)


@contextmanager
def widths(found: dict[int, int | None]) -> Generator[None]:
    """Keep the widths by layer in `found`; while work is recorded, read them there."""
    token = _found.set(found)
    try:
        yield
    finally:
        _found.reset(token)


def waits(layer: int) -> None:
    """Say of a layer that the way it is computed waits for the GPU."""
    if (found := _found.get()) is not None:
        found[layer] = None


def window_of(mask: Tensor | None, length: int, layer: int) -> int | None:
    """The w for which a row sees its last w of `length` keys; None where the mask is no such band.

    Without a mask a row sees all of them.
    """
    found = _found.get()
    # While work is recorded transformers makes a mask where it otherwise makes none.
    if mask is not None and mask.is_cuda and torch.cuda.is_current_stream_capturing():
        if found is None or layer not in found:
            raise RuntimeError(f"the width of the mask of layer {layer} is not known yet")
        return found[layer]
    width = length if mask is None else _looked_at(mask, length)
    if found is not None:
        found[layer] = width
    return width


def _looked_at(mask: Tensor, length: int) -> int | None:
    if mask.dtype != torch.bool or mask.shape[-2] != length or mask.shape[-1] < length:
        return None
    # The layers of a model share one mask; the version tells of writes to it.
    if mask.is_inference():
        return _band(mask[..., :length])
    known = _BANDS.get(mask)
    if known is None or known[:2] != (mask._version, length):
        known = _BANDS[mask] = (mask._version, length, _band(mask[..., :length]))
    return known[2]


def _band(mask: Bool[Tensor, "batch heads query key"]) -> int | None:
    place = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    window = mask[0, 0, -1].sum(dtype=torch.int32)
    band = (place <= place[:, None]) & (place > place[:, None] - window)
    found = int(torch.where((mask == band).all(), window, 0))
    return found or None
