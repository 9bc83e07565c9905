"""The wheel holds what the checkout does: nothing is forgotten, nothing old is left in it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "anchors": "anchors",
    "cli": "anchors/cli",
    "experiments": "anchors/experiments",
    "figures": "anchors/figures",
}
"""Where each folder of the checkout is installed."""
IN_EXPERIMENTS = ("nsa/checkpoint",)
"""All else under experiments/ that is no code are results, for readers of the repository."""


def tracked(*folders: str) -> list[str]:
    try:
        found = subprocess.run(
            ["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout here: which files belong to the project is not known")
    return [name for name in found.stdout.splitlines() if (ROOT / name).is_file()]


def wanted(name: str) -> bool:
    room, _, rest = name.partition("/")
    return name.endswith(".py") or room != "experiments" or rest.startswith(IN_EXPERIMENTS)


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    pytest.importorskip(
        "setuptools", minversion="80", reason="setuptools, which builds the wheel, is not installed"
    )
    tree = tmp_path / "tree"
    for name in tracked(*ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        if wanted(name):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    code = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tree, check=True, capture_output=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {n for n in archive.namelist() if ".dist-info/" not in n}
        points = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "anchors = anchors.cli:main" in archive.read(points).decode()
    expected = {
        f"{ROOMS[name.partition('/')[0]]}/{name.partition('/')[2]}"
        for name in tracked(*ROOMS)
        if wanted(name)
    }
    assert inside == expected
    assert {"anchors/py.typed", "anchors/__init__.pyi", "anchors/viewer/page.html"} <= inside
    assert {
        f"anchors/injection/tiny_vlm/{name}" for name in ("model.safetensors", "questions.jsonl")
    } <= inside
