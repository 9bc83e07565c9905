"""Several devices, a process each: the batches of a lot are handed out, and this process measures its share of them.

A process that ends gives back what it had in hand, which the others measure; only this one certifies, prepares first and keeps rows.
Batches are what they would be alone, so that each has the same rows, bit for bit where the devices are alike.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from transformers.utils import logging as transformers_logging

from anchors.errors import AnchorsError
from anchors.model.source import Source

log = logging.getLogger(__name__)

Batch = Sequence[tuple[Any, ...]]
"""Units of work, by their names."""
Rows = tuple[Batch, pd.DataFrame]
"""Units, and their rows."""


@dataclass(frozen=True)
class Helpers:
    """Processes beside this one.

    Attributes:
        processes: by device; one that ended is taken out.
        source: the model that the study is of, where it is of one.
        begun: by device what it was to do first.
    """

    processes: dict[str, ProcessPoolExecutor]
    source: Source | None = None
    begun: dict[str, Future] = field(default_factory=dict)

    def begin(self, first: Callable[[], object]) -> None:
        """Have every process do something, which can be pickled, before what it is asked next; what that raises is raised then."""
        for name in list(self.processes):
            if call := self._given(name, first):
                self.begun[name] = call

    def _given(self, name: str, what: Callable[..., Any], *asked: Any) -> Future | None:
        """A call in a process; None where it has ended."""
        try:
            return self.processes[name].submit(what, *asked)
        except BrokenProcessPool:
            self._ended(name)
            return None

    def _ended(self, name: str) -> None:
        if self.processes.pop(name, None):
            log.warning("the process on %s ended; the others measure what it had in hand", name)

    def shared(
        self,
        own: Callable[[Batch], Iterable[Rows]],
        there: Callable[[Batch], Iterable[Rows]],
        batches: Iterable[Batch],
    ) -> Iterator[Rows]:
        """Units and rows as they come.

        Args:
            own: measures a batch here.
            there: the same in another process; it can be pickled.
            batches: every one is measured once, whoever ends meanwhile.
        """
        waiting = deque(batches)
        calls: dict[Future, tuple[str, Batch]] = {}
        try:
            while waiting or calls:
                # A second one lies ready while there are many, so that nobody waits for this process.
                for name in (*self.processes, *self.processes):
                    busy = sum(at == name for at, _ in calls.values())
                    if (
                        waiting
                        and name in self.processes
                        and busy < (2 if len(waiting) > len(self.processes) else 1)
                    ):
                        batch = waiting.popleft()
                        if call := self._given(name, there, batch):
                            calls[call] = name, batch
                        else:
                            waiting.appendleft(batch)
                if waiting:
                    yield from own(waiting.popleft())
                for call in wait(calls, timeout=0 if waiting else None, return_when=FIRST_COMPLETED).done:
                    name, batch = calls.pop(call)
                    try:
                        if first := self.begun.get(name):
                            first.result()
                        found = call.result()
                    except BrokenProcessPool:
                        waiting.append(batch)
                        self._ended(name)
                    else:
                        yield from found
        finally:
            for call in calls:
                call.cancel()


_helpers: ContextVar[Helpers | None] = ContextVar("anchors_helpers", default=None)


def helpers() -> Helpers | None:
    """The processes that help with what is measured now; None where there are none."""
    found = _helpers.get()
    return found if found and found.processes else None


@contextmanager
def helped(devices: Sequence[str], source: Source | None = None) -> Generator[None]:
    """Inside, what is measured on the first device is shared with a process on each of the others.

    Args:
        devices: as `anchors.load` takes them; all of one type.
        source: the model that is measured, where it is one that `anchors.load` loads.

    Raises:
        AnchorsError: devices of several types, whose numbers would differ.
    """
    if len({device.partition(":")[0] for device in devices}) > 1:
        raise AnchorsError(
            f"The devices {', '.join(devices)} are of several types: their numbers differ in the last digits.",
            "Take cards only, or only the CPU.",
            code="device",
        )
    context = multiprocessing.get_context("spawn")
    processes = {
        f"{device} ({number})": ProcessPoolExecutor(1, context, _begin, (device, torch.get_num_threads()))
        for number, device in enumerate(devices[1:], 1)
    }
    every, token = [*processes.values()], _helpers.set(Helpers(processes, source))
    try:
        yield
    except BaseException:
        for pool in every:
            for process in list((pool._processes or {}).values()):
                process.kill()
        raise
    finally:
        _helpers.reset(token)
        for pool in every:
            pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------ in the other process
_here: list[str] = []


def here() -> str:
    """The device of a process that helps."""
    return _here[0]


def _begin(device: str, threads: int) -> None:
    """Be a helper: Ctrl-C is heard by who gave the work, and nothing outlives them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    _here.append(device)

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
