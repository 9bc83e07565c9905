"""Kill it at any moment, start it twice at once: the rows in the end are those of an undisturbed run."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from anchors.analyses.classification import Classification
from anchors.study.runner import Sample, measure
from anchors.tasks.data import read
from anchors.tasks.task import TASKS

EXAMPLES, SEEDS, KILLS = 26, (1, 2), 10

SCRIPT = f"""
import json, os, random, signal, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)

from anchors.analyses.classification import Classification
from anchors.model.language import load
from anchors.study.runner import Sample, measure
from anchors.tasks.data import read
from anchors.tasks.task import TASKS

model, out = load(sys.argv[1], device="cpu"), Path(sys.argv[2])
task, data = TASKS["sst2"], read(TASKS["sst2"])


def started(name, batch_size=1):
    '''A child that does the whole run; the parent has imported everything for it and touches nothing else.'''
    child = os.fork()
    if child:
        return child
    code = 1
    how = Sample(seeds={SEEDS}, examples={EXAMPLES}, batch_size=batch_size)
    try:
        measure(model, Classification(calibrate=True), task, data, how, out=out / name)
        code = 0
    finally:
        os._exit(code)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def written(name):
    return len(list((out / name).glob("runs/*/batch-*.parquet")))


said = {{"whole": ended(started("whole")), "kills": [], "left": []}}
chance = random.Random(7)
for _ in range({KILLS}):
    enough, child = written("killed") + chance.randint(1, 4), started("killed")
    deadline = time.monotonic() + 30
    while written("killed") < enough and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.015))
    os.kill(child, signal.SIGKILL)
    said["kills"].append(ended(child))
    said["left"].append(written("killed"))
said["killed"] = ended(started("killed"))
said["both"] = [ended(child) for child in [started("both"), started("both", 3)]]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def ran(model_directory, tmp_path_factory):
    """The folder with three runs, and what the script says of them."""
    out = tmp_path_factory.mktemp("resume")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model_directory), str(out)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def rows(ran, gpt2, monkeypatch):
    """The rows of a finished run; that nothing is left to compute is checked on the way."""

    def found(name):
        monkeypatch.setattr(Classification, "measure", lambda *_: pytest.fail("not all was computed"))
        task = TASKS["sst2"]
        sample = Sample(seeds=SEEDS, examples=EXAMPLES, batch_size=1)
        return measure(gpt2, Classification(calibrate=True), task, read(task), sample, out=ran[0] / name).rows

    return found


def none_doubled_or_lost(table):
    assert not table.duplicated(["seed", "number", "condition", "metric"]).any()
    expected = {(seed, number) for seed in SEEDS for number in range(EXAMPLES)}
    assert (
        set(table.loc[table["metric"] == "accuracy", ["seed", "number"]].itertuples(index=False, name=None))
        == expected
    )
    assert (
        table[table["number"] < 0].groupby("seed").size() == 2
    ).all()  # content-free probability of each label


def test_ten_kills_lose_nothing(ran, rows):
    _, said = ran
    assert said["whole"] == said["killed"] == 0
    assert said["kills"] == [-9] * KILLS
    # Every kill fell into the writing of batches, and there was something left to do after the last one.
    assert said["left"] == sorted(set(said["left"]))
    assert said["left"][-1] < len(SEEDS) * (EXAMPLES + 1)
    killed, whole = rows("killed"), rows("whole")
    none_doubled_or_lost(whole)
    none_doubled_or_lost(killed)
    pd.testing.assert_frame_equal(killed, whole)


def test_two_at_once_leave_each_row_once(ran, rows):
    _, said = ran
    assert said["both"] == [0, 0]
    both, whole = rows("both"), rows("whole")
    none_doubled_or_lost(both)
    pd.testing.assert_frame_equal(both, whole, rtol=1e-4, atol=1e-6)  # they cut their batches differently
