"""Names that could be imported in 0.4.0 can be imported still, and do what they did."""

import re
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch
from families import make

from anchors.results import provenance, read_table

MOVED = [
    ("anchors", "read_table", "anchors.study.results"),
    ("anchors.check", "hidden_labels", "anchors.certificate.sight"),
    ("anchors.models", "fuse_gelu", "anchors.formerly"),
    ("anchors.models", "load", "anchors.model.language"),
    ("anchors.tasks.data", "SUFFIXES", "anchors.formerly"),
    ("anchors.report", "write_rows", "anchors.formerly"),
    ("anchors.runner", "out_of_memory", "anchors.study.engine"),
    ("anchors.summaries.nsa_probe", "probe_tables", "anchors.nsa.probing.tables"),
    ("anchors.injection.merge", "merge", "anchors.injection.merging.merge"),
    ("anchors.nsa.team", "Team", "anchors.training"),
]
SPEED = pd.DataFrame(
    [
        {
            "task": "a",
            "shots": 1,
            "control": "none",
            "condition": "hidden_anchor",
            "value": 2.0,
            "low": 1.5,
            "high": 2.5,
            "limit": 3.0,
            "examples": 9,
        }
    ]
)
RENAMED = [
    ("anchors.nsa", "Recipe", "anchors.nsa.training.train.Training"),
    ("anchors.nsa.probe", "Probe", "anchors.nsa.probing.probe.EpisodeProbe"),
    ("anchors.injection.anchor", "require_anchor", "anchors.injection.merging.base.require_base"),
    ("anchors.injection.demo.world", "Task", "anchors.injection.demo.world.QuestionKind"),
]
STAYED = [("anchors.injection", "tower"), ("anchors.nsa.model", "native"), ("anchors.gguf", "converted")]


@pytest.mark.parametrize(("module", "name", "now"), [(m, n, f"{home}.{n}") for m, n, home in MOVED] + RENAMED)
def test_what_moved_is_handed_on_with_a_warning(module: str, name: str, now: str) -> None:
    with pytest.warns(DeprecationWarning, match=re.escape(f"{module}.{name} is {now} now")):
        found = getattr(import_module(module), name)
    home, _, called = now.rpartition(".")
    assert found is getattr(import_module(home), called)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = import_module(module).nothing_like_it


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("module", "name"), STAYED)
def test_what_stayed_is_there(module, name):
    assert callable(getattr(import_module(module), name))


@pytest.mark.filterwarnings("ignore:.*forwards it")
def test_every_module_of_0_4_0_still_has_its_names():
    """Functions, classes and constants of all modules, as they were in 0.4.0: one line a module."""
    gone = []
    for line in (Path(__file__).parent / "names_of_0_4_0.txt").read_text().splitlines():
        module, names = line.split(": ")
        found = import_module(module)
        gone += [f"{module}.{name}" for name in names.split() if not hasattr(found, name)]
    assert not gone


@pytest.mark.filterwarnings("ignore:.*forwards it")
def test_what_moved_works(tmp_path):
    from anchors.models import fuse_gelu
    from anchors.report import write_figure, write_rows, write_tables
    from anchors.tasks.data import SUFFIXES

    model, ids = make("gpt2", 20), torch.arange(6)[None]
    before = model(ids).logits
    fuse_gelu(model)
    assert "NewGELU" not in repr(model)
    torch.testing.assert_close(model(ids).logits, before)
    assert set(SUFFIXES) == {".jsonl", ".json", ".csv", ".tsv", ".parquet"}
    rows, facts = pd.DataFrame({"value": [1.0, 2.0]}), provenance(model="a model")
    files = write_rows(tmp_path, {"flow": rows}, facts, csv=True)
    files += write_tables(tmp_path, "flow", {"summary": rows}, facts)
    assert [f.name for f in files] == ["flow.parquet", "flow.csv", "flow_summary.parquet"]
    assert all(f.is_file() for f in files)
    pd.testing.assert_frame_equal(read_table(files[2])[0], rows)
    pictures = write_figure(tmp_path, "speed", "speed", {"summary": SPEED}, "a model")
    assert [f.name for f in pictures] == ["speed.png", "speed.pdf"]
    assert all(f.stat().st_size for f in pictures)
