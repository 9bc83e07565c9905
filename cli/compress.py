"""How `anchors compress` shows compressed demonstrations (3.2)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from anchors.cli.common import estimate, summary_table
from anchors.cli.tables import Grid

if TYPE_CHECKING:
    from anchors.study.prompted import Report


def shown(result: "Report", view: Any) -> Iterator[Grid | str]:
    """Loyalties by method, saved memory, and the speed-up beside what bounds it, of every task."""
    for task, part in result.tables["summary"].groupby("task", sort=False):
        title = f"Compression: {task}, {result.title}, {part['examples'].iloc[0]} examples"
        yield summary_table(part, ["accuracy", "label_loyalty", "word_loyalty"], title)
        sizes = result.tables["sizes"]
        memory = sizes[(sizes["task"] == task) & (sizes["metric"] == "cache_bytes")].set_index("condition")[
            "value"
        ]
        if "hidden_anchor" in memory:
            saved = 1 - memory["hidden_anchor"] / memory["none"]
            yield (
                f"cache of the demonstrations: {memory['none'] / 2**20:.2f} → {memory['hidden_anchor'] / 2**20:.2f} MiB "
                f"({100 * saved:.0f} % saved)"
            )
        if "speed" in result.tables:
            speed = result.tables["speed"]
            own = speed[(speed["task"] == task) & (speed["condition"] == "hidden_anchor")].iloc[0]
            demo, given, kept = (own[f"{n}_tokens"] for n in ("demonstration", "input", "kept"))
            yield (
                f"speed-up {estimate(own['value'], own['low'], own['high'])}; as far as time goes with the tokens that are "
                f"run at most (L_demo + L_x) / L_x = ({demo:.0f} + {given:.0f}) / {given:.0f} = {own['bound']:.2f}\n"
                f"no bound, since anchors are attended to and not run: (L_demo + L_x) / (L_x + anchors) = "
                f"({demo:.0f} + {given:.0f}) / ({given:.0f} + {kept:.0f}) = {own['limit']:.2f}"
            )
