"""The benchmark of NSA at sizes that Triton's interpreter can take, so that no slip waits for a GPU."""

import importlib.util
import os

import pytest
import torch

from anchors.errors import AnchorsError
from anchors.nsa.geometry import Geometry

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_interpreted.py")
TINY = Geometry(l=8, d=4, lp=16, n=2, w=8, n_local=1)
QUICK = {
    "geometry": TINY, "dtype": torch.float32, "repeats": 1, "warmups": 0, "device": "cpu", "say": lambda line: None
}  # fmt: skip


@pytest.fixture(autouse=True)
def _tiny_shape(monkeypatch):
    from anchors.nsa.speed import peers

    monkeypatch.setitem(peers.SHAPES, "tiny", (2, 1, 16, 16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    from anchors.nsa.speed.bench import bench, bench_decode

    for call in (bench, bench_decode):
        with pytest.raises(AnchorsError, match="needs a CUDA GPU"):
            call()


def test_unknown_names():
    from anchors.nsa.speed.bench import bench

    with pytest.raises(AnchorsError, match="called 'mine'"):
        bench(implementations=["mine"], device="cpu")


@needs_interpreter
def test_all_rows(tmp_path, monkeypatch):
    from anchors.nsa.speed import bench
    from anchors.study.results import read_table

    monkeypatch.setattr(bench, "SHORT", 17)
    said = []
    table = bench.bench(["tiny"], [36], ["chosen", "hot"], out=tmp_path, **QUICK | {"say": said.append})
    written, facts = read_table(tmp_path / "nsa-bench.parquet")
    assert len(written) == len(table)
    assert facts["device"] == "cpu"
    ours = table[table.implementation == "ours"]
    assert not ours.note.str.startswith("failed").any(), ours.note.tolist()
    chosen = ours[ours.pattern == "chosen"]
    both = chosen[chosen.part.isin(["cmp", "slc", "win", "all"])]
    assert both.groupby("part").direction.nunique().eq(2).all()
    assert both.part.nunique() == 4
    assert (both.error < 1e-5).all()
    assert ours.deterministic.all()
    assert set(ours[ours.pattern == "hot"].part.str.split().str[0]) == {"slc", "union", "inverse"}
    assert ours[ours.pattern == "hot"].busiest.eq(1).all()
    eager = table[table.implementation == "eager"]
    assert not eager.note.str.startswith("failed").any()
    assert (eager.error < 1e-5).all()
    full = table[(table.part == "full") & ~table.note.str.startswith("failed")]
    assert (full.error < 1e-5).all()
    for name, module in (("xunhaolai", "native_sparse_attention"), ("scalable-flash-nsa", "flash_nsa")):
        if importlib.util.find_spec(module) is None:
            notes = set(table[table.implementation == name].note)
            assert notes == {f"failed: ModuleNotFoundError: No module named '{module}'"}
    assert {"cudnn-nsa", "flash-3", "flash-4"} <= set(table.implementation)
    assert (both.floor_ms > 0).all()
    assert (both.floor_ms < both.ms).all()
    assert any("is the floor" in line for line in said)


@needs_interpreter
def test_wrong_numbers_are_not_timed(monkeypatch):
    from anchors.nsa.speed import bench, peers

    def wrong(case: peers.Case) -> list[peers.Timed]:
        o, _ = peers.exact(case, "win")
        return [
            peers.Timed("wrong", "win", lambda: o * 1.1),
            peers.Timed("wrong", "win", lambda: o, variant="right"),
        ]

    monkeypatch.setitem(peers.IMPLEMENTATIONS, "wrong", wrong)
    table = bench.bench(["tiny"], [20], ["hot"], ["wrong"], **QUICK)
    assert table.note.tolist() == ["right", "failed: relative error 1.0e-01"]
    assert table.ms.notna().tolist() == [True, False]


def test_the_figure_has_a_line_for_each():
    import pandas as pd

    from anchors.figures.nsa_bench import NAMES, draw
    from anchors.nsa.speed.peers import IMPLEMENTATIONS

    assert set(NAMES) == set(IMPLEMENTATIONS)
    assert len({(colour, marker) for _, colour, marker in NAMES.values()}) == len(NAMES)

    rows = [
        {"implementation": name, "part": part, "direction": direction, "shape": "s", "pattern": pattern, "tokens": length,
         "ms": length * factor, "iqr": 0.1}
        for length in (2048, 1024)
        for direction, factor in (("forward", 1.0), ("backward", 3.0))
        for name, part, pattern in (
            ("ours", "all", "chosen"), ("ours", "slc", "chosen"), ("ours", "cmp", "chosen"), ("ours", "slc", "hot"),
            ("sdpa-cudnn", "full", "chosen"),
        )
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    table.loc[table.implementation == "sdpa-cudnn", "ms"] = None
    figure = draw(table, "model")
    assert [axes.get_title() for axes in figure.axes] == ["forward", "backward"]
    for axes, factor in zip(figure.axes, (1.0, 3.0), strict=True):
        lines = [container.lines[0] for container in axes.containers]
        assert [line.get_linestyle() for line in lines] == ["-", "--"]
        for line in lines:
            assert line.get_xdata().tolist() == [1024, 2048]
            assert line.get_ydata().tolist() == [1024 * factor, 2048 * factor]


@needs_interpreter
def test_decode_rows(tmp_path):
    from anchors.nsa.speed.bench import bench_decode

    table = bench_decode("tiny", [40], [1], out=tmp_path, **QUICK)
    assert (tmp_path / "nsa-decode.parquet").is_file()
    assert table.implementation.tolist()[0] == "ours"
    assert not table.note.iloc[0]
    assert table.ms.iloc[0] > 0
