"""The options that every measurement of prompts takes, written once."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from anchors.cli import common
from anchors.cli.options import numbers
from anchors.errors import AnchorsError, nearest, whole_number

if TYPE_CHECKING:
    from anchors.models import LanguageModel
    from anchors.runner import Sample
    from anchors.tasks.data import Data
    from anchors.tasks.task import Control, Task

TaskNames = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        "-t",
        help="sst2, trec, agnews, emo, a .toml file, or a name for your own; several with commas. "
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
        "parquet with columns text and label. Labels are label words or their numbers from 0 on.",
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
        help="Only show what is left to do and about how long it takes.",
        rich_help_panel="Output",
    ),
]
Csv = Annotated[bool, typer.Option("--csv", help="Write the rows as CSV, too.", rich_help_panel="Output")]
Json = Annotated[bool, typer.Option("--json", help="Print the tables as JSON.", rich_help_panel="Output")]


@dataclass(frozen=True)
class Setting:
    """What a measurement is made on and how. The fields' annotations are the options' help."""

    model: common.Model = None
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
    seeds: Seeds = "42"
    control: Annotated[
        str,
        typer.Option(
            help="none; random-positions: random tokens of the demonstrations instead of the label words; "
            "permuted-labels: every class shown under the label of another.",
            rich_help_panel="Protocol",
        ),
    ] = "none"
    skip_too_long: TooLong = False
    batch_size: BatchSize = "auto"
    device: common.Device = "auto"
    precision: common.Precision = "auto"
    device_map: common.DeviceMap = None
    revision: common.Revision = None
    trust_remote_code: common.Remote = False
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder of the results; default: results/@verb.", rich_help_panel="Output"
        ),
    ] = None
    dry_run: DryRun = False
    csv: Csv = False
    as_json: Json = False

    def tasks(self, default: str = "sst2") -> "list[Task]":
        return common.tasks_from(self.task or [], self.template, self.labels, self.policy, default)

    def sets(self, tasks: "list[Task]") -> "list[Data]":
        from anchors.tasks.data import read

        return [read(task, self.data) for task in tasks]

    def load(self) -> "LanguageModel":
        return common.load_model(
            self.model, self.device, self.precision, self.device_map, self.revision, self.trust_remote_code
        )

    def sample(self) -> "Sample":
        from anchors.runner import Sample

        return Sample(
            shots=self.shots,
            seeds=numbers(self.seeds, "--seeds", least=0),
            examples=self.examples,
            control=cast("Control", self.control),
            batch_size=batch(self.batch_size),
            skip_too_long=self.skip_too_long,
        )

    def prepared(self, verb: str, task: str) -> "tuple[list[tuple[Task, Data]], Path]":
        """The tasks with their data, and where results go. All that can be checked is checked before anything is loaded.

        Args:
            verb: names the folder of the results.
            task: what is measured on where none is named.
        """
        from anchors.results import require_writable

        check_protocol(self.seeds, self.control, self.batch_size)
        tasks = self.tasks(task)
        sets = self.sets(tasks)
        common.print_data(tasks, sets)
        out = Path("results") / verb if self.out is None else self.out
        require_writable(out)
        return list(zip(tasks, sets, strict=True)), out


def check_protocol(seeds: str, control: str, batch_size: str) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    from anchors.tasks.task import CONTROLS

    numbers(seeds, "--seeds", least=0)
    batch(batch_size)
    if control not in CONTROLS:
        raise AnchorsError(f"There is no --control {control!r}.", nearest(control, CONTROLS))


def batch(text: str) -> int | None:
    """`auto` or a number."""
    if text != "auto" and not whole_number(text):
        raise AnchorsError(f"--batch-size {text!r} is neither `auto` nor a number from 1 on.")
    return None if text == "auto" else int(text)
