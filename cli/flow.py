"""`anchors flow`: the information flow of a model doing in-context learning (2.1)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from anchors.cli import common
from anchors.cli.common import err, out, shown

if TYPE_CHECKING:
    import pandas as pd

COLOURS = {"s_wp": "blue", "s_pq": "red", "s_ww": "bright_black"}


def flow(
    model: common.Model = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            help="sst2, trec, agnews, emo, a .toml file, or a name for your own; several with commas.",
            rich_help_panel="Task",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="builtin, hub, a directory (train and test files, by task) or a file: JSON lines, CSV, TSV, "
            "parquet with columns text and label.",
            rich_help_panel="Task",
        ),
    ] = None,
    template: common.Template = None,
    labels: common.Labels = None,
    policy: common.Policy = None,
    shots: Annotated[
        int, typer.Option(min=1, help="Demonstrations per class.", rich_help_panel="Protocol")
    ] = 1,
    examples: Annotated[
        int, typer.Option("--examples", "-n", min=1, help="Prompts per seed.", rich_help_panel="Protocol")
    ] = 60,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.", rich_help_panel="Protocol")] = "42",
    skip_too_long: Annotated[
        bool,
        typer.Option(
            "--skip-too-long", help="Leave out prompts longer than the context.", rich_help_panel="Protocol"
        ),
    ] = False,
    batch_size: Annotated[
        str, typer.Option(help="Prompts per batch, or auto.", rich_help_panel="Protocol")
    ] = "auto",
    device: common.Device = "auto",
    precision: common.Precision = "auto",
    device_map: common.DeviceMap = None,
    revision: common.Revision = None,
    trust_remote_code: common.Remote = False,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers shown in table and page, e.g. 0,5,10-12; all are measured.", rich_help_panel="Output"
        ),
    ] = None,
    pages: Annotated[
        int, typer.Option(min=0, help="Prompts on the HTML page.", rich_help_panel="Output")
    ] = 3,
    to: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the results.", rich_help_panel="Output")
    ] = Path("results/flow"),
    csv: Annotated[
        bool, typer.Option("--csv", help="Write the rows as CSV, too.", rich_help_panel="Output")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Measure S_wp, S_pq and S_ww by layer; write a table, a figure and a page to click through.

    I_l = |Σ_h A ⊙ ∂L/∂A|: S_wp is the mean flow from words to label words, S_pq from label words to the target, S_ww
    between all other words. Running the same command again computes only what is missing.
    """
    with common.reporting():
        from anchors.errors import AnchorsError

        tasks = common.tasks_from(task or [], template, labels, policy)
        seed_list = [int(s) for s in seeds.split(",") if s.strip().isdigit()]
        if not seed_list or (batch_size != "auto" and not (batch_size.isdigit() and int(batch_size))):
            raise AnchorsError(f"--seeds {seeds!r} or --batch-size {batch_size!r} is not a number.")
        from anchors.results import require_writable
        from anchors.tasks.data import read

        require_writable(to)
        sets = [read(t, data) for t in tasks]
        lm = common.load_model(model, device, precision, device_map, revision, trust_remote_code)
        chosen = common.layers_from(layers, lm.n_layers)
        from anchors.flow.report import report

        with common.progress_bar("prompts") as progress:
            result = report(
                lm,
                tasks,
                sets,
                out=to,
                shots=shots,
                seeds=seed_list,
                examples=examples,
                batch_size=None if batch_size == "auto" else int(batch_size),
                skip_too_long=skip_too_long,
                layers=chosen,
                pages=pages,
                csv=csv,
                progress=progress,
            )
        for note in result.notes:
            err.print(f"[yellow]note:[/] {escape(note)}")
        if as_json:
            common.print_json(result.as_json())
            return
        for t in tasks:
            out.print(
                _table(result.summary[result.summary["task"] == t.name], chosen, f"{t.name}, {lm.name}")
            )
        for path in result.files:
            err.print(shown(path))


def _table(summary: "pd.DataFrame", layers: list[int], title: str) -> Table:
    examples = summary["examples"].iloc[0]
    table = Table(
        title=f"Information flow: {escape(title)}, {examples} examples",
        caption="mean [95 % bootstrap interval] in thousandths; share of each sum in the layer in %",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("layer", justify="right", no_wrap=True)
    for name, colour in COLOURS.items():
        table.add_column(name.capitalize(), style=colour, no_wrap=True)
    table.add_column("shares", no_wrap=True)
    for layer in layers:
        part = summary[summary["layer"] == layer].set_index("metric")
        cells = [_interval(*(1e3 * part.loc[name, ["mean", "low", "high"]])) for name in COLOURS]
        table.add_row(
            str(layer), *cells, " ".join(f"{100 * part.loc[name, 'share']:.0f}" for name in COLOURS)
        )
    return table


def _interval(mean: float, low: float, high: float) -> str:
    import numpy as np

    def short(x: float) -> str:
        text = np.format_float_positional(x, precision=2, fractional=False, trim="-")
        return text.removeprefix("0") or "0" if "." in text else text

    return short(mean) if np.isnan(low) else f"{short(mean)} \\[{short(low)}, {short(high)}]"
