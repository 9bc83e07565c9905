"""Figures and experiments read rows, and nothing else."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from anchors.experiments.figure3 import accuracy, pattern
from anchors.figures.flow import draw
from anchors.figures.style import save
from anchors.stats import SUMS


def summary(tasks=("a", "b"), layers=6):
    """S_wp rules the first half of the layers, S_pq the second."""
    early = np.arange(layers) < layers // 2
    share = {
        "s_wp": np.where(early, 0.7, 0.1),
        "s_pq": np.where(early, 0.1, 0.8),
        "s_ww": np.where(early, 0.2, 0.1),
    }
    return pd.concat(
        pd.DataFrame(
            {
                "task": task, "layer": range(layers), "metric": name, "share": share[name],
                "share_low": share[name] - 0.05, "share_high": share[name] + 0.05, "examples": 9,
            }
        )
        for task in tasks
        for name in SUMS
    ).reset_index(drop=True)  # fmt: skip


def test_the_figure_draws_every_curve_with_its_values(tmp_path):
    table = summary()
    figure = draw(table, "a model")
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert len(axes.lines) == 3
        for name, line in zip(SUMS, axes.lines, strict=True):
            expected = table[(table["task"] == "a") & (table["metric"] == name)]["share"]
            assert np.allclose(line.get_ydata(), expected)
    for path in save(figure, tmp_path / "flow"):
        assert path.stat().st_size > 5000


def test_drawing_loads_no_torch():
    code = "import sys, anchors.figures.flow, anchors.stats, anchors.experiments.figure3; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_papers_pattern_in_numbers():
    found = pattern(summary(tasks=("a",))).iloc[0]
    assert found["s_pq_leads_from"] == 3
    assert found["s_wp_first_third"] == pytest.approx(0.7)
    assert found["s_pq_last_third"] == pytest.approx(0.8)
    flipped = summary(tasks=("a",)).replace({"metric": {"s_wp": "s_pq", "s_pq": "s_wp"}})
    assert pd.isna(pattern(flipped).iloc[0]["s_pq_leads_from"])


def test_accuracy_by_hand():
    rows = pd.DataFrame(
        [
            {"task": "a", "seed": 1, "number": n, "metric": metric, "value": value}
            for n, pair in enumerate([(0, 0), (1, 0), (1, 1), (0, 0)])
            for metric, value in zip(("gold", "predicted"), pair, strict=True)
        ]
    )
    assert accuracy(rows)["a"] == 0.75
