"""The options that every measurement of prompts takes, written once."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from anchors.cli import common
from anchors.cli.options import numbers
from anchors.errors import AnchorsError, nearest, whole_number
from anchors.study.registry import Study

if TYPE_CHECKING:
    from anchors.analyses.targets import TargetFlow
    from anchors.injection.study import InjectFlow, InjectSweep
    from anchors.injection.suites import SuiteInquiry
    from anchors.model.source import Source
    from anchors.nsa.study import NSAProbe
    from anchors.study.analysis import Analysis
    from anchors.study.report import Inquiry
    from anchors.study.runner import Sample
    from anchors.tasks.data import Data
    from anchors.tasks.task import Control, Task

TaskNames = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        "-t",
        help="sst2, trec, agnews, emo, a .toml file (keys template, labels), or a name for your own; several with commas. "
        "Default: @task.",
        rich_help_panel="Task",
    ),
]
DataSource = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        help="builtin, hub, a directory (train and test files, by task) or a file: JSON lines, CSV, TSV, "
        "parquet with columns text and label. Labels are label words or their numbers from 0 on. Of one file about 70 % of "
        "the texts are shown (train) and 30 % asked about (test): a hash of each says which.",
        rich_help_panel="Task",
    ),
]
Seeds = Annotated[str, typer.Option(help="Seeds, with commas.", rich_help_panel="Protocol")]
TooLong = Annotated[
    bool,
    typer.Option(
        "--skip-too-long", help="Leave out prompts longer than the context.", rich_help_panel="Protocol"
    ),
]
BatchSize = Annotated[str, typer.Option(help="Prompts per batch, or auto.", rich_help_panel="Protocol")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only show what is left to do and about what it costs: operations, memory, time.",
        rich_help_panel="Output",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="Folder of the results; default: results/@folder.", rich_help_panel="Output"
    ),
]
Csv = Annotated[bool, typer.Option("--csv", help="Write the rows as CSV, too.", rich_help_panel="Output")]
Json = Annotated[bool, typer.Option("--json", help="Print the tables as JSON.", rich_help_panel="Output")]


@dataclass(frozen=True, kw_only=True)
class Always:
    """What every study takes."""

    device: common.Device = "auto"
    devices: common.Devices = None
    precision: common.Precision = "auto"
    out: Out = None
    dry_run: DryRun = False
    csv: Csv = False
    as_json: Json = False

    @cached_property
    def places(self) -> tuple[str, ...]:
        """Devices to measure on."""
        return common.devices_of(self.devices, self.device)

    def source(self) -> "Source | None":
        """The model that the study is of, where other processes can load it, too."""
        return None

    @contextmanager
    def elsewhere(self, inquiry: "Inquiry") -> "Generator[Inquiry]":
        """The study with whoever else measures it: processes on other devices, or machines."""
        from anchors.study.helpers import helped

        with helped(self.places, self.source()):
            yield inquiry


@dataclass(frozen=True, kw_only=True)
class Modelled(Always):
    """What every study of prompts of a language model takes."""

    model: common.Model = None
    chat: common.ChatForm = None
    system: common.System = None
    skip_too_long: TooLong = False
    batch_size: BatchSize = "auto"
    device_map: common.DeviceMap = None
    revision: common.Revision = None
    trust_remote_code: common.Remote = False

    def source(self) -> "Source":
        """See `Always.source`."""
        common.load_libraries()
        from anchors.model.source import Source

        where = (self.places[0], self.precision, self.device_map, self.revision, self.trust_remote_code)
        return Source(self.model, *where)


@dataclass(frozen=True, kw_only=True)
class Setting(Modelled):
    """What a measurement is made on and how. The fields' annotations are the options' help."""

    task: TaskNames = None
    data: DataSource = None
    template: common.Template = None
    labels: common.Labels = None
    policy: common.Policy = None
    shots: Annotated[
        int, typer.Option(min=1, help="Demonstrations per class.", rich_help_panel="Protocol")
    ] = 1
    examples: Annotated[
        int, typer.Option("--examples", "-n", min=1, help="Prompts per seed.", rich_help_panel="Protocol")
    ] = 60
    until_width: Annotated[
        float | None,
        typer.Option(
            help="Ask more and more prompts, from --examples on, until the study's main interval is no wider than this.",
            rich_help_panel="Protocol",
        ),
    ] = None
    seeds: Seeds = "42"
    control: Annotated[
        str,
        typer.Option(
            help="none; random-positions: random tokens of the demonstrations instead of the label words; "
            "permuted-labels: every class shown under the label of another; order-only: the same demonstrations for every seed, in an "
            "order of its own.",
            rich_help_panel="Protocol",
        ),
    ] = "none"

    def tasks(self, default: str = "sst2") -> "list[Task]":
        chat = common.chat_from(self.chat, self.system)
        return common.tasks_from(self.task or [], self.template, self.labels, self.policy, default, chat)

    def sets(self, tasks: "list[Task]") -> "list[Data]":
        from anchors.tasks.data import read

        return [read(task, self.data) for task in tasks]

    def sample(self) -> "Sample":
        from anchors.study.runner import Sample

        return Sample(
            shots=self.shots,
            seeds=numbers(self.seeds, "--seeds", least=0),
            examples=self.examples,
            control=cast("Control", self.control),
            batch_size=batch(self.batch_size),
            skip_too_long=self.skip_too_long,
        )

    def inquiry(self, line: Study, studies: "list[Analysis]") -> "Inquiry":
        """The studies of tasks' prompts. All that can be checked is checked before anything is loaded."""
        check_protocol(self.seeds, self.control, self.batch_size)
        if self.until_width is not None and not self.until_width > 0:
            raise AnchorsError(
                f"--until-width is {self.until_width:g}: no interval is as narrow as that.",
                "For example .05.",
                code="option-value",
            )
        tasks = self.tasks(line.task)
        sets = self.sets(tasks)
        common.print_data(tasks, sets)
        from anchors.tasks.drawing import Draw, demonstrations

        for task, data in zip(tasks, sets, strict=True):
            demonstrations(task, data, Draw(self.shots, fresh=all(study.fresh for study in studies)))
        model = common.load_model(*vars(self.source()).values(), tasks)
        from anchors.study.prompted import Part, Prompted

        how, pairs = self.sample(), list(zip(tasks, sets, strict=True))
        parts = [Part(analysis, task, data, how) for analysis in studies for task, data in pairs]
        return Prompted(model, parts)


