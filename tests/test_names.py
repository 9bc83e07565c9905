"""The first page of names, what was on it before, and two checkouts that must not run as one."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import anchors
import anchors.injection
import anchors.nsa

ROOT = Path(__file__).parents[1]
IN_0_4_0 = (
    "SUMMARIES AnchorCache AnchorsError Beta Causal Classification Compression Diagnosis Draw Edit FlowMap "
    "InformationFlow Isolation LanguageModel Measured Prompt Readout Reweighting Sample Speed Task TopWords ban build "
    "draw flow_summary from_text isolate load measure read read_table scale seam sentence summarise task"
)
NSA_IN_0_4_0 = (
    "MLP Branches Episodes Geometry Intervention LinearPool MeanPool NSACache NSACall NSAConfig NSAForCausalLM "
    "NativeSparseAttention Probe Recipe Trace Watch captured compress nsa_attention nsa_decode trace"
)
NSA_RENAMED = {"Probe": "EpisodeProbe", "Recipe": "Training"}
INJECTION_IN_0_4_0 = "METHODS Recipe Suite TaskVectors inject inspect load_vlm merge_tensor tower"


def test_the_first_page_is_short_and_says_its_version() -> None:
    names = dir(anchors)
    assert 15 <= len(names) <= 25
    assert {"load", "task", "read", "measure", "Isolation", "AnchorsError", "__version__"} <= set(names)
    assert not {"Path", "lazy_loader", "forwarding", "SUMMARIES"} & set(names)
    assert f'version = "{anchors.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
    assert all(getattr(anchors, name) is not None for name in names)


@pytest.mark.parametrize("name", IN_0_4_0.split())
def test_every_name_of_0_4_0_can_still_be_imported(name: str) -> None:
    if name in dir(anchors):
        assert getattr(anchors, name)
        return
    with pytest.warns(DeprecationWarning, match=rf"anchors\.{name} is ([\w.]+)\.{name} now") as caught:
        value = getattr(anchors, name)
    assert caught[0].filename == __file__
    home = importlib.import_module(
        str(caught[0].message).split(" is ")[1].split(" now")[0].rpartition(".")[0]
    )
    assert value is getattr(home, name)


@pytest.mark.parametrize(
    ("package", "names"), [(anchors.nsa, NSA_IN_0_4_0), (anchors.injection, INJECTION_IN_0_4_0)]
)
def test_the_rooms_names_are_whole(package: object, names: str) -> None:
    now = [NSA_RENAMED.get(n, n) if package is anchors.nsa else n for n in names.split()]
    assert sorted(now) == dir(package)
    assert all(getattr(package, name) is not None for name in now)


def test_what_never_was_a_name_is_an_attribute_error() -> None:
    for package in (anchors, anchors.nsa, anchors.injection):
        with pytest.raises(AttributeError):
            package.no_such_name  # noqa: B018


def test_names_are_looked_up_without_loading_torch() -> None:
    code = (
        "import sys, anchors, anchors.nsa, anchors.injection; dir(anchors); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("parts", [("anchors", "cli"), ("anchors",)])
def test_two_checkouts_do_not_run_as_one(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """What the current folder holds is found before what is installed, `anchors.cli` only where it is installed."""
    for part in parts:
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("*.jsonl", "__pycache__"))
    ran = subprocess.run(
        [sys.executable, "-c", "import anchors"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode != 0
    assert f"anchors from {tmp_path / 'anchors'}, anchors.cli from {ROOT / 'cli'}" in ran.stderr
    assert "uv sync" in ran.stderr
