"""How `anchors inject sweep` shows which method injects how much of a skill, and what the VLM forgets meanwhile."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from anchors.cli import common
from anchors.cli.common import estimate
from anchors.cli.tables import Grid

if TYPE_CHECKING:
    import pandas as pd

    from anchors.study.report import Report


def shown(result: "Report", view: Any) -> Iterator[Grid]:
    """Of every scenario references, what is best, comparisons and sensitivity; all scenarios beside each other."""
    # That of vision; none where vision has an expert itself.
    beside = set(result.tables["guessing"]["scenario"]) - set(result.tables["summary"]["scenario"])
    for scenario in dict.fromkeys(result.tables["summary"]["scenario"]):
        own = {name: t[t["scenario"] == scenario] for name, t in result.tables.items()}
        guesses = result.tables["guessing"]
        own["guessing"] = guesses[guesses["scenario"].isin({scenario} | beside)]
        for show in (_references, _best, _matched, _sensitivity):
            if (table := show(own, scenario)) is not None:
                yield table
    yield _scenarios(result.tables["scenarios"])


INTERVALS = "[95 % bootstrap interval; Wilson's where all answers are right, or all wrong]"


def _table(title: str, *columns: str, keys: int = 1) -> Grid:
    return common.new_table(title, *columns, keys=keys)


def _cells(row: dict, *names: str, signed: bool = False) -> list[str]:
    """Estimates; a missing column is an empty cell."""
    return [
        estimate(*(row.get(f"{name}{end}") for end in ("", "_low", "_high")), signed=signed) for name in names
    ]


def _references(tables: "dict[str, pd.DataFrame]", scenario: str) -> Grid:
    names = ("skill", "blank", "shuffled", "vision")
    table = _table(f"{scenario} without injection", "", "skill", "image blank", "shuffled", "vision")
    table.below = f"{INTERVALS}; {guessed(tables['guessing'])}"
    found = tables["summary"]
    for row in found[found["family"] == "reference"].to_dict(orient="records"):
        table.add_row(row["setting"], *_cells(row, *names))
    return table


def guessed(found: "pd.DataFrame") -> str:
    """What the accuracies have to be compared with."""
    told = [
        f"{row['scenario']} {estimate(row['chance'], None, None)} and {estimate(row['majority'], None, None)}"
        for row in found.to_dict(orient="records")
    ]
    return f"right by chance and by always giving the kind's most frequent answer: {', '.join(told)}"


def _best(tables: "dict[str, pd.DataFrame]", scenario: str) -> Grid:
    found = tables["best"]
    share, chosen_on, split = found[["retention", "chosen_on", "split"]].iloc[0]
    title = (
        f"{scenario}: of each family the setting of highest skill among those that keep {100 * share:g} % of the VLM's vision "
        f"on {chosen_on}; what it does on {split}"
    )
    lost = not found["kept"].all()
    caption = f"{INTERVALS}; vision kept: of the VLM's own on {split}"
    caption += f"; ✗: kept on {chosen_on}, but not on {split}" if lost else ""
    table = _table(
        title, "family", "setting", "skill", "vision", "vision kept", "net of blank", "Δ skill", keys=2
    )
    table.below = caption
    for row in found.to_dict(orient="records"):
        family, setting = row["family"], row["setting"].removeprefix(f"{row['family']} ")
        skill, vision, kept, net = _cells(row, "skill", "vision", "vision_kept", "net")
        kept += "" if row["kept"] else " ✗"
        table.add_row(
            *map(escape, (family, setting)), skill, vision, kept, net, *_cells(row, "difference", signed=True)
        )
    return table


def _matched(tables: "dict[str, pd.DataFrame]", scenario: str) -> Grid | None:
    """At the strength nearest to 1 alone; the file has all."""
    found = tables["matched"]
    if not len(found):  # without task arithmetic there is nothing to compare with, and no column
        return None
    found = found[found["family"] != "task-arithmetic"]
    if not len(found):
        return None
    at = min(found["at"], key=lambda x: abs(x - 1))
    title = f"{scenario}: difference to task arithmetic at λ = {at:g}, at equal λ and at equal norm added"
    table = _table(title, "family", "d", "skill, λ", "vision, λ", "skill, norm", "vision, norm", keys=2)
    own = found[found["at"] == at]
    for (family, density), part in own.groupby(["family", "density"], sort=False, dropna=False):
        by = {row["by"]: row for row in part.to_dict(orient="records")}
        names = ("skill_difference", "vision_difference")
        cells = [
            cell for how in ("strength", "dose") for cell in _cells(by.get(how, {}), *names, signed=True)
        ]
        table.add_row(escape(family), "" if density != density else f"{density:g}", *cells)
    return table


def _sensitivity(tables: "dict[str, pd.DataFrame]", scenario: str) -> Grid:
    columns = ("family", "of", "lowest", "highest", "near the best", "keep vision", "both")
    table = _table(f"{scenario}: how much hangs on the numbers (shares of settings)", *columns)
    for row in tables["sensitivity"].to_dict(orient="records"):
        cells = _cells(row, "lowest", "highest", "near", "keep", "both")
        table.add_row(escape(row["family"]), str(row["settings"]), *cells)
    return table


def _scenarios(found: "pd.DataFrame") -> Grid:
    """All scenarios beside each other."""
    columns = ("scenario", "at", "skill", "vision", "net of blank", "of the oracle", "rank", "holds")
    table = _table("Which scenarios can be injected", *columns, keys=2)
    for row in found.to_dict(orient="records"):
        cells = [row["scenario"], "chosen" if row["how"] == "best" else row["how"]]
        cells += _cells(row, "skill", "vision", "net", "recovered")
        rank, share = row["rank"], row["rank_share"]
        shown = ["" if rank != rank else f"{rank:.0f}", "" if share != share else f"{share:.0%}"]
        table.add_row(*map(escape, cells), *shown)
    return table
