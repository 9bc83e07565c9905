"""What the command line says of what it cannot do: a sentence and its mend, an exit code that means something."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anchors.cli import app, common
from anchors.errors import AnchorsError, nearest, whole_number


def said(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(result.output.split())


def test_an_unforeseen_exception_is_a_sentence_a_log_and_an_exit_code_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(common.typer.Exit) as left, common.reporting():
        _ = [][3]
    assert left.value.exit_code == common.UNFORESEEN == 70
    text = re.sub(r"\s+", "", capsys.readouterr().err)
    assert "IndexError:listindexoutofrange" in text
    log = Path(re.search(r"(/\S+?\.log)", text)[1])
    assert "Traceback" in log.read_text()
    log.unlink()


@pytest.mark.parametrize("code", [0, 3])
def test_a_command_that_leaves_keeps_its_own_exit_code(code: int) -> None:
    with pytest.raises(common.typer.Exit) as left, common.reporting():
        raise common.typer.Exit(code)
    assert left.value.exit_code == code


@pytest.mark.parametrize("text", ["²", "٣", "-1", "1.0", "", " 1", "9" * 30])
def test_only_plain_digits_of_a_sensible_number_are_a_number(text: str) -> None:
    assert whole_number(text) is None


def test_plain_digits_are_a_number() -> None:
    assert [whole_number(text) for text in ("0", "007", "42")] == [0, 7, 42]


@pytest.mark.parametrize(
    "options",
    [
        ("--seeds", "²"), ("--seeds", "9" * 30), ("--batch-size", "²"), ("--device", "foo"),
        ("--device", "meta"), ("--control", "permuted-label"), ("--task", "sst3"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_meant_are_refused(options: tuple[str, str], model_directory: Path) -> None:
    code, text = said("classify", "-m", model_directory, "-n", 4, *options)
    assert code == 2, text
    assert "error:" in text


@pytest.mark.parametrize("layers", ["²", "0-99999999999", "3-1", "", "0,x"])
def test_ranges_of_layers(layers: str) -> None:
    with pytest.raises(AnchorsError):
        common.layers_from(layers, 4)
    assert common.layers_from("0,2-3", 4) == [0, 2, 3]


def test_a_name_that_is_not_known_is_answered_with_the_nearest() -> None:
    assert nearest("sst3", ["sst2", "trec"]) == "Did you mean 'sst2'? There are: sst2, trec."
    assert nearest("TREC", ["sst2", "trec"]).startswith("Did you mean 'trec'?")
    assert nearest("zzz", ["sst2", "trec"]) == "There are: sst2, trec."
    assert "Did you mean 'sst2'?" in said("classify", "--task", "sst3", "--device", "cpu")[1]
    assert "Did you mean 'figure3'?" in said("run", "figur3")[1]