@dataclass(frozen=True, kw_only=True)
class TextSetting(Modelled):
    """A file of prompts without label words; which one is a setting of the study."""

    def inquiry(self, line: Study, studies: "list[TargetFlow]") -> "Inquiry":
        """The study of a model."""
        size, chat = batch(self.batch_size), common.chat_from(self.chat, self.system)
        studies[0].asked()  # what is wrong with the file is said before a model is loaded
        model = common.load_model(*vars(self.source()).values())
        return studies[0].on(model, chat=chat, batch_size=size, skip_too_long=self.skip_too_long)


COMES_ALONG = Path(__file__).parents[1] / "experiments" / "nsa" / "checkpoint"
"""The model that comes with the repository."""


@dataclass(frozen=True, kw_only=True)
class EpisodeSetting(Always):
    """A model of `anchors nsa train`, and the episodes it was trained on."""

    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL_DIR]",
            help="A folder of `anchors nsa train`; default: the small model that comes along.",
        ),
    ] = None

    def source(self) -> "Source":
        """See `Always.source`."""
        from anchors.model.source import Source

        return Source(str(COMES_ALONG if self.model is None else self.model), self.places[0], self.precision)

    def inquiry(self, line: Study, studies: "list[NSAProbe]") -> "Inquiry":
        """The study of a model."""
        folder = COMES_ALONG if self.model is None else self.model
        if not folder.is_dir():
            raise AnchorsError(
                f"The model {str(folder)!r} is not a directory.",
                "Train one: `anchors nsa train --out DIR`.",
                code="model-not-found",
            )
        model = common.load_model(*vars(self.source()).values())
        # Where the package lies is nobody's business in results.
        return studies[0].on(model, folder, "the small NSA model" if self.model is None else None)


@dataclass(frozen=True, kw_only=True)
class SuiteSetting(Always):
    """Suites: vision-language models with scenarios and experts."""

    suites: Annotated[
        list[Path],
        typer.Argument(
            metavar="SUITE...",
            help="Folders with suite.json, as `anchors inject demo` builds them; several are trainings of one experiment "
            "with different seeds.",
        ),
    ]
    cluster: common.ClusterAt = None
    share: common.Share = 1.0

    def inquiry(self, line: Study, studies: "list[InjectSweep | InjectFlow]") -> "Inquiry":
        """The study of suites."""
        common.load_libraries()
        from anchors.injection.asking.suite import Suite

        return studies[0].on([Suite.open(path) for path in self.suites], self.places[0], self.precision)

    @contextmanager
    def elsewhere(self, inquiry: "Inquiry") -> "Generator[Inquiry]":
        """See `Always.elsewhere`."""
        with common.machines(self.cluster, self.share, self.device, self.devices) as machines:
            if machines is not None:
                yield cast("SuiteInquiry", inquiry).gathered(machines)
                return
            with super().elsewhere(inquiry) as helped:
                yield helped


SETTINGS = {"prompts": Setting, "texts": TextSetting, "episodes": EpisodeSetting, "suites": SuiteSetting}
"""By what a study is asked of."""


def check_protocol(seeds: str, control: str, batch_size: str) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    from anchors.tasks.task import CONTROLS

    numbers(seeds, "--seeds", least=0)
    batch(batch_size)
    if control not in CONTROLS:
        raise AnchorsError(
            f"There is no --control {control!r}.", nearest(control, CONTROLS), code="unknown-name"
        )


def batch(text: str) -> int | None:
    """`auto` or a number."""
    if text != "auto" and not whole_number(text):
        raise AnchorsError(
            f"--batch-size {text!r} is neither `auto` nor a number from 1 on.", code="option-value"
        )
    return None if text == "auto" else int(text)
