"""`anchors inject demo`: build a vision-language model, its experts and a suite to try injection on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from anchors.cli import common
from anchors.cli.common import err, out
from anchors.cli.progress import GOES_ON
from anchors.cli.tables import Grid
from anchors.errors import AnchorsError, nearest
from anchors.injection.demo.scales import SCALES

if TYPE_CHECKING:
    from anchors.injection.demo.build import Built


def demo(
    to: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder; the same command goes on there.", rich_help_panel="Output"),
    ],
    scale: Annotated[
        str,
        typer.Option(
            help="tiny or tiny-patches (minutes on one core), 135m-digits (an hour on one core) or 135m (minutes on one GPU)."
        ),
    ] = "tiny",
    seed: Annotated[int, typer.Option(min=0, help="Of data and weights.")] = 0,
    base: Annotated[
        str | None,
        typer.Option(
            help="For 135m and 135m-digits: directory or .gguf file of the language model; default: SmolLM2-135M-Instruct.",
            rich_help_panel="Model",
        ),
    ] = None,
    device: common.Device = "auto",
    steps_factor: Annotated[
        float, typer.Option(help="All trainings longer or shorter, e.g. 0.1 for a trial.")
    ] = 1.0,
    upper: Annotated[
        bool,
        typer.Option(help="Also train the VLM on each skill with pictures, as the upper bound of injection."),
    ] = True,
    questions: Annotated[
        bool,
        typer.Option(
            help="Teach the base the vision questions in text, before it gets eyes; without, the projector has to."
        ),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the accuracies as JSON.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Build a small vision-language model and three text-only experts from one base, and a suite to measure them on.

    A base language model; a LLaVA made of it in stages (vision tower, projector, then all gently); experts for following
    instructions, for other languages and for mathematics, trained on texts only; and, as an upper bound, the LLaVA
    trained on each skill with pictures. Then try: anchors inject sweep DIR/suite. A build that was broken off goes on
    with the stage it was in. Several GPUs: accelerate launch --num_processes 2 $(which anchors) inject demo ….
    """
    with common.reporting():
        if scale not in SCALES:
            raise AnchorsError(f"There is no scale {scale!r}.", nearest(scale, SCALES), code="unknown-name")
        if base is not None and SCALES[scale].language is not None:
            raise AnchorsError(
                f"The scale {scale} trains a base of its own.",
                "Leave out --base, or take 135m.",
                code="options-together",
            )
        speaks = common.first_of_several()
        with err.status("loading torch and transformers"):
            from transformers.utils import logging as transformers_logging

            from anchors.injection.demo.build import Builder
            from anchors.training import Team
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        size = SCALES[scale].with_steps(steps_factor)
        team = Team.made(device)
        builder = Builder(to, size, seed, team.device, base, upper, questions, team)
        with common.progress_bar("steps", "finished stages are kept; " + GOES_ON + ".") as told:
            built = builder.build(lambda name, done, total: told(done, total, name))
        if not speaks:
            return
        if as_json:
            common.print_json({name: part.facts for name, part in built.items()})
            return
        out.print(_table(built, f"{scale}, seed {seed}"))
        common.print_files([to])
        err.print(f"next: anchors inject sweep {escape(str(to / 'suite'))}")


def _table(built: "dict[str, Built]", title: str) -> Grid:
    """One row per model, one column per scenario."""
    columns = {"vision": "vision", "instruction": "instr.", "crosslingual": "lang.", "mathematics": "maths"}
    table = Grid(title, caption="exact match on held-out examples", keys=2)
    table.add_column("model")
    for name in ("asked about", *columns.values(), "seconds"):
        table.add_column(name)
    for name, part in built.items():
        for given, about in (("text", "texts"), ("seen", "pictures")):
            if given in part.facts:
                cells = [common.estimate(part.facts[given].get(c), None, None) for c in columns]
                table.add_row(name, about, *cells, f"{part.facts['seconds']:.0f}")
    return table
