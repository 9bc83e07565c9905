"""The sweep: its grid, its rows against one injection by hand, going on after a break, its tables and its pictures."""

import json
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from injection_suites import build
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from anchors.cli.inject import app
from anchors.errors import AnchorsError
from anchors.figures import inject_sweep
from anchors.injection.asking.evaluate import captions, evaluate, evaluate_text
from anchors.injection.asking.suite import Suite
from anchors.injection.asking.vlm import load_vlm
from anchors.injection.merging.memory import TaskVectors, inject
from anchors.injection.merging.recipe import Recipe
from anchors.injection.sweeping import sweep as module
from anchors.injection.sweeping.grid import Grid, facts_of, family_of, setting_of
from anchors.injection.sweeping.report import _edges, report
from anchors.injection.sweeping.sweep import IDENTITY, REFERENCES, Bench, Sweep, Swept, sweep
from anchors.injection.sweeping.tables import Samples, tables
from anchors.model.language import load

GRID = Grid("small", ("task-arithmetic", "dare", "swap"), (0.5, 1.0), (0.5,), 2)


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> list[Suite]:
    return [Suite.open(build(tmp_path_factory.mktemp(f"world-{seed}"), seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def swept(
    suites: list[Suite], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Swept, Path, list[tuple[int, int]]]:
    out, ticks = tmp_path_factory.mktemp("out"), []
    found = sweep(suites, Sweep(GRID), out=out, device="cpu", progress=lambda *t: ticks.append(t))
    return found, out, ticks


def test_a_plan_counts_what_measuring_does(suites: list[Suite]) -> None:
    """All prompts are among the few that are run for it; merges by elements have no products."""
    wanted = Sweep(Grid("small", ("task-arithmetic",), (0.5, 1.0)), ("instruction",), limit=2)
    for part in (slice(None), slice(-2, None)):  # with references, and settings alone
        (own,) = module.stretches(suites[:1], wanted, [], device="cpu", precision="float32")
        (lot,), units = own.lots(None), own.units[part]
        cost = own.cost(units)
        with FlopCounterMode(display=False) as counted:
            for unit in units:
                lot.measure(None, [unit])
        assert cost.flop == pytest.approx(counted.get_total_flops(), rel=0.05)
        assert cost.seconds > 0
        assert own.memory() > 3 * 4 * 32 * 48 * 9  # three models' MLPs


def test_grid_repeats_no_setting_over_what_it_ignores() -> None:
    recipes = GRID.recipes(3)
    assert [r.label() for r in recipes] == [
        "task-arithmetic λ=0.5", "task-arithmetic λ=1", "dare λ=0.5 d=0.5", "dare λ=1 d=0.5", "dare λ=0.5 d=0.5 seed 1",
        "dare λ=1 d=0.5 seed 1", "swap λ=1",
    ]  # fmt: skip
    assert len(set(map(setting_of, recipes))) == 5
    average = Grid(methods=("average",), strengths=(0.5, 1.0, 2.0)).recipes(3)
    assert [r.strength for r in average] == [0.5]
    assert [r.strength for r in Grid(methods=("average",), strengths=(1.0,)).recipes(3)] == [0.1]


def test_grid_layers() -> None:
    spans = [
        r.layers
        for r in Grid(methods=("task-arithmetic",), strengths=(1.0,), layers=("thirds", "all", "5")).recipes(
            7
        )
    ]
    assert spans == [(0, 1), (2, 4), (5, 6), None, (5, 5)]
    assert [r.layers for r in Grid(methods=("swap",), layers=("thirds",)).recipes(2)] == [(0, 0), (1, 1)]
    full = Grid("full").recipes(30)
    assert {r.method for r in full if r.layers is not None} == {"task-arithmetic"}
    assert len(full) == len(set(full)) > 100
    assert {family_of(r) for r in full} >= {"task-arithmetic", "task-arithmetic layers 0–9", "wudi"}
    for wrong in ("7", "a", "3-1", "0-9", ""):
        with pytest.raises(AnchorsError, match="no range"):
            Grid(layers=(wrong,)).recipes(7)


def test_grid_options_and_refusals() -> None:
    grid = Grid(methods=("dare:rescale=none:density=0.25",), strengths=(1.0,), densities=(0.5,), draws=1)
    (recipe,) = grid.recipes(3)
    assert recipe == Recipe("dare", 1.0, density=0.25, options=(("rescale", "none"),))
    assert "rescale=none" in family_of(recipe)
    (weaker,) = Grid(methods=("dare:vlm_strength=0.5",), strengths=(1.0,), densities=(0.2,), draws=1).recipes(
        3
    )
    assert weaker == Recipe("dare", 1.0, vlm_strength=0.5, density=0.2)
    assert family_of(weaker) == "dare λv=0.5"
    assert facts_of(weaker)["options"] == '{"vlm_strength": 0.5}'
    with pytest.raises(AnchorsError, match="density is 'few'"):
        Grid(methods=("ties:density=few",))
    assert facts_of(recipe)["density"] == 0.25
    assert facts_of(Recipe("dare"))["density"] == 0.5
    for methods in (("tis",), ("dare:rescale",), ("ties:rescale=l1",)):
        with pytest.raises(AnchorsError):
            Grid(methods=methods).recipes(3)
    for wrong in ({"size": "huge"}, {"draws": 0}, {"strengths": (0.0, 1.0)}):
        with pytest.raises(AnchorsError):
            Grid(**wrong)


def test_rows_are_what_one_injection_by_hand_gives(suites: list[Suite], swept: tuple) -> None:
    rows, suite = swept[0].rows, suites[0]
    vlm, base = load_vlm(suite.model("vlm"), device="cpu"), load(suite.model("base"), device="cpu")
    expert = load(suite.model("experts", "crosslingual"), device="cpu")
    examples = Sweep().examples(suite, "crosslingual")
    vectors = TaskVectors.of(vlm.model, base.model, expert.model)
    before = {name: p.clone() for name, p in vlm.model.named_parameters()}

    def own(setting: str, condition: str, mask: int = 0) -> list[bool]:
        part = rows[(rows["seed"] == 0) & (rows["scenario"] == "crosslingual") & (rows["setting"] == setting)]
        part = part[(part["mask"] == mask) & (part["condition"] == condition)]
        assert set(part["split"]) == {"test", "tune"}
        return part["correct"].tolist()

    changed = 0
    for recipe in GRID.recipes(3):
        with inject(vlm.model, vectors, recipe):
            for condition, image in (("skill", "own"), ("blank", "blank"), ("shuffled", "shuffled")):
                by_hand = evaluate(vlm, suite, examples, image)["correct"].tolist()
                assert own(setting_of(recipe), condition, recipe.seed) == by_hand
                changed += by_hand != own("VLM alone", condition)
            vision = evaluate(vlm, suite, Sweep().examples(suite, "vision"))["correct"].tolist()
            assert own(setting_of(recipe), "vision", recipe.seed) == vision
    assert changed
    assert all(bool((p == before[name]).all()) for name, p in vlm.model.named_parameters())
    assert own("text oracle", "skill") == evaluate_text(expert, suite, examples)["correct"].tolist()
    assert own("base text", "skill") == evaluate_text(base, suite, examples)["correct"].tolist()
    told = captions(vlm, suite, examples)
    assert own("cascade", "skill") == evaluate_text(expert, suite, examples, told)["correct"].tolist()


def test_rows_are_complete(suites: list[Suite], swept: tuple) -> None:
    found, _, ticks = swept
    settings = len(GRID.recipes(3))
    # The upper bound is named for one scenario of two.
    assert len(found.settings) == 2 * (2 * settings + 5 + 4)
    assert ticks[-1] == (len(found.settings), len(found.settings))
    assert not found.rows.duplicated([*IDENTITY, "condition", "number"]).any()
    own = found.settings[found.settings["method"] == "task-arithmetic"]
    assert np.allclose(own["dose"], own["strength"], rtol=1e-4)
    assert (found.settings.loc[found.settings["family"] != "reference", "changed"] > 0).all()
    assert any("trainings only" in note for note in found.notes)
    assert set(found.rows["setting"]) == {*REFERENCES, *map(setting_of, GRID.recipes(3))}


def test_the_same_sweep_computes_nothing_again(
    suites: list[Suite], swept: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out, _ = swept
    monkeypatch.setattr(Bench, "measure", lambda *_: pytest.fail("computed again"))
    again = sweep(suites, Sweep(GRID), out=out, device="cpu")
    pd.testing.assert_frame_equal(again.rows, found.rows)
    pd.testing.assert_frame_equal(again.settings, found.settings)
    fewer = sweep(
        suites[:1], Sweep(replace(GRID, methods=("swap",)), ("instruction",)), out=out, device="cpu"
    )
    assert set(fewer.settings["setting"]) == {*REFERENCES, "swap λ=1"}


def test_a_broken_sweep_goes_on(
    suites: list[Suite], swept: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, measured, original = Sweep(GRID, ("instruction",)), [], Bench.measure

    def counted(self: Bench, what: object) -> pd.DataFrame:
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(what)
        return original(self, what)

    monkeypatch.setattr(Bench, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(suites[:1], wanted, out=tmp_path, device="cpu")
    monkeypatch.setattr(Bench, "measure", lambda self, what: (measured.append(what), original(self, what))[1])
    found = sweep(suites[:1], wanted, out=tmp_path, device="cpu")
    assert len(measured) == len(set(measured)) == len(found.settings)
    whole = swept[0].rows
    whole = whole[(whole["seed"] == 0) & (whole["scenario"] == "instruction")]
    order = [*IDENTITY, "condition", "number"]
    tidy = [
        x.astype({"scenario": str, "setting": str})
        .sort_values(order, ignore_index=True)[[*order, "correct"]]
        .astype({"condition": str})
        for x in (found.rows, whole)
    ]
    pd.testing.assert_frame_equal(*tidy)


def test_refusals(suites: list[Suite], tmp_path: Path) -> None:
    with pytest.raises(AnchorsError, match="no expert for 'mathematics'"):
        sweep(suites, Sweep(GRID, ("mathematics",)), out=tmp_path, device="cpu")
    with pytest.raises(AnchorsError, match="the seed 0"):
        sweep([suites[0]] * 2, Sweep(GRID), out=tmp_path, device="cpu")
    other = replace(
        suites[1], models=suites[1].models | {"experts": {"instruction": "../experts/instruction"}}
    )
    with pytest.raises(AnchorsError, match="differ in their scenarios"):
        sweep([suites[0], other], Sweep(GRID), out=tmp_path, device="cpu")


def test_out_of_memory_says_what_to_do(
    suites: list[Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(module, "score", full)
    with pytest.raises(AnchorsError, match="do not fit into memory"):
        sweep(suites[:1], Sweep(GRID), out=tmp_path, device="cpu")


def test_notes_say_which_scenario_was_not_chosen_apart(suites: list[Suite], swept: tuple) -> None:
    rows = swept[0].rows.astype(dict.fromkeys(("scenario", "split", "condition", "setting"), str))
    assert not any("flatters" in note for note in swept[0].notes)
    part = rows[(rows["scenario"] != "instruction") | (rows["split"] != "tune")]
    sizes = dict.fromkeys(("changed", "norm", "relative", "dose"), 0.0)
    again = module._swept(part.assign(**sizes), GRID.recipes(3), [], "test", ["first"])
    assert [note.split(":")[0] for note in again.notes if "flatters" in note] == ["instruction"]
    assert again.notes[0] == "first"
    on_tune = module._swept(part.assign(**sizes), GRID.recipes(3), [], "tune", [])
    assert len([note for note in on_tune.notes if "flatters" in note]) == 2


def test_a_reference_that_one_suite_lacks_is_left_out(suites: list[Suite], swept: tuple) -> None:
    other = replace(suites[1], models=suites[1].models | {"upper": {}}, caption=None)
    wanted = Sweep(replace(GRID, methods=("swap",)), ("instruction",))
    found = sweep([suites[0], other], wanted, out=swept[1], device="cpu")
    assert set(found.settings["setting"]) == {"VLM alone", "text oracle", "base text", "swap λ=1"}
    for name in ("cascade", "upper bound"):
        assert any(name in note and "left out" in note for note in found.notes)
    assert tables(found.rows, found.settings, resamples=0)["summary"]["skill"].notna().all()


def test_tables_of_a_sweep(swept: tuple) -> None:
    found = swept[0]
    made_tables = tables(found.rows, found.settings, resamples=20)
    scenario = found.rows[(found.rows["scenario"] == "instruction") & (found.rows["split"] == "test")]
    own = scenario[(scenario["setting"] == "dare λ=1 d=0.5") & (scenario["condition"] == "skill")]
    row = made_tables["summary"].set_index(["scenario", "setting"]).loc[("instruction", "dare λ=1 d=0.5")]
    assert row["skill"] == pytest.approx(own["correct"].mean())
    names = list(made_tables["summary"]["setting"][made_tables["summary"]["scenario"] == "instruction"])
    assert Samples.of(scenario, names, 3).values["vision"].shape == (4, len(names))
    assert set(inject_sweep.draw(made_tables, "tiny")) == {"pareto", "strength", "dose"}


def test_command(suites: list[Suite], swept: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    grid = ["--grid", "small", "--methods", "task-arithmetic,dare,swap", "--strengths", "0.5,1"]
    grid += ["--densities", "0.5", "--draws", "2"]
    monkeypatch.setitem(mpl.rcParams, "savefig.dpi", 30)
    monkeypatch.setattr(inject_sweep, "curves", lambda *_: Figure())  # drawn above
    folders = [str(suites[0].folder)]
    found = run(app, ["sweep", *folders, *grid, "--device", "cpu", "-o", str(swept[1]), "--json"])
    assert found.exit_code == 0, found.output
    data = json.loads(found.stdout)
    assert {"summary", "best", "matched", "sensitivity", "scenarios", "notes", "files"} <= set(data)
    assert all(Path(f).is_file() for f in data["files"])
    assert {Path(f).suffix for f in data["files"]} == {".parquet", ".png", ".pdf"}
    monkeypatch.setattr(inject_sweep, "draw", lambda *_: {})
    shown = run(app, ["sweep", *folders, *grid, "--device", "cpu", "-o", str(swept[1])])
    assert shown.exit_code == 0, shown.output
    for text in (
        "instruction without injection",
        "equal norm added",
        "of the VLM's vision on tune",
        "vision kept",
        "Which scenarios",
    ):
        assert text in " ".join(shown.stdout.split())


def test_a_report_from_python_is_that_of_the_command(
    suites: list[Suite], swept: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inject_sweep, "draw", lambda *_: {})
    found = report(suites, Sweep(GRID), out=swept[1], device="cpu")
    assert found.title
    assert set(found.tables) >= {"summary", "best", "guessing"}
    assert set(found.tables["summary"]["setting"]) == set(swept[0].settings["setting"])


def test_command_without_task_arithmetic(
    suites: list[Suite], swept: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inject_sweep, "draw", lambda *_: {})
    grid = [
        "--grid",
        "small",
        "--methods",
        "ties",
        "--strengths",
        "1",
        "--scenarios",
        "instruction",
        "--retention",
        "0.5",
        "--device",
        "cpu",
        "-o",
    ]
    shown = CliRunner().invoke(app, ["sweep", str(suites[0].folder), *grid, str(swept[1])])
    assert shown.exit_code == 0, shown.output
    assert "highest skill among those that keep 50 % of the VLM's vision on" in " ".join(shown.stdout.split())
    assert "equal norm added" not in shown.stdout


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--strengths a", "not a list of numbers"), ("--methods tis", "no merging method"), ("--scenarios x", "no expert"),
        ("--split x", "no examples in split"), ("--layers 9", "no range"), ("--grid huge", "no grid"),
        ("--embeddings all", "There is no policy of embeddings"),
    ],
)  # fmt: skip
def test_command_refuses(suites: list[Suite], tmp_path: Path, wrong: str, said: str) -> None:
    failed = CliRunner().invoke(
        app, ["sweep", str(suites[0].folder), *wrong.split(), "--device", "cpu", "-o", str(tmp_path)]
    )
    assert failed.exit_code == 2, failed.output
    assert said in " ".join(failed.output.split())


def test_a_strength_at_the_edge_of_the_grid_is_told() -> None:
    best = pd.DataFrame({
        "scenario": ["a", "a", "a", "b"], "family": ["any", "ties", "tsv-m", "ties"], "edge": [True, True, True, False]
    })  # fmt: skip
    (note,) = _edges(best)
    assert note.startswith("a: the λ chosen for ties, tsv-m is the largest")
