"""The tiny world of `anchors inject demo`, built once per test run by whichever worker asks for it first.

Import the fixture where it is used: `from injection_world import tiny  # noqa: F401`.
"""

from pathlib import Path

import pytest
import torch
from filelock import FileLock

from anchors.injection.demo.build import Builder
from anchors.injection.demo.scales import TINY

SEED = 0


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder of the tiny world: base, vlm, experts and suite. All tests share it: only read it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "injection-world"
    with FileLock(f"{folder}.lock"):  # the workers of a run share the folder above their own
        Builder(folder, TINY, SEED, torch.device("cpu"), upper=False).build()
    return folder
