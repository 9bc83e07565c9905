"""`anchors compress`: demonstrations as the keys and values of their anchors (3.2)."""

from typing import TYPE_CHECKING, Annotated

import typer

from anchors.cli import common
from anchors.cli.common import estimate, out, summary_table
from anchors.cli.setting import Setting, measurement
from anchors.errors import AnchorsError

if TYPE_CHECKING:
    from anchors.runner import Analysis


@measurement()
def compress(
    setting: Setting,
    methods: Annotated[
        str, typer.Option(help="hidden_anchor, text_anchor, hidden_random, with commas.")
    ] = "hidden_anchor,text_anchor,hidden_random",
    positions: Annotated[
        str,
        typer.Option(
            help="Where the test input stands: after-last-anchor, restart (at 0), original, or reference (the authors' choice for a family like this)."
        ),
    ] = "after-last-anchor",
    draws: Annotated[int, typer.Option(min=1, help="Random choices of hidden_random.")] = 20,
    top: Annotated[int, typer.Option(min=1, help="Words that word loyalty compares.")] = 5,
    speed: Annotated[bool, typer.Option(help="Measure the speed-up, too.")] = True,
) -> None:
    """Keep only label words and format tokens of the demonstrations: loyalties, accuracy, measured speed-up.

    The demonstrations are run once; of their keys and values only those at the anchors stay, and the test input
    attends to these. In Python, AnchorCache gives such a cache to model.generate.
    """

    def analyses() -> "list[Analysis]":
        from anchors.compression import RULES, Compression, Speed

        if positions not in (*RULES, "reference"):
            raise AnchorsError(f"--positions {positions!r} is not one of {', '.join((*RULES, 'reference'))}.")

        chosen: list[Analysis] = [Compression(common.words(methods), positions, draws, top)]  # type: ignore[arg-type]
        return [*chosen, Speed(rule=positions)] if speed else chosen  # type: ignore[arg-type]

    result = setting.report("compress", analyses)
    if setting.as_json:
        common.print_json(result.as_json())
        return
    for task, part in result.tables["summary"].groupby("task", sort=False):
        title = f"Compression: {task}, {result.facts['model']}, {part['examples'].iloc[0]} examples"
        out.print(summary_table(part, ["accuracy", "label_loyalty", "word_loyalty"], title))
        sizes = result.tables["sizes"]
        memory = sizes[(sizes["task"] == task) & (sizes["metric"] == "cache_bytes")].set_index("condition")[
            "value"
        ]
        if "hidden_anchor" in memory:
            saved = 1 - memory["hidden_anchor"] / memory["none"]
            out.print(
                f"cache of the demonstrations: {memory['none'] / 2**20:.2f} → {memory['hidden_anchor'] / 2**20:.2f} MiB "
                f"({100 * saved:.0f} % saved)"
            )
        if speed:
            own = result.tables["speed"].set_index("task").loc[task]
            demo, given, kept = (own[f"{n}_tokens"] for n in ("demonstration", "input", "kept"))
            out.print(
                f"speed-up {estimate(own['value'], own['low'], own['high'])}; as far as time goes with the tokens that are "
                f"run at most (L_demo + L_x) / L_x = ({demo:.0f} + {given:.0f}) / {given:.0f} = {own['bound']:.2f}\n"
                f"no bound, since anchors are attended to and not run: (L_demo + L_x) / (L_x + anchors) = "
                f"({demo:.0f} + {given:.0f}) / ({given:.0f} + {kept:.0f}) = {own['limit']:.2f}",
                markup=False,
            )
    common.print_files(result.files)
