"""The cells of a grid on the machines of a Ray cluster; rows come back as files, and only this process writes results.

A cell is a function of a folder that leaves finished runs in it: what is kept already is laid there first, what is new comes back.
Machines need no common disk, and one that is lost costs the cells that it had in hand: others begin them anew. Ray is imported by
`connect` alone.
"""

import logging
import math
import os
import signal
import socket
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchors.errors import AnchorsError, brief
from anchors.study.report import Found, Inquiry
from anchors.study.results import Run, write_atomic
from anchors.summaries import Tables

if TYPE_CHECKING:
    from anchors.study.engine import Progress
    from anchors.study.plan import Outlook

log = logging.getLogger(__name__)

Job = Callable[[Path], Any]
"""What a machine is given: it measures there what a results folder does not hold. A cell gives its notes, the whole what was found."""
Files = dict[str, bytes]
"""By path below a results folder."""

TRIES = 3
"""Machines that one cell may lose before it is taken to be its own fault."""
COMING = -1
"""The number of no job: a hand that is on its way."""
POLL = 2.0
"""Seconds after which new machines are looked for."""


@dataclass(frozen=True)
class Done:
    """What came of a job.

    Attributes:
        value: what it gave; an `AnchorsError` where it cannot be done.
        files: that are new.
        place: the folder they were in.
    """

    value: Any
    files: Files
    place: str


class Hand:
    """A process on some machine that does one job after another; models stay loaded between them.

    Args:
        folder: where the command was given: relative paths are of it, where the machine has it.
    """

    def __init__(self, folder: str) -> None:
        with suppress(OSError):
            os.chdir(folder)

    def there(self) -> str:
        """This toolkit's version, once everything is up."""
        return version("label-anchors")

    def do(self, job: Job, kept: Files) -> Done:
        """Do a job on top of what is kept."""
        with tempfile.TemporaryDirectory(prefix="anchors-") as place:
            out = Path(place)
            lay(out, kept)
            try:
                value = job(out)
            except AnchorsError as error:
                value = error
            files = {name: held for name, held in files_below(out).items() if kept.get(name) != held}
            return Done(value, files, place)


def runs_of(out: Path, kinds: Collection[str] | None = None) -> list[Path]:
    """The folders of runs in a results folder, of these kinds of rows or of all."""
    every = sorted((out / "runs").glob("*/"))
    return [folder for folder in every if kinds is None or folder.name.rpartition("-")[0] in kinds]


def files_below(out: Path, kinds: Collection[str] | None = None) -> Files:
    """What such folders hold of finished work; drafts and damaged files are none."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for folder in runs_of(out, kinds)
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and ".damaged-" not in path.name
    }


def lay(out: Path, files: Mapping[str, bytes]) -> None:
    """Write files under a results folder; batches last, since they stand for what lies beside them.

    Raises:
        AnchorsError: a name that leads out of it; nothing is written then.
    """
    if outside := [name for name in files if not (out / name).resolve().is_relative_to(out.resolve())]:
        raise AnchorsError(
            f"A machine of the cluster sent a file that would lie outside of the results: {outside[0]!r}.",
            "Is every machine of this cluster yours?",
            code="outside",
        )
    for name in sorted(files, key=lambda name: (Path(name).name.startswith("batch-"), name)):
        write_atomic(out / name, lambda draft, name=name: draft.write_bytes(files[name]))


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process is connected to, see `connect`.

    Attributes:
        resource: what is shared out, `GPU` or `CPU`.
        share: how much of it each hand gets.
        idle: hands that wait for a job.
    """

    resource: str
    share: float
    idle: list[Any] = field(default_factory=list)

    def room(self) -> int:
        """How many hands fit on the machines that are there now."""
        ray = _ray()
        nodes = [node["Resources"].get(self.resource, 0) for node in ray.nodes() if node["Alive"]]
        return sum(math.floor(own / self.share) for own in nodes)

    def carry_out(self, jobs: Sequence[Job], kept: Files) -> Iterator[Done]:
        """Do jobs on as many machines as there are, each result as it comes; what a lost machine had in hand is begun anew.

        Args:
            jobs: any number.
            kept: files that each finds in its folder.

        Raises:
            AnchorsError: no machine has room, or another version of this toolkit; one job lost `TRIES` machines.
        """
        ray = _ray()
        gone = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.NodeDiedError)
        shared, waiting, lost = ray.put(kept), deque(range(len(jobs))), Counter[int]()
        calls: dict[Any, tuple[Any, int]] = {}
        try:
            while waiting or any(number != COMING for _, number in calls.values()):
                while waiting and self.idle:
                    hand, number = self.idle.pop(), waiting.popleft()
                    calls[hand.do.remote(jobs[number], shared)] = hand, number
                asked = sum(number == COMING for _, number in calls.values())
                for _ in range(min(self.room() - len(calls), len(waiting) - asked)):
                    hand = self._hand()
                    calls[hand.there.remote()] = hand, COMING
                if not calls:
                    raise AnchorsError(
                        f"No machine of the cluster has {self.share:g} {self.resource} for a cell.",
                        "Start one that has (`ray status` lists what there is), or give a smaller --share.",
                        code="workers",
                    )
                for call in ray.wait(list(calls), timeout=POLL)[0]:
                    hand, number = calls.pop(call)
                    try:
                        found = ray.get(call)
                    except gone as error:
                        lost[number] += 1
                        if lost[number] == TRIES:
                            raise _given_up(error, number) from error
                        log.warning("a machine was lost; what it had in hand is begun anew on another")
                        waiting.extendleft([number] * (number != COMING))
                        continue
                    self.idle.append(hand)
                    if number != COMING:
                        yield found
                    elif found != (own := version("label-anchors")):
                        raise AnchorsError(
                            f"A machine of the cluster has label-anchors {found}, this one {own}.",
                            "Install the same everywhere.",
                            code="workers",
                        )
        finally:
            for hand, _ in calls.values():
                ray.kill(hand)

    def _hand(self) -> Any:
        ray = _ray()
        how: dict[str, Any] = {"num_gpus" if self.resource == "GPU" else "num_cpus": self.share}
        return ray.remote(**how)(Hand).remote(os.getcwd())

    def close(self) -> None:
        """Let the machines go."""
        ray = _ray()
        while self.idle:
            ray.kill(self.idle.pop())


