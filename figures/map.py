"""Figure 1 of the paper: one prompt with the strongest flows between its tokens, in a shallow and a deep layer."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from anchors.figures.style import COLOURS, LABELS, plain

STRONGEST = 60
"""How many flows of a layer are drawn."""
ALL_TEXT = 80
"""In longer prompts text tokens are dots, and neighbouring format tokens are written in one line."""
ONE = ("task", "seed", "example")
ROLES = {"label": COLOURS["s_wp"], "target": COLOURS["s_pq"], "format": "0.35", "text": "0.35"}


def draw(tables: dict[str, pd.DataFrame], model: str) -> Figure:
    """The first prompt; one column per layer, tokens downwards, the flow from one to a later one as an arc."""
    tokens, flows = _first(tables["tokens"], tables["tokens"]), _first(tables["flows"], tables["tokens"])
    tokens = tokens.sort_values("position")
    layers = sorted({int(layer) for layer in flows["layer"]})
    length = len(tokens)
    step = float(np.clip(12 / length, 0.045, 0.14))
    figure = Figure(figsize=(0.4 + 3.6 * len(layers), 1.2 + step * length), layout="constrained")
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    for panel, layer in zip(panels, layers, strict=True):
        _tokens(panel, tokens, step)
        _arcs(panel, flows[flows["layer"] == layer], tokens.set_index("position"))
        panel.set(title=f"layer {layer}", ylim=(length - 0.3, -0.7), xlim=(-0.42, 0.55))
        panel.axis("off")
    task = f", {plain(tokens['task'].iloc[0])}" if "task" in tokens else ""
    figure.suptitle(f"The {STRONGEST} strongest flows per layer in {plain(model)}{task}", fontsize=10)
    keys = [Line2D([], [], color=COLOURS[name], label=LABELS[name], linewidth=2) for name in LABELS]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _first(table: pd.DataFrame, tokens: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first prompt."""
    for column in ONE:
        if column in table:
            table = table[table[column] == tokens[column].iloc[0]]
    return table


def _tokens(panel: Axes, tokens: pd.DataFrame, step: float) -> None:
    """Names left of the line; label words and the target bold, in the colour of the flow that ends or begins there.

    Of a label word of several tokens only the counted ones are; the others are written in grey.
    """
    size = min(8.0, 72 * step * 0.85)
    sizes = {True: max(size, 7), False: max(size, 5.2)}
    every = len(tokens) <= ALL_TEXT
    dots = tokens if every else tokens[tokens["role"] == "text"]
    panel.plot(
        [0, 0], [tokens["position"].min(), tokens["position"].max()], color="0.85", linewidth=0.8, zorder=0
    )
    panel.scatter(np.zeros(len(dots)), dots["position"], s=2, color="0.6", linewidth=0, zorder=1)
    counted = set(tokens.loc[tokens["counted"], "position"])
    for first, last, role, text in _lines(tokens, every):
        if first in counted:
            role = "label"
        elif role == "label":
            role = "text"
        marked = role in ("label", "target")
        shown = plain(text.strip(" ") or "␣", 26)
        panel.text(
            -0.03, (first + last) / 2, f"target  {shown}" if role == "target" else shown, ha="right", va="center",
            color=ROLES[role], fontweight="bold" if marked else "normal", fontsize=sizes[marked],
        )  # fmt: skip
        if marked:
            panel.scatter([0], [(first + last) / 2], s=14, color=ROLES[role], linewidth=0, zorder=4)


def _lines(tokens: pd.DataFrame, every: bool) -> list[tuple[int, int, str, str]]:
    """What is written: first and last position, role, text. Runs of format tokens are one line in long prompts."""
    found: list[tuple[int, int, str, str]] = []
    for position, role, text in zip(tokens["position"], tokens["role"], tokens["text"], strict=True):
        if every or role in ("label", "target"):
            found.append((position, position, role, text))
        elif role == "format":
            if found and found[-1][2] == role and found[-1][1] == position - 1:
                first, _, _, before = found.pop()
                found.append((first, position, role, before + text))
            else:
                found.append((position, position, role, text))
    return found


def _arcs(panel: Axes, flows: pd.DataFrame, tokens: pd.DataFrame) -> None:
    """Each in the colour of the sum that it is part of: S_wp and S_pq are over the counted positions."""
    strongest = flows.nlargest(STRONGEST, "value")
    if not len(strongest) or not strongest["value"].max() > 0:
        return
    size = (strongest["value"] / strongest["value"].max()).to_numpy()
    into, out = (tokens["counted"].loc[strongest[c]].to_numpy(bool) for c in ("to", "from_"))
    target = (tokens["role"].loc[strongest["to"]] == "target").to_numpy()
    kinds = np.select([target & out, into], ["s_pq", "s_wp"], "s_ww")
    longest = max(len(tokens) - 1, 1)
    around = np.linspace(-np.pi / 2, np.pi / 2, 40)
    for order, kind in enumerate(("s_ww", "s_wp", "s_pq")):
        lines, colours = [], []
        for to, from_, own in zip(
            strongest["to"][kinds == kind],
            strongest["from_"][kinds == kind],
            size[kinds == kind],
            strict=True,
        ):
            far = 0.08 + 0.44 * np.sqrt((to - from_) / longest)
            lines.append(
                np.column_stack([far * np.cos(around), (to + from_) / 2 + (to - from_) / 2 * np.sin(around)])
            )
            colours.append(to_rgba(COLOURS[kind], 0.2 + 0.75 * own))
        panel.add_collection(
            LineCollection(
                lines,
                colors=colours,
                linewidths=0.4 + 2.4 * size[kinds == kind],
                label=kind,
                zorder=2 + order / 10,
            ),
            autolim=False,
        )
