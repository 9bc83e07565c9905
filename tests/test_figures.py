"""Figures and experiments read rows, and nothing else."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from made_rows import (
    AWKWARD,
    aimed,
    attended,
    classified,
    compressed,
    diagnosed,
    isolated,
    mapped,
    probed,
    reweighted,
    rows,
    summary,
    timed,
    worded,
)
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

from anchors.analyses.isolation import Isolation
from anchors.figures import KINDS, draw, generic
from anchors.figures.isolate import named
from anchors.figures.style import COLOURS, plain, save, token
from anchors.stats import SUMS
from anchors.study.registry import study
from anchors.study.runner import Sample, measure
from anchors.summaries import SUMMARIES, flow_pattern
from anchors.tasks.data import read
from anchors.tasks.task import TASKS


def picture(kind, *parts):
    """The tables of a kind and its figure, drawn to the last glyph."""
    tables = SUMMARIES[kind](pd.concat(parts, ignore_index=True))
    figure = draw(kind, tables, "a_model $x$")
    figure.draw_without_rendering()
    return tables, figure


def texts(axes):
    return [t.get_text() for t in axes.texts]


def heights(axes):
    return [p.get_height() for p in axes.patches]


def names_of(figure):
    return [t.get_text() for t in figure.legends[0].get_texts()]


def test_the_flow_draws_every_curve_with_its_values(tmp_path):
    table = summary()
    figure = draw("flow", {"summary": table}, "a model")
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert len(axes.lines) == 3
        for name, line in zip(SUMS, axes.lines, strict=True):
            expected = table[(table["task"] == "a") & (table["metric"] == name)]["share"]
            assert np.allclose(line.get_ydata(), expected)
    for path in save(figure, tmp_path / "flow"):
        assert path.stat().st_size > 5000


@pytest.mark.parametrize("layers", [(0, 1, 2), (1, 5, 7)])
def test_no_band_goes_over_layers_without_attention(layers):
    """Where some layers are missing each point has its own interval, at its true layer."""
    table = summary()
    table = table[table["layer"] < 3].assign(layer=lambda own: own["layer"].map(dict(enumerate(layers))))
    figure = draw("flow", {"summary": table}, "a model")
    axes, apart = figure.axes[0], layers[0] == 1
    assert all(np.array_equal(line.get_xdata(), layers) for line in axes.lines)
    bars = [own for own in axes.collections if isinstance(own, LineCollection)]
    assert [bool(bars), len(axes.collections)] == [apart, 3]
    own = table[(table["task"] == "a") & (table["metric"] == SUMS[1])].sort_values("layer")
    if apart:
        expected = [
            [[x, low], [x, high]]
            for x, low, high in zip(layers, own["share_low"], own["share_high"], strict=True)
        ]
        assert np.allclose(bars[1].get_segments(), expected)


def test_the_papers_pattern_in_numbers():
    found = flow_pattern(summary(tasks=("a",))).iloc[0]
    assert found["s_pq_leads_from"] == 3
    assert found["s_wp_first_third"] == pytest.approx(0.7)
    assert found["s_pq_last_third"] == pytest.approx(0.8)
    flipped = summary(tasks=("a",)).replace({"metric": {"s_wp": "s_pq", "s_pq": "s_wp"}})
    assert pd.isna(flow_pattern(flipped).iloc[0]["s_pq_leads_from"])


def test_more_tasks_than_fit_beside_each_other_go_below():
    figure = draw("flow", {"summary": summary(tasks="abcdef")}, "a model")
    places = [axes.get_subplotspec() for axes in figure.axes]
    assert [(p.rowspan.start, p.colspan.start) for p in places] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 0),
        (1, 1),
    ]


def test_shots_have_panels_of_their_own():
    _, figure = picture("isolate", rows(isolated()), rows(isolated(), "b"), rows(isolated(), shots=2))
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert titles == ["a, 8 examples\n1 shot", "a, 8 examples\n2 shots", "b, 8 examples"]
    _, figure = picture("isolate", rows(isolated()), rows(isolated(), seed=2))
    assert figure.axes[0].get_title() == "a, 8 examples × 2 seeds"


def test_confusion_matrices_hold_shares_and_counts():
    tables, figure = picture("classify", rows(classified(AWKWARD)))
    *panels, bar = figure.axes
    assert len(panels) == 2
    assert bar.get_ylabel() == "share of the true label"
    confusion, accuracy = tables["confusion"], tables["summary"].query("metric == 'accuracy'")
    for panel, condition in zip(panels, ("none", "calibrated"), strict=True):
        counts = confusion[confusion["condition"] == condition]["prompts"].to_numpy().reshape(3, 3)
        assert texts(panel) == [str(n) for n in counts.ravel()]
        assert np.allclose(panel.images[0].get_array(), counts / counts.sum(1, keepdims=True))
        value = accuracy[accuracy["condition"] == condition].iloc[0]
        assert f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]" in panel.get_title()
        assert [t.get_text() for t in panel.get_yticklabels()] == [plain(label, 14) for label in AWKWARD]


def test_isolation_draws_bars_for_one_number_of_layers():
    tables, figure = picture("isolate", rows(isolated()), rows(isolated(), "b"))
    table = tables["summary"].set_index(["task", "condition", "metric"])["value"]
    assert len(figure.axes) == 4
    assert len(names_of(figure)) == 4
    order = ("first-5/label", "first-5/random", "last-5/label", "last-5/random")
    for axes, task, metric in zip(
        figure.axes, "abab", ["label_loyalty"] * 2 + ["word_loyalty"] * 2, strict=True
    ):
        assert heights(axes) == pytest.approx([table[task, c, metric] for c in order])
        assert [t.get_text() for t in axes.get_xticklabels()] == ["first 5 layers", "last 5 layers"]


def test_isolation_draws_curves_over_several_numbers_of_layers():
    tables, figure = picture("isolate", rows(isolated((1, 3, 10))))
    table = tables["summary"].set_index(["condition", "metric"])["value"]
    above, below = figure.axes
    for axes, metric in ((above, "label_loyalty"), (below, "word_loyalty")):
        assert len(axes.lines) == 4
        assert list(axes.lines[0].get_xdata()) == [1, 3, 10]
        expected = [table[f"last-{k}/random", metric] for k in (1, 3, 10)]
        assert list(axes.lines[3].get_ydata()) == expected


def test_conditions_in_words():
    assert named("none") == "untouched"
    assert named("first-5/label") == "first 5 layers: label words isolated"
    assert named("last-1/random") == "last layer: random positions isolated"


def test_readout_has_two_axes_a_mean_and_a_word_for_one_label_only():
    tables, figure = picture("readout", rows(attended([0, 1] * 6)), rows(attended([0, 1] * 6), "b"))
    table = tables["summary"]
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == [
        "a, 12 examples", "b, 12 examples", "mean, 24 examples",
    ]  # fmt: skip
    left, right = (a for a in figure.axes if a.bbox.bounds == figure.axes[2].bbox.bounds)
    drawn = {line.get_label(): line.get_ydata() for axes in (left, right) for line in axes.lines}
    mean = table[table["task"] == "mean"]
    assert np.allclose(drawn["AUCROC$_l$ (left axis)"], mean[mean["metric"] == "aucroc"]["value"])
    assert np.allclose(drawn["$R_l$ (right axis)"], mean[mean["metric"] == "r"]["value"])
    assert list(drawn["chance"]) == [0.5, 0.5]
    _, figure = picture("readout", rows(attended([1] * 5)))
    assert texts(figure.axes[0]) == ["the model predicts\none label only"]


def test_reweighting_draws_accuracy_and_every_beta_on_one_scale():
    tables, figure = picture("reweight", rows(reweighted(AWKWARD)), rows(reweighted("xy"), "b"))
    accuracy = tables["summary"].query("metric == 'accuracy'").set_index(["task", "condition"])["value"]
    bars = [axes for axes in figure.axes if axes.get_ylabel() == "accuracy"]
    for axes, task in zip(bars, "ab", strict=True):
        assert heights(axes) == pytest.approx([accuracy[task, "none"], accuracy[task, "reweighted"]])
    maps = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in maps] == [plain(label, 14) for label in AWKWARD] + ["x", "y"]
    assert np.allclose(maps[1].images[0].get_array(), 0.1 * np.subtract.outer(range(3), range(2)) + 1)
    assert {axes.images[0].get_clim() for axes in maps} == {(-2.2, 2.2)}


def test_compression_has_bars_in_the_papers_order_and_no_loyalty_of_the_baseline():
    tables, figure = picture("compress", rows(compressed()))
    table = tables["summary"].set_index(["condition", "metric"])["value"]
    metrics = ("accuracy", "label_loyalty", "word_loyalty")
    order = ("hidden_anchor", "text_anchor", "hidden_random", "hidden_random_top")
    expected = [1.0] + [table[method, metric] for method in order for metric in metrics]
    assert heights(figure.axes[0]) == pytest.approx(expected)
    assert names_of(figure)[0] == "whole demonstrations"
    assert len(names_of(figure)) == 5


def test_speed_stands_beside_its_limit():
    tables, figure = picture("speed", rows(timed()), rows(timed(), "b$"))
    table = tables["summary"]
    axes = figure.axes[0]
    assert heights(axes) == pytest.approx(list(table["value"]))
    assert list(axes.lines[0].get_ydata()) == pytest.approx([4, np.nan, 4, np.nan], nan_ok=True)
    spans = [
        f"{v:.2f}× [{low:.2f}, {high:.2f}]" for v, low, high in table[["value", "low", "high"]].to_numpy()
    ]
    sides = [(task, side) for task in ("a", "b\\$") for side in ("anchors", "whole, cached")]
    names = [f"{own}\n{task}\n6 examples\n{side}" for own, (task, side) in zip(spans, sides, strict=True)]
    assert [t.get_text() for t in axes.get_xticklabels()] == names
    whiskers = next(c for c in axes.collections if isinstance(c, LineCollection))
    assert [list(s[:, 1]) for s in whiskers.get_segments()] == table[["low", "high"]].to_numpy().tolist()


def test_diagnosis_draws_both_confusions_and_their_agreement():
    labels = [*AWKWARD, "d"]
    tables, figure = picture("diagnose", rows(diagnosed(labels)))
    predicted, actual = (axes for axes in figure.axes if axes.get_title())
    pairs = tables["pairs"]
    for axes, column in ((predicted, "predicted"), (actual, "actual")):
        matrix = axes.images[0].get_array()
        assert np.allclose(matrix[np.triu_indices(4, 1)], pairs[column])
        assert matrix.mask[np.diag_indices(4)].all()
        assert sum(f"{pairs[column][0]:.2f}" in text for text in texts(axes)) >= 2
    found = tables["summary"].iloc[0]
    assert f"rank correlation {found['correlation']:.2f} [" in figure.subfigs[0].get_suptitle()
    assert f"p = {found['p']:.3f}" in figure.subfigs[0].get_suptitle()


def test_diagnosis_draws_the_agreement_over_components():
    tables, figure = picture("diagnose", rows(diagnosed("wxyz", (2, 10))))
    assert figure.axes[0].get_title() == "predicted (10 components)"
    line = next(axes for axes in figure.axes if axes.get_xlabel() == "components").lines[0]
    assert list(line.get_xdata()) == [2, 10]
    assert list(line.get_ydata()) == list(tables["summary"]["correlation"])
    _, figure = picture("diagnose", rows(diagnosed("xy")))
    assert "not defined (1 pair)" in figure.subfigs[0].get_suptitle()


def test_the_map_draws_arcs_in_the_colour_of_their_sum():
    words = ["<s>", " $x", "_", " Pos^{", "\n", *AWKWARD, ":"]
    roles = ["format", "text", "text", "label", "format", "text", "text", "text", "target"]
    tables, figure = picture("map", rows(mapped(words, roles)), rows(mapped("abc", ["text"] * 3), "b"))
    assert [axes.get_title() for axes in figure.axes] == ["layer 1", "layer 5"]
    axes = figure.axes[0]
    shown = {t.get_text(): t for t in axes.texts}
    assert len(axes.texts) == len(words)
    assert to_hex(shown["Pos^{"].get_color()) == COLOURS["s_wp"].lower()
    assert shown["target  :"].get_fontweight() == "bold"
    arcs = {c.get_label(): c for c in axes.collections if isinstance(c, LineCollection)}
    # 9 tokens make 36 pairs: 3 flow into the label word at 3, one from there to the target.
    assert {name: len(c.get_segments()) for name, c in arcs.items()} == {"s_wp": 3, "s_pq": 1, "s_ww": 32}
    ends = arcs["s_pq"].get_segments()[0][[0, -1], 1]
    assert sorted(ends) == pytest.approx([3, 8])
    widest = max(float(w) for c in arcs.values() for w in c.get_linewidths())
    assert float(arcs["s_ww"].get_linewidths()[0]) == pytest.approx(widest)
    assert len(tables["tokens"]) == 12


def test_the_map_colours_by_the_tokens_that_are_counted():
    """A label word of two tokens of which one is counted: flow into and from the other is other flow."""
    words, roles = ["a", " Posi", "tive", "\n", ":"], ["text", "label", "label", "format", "target"]
    told = [*mapped(words, roles, layers=(1,)), (0, "none", None, "counted", 1)]
    tables, figure = picture("map", rows(told))
    assert tables["tokens"]["counted"].tolist() == [False, True, False, False, False]
    arcs = {c.get_label(): c for c in figure.axes[0].collections if isinstance(c, LineCollection)}
    # 5 tokens make 10 pairs: one flows into the counted token at 1, one from there to the target.
    assert {name: len(c.get_segments()) for name, c in arcs.items()} == {"s_wp": 1, "s_pq": 1, "s_ww": 8}
    shown = {t.get_text(): t for t in figure.axes[0].texts}
    assert (shown["Posi"].get_fontweight(), shown["tive"].get_fontweight()) == ("bold", "normal")


def test_long_prompts_write_out_only_what_matters():
    words, roles = ["w"] * 120, ["text"] * 120
    words[40:44], roles[40:44] = ["\n", "Label", ":", " Yes"], ["format"] * 3 + ["label"]
    words[-1], roles[-1] = ":", "target"
    _, figure = picture("map", rows(mapped(words, roles, layers=(0,))))
    assert texts(figure.axes[0]) == ["↵Label:", "Yes", "target  :"]
    arcs = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    assert sum(len(c.get_segments()) for c in arcs) == 60


def test_words_are_a_table_of_the_first_example():
    _, figure = picture("words", rows(worded([" one", *AWKWARD])))
    assert [axes.get_title() for axes in figure.axes] == [
        "untouched",
        "first 5 layers:\nlabel words isolated",
    ]
    axes = figure.axes[0]
    assert texts(axes)[:4] == ["␣one", "0.500", r"\$a\$␣\$".replace("␣", " "), "0.333"]
    assert [p.get_width() for p in axes.patches] == pytest.approx([1, 2 / 3, 1 / 2, 2 / 5])


def test_text_from_data_is_drawn_as_it_is():
    assert plain("$x$ a_b^c") == r"\$x\$ a_b^c"
    assert plain("a\n\tb\x00") == "a↵⇥b\\x00"
    assert plain("x" * 50, 5) == "xxxx…"
    assert [token(t) for t in (" a ", "a b", "  ", "", "$")] == ["␣a␣", "a b", "␣␣", "", r"\$"]


@pytest.mark.parametrize(
    "kind", ["classify", "isolate", "readout", "words", "map", "diagnose", "flow", "compress"]
)
def test_real_rows_are_drawn(kind, gpt2, tmp_path):
    short = {
        "classify": {"calibrate": True}, "isolate": {"layers": (1,)}, "words": {"isolation": Isolation(layers=(1,))},
        "map": {"layers": (0, 1)}, "diagnose": {"components": (2, 3)}, "compress": {"draws": 2},
    }  # fmt: skip
    analysis = study(kind).make(**short.get(kind, {}))
    task, how = TASKS["sst2" if kind == "map" else "agnews"], Sample(examples=1 if kind == "map" else 5)
    found = measure(gpt2, analysis, task, read(task), how, out=tmp_path)
    _, figure = picture(kind, found.rows)
    assert r"a_model \$x\$" in figure.get_suptitle()
    assert figure.axes


def test_a_kind_without_a_picture_has_none():
    assert draw("scaling", {}, "m") is None


def test_every_study_draws_its_tables_by_their_names(monkeypatch):
    calls = []
    monkeypatch.setattr("anchors.figures.causal.draw", lambda *given: calls.append(given))
    draw("causal", {"summary": 1}, "m")
    draw("causal", {"summary": 1, "flow": 2}, "m")
    assert calls == [({"summary": 1}, "m"), ({"summary": 1, "flow": 2}, "m")]


def test_drawing_loads_no_torch(tmp_path):
    """Every kind is drawn in a fresh process from tables alone."""
    parts = {
        "flow": {"summary": summary()},
        "causal": {
            "summary": pd.DataFrame(
                {"task": "a", "condition": "label", "metric": "follow", "layer": [0, 1], "value": [1.0, 0.0]}
            ).assign(low=0.0, high=1.0, examples=3)
        },
        "classify": classified("xy"),
        "isolate": isolated(),
        "readout": attended([0, 1] * 4),
        "reweight": reweighted("xy"),
        "compress": compressed(),
        "speed": timed(),
        "diagnose": diagnosed("xyz"),
        "map": mapped("ab:", ["text", "label", "target"]),
        "words": worded("ab"),
        "flow_prompts": aimed(AWKWARD),
        "nsa_probe": SUMMARIES["nsa_probe"](probed()),
    }
    tables = {k: p if isinstance(p, dict) else SUMMARIES[k](rows(p)) for k, p in parts.items()}
    assert set(tables) == {kind for kind in KINDS if study(kind).figure}
    pd.to_pickle(tables, tmp_path / "tables.pickle")
    code = f"""
