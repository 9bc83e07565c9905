"""`anchors check`: certify that the analyses are exact on a model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from anchors.cli import common
from anchors.cli.common import out
from anchors.cli.tables import Grid

if TYPE_CHECKING:
    from anchors.certificate.agreement import Finding


def check(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, directory or .gguf file; default: SmolLM2-135M-Instruct.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help="Tasks whose label words are checked; default: all four."),
    ] = None,
    template: common.Template = None,
    labels: common.Labels = None,
    policy: common.Policy = None,
    device: common.Device = "auto",
    precision: common.Precision = "auto",
    device_map: common.DeviceMap = None,
    revision: common.Revision = None,
    trust_remote_code: common.Remote = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Certify a model, against itself as it came: logits, causality, positions, both sides of every length at which its
    attention changes; edits, saliency against its definition, batching, shared demonstrations, label words.

    A dot marks what could not be asked, and says why. Exit code 1 if one fails.
    """
    with common.reporting():
        from anchors.places import titled
        from anchors.tasks.task import TASKS

        own = template is not None or labels is not None
        tasks = common.tasks_from(task or ([] if own else list(TASKS)), template, labels, policy)
        lm = common.load_model(model, device, precision, device_map, revision, trust_remote_code)
        from anchors.check import check as certify
        from anchors.check import failed
        from anchors.tasks.data import read
        from anchors.tasks.drawing import Draw, draw

        sst2 = TASKS["sst2"]
        prompts = [d.prompt for d in draw(sst2, read(sst2), lm.tokenizer, Draw(), 3)]
        with common.err.status("checking"):
            findings = certify(lm, prompts, tasks)
        if as_json:
            common.print_json([vars(f) for f in findings])
        else:
            out.print(table(findings, f"{titled(lm.name)}, {lm.precision} on {lm.device}"))
    if failed(findings):
        raise typer.Exit(1)


def table(findings: "Sequence[Finding]", title: str) -> Grid:
    """What was asked, whether it holds, and the number that this rests on."""
    made = Grid(title, show_header=False)
    for overflow in ("ellipsis", "fold", "fold"):
        made.add_column(overflow=overflow)
    for finding in findings:
        mark = {True: "[green]✓[/]", False: "[bold red]✗[/]", None: "·"}[finding.ok]
        made.add_row(mark, escape(finding.name), escape(finding.detail))
    return made
