"""A grid on a real Ray cluster: two machines on this host beside a head without room, one of them killed while it measures."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from anchors import AnchorsError, load
from anchors.analyses.readout import Readout
from anchors.analyses.reweighting import Reweighting
from anchors.model.source import Source
from anchors.study.prompted import Far, Part, Prompted
from anchors.study.report import conclude
from anchors.study.results import write_atomic
from anchors.study.runner import Sample
from anchors.tasks.data import read
from anchors.tasks.task import task

ray = pytest.importorskip(
    "ray", reason="needs the extra `cluster`: uv run --extra cluster pytest tests/test_cluster.py"
)


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
        )
        for _ in range(2):
            cluster.add_node(num_cpus=1, num_gpus=0)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def address(machines: Any) -> str:
    return machines.address


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parts_of(**how) -> list[Part]:
    return [
        Part(analysis, task(name), read(task(name)), Sample(seeds=(1, 2), examples=5, **how))
        for analysis, name in ((Readout(), "trec"), (Reweighting(per_class=1, epochs=1), "sst2"))
    ]


def its_machine_dies(cell, mark: Path, out: Path):
    """A cell that is all but finished when its machine is gone, the first time."""
    found = cell(out)
    if not mark.exists():
        write_atomic(mark, lambda draft: draft.write_text(ray.get_runtime_context().get_node_id()))
        time.sleep(600)
    return found


@contextmanager
def killing(machines: Any, mark: Path) -> Iterator[None]:
    """Inside, the machine whose name is in a file is gone as soon as the file is there."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            if mark.exists():
                (node,) = (n for n in machines.list_all_nodes() if n.node_id == mark.read_text())
                machines.remove_node(node, allow_graceful=False)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def by_name(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob("runs/*/*")}


def test_a_machine_dies_and_the_rows_are_the_same(machines, address, model_directory, tmp_path, caplog):
    from anchors.study.cluster import connect

    source = Source(str(model_directory), "cpu")
    here = conclude(Prompted(load(source.model, device="cpu"), parts_of()), out=tmp_path / "here")
    heard = []
    with connect(address, 1, "cpu") as cluster, killing(machines, tmp_path / "mark"):
        inquiry = Far(cluster, source).inquiry(parts_of(), tmp_path / "far", frozenset())
        assert len(inquiry.cells) == 4
        dying = [*inquiry.cells[:-1], partial(its_machine_dies, inquiry.cells[-1], tmp_path / "mark")]
        far = conclude(
            replace(inquiry, cells=dying), out=tmp_path / "far", progress=lambda *told: heard.append(told)
        )
        waited = time.monotonic() + 60
        while cluster.room() != 1:  # its death is told after its work is given to others
            assert time.monotonic() < waited
            time.sleep(0.2)
    assert (tmp_path / "mark").exists()
    assert "a machine was lost" in caplog.text
    assert heard == [(done, 4) for done in range(5)]
    assert {p.name for p in far.files} == {p.name for p in here.files}
    assert (far.notes, far.sentences) == (here.notes, here.sentences)
    for name, table in here.tables.items():
        pd.testing.assert_frame_equal(far.tables[name], table, check_exact=True)
    for file in (p for p in here.files if p.suffix == ".parquet"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(tmp_path / "far" / file.name), pd.read_parquet(file), check_exact=True
        )
    same, other = by_name(tmp_path / "here"), by_name(tmp_path / "far")
    assert {n: b for n, b in same.items() if "batch-" in n} == {
        n: b for n, b in other.items() if "batch-" in n
    }
    assert same.keys() == other.keys()


def test_stopped_and_begun_again(address, model_directory, tmp_path):
    """Ctrl-C keeps finished cells and lets the machines go; the same command measures the others; with nothing left, nothing is new."""
    command = [
        sys.executable, "-c", "from anchors.cli import main; main()", "run", "figure5", "-n", "40", "--seeds", "1,2,3", "--task", "sst2,trec",
        "--model", model_directory, "--device", "cpu", "--cluster", address, "-o", tmp_path,
    ]  # fmt: skip
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while first.poll() is None and not list(tmp_path.glob("runs/*/batch-*")):
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 130, said
    assert "of 6 are kept; the same command goes on from there" in " ".join(said.split())
    kept = by_name(tmp_path)
    subprocess.run(command, check=True)
    done = by_name(tmp_path)
    assert kept.items() < done.items()
    assert (
        len(
            pd.read_parquet(tmp_path / "figure5" / "readout.parquet")[
                ["task", "seed", "number"]
            ].drop_duplicates()
        )
        > 239
    )


def test_what_a_cell_says(address, model_directory, tmp_path):
    from anchors.study.cluster import connect

    parts = parts_of(shots=8)
    with pytest.raises(AnchorsError) as here:
        conclude(Prompted(load(model_directory, device="cpu"), parts), out=tmp_path)
    with connect(address, 1, "cpu") as cluster:
        inquiry = Far(cluster, Source(str(model_directory), "cpu")).inquiry(parts, tmp_path, frozenset())
        with pytest.raises(AnchorsError) as far:
            conclude(inquiry, out=tmp_path)
        with pytest.raises(AnchorsError, match="No machine of the cluster has 8 CPU"):
            conclude(replace(inquiry, cluster=replace(cluster, share=8, idle=[])), out=tmp_path)
    assert (far.value.message, far.value.remedy, far.value.code) == (
        here.value.message,
        here.value.remedy,
        here.value.code,
    )


def test_no_cluster():
    from anchors.study.cluster import connect

    with (
        pytest.raises(AnchorsError, match=r"There is no Ray cluster at '127.0.0.1:1'"),
        connect("127.0.0.1:1", 1, "cpu"),
    ):
        pass


def test_a_sweep_is_shared_out(address, tmp_path):
    """By suite, scenario and every eighth setting; after the machine of the first test is gone, by one machine."""
    from injection_suites import build

    from anchors.injection.asking.suite import Suite
    from anchors.injection.study import InjectSweep
    from anchors.study.cluster import connect

    wanted = InjectSweep(
        grid="small", methods=("task-arithmetic",), strengths=(0.5, 1.0), limit=2, scenarios=("instruction",)
    )
    sweep = wanted.on([Suite.open(build(tmp_path))], "cpu")
    here = conclude(sweep, out=tmp_path / "here")
    with connect(address, 1, "cpu") as cluster:
        gathered = sweep.gathered(cluster)
        assert len(gathered.cells) == 8
        far = conclude(gathered, out=tmp_path / "far")
    assert by_name(tmp_path / "here").keys() == by_name(tmp_path / "far").keys()
    assert (far.notes, far.sentences) == (here.notes, here.sentences)
    for name, table in here.tables.items():
        pd.testing.assert_frame_equal(far.tables[name], table, check_exact=True)
