"""What tables say: verdicts after correction, counts, and the names of conditions."""

import numpy as np
import pandas as pd
import pytest
from made_rows import (
    attended,
    classified,
    compressed,
    diagnosed,
    isolated,
    mapped,
    reweighted,
    rows,
    summary,
    timed,
    worded,
)  # fmt: skip

from anchors.intervals import estimate, widened
from anchors.nsa.probing import sentences as of_nsa
from anchors.study.registry import BUILT_IN, STUDIES
from anchors.summaries import sentences, tables_of
from anchors.summaries.sentences import Span, judged


def test_widened_intervals_hold_all_at_once():
    rng = np.random.default_rng(0)
    tests, trials = 30, 20_000
    found = np.abs(rng.normal(size=(trials, tests)))
    low, high = widened(0.0, -1.96, 1.96, tests)
    assert (found < 1.96).all(1).mean() < 0.3
    assert low == -high
    assert (found < high).all(1).mean() == pytest.approx(0.95, abs=0.005)
    assert widened(3.0, 3 - 1.96, 3 + 1.96, tests) == pytest.approx((3 + low, 3 + high))
    assert widened(0.5, 0.4, 0.8, 1) == pytest.approx((0.4, 0.8))


@pytest.mark.parametrize(
    ("signs", "n", "said"),
    [
        ([1, 1], 50, "is met here (n = 50"), ([1, -1], 50, "is not met here (n = 50"), ([1, 0], 50, "Undecided"),
        ([], 50, "Undecided"), ([1], 9, "Undecided: 9 prompts are too few"),
    ],
)  # fmt: skip
def test_a_verdict_needs_every_sign_and_enough_prompts(signs, n, said):
    assert said in judged(signs, "x", n, 3)
    assert ("3 comparisons" in judged(signs, "x", n, 3)) == (n > 9)


def test_no_interval_no_verdict():
    assert Span(1, np.nan, np.nan).sign == 0 == Span(1, np.nan, np.nan).widened(4).sign
    assert estimate(1, np.nan, np.nan) == "1.00"


def test_flow_is_met_not_met_and_undecided():
    table = summary(tasks=("a",)).assign(examples=40)
    (met,) = sentences.flow({"summary": table})
    assert "S_wp is .70 [.65, .75] of the flow and S_pq .10 [.05, .15]" in met
    assert "is met here (n = 40; corrected for 8 comparisons)" in met
    swapped = table.assign(metric=table["metric"].map({"s_wp": "s_pq", "s_pq": "s_wp", "s_ww": "s_ww"}))
    assert "is not met here" in sentences.flow({"summary": swapped})[0]
    wide = table.assign(share_low=0.0, share_high=1.0)
    assert "Undecided" in sentences.flow({"summary": wide})[0]
    control = sentences.flow({"summary": table.assign(control="random-positions")})[0]
    assert "must show nothing" in control
    assert "finding" not in control


def test_a_layer_is_sure_only_after_correction():
    """An interval that alone excludes guessing, and does not when 30 layers were looked at."""
    layers = pd.DataFrame({"layer": range(30), "value": 0.5, "low": 0.4, "high": 0.6})
    layers.loc[25, ["value", "low", "high"]] = 0.6, 0.51, 0.69
    table = layers.assign(task="a", shots=1, control="none", metric="aucroc", examples=50, note="")
    (said,) = sentences.readout({"summary": table})
    assert "best in layer 25: AUCROC .60 [.51, .69]" in said
    assert "in none of them is it surely above guessing; all lie below the paper's .8" in said
    assert "is not met here" in said
    layers.loc[25, "low"] = 0.57
    (said,) = sentences.readout({"summary": table.assign(low=layers["low"])})
    assert "surely above guessing in 1 of them" in said
    assert "is met here" in said


def test_bias_is_counted():
    labels = pd.DataFrame(
        {"label": ["x", "y", "z"], "texts": [10, 10, 10], "said": [25, 4, 1], "right": [9, 4, 1]}
    )
    said = sentences.biased(labels)
    assert (
        "14 of 30 answers are right. x is said 25 times and true 10 times, z is said 1 time and true 10"
        in said
    )
    assert "16 of 16 mistakes name x" in said
    even = labels.assign(said=labels["texts"])
    assert "Every label is said as often as it is true" in sentences.biased(even)


