"""How `anchors nsa probe` shows what becomes of label words in a model with Native Sparse Attention."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anchors.cli.common import estimate, new_table
from anchors.cli.tables import Grid

if TYPE_CHECKING:
    import pandas as pd

    from anchors.study.report import Report


@dataclass(frozen=True)
class View:
    """What is shown of a probe.

    Attributes:
        pages: prompts on the HTML page.
    """

    pages: int = field(default=2, metadata={"min": 0})

    def of(self, model: Any) -> dict[str, Any]:
        """What the page takes."""
        return {"pages": self.pages}


def shown(result: "Report", view: View) -> Iterator[Grid]:
    """Selection, branches and interventions."""
    title = f"{result.title}, {result.facts['parts'][0]['examples']} prompts"
    for show in (_selection, _branches, _summary):
        if (table := show(result.tables, title)) is not None:
            yield table


def _selection(tables: "dict[str, pd.DataFrame]", title: str) -> Grid | None:
    if (found := tables.get("selection")) is None:
        return None
    table = new_table(
        f"Selection of label words' blocks: {title}",
        "label words",
        "layer",
        "group",
        "selected",
        "chance",
        "control",
        "AUC",
        "q",
        keys=3,
    )
    for row in found.to_dict(orient="records"):
        spans = [
            estimate(row[n], row[f"{n}_low"], row[f"{n}_high"]) for n in ("asr", "chance", "control", "auc")
        ]
        name = "all" if row["which"] == "label" else "right class"
        table.add_row(name, str(row["layer"]), str(row["group"]), *spans, f"{row['q']:.3f}")
    return table


def _branches(tables: "dict[str, pd.DataFrame]", title: str) -> Grid | None:
    found = tables["branches"]
    if "share" not in found:
        return None
    table = new_table(
        f"Share of each branch: {title}",
        "layer",
        *(f"S_{p} {b}" for p in ("wp", "pq") for b in ("cmp", "slc", "win")),
    )
    indexed = found.set_index(["layer", "pair", "branch"])
    for layer in found["layer"].unique():
        cells = [
            estimate(*indexed.loc[(layer, p, b), ["share", "share_low", "share_high"]])
            for p in ("wp", "pq")
            for b in ("cmp", "slc", "win")
        ]
        table.add_row(str(layer), *cells)
    return table


def _summary(tables: "dict[str, pd.DataFrame]", title: str) -> Grid | None:
    if (found := tables.get("summary")) is None:
        return None
    untouched = found.loc[(found["condition"] == "none") & (found["metric"] == "accuracy")]
    table = new_table(
        f"Interventions: {title}, untouched accuracy "
        + "".join(estimate(*row) for row in untouched[["value", "low", "high"]].to_numpy())
        + "".join(f" (chance {estimate(c, None, None)})" for c in untouched["chance"].dropna()),
        "condition",
        "Δ accuracy",
        "beyond control",
        "Δ label logit",
    )
    indexed = found.set_index(["condition", "metric"])

    def cell(condition: str, metric: str, name: str) -> str:
        if (condition, metric) not in indexed.index or name not in indexed:
            return ""
        return estimate(*indexed.loc[(condition, metric), [name, f"{name}_low", f"{name}_high"]], signed=True)

    for condition in found["condition"].unique():
        if condition != "none":
            wanted = (("accuracy", "difference"), ("accuracy", "beyond"), ("logit", "difference"))
            table.add_row(condition, *(cell(condition, *own) for own in wanted))
    return table
