"""The registry's lines, and what derives from them: settings, options and their help, what a run is foretold to take."""

import inspect
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from anchors.analyses.classification import Classification
from anchors.cli.options import numbers, options_of
from anchors.context import encode
from anchors.errors import AnchorsError
from anchors.study.analysis import Costs, Sizes
from anchors.study.docstring import attributes, prose
from anchors.study.plan import outlook
from anchors.study.prompted import Part
from anchors.study.registry import BUILT_IN, study
from anchors.study.runner import Sample, measure
from anchors.tasks.data import read
from anchors.tasks.task import TASKS

PROMPTS = [name for name, line in BUILT_IN.items() if line.asked == "prompts"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_a_line_names_is_there(name):
    line = BUILT_IN[name]
    assert line.help
    assert line.help.endswith((".", "?"))
    assert inspect.isclass(line.resolve(line.settings))
    for reference in (line.tables, line.figure, line.shown, line.view):
        if reference is not None and name != "inject-flow":
            assert callable(line.resolve(reference)), reference
    if line.beside is not None:
        assert line.beside[0] in BUILT_IN


@pytest.mark.parametrize("name", PROMPTS)
def test_a_study_of_prompts_is_what_its_line_says(name):
    made = BUILT_IN[name].make()
    assert made.kind == name
    assert made.version >= 1
    assert isinstance(made.costs(Sizes(12, 2, 100, 20, 3, 2, 30, 18)), Costs)
    assert type(made) is BUILT_IN[name].resolve(BUILT_IN[name].settings)
    assert {f.name for f in fields(made)} == set(attributes(type(made))), "a setting without a word on it"
    if BUILT_IN[name].verb:
        for option in options_of(type(made)):
            assert option.read(option.parameter.default) == getattr(made, option.field)
            assert option.parameter.annotation.__metadata__[0].help


def test_the_class_that_old_modules_name_is_the_study():
    """0.4.0's homes."""
    from anchors import causal, compression, diagnosis, icl, isolation, readout, reweighting
    from anchors.flow import analysis

    homes = {
        "flow": analysis.InformationFlow, "map": analysis.FlowMap, "classify": icl.Classification,
        "isolate": isolation.Isolation, "words": isolation.TopWords, "readout": readout.Readout,
        "reweight": reweighting.Reweighting, "compress": compression.Compression, "speed": compression.Speed,
        "diagnose": diagnosis.Diagnosis, "causal": causal.Causal,
    }  # fmt: skip
    assert set(homes) <= set(PROMPTS)
    for name, home in homes.items():
        assert type(study(name).make()) is home


@dataclass(frozen=True)
class Every:
    """What an option can be made of,
    on several lines.

        x = y

    - one;
    - two,
      which goes on.

    Attributes:
        count, share: how many,
            and how much.
        names: `some` words.
        sides: which sides.
        rule: which rule.
        each: whole numbers.
        parts: numbers.
        loud: whether.
        quiet: whether not.
        file: what is read.
        hidden: for Python alone.

    Example:
        >>> Every()
    """

    count: int = field(default=3, metadata={"min": 1, "option": ("--count", "-c")})
    share: float = 0.5
    names: tuple[str, ...] = ("a",)
    sides: tuple[Literal["left", "right"], ...] = ("left",)
    rule: Literal["one", "two"] | Literal["three"] = "one"
    each: tuple[int, ...] | None = field(default=None, metadata={"min": 0})
    parts: tuple[float, ...] = (0.5, 1.0)
    loud: bool = False
    quiet: bool = True
    file: Path | str | None = None
    hidden: dict | None = field(default=None, metadata={"option": None})


def test_a_docstring_says_what_a_class_is_and_what_its_fields_are():
    assert (
        prose(Every)
        == "What an option can be made of, on several lines.\n\n    x = y\n\n- one;\n- two, which goes on."
    )
    said = attributes(Every)
    assert said["count"] == said["share"] == "how many, and how much."
    assert said["hidden"] == "for Python alone."
    assert "Example" not in said
    assert attributes(int) == {}


def asked(*arguments: str) -> Every:
    """What the options of `Every` come to, through typer itself."""
    options = options_of(Every)
    app, found = typer.Typer(add_completion=False), []

    def command(**given: object) -> None:
        found.append(Every(**{o.field: o.read(given[o.field]) for o in options}))

    command.__signature__ = inspect.Signature([o.parameter for o in options])
    command.__annotations__ = {o.field: o.parameter.annotation for o in options}
    app.command()(command)
    app(list(arguments), standalone_mode=False)
    return found[0]


def test_every_type_of_setting_has_its_option(tmp_path):
    assert asked() == Every()
    (tmp_path / "file").touch()
    given = asked(
        "-c", "7", "--share", "0.25", "--names", "x, y", "--sides", "right,left", "--rule", "three", "--each", "0,2",
        "--parts", "1,2.5", "--loud", "--no-quiet", "--file", str(tmp_path / "file"),
    )  # fmt: skip
    assert given == Every(
        7, 0.25, ("x", "y"), ("right", "left"), "three", (0, 2), (1.0, 2.5), True, False, tmp_path / "file"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rule", "tow"), "--rule 'tow' is not one of those there are.\nDid you mean 'two'?"),
        (("--sides", "left,rihgt"), "--sides 'rihgt' is not one of those there are.\nDid you mean 'right'?"),
        (("--each", "1,-2"), "--each '1,-2' is not a list of numbers from 0 on"),
        (("--each", "1,1"), "names 1 twice"),
        (("--parts", "1,x"), "--parts '1,x' is not a list of numbers"),
        (("-c", "0"), "Invalid value for '--count'"),
        (("--share", "much"), "Invalid value for '--share'"),
        (("--file", "no/such/file"), "'no/such/file' does not exist"),
        (("--hidden", "x"), "No such option: --hidden"),
        (("--no-loud",), "No such option: --no-loud"),
    ],
)
def test_what_an_option_cannot_be_is_refused_by_its_name(arguments, said):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - typer's errors and ours
        asked(*arguments)
    assert said in str(caught.value) or said in caught.value.format_message()


