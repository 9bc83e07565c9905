"""Who may import whom: the rules of ARCHITECTURE, read from the sources."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "anchors": "anchors",
    "cli": "anchors.cli",
    "figures": "anchors.figures",
    "experiments": "anchors.experiments",
}
FILES = {
    ".".join([package, *(part for part in path.relative_to(ROOT / room).with_suffix("").parts if part != "__init__")]): path
    for room, package in ROOMS.items()
    for path in (ROOT / room).rglob("*.py")
}  # fmt: skip
UPPER = ("anchors.nsa", "anchors.injection")
ABOVE = (*UPPER, "anchors.figures", "anchors.experiments", "anchors.cli")
LAYERS = [
    "errors families kinds digest pace places rules streams _moved _names _version",
    "tasks stats intervals",
    "attention",
    "model gguf context study.results",
    "flow",
    "check certificate study.analysis",
    "study summaries viewer",
    "icl readout reweighting compression diagnosis causal patching training",
    "analyses nsa injection",
    "figures",
    "experiments formerly",
    "collection leavings",
    "booklet comparison",
    "cli",
]
"""Rooms from the bottom up, as in ARCHITECTURE."""
UPWARD = {("anchors.study.report", "anchors.figures"), ("anchors.study.shelf", "anchors.figures.style")}
"""The one step up: the writer of reports has pictures drawn and saved, when there are rows."""
BOTTOM = {
    "anchors.errors", "anchors.digest", "anchors.places", "anchors.streams", "anchors._names",
}  # fmt: skip
"""What tasks rest on."""


def imported(path: Path) -> set[str]:
    """The modules of the project that a file imports when it runs, inside functions too; not those for types only."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("anchors"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("anchors")}
    return found


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports."""
    return {name: imported(path) for name, path in FILES.items()}


def among(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def test_every_room_is_read() -> None:
    assert {name.split(".")[1] for name in FILES if "." in name} >= {
        "nsa",
        "injection",
        "cli",
        "figures",
        "tasks",
    }
    assert sum(map(len, imports().values())) > 500


def test_nobody_imports_the_command_line() -> None:
    found = {
        (name, own) for name, every in imports().items() for own in every if among(own, ("anchors.cli",))
    }
    assert {name for name, _ in found if not among(name, ("anchors.cli",))} == set()


def test_nobody_below_knows_nsa_or_injection() -> None:
    below = [name for name in FILES if not among(name, ABOVE)]
    assert len(below) > 60
    assert {(name, own) for name in below for own in imports()[name] if among(own, UPPER)} == set()


def layer(name: str) -> int:
    """The longest prefix decides."""
    found = [
        (len(room), level)
        for level, rooms in enumerate(LAYERS)
        for room in rooms.split()
        if among(name, (f"anchors.{room}",))
    ]
    assert found, f"{name} stands in no layer"
    return max(found)[1]


def test_every_room_knows_only_those_below() -> None:
    steps = {
        (name, own) for name, every in imports().items() for own in every if "anchors" not in (name, own)
    }
    assert {(name, own) for name, own in steps if layer(own) > layer(name)} == UPWARD


def test_nsa_and_injection_do_not_know_each_other() -> None:
    for one, other in (UPPER, UPPER[::-1]):
        assert {
            (n, own) for n in FILES if among(n, (one,)) for own in imports()[n] if among(own, (other,))
        } == set()


def test_errors_and_tasks_stand_at_the_bottom() -> None:
    assert imports()["anchors.errors"] == {"anchors.kinds"}
    assert imports()["anchors.kinds"] == set()
    for name in FILES:
        if among(name, ("anchors.tasks",)):
            own = imports()[name] - BOTTOM
            assert all(among(other, ("anchors.tasks",)) for other in own), (name, own)


def test_no_module_waits_for_itself() -> None:
    """Circles, also those that imports inside functions make."""

    def reached(start: str) -> set[str]:
        seen, ahead = set(), [start]
        while ahead:
            for other in imports().get(ahead.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    ahead.append(other)
        return seen

    assert {name for name in FILES if name in reached(name)} == set()


@pytest.mark.parametrize("room", ["anchors.figures", "anchors.summaries", "anchors.experiments"])
def test_tables_and_figures_do_without_torch(room: str) -> None:
    names = [name for name in FILES if among(name, (room,))]
    script = f"import sys, importlib; [importlib.import_module(n) for n in {names}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
