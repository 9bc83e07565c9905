"""Digests: xxh3 of 128 bits over every byte, the same wherever a tensor lies.

xxh3 runs at the speed of memory and is no cryptographic hash: it tells apart what differs, and guards against nobody who
wants two models to look alike. https://github.com/Cyan4973/xxHash
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from anchors.errors import AnchorsError

CHUNK = 1 << 25
"""Bytes that travel from a GPU at once: two such pieces of pinned memory are held."""
_BLOCK = 1 << 22


def text_digest(value: Any) -> str:
    """Thirty-two hex digits over plain data; the order of keys does not matter."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def file_digest(path: Path) -> str:
    """Thirty-two hex digits over a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """By name, thirty-two hex digits over type, shape and every byte of a tensor, in row-major order.

    A tensor that is made of others (quantised ones, say) goes by those. Memory that several names share is read once.

    Raises:
        AnchorsError: a tensor whose bytes cannot be read.
    """
    parts = {name: list(_parts(name, tensor)) for name, tensor in tensors.items()}
    plain = {_place(x): x for own in parts.values() for _, x in own}
    found = _of_bytes(plain)
    made = {}
    for name, own in parts.items():
        told = [(label, found[_place(x)]) for label, x in own]
        made[name] = told[0][1] if told[0][0] is None else text_digest(told)
    return made


def tensor_digest(tensor: Tensor) -> str:
    """See `tensor_digests`."""
    return tensor_digests({"a tensor": tensor})["a tensor"]


def _parts(name: str, tensor: Tensor, label: str | None = None) -> Iterator[tuple[str | None, Tensor]]:
    """The plain tensors that a tensor is made of, each with its place in it; itself, at no place, when it is plain."""
    tensor = tensor.detach()
    if is_traceable_wrapper_subclass(tensor):
        inner, context = tensor.__tensor_flatten__()
        facts = f"{label or ''}/{type(tensor).__name__}{tuple(tensor.shape)}{tensor.dtype}{_told(context)}"
        for part in inner:
            yield from _parts(name, getattr(tensor, part), f"{facts}.{part}")
    elif tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        what = "has no numbers (device meta)" if tensor.is_meta else f"is of the kind {tensor.layout}"
        raise AnchorsError(
            f"{name} {what}: there is nothing that results could be known by.",
            "Load the model whole, with dense weights.",
            code="model-not-whole",
        )
    else:
        yield label, tensor.resolve_conj().resolve_neg()


def _told(context: Any) -> str:
    """What a tensor subclass says of itself beside its tensors, without anything that names a place in memory."""
    if isinstance(context, Mapping):
        return str({str(k): _told(v) for k, v in context.items()})
    if isinstance(context, (list, tuple)):
        return str([_told(v) for v in context])
    text = repr(context)
    return type(context).__name__ if " at 0x" in text or isinstance(context, torch.device) else text


def _place(tensor: Tensor) -> tuple:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _of_bytes(tensors: Mapping[tuple, Tensor]) -> dict[tuple, str]:
    """Digests of plain tensors, a thread a device: a CUDA device's are copied piece by piece, while the one before is hashed."""
    by_device: dict[torch.device, list[tuple]] = {}
    for key, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(key)
    digests = {key: xxhash.xxh3_128(f"{x.dtype}{tuple(x.shape)}\n".encode()) for key, x in tensors.items()}

    def read(device: torch.device) -> None:
        keys = by_device[device]
        flat = (_flat(tensors[key]) for key in keys)
        pieces = _from_cuda(flat, device) if device.type == "cuda" else _whole(flat)
        for i, piece in pieces:
            digests[keys[i]].update(piece.data)

    # Hashing, and waiting for a copy, let other threads run.
    with ThreadPoolExecutor(max(1, len(by_device))) as several:
        list(several.map(read, by_device))
    return {key: digest.hexdigest() for key, digest in digests.items()}


def _flat(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in row-major order, on its device; no copy where they lie so already."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _whole(flat: Iterable[Tensor]) -> Iterator[tuple[int, np.ndarray]]:
    for i, one in enumerate(flat):
        yield i, one.cpu().numpy()


def _from_cuda(flat: Iterable[Tensor], device: torch.device) -> Iterator[tuple[int, np.ndarray]]:
    """What `_whole` gives, in pieces: one is on its way while the one before is looked at."""
    stream = torch.cuda.Stream(device)
    buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    count = 0
    waiting: tuple | None = None
    for i, one in enumerate(flat):
        for piece in one.split(CHUNK):
            buffer = buffers[count % 2][: len(piece)]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                buffer.copy_(piece, non_blocking=True)
            arrived = stream.record_event()
            if waiting is not None:
                waiting[0].synchronize()
                yield waiting[1], waiting[2].numpy()
            # The piece is held until it has arrived: its memory must not be given to anything else meanwhile.
            waiting, count = (arrived, i, buffer, piece), count + 1
    if waiting is not None:
        waiting[0].synchronize()
        yield waiting[1], waiting[2].numpy()


def marks(tensors: Sequence[Tensor]) -> list[int]:
    """One number for each tensor that is another one whenever a bit or the order of its entries is.

    For comparisons within a process: on a GPU nothing is copied from it, and numbers of different devices have nothing
    to do with each other.
    """
    found = [
        torch.tensor(xxhash.xxh3_64_intdigest(_flat(x).numpy()) - 2**63, dtype=torch.int64)
        if x.device.type == "cpu"
        else multilinear(x)
        for x in (tensor.detach() for tensor in tensors)
    ]
    device = found[0].device if found else None
    return torch.stack([mark.to(device) for mark in found]).tolist() if found else []


def multilinear(tensor: Tensor) -> Tensor:
    """Σ_b u_b Σ_i w_i x_bi mod 2⁶⁴ over the entries' bits x as integers, in blocks b, with odd weights u and w that look random.

    Two tensors that differ in one entry never have the same sum; others with a probability of at most about 2⁻³² over the
    choice of weights (where only signs differ; else much smaller).
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.contiguous().reshape(-1).view(kinds[min(8, tensor.element_size())])
    weights = _mixed(torch.arange(min(_BLOCK, flat.numel()), device=flat.device))
    blocks = flat.split(_BLOCK)
    factors = _mixed(torch.arange(len(blocks), device=flat.device) + _BLOCK)
    sums = [(block.to(torch.int64) * weights[: len(block)]).sum() for block in blocks]
    return (torch.stack(sums) * factors).sum()


def _mixed(x: Tensor) -> Tensor:
    """Odd integers of 64 bits that look random (the finalizer of splitmix64, with signed shifts)."""
    x = (x + 1) * -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return (x ^ (x >> 31)) | 1
