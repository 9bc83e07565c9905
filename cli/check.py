"""`anchors check`: certify that the analyses are exact on a model."""

from collections.abc import Sequence
from dataclasses import replace
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
        str | None,
        typer.Argument(
            help="Hub id, directory or .gguf file; default: SmolLM2-135M-Instruct. With --families: part of a name."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help="Tasks whose label words are checked; default: all four."),
    ] = None,
    template: common.Template = None,
    labels: common.Labels = None,
    policy: common.Policy = None,
    chat: common.ChatForm = None,
    system: common.System = None,
    device: common.Device = "auto",
    precision: common.Precision = "auto",
    device_map: common.DeviceMap = None,
    revision: common.Revision = None,
    trust_remote_code: common.Remote = False,
    families: Annotated[
        bool,
        typer.Option(
            "--families",
            help="Instead: all families of transformers, what is exact on each, and what is refused why.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Certify a model, against itself as it came: logits, causality, positions, both sides of every length at which its
    attention changes; edits, saliency against its definition, batching, shared demonstrations, label words.

    With --chat its prompts go through the model's chat template. A dot marks what could not be asked, and says why. Exit code 1 if
    one fails.
    """
    if families:
        with common.reporting():
            show_families(model or "", as_json)
        raise typer.Exit
    with common.reporting():
        from anchors.places import titled
        from anchors.tasks.task import TASKS

        own = template is not None or labels is not None
        told = common.chat_from(chat, system)
        tasks = common.tasks_from(task or ([] if own else list(TASKS)), template, labels, policy, chat=told)
        lm = common.load_model(model, device, precision, device_map, revision, trust_remote_code)
        from anchors.check import check as certify
        from anchors.check import failed
        from anchors.tasks.data import read
        from anchors.tasks.drawing import Draw, draw

        sst2 = replace(TASKS["sst2"], chat=told)
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


def show_families(part: str, as_json: bool) -> None:
    """What came of every family whose name holds a text."""
    from anchors.errors import AnchorsError, nearest
    from anchors.families import families, summary

    asked = families()
    found = [f for f in asked if part.lower() in f.name.lower()]
    if not found:
        raise AnchorsError(
            f"No family of transformers {', '.join(sorted({f.transformers for f in asked}))} is called {part!r}.",
            nearest(part, [f.name for f in asked]).partition("There are")[0]
            + "`anchors check --families` shows all.",
            code="unknown-name",
        )
    if as_json:
        common.print_json([vars(f) | {"verbs": f.verbs, "verdict": f.verdict} for f in found])
        return
    for kind in dict.fromkeys(f.kind for f in found):
        made = Grid(f"{kind} families: each against its own eager attention, on a tiny random model", keys=2)
        for name, how in (("family", {}), ("largest error", {"justify": "right"})):
            made.add_column(name, **how)
        for name in ("verdict", "reason"):
            made.add_column(name, overflow="fold")
        for f in (f for f in found if f.kind == kind):
            error = "" if f.error is None else f"{f.error:.0e}"
            made.add_row(escape(f.name), error, escape(f.verdict), escape(f.reason))
        out.print(made)
    if not part:
        out.print(summary()[0].upper() + summary()[1:] + ".", highlight=False)
