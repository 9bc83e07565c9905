"""Several devices: a process beside this one on the CPU, with the same rows bit for bit, also where it ends or has no room."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from injection_suites import build
from nsa_probing import EPISODES, save

from anchors import AnchorsError, load
from anchors.analyses.readout import Readout
from anchors.analyses.reweighting import Reweighting
from anchors.injection.asking.suite import Suite
from anchors.injection.study import InjectFlow, InjectSweep
from anchors.model.source import Source
from anchors.nsa.probing.probe import EpisodeProbe, with_geometry
from anchors.nsa.probing.probe import measure as probe
from anchors.study import runner
from anchors.study.cluster import lay
from anchors.study.engine import Lot, silent, work
from anchors.study.helpers import helped, helpers
from anchors.study.results import Run
from anchors.study.runner import Sample, measure
from anchors.tasks.data import read
from anchors.tasks.task import task


@pytest.fixture(scope="module")
def source(model_directory) -> Source:
    return Source(str(model_directory), "cpu")


@pytest.fixture(scope="module", autouse=True)
def beside(source) -> Iterator[None]:
    """One process for all of these tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with helped(("cpu", "cpu"), source):
        yield
    torch.set_num_threads(before)


def runs(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob("runs/*/*.parquet")}


@pytest.mark.parametrize("analysis", [Readout(), Reweighting(per_class=1, epochs=1)], ids=lambda a: a.kind)
def test_every_batch_has_the_same_rows(analysis, source, tmp_path, monkeypatch):
    sst2 = task("sst2")
    asked = analysis, sst2, read(sst2), Sample(seeds=(1, 2), examples=12, batch_size=2)
    model = load(source.model, device="cpu")
    shared = measure(model, *asked, out=tmp_path / "shared")
    monkeypatch.setattr("anchors.study.runner.helpers", lambda: None)
    alone = measure(model, *asked, out=tmp_path / "alone")
    pd.testing.assert_frame_equal(shared.rows, alone.rows, check_exact=True)
    assert runs(tmp_path / "shared") == runs(tmp_path / "alone")
    assert len(runs(tmp_path / "alone")) == 2 * (6 + 1)


def probed(place: Path, out: Path) -> None:
    model = with_geometry(load(str(place), device="cpu"), n=3)
    probe(model, EpisodeProbe(EPISODES, prompts=3, interventions=False), out=out)


def swept(place: Path, out: Path) -> None:
    wanted = InjectSweep(grid="small", methods=("task-arithmetic",), strengths=(0.5, 1.0), limit=2)
    wanted.on([Suite.open(place)], "cpu").measure(out, silent)


def flowed(place: Path, out: Path) -> None:
    wanted = InjectFlow(strengths=(0.5,), prompts=3, examples=3, shots=0, experts=("instruction",))
    wanted.on([Suite.open(place)], "cpu").measure(out, silent)


@pytest.mark.parametrize("study", [probed, swept, flowed], ids=lambda study: study.__name__)
def test_every_study_is_shared(study, tmp_path, monkeypatch):
    """Every unit's file holds the same bytes as without help."""
    place = save(tmp_path / "model", "nsa") if study is probed else build(tmp_path, examples=18)
    given, submit = [], ProcessPoolExecutor.submit
    monkeypatch.setattr(ProcessPoolExecutor, "submit", lambda *a: given.append(a) or submit(*a))
    for name, crew in (("shared", replace(helpers(), source=Source(str(place), "cpu"))), ("alone", None)):
        for user in ("anchors.study.engine", "anchors.nsa.probing.probe"):
            monkeypatch.setattr(f"{user}.helpers", lambda crew=crew: crew)
        study(place, tmp_path / name)
    assert given
    assert runs(tmp_path / "shared") == runs(tmp_path / "alone")


