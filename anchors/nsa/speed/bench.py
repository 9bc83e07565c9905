"""How fast native sparse attention is, beside what else there is.

Every number is gated: before anything is timed, its output and slopes must agree with the equations — all of them on
a short text, the output and ∂L/∂q of some random queries on the text itself — and what two runs return is compared
bit for bit. Then the implementations take turns, with the second-level cache flushed before each turn, and the first
and the last one run twice: how far these two timings of the same thing lie apart is the noise.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from anchors.errors import AnchorsError, demand_seed, nearest
from anchors.nsa import reference
from anchors.nsa.geometry import Geometry
from anchors.nsa.speed.decode import bench_decode
from anchors.nsa.speed.peers import IMPLEMENTATIONS, LEAVES, SELECTED, SHAPES, Case, Timed, exact
from anchors.nsa.speed.timing import Clock, device_of, first_line, quartiles, write

__all__ = ["PATTERNS", "SHAPES", "bench", "bench_decode"]

PATTERNS = ("chosen", "random", "shared", "hot")
"""Blocks chosen by our kernels on correlated tokens; at random; alike in each 32 queries; the first ones by everybody."""
PREDICTED = {
    "forward": {8192: (1.4, 3.6), 16384: (3.2, 7.8), 32768: (8.3, 17.7), 65536: (24, 43), 131072: (77, 115)},
    "backward": {8192: (4.9, 6.5), 16384: (11, 14), 32768: (26, 33), 65536: (68, 81), 131072: (200, 226)},
}
"""Milliseconds that the cost model expects of all of NSA for the first shape, with all and with none of the reading of
neighbours shared."""
RATE, BANDWIDTH = 790e12, 3.0e12
"""What an H100 reached, measured: bfloat16 operations, and bytes of its memory, a second."""
ALLOWED = 2e-2
CHECKED = 256
SHORT = 2048
"""Most relative error that is timed; queries compared on the text itself; tokens of the text compared whole."""


def bench(
    shapes: Sequence[str] = ("64/4 D128",),
    tokens: Sequence[int] = (4096, 8192, 16384, 32768, 65536),
    patterns: Sequence[str] = PATTERNS,
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS),
    *,
    geometry: Geometry = Geometry(),  # noqa: B008 - frozen
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = True,
    repeats: int = 20,
    warmups: int = 3,
    seed: int = 0,
    out: Path | None = None,
    device: str | None = None,
    tuning: Any = None,
    say: Callable[[str], object] = print,
) -> pd.DataFrame:
    """Times the forward and backward pass of NSA, of its parts and of its peers, one row each.

    Args:
        shapes: keys of `SHAPES`.
        patterns: which blocks are selected, of `PATTERNS`; everything is timed on the first of them, the selected
            branch on all.
        implementations: keys of `IMPLEMENTATIONS`.
        repeats, warmups: turns that count, and that do not.
        out: folder for `nsa-bench.parquet` and its facts, written anew after each shape, length and pattern.
        device: where to run, for tests; the GPU unless given.
        tuning: settings of our kernels.
        say: gets a line per comparison.

    Returns:
        implementation, part, direction, shape, tokens, pattern, ms (median), iqr, tflops (of attended pairs only),
        floor_ms (the products of attended pairs, or the bytes in and out, at an H100's measured rates),
        gigabytes (peak beyond the inputs), error (relative, the worst of all compared), deterministic,
        predicted_low, predicted_high, rho, busiest (share of the queries that read the busiest block), spread (of the
        comparison), note (`failed: …` where there is no time).

    Raises:
        AnchorsError: there is no CUDA GPU, or a name is unknown.
    """
    demand_seed(seed)
    place = device_of(device)
    for asked, known in ((shapes, SHAPES), (patterns, PATTERNS), (implementations, IMPLEMENTATIONS)):
        for name in asked:
            if name not in known:
                raise AnchorsError(
                    f"There is nothing called {name!r} to compare.", nearest(name, known), code="unknown-name"
                )
    clock, rows = Clock(place), []
    settings = {
        "geometry": asdict(geometry), "dtype": str(dtype), "repeats": repeats, "warmups": warmups, "seed": seed
    }  # fmt: skip
    for shape in shapes:
        for number, pattern in enumerate(patterns):
            parts = ("slc", "union", "inverse") if number else None
            names = [name for name in implementations if not number or name in SELECTED]
            make = lambda length, shape=shape, pattern=pattern: drawn_tensors(  # noqa: E731
                SHAPES[shape], length, pattern, geometry, dtype, place, seed, tuning
            )
            short = _gate(names, parts, make(min(SHORT, *tokens)), backward, None)
            for length in tokens:
                case = make(length)
                chosen = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:CHECKED]
                gated = _gate(names, parts, case, backward, chosen.sort().values.to(place))
                found, spread = _timed(gated, short, clock, case, warmups, repeats)
                known = {
                    "shape": shape,
                    "tokens": length,
                    "pattern": pattern,
                    "spread": spread,
                    **_load(case),
                }
                rows += [row | known | _predicted(row, known, geometry) for row in found]
                write(out, "nsa-bench.parquet", rows, place, settings)
                say(
                    f"{shape}, {length} tokens, {pattern}: {len(found)} rows, the same twice differs by {spread:.1%}"
                )
                for line in _said(found):
                    say(line)
                del case, gated
    return pd.DataFrame(rows)


def drawn_tensors(
    shape: tuple[int, int, int, int], tokens: int, pattern: str, geometry: Geometry, dtype: torch.dtype,
    device: torch.device, seed: int = 0, tuning: Any = None,
) -> Case:  # fmt: skip
    """Tensors whose neighbours are alike, as in texts: x_t = 0.98 x_{t−1} + noise, of variance 1; and the blocks."""
    from anchors.nsa.kernels import attention, selection

    heads, groups, dim, dim_v = shape
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(1, tokens, *size, generator=generator, device=device)

    def correlated(*size: int, factor: float = 0.98) -> Tensor:
        x, reach = noise(*size) * (1 - factor**2) ** 0.5, 1
        # Σ_s factor^s x_{t−s}, with twice as many terms at each step.
        while reach < min(tokens, 256):
            x[:, reach:] = x[:, reach:] + factor**reach * x[:, :-reach]
            reach *= 2
        return x.to(dtype)

    q, k, v = correlated(heads, dim), correlated(groups, dim), noise(groups, dim_v).to(dtype)
    kc, vc = (reference.compress(x, lambda block: block.mean(-2), l=geometry.l, d=geometry.d) for x in (k, v))
    if pattern == "chosen":
        _, lse = attention.compressed_attention(
            q, kc, vc, l=geometry.l, d=geometry.d, scale=dim**-0.5, tuning=tuning
        )
        idx = selection.select_blocks(
            q, kc, lse, scale=dim**-0.5, tuning=tuning, geometry=geometry, tokens=tokens
        )
    else:
        scores = torch.zeros(1, tokens, groups, geometry.blocks(tokens), device=device)
        if pattern != "hot":
            scores.uniform_(generator=generator)
        idx = selection.select(scores, geometry=geometry, tokens=tokens, tuning=tuning)
        if pattern == "shared":
            rows = torch.arange(tokens, device=device)
            idx = idx[:, rows - rows % 32].contiguous()
    return Case(
        geometry, q, k, v, kc.contiguous(), vc.contiguous(), correlated(groups, dim), noise(groups, dim_v).to(dtype),
        torch.rand(1, tokens, heads, 3, generator=generator, device=device).to(dtype), noise(heads, dim_v).to(dtype),
        idx, tuning,
    )  # fmt: skip


def _said(rows: list[dict[str, Any]]) -> Iterator[str]:
    """How far our parts are from the floor, and what could not be timed and why."""
    for row in rows:
        share = row["floor_ms"] / row["ms"]
        if row["note"].startswith("failed"):
            yield f"  {row['implementation']} {row['part']} {row['direction']} {row['note']}"
        elif row["implementation"] == "ours" and share == share:
            yield f"  {row['part']}, {row['direction']}: {row['ms']:.2f} ms, {share:.0%} of its time is the floor's"


@dataclass(frozen=True)
class _Gated:
    """A task that ran, or why there is none; `run` is the pass to time."""

    task: Timed
    direction: str
    run: Callable[[], Any] | None = None
    error: float | None = None
    same: bool | None = None
    gigabytes: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return self.task.implementation, self.task.part, self.direction, self.task.variant


def _gate(
    names: Sequence[str], parts: Sequence[str] | None, case: Case, backward: bool, rows: Tensor | None
) -> list[_Gated]:
    """Runs everything twice; only what is in `parts` by the first word, where these are given."""
    gated: list[_Gated] = []
    truth: dict[str, tuple[Tensor, Sequence[Tensor]]] = {}
    for name in names:
        try:
            tasks = IMPLEMENTATIONS[name](case)
        except Exception as error:  # noqa: BLE001 - what others raise is a result
            lost = Timed(name, "", lambda: None)
            gated.append(_Gated(lost, "", note=f"failed: {first_line(error)}"))
            continue
        for task in tasks:
            if parts is not None and task.part.split()[0] not in parts:
                continue
            if task.part in LEAVES and task.part not in truth:
                truth[task.part] = exact(case, task.part, rows)
            gated.append(_tried(task, "forward", task.forward, truth.get(task.part), rows))
            if backward and task.backward is not None:
                gated.append(_tried(task, "backward", task.backward, truth.get(task.part), rows))
    return gated


def _tried(task: Timed, direction: str, run: Callable[[], Any], truth: Any, rows: Tensor | None) -> _Gated:
    try:
        first = [x.clone() for x in _tensors(run())]
        cuda = first[0].is_cuda
        before = 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        second = _tensors(run())
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if cuda else 0.0
        same = all(map(torch.equal, first, second))
        error = None
        if truth is not None:
            exact_o, exact_slopes = truth
            found = task.restore(second) if direction == "backward" else second
            wanted = exact_slopes if direction == "backward" else [exact_o]
            error = max(
                _distance(x[:, rows] if rows is not None else x, y)
                for x, y in zip(found, wanted, strict=rows is None)
            )
    except Exception as error:  # noqa: BLE001 - what others raise is a result
        return _Gated(task, direction, note=f"failed: {first_line(error)}")
    wrong = error is not None and not error <= ALLOWED
    note = f"failed: relative error {error:.1e}" if wrong else ""
    return _Gated(task, direction, None if wrong else run, error, same, peak, note)


def _timed(
    gated: list[_Gated], short: list[_Gated], clock: Clock, case: Case, warmups: int, repeats: int
) -> tuple[list[dict[str, Any]], float]:
    """Rows of what passed, here and on the short text, the fastest variant of each; and of what failed."""
    before = {one.key: one for one in short}
    ready: dict[tuple[str, ...], tuple[float, _Gated]] = {}
    rows = []
    for one in gated:
        earlier = before.get(one.key)
        if earlier is not None and earlier.error is not None:
            worst = max(earlier.error, one.error or 0.0)
            bad = earlier.run is None and one.run is not None
            one = replace(one, error=worst, **({"run": None, "note": earlier.note} if bad else {}))
        if one.run is None:
            rows.append(_row(one, [], case))
            continue
        # Two calls decide between variants; the timing proper is below.
        speed = min(clock(one.run) for _ in range(2)) if one.task.variant else 0.0
        best = ready.get(one.key[:3])
        if best is None or speed < best[0]:
            ready[one.key[:3]] = speed, one
    left = [one for _, one in ready.values()]
    try:
        times, spread = clock.turns([one.run for one in left if one.run is not None], warmups, repeats)
    except Exception as error:  # noqa: BLE001 - such as no memory for all at once
        left = [replace(one, note=f"failed: {first_line(error)}") for one in left]
        times, spread = [[]] * len(left), float("nan")
    return [_row(one, taken, case) for one, taken in zip(left, times, strict=True)] + rows, spread


def _row(one: _Gated, times: list[float], case: Case) -> dict[str, Any]:
    quarters = quartiles(times)
    dim, dim_v = case.q.shape[-1], case.v.shape[-1]
    work = (
        dim
        if one.task.part == "select"
        else 3 * dim + 2 * dim_v
        if one.direction == "backward"
        else dim + dim_v
    )
    pairs = case.pairs.get(one.task.part, float("nan"))
    least = sum(getattr(case, x).nbytes for x in LEAVES.get(one.task.part, ())) + case.dz.nbytes
    # Of a backward pass everything is read and its slopes are written.
    least *= 2 if one.direction == "backward" else 1
    return {
        "implementation": one.task.implementation,
        "part": one.task.part,
        "direction": one.direction,
        "ms": quarters[1],
        "iqr": quarters[2] - quarters[0],
        "tflops": 2 * pairs * work / quarters[1] / 1e9,
        "floor_ms": max(2 * pairs * work / RATE, least / BANDWIDTH) * 1e3 if pairs == pairs else pairs,
        "gigabytes": one.gigabytes,
        "error": one.error,
        "deterministic": one.same,
        "note": one.note or one.task.variant,
    }


def _predicted(row: dict[str, Any], known: dict[str, Any], geometry: Geometry) -> dict[str, float]:
    ours = row["implementation"] == "ours" and row["part"] == "all" and geometry == Geometry()
    table = PREDICTED.get(row["direction"], {}) if ours and known["shape"] == "64/4 D128" else {}
    low, high = table.get(known["tokens"], (float("nan"),) * 2)
    return {"predicted_low": low, "predicted_high": high}


def _load(case: Case) -> dict[str, float]:
    """ρ of tiles of 4 queries, and the share of the queries that read the busiest block."""
    from anchors.nsa.kernels import lists

    groups, blocks = case.idx.shape[2], case.geometry.blocks(case.tokens)
    keys = case.idx + torch.arange(groups, device=case.idx.device)[:, None] * blocks
    busiest = keys[case.idx >= 0].bincount().max()
    return {"rho": lists.rho(lists.union(case.idx, 4)), "busiest": float(busiest) / case.tokens}


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())
