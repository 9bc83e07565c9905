"""The options that every measurement takes, written once: `@measurement` gives them to a verb as one `Setting`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anchors.cli import common
from anchors.errors import AnchorsError, nearest, whole_number

if TYPE_CHECKING:
    from anchors.models import LanguageModel
    from anchors.report import Report
    from anchors.runner import Analysis, Sample
    from anchors.tasks.data import Data
    from anchors.tasks.task import Task

TaskNames = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        "-t",
        help="sst2, trec, agnews, emo, a .toml file, or a name for your own; several with commas. Default: sst2 "
        "(diagnose: trec).",
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
            "--out", "-o", help="Folder of the results; default: results/VERB.", rich_help_panel="Output"
        ),
    ] = None
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
            control=self.control,
            batch_size=batch(self.batch_size),
            skip_too_long=self.skip_too_long,
        )

    def report(
        self, verb: str, analyses: "Callable[[], list[Analysis]]", *, task: str = "sst2", **options: Any
    ) -> "Report":
        """Measure and write; returns the report. All that can be checked is checked before anything is loaded.

        Args:
            verb: names the folder of the results.
            analyses: makes the analyses; importing them loads torch.
            task: what is measured on where none is named.
            options: of `anchors.report.report`; those that depend on the model as functions of it.
        """
        from anchors.results import require_writable

        check_protocol(self.seeds, self.control, self.batch_size)
        tasks = self.tasks(task)
        sets = self.sets(tasks)
        common.print_data(tasks, sets)
        out = Path("results") / verb if self.out is None else self.out
        require_writable(out)
        with common.err.status("loading torch and transformers"):
            from anchors.report import Part, report

            chosen = analyses()
        model = self.load()
        how = self.sample()
        parts = [Part(a, task, data, how) for a in chosen for task, data in zip(tasks, sets, strict=True)]
        with common.progress_bar("prompts") as progress:
            result = report(
                model,
                parts,
                out=out,
                csv=self.csv,
                progress=progress,
                **{name: value(model) if callable(value) else value for name, value in options.items()},
            )
        common.print_notes(result.notes)
        return result


def check_protocol(seeds: str, control: str, batch_size: str) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    from anchors.tasks.task import CONTROLS

    numbers(seeds, "--seeds", least=0)
    batch(batch_size)
    if control not in CONTROLS:
        raise AnchorsError(f"There is no --control {control!r}.", nearest(control, CONTROLS))


def numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """`1,3,5` as numbers."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    found = [whole_number(part) for part in parts]
    if not found or not all(number is not None and number >= least for number in found):
        raise AnchorsError(
            f"{option} {text!r} is not a list of numbers from {least} on.", f"For example: {option} 1,3,5"
        )
    if len(set(found)) < len(found):
        raise AnchorsError(f"{option} {text!r} names a number twice.")
    return tuple(found)


def batch(text: str) -> int | None:
    """`auto` or a number."""
    if text != "auto" and not whole_number(text):
        raise AnchorsError(f"--batch-size {text!r} is neither `auto` nor a number from 1 on.")
    return None if text == "auto" else int(text)


def measurement(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn `verb(setting, own options)` into a command with the options of `Setting` after its own.

    Args:
        defaults: of the shared options, where this verb's differ.
    """

    def wrap(verb: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(verb).parameters.values() if p.name != "setting"]
        shared = [
            p.replace(default=defaults.get(p.name, p.default), kind=inspect.Parameter.KEYWORD_ONLY)
            for p in inspect.signature(Setting).parameters.values()
        ]

        def command(**given: Any) -> None:
            setting = Setting(**{p.name: given.pop(p.name) for p in shared})
            with common.reporting():
                verb(setting, **given)

        every = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *shared]
        command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in every}
        command.__doc__, command.__name__ = verb.__doc__, verb.__name__
        return command

    return wrap
