"""Every error that can be mended is of a kind, each kind is raised and described, and its code is shown."""

import copy
import re
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anchors.cli import app, common
from anchors.errors import AnchorsError, CertificateError, RoutingError
from anchors.kinds import KINDS

DOCS = Path(__file__).parents[1] / "docs"
PAGE = runpy.run_path(str(DOCS / "error_page.py"))
Raised = list[tuple[str, int, str | None]]


@pytest.fixture(scope="module")
def raised() -> Raised:
    return list(PAGE["raised"]())


def test_every_raise_names_a_kind_that_there_is(raised: Raised) -> None:
    assert len(raised) > 450
    assert [(module, line) for module, line, code in raised if code not in KINDS] == []


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("AnchorsError('a', 'b')", None),
        ("AnchorsError('a', code=name)", None),
        ("AnchorsError('a', **words)", None),
        ("errors.AnchorsError('a', code='nonesuch')", "nonesuch"),
        ("RoutingError('a')", "off-the-seam"),
        ("RoutingError('a', code='length')", "length"),
    ],
)
def test_a_raise_without_a_kind_is_found(
    call: str, code: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "new.py").write_text(f"\nraise {call} from None\n")
    monkeypatch.setitem(PAGE["raised"].__globals__, "HERE", tmp_path / "docs")
    assert list(PAGE["raised"]()) == [("anchors.cli.new", 2, code)]


def test_every_kind_is_raised_and_says_what_to_do(raised: Raised) -> None:
    assert set(KINDS) == {code for _, _, code in raised}
    for code, kind in KINDS.items():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", code)
        assert kind.code == code
        for text in (kind.symptom, kind.cause, kind.mend):
            assert re.fullmatch(r"[A-Z].{10,}\.", text), (code, text)


def test_the_page_is_the_one_that_is_written(raised: Raised) -> None:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    assert text == PAGE["page"](), "uv run python docs/error_page.py"
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == list(KINDS)
    for module, _, code in raised:
        assert f"`{module}`" in text.split(f"\n## {code}\n")[1].split("\n## ")[0]


def test_an_error_has_the_code_of_its_kind() -> None:
    assert AnchorsError("a").code == ""
    assert AnchorsError("a", code="length").code == "length"
    assert RoutingError("a").code == "off-the-seam"
    assert RoutingError("a", code="without-effect").code == "without-effect"
    assert CertificateError("a").code == "certificate"
    assert copy.copy(AnchorsError("a", "b", code="length")).code == "length"
    assert str(AnchorsError("a", "b", code="length")) == "a\nb"
    with pytest.raises(KeyError, match="nonesuch"):
        AnchorsError("a", code="nonesuch")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (AnchorsError("What.", "How.", code="length"), "error: [length] What.\n       How.\n"),
        (AnchorsError("[red]What."), "error: [red]What.\n"),
        (CertificateError("What."), "error: [certificate] What.\n"),
        (MemoryError(), "error: [memory] There is not enough memory: MemoryError\n"),
    ],
)
def test_the_command_line_shows_it(error: Exception, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(common.typer.Exit), common.reporting():
        raise error
    assert capsys.readouterr().err.startswith(shown)


def test_a_verb_shows_it_on_standard_error_and_leaves_standard_output_alone() -> None:
    result = CliRunner().invoke(app, ["classify", "--task", "sst3", "--device", "cpu", "--json"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: [unknown-name] Unknown task 'sst3'.")