def lots(how: str, mark: Path, run: Run | None = None, device: str = "") -> list[Lot]:
    """Eight units by fours; `device` is empty in the process that asks."""
    if device and how == "unmade":
        raise AnchorsError("No.", "Yes.", code="memory")

    def one(_: None, units: Sequence[tuple]) -> pd.DataFrame:
        if device and how == "ends" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if device and how == "narrow" and len(units) > 1:
            raise RuntimeError("CUDA out of memory")
        if device and how == "refused":
            raise AnchorsError("No.", "Yes.", code="memory")
        return pd.DataFrame(
            {"seed": 0, "number": [n for _, n in units], "where": device, "at once": len(units)}
        )

    units = [(0, number) for number in range(8)]
    batches = lambda left: (left[start : start + 4] for start in range(0, len(left), 4))  # noqa: E731
    return [Lot(units, lambda: None, one, lambda _: AnchorsError("large"), batches)]


def done(how: str, folder: Path) -> pd.DataFrame:
    run, mark = Run.open(folder, how, {"kind": how}), folder / "mark"
    return work(run, lots(how, mark), anew=partial(lots, how, mark)).sort_values("number")


def test_out_of_memory_there_halves_the_batch_there(tmp_path):
    rows = done("narrow", tmp_path)
    assert rows["where"].tolist() == ["cpu"] * 4 + [""] * 4
    assert rows["at once"].tolist() == [1] * 4 + [4] * 4


@pytest.mark.parametrize("how", ["refused", "unmade"])
def test_an_error_there_says_what_it_says_here(how, tmp_path):
    with pytest.raises(AnchorsError) as told:
        done(how, tmp_path)
    assert (told.value.message, told.value.remedy, told.value.code) == ("No.", "Yes.", "memory")


def test_prompts_come_along(source, tmp_path, monkeypatch):
    """Drawn anew by everyone, they would take longer than they are helped with."""
    sst2 = task("sst2")
    asked = Readout(), sst2, read(sst2), Sample(examples=4)
    model = load(source.model, device="cpu")
    run = measure(model, *asked, out=tmp_path)
    cells, _ = runner._cells(model, *asked, tmp_path)
    monkeypatch.setattr(runner, "draw", lambda *_, **__: pytest.fail("drawn anew"))
    (lot,) = runner._lots_of(source, *asked, cells, Run(run.folder, run.config), "cpu")
    assert lot.units == [(42, number) for number in range(4)]


def test_a_process_that_ended_before_is_asked_nothing(tmp_path, caplog):
    with helped(("cpu", "cpu")):
        (pool,) = helpers().processes.values()
        os.kill(pool.submit(os.getpid).result(), signal.SIGKILL)
        with pytest.raises(BrokenProcessPool):
            pool.submit(time.sleep, 60).result()
        rows = done("plain", tmp_path)
        assert helpers() is None
    assert set(rows["where"]) == {""}
    assert caplog.messages == ["the process on cpu (1) ended; the others measure what it had in hand"]


def test_devices_of_two_types_are_refused(source):
    with pytest.raises(AnchorsError, match="of several types"), helped(("cpu", "cuda:0"), source):
        pass


def test_a_process_that_ends_loses_one_batch(tmp_path, caplog):
    """The last of these: nobody helps after it."""
    rows = done("ends", tmp_path)
    assert rows["number"].tolist() == list(range(8))
    assert set(rows["where"]) == {""}
    assert caplog.messages == ["the process on cpu (1) ended; the others measure what it had in hand"]
    assert (tmp_path / "mark").exists()
    assert helpers() is None


@pytest.mark.parametrize("name", ["../beside.parquet", "runs/../../beside.parquet", "/beside.parquet"])
def test_files_of_other_machines_stay_inside(name, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(AnchorsError, match="outside of the results") as refused:
        lay(out, {"runs/a/batch-0.parquet": b"1", name: b"2"})
    assert refused.value.code == "outside"
    assert list(tmp_path.rglob("*.parquet")) == []
    lay(out, {"runs/a/batch-0.parquet": b"1"})
    assert runs(out) == {"runs/a/batch-0.parquet": b"1"}
