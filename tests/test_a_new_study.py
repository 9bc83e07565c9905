"""A study that another package brings: one file, one entry point, and everything else derives from its line."""

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from anchors.cli import app
from anchors.errors import AnchorsError
from anchors.study import registry
from anchors.study.registry import STUDIES, study
from anchors.summaries import SUMMARIES
from anchors.tasks.data import read
from anchors.tasks.drawing import Draw, draw
from anchors.tasks.task import TASKS

FILE = '''
from dataclasses import dataclass, field
from typing import ClassVar

from anchors.study.analysis import Record
from anchors.study.registry import Study

STUDY = Study(
    "attended", "attended:Attended", "How much of the target's attention goes to label words, by layer.", metrics=("share",)
)


@dataclass(frozen=True)
class Attended:
    """The attention that the target pays to the label words [p_1, p_2], mean over heads.

        share_l = 1/H Σ_h Σ_k A_{h,l}(q, p_k)

    Attributes:
        layers: which layers, e.g. 0,2; default: all of them.
    """

    kind: ClassVar[str] = "attended"
    version: ClassVar[int] = 1
    fresh: ClassVar[bool] = False

    layers: tuple[int, ...] | None = field(default=None, metadata={"min": 0})
    passes = 1.0

    def prepare(self, model, cell):
        from anchors.context import encode, shared_demonstrations

        return encode(model, shared_demonstrations([drawn.prompt for drawn in cell.prompts]))

    def once(self, model, state, cell):
        return []

    def measure(self, model, state, task, batch):
        import torch

        from anchors.attention.seam import seam
        from anchors.context import answer, queries
        from anchors.readout import TargetAttention

        asked = queries([drawn.prompt for drawn in batch], len(state.ids), model.device)
        places = torch.tensor([drawn.prompt.label_positions for drawn in batch])
        probe = TargetAttention(frozenset(self.layers or range(model.n_layers)), asked.target, places)
        with seam(model.modules, probes=[probe]):
            answer(model, state, asked)
        shares = {layer: found.sum(1) / model.heads[layer] for layer, found in probe.found.items()}
        return [
            [Record("share", float(own[i]), layer=layer) for layer, own in shares.items()] for i in range(len(batch))
        ]
'''


def invoke(*arguments: object):
    return CliRunner().invoke(
        app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "160"}
    )


def install(folder: Path, package: str, points: dict[str, str]) -> None:
    """A package's entry points, as an installer leaves them."""
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (about / "entry_points.txt").write_text("\n".join([f"[{registry.PLUGINS}]", *lines]) + "\n")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The file and its entry point on the path, gone again afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "attended.py").write_text(FILE)
    install(folder, "attention-share", {"attended": "attended:STUDY"})
    monkeypatch.syspath_prepend(folder)
    registry.plugins.cache_clear()
    yield folder
    registry.plugins.cache_clear()
    sys.modules.pop("attended", None)


@pytest.fixture
def tiny(model_directory: Path) -> list[object]:
    return ["attended", "--model", model_directory, "--device", "cpu", "-t", "sst2,trec", "-n", 4]


def said(text: str) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_it_is_a_verb_with_its_options(installed):
    listed = invoke("--help")
    assert listed.exit_code == 0
    assert "attended How much of the target's attention goes to label words, by layer." in said(listed.stdout)
    shown = invoke("attended", "--help")
    assert shown.exit_code == 0, shown.output
    text = said(shown.stdout)
    assert "the label words [p_1, p_2], mean over heads." in text  # not taken for markup
    assert "share_l = 1/H Σ_h Σ_k A_{h,l}(q, p_k)" in text
    assert "--layers <str> Which layers, e.g. 0,2; default: all of them." in text
    assert "--shots" in text
    assert "default: results/attended." in text
    assert "--dry-run" in text
    assert "attended" in STUDIES
    assert "attended" in SUMMARIES
    assert study("attended").home == "attention-share"


