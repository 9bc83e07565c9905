"""Timing, and keeping what was timed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from anchors.errors import AnchorsError
from anchors.study.results import provenance, write_table


@dataclass(frozen=True)
class Clock:
    """Milliseconds of a call, by CUDA events where there is CUDA.

    Attributes:
        flush: bytes that are overwritten before each call, more than the second-level cache holds.
        clean: whether they are then read, so that the call does not also wait for them to be written back.
    """

    device: torch.device
    flush: int = 256 << 20
    clean: bool = False
    _buffer: list[Tensor] = field(default_factory=list)

    def __call__(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        if not self._buffer:
            self._buffer.append(torch.empty(self.flush, dtype=torch.uint8, device=self.device))
        # While the device overwrites the buffer, the host runs ahead: its delays are not in the time.
        self._buffer[0].zero_()
        if self.clean:
            self._buffer[0].view(torch.int64).sum()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def turns(
        self, runs: Sequence[Callable[[], Any]], warmups: int, repeats: int
    ) -> tuple[list[list[float]], float]:
        """The times of every run, taken in turns, and how far apart two timings of the same run are (relative)."""
        order = [*runs, *([runs[0], runs[-1]] if runs else [])]
        for run in [*runs] * warmups:
            self(run)
        taken = [[self(run) for run in order] for _ in range(repeats)]
        times = [[row[i] for row in taken] for i in range(len(order))]
        middles = [quartiles(column)[1] for column in times]
        pairs = [(0, -2), (len(runs) - 1, -1)] if runs else []
        spread = max((abs(middles[a] / middles[b] - 1) for a, b in pairs), default=0.0)
        return times[: len(runs)], spread


def quartiles(times: Sequence[float]) -> list[float]:
    """25 %, 50 % and 75 % of some times; not-a-number of none."""
    return torch.tensor([*times] or [float("nan")]).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


def device_of(device: str | None) -> torch.device:
    if device is None and not torch.cuda.is_available():
        raise AnchorsError(
            "The benchmark needs a CUDA GPU.", "Run it on a machine that has one.", code="device"
        )
    return torch.device(device or "cuda")


def write(out: Path | None, name: str, rows: list[dict], device: torch.device, settings: dict) -> None:
    if out is not None:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        write_table(out / name, pd.DataFrame(rows), provenance(device=where, **settings))


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
