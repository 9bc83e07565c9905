"""Keys, columns and rows of small runs are those that are kept in `golden/`: see `golden_runs.py`."""

import json
from pathlib import Path

import pytest
from golden_runs import GOLDEN, difference, runs

from anchors.model.identity import software

KEPT = json.loads((GOLDEN / "keys.json").read_text())
KINDS = [kind for kind in KEPT if kind != "software"]
pytestmark = [
    pytest.mark.skipif(software() != KEPT["software"], reason=f"kept under {KEPT['software']}"),
]


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return runs(Path(tmp_path_factory.mktemp("golden")))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_moved(kind: str, studies: dict) -> None:
    assert list(studies) == KINDS
    configs, rows = studies[kind]()
    assert difference(kind, configs, rows, exact=False) is None
