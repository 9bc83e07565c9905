"""How all tests are run. What they share stands in `common.py`, which a process without tests never imports."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["COLUMNS"] = "200"  # what is printed is read whole, whatever terminal the tests run in


def pytest_configure(config: pytest.Config) -> None:
    """The process that hands tests to others has no use for torch, which takes it longer to import than all it does."""
    if config.getoption("dist", "no") == "no" or config.option.collectonly:
        config.pluginmanager.import_plugin("common")


LONGEST = ("test_injection_experiment.py", "test_interpreted.py", "test_nsa_train.py")
"""Begun first: they take minutes, and one worker would be left with them at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="run what takes minutes a test, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not config.getoption("--whole"):
        later = pytest.mark.skip(reason="takes minutes: uv run pytest --whole")
        for item in items:
            if item.get_closest_marker("whole"):
                item.add_marker(later)
    import torch
    from gpu import INTERPRETED

    if INTERPRETED or not torch.cuda.is_available():
        without = pytest.mark.skip(reason="needs a CUDA device and compiled kernels")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(without)
