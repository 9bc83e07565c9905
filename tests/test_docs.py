"""What the documentation says is tried: its Python as written, its commands against the command line's own options."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from PIL import Image

import anchors
from anchors.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md"])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "tiny"
    runpy.run_path(str(DOCS / "tiny_model.py"))["save"](str(folder))
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=named)
def test_python_runs_as_written(
    page: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    if page.name == "README.md":  # its model is the default one: not in a test
        load = anchors.load
        monkeypatch.setattr(anchors, "load", lambda: load("tiny"))
    if page.name == "method.md":
        from anchors.injection import METHODS

        monkeypatch.delitem(METHODS, "yield", raising=False)  # and so it is taken out again
    names: dict = {"__name__": "page"}
    for number, body in enumerate(blocks(page, "python")):
        exec(compile(body, f"{named(page)}, block {number}", "exec"), names)  # noqa: S102


def test_the_example_of_a_task_file_is_a_task(tmp_path: Path) -> None:
    (example,) = blocks(DOCS / "models-tasks-data.md", "toml")
    (tmp_path / "mood.toml").write_text(example, encoding="utf-8")
    task = anchors.task(str(tmp_path / "mood.toml"))
    assert (task.name, task.labels, task.separator) == ("mood", ("sad", "glad"), "\n")


def commands(page: Path) -> list[list[str]]:
    """The words of each `anchors …` of a page's shell blocks."""
    found = []
    for body in blocks(page, "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;", re.sub(r"(^|\s)#.*", "", line)):
                words = shlex.split(part)
                if "anchors" in words[:3]:
                    found.append(words[words.index("anchors") + 1 :])
    return found


def require_known(words: list[str]) -> None:
    """The verb is there, and every option is one of its own."""
    command, words = typer.main.get_command(app), list(words)
    while words and words[0] in (below := getattr(command, "commands", {})):
        command = below[words.pop(0)]
    if command.name == "inject":  # what follows is the VLM, or an option of its own
        command = command.commands["merge"]
    command = getattr(command, "whole", command)
    assert not getattr(command, "commands", {}) or not words or words[0].startswith("-"), (
        f"{words[0]} is no verb"
    )
    known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    given = [word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]
    assert set(given) <= known, (words, sorted(set(given) - known))


def test_commands_are_those_of_the_command_line() -> None:
    found = [(named(page), words) for page in PAGES for words in commands(page)]
    assert len(found) > 40
    for _, words in found:
        require_known(words)
    for wrong in (["flow", "--tsk", "sst2"], ["nosuchverb", "x"]):
        with pytest.raises(AssertionError):
            require_known(wrong)


def test_pictures_are_those_that_the_command_draws(tmp_path: Path) -> None:
    drawing = runpy.run_path(str(DOCS / "pictures.py"))
    pages = {page: re.findall(r"images/([\w-]+)\.png", page.read_text()) for page in DOCS.rglob("*.md")}
    assert {name for names in pages.values() for name in names} == set(drawing["PICTURES"])
    assert {p.stem for p in (DOCS / "images").iterdir()} == set(drawing["PICTURES"])
    assert sum(p.stat().st_size for p in (DOCS / "images").iterdir()) < 1_000_000
    drawing["save"](drawing["PICTURES"]["compression"](), tmp_path / "again.png")
    committed, again = Image.open(DOCS / "images" / "compression.png"), Image.open(tmp_path / "again.png")
    assert committed.width == again.width
    assert abs(committed.height - again.height) < 20


def test_each_analysis_says_what_it_cannot_say() -> None:
    pages = list((DOCS / "analyses").glob("*.md"))
    assert len(pages) == 11
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for part in ("**Question", "```bash", "**How to read it.**", "**What it cannot say", "](../images/"):
            assert part in text, (page.name, part)


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "properdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS).as_posix()}\n" in config, page
    assert "strict: true" in config


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == anchors.__version__
    assert citation["cff-version"] == "1.2.0"
    assert {reference["year"] for reference in citation["references"]} == {2023, 2025, 2026}


def test_the_readme_is_read_in_two_minutes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 1100
    for page, target in ((p, t) for p in PAGES[:] for t in re.findall(r"\]\(([^)#:\s]+)\)", p.read_text())):
        if page.parent == ROOT:
            assert (ROOT / target).exists(), (page.name, target)