def _ray() -> Any:
    """Ray, which types are not checked against: few have it.

    Raises:
        AnchorsError: nor have we.
    """
    try:
        return import_module("ray")
    except ImportError as error:
        raise AnchorsError(
            "Ray is not installed.", "pip install 'label-anchors[cluster]'", code="package"
        ) from error


def _given_up(error: Exception, number: int) -> AnchorsError:
    what = "No process starts on the cluster" if number == COMING else f"A cell ended {TRIES} machines"
    return AnchorsError(
        f"{what}: {brief(error)}",
        "Is the same environment on every machine? A cell that takes more memory than there is ends its process, too: try a smaller "
        "--batch-size or a larger --share. What is finished is kept.",
        code="workers",
    )


@contextmanager
def connect(address: str, share: float, device: str) -> Generator[Cluster]:
    """A cluster, for as long as it is needed.

    Args:
        address: what `ray.init` takes: `auto`, HOST:PORT, `local` for one of this machine alone.
        share: GPUs that each hand gets, or CPU cores where the cluster has no GPU or `device` is `cpu`.
        device: that models are loaded to.

    Raises:
        AnchorsError: Ray is not installed, or no cluster is there.
    """
    if share <= 0:
        raise AnchorsError(
            f"--share {share:g} is no share of a machine.", "For example 1, or 0.5.", code="option-value"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = signal.getsignal(signal.SIGTERM)
    ray = _ray()
    try:
        if mine := not ray.is_initialized():
            host, _, port = address.rpartition(":")
            if host and not host.startswith("ray"):  # Ray itself goes on trying for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise AnchorsError(
            f"There is no Ray cluster at {address!r}: {brief(error)}",
            "Start one with `ray start --head`, or give --cluster HOST:PORT, or --cluster local for this machine alone. A cluster that asks "
            "for a token wants RAY_AUTH_MODE=token here, too.",
            code="workers",
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray takes it
    gpu = device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    cluster = Cluster("GPU" if gpu else "CPU", share)
    try:
        yield cluster
    finally:
        cluster.close()
        if mine:
            ray.shutdown()


@dataclass(frozen=True)
class Gathered(Inquiry):
    """A study whose cells machines of a cluster measure.

    Attributes:
        cluster: see `connect`.
        cells: what is measured, in any order.
        whole: finds what the cells left, and gives what the study's own `measure` would.
        kinds: of its runs.
        ask: asked with the folder of the results before anything is begun.
        runs: folder whose `runs` holds what is finished; by default that of the results.
        notes, files: see `Inquiry.notes_on` and `Inquiry.kept`.
    """

    cluster: Cluster
    cells: Sequence[Job]
    whole: Callable[[Path], Found]
    kinds: frozenset[str]
    ask: Callable[[Path], object] = lambda _: None
    runs: Path | None = None
    notes: Callable[[Found, Tables], list[str]] = lambda *_: []
    files: Callable[[Found], list[Path]] = lambda _: []

    def measure(self, out: Path, progress: "Progress") -> Found:
        """Cells first, each kept as it is finished; then all of it, on one machine.

        Raises:
            AnchorsError: of a cell, as it would be told here; see `Cluster.carry_out`.
        """
        self.ask(out)
        to = self.runs or out
        said = [note for folder in runs_of(to, self.kinds) for note in Run(folder, {}).mended()]
        kept = files_below(to, self.kinds)
        progress(0, len(self.cells))
        for number, done in enumerate(self.cluster.carry_out(self.cells, kept), 1):
            kept |= self._taken(done, to)
            said += [note.replace(done.place, str(to)) for note in done.value if done.place in note]
            progress(number, len(self.cells))
        (last,) = self.cluster.carry_out([self.whole], kept)
        if self._taken(last, to):
            said.append(
                "The machines of the cluster are unlike: some of what one measured was measured again on another."
            )
        return replace(last.value, notes=[*dict.fromkeys(said), *last.value.notes])

    def outlook(self, out: Path) -> "list[Outlook]":
        """Nobody here has the model to tell by.

        Raises:
            AnchorsError: always.
        """
        raise AnchorsError(
            "--dry-run is of this machine, --cluster of others.",
            "Leave one of them out.",
            code="options-together",
        )

    def notes_on(self, found: Found, tables: Tables) -> list[str]:
        """The study's own."""
        return self.notes(found, tables)

    def kept(self, found: Found) -> list[Path]:
        """The study's own, where they came to lie."""
        return self.files(found)

    def _taken(self, done: Done, to: Path) -> Files:
        """Keep what came; its error is raised after that."""
        lay(to, done.files)
        if isinstance(done.value, AnchorsError):
            raise done.value
        return done.files
