"""`anchors isolate`: cut the label words off and see what changes (2.2)."""

from typing import TYPE_CHECKING, Annotated

import typer

from anchors.cli import common
from anchors.cli.common import out, summary_table
from anchors.cli.setting import Setting, measurement, numbers

if TYPE_CHECKING:
    from anchors.runner import Analysis


@measurement()
def isolate(
    setting: Setting,
    k: Annotated[str, typer.Option("--layers", "-k", help="How many layers, e.g. 5 or 1,3,5,7.")] = "5",
    sides: Annotated[
        str, typer.Option(help="Which of them: first, last or both, with a comma.")
    ] = "first,last",
    positions: Annotated[
        str,
        typer.Option(help="label: the label words; random: as many other positions of the demonstrations."),
    ] = "label,random",
    top: Annotated[int, typer.Option(min=1, help="Words that word loyalty compares.")] = 10,
) -> None:
    """Isolate label words in the first or last k layers: label loyalty, word loyalty, accuracy.

    A(p, i) = 0 for i < p at every label-word position p, before the softmax. If label words gather their demonstrations
    in shallow layers, isolation in the first layers hurts, in the last ones it does not, and at random positions it
    hurts less.
    """
    layers = numbers(k, "--layers")

    def analyses() -> "list[Analysis]":
        from anchors.isolation import Isolation

        return [
            Isolation(layers, common.words(sides, "--sides"), common.words(positions, "--positions"), top)
        ]

    result = setting.report("isolate", analyses)
    if setting.as_json:
        common.print_json(result.as_json())
        return
    for task, part in result.tables["summary"].groupby("task", sort=False):
        title = f"Isolation: {task}, {result.facts['model']}, {part['examples'].iloc[0]} examples"
        out.print(summary_table(part, ["accuracy", "label_loyalty", "word_loyalty"], title))
    common.print_files(result.files)