def test_a_setting_that_no_option_can_be_is_refused():
    @dataclass(frozen=True)
    class Odd:
        table: dict[str, int] = field(default_factory=dict)

    @dataclass(frozen=True)
    class Inner:
        inner: Every = Every()

    @dataclass(frozen=True)
    class Bare:
        count: int

    for kind, said in ((Odd, "'table'"), (Inner, "'inner' is a"), (Bare, "'count' has no default")):
        with pytest.raises(AnchorsError, match=said):
            options_of(kind)


@given(st.lists(st.integers(0, 10**6), unique=True, min_size=1))
def test_numbers_are_read_as_they_are_written(wanted):
    assert numbers(",".join(map(str, wanted)), "--x", 0) == tuple(wanted)
    assert numbers(" , ".join(map(str, wanted)) + ",", "--x", 0) == tuple(wanted)


def test_an_outlook_is_of_what_is_left(gpt2, tmp_path):
    task = TASKS["sst2"]
    how = Sample(examples=5, seeds=(1, 2))
    part = Part(Classification(), task, read(task), how)
    (before,) = outlook(gpt2, [part], tmp_path)
    assert (before.analysis, before.task, before.prompts, before.left) == ("classify", "sst2", 10, 10)
    assert not list(tmp_path.iterdir())
    found = measure(gpt2, part.analysis, task, part.data, how, out=tmp_path)
    asked = [len(d.prompt.ids) - d.prompt.query for d in found.first]
    (after,) = outlook(gpt2, [part], tmp_path)
    assert (after.left, after.tokens, after.seconds, after.flop) == (0, 0, 0, 0)
    assert (after.batches, after.memory) == ("", 0)
    assert before.batches.endswith(f"× {max(asked)} + {found.first[0].prompt.query}")
    more = Part(part.analysis, task, part.data, Sample(examples=5, seeds=(1, 3)))
    (fresh,) = outlook(gpt2, [more], tmp_path)
    assert fresh.left == 5
    (own,) = outlook(
        gpt2, [Part(part.analysis, task, part.data, Sample(examples=5, seeds=(1,)))], tmp_path / "new"
    )
    assert own.tokens == sum(asked)
    weights = sum(p.numel() * 4 for p in {id(p): p for p in gpt2.model.parameters()}.values())
    assert own.peak.weights == pytest.approx(weights, rel=0.2)  # and buffers
    assert own.peak.contexts == encode(gpt2, found.first[0].prompt.ids[: found.first[0].prompt.query]).bytes
