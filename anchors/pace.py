"""How long it takes, in sentences; and being asked to end, as one exception that says what is kept."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

log = logging.getLogger(__name__)

WORTH_SAYING = 60.0
"""Seconds from which on the time that is left is said."""
ENOUGH = 2.0
"""Seconds of work by which the time that is left is judged."""


@dataclass
class Pace:
    """From how much is done to what there is to say of it, now and then.

    Attributes:
        name: what is done.
        every: seconds between two lines; infinite where a bar shows them.
    """

    name: str
    every: float = 30.0
    first: int | None = field(default=None, init=False)
    began: float = field(default=0.0, init=False)
    said: float | None = field(default=None, init=False)

    def heard(self, done: int, total: int) -> str:
        """What there is to say after so much of it; mostly nothing.

        The time that is left is said as soon as it can be judged, where it is a minute or more; the count after `every` seconds.
        """
        now = time.monotonic()
        if self.first is None:
            self.first, self.began = done, now
        if done == self.first or (spent := now - self.began) < ENOUGH:
            return ""
        left = spent / (done - self.first) * (total - done)
        if self.said is None:
            self.said = now
            return f"{self.name}: {_about(left)} left at the pace so far" if left >= WORTH_SAYING else ""
        if now - self.said < self.every:
            return ""
        self.said = now
        return f"{self.name}: {done} of {total}, {_about(left)} left"


def clock(seconds: float) -> str:
    """`1:02:03`."""
    return str(timedelta(seconds=round(seconds)))


def _about(seconds: float) -> str:
    return f"about {clock(seconds)}"


class Interrupted(KeyboardInterrupt):
    """The process was asked to end.

    Args:
        number: of the signal.
        kept: what is kept, as a sentence; empty where nobody knows yet.
    """

    def __init__(self, number: int = signal.SIGINT, kept: str = "") -> None:
        super().__init__(kept)
        self.number, self.kept = number, kept

    @staticmethod
    def of(error: KeyboardInterrupt, kept: str) -> "Interrupted":
        """The same interruption, with what is kept where that was not said yet."""
        return Interrupted(getattr(error, "number", signal.SIGINT), getattr(error, "kept", "") or kept)


@contextmanager
def _handled(handlers: dict[signal.Signals, Callable[[int, Any], None]]) -> Generator[None]:
    """While signals have handlers of ours; those that are ignored stay so, and threads beside the main one hear none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Generator[None]:
    """While SIGTERM is an exception, as Ctrl-C is: what is being written is taken away, and what is finished stays."""

    def end(number: int, _: Any) -> None:
        raise Interrupted(number)

    with _handled({signal.SIGTERM: end}):
        yield


@contextmanager
def between_steps(*, twice: bool = True) -> Generator[Callable[[], int]]:
    """While SIGINT and SIGTERM wait for the end of a step: what is yielded gives the signal's number, 0 while there was none.

    Args:
        twice: whether the second one is an exception at once; it is none where a launcher passes on what a process has heard.
    """
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        if came and twice:
            raise Interrupted(number)
        came.append(number)
        log.info("stopping at the end of this step%s", "; asked again, at once" if twice else "")

    with _handled({signal.SIGINT: note, signal.SIGTERM: note}):
        yield lambda: came[0] if came else 0
