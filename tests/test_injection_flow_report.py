"""Flow over λ: units that are kept, no labels where none may be used, correlations and rules for λ."""

import json

import numpy as np
import pandas as pd
import pytest
from injection_suites import build
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from anchors.cli import inject_flow as cli
from anchors.cli.inject import app
from anchors.errors import AnchorsError
from anchors.injection.asking.suite import Suite
from anchors.injection.asking.vlm import load_vlm
from anchors.injection.image_flow import choice as flow_choice
from anchors.injection.image_flow import report as flow_report
from anchors.injection.image_flow.choice import choices, damage, distances
from anchors.injection.image_flow.prompts import _span, _word, image_prompts
from anchors.injection.image_flow.report import GOLD, NOBODY, OWN, MeasuredFlow, Wanted, measure
from anchors.injection.image_flow.tables import tables
from anchors.injection.image_flow.write import write
from anchors.injection.merging.recipe import Recipe

WANTED = Wanted(Recipe(), (0.0, 0.5, 1.0), shots=1, prompts=4, examples=4, experts=("instruction",))


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Suite:
    folder = build(tmp_path_factory.mktemp("world"), examples=18)
    for path in folder.glob("*.jsonl"):
        path.write_text(path.read_text().replace('"tune"', '"demonstration"'))
    facts = json.loads((folder / "suite.json").read_text())
    (folder / "suite.json").write_text(json.dumps(facts | {"separator": " say "}))
    return Suite.open(folder)


@pytest.fixture(scope="module")
def measured(suite, tmp_path_factory) -> tuple[MeasuredFlow, list]:
    out, seen = tmp_path_factory.mktemp("flow"), []
    found = measure(
        [suite], WANTED, out=out, device="cpu", progress=lambda done, total: seen.append((done, total))
    )
    return found, out, seen


def test_a_plan_counts_what_measuring_does(suite):
    wanted = flow_report.replace(WANTED, strengths=(1.0,), prompts=2, examples=2)
    (alone, expert) = flow_report.stretches([suite], wanted, [], device="cpu", precision="float32")
    for own in (alone, expert):
        (lot,) = own.lots(None)
        state = lot.prepare()
        cost = own.cost(own.units)
        with FlopCounterMode(display=False) as counted:
            for unit in own.units:
                lot.measure(state, [unit])
        assert cost.flop == pytest.approx(counted.get_total_flops(), rel=0.15)
        assert cost.tokens > 0 < cost.seconds
    assert expert.memory() > alone.memory() > 0


def test_rows_are_tidy_and_kept(suite, measured, monkeypatch):
    found, out, seen = measured
    total = (
        4 + 2 * 3
    )  # three scenarios and own answers before; two strengths on vision (twice) and on the skill
    assert seen[-1] == (total, total)
    rows = found.rows
    assert list(rows.columns) == flow_report.ROWS
    assert not rows.duplicated([c for c in rows.columns if c != "value"]).any()
    assert rows["value"].notna().all()
    assert set(rows[rows["strength"] == 0]["expert"]) == {NOBODY}
    assert set(rows[rows["labels"] == OWN]["scenario"]) == {"vision"}
    monkeypatch.setattr(flow_report, "image_flow", None)  # nothing is computed again
    again = measure([suite], WANTED, out=out, device="cpu")
    pd.testing.assert_frame_equal(again.rows, rows)


def test_own_answers_use_no_labels(suite, measured, tmp_path):
    """Every answer of the vision scenario is another one; only what needs no labels stays the same."""
    other = {
        name: tuple(
            flow_report.replace(e, answer="small big", label=None) if name == "vision" and e.number % 2 else e
            for e in examples
        )
        for name, examples in suite.scenarios.items()
    }
    changed = flow_report.replace(suite, scenarios=other)
    wanted = flow_report.replace(WANTED, scenarios=("vision",), strengths=(0.0, 1.0))
    found, before = measure([changed], wanted, out=tmp_path, device="cpu").rows, measured[0].rows
    own, first = (x[(x["labels"] == OWN) & x["strength"].isin([0, 1])] for x in (found, before))
    key = [c for c in flow_report.ROWS if c != "value"]
    both = own.merge(first, on=key, suffixes=("", "_before"))
    assert len(both) == len(own) == len(first) > 0
    assert (both["value"] == both["value_before"]).all()
    gold = found[found["labels"] == GOLD].merge(before, on=key, suffixes=("", "_before"))
    assert (gold["value"] != gold["value_before"]).any()


def test_everything_is_written(suite, measured):
    found, out, _ = measured
    shown, files, notes = write(found, [suite], WANTED, out)
    assert {"layers", "strengths", "accuracy", "damage", "points"} <= set(shown)
    assert all(path.is_file() and path.stat().st_size for path in files)
    assert {f"inject_flow_{name}.png" for name in ("vision_share", "skills_share", "damage")} <= {
        p.name for p in files
    }
    assert notes
    shares = shown["layers"][
        (shown["layers"]["measure"] == "share") & shown["layers"]["metric"].isin(["s_ip", "s_tp"])
    ]
    sums = (
        shares.groupby(["scenario", "labels", "expert", "strength", "layer"])["value"]
        .sum(min_count=2)
        .dropna()
    )
    np.testing.assert_allclose(sums, 1)
    before = shown["strengths"][shown["strengths"]["expert"] == NOBODY]
    assert (before["change"].dropna() == 0).all()


