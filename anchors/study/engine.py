"""The one loop of all that is measured: units of work on what they share, kept as they are finished, fewer at once where memory ends."""

import logging
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import pandas as pd
import torch
from tqdm.auto import tqdm

from anchors.errors import AnchorsError
from anchors.study.helpers import helpers, here
from anchors.study.results import Run

log = logging.getLogger(__name__)

Unit = tuple[Any, ...]
"""The values of a run's identity columns: what is measured, and kept, as a whole."""
Progress = Callable[[int, int], None]
"""Called with (units done, units in all)."""
State = TypeVar("State")
Found = TypeVar("Found")
Anew = Callable[[Run, str], "Sequence[Lot]"]
"""Makes the lots of a run in another process, on a device; it can be pickled."""


def silent(done: int, total: int) -> None:
    """No progress is shown."""


@contextmanager
def watched(name: str, progress: Progress | None) -> Generator[Progress]:
    """The progress that was asked for; by default a bar where somebody looks: on a terminal, in a notebook."""
    if progress is not None:
        yield progress
        return
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    seen = sys.stderr.isatty() or "IPKernelApp" in getattr(shell, "config", {})
    with tqdm(desc=name, disable=not seen) as bar:

        def told(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        yield told


def part_of(progress: Progress, before: int, total: int) -> Progress:
    """The progress of one of several runs: `before` units were done ahead of it, of `total` in all."""
    return lambda done, _: progress(before + done, total)


def one_by_one(units: Sequence[Unit]) -> Iterator[Sequence[Unit]]:
    """Every unit alone."""
    return ([unit] for unit in units)


@dataclass(frozen=True)
class Lot(Generic[State]):
    """Units of work that share a preparation.

    Attributes:
        units: all of them, in order.
        prepare: makes what they share; not called where nothing is left to measure.
        measure: from what is shared and some of the units to their rows, with the identity columns.
        too_large: the error where one unit does not fit into memory, or (None) what is shared does not.
        batches: how the units that are left are put together.
        whole: a unit that describes the lot, and how its rows are made; None where there is none.
        again: units to measure although there are rows of them.
    """

    units: Sequence[Unit]
    prepare: Callable[[], State]
    measure: Callable[[State, Sequence[Unit]], pd.DataFrame]
    too_large: Callable[[Unit | None], AnchorsError]
    batches: Callable[[Sequence[Unit]], Iterable[Sequence[Unit]]] = one_by_one
    whole: tuple[Unit, Callable[[State], pd.DataFrame]] | None = None
    again: Collection[Unit] = ()


@dataclass(frozen=True)
class Spent:
    """What work takes; costs add up, and n times the same is `cost * n`.

    Attributes:
        tokens: that models run, each forward pass counted.
        seconds, flop: how long, how many floating-point operations; None where nobody can tell.
    """

    tokens: float = 0
    seconds: float | None = 0
    flop: float | None = 0

    def __add__(self, other: "Spent") -> "Spent":
        def both(one: float | None, more: float | None) -> float | None:
            return None if one is None or more is None else one + more

        return Spent(
            self.tokens + other.tokens, both(self.seconds, other.seconds), both(self.flop, other.flop)
        )

    def __mul__(self, times: float) -> "Spent":
        seconds, flop = (None if x is None else times * x for x in (self.seconds, self.flop))
        return Spent(times * self.tokens, seconds, flop)


@dataclass(frozen=True)
class Stretch:
    """The work of one run on disk: all that depends on the same.

    Attributes:
        config: what its rows depend on; its `kind` names the run.
        units: all of them, but those that describe a lot.
        lots: from the run to the work.
        model: what the model is called.
        identity: the columns that name a unit.
        certify: holds the model against the model as it came; asked before anything is measured, and not where nothing is left.
        total: units of all stretches of a study; 0 where this is the only one.
        task: what of the study it is.
        cost: of some of its units, those that are left; where it is asked, nothing is measured.
        memory: bytes that are held at least while it is measured.
        anew: makes the lots for processes that help, see `anchors.study.helpers`; None where nobody may.
    """

    config: dict[str, Any]
    units: Sequence[Unit]
    lots: Callable[[Run], Sequence[Lot]]
    model: str
    identity: tuple[str, ...] = ("seed", "number")
    certify: Callable[[], object] = lambda: None
    total: int = 0
    task: str = ""
    cost: Callable[[Sequence[Unit]], Spent] = lambda _: Spent(0, None, None)
    memory: Callable[[], int] = lambda: 0
    anew: Anew | None = None

    def left(self, run: Run) -> list[Unit]:
        """The units that a run does not hold."""
        done = run.done()
        return [unit for unit in self.units if unit not in done]


def carry_out(
    stretches: Iterable[Stretch], out: Path, progress: Progress = silent
) -> tuple[pd.DataFrame, list[Run]]:
    """The rows of all stretches, and the runs in which they are kept under `out`.

    Each is forgotten before the next is asked for, so that models need not be in memory together.

    Raises:
        AnchorsError: see `work`.
        CertificateError: a model is not what it came as.
    """
    found, runs, finished = [], [], 0
    for stretch in stretches:
        run = Run.open(out, stretch.config["kind"], stretch.config, stretch.identity, model=stretch.model)
        if stretch.left(run):
            stretch.certify()
        part = part_of(progress, finished, stretch.total or len(stretch.units))
        found.append(work(run, stretch.lots(run), part, stretch.anew))
        runs.append(run)
        finished += len(stretch.units)
        del stretch
    return pd.concat(found, ignore_index=True), runs


def demand_same(run: Run, config: dict[str, Any]) -> None:
    """What another process loaded must be what this run is of.

    Raises:
        AnchorsError: it is not.
    """
    if config != run.config:
        raise AnchorsError(
            "What a process that helps has loaded is not what is measured: files were changed meanwhile, or devices are unlike.",
            "Run the same command again, or without --devices.",
            code="workers",
        )


def told(runs: Iterable[Run]) -> list[str]:
    """What was found of earlier results, each said once."""
    return list(dict.fromkeys(note for run in runs for note in run.notes))


def work(
    run: Run, lots: Sequence[Lot], progress: Progress = silent, anew: Anew | None = None
) -> pd.DataFrame:
    """The rows of all lots; only what the run does not hold is computed, and kept as it is finished.

    Args:
        run: where rows are kept.
        lots: the work.
        progress: called with (units done, units in all); units that describe a lot do not count.
        anew: makes the lots elsewhere, for whoever helps (see `anchors.study.helpers`).

    Returns:
        The rows of these lots' units, in the order in which they were kept.

    Raises:
        AnchorsError: a unit, or what a lot shares, does not fit into memory; whatever preparing and measuring raise.
    """
    done = run.done().difference(*(lot.again for lot in lots))
    total = sum(len(lot.units) for lot in lots)
    before = finished = sum(unit in done for lot in lots for unit in lot.units)
    progress(finished, total)
    crew, begun = helpers() if anew else None, False
    for number, lot in enumerate(lots):
        left = [unit for unit in lot.units if unit not in done]
        whole = lot.whole if lot.whole is not None and lot.whole[0] not in done else None
        if not left and whole is None:
            continue
        if crew and anew and left and not begun:
            crew.begin(partial(_begin, anew, run))
            begun = True
        state = _within_memory(lot.prepare, lot.too_large)
        own, batches = partial(_halving, lot, state), lot.batches(left)
        shared: Iterator[tuple[Sequence[Unit], pd.DataFrame]] = chain.from_iterable(map(own, batches))
        if crew and begun:
            shared = crew.shared(own, partial(_there, number), batches)
        for part, rows in shared:
            run.append(rows, part)
            finished += len(part)
            progress(finished, total)
        if whole is not None:
            run.append(whole[1](state), [whole[0]])
    if before == total:
        log.info("%s: nothing left to compute, all %d are kept", run.config["kind"], total)
    rows = run.rows()
    wanted = [unit for lot in lots for unit in (*lot.units, *([lot.whole[0]] if lot.whole else []))]
    assert rows is not None  # noqa: S101 - no caller comes without units
    return rows[pd.MultiIndex.from_frame(rows[list(run.identity)]).isin(wanted)]


def _begin(anew: Anew, run: Run) -> None:
    """Make the lots in a process that helps; they stay until others are begun."""
    _kept.clear()
    _kept.update(lots=anew(run, here()))


def _there(number: int, batch: Sequence[Unit]) -> list[tuple[Sequence[Unit], pd.DataFrame]]:
    """The rows of a batch, in a process that helps; what a lot shares stays until another is asked for."""
    lot = _kept["lots"][number]
    if _kept.get("number") != number:
        for name in ("state", "number"):
            _kept.pop(name, None)
        _kept.update(state=_within_memory(lot.prepare, lot.too_large), number=number)
    return list(_halving(lot, _kept["state"], batch))


_kept: dict[str, Any] = {}


def _within_memory(prepare: Callable[[], State], too_large: Callable[[None], AnchorsError]) -> State:
    found = _tried(prepare)
    if found is None:
        raise too_large(None)
    return found[0]


def _halving(
    lot: Lot[State], state: State, batch: Sequence[Unit]
) -> Iterator[tuple[Sequence[Unit], pd.DataFrame]]:
    """Measure a batch; out of memory halves it and goes on."""
    stack = [batch]
    while stack:
        part = stack.pop()
        found = _tried(partial(lot.measure, state, part))
        if found is not None:
            yield part, found[0]
            continue
        if len(part) == 1:
            raise lot.too_large(part[0])
        middle = len(part) // 2
        log.warning("out of memory with %d at once; going on with %d", len(part), middle)
        stack += [part[middle:], part[:middle]]


def _tried(run: Callable[[], Found]) -> tuple[Found] | None:
    """What a run gives; None where memory does not suffice, also once recorded steps have given back what they hold."""
    from anchors.model.replay import released

    for again in (False, True):
        try:
            return (run(),)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        # Outside of the handler: the error's frames hold the tensors that did not fit.
        more = not again and released()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not more:
            break
    return None


def out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it; the CPU and MPS allocators only say so."""
    text = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "can't allocate memory" in text
        or "out of memory" in text
    )
