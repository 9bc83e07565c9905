"""The command `anchors`: parses, draws, and leaves the thinking to the library."""

import os
import sys

import typer

from anchors.cli import (
    check,
    common,
    compare,
    figures,
    inject,
    ls,
    nsa,
    report,
    run,
    view,
)
from anchors.cli.verb import Verbs
from anchors.study.docstring import prose

# Before torch is loaded: on busy cores, threads that spin at every barrier make short operations ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    cls=Verbs,
    help="Look inside in-context learning: how label words gather and pass on information (Label Words are Anchors).",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)
app.command("run")(run.run)
app.command("ls")(ls.ls)
app.command("figures")(figures.figures)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("view")(view.view)
app.command("check")(check.check)
app.add_typer(nsa.app, name="nsa")
app.add_typer(inject.app, name="inject")


@app.callback(invoke_without_command=True)
def version(
    show: bool = typer.Option(False, "--version", help="Print the version and leave.", is_eager=True),
) -> None:
    if show:
        from importlib.metadata import version as installed

        typer.echo(installed("label-anchors"))
        raise typer.Exit


for group in (app, nsa.app, inject.app):
    for command in group.registered_commands:
        if command.callback is not None:
            command.help = command.help or prose(
                command.callback
            )  # paragraphs as lines, which the terminal breaks
            command.callback = common.bounded(command.callback)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe of another encoding shows other signs by their numbers.
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    app()