def test_diagnosis_looks_at_classify():
    own = rows(diagnosed("wxyz"))
    tables = STUDIES["diagnose"].tabulate(own)
    worst = tables["pairs"].loc[tables["pairs"]["actual"].idxmin()]
    counts = [(worst["one"], worst["other"], 7), ("w", "w", 3)]
    confusion = pd.DataFrame(counts, columns=["gold", "predicted", "prompts"]).assign(
        task="a", shots=1, control="none", condition="none"
    )
    said = STUDIES["diagnose"].say(tables | {"classify_confusion": confusion})
    assert "`classify` agrees" in said[1]
    assert "(7 of 10 prompts)" in said[1]
    other = {"w": "x", "x": "y", "y": "z", "z": "w"}[worst["one"]]
    moved = confusion.assign(predicted=[other if other != worst["other"] else "q", "w"])
    assert "`classify` disagrees" in STUDIES["diagnose"].say(tables | {"classify_confusion": moved})[1]
    assert "classify" not in " ".join(STUDIES["diagnose"].say(tables))
    labels = tables["labels"]
    wide = own[own["number"] >= 0].pivot_table(index="number", columns="metric", values="value")
    assert (
        labels["said"].tolist() == wide["predicted"].value_counts().reindex(range(4), fill_value=0).tolist()
    )
    assert labels["texts"].tolist() == wide["gold"].value_counts().sort_index().tolist()


def test_compression_is_weighed_against_a_cache():
    table = rows(
        [
            *compressed(40),
            (-1, "none", None, "cache_bytes", 400),
            (-1, "hidden_anchor", None, "cache_bytes", 100),
        ]
    )
    tables = tables_of({"compress": table, "speed": rows(timed())})
    first, second = STUDIES["compress"].say(tables)
    assert "keys and values of label words and format keep" in first
    whole = tables["speed"].set_index("condition").loc["whole_cached"]
    assert f"{estimate(whole['value'], whole['low'], whole['high'])} times as fast" in second
    assert "take 25 % of that cache" in second


MADE = {
    "classify": classified("xyz"), "isolate": isolated(), "readout": attended([0, 1] * 8),
    "reweight": reweighted("xy"), "diagnose": diagnosed("xyz"), "compress": compressed(),
}  # fmt: skip


@pytest.mark.parametrize("kind", MADE)
def test_every_task_gets_its_sentences(kind):
    both = pd.concat([rows(MADE[kind], "a"), rows(MADE[kind], "b")], ignore_index=True)
    said = STUDIES[kind].say(STUDIES[kind].tabulate(both))
    assert {text.partition(": ")[0] for text in said} - {"mean over tasks"} == {"a", "b"}
    assert 2 <= len(said) <= 4
    assert all("nan" not in text for text in said)


def test_every_condition_is_explained():
    for kind, made in MADE.items():
        tables = STUDIES[kind].tabulate(rows(made))
        conditions = set(tables["summary"].get("condition", ())) - {"none"}
        assert {line.split(": ")[0] for line in STUDIES[kind].legend(tables)} == conditions
    nsa = [
        f"cut-{branch}-{place}" for branch in ("cmp", "slc", "win") for place in ("label", "last", "control")
    ] + [f"{what}-{who}{end}" for what in ("ban", "force") for who in ("label", "answer") for end in ("", "-control")] + [
        f"isolate-{place}" for place in ("label", "answer", "control")
    ]  # fmt: skip
    assert len({of_nsa.explained(name) for name in nsa} - {""}) == len(nsa)
    assert of_nsa.explained("none") == ""


def test_studies_with_sentences():
    named = {name for name, line in BUILT_IN.items() if line.sentences}
    assert named >= {
        "flow",
        "isolate",
        "readout",
        "reweight",
        "compress",
        "diagnose",
        "causal",
        "nsa_probe",
        "inject-flow",
        "inject-sweep",
        "map",
        "words",
    }


def test_single_prompts_say_what_is_seen():
    """Flows of five tokens are all 1: what goes into the label word at 2 are 2 of 10 pairs, what goes from it to the target 1."""
    roles = ["text", "format", "label", "format", "target"]
    made = [
        (0, "none", layer, metric, 1.0 if "flow" in metric else value)
        for _, _, layer, metric, value in mapped("abcde", roles, (0, 3))
    ]
    one, other = STUDIES["map"].say(STUDIES["map"].tabulate(pd.concat([rows(made, "a"), rows(made, "b")])))
    layer = "{} .200 of the flow goes into label words, to which .200 of the pairs of tokens belong, and .100 from them to the target (.100 of the pairs)"
    assert (
        one
        == f"a: in layer 0 {layer.format('').strip()}; in layer 3 {layer.format('').strip()}. One prompt shows what there is to see, and estimates nothing."
    )
    assert other.startswith("b: ")

    table = rows(worded(["x", "y", "z", "w"]))
    after = (table["condition"] == "first-5/label") & (table["number"] == 0)
    table.loc[after, "metric"] = table.loc[after, "metric"].replace(
        {"word/1/x": "word/1/q", "word/2/y": "word/2/r"}
    )
    (said,) = STUDIES["words"].say(STUDIES["words"].tabulate(table))
    assert said == (
        "a: of the 4 most probable next words on average 3 are left, and the first of them in 1 of 2, where label words see nothing before them in the "
        "first 5 layers. 2 prompts show what there is to see, and estimates nothing."
    ).replace("estimates", "estimate")


