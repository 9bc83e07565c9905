"""The rows of the flow of merged models: their columns and names. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

KIND, VERSION = "inject-flow", 1
IDENTITY = ("seed", "expert", "scenario", "labels", "strength")
ROWS = [*IDENTITY, "number", "layer", "metric", "value"]
NOBODY = "none"
"""The expert of the VLM before injection, at strength 0."""
GOLD, OWN = "gold", "own"
"""Whose answers: the suite's, or those that the VLM gave before injection (no labels are used)."""
SUMS = ("s_ip", "s_tp", "s_wp", "s_pq", "s_iq", "s_tq", "s_ww")
MASSES = ("m_ip", "m_tp", "m_pq", "m_iq", "m_tq", "m_dq", "m_eq", "m_all")
"""Undivided: into label words from images and other tokens; into the target from label words, the query's image and
other tokens, the demonstrations' images and other tokens; and all that flows."""
INTO_LABELS = ("m_ip", "m_tp")
INTO_TARGET = ("m_pq", "m_iq", "m_tq", "m_dq", "m_eq")


@dataclass(frozen=True)
class MeasuredFlow:
    """Tidy rows of all suites, and what they depend on.

    Attributes:
        rows: columns seed, expert, scenario, labels, strength, number, layer, metric, value; layer -1 is no layer.
        ratios: by seed and expert ‖τ_v‖ / ‖τ_e‖ over the tower without embedding and head.
        vision: name of the scenario that the VLM could do before.
        configs: one per run on disk.
        notes: what was found there that a reader must know.
    """

    rows: pd.DataFrame
    ratios: pd.DataFrame
    vision: str
    configs: list[dict[str, Any]]
    notes: tuple[str, ...] = ()