def test_it_is_foretold_measured_tabulated_drawn_and_taken_up_again(
    installed, tiny, model_directory, tmp_path
):
    out = tmp_path / "out"
    foretold = invoke(*tiny, "-o", out, "--dry-run", "--json")
    assert foretold.exit_code == 0, foretold.output
    plan = json.loads(foretold.stdout)["attended"]
    assert [(part["task"], part["left"], part["prompts"]) for part in plan] == [
        ("sst2", 4, 4),
        ("trec", 4, 4),
    ]
    assert all(
        part["seconds"] >= 0 and part["tokens"] > 4 and part["flop"] > 0 and part["memory"] > 0
        for part in plan
    )
    assert not [p for p in out.rglob("*") if p.is_file()]
    assert "What is left to do" in invoke(*tiny, "-o", out, "--dry-run").stdout

    done = invoke(*tiny, "-o", out, "--csv")
    assert done.exit_code == 0, done.output
    rows = pd.read_parquet(out / "attended.parquet")
    table = pd.read_parquet(out / "attended_summary.parquet")
    assert {p.name for p in out.glob("attended*.p*")} == {
        "attended.parquet", "attended_summary.parquet", "attended.png", "attended.pdf"
    }  # fmt: skip
    assert len(pd.read_csv(out / "attended.csv")) == len(rows)
    assert Image.open(out / "attended.png").size[0] > 300
    shares = rows[rows["metric"] == "share"]
    for (task, layer), part in shares.groupby(["task", "layer"]):
        (row,) = table[(table["task"] == task) & (table["layer"] == layer)].to_dict(orient="records")
        assert row["value"] == pytest.approx(part["value"].mean())
        assert row["low"] <= row["value"] <= row["high"]
        assert f"{row['value']:.2f}".removeprefix("0") in done.stdout
    assert _by_itself(model_directory, "sst2", 4) == pytest.approx(
        shares[shares["task"] == "sst2"].sort_values(["number", "layer"])["value"].tolist(), rel=1e-4
    )

    before = {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*") if p.is_file()}
    again = invoke(*tiny, "-o", out, "--json")
    assert again.exit_code == 0, again.output
    assert {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*") if p.is_file()} == before
    assert len(json.loads(again.stdout)["summary"]) == len(table)
    left = json.loads(invoke(*tiny, "-n", 6, "-o", out, "--dry-run", "--json").stdout)["attended"]
    assert [(part["left"], part["prompts"]) for part in left] == [(2, 6), (2, 6)]

    other = invoke(*tiny, "--layers", "0,2", "-o", out, "--json")
    assert {row["layer"] for row in json.loads(other.stdout)["summary"]} == {0, 2}
    assert invoke(*tiny, "--layers", "x", "-o", out).exit_code == 2


def _by_itself(folder: Path, task: str, count: int) -> list[float]:
    """The same shares from the attention that transformers itself returns, of whole prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for drawn in draw(TASKS[task], read(TASKS[task]), tokenizer, Draw(fresh=False), count):
        prompt = drawn.prompt
        with torch.no_grad():
            patterns = model(torch.tensor([prompt.ids]), output_attentions=True).attentions
        found += [float(own[0, :, -1, list(prompt.label_positions)].sum(-1).mean()) for own in patterns]
    return found


def test_its_picture_is_drawn_again_from_its_rows(installed, tiny, tmp_path):
    out = tmp_path / "results"
    assert invoke(*tiny, "-o", out / "attended").exit_code == 0
    picture = out / "attended" / "attended.png"
    before = picture.read_bytes()
    picture.unlink()
    drawn = invoke("figures", "attended", "-o", out)
    assert drawn.exit_code == 0, drawn.output
    assert picture.read_bytes() == before


BROKEN = {
    "no such module": ("no_such_module:STUDY", "No module named 'no_such_module'"),
    "no such line": ("attended:NOTHING", "has no attribute 'NOTHING'"),
    "no line": ("attended:Attended", "is no anchors.study.registry.Study"),
    "another name": ("attended:STUDY", "calls itself 'attended'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_one_is_named_in_a_sentence_and_the_others_go_on(case, installed):
    value, why = BROKEN[case]
    install(installed, "broken-package", {"broken": value})
    listed = invoke("--help")
    assert listed.exit_code == 0
    assert "note: The study 'broken' of broken-package is left out: " in said(listed.stderr)
    assert why in said(listed.stderr)
    assert said(listed.stderr).count("note:") == 1
    assert " attended " in listed.stdout
    assert " broken " not in listed.stdout
    with pytest.raises(AnchorsError, match="broken-package"):
        study("broken")


def test_a_broken_class_is_named_when_it_is_asked_for(installed, monkeypatch):
    (installed / "late.py").write_text(
        "from anchors.study.registry import Study\nSTUDY = Study('late', 'no_such_module:Class', 'Comes late.')\n"
    )
    install(installed, "late-package", {"late": "late:STUDY"})
    assert "late Comes late." in said(invoke("--help").stdout)
    result = invoke("late", "--help")
    assert result.exit_code == 2
    assert "The study 'late' of late-package cannot be used" in said(result.stderr)


def test_a_name_that_is_taken_is_refused(installed):
    install(installed, "taker", {"flow": "attended:STUDY", "run": "runs:STUDY"})
    (installed / "runs.py").write_text(
        "from anchors.study.registry import Study\nSTUDY = Study('run', 'attended:Attended', 'Nothing.')\n"
    )
    listed = invoke("--help")
    text = said(listed.stderr)
    assert "The study 'flow' of taker is left out: label-anchors has a study of that name." in text
    assert "The study 'run' of taker has no verb: there is another one of that name." in text
    assert study("flow").settings == "anchors.analyses.flow:InformationFlow"
    assert "Run experiments" in said(listed.stdout)


def test_a_name_that_nobody_knows_gets_the_nearest_one(installed):
    with pytest.raises(AnchorsError, match="Did you mean 'isolate'"):
        study("isolat")
    result = invoke("isolat")
    assert result.exit_code == 2
    assert "Did you mean 'isolate'" in said(result.stderr)
    assert "attended" in said(invoke("attendedd").stderr)


def test_a_setting_that_every_verb_has_is_refused(installed):
    (installed / "twice.py").write_text(
        FILE.replace("attended", "twice")
        .replace("layers: tuple", "seeds: tuple")
        .replace("self.layers", "self.seeds")
    )
    install(installed, "twice-package", {"twice": "twice:STUDY"})
    result = invoke("twice", "--help")
    assert result.exit_code == 2
    assert "The study 'twice' of twice-package has a setting '--seeds', as every verb has." in said(
        result.stderr
    )