def test_a_sweep_answers():
    def spread(**means):
        return {
            f"{n}{end}": v + by
            for n, v in means.items()
            for end, by in (("", 0), ("_low", -0.05), ("_high", 0.05))
        }

    summary = pd.DataFrame(
        [
            {"scenario": "s", "setting": name, "examples": 80} | spread(skill=skill)
            for name, skill in (("VLM alone", 0.1), ("ties λ=1 d=0.5", 0.6))
        ]
    )
    chosen = {
        "scenario": "s",
        "family": "any",
        "setting": "ties λ=1 d=0.5",
        "retention": 0.95,
        "chosen_on": "tune",
        "split": "test",
    }
    chosen |= spread(skill=0.6, vision_kept=0.97, blank=0.2, net=0.4, difference=0.1)

    def say(**changed):
        (told,) = STUDIES["inject-sweep"].say({"summary": summary, "best": pd.DataFrame([chosen | changed])})
        return told

    assert (
        "answers .60 [.55, .65] of the questions, where the VLM alone answers .10 [.05, .15], and keeps .97"
        in say()
    )
    assert (
        "on blank images it answers .20 [.15, .25]; it is +.10 [+.05, +.15] ahead of task arithmetic" in say()
    )
    assert say().endswith(
        "Shown here: the merge gives a skill, and it needs the picture (n = 80; corrected for 2 comparisons)."
    )
    assert "Undecided" in say(net=0.04, net_low=-0.01)
    assert "Excluded here" in say(skill=0.0, skill_low=-0.05, skill_high=0.01)
    assert say(chosen_on="test").endswith("no verdict.")
    assert "of its vision" not in say(vision_kept=float("nan"))
    blind = say(net=float("nan"), blank=float("nan"))
    assert "blank" not in blind
    assert "Shown here: the merge gives a skill (n" in blind
    assert (
        say(setting="VLM alone")
        == "s: no setting that keeps 95 % of the VLM's vision on tune has more of the skill than the VLM alone."
    )


def test_interventions_and_merges_answer():
    effects = pd.DataFrame(
        [
            ("none", 0.8, 0.0, 0.0),
            ("isolate-label", 0.4, -0.4, -0.3),
            ("isolate-control", 0.7, -0.1, 0.0),
            ("cut-slc-last", 0.2, -0.6, 0.0),
        ],
        columns=["condition", "value", "difference", "beyond"],
    )
    for name in ("difference", "beyond"):
        effects[f"{name}_low"], effects[f"{name}_high"] = effects[name] - 0.1, effects[name] + 0.1
    table = effects.assign(metric="accuracy", prompts=60)
    hiding, worst = STUDIES["nsa_probe"].say({"summary": table})
    assert (
        "changes accuracy by -.40 [-.50, -.30], beyond hiding as many other words by -.30 [-.40, -.20]"
        in hiding
    )
    assert "Shown here: the model is anchored" in hiding
    assert "Of 3 interventions cut-slc-last costs most (no selected blocks at the last position" in worst
    assert "Undecided" in STUDIES["nsa_probe"].say({"summary": table.assign(beyond_high=0.01)})[0]

    tests = pd.DataFrame({"within": [0.6, 0.1], "within_q": [0.02, 0.9]}).assign(
        metric="s_ip", part="shallow", measure="share", settings=40, curves=8
    )
    rules = pd.DataFrame(
        {
            "rule": ["flow", "fixed 1"],
            "regret": [0.01, 0.2],
            "low": [0, 0.15],
            "high": [0.02, 0.25],
            "units": 12,
        }
    )
    damage, regret = STUDIES["inject-flow"].say({"damage": tests, "regret": rules})
    assert damage.startswith("Vision damage goes with lost image flow, beyond what λ tells (1 of 2 tests")
    assert "'flow' has the least mean regret, .010 [.000, .020], before 'fixed 1'" in regret
    assert "it is ahead" in regret
    weak = STUDIES["inject-flow"].say(
        {"damage": tests.assign(within_q=0.2), "regret": rules.assign(low=0.0, high=0.3)}
    )
    assert weak[0].startswith("Undecided")
    assert "undecided which is better" in weak[1]
