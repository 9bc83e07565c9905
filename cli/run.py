"""`anchors run`: the paper's figures and tables, and a few of ours, each by one command."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.markup import escape

from anchors.cli import common
from anchors.cli.common import err, estimate, out
from anchors.cli.setting import BatchSize, DataSource, TooLong, batch, check_protocol, numbers
from anchors.cli.tables import Grid
from anchors.errors import AnchorsError, nearest

if TYPE_CHECKING:
    import pandas as pd

    from anchors.experiments import Experiment
    from anchors.model.language import LanguageModel
    from anchors.study.cluster import Cluster
    from anchors.study.prompted import Far, Part, Report
    from anchors.tasks.task import Chat

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAMES...",
        help="Experiments, see `anchors ls`; `all` for every one, `scale` for those that a study of scale needs, the weightiest first.",
    ),
]
Folder = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        help="Folder of the results: one folder for each experiment, and the runs.",
        rich_help_panel="Output",
    ),
]


def run(
    names: Names,
    model: common.Model = None,
    data: DataSource = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--task", "-t", help="Only these of the grid's tasks, with commas.", rich_help_panel="Protocol"
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Instead of the paper's 42,43,44,45,46.", rich_help_panel="Protocol")
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            "--examples",
            "-n",
            min=1,
            help="At most so many per seed (the paper: 1000).",
            rich_help_panel="Protocol",
        ),
    ] = None,
    chat: common.ChatForm = None,
    system: common.System = None,
    skip_too_long: TooLong = False,
    batch_size: BatchSize = "auto",
    device: common.Device = "auto",
    devices: common.Devices = None,
    precision: common.Precision = "auto",
    device_map: common.DeviceMap = None,
    revision: common.Revision = None,
    trust_remote_code: common.Remote = False,
    cluster: common.ClusterAt = None,
    share: common.Share = 1.0,
    to: Folder = Path("results"),
    budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds for each experiment: after them those of its seeds that are whole make its results, and the next one begins.",
            rich_help_panel="Protocol",
        ),
    ] = None,
    rows: Annotated[
        bool,
        typer.Option(
            "--rows",
            help="Only measure and write rows: `anchors figures` makes tables and pictures of them, without a model.",
            rich_help_panel="Output",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only show what is left to do and about what it costs: operations, memory, time.",
            rich_help_panel="Output",
        ),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Print ours beside the paper's numbers.", rich_help_panel="Output"),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the tables as JSON.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Run experiments: measure what is missing, write rows, tables and figure, print the result.

    Each is a frozen grid of model × task × shots × seed. A run can be stopped at any point and goes on where it was;
    cells that experiments share are computed once.
    """
    with (
        common.reporting(),
        common.machines(cluster, share, device, devices, dry_run=dry_run) as machines,
        ExitStack() as inside,
    ):
        from anchors.experiments import CATALOGUE
        from anchors.study.results import require_writable

        chosen = experiments(names)
        if budget is not None and (cluster is not None or not budget > 0):
            raise AnchorsError(
                f"--budget is {budget:g}: it is a number of seconds on this machine.",
                "Give one above 0, and no --cluster.",
                code="option-value",
            )
        check_protocol(seeds or "42", "none", batch_size)
        only = common.words(tasks, "--task")
        told = common.chat_from(chat, system)
        require_writable(to)
        known = {name for e in CATALOGUE.values() for cells in e.cells for name in cells.tasks}
        if only is not None and (strangers := [name for name in only if name not in known]):
            raise AnchorsError(
                f"No experiment has the tasks {strangers}.",
                nearest(strangers[0], sorted(known)),
                code="unknown-name",
            )
        if only is not None and len(chosen) > 1:
            chosen = [e for e in chosen if any(set(cells.tasks) & set(only) for cells in e.cells)]
        plan = {e.name: _grid(e, data, only, told) for e in chosen}
        sets = {task.name: (task, own) for grid in plan.values() for _, task, own in grid}
        common.print_data(*zip(*sets.values(), strict=True))
        asked = [task for task, _ in sets.values()]
        places = common.devices_of(devices, device)
        wanted = (model, places[0], precision, device_map, revision, trust_remote_code)
        here = common.load_model(*wanted, asked) if machines is None else None
        common.load_libraries()
        from anchors.model.source import Source
        from anchors.study.cost import Cost
        from anchors.study.helpers import helped
        from anchors.study.plan import Outlook, outlook
        from anchors.study.prompted import Far
        from anchors.study.results import plain

        source = Source(*wanted)
        inside.enter_context(helped(places, source))
        lm = here or Far(cast("Cluster", machines), source)
        printed: dict[str, Any] = {}
        plans: dict[str, list[Outlook]] = {}
        cost = None if here is None else Cost(here)
        failed = []
        for experiment in chosen:
            try:
                parts = _parts(
                    plan[experiment.name],
                    experiment,
                    experiment.seeds if seeds is None else numbers(seeds, "--seeds", least=0),
                    examples,
                    batch(batch_size),
                    skip_too_long,
                )
                if dry_run and here:
                    plans[experiment.name] = outlook(here, parts, to, cost)
                    continue
                result = _measure(lm, experiment, parts, to, budget, rows=rows)
            except AnchorsError as error:
                if len(chosen) == 1:
                    raise
                common.print_error(error, experiment.name)
                failed.append(experiment.name)
                continue
            printed[experiment.name] = result.as_json()
            if rows:
                common.print_files(result.files)
                continue
            if compare and experiment.paper:
                beside = experiment.compare(result.tables)
                printed[experiment.name]["paper"] = plain(beside)
            if not as_json:
                _show(experiment, result, compare=compare)
        if dry_run:
            common.print_outlook(plans, as_json=as_json)
        elif as_json:
            common.print_json(printed)
        if failed:
            raise AnchorsError(
                f"{len(failed)} of {len(chosen)} experiments could not be run: {', '.join(failed)}.",
                "The others are done; run the same command again after mending.",
                code="not-all-run",
            )


