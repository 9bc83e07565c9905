"""What lies under a folder and is no rows of a study: shown in `anchors ls` and `anchors report` all the same."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from anchors.booklet import section, write_booklet
from anchors.cli import app
from anchors.collection import gather
from anchors.errors import AnchorsError
from anchors.leavings import everything
from anchors.study.results import provenance, read_table, write_table
from anchors.summaries.training import held_out

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def trained(folder: Path, seed: int, last: int = 4, attention: str = "nsa") -> Path:
    """A folder with the log of a training: losses fall with the step, and the last evaluation is not at the last step."""
    log = [(step, "train", "label_loss", "all", 3 / step) for step in range(1, last + 2)]
    for step in (last // 2, last):
        for place, bucket in enumerate(("all", "1-2", "3-4")):
            log += [(step, "held_out", "label_loss", bucket, 2 / step + place)]
            log += [
                (step, "held_out", "accuracy", bucket, step / 10),
                (step, "held_out", "knowable", bucket, 0.9),
            ]
    table = pd.DataFrame(log, columns=["step", "split", "metric", "bucket", "value"])
    facts = provenance(model={"attention": attention}, data={}, recipe={"seed": seed}, device="cpu")
    write_table(folder / "training" / "log.parquet", table, facts)
    return folder


def test_trainings_and_their_curves_are_shown(tmp_path: Path) -> None:
    folders = [trained(tmp_path / f"run-{seed}", seed) for seed in (0, 1)]
    made = CliRunner().invoke(
        app, ["nsa", "curves", *map(str, folders), "-o", str(tmp_path / "nsa" / "mine")]
    )
    assert made.exit_code == 0, made.output
    assert gather([tmp_path]) == []
    found = everything([tmp_path])
    assert [own.name for own in found] == ["nsa-curves", "nsa-train", "nsa-train"]
    assert [own.facts["model"] for own in found] == [
        "nsa attention",
        "run-0, nsa attention",
        "run-1, nsa attention",
    ]
    curves, one, _ = map(section, found)
    assert list(curves.figures) == ["mine.png"]
    assert list(one.figures) == ["loss.png"]
    columns, rows, total = one.tables["summary"]
    assert columns == ["step", "demonstration", "label_loss", "accuracy", "knowable"]
    assert rows == [
        ["4", "all", "0.5", "0.4", "0.9"],
        ["4", "1-2", "1.5", "0.4", "0.9"],
        ["4", "3-4", "2.5", "0.4", "0.9"],
    ]
    assert curves.tables["summary"][2] == 2 * total
    listed = CliRunner().invoke(app, ["ls", "-o", str(tmp_path)], env={"COLUMNS": "140"}).stdout
    assert "run-1, nsa attention" in listed
    text = write_booklet(tmp_path, found, tmp_path)[0][1].read_text()
    assert text.count("## nsa-train: ") == 2
    assert "log.parquet" not in text  # no table is cut


def test_seeds_may_end_at_different_steps(tmp_path: Path) -> None:
    logs = [
        read_table(trained(tmp_path / str(seed), seed, last) / "training" / "log.parquet")[0].assign(
            run="a", seed=seed
        )
        for seed, last in ((0, 4), (1, 8))
    ]
    found = held_out(pd.concat(logs)).set_index(["seed", "demonstration"])
    assert found["step"].groupby("seed").unique().explode().tolist() == [4, 8]
    assert found.loc[(1, "all"), "label_loss"] == 0.25


def test_times_are_shown() -> None:
    found = everything([EXPERIMENTS / "nsa" / "bench"])
    assert [own.stem for own in found] == ["nsa-bench-64", "nsa-bench-patterns", "nsa-bench"]
    assert set(found[-1].made) == {"nsa-bench", "nsa-decode"}
    for own in found:
        assert own.facts["model"] == f"attention alone on {own.facts['device']}"
    assert list(section(found[-1]).figures) == ["nsa-bench.png"]


def test_tables_without_their_rows_are_shown_as_they_are(tmp_path: Path) -> None:
    """Under the names of 0.4.0, too: flow through a merge was written as `flow-NAME`, and its rows are not in the repository."""
    folder = tmp_path / "flow"
    shutil.copytree(EXPERIMENTS / "injection" / "flow", folder)
    write_table(folder / "flow-mine.parquet", pd.DataFrame({"x": [1]}), {})
    (own,) = everything([folder])
    assert own.name == "inject-flow"
    assert own.facts["model"] == "tiny-0, tiny-1, tiny-2, tiny-3"
    assert set(own.made) == {"accuracy", "choices", "damage", "layers", "regret"}
    pd.testing.assert_frame_equal(own.made["regret"], read_table(folder / "flow-regret.parquet")[0])
    shown = section(own)
    assert len(shown.sentences) == 2
    assert shown.figures["flow-regret.png"] == (folder / "flow-regret.png").read_bytes()
    assert ("note", "The rows are not there: these are the tables as they were written.") in shown.about()


def test_a_sweep_without_its_settings_is_left_out_and_said(tmp_path: Path) -> None:
    for suffix in ("parquet", "json"):
        shutil.copy(EXPERIMENTS / "injection" / "sweep" / f"inject_sweep.{suffix}", tmp_path)
    with pytest.raises(AnchorsError, match="those of settings are not there") as refused:
        section(*everything([tmp_path]))
    assert refused.value.remedy == "Run `anchors inject sweep` again, with the same --out."
