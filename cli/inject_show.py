"""What `anchors inject` prints: methods, plans, inspections, and what a merge changed."""

import re
from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from anchors.cli import common
from anchors.cli.tables import Grid

if TYPE_CHECKING:
    from anchors.injection.merging.inspection import Inspection
    from anchors.injection.merging.merge import MergeReport
    from anchors.injection.merging.methods import Method
    from anchors.injection.merging.recipe import Recipe
    from anchors.injection.merging.sources import Sources


def methods(known: "Mapping[str, Method]") -> Grid:
    """Every method, its parameters and where it is from."""
    table = _table(
        "Methods",
        "change parameters by --density and --option name=value",
        "method",
        "λ_e",
        "parameters",
        "source",
    )
    for name, own in known.items():
        defaults = ", ".join(f"{key}={value}" for key, value in own.defaults.items())
        table.add_row(name, f"{own.strength:g}", escape(defaults), escape(own.source))
    _words(table, 2, 3)
    return table


def plan(sources: "Sources", recipe: "Recipe") -> list[dict[str, Any]]:
    """Each tensor of the tower: its names in all three models, its shape, and what would happen to it.

    A matrix of an expert that the vision-language model has in a stack goes by the stack's name there.
    """
    merged, rows, slices = set(sources.merged()), [], sources.vlm.apart.slices
    for name, (pair, other) in sources.pairs.items():
        change = "no"
        if name in merged and recipe.strength_of(pair.layer) is not None:
            in_rows = sources.rows is not None and pair.kind in ("embedding", "head")
            change = f"{len(sources.rows)} rows" if in_rows else "yes"
        rows.append(
            {
                "name": pair.canonical,
                "vlm": slices[name].stack if name in slices else name,
                "base": pair.llm,
                "expert": other.llm,
                "layer": pair.layer,
                "kind": pair.kind,
                "shape": list(sources.vlm.apart.shapes[name]),
                "change": change,
            }
        )
    return rows


def plan_table(rows: list[dict[str, Any]], recipe: "Recipe") -> Grid:
    """The same, a tensor of all layers, and of all experts, in one row."""
    table = _table(
        f"What would change: {recipe.label()}",
        "{…}: one in each of these layers, as the base counts",
        "tensor of the base, and below it of the VLM",
        "its shape",
        "change",
    )
    groups: dict[tuple[str, ...], set[int]] = {}
    for row in rows:
        names = (re.sub(r"(?<=layers\.)\d+", "{}", row[key], count=1) for key in ("base", "vlm"))
        names = (re.sub(r"(?<=\bexperts\.)\d+", "*", name) for name in names)
        key = (*names, "×".join(map(str, row["shape"])), row["change"])
        groups.setdefault(key, set()).update([] if row["layer"] is None else [row["layer"]])
    for (own, theirs, shape, change), layers in groups.items():
        if layers:
            own = own.replace("{}", f"{{{_ranges(layers)}}}")
            theirs = theirs.replace("{}", "{…}")
        table.add_row(escape(f"{own}\n  {theirs}"), shape, change if change != "no" else "[dim]no[/]")
    return table


def inspection(found: "Inspection", title: str) -> Grid:
    """Both task vectors by layer."""
    table = _table(
        f"Task vectors: {title}",
        "τ_v = VLM − base, τ_e = expert − base\nconflicts: share of entries of opposite sign\n"
        "zeros: share of deltas that are exactly zero",
        "layer", "‖τ_v‖", "‖τ_e‖", "‖b‖", "‖τ_v‖/‖τ_e‖", "cosine", "conflicts", "zeros τ_v", "zeros τ_e",
    )  # fmt: skip
    rows: list[dict[Hashable, Any]] = found.layers.to_dict(orient="records")
    total: dict[Hashable, Any] = {"layer": "all", **found.total}
    for row in [*rows, total]:
        ratio = row["norm_vlm"] / row["norm_expert"] if row["norm_expert"] else float("nan")
        norms = (row["norm_vlm"], row["norm_expert"], row["norm_base"])
        shares = (row["cosine"], row["conflicts"], row["zeros_vlm"], row["zeros_expert"])
        cells = [f"{ratio:.3g}", *(f"{x:.2f}" for x in shares)]
        table.add_row(
            str(row["layer"]),
            *(f"{x:.3g}" for x in norms),  # of damaged models nan, which must be seen
            *("" if cell == "nan" else cell for cell in cells),
            end_section=bool(rows) and row is rows[-1],
        )
    return table


def changes(report: "MergeReport") -> Grid:
    """Tensors changed and kept, by module; the tower first."""
    memory = "" if report.memory is None else f", {report.memory / 1e6:.0f} MB of memory at most"
    table = _table(
        f"Merged: {report.recipe.label()}",
        f"‖m − v‖ / ‖v‖ of the tower: {report.relative:.4f}\n{report.seconds:.1f} s{memory}",
        "module", "tensors", "changed", "kept", "‖m − v‖", "/ ‖v‖",
    )  # fmt: skip
    rows = sorted(report.by_module().to_dict(orient="records"), key=lambda row: _place(row["module"]))
    for row in rows:
        counts = (str(row[name]) for name in ("tensors", "changed", "kept"))
        size = (f"{row['change']:.4g}", f"{row['relative']:.4f}") if row["tower"] else ("", "")
        name = escape(row["module"])
        table.add_row(
            name if row["tower"] else f"[dim]{name}[/]", *counts, *size, end_section=row is rows[-1]
        )
    table.add_row("all", str(report.changed + report.kept), str(report.changed), str(report.kept), "", "")
    return table


def _place(module: str) -> int:
    order = ("embedding", "attention", "mlp", "norm", "head")
    return order.index(module) if module in order else len(order)


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in found)


def _table(title: str, caption: str, *columns: str) -> Grid:
    return common.new_table(title, *columns, caption=caption)


def _words(table: Grid, *columns: int) -> None:
    """These hold words, between which they may be broken."""
    for at in columns:
        table.columns[at].no_wrap = False