def test_demonstrations_are_of_the_query_s_kind(suite):
    vlm = load_vlm(suite.model("vlm"), device="cpu")
    drawn = image_prompts(vlm, suite, "vision", shots=2, count=6)
    answers = {e.answer for e in suite.examples("vision", "demonstration")}
    for prompt in drawn.prompts:
        assert len(prompt.images) == prompt.text.count("<image>") == 3
        assert all(prompt.text[a:b] in answers for a, b in prompt.labels)
        assert prompt.answer[1] == len(prompt.text)
    with pytest.raises(AnchorsError, match="too few for 5"):
        image_prompts(vlm, suite, "vision", shots=5, count=2)
    silent = dict.fromkeys((e.number for e in suite.examples("vision", "demonstration")), "")
    with pytest.raises(AnchorsError, match="itself answers 0 demonstrations"):
        image_prompts(vlm, suite, "vision", shots=2, count=2, said=silent)
    with pytest.raises(AnchorsError, match="no expert 'cooking'"):
        flow_report.replace(WANTED, experts=("cooking",)).of(suite)


def made(loses: bool = True) -> MeasuredFlow:
    """Three experts on two trainings; accuracy falls with λ as image flow does, from another λ on for each."""
    rows, ratios = [], []
    strengths = (0.0, 0.25, 0.5, 1.0, 1.5)
    for seed in (0, 1):
        for number, expert in enumerate((NOBODY, "a", "b", "c")):
            ratios += [{"seed": seed, "expert": expert, "ratio": 1.0 + number}] if number else []
            for strength in strengths if number else (0.0,):
                if number and strength == 0:
                    continue
                lost = max(0.0, min(0.9, strength - 0.3 * number))
                facts = {"seed": seed, "expert": expert, "strength": strength}
                for labels in (GOLD, OWN):
                    own = facts | {"scenario": "vision", "labels": labels}
                    flows = {
                        "s_ip": 1 - lost,
                        "s_iq": 1 - lost,
                        "m_ip": 1 - lost,
                        "m_tp": 1.0,
                        "m_iq": 1 - lost,
                        "m_tq": 1.0,
                    }
                    rows += [
                        own | {"number": n, "layer": layer, "metric": m, "value": (v if loses else 1.0) * (1 + 0.1 * n)}
                        for m, v in flows.items() for layer in range(4) for n in range(2)
                    ]  # fmt: skip
                    rows += [
                        own | {"number": n, "layer": -1, "metric": "surprise", "value": 0.5} for n in range(2)
                    ]
                for scenario, value in (
                    ("vision", 1 - lost),
                    (expert if number else "", strength / 2 * (lost == 0)),
                ):
                    for name in ("a", "b", "c") if not number and not scenario else (scenario,):
                        right = {
                            "scenario": name,
                            "labels": GOLD,
                            "number": 0,
                            "layer": -1,
                            "metric": "accuracy",
                        }
                        rows.append(facts | right | {"value": value})
    return MeasuredFlow(pd.DataFrame(rows), pd.DataFrame(ratios), "vision", [])


def test_damage_that_goes_with_lost_flow_is_found():
    found, points = damage(made(), permutations=499)
    own = found[found["measure"] == "odds"].set_index(["metric", "part"])
    assert own.loc[("s_ip", "shallow"), "rho"] > 0.99
    assert own.loc[("s_ip", "shallow"), "within"] > 0.99
    assert own.loc[("s_ip", "shallow"), "p"] < 0.01
    assert points["lost"].between(-1e-9, 1).all()
    flat, _ = damage(made(loses=False), permutations=99)
    assert flat["rho"].isna().all()


def test_flow_finds_the_strength_and_fixed_rules_do_not():
    """Flow is kept up to each expert's best λ; so an ε that fits two experts fits the third."""
    table, regret = choices(made())
    mean = regret.set_index("rule")["regret"]
    assert mean["flow (odds)"] == pytest.approx(0)
    assert mean["fixed 0.25"] > 0.03  # the nearest to 0.3 on this grid
    assert "fixed 0.3" not in mean
    assert "fixed 1" in mean
    assert mean["best fixed"] > 0
    own = table[table["rule"] == "flow (odds)"]
    assert (own["strength"] == own["best"]).all()
    far = distances(made())
    far = far[(far["measure"] == "odds") & (far["expert"] == "a") & (far["seed"] == 0)].set_index("strength")
    np.testing.assert_allclose(far["distance"], [0, 0, 0.2, 0.7, 0.9], atol=1e-12)


