"""A sweep of injections: skill against retained vision, and both along the strength and along the norm added."""

from collections.abc import Iterator

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from anchors.figures.pieces import grid, legend
from anchors.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, plain
from anchors.injection.sweeping.tables import PLAIN, REFERENCE, VLM

COLOURS = {
    "task-arithmetic": BLUE, "dare": SKY, "ties": VERMILION, "dare-ties": "#117733", "magnitude": ORANGE,
    "della": "#44AA99", "breadcrumbs": PURPLE, "sce": "#AA4499", "tsv-m": GREEN, "iso-c": "#999933",
    "iso-cts": "#DDCC77", "wudi": "#332288", "average": "#882255", "swap": "black",
}  # fmt: skip
"""Okabe and Ito's colours, and more of Tol's muted ones."""
MARKS = "os^vDPX<>hdp8"
GREYS = ("0.1", "0.4", "0.65", "0.25", "0.55")
REFERENCES = {"text oracle": "-", "upper bound": "--", "cascade": ":"}
BANDS = 6
"""Families up to which each has its interval drawn; of more, only task arithmetic has."""
QUANTITIES = {"skill": "skill", "vision": "vision", "blank": "skill, image blank"}


def draw(tables: dict[str, pd.DataFrame], suite: str) -> dict[str, Figure]:
    """The pictures of a sweep, by name: `pareto`; `strength` and `dose` of what is injected everywhere; `layers`, ranges
    of them beside the whole tower."""
    summary = tables["summary"]
    retention = float(tables["best"]["retention"].iloc[0])
    found = {"pareto": pareto(summary, suite, retention)}
    lines = _lines(summary, tables["best"])
    everywhere = lines[lines["layers"] == "all"]
    if everywhere["strength"].nunique() > 1:
        found["strength"] = curves(
            summary, everywhere, suite, retention, "strength", "λ", ("skill", "vision", "blank")
        )
        axis = "norm added / norm of the expert's task vector"
        found["dose"] = curves(summary, everywhere, suite, retention, "dose", axis, ("skill", "vision"))
    ranged = lines[lines["method"].isin(set(lines.loc[lines["layers"] != "all", "method"]))]
    if ranged["strength"].nunique() > 1:
        found["layers"] = curves(summary, ranged, suite, retention, "strength", "λ", ("skill", "vision"))
    return found


def pareto(summary: pd.DataFrame, suite: str, retention: float) -> Figure:
    """One panel per scenario: every setting by what the VLM keeps and what it gains; the front is drawn through."""
    scenarios = list(dict.fromkeys(summary["scenario"]))
    figure, columns = grid(len(scenarios), width=3.6, height=3.5, across=3)
    looks = _looks(summary)
    for (panel,), scenario in zip(columns, scenarios, strict=True):
        own = summary[summary["scenario"] == scenario]
        settings = own[own["family"] != REFERENCE]
        alone = own[own["setting"] == VLM].iloc[0]
        for _, line in settings.sort_values("strength").groupby(
            ["family", "density"], sort=False, dropna=False
        ):
            colour, mark = looks[line["family"].iloc[0]]
            panel.plot(line["vision"], line["skill"], color=colour, linewidth=0.5, alpha=0.4, zorder=1)
            # Stronger is larger.
            size = 8 + 14 * line["strength"].to_numpy(float)
            face = [colour if on else "white" for on in line["front"]]
            panel.scatter(
                line["vision"],
                line["skill"],
                s=size,
                marker=mark,
                color=face,
                edgecolors=colour,
                linewidths=0.8,
                zorder=2,
            )
        for family in dict.fromkeys(settings["family"]):
            colour, mark = looks[family]
            panel.plot(
                [], [], color=colour, marker=mark, markersize=4.5, linestyle="none", label=plain(family)
            )
        _front(panel, own)
        panel.plot(alone["vision"], alone["skill"], "*", color="black", markersize=9, zorder=4, label=VLM)
        panel.axvspan(retention * alone["vision"], 1.02, color="0.94", zorder=0)
        _references(panel, own)
        least = min(settings["vision"].min(), 0.9)
        panel.set(
            xlim=(max(-0.02, least - 0.04), 1.02), ylim=(-0.03, None), title=_title(own), xlabel="vision"
        )
    columns[0][0].set_ylabel("skill")
    legend(figure, columns=6)
    figure.suptitle(
        f"Skill against retained vision in {plain(suite)}: filled on the front, larger with λ, "
        f"grey at least {100 * retention:g} % of the VLM's vision",
        fontsize=10,
    )  # fmt: skip
    return figure