def experiments(names: list[str]) -> "list[Experiment]":
    """The experiments of these names."""
    from anchors.experiments import CATALOGUE, SUITES

    wanted = [own for name in names for own in ("all",) * (name == "all") or SUITES.get(name, (name,))]
    unknown = [name for name in wanted if name not in CATALOGUE and name != "all"]
    if unknown:
        raise AnchorsError(
            f"No experiment is called {unknown}.",
            nearest(unknown[0], [*CATALOGUE, *SUITES, "all"]),
            code="unknown-name",
        )
    return (
        list(CATALOGUE.values()) if "all" in wanted else [CATALOGUE[name] for name in dict.fromkeys(wanted)]
    )


def _grid(
    experiment: "Experiment", source: str | None, only: tuple[str, ...] | None, chat: "Chat | None"
) -> list[tuple]:
    """Cells, task and data of each part; the data is read before any model is loaded."""
    from anchors.tasks.data import read
    from anchors.tasks.task import task

    names = [name for cells in experiment.cells for name in cells.tasks if only is None or name in only]
    sets = {name: read(task(name), source) for name in dict.fromkeys(names)}
    chosen = [
        (cells, own if chat is None else replace(own, chat=chat), sets[name])
        for cells in experiment.cells
        for name in cells.tasks
        if name in sets
        for own in [cells.task(name)]
    ]
    if not chosen:
        known = sorted({name for cells in experiment.cells for name in cells.tasks})
        raise AnchorsError(
            f"{experiment.name} has none of the tasks {list(only or ())}.",
            f"It has {', '.join(known)}.",
            code="unknown-name",
        )
    return chosen


def _parts(
    grid: list[tuple],
    experiment: "Experiment",
    seeds: tuple[int, ...],
    examples: int | None,
    size: int | None,
    skip: bool,
) -> "list[Part]":
    from anchors.study.prompted import Part
    from anchors.study.runner import Sample

    parts = []
    for cells, task, data in grid:
        bounds = [n for n in (experiment.examples, cells.examples, examples, len(data.test)) if n is not None]
        sample = Sample(cells.shots_of(task.name), seeds, min(bounds), cells.control, size, skip)
        parts.append(Part(cells.make(), task, data, sample))
    return parts


def _measure(
    lm: "LanguageModel | Far",
    experiment: "Experiment",
    parts: "list[Part]",
    to: Path,
    budget: float | None = None,
    *,
    rows: bool = False,
) -> "Report":
    from anchors.study.prompted import in_time, kept_rows, report

    with common.progress_bar(experiment.name) as progress:
        if budget is not None:
            parts, told = in_time(cast("LanguageModel", lm), parts, budget, to, progress)
            common.print_notes([told] if told else [])
        where: dict[str, Any] = {"out": to / experiment.name, "runs": to, "name": experiment.name}
        result = (
            kept_rows(lm, parts, progress=progress, **where)
            if rows
            else report(
                lm,
                parts,
                figure=experiment.figure or "none",
                tables=experiment.tables,
                progress=progress,
                **where,
            )
        )
    common.print_notes(result.notes)
    return result


def _show(experiment: "Experiment", result: "Report", *, compare: bool) -> None:
    out.print(f"[bold]{experiment.name}[/]: {escape(experiment.title)}")
    out.print(
        f"the paper: {escape(experiment.finding)}"
        if not experiment.finding.startswith("Ours")
        else escape(experiment.finding)
    )
    table = next(iter(result.tables.values()))
    model = result.title
    if "layer" in table and table["layer"].notna().any():
        out.print(common.layer_table(table[table["layer"].notna()], f"{experiment.name}, {model}"))
    elif {"condition", "metric"} <= set(table.columns):
        for task, part in table.groupby("task", sort=False):
            metrics = [m for m in experiment.metrics if m in set(part["metric"])]
            out.print(common.summary_table(part, metrics, f"{task}, {model}"))
    elif "correlation" in table:
        for row in table.to_dict("records"):
            rho = estimate(row["correlation"], row["low"], row["high"])
            said = f"{row['condition']}: rank correlation {rho}, permutation p = {row['p']:.3f}"
            out.print(said, markup=False)
    for told in result.sentences:
        out.print(told, markup=False)
    if compare and experiment.paper:
        out.print(_compared(experiment, experiment.compare(result.tables)))
    elif compare:
        err.print("[yellow]note:[/] the paper prints no numbers here, only the finding above.")
    common.print_files(result.files)


def _compared(experiment: "Experiment", both: "pd.DataFrame") -> Grid:
    models = [c for c in both.columns if c not in ("task", "condition", "metric", "value", "low", "high")]
    table = Grid(f"{experiment.name}: ours beside the paper's", keys=3)
    for name in ("task", "condition", "metric", *models, "ours"):
        table.add_column(name)
    for row in both.to_dict(orient="records"):
        paper = [estimate(row[m], None, None) for m in models]
        table.add_row(
            escape(row["task"]),
            escape(row["condition"]),
            row["metric"],
            *paper,
            estimate(row["value"], row["low"], row["high"]),
        )
    return table
