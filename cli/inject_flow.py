"""How `anchors inject flow` shows information flow from images and text, before and after an injection."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from anchors.cli.common import estimate, new_table
from anchors.cli.inject_sweep import INTERVALS, guessed
from anchors.cli.tables import Grid

if TYPE_CHECKING:
    import pandas as pd

    from anchors.study.report import Report


def shown(result: "Report", view: Any) -> Iterator[Grid]:
    """Flow over λ, whether damage goes with it, and rules for λ."""
    facts = result.facts
    method = next(part["recipe"]["method"] for part in facts["parts"] if "recipe" in part)
    for show in (_strengths, _damage, _regret):
        if (table := show(result.tables, f"{result.title}, {method}")) is not None:
            yield table


def _strengths(tables: "dict[str, pd.DataFrame]", title: str) -> Grid | None:
    from anchors.figures.inject_flow import PATHS

    found, right = tables["strengths"], tables["accuracy"].set_index(["scenario", "expert", "strength"])
    own = found[(found["measure"] == "share") & (found["labels"] == "gold")]
    metrics = [m for m in PATHS if (own["metric"] == m).any()]
    paths = (f"{PATHS[m][0]}, {half}" for m in metrics if m[2] == "i" for half in ("shallow", "deep"))
    table = new_table(
        f"Share of the flow that comes from images and text: {title}",
        *("scenario", "expert", "λ", "accuracy", *paths),
        keys=3,
        caption="into label words and into the target; mean over layers of the shallow and of the deep half "
        f"{INTERVALS}; {guessed(tables['guessing'])}",
    )
    for (scenario, expert, strength), part in own.groupby(["scenario", "expert", "strength"], sort=False):
        cells = part.set_index(["metric", "part"])
        shown = [
            estimate(*cells.loc[(m, half), ["value", "low", "high"]])
            for m in metrics
            if m[2] == "i"
            for half in ("shallow", "deep")
        ]
        accuracy = estimate(*right.loc[(scenario, expert, strength), ["value", "low", "high"]])
        table.add_row(escape(scenario), escape(expert), f"{strength:g}", accuracy, *shown)
    return table


def _damage(tables: "dict[str, pd.DataFrame]", title: str) -> Grid | None:
    if "damage" not in tables:
        return None
    table = new_table(
        f"Does vision damage go with lost image flow? {title}",
        *("measure", "flow", "layers", "ρ", "p", "q", "ρ beyond λ", "p", "q", "settings"),
        keys=3,
        caption="Spearman's ρ of the drop of vision accuracy and the relative loss of flow; permutation p"
        f"{_least(tables['damage'])}; q: p corrected for the number of these tests",
    )
    for row in tables["damage"].to_dict("records"):
        numbers = [f"{row['rho']:+.2f}", f"{row['p']:.4f}", f"{row['q']:.3f}"]
        numbers += [f"{row['within']:+.2f}", f"{row['within_p']:.3f}", f"{row['within_q']:.3f}"]
        shown = ["" if "nan" in text else text for text in numbers]
        counted = f"{row['settings']} on {row['curves']} curves"
        table.add_row(row["measure"], row["metric"], row["part"], *shown, counted)
    return table


def _least(damage: "pd.DataFrame") -> str:
    """How small the p beyond λ can get."""
    least = damage["least_p"].dropna()
    return f", beyond λ no smaller than {least.max():.2g}" if len(least) else ""


def _regret(tables: "dict[str, pd.DataFrame]", title: str) -> Grid | None:
    if "regret" not in tables:
        return None
    table = new_table(
        f"Choosing λ: {title}",
        *("rule", "mean regret", "chosen λ by expert"),
        caption="regret: best utility over the grid minus the chosen λ's; utility: mean of skill accuracy and vision retention; "
        "ε, c and the best fixed λ are fitted with labels of the other experts",
    )
    table.columns[2].no_wrap = False
    for row in tables["regret"].to_dict("records"):
        own = tables["choices"][tables["choices"]["rule"] == row["rule"]]
        chosen = [
            f"{escape(expert)} {', '.join(f'{x:g}' for x in part['strength'])}"
            for expert, part in own.groupby("expert", sort=False)
        ]
        regret = estimate(row["regret"], row["low"], row["high"], digits=3)
        table.add_row(escape(row["rule"]), regret, "; ".join(chosen))
    return table