def test_made_rows_have_tables():
    found = tables(made().rows, resamples=20)
    part = found["strengths"]
    own = part[(part["measure"] == "odds") & (part["metric"] == "s_ip") & (part["part"] == "shallow")]
    own = own[(own["labels"] == GOLD) & (own["expert"] == "a")].set_index("strength")
    np.testing.assert_allclose(own["change"], [0, -0.2, -0.7, -0.9], atol=1e-12)


def test_labels_are_part_of_the_key(suite):
    """They say where the label words stand; the suite's fingerprint, on which sweeps hang, is without them."""
    vlm = load_vlm(suite.model("vlm"), device="cpu")
    word = suite.examples("vision")[0].answer.split()[0]
    other = {n: tuple(flow_report.replace(e, label=word) for e in x) for n, x in suite.scenarios.items()}
    one, two = (
        flow_report.FlowModels(flow_report.replace(suite, scenarios=s), WANTED, vlm).config(NOBODY, {})
        for s in (suite.scenarios, other)
    )
    assert one["data"] == two["data"]
    assert one != two


def test_label_words_are_whole_words_of_the_answer(suite):
    example = suite.examples("vision")[0]

    def found(template: str, answer: str, label: str | None) -> tuple[str, int]:
        own = flow_report.replace(suite, answer=template)
        shown = flow_report.replace(example, answer=answer, label=label)
        start, end = _span(own, shown)
        assert own.written(shown)[start:end] == _word(shown)
        return _word(shown), start

    assert found("The answer is {answer}", "a", None) == ("a", 14)
    assert found(" {answer}", "The answer is a", "a") == ("a", 15)
    assert found(" {answer}", "a cat and a dog", "a") == ("a", 11)
    assert found(" {answer}", "seventeen", "seven") == ("seventeen", 1)
    assert found(" {answer}", "3 * 1.5", "*") == ("*", 3)
    assert found(" {answer}", "one two", "") == ("one two", 1)


def test_experts_of_one_training_are_drawn_together():
    """Regrets that differ between trainings only: no interval may be narrower than that of two trainings."""
    keys = [(seed, expert) for seed in (0, 1) for expert in "abcdefgh"]
    table = pd.DataFrame([{"seed": s, "expert": x, "rule": "r", "regret": float(s)} for s, x in keys])
    row = flow_choice._mean_regret(table).iloc[0]
    assert (row["low"], row["regret"], row["high"]) == (0, 0.5, 1)
    assert row["units"] == 16
    single = flow_choice._mean_regret(table[:1]).iloc[0]
    assert np.isnan(single["low"])


def test_curves_are_permuted_within_their_training():
    """Trainings that differ in both damage and flow, experts that do not go together: nothing is found beyond them."""
    rng = np.random.default_rng(0)
    trainings = np.repeat([0, 1, 2], 3)
    orders = flow_choice._within(trainings, 999, rng)
    assert len(orders) == len({tuple(o) for o in orders}) == 6**3
    assert (trainings[orders] == trainings).all()
    drawn = flow_choice._within(np.repeat([0, 1], 5), 999, rng)
    assert len(drawn) == 1000
    assert (drawn[0] == np.arange(10)).all()
    noise = rng.normal(size=(2, 9, 4))
    lost, dropped = noise + 100 * trainings[:, None]
    found = flow_choice._correlations(lost, dropped, trainings, 999)
    assert found["rho"] > 0.8
    assert abs(found["within"]) < 0.5
    assert found["within_p"] > 0.05
    assert found["least_p"] == 1 / 6**3
    same = flow_choice._correlations(lost, lost, trainings, 999)
    assert same["within_p"] == same["least_p"]
    alone = flow_choice._correlations(lost[::3], dropped[::3], np.arange(3), 999)
    assert np.isnan([alone["within"], alone["within_p"], alone["least_p"]]).all()


def test_many_tests_are_corrected():
    found, _ = damage(made(), permutations=499)
    assert len(found) == 18
    assert (found["q"] >= found["p"]).all()
    assert found["within_p"].min() >= found["least_p"].max() == 1 / 36
    # All alike: Benjamini and Yekutieli's factor 1 + 1/2 + … + 1/18 stays.
    lowest = found["within_p"].max() * sum(1 / k for k in range(1, 19))
    assert found["within_q"].max() == pytest.approx(min(1, lowest))
    assert "no smaller than 0.028" in cli._damage({"damage": found}, "tiny").below


def test_vision_alone_judges_no_rule(suite, measured, tmp_path, monkeypatch):
    monkeypatch.setattr("anchors.study.shelf.Shelf.figure", lambda *_: None)
    wanted = [
        "--scenarios",
        "vision",
        "--experts",
        "instruction",
        "--strengths",
        "0,0.5,1",
        "--shots",
        "1",
        "-n",
        "4",
        "--examples",
        "4",
    ]
    shown = CliRunner().invoke(
        app, ["flow", str(suite.folder), *wanted, "--device", "cpu", "-o", str(tmp_path)]
    )
    assert shown.exit_code == 0, shown.output
    assert "No rule for λ was judged" in " ".join(shown.output.split())