def curves(
    summary: pd.DataFrame,
    lines: pd.DataFrame,
    suite: str,
    retention: float,
    by: str,
    axis: str,
    quantities: tuple[str, ...],
) -> Figure:
    """One row per scenario, one panel per quantity: every family at its best density, from the VLM alone on."""
    scenarios = list(dict.fromkeys(summary["scenario"]))
    figure = Figure(figsize=(0.8 + 3.1 * len(quantities), 1.2 + 2.3 * len(scenarios)), layout="constrained")
    panels = figure.subplots(len(scenarios), len(quantities), squeeze=False, sharex=True, sharey="row")
    looks = _looks(lines)
    banded = lines["family"].nunique() <= BANDS
    for row, scenario in zip(panels, scenarios, strict=True):
        own = summary[summary["scenario"] == scenario]
        alone = own[own["setting"] == VLM]
        mine = lines[lines["scenario"] == scenario]
        for panel, quantity in zip(row, quantities, strict=True):
            for family, line in mine.groupby("family", sort=False):
                colour, mark = looks[family]
                bold = family == PLAIN
                if len(line) > 1:  # from the VLM alone on; a single setting is a point, not a line
                    line = pd.concat([alone.assign(strength=0.0), line]).sort_values(by)
                x = line[by].astype(float)
                panel.plot(
                    x, line[quantity], color=colour, marker=mark, markersize=3.5, linewidth=2 if bold else 1,
                    label=plain(family), zorder=3 if bold else 2,
                )  # fmt: skip
                if bold or banded:
                    low, high = line[f"{quantity}_low"], line[f"{quantity}_high"]
                    panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            if quantity == "vision":
                least = retention * alone["vision"].iloc[0]
                panel.axhline(
                    least,
                    color="0.6",
                    linewidth=0.8,
                    linestyle=":",
                    label=f"{100 * retention:g} % of the VLM's vision",
                )
            panel.set_ylim(-0.03, 1.03)
            panel.yaxis.set_major_locator(MultipleLocator(0.25))
        row[0].set_ylabel(plain(scenario))
    for panel, quantity in zip(panels[0], quantities, strict=True):
        panel.set_title(QUANTITIES[quantity])
    for panel in panels[-1]:
        panel.set_xlabel(axis)
    legend(figure, columns=2 * len(quantities))
    figure.suptitle(f"Injection into {plain(suite)}, {_examples(summary)}", fontsize=10)
    return figure


def _lines(summary: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """Of each scenario and family the settings of one density: the chosen one's, or else the most skilled one's."""
    chosen = set(zip(best["scenario"], best["setting"], strict=True))

    def kept() -> Iterator[pd.DataFrame]:
        own = summary[summary["family"] != REFERENCE]
        for (scenario, _), part in own.groupby(["scenario", "family"], sort=False):
            if part["density"].isna().all():
                yield part
                continue
            picked = part[[(scenario, s) in chosen for s in part["setting"]]]
            density = (picked if len(picked) else part.nlargest(1, "skill"))["density"].iloc[0]
            yield part[part["density"] == density]

    return pd.concat(list(kept()))


def _looks(settings: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """A colour for each method, and a mark for each family; of several families of one method the first has its colour,
    the others have greys, or colours of their own where there is no other method."""
    families = settings.loc[settings["family"] != REFERENCE, ["family", "method"]].drop_duplicates()
    others = iter(GREYS if families["method"].nunique() > 1 else (VERMILION, ORANGE, GREEN, PURPLE, SKY))
    first = families.drop_duplicates("method")["family"].tolist()
    return {
        family: (COLOURS.get(method, GREY) if family in first else next(others, GREY), MARKS[i % len(MARKS)])
        for i, (family, method) in enumerate(families.itertuples(index=False))
    }


def _front(panel: Axes, own: pd.DataFrame) -> None:
    on = own[own["front"]].sort_values("vision")
    panel.step(
        on["vision"], on["skill"], where="pre", color="black", linewidth=0.8, zorder=1, label="Pareto front"
    )


def _references(panel: Axes, own: pd.DataFrame) -> None:
    """What can be had at best, as lines."""
    heights: list[float] = []
    for name, style in REFERENCES.items():
        for value in own.loc[own["setting"] == name, "skill"]:
            panel.axhline(value, color=GREY, linestyle=style, linewidth=0.9, zorder=0, label=name)
            heights.append(value)
    if heights:
        panel.set_ylim(top=min(1.05, max(*heights, own["skill"].max()) + 0.05))


def _title(own: pd.DataFrame) -> str:
    return plain(own["scenario"].iloc[0])


def _examples(summary: pd.DataFrame) -> str:
    seeds, examples = int(summary["seeds"].max()), int(summary["examples"].max())
    return f"{examples // seeds} questions × {seeds} training{'s' * (seeds != 1)}"
