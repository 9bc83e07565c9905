"""What a verb shows while it computes: a bar on a terminal, lines in a log; and what an interruption leaves."""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from anchors.pace import Interrupted, Pace

err = Console(stderr=True, highlight=False)

GOES_ON = "the same command goes on from there"
UNITS_KEPT = "{done} of {total} are kept; " + GOES_ON + "."
ALL_KEPT = "all {total} are kept, tables and pictures may be of before; the same command writes them."


@contextmanager
def progress_bar(name: str, kept: str = UNITS_KEPT) -> Generator[Callable[..., None]]:
    """Progress as a callback of (done, total), and perhaps the name of the part that it is in.

    Args:
        name: what is counted.
        kept: what an interruption leaves, once something is done.

    Raises:
        Interrupted: the process was asked to end; says what is kept.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    pace, last = Pace(name, math.inf if err.is_terminal else 30.0), (0, 0)
    with Progress(*columns, console=err, disable=not err.is_terminal, speed_estimate_period=120) as bar:
        row = bar.add_task(escape(name), total=None)

        def told(done: int, total: int, part: str = "") -> None:
            nonlocal last
            last = done, total
            bar.update(row, completed=done, total=total, description=escape(part or name))
            if said := pace.heard(done, total):
                err.print(escape(said))

        try:
            yield told
        except KeyboardInterrupt as error:
            done, total = last
            said = ALL_KEPT if done == total and kept == UNITS_KEPT else kept
            left = said.format(done=done, total=total) if done else "nothing is finished yet."
            raise Interrupted.of(error, left) from None
    if not err.is_terminal and pace.first is not None and last[0] > pace.first:
        err.print(escape(f"{name}: {last[0]} of {last[1]}"))
