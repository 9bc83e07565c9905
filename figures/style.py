"""One look for all figures."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from anchors.results import write_atomic

COLOURS = {"s_wp": "#0072B2", "s_pq": "#D55E00", "s_ww": "#7A7A7A"}
"""Okabe and Ito's colour-blind-safe blue and vermilion, and a grey for the background flow."""
LABELS = {
    "s_wp": "$S_{wp}$  words → label words",
    "s_pq": "$S_{pq}$  label words → target",
    "s_ww": "$S_{ww}$  other",
}
MARKERS = {"s_wp": "o", "s_pq": "s", "s_ww": "^"}

mpl.rcParams.update(
    {
        "figure.dpi": 120,
        "savefig.dpi": 200,
        "savefig.bbox": "tight",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "legend.frameon": False,
        "pdf.fonttype": 42,
    }
)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and PDF; returns the two paths."""
    paths = [stem.with_suffix(".png"), stem.with_suffix(".pdf")]
    for path in paths:
        write_atomic(path, lambda draft: figure.savefig(draft, format=draft.suffix[1:]))
    return paths
