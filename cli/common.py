"""What the verbs share: options, errors to exit codes, progress. Nothing here imports torch when help is asked for."""

import functools
import json
import logging
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, overload

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from anchors.cli.progress import err as err
from anchors.cli.progress import progress_bar as progress_bar
from anchors.cli.tables import Grid
from anchors.errors import AnchorsError, CertificateError, brief, demand_seed, of_the_machine, whole_number
from anchors.pace import Interrupted, clock, interruptible

if TYPE_CHECKING:
    import pandas as pd

    from anchors.model.language import LanguageModel
    from anchors.study.cluster import Cluster
    from anchors.study.plan import Outlook
    from anchors.tasks.data import Data
    from anchors.tasks.task import Chat, Task

out = Console(highlight=False)

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Hub id, local directory or .gguf file; default: SmolLM2-135M-Instruct. The paper's models: "
        "openai-community/gpt2-xl (6 GB of weights in float32, 3 GB in bfloat16) and EleutherAI/gpt-j-6b (24 GB, 12 GB).",
        rich_help_panel="Model",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel="Model")]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        "--dtype",
        help="auto, float32, tf32 (float32 weights, TF32 products), bfloat16, float16, float64. "
        "auto: float32 on the CPU, tf32 on CUDA.",
        rich_help_panel="Model",
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Spread a large model, e.g. auto (needs accelerate).", rich_help_panel="Model"),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub model.", rich_help_panel="Model")
]
Remote = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that comes with the model.", rich_help_panel="Model"
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        help="Several of one type instead of --device, a process each: all (CUDA), 0,1, or cpu,cpu.",
        rich_help_panel="Machines",
    ),
]
ClusterAt = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="Have the cells of the grid measured by the machines of a Ray cluster: auto, HOST:PORT, or local for this machine "
        "alone (needs the extra `cluster`).",
        rich_help_panel="Machines",
    ),
]
Share = Annotated[
    float,
    typer.Option(
        help="With --cluster: GPUs for each cell, such as 0.5 for two on a card; CPU cores where there is no GPU.",
        rich_help_panel="Machines",
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        help=r"Own task: e.g. 'Review: {text}\nSentiment:{label}' (\n is a line break).",
        rich_help_panel="Task",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(help="Label words in the order of the class numbers, with commas.", rich_help_panel="Task"),
]
Policy = Annotated[
    str | None,
    typer.Option(help="Tokens of a label word that count: first, last or all.", rich_help_panel="Task"),
]

ChatForm = Annotated[
    str | None,
    typer.Option(
        "--chat",
        help="Prompts through the model's own chat template. turns: a demonstration is a turn, its label word the answer; one: all "
        "in one turn of the user.",
        rich_help_panel="Task",
    ),
]
System = Annotated[
    str | None, typer.Option(help="What the system says first, with --chat.", rich_help_panel="Task")
]


def chat_from(form: str | None, system: str | None) -> "Chat | None":
    """The chat that the options ask for, if they do.

    Raises:
        AnchorsError: a text of the system without a chat, or a form that does not exist.
    """
    from anchors.tasks.task import Chat

    if form is None and system is not None:
        raise AnchorsError(
            "--system without --chat: a plain prompt has no system.",
            "Add --chat turns.",
            code="options-together",
        )
    return None if form is None else Chat(cast(Any, form), system)


def tasks_from(
    names: list[str],
    template: str | None,
    labels: str | None,
    policy: str | None,
    default: str = "sst2",
    chat: "Chat | None" = None,
) -> "list[Task]":
    """The tasks that the options name; without any the default.

    Raises:
        AnchorsError: a template without label words, or label words without a template, and no task is named whose other
            half they could be meant for.
    """
    from anchors.tasks.task import task

    words = None if labels is None else [word.strip() for word in labels.split(",")]
    wanted = [name.strip() for text in names for name in text.split(",")]
    if template is not None and words is not None and not wanted:
        return [replace(task(None, template=template, labels=words, policy=policy), chat=chat)]
    if not wanted and (template is not None or words is not None):
        given, lacking = ("--template", "--labels") if words is None else ("--labels", "--template")
        raise AnchorsError(
            f"{given} without {lacking} makes no task.",
            f"Give {lacking}, too, or say with --task whose it is to take: --task {default} {given} ….",
            code="options-together",
        )
    found = [
        replace(task(name, template=template, labels=words, policy=policy), chat=chat)
        for name in wanted or [default]
    ]
    called = [each.name for each in found]
    if twice := [name for name in called if called.count(name) > 1]:
        raise AnchorsError(
            f"--task names {twice[0]!r} twice: its results would bear the same name.",
            "Name it once.",
            code="option-value",
        )
    return found


def print_data(tasks: "Sequence[Task]", sets: "Sequence[Data]") -> None:
    """What was read, a line a task, on standard error; and which labels look like slips."""
    for task, data in zip(tasks, sets, strict=True):
        facts = data.facts(task)
        err.print(f"[dim]{escape(f'{task.name}: {facts.read()}')}[/]")
        print_notes([f"{task.name}: {said}" for said in [facts.hint()] if said])


def load_libraries() -> None:
    """Load torch and transformers, saying so; they say nothing themselves."""
    with err.status("loading torch and transformers"):
        from transformers.utils import logging as transformers_logging

        import anchors.model.language  # noqa: F401
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def load_model(
    model: str | None,
    device: str,
    precision: str,
    device_map: str | None,
    revision: str | None,
    trust_remote_code: bool,
    tasks: "Sequence[Task]" = (),
) -> "LanguageModel":
    """Load a model, saying so; whether its tokenizer does for the label words of tasks is asked before its weights are read."""
    load_libraries()
    from anchors.model.language import load, origin_of
    from anchors.model.loading import demand_decoder, tokenizer_of
    from anchors.tasks.prompts import label_tokens

    with err.status(f"loading {escape(model or 'the default model')}"):
        source, words = origin_of(model, revision, trust_remote_code), None
        with suppress(AnchorsError):  # what is wrong with the model is said by who loads it
            demand_decoder(source)
            words = tokenizer_of(source)
        if words is not None and words.is_fast:
            for task in tasks:
                label_tokens(task, words)
        return load(
            source,
            tokenizer=words,
            device=device,
            precision=precision,
            device_map=device_map,
        )


def devices_of(devices: str | None, device: str) -> tuple[str, ...]:
    """The devices to measure on, the first of them the one that the model is loaded to.

    Raises:
        AnchorsError: both options are given, or there is no CUDA device.
    """
    if devices is None:
        return (device,)
    if device != "auto":
        raise AnchorsError(
            "--device and --devices are given.", "Leave one of them out.", code="options-together"
        )
    if devices != "all":
        named = [name.strip() for name in devices.split(",")]
        once(tuple(name for name in named if name != "cpu"), "--devices")  # a card holds one model
        return tuple(f"cuda:{name}" if whole_number(name) is not None else name for name in named)
    import torch

    if not (count := torch.cuda.device_count()):
        raise AnchorsError(
            "--devices all: there is no CUDA device here.", "Name them: --devices cpu,cpu.", code="device"
        )
    return tuple(f"cuda:{number}" for number in range(count))


@contextmanager
def machines(
    at: str | None, share: float, device: str, devices: str | None, *, dry_run: bool = False
) -> "Generator[Cluster | None]":
    """The cluster that was asked for, if any."""
    if at is None:
        yield None
        return
    if dry_run or devices is not None:
        raise AnchorsError(
            f"--{'dry-run' if dry_run else 'devices'} is of this machine, --cluster of others.",
            "Leave one of them out.",
            code="options-together",
        )
    from anchors.study.cluster import connect

    with connect(at, share, device) as cluster:
        yield cluster


def first_of_several() -> bool:
    """Whether this process is the one that speaks, of those that a launcher started together; the others say their errors only."""
    first = int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK", "0") == "0"
    err.quiet = out.quiet = not first
    return first


@contextmanager
def reporting() -> Generator[None]:
    """Errors that the user can mend end in exit code 2, failed certificates in 1, Ctrl-C in 130, SIGTERM in 143."""
    logging.basicConfig(
        format="%(message)s", handlers=[RichHandler(console=err, show_path=False, show_time=False)]
    )
    logging.getLogger("anchors").setLevel(logging.INFO)
    try:
        with interruptible():
            yield
    except AnchorsError as error:
        print_error(error)
        raise typer.Exit(1 if isinstance(error, CertificateError) else 2) from error
    except KeyboardInterrupt as error:
        ended = Interrupted.of(error, "nothing but finished files is kept.")
        err.print(f"[yellow]interrupted:[/] {escape(ended.kept)}")
        raise typer.Exit(128 + ended.number) from None
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:
        if (lacking := of_the_machine(error)) is not None:
            print_error(lacking)
            raise typer.Exit(2) from error
        print_defect(error)
        raise typer.Exit(UNFORESEEN) from error


MOST = 10**9
"""The largest whole number of an option that is no seed."""


def bounded(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that refuses whole numbers without end, over which some library would trip after hours."""

    @functools.wraps(verb)
    def checked(**given: Any) -> None:
        with reporting():
            demand_bounded(given)
        verb(**given)

    return checked


def demand_bounded(given: Mapping[str, Any]) -> None:
    """Refuse whole numbers without end.

    Args:
        given: options by the name of their parameter.

    Raises:
        AnchorsError: one is larger than `MOST`, or a seed that no generator holds.
    """
    for name, value in given.items():
        if name == "seed" and isinstance(value, int):
            demand_seed(value)
        elif isinstance(value, int) and abs(value) > MOST:
            raise AnchorsError(
                f"--{name.replace('_', '-')} is {brief(value, 30)}: numbers go up to {MOST}.",
                "Take a smaller one.",
                code="option-value",
            )


UNFORESEEN = 70
"""The exit code of a defect of the toolkit (EX_SOFTWARE of BSD's sysexits)."""


def print_defect(error: Exception) -> None:
    """An exception that nobody foresaw: one sentence, and the path of a log with the traceback."""
    said, err.quiet = f"{type(error).__name__}: {brief(error)}", False
    err.print(f"[bold red]unforeseen:[/] {escape(said)}")
    try:
        handle, name = tempfile.mkstemp(prefix="anchors-", suffix=".log")
    except OSError:  # no place for a log either
        traceback.print_exception(error)
        return
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as log:
        log.write(" ".join(sys.argv) + "\n" + "".join(traceback.format_exception(error)))
    err.print(f"       This is a defect of the toolkit, not yours; the traceback is in {shown(Path(name))}")


def print_error(error: AnchorsError, where: str = "") -> None:
    """What happened, of which kind, to what, and how to mend it."""
    code = f"[dim]{escape(f'[{error.code}]')}[/] " if error.code else ""
    err.quiet = False
    err.print(f"[bold red]error:[/] {code}{escape(f'{where}: ' if where else '')}{escape(error.message)}")
    if error.remedy:
        err.print(f"       {escape(error.remedy)}")


def print_outlook(plans: "dict[str, list[Outlook]]", *, as_json: bool) -> None:
    """What is left to do of each experiment or study, as a table or as JSON."""
    if as_json:
        print_json({name: [part.as_json() for part in parts] for name, parts in plans.items()})
    else:
        out.print(outlook_table(plans))


def outlook_table(plans: "dict[str, list[Outlook]]") -> Grid:
    """What is left to do, a row each, and what it costs in all."""
    counts = ("prompts", "left", "batches", "TFLOP", "GB", "about")
    table = Grid("What is left to do", keys=3)
    for name in ("experiment", "analysis", "task", "shots", "control", *counts):
        table.add_column(name, justify="right" if name in counts else "left")
    every = [(name, part) for name, parts in plans.items() for part in parts]
    for name, part in every:
        cells = (part.analysis, part.task, part.shots, part.control, part.prompts, part.left, part.batches)
        work = "" if part.flop is None else f"{part.flop / 1e12:.3g}"
        peak = f"{part.memory / 1e9:.3g}" if part.memory else ""
        table.add_row(name, *map(str, cells), work, peak, "" if part.seconds is None else clock(part.seconds))
    known = [part.seconds for _, part in every if part.seconds is not None]
    time = f"about {clock(sum(known))} in all" if known or not every else "how long it takes nobody can tell"
    merged = any(part.analysis.startswith("inject") for _, part in every)
    table.below = (
        f"{time}, without loading and certifying the model{'s and without merging them' if merged else ''}"
    )
    if len(plans) > 1:
        table.below += "; cells that experiments share count more than once"
    if most := max((part.peak for _, part in every if part.peak), key=lambda peak: peak.total, default=None):
        terms = {term: size for term, size in most._asdict().items() if size > 0.01 * most.total}
        said = ", ".join(f"{size / 1e9:.3g} {term}" for term, size in terms.items())
        alone = set(terms) == {"weights"}
        size = f"{most.total / 1e9:.3g} GB"
        table.below += f"; {size} at least, of weights" if alone else f"; at the peak about {size} ({said})"
    return table


def print_notes(notes: list[str]) -> None:
    """What a reader must know, on standard error."""
    for note in notes:
        err.print(f"[yellow]note:[/] {escape(note)}")


OPENED = (".html", ".png", ".csv", ".parquet")
"""What is opened first: a page, else a picture, else a table."""


def first_of(files: Sequence[Path]) -> Path | None:
    """The file to open first; of several of a kind the one with the shortest name, which stands for the whole."""
    for suffix in OPENED:
        if own := [path for path in files if path.suffix == suffix]:
            return min(own, key=lambda path: len(path.name))
    return None


def print_files(files: list[Path]) -> None:
    """What was written, on standard error; the file to open first comes last, and is said."""
    first = first_of(files)
    for path in files:
        if path != first:
            err.print(shown(path), soft_wrap=True)
    if first is not None:
        err.print(f"{'[bold]open first:[/] ' if len(files) > 1 else ''}{shown(first)}", soft_wrap=True)


def estimate(
    value: Any, low: Any, high: Any, *, signed: bool = False, digits: int = 2, equal: int | None = None
) -> str:
    """`.61 [.57, .66]`, as papers print shares; empty where there is no value.

    `equal` is how many examples had this very value, where there is no interval because nothing varied.
    """
    from anchors.intervals import estimate as told

    text = told(value, low, high, signed=signed, digits=digits)
    return f"{text} ({equal} equal)" if text and equal is not None and (low is None or low != low) else text


def estimate_of(row: Any, *, prefix: str = "", signed: bool = False) -> str:
    """The `estimate` of a row of a table that says how its interval was made."""
    from anchors.intervals import EQUAL

    value = row.get(prefix or "value")
    low, high = (row.get(f"{prefix}_{end}" if prefix else end) for end in ("low", "high"))
    same = row.get(f"{prefix}_interval" if prefix else "interval") == EQUAL
    return estimate(value, low, high, signed=signed, equal=int(row["examples"]) if same else None)


def caption_of(table: "pd.DataFrame") -> str:
    """How the intervals of a table were made, and what its accuracies have to be compared with."""
    from anchors.intervals import EQUAL, SCORE, WILSON

    columns = [c for c in ("interval", "difference_interval") if c in table]
    ways = {str(way) for column in columns for way in table[column]}
    told = {
        WILSON: "Wilson's interval where all prompts agree (of a difference: a bound from it)",
        SCORE: "a score interval where an AUC is 0 or 1",
        EQUAL: "(n equal): all n values are the same, so that there is no interval",
    }
    parts = ["[95 % bootstrap interval]", *(text for way, text in told.items() if way in ways)]
    if "indistinct" in table and table["indistinct"].any():
        parts.append(
            "≈: the loss differs from that of `none` by less than the run's arithmetic error: nothing was changed"
        )
    known = table.dropna(subset=["majority"]) if "majority" in table else table[:0]
    if len(known):
        chance, most = known[["chance", "majority"]].iloc[0]
        parts.append(
            f"accuracy by chance {estimate(chance, None, None)}, of always naming the most frequent class "
            f"{estimate(most, None, None)}"
        )
    return "; ".join(parts)


def option(panel: str, text: str, *names: str, **more: Any) -> Any:
    """An option in a panel of the help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def new_table(
    title: str, *columns: str, caption: str = "[95 % bootstrap interval]", keys: int = 1, **how: Any
) -> Grid:
    """An empty table whose first `keys` columns tell rows apart; `how` is of every column."""
    made = Grid(title, caption=caption, keys=keys)
    for name in columns:
        made.add_column(name, **how)
    return made


@overload
def numbers(text: str, option: str) -> tuple[float, ...]: ...
@overload
def numbers(text: None, option: str) -> None: ...
def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """`0.5,1` as finite numbers, each once; None where nothing was given."""
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)):
        raise AnchorsError(
            f"{option} {text!r} is not a list of numbers.",
            f"For example: {option} 0.5,1",
            code="option-value",
        )
    return once(found, option)


@overload
def words(text: str, option: str) -> tuple[str, ...]: ...
@overload
def words(text: None, option: str) -> None: ...
def words(text: str | None, option: str) -> tuple[str, ...] | None:
    """`a, b` as words, each once; None where nothing was given."""
    if text is None:
        return None
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise AnchorsError(
            f"{option} {text!r} names nothing.",
            "Leave it out, or give names with commas.",
            code="option-value",
        )
    return once(found, option)


def once(found: tuple, option: str) -> tuple:
    """What an option names, where it names nothing twice."""
    if twice := [one for one in found if found.count(one) > 1]:
        raise AnchorsError(f"{option} names {twice[0]!r} twice.", "Name it once.", code="option-value")
    return found


def summary_table(summary: "pd.DataFrame", metrics: Sequence[str], title: str) -> Grid:
    """One row per condition, one column per metric, and the difference of the first metric to the baseline."""
    table = new_table(title, caption=caption_of(summary[summary["metric"].isin(metrics)]))
    table.add_column("condition")
    for metric in metrics:
        table.add_column(metric.replace("_", " "))
    compared = "difference" in summary and summary["difference"].notna().any()
    if compared:
        table.add_column(f"Δ {metrics[0].replace('_', ' ')}")
    order = sorted(dict.fromkeys(summary["condition"]), key=lambda c: c != "none")
    for condition in order:
        own = summary[summary["condition"] == condition].set_index("metric")
        cells = [estimate_of(own.loc[m]) if m in own.index else "" for m in metrics]
        if compared:
            first = own.loc[metrics[0]] if metrics[0] in own.index else None
            shown = "" if first is None else estimate_of(first, prefix="difference", signed=True)
            cells.append(
                f"≈ {shown}" if shown and first is not None and first.get("indistinct", False) else shown
            )
        table.add_row(escape(condition), *cells)
    return table


def layer_table(summary: "pd.DataFrame", title: str) -> Grid:
    """One row per task, condition and metric; columns for five layers from the first to the last."""
    layers = sorted(summary["layer"].dropna().unique())
    shown = [layers[round(i * (len(layers) - 1) / 4)] for i in range(5)] if len(layers) > 5 else layers
    keys = [c for c in ("task", "condition", "metric") if c in summary and summary[c].nunique() > 1]
    from anchors.stats import parts_by

    prefix = "" if "value" in summary else "share"
    table = new_table(
        title, *keys, *(f"layer {layer}" for layer in shown), caption=caption_of(summary), keys=len(keys)
    )
    for key, part in parts_by(summary, keys) if keys else [((), summary)]:
        own = part.dropna(subset=["layer"]).set_index("layer")
        cells = [layer_cell(own.loc[x], prefix) if x in own.index else "" for x in shown]
        if any(cells):
            table.add_row(*(escape(str(k)) for k in key), *cells)
    return table


def layer_cell(row: "pd.Series", prefix: str = "") -> str:
    """An estimate, or that it is not defined in this layer."""
    from anchors.stats import UNDEFINED

    note = str(row.get("note", ""))
    return UNDEFINED if note.startswith(UNDEFINED) else estimate_of(row, prefix=prefix)


def print_json(data: Any) -> None:
    """Machine-readable output on standard output, all of it or none, and nothing else there."""
    text = json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(_finite(data), indent=1, allow_nan=False)
    sys.stdout.write(text + "\n")


def _finite(data: Any) -> Any:
    """JSON knows no infinite number and no NaN: null stands for what cannot be written."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def span(text: str | None, option: str) -> tuple[int, int] | None:
    """A number, or a range as 4-8; None where nothing was given."""
    if text is None:
        return None
    low, dash, high = text.partition("-")
    first, last = whole_number(low.strip()), whole_number(high.strip() if dash else low.strip())
    if first is None or last is None:
        raise AnchorsError(
            f"{option} {text!r} is neither a number nor a range.",
            f"For example: {option} 4-8",
            code="option-value",
        )
    return first, last


def layers_from(text: str | None, own: Sequence[int]) -> list[int]:
    """`0,5,10-12` as a list of layers, of those that attend; None is all of them."""
    if text is None:
        return list(own)
    from anchors.attention.layers import ranges

    count = own[-1] + 1
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = (piece.strip() for piece in part.partition("-"))
        first, last = whole_number(low), whole_number(high if dash else low)
        if first is None or last is None or first > last:
            raise AnchorsError(
                f"--layers {text!r} is not a list of layers.",
                "For example: --layers 0,5,10-12",
                code="layers",
            )
        if last >= count:
            whole = list(own) == list(range(count))
            there = (
                f"the model has layers 0 to {count - 1}" if whole else f"attention stands in {ranges(own)}"
            )
            raise AnchorsError(f"--layers {text!r}: {there}.", code="layers")
        found |= set(range(first, last + 1))
    if not found & set(own):
        raise AnchorsError(
            f"--layers {text!r}: none of them attends.", f"Attention stands in {ranges(own)}.", code="layers"
        )
    return sorted(found & set(own))


def shown(path: Path) -> str:
    """A path for the console."""
    return f"[cyan]{escape(str(path))}[/]"