import sys, pandas
from anchors.figures import draw
assert 'matplotlib' not in sys.modules
for kind, tables in pandas.read_pickle({str(tmp_path / "tables.pickle")!r}).items():
    figure = draw(kind, tables, 'm')
    assert figure.axes or figure.subfigs
assert not {{'torch', 'transformers', 'matplotlib.pyplot'}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_study_without_a_figure_has_every_estimate_drawn():
    """Bars for what has no layer, curves for what has, one for each condition."""
    columns = ["condition", "metric", "layer", "value"]
    wide = [("none", "accuracy", None, 0.5), ("cut", "accuracy", None, 0.25)]
    wide += [(c, "share", layer, layer / 4 + (c == "cut") / 8) for c in ("none", "cut") for layer in range(3)]
    made = pd.DataFrame(wide, columns=columns).astype({"layer": "Int64"}).assign(examples=4, seeds=1)
    table = pd.concat(
        made.assign(task=task, low=made["value"] - 0.1, high=made["value"] + 0.1) for task in "ab"
    )
    figure = generic.draw({"summary": table}, "a_model $x$")
    figure.draw_without_rendering()
    assert len(figure.axes) == 4
    for above, below in (figure.axes[::2], figure.axes[1::2]):
        assert heights(above) == [0.5, 0.25]
        assert [line.get_ydata().tolist() for line in below.lines] == [[0, 0.25, 0.5], [0.125, 0.375, 0.625]]
    assert names_of(figure) == ["none", "cut"]
    assert figure.get_suptitle() == r"a_model \$x\$"
    assert generic.draw({"summary": table.drop(columns="low")}, "m") is None
    assert generic.draw({"words": table}, "m") is None
