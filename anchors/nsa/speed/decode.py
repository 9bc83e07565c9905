"""How long one decode step of native sparse attention takes, beside full attention over the same cache."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anchors.errors import AnchorsError
from anchors.nsa.geometry import Geometry
from anchors.nsa.speed.peers import SHAPES
from anchors.nsa.speed.timing import Clock, device_of, first_line, quartiles, write

PREDICTED = {
    (1, 16384): 1.5, (1, 32768): 2.4, (1, 65536): 4.0, (1, 131072): 6.1,
    (16, 8192): 2.8, (16, 16384): 4.6, (16, 32768): 7.0, (16, 65536): 9.3, (16, 131072): 11.2, (64, 65536): 10.0,
}  # fmt: skip
"""Full attention's time over ours that the cost model expects, by batch and tokens."""


def bench_decode(
    shape: str = "64/4 D128",
    tokens: Sequence[int] = (8192, 16384, 32768, 65536, 131072, 262144),
    batches: Sequence[int] = (1, 4, 16, 64),
    *,
    geometry: Geometry = Geometry(),  # noqa: B008 - frozen
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 20,
    warmups: int = 3,
    out: Path | None = None,
    device: str | None = None,
    tuning: Any = None,
    say: Callable[[str], object] = print,
) -> pd.DataFrame:
    """Times one decode step of NSA and of full attention over the same cache, each as one CUDA graph.

    Args: as of `bench`; `tuning` is a `kernels.cache.Tuning`. Written to `nsa-decode.parquet`.

    Returns:
        implementation, batch, tokens, ms, iqr, speedup (the fastest full attention's time over this one's),
        predicted (of ours, by the cost model), spread, note.

    Raises:
        AnchorsError: there is no CUDA GPU.
    """
    place, rows = device_of(device), []
    clock = Clock(place)
    room = warmups + 3 * repeats
    for batch in batches:
        for length in tokens:
            known = {"batch": batch, "tokens": length, "shape": shape}
            runs, lost = {}, {}
            try:
                steps = _steps(SHAPES[shape], batch, length, room, geometry, dtype, place, tuning)
                for name, make in steps:
                    try:
                        runs[name] = make()
                    except Exception as error:  # noqa: BLE001 - what others raise is a result
                        lost[name] = first_line(error)
            except (AnchorsError, torch.cuda.OutOfMemoryError) as error:
                lost["all"] = first_line(error)
            times, spread = clock.turns(list(runs.values()), warmups, repeats)
            quarters = {name: quartiles(taken) for name, taken in zip(runs, times, strict=True)}
            full = min((q[1] for name, q in quarters.items() if name != "ours"), default=float("nan"))
            for name, (low, middle, high) in quarters.items():
                expected = PREDICTED.get((batch, length)) if name == "ours" else None
                rows.append({
                    "implementation": name, **known, "ms": middle, "iqr": high - low, "speedup": full / middle,
                    "predicted": expected, "spread": spread, "note": "",
                })  # fmt: skip
            rows += [
                {"implementation": name, **known, "note": f"failed: {why}"} for name, why in lost.items()
            ]
            write(out, "nsa-decode.parquet", rows, place, {"geometry": asdict(geometry), "repeats": repeats})
            say(
                f"decode, batch {batch}, {length} tokens: {', '.join(f'{n} {q[1]:.3f}' for n, q in quarters.items())}"
            )
            runs = steps = None
    return pd.DataFrame(rows)


def _steps(
    shape: tuple[int, int, int, int], batch: int, tokens: int, room: int, geometry: Geometry, dtype: torch.dtype,
    device: torch.device, tuning: Any,
) -> Iterator[tuple[str, Callable[[], Callable[[], Any]]]]:  # fmt: skip
    """Names and makers of steps. Ours appends a token at every call, for which there is `room`."""
    from anchors.nsa.kernels.cache import NSACache, captured
    from anchors.nsa.kernels.decode import nsa_decode

    heads, groups, dim, dim_v = shape
    cache = NSACache.empty(batch, tokens + room, groups, heads, dim, dim_v, geometry, dtype, device, tuning)
    for x in cache.kept:
        x.normal_()
    cache.length.fill_(tokens - 1)
    draw = lambda count, size: torch.randn(batch, 1, count, size, dtype=dtype, device=device)  # noqa: E731
    q, gates = draw(heads, dim), draw(heads, 3).sigmoid()
    new = [draw(groups, size) for size in (dim, dim, dim, dim_v, dim_v, dim_v)]

    def step(q: Tensor, gates: Tensor, *new: Tensor) -> Tensor:
        return nsa_decode(q, new[:3], new[3:], gates, cache, geometry=geometry, scale=dim**-0.5)

    def ours() -> Callable[[], Any]:
        if device.type != "cuda":
            return lambda: step(q, gates, *new)
        return captured(step, cache, q, gates, *new)

    def full(backend: SDPBackend) -> Callable[[], Any]:
        query, k, v = q.transpose(1, 2), cache.k_slc[:, :, :tokens], cache.v_slc[:, :, :tokens]

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, k, v, enable_gqa=True)

        if device.type != "cuda":
            run()
            return run
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    yield "ours", ours
    yield "sdpa-flash", lambda: full(SDPBackend.FLASH_ATTENTION)
    yield "sdpa-cudnn", lambda: full(SDPBackend.CUDNN_ATTENTION)
