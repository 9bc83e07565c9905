"""Studies whose units are no prompts of tasks: foretold, measured, taken up again and drawn again as all others are."""

import json
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest
from injection_suites import build
from matplotlib.figure import Figure
from nsa_probing import EPISODES, save
from typer.testing import CliRunner

from anchors.cli import app
from anchors.injection.study import InjectFlow, InjectSweep
from anchors.injection.sweeping.tables import RETENTION
from anchors.nsa.study import NSAProbe
from anchors.study.registry import BUILT_IN

ASKED = {
    "nsa_probe": ["-n", 2, "--tokens", 150, "--classes", "2-3", "--no-interventions", "--vectors", 4, "--pages", 0],
    "inject-sweep": ["--grid", "small", "--methods", "task-arithmetic", "--strengths", "0.5,1", "--scenarios", "instruction", "--limit", 4, "--no-controls"],
    "inject-flow": ["--strengths", "1", "--experts", "instruction", "--scenarios", "instruction", "--shots", 1, "-n", 2, "--examples", 2],
}  # fmt: skip
LEFT = {"nsa_probe": [2], "inject-sweep": [7], "inject-flow": [1, 1]}
"""Prompts; five references and two settings; nobody and an expert at one λ."""


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "nsa_probe":
        folder = save(tmp_path / "model", "nsa")
        (folder / "training").mkdir()
        (folder / "training" / "run.json").write_text(json.dumps({"data": EPISODES.facts()}))
        return folder
    folder = build(tmp_path / "suite", examples=18)
    if request.param == "inject-flow":
        for path in folder.glob("*.jsonl"):
            path.write_text(path.read_text().replace('"tune"', '"demonstration"'))
        facts = json.loads((folder / "suite.json").read_text())
        (folder / "suite.json").write_text(json.dumps(facts | {"separator": " say "}))
    return folder


@pytest.mark.parametrize(("name", "source"), [(name, name) for name in ASKED], indirect=["source"])
def test_it_is_foretold_measured_taken_up_again_and_drawn_again(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mpl.rcParams, "savefig.dpi", 30)
    for slow in ("inject_flow.draw", "inject_sweep.curves"):  # drawn in tests of their own
        monkeypatch.setattr(f"anchors.figures.{slow}", lambda *_: Figure())
    line, out = BUILT_IN[name], tmp_path / "out"
    folder = out / line.folder
    command = [*line.command.split(), source, *ASKED[name], "--device", "cpu", "-o", folder]
    plan = json.loads(invoke(*command, "--dry-run", "--json"))[name]
    assert [part["left"] for part in plan] == [part["prompts"] for part in plan] == LEFT[name]
    assert all(part[what] > 0 for part in plan for what in ("tokens", "flop", "memory"))
    assert None not in [part["seconds"] for part in plan]
    assert not list(folder.rglob("*.parquet"))
    stem = line.stems[name]
    shown = json.loads(invoke(*command, "--csv", "--json"))
    assert {"files", "notes", "versions", "parts", *line.more} <= set(shown)
    rows = pd.read_parquet(folder / f"{stem}.parquet")
    assert set(line.columns) <= set(rows.columns)
    assert len(pd.read_csv(folder / f"{stem}.csv")) == len(rows)
    before = files(folder)
    assert any(path.suffix == ".png" for path in before)
    assert [part["left"] for part in json.loads(invoke(*command, "--dry-run", "--json"))[name]] == [0] * len(
        plan
    )
    for path in before:
        if path.suffix == ".png" or (
            path.suffix == ".parquet" and path.stem.removeprefix(stem).lstrip("_") in shown
        ):
            (folder / path).unlink()
    for kind in line.more:  # rows, too
        (folder / f"{line.stems[kind]}.parquet").write_bytes(before[Path(f"{line.stems[kind]}.parquet")])
    invoke("figures", line.folder, "-o", out)
    after = files(folder)
    assert set(after) == set(before)
    assert {p: c for p, c in after.items() if p.suffix == ".png"} == {
        p: c for p, c in before.items() if p.suffix == ".png"
    }
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "runs"]


def test_settings_have_the_defaults_of_what_they_make() -> None:
    assert InjectSweep().retention == RETENTION
    assert InjectSweep().on([]).wanted.grid.size == "full"
    wanted = InjectFlow(experts=("all",)).on([]).wanted
    assert (wanted.experts, wanted.strengths[0]) == (None, 0.0)
    for kind in (NSAProbe, InjectSweep, InjectFlow):
        assert BUILT_IN[kind.kind].resolve(BUILT_IN[kind.kind].settings) is kind
