"""No table of any study is made of two runs, or of two models, at once."""

import pandas as pd
import pytest
from made_rows import (
    aimed,
    attended,
    classified,
    compressed,
    diagnosed,
    isolated,
    mapped,
    probed,
    reweighted,
    rows,
    timed,
    worded,
)
from test_causal import made_rows as patched
from test_injection_flow_report import made as flowed
from test_injection_tables import TRUTH
from test_injection_tables import made as swept

from anchors.errors import AnchorsError
from anchors.injection.image_flow.tables import tables as flow_tables
from anchors.injection.sweeping.tables import tables as sweep_tables
from anchors.stats import REST, SUMS
from anchors.study.registry import BUILT_IN

LABELS = ["yes", "no"]
SUMS_OF_FLOW = [(n, "none", layer, m, n + 1.0) for n in range(3) for layer in (0, 1) for m in (*SUMS, REST)]
ROWS = {
    "flow": lambda: rows(SUMS_OF_FLOW),
    "map": lambda: rows(mapped("ab", ["label", "target"])),
    "classify": lambda: rows(classified(LABELS)),
    "isolate": lambda: rows(isolated()),
    "words": lambda: rows(worded(LABELS)),
    "readout": lambda: rows(attended([n % 2 for n in range(12)])),
    "reweight": lambda: rows(reweighted(LABELS)),
    "compress": lambda: rows(compressed()),
    "speed": lambda: rows(timed()),
    "diagnose": lambda: rows(diagnosed(LABELS)),
    "causal": lambda: patched([[4, 3, 0], [1, 0, 0]], [4, 1], [1, 0], [[1, 0, 0], [1, 1, 1]]),
    "flow_prompts": lambda: rows(aimed(["a", " b", "c"])),
    "nsa_probe": probed,
    "inject-sweep": lambda: swept(TRUTH).rows,
    "inject-flow": lambda: flowed().rows,
}


def tabulate(kind: str, own: pd.DataFrame) -> object:
    if kind == "inject-sweep":
        return sweep_tables(own, swept(TRUTH).settings, resamples=5)
    if kind == "inject-flow":
        return flow_tables(own, resamples=5)
    return BUILT_IN[kind].tabulate(own)


def test_every_study_is_here():
    assert set(ROWS) == set(BUILT_IN)


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_two_runs_are_refused(kind):
    own = ROWS[kind]()
    assert tabulate(kind, own)
    with pytest.raises(AnchorsError, match="stand there more than once"):
        tabulate(kind, pd.concat([own, own], ignore_index=True))


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_two_models_are_refused(kind):
    own = ROWS[kind]()
    with pytest.raises(AnchorsError, match="of several models"):
        tabulate(kind, pd.concat([own.assign(model=name) for name in ("one", "other")], ignore_index=True))
