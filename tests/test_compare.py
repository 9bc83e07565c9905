"""Models and runs side by side: `anchors compare` and `anchors ls`."""

import json

import numpy as np
import pandas as pd
import pytest
from made_rows import attended, classified, isolated, rows
from typer.testing import CliRunner

from anchors.cli import app
from anchors.collection import gather, lying_in
from anchors.comparison import compared, labels_of
from anchors.errors import AnchorsError
from anchors.figures.compare import draw
from anchors.study.registry import STUDIES
from anchors.study.report import leave
from anchors.study.results import provenance
from anchors.study.shelf import run_name


def lay(folder, kind, own, model, *, examples=12, data="d", **task):
    """Results of one model, as its verb leaves them."""
    task = {"template": "{text} {label}", "labels": ["x", "y"]} | task
    part = {
        "kind": kind,
        "model": model,
        "task": task,
        "data": data,
        "shots": 1,
        "control": "none",
        "fresh": False,
    }
    part |= {"seeds": [1], "examples": examples, "precision": "float32"}
    facts = provenance(model=model, fingerprint=model, precision="float32", parts=[part])
    own = own.assign(model=model)
    line = STUDIES[kind]
    return leave(
        folder, line.stems[kind], facts, line.tabulate(own), "none", rows={line.stems[kind]: own}
    ), facts


def answered(right, seed=1):
    """Rows of a model that is right on these prompts, whose numbers they are."""
    made = []
    for number, hit in right.items():
        made += [(number, "none", None, "accuracy", hit), (number, "none", None, "loss", 1.5 - hit)]
        made += [(number, "none", None, "gold", 0), (number, "none", None, "predicted", 1 - hit)]
        made += [(number, "none", None, f"probability/{label}", 0.5) for label in "xy"]
    return rows(made, seed=seed)


@pytest.fixture
def two(tmp_path):
    rng = np.random.default_rng(0)
    first = {n: int(rng.random() < 0.5) for n in range(40)}
    second = first | dict.fromkeys(range(8), 1)
    lay(tmp_path / "classify", "classify", answered(first), "m1", examples=40)
    lay(tmp_path / "classify", "classify", answered({n: second[n] for n in range(30)}), "m2", examples=30)
    return tmp_path, first, second


def test_both_lie_there_by_model_and_size(two):
    out, *_ = two
    one, other = gather([out])
    assert (one.folder, other.folder.parent) == (out / "classify", out / "classify")
    assert other.folder.name.startswith("m2-30x1-float32-")
    assert other.folder.name == run_name(other.facts)
    ran = CliRunner().invoke(app, ["ls", "-o", str(out)], env={"COLUMNS": "120"})
    lines = [line.split() for line in ran.stdout.splitlines() if line.strip().startswith("classify")]
    assert [line[:7] for line in lines] == [
        ["classify", "a", "m1", "float32", "40", "×", "1"], ["classify", "a", "m2", "float32", "30", "×", "1"],
    ]  # fmt: skip
    listed = json.loads(CliRunner().invoke(app, ["ls", "-o", str(out), "--json"]).stdout)["results"]
    assert [(own["model"], own["tasks"], own["size"]) for own in listed] == [
        ("m1", ["a"], "40 × 1"), ("m2", ["a"], "30 × 1"),
    ]  # fmt: skip


def test_a_path_is_no_name(tmp_path):
    """One model's title is its file's; two of the same title keep their paths."""
    paths = "/data/tiny-Q8_0.gguf", "/data/other/small.gguf"
    own = answered(dict.fromkeys(range(4), 1))
    for path in paths:
        lay(tmp_path / "classify", "classify", own, path, examples=4)
    found = gather([tmp_path])
    assert labels_of(found) == ["tiny-Q8_0", "small"]
    ran = CliRunner().invoke(app, ["ls", "-o", str(tmp_path)], env={"COLUMNS": "120"})
    assert "tiny-Q8_0" in ran.stdout
    assert "/data" not in ran.stdout
    lay(tmp_path / "classify", "classify", own, "/elsewhere/small.gguf", examples=4)
    assert sorted(labels_of(gather([tmp_path]))) == [
        "/data/other/small.gguf",
        "/elsewhere/small.gguf",
        "tiny-Q8_0",
    ]


def test_differences_are_paired_on_what_both_have(two):
    out, first, second = two
    table = compared(gather([out]))
    own = table[table["metric"] == "accuracy"].set_index("run")
    assert own["value"].tolist() == pytest.approx(
        [np.mean(list(first.values())), np.mean([second[n] for n in range(30)])]
    )
    assert own["examples"].tolist() == [40, 30]
    gaps = np.array([second[n] - first[n] for n in range(30)])
    row = own.loc["m2"]
    assert row["shared"] == 30
    assert row["difference"] == pytest.approx(gaps.mean())
    # The paired interval is that of the differences alone; unpaired ones would be far wider.
    draws = np.random.default_rng(1).choice(gaps, (4000, 30)).mean(1)
    assert [row["difference_low"], row["difference_high"]] == pytest.approx(
        np.quantile(draws, [0.025, 0.975]), abs=0.04
    )
    assert pd.isna(own.loc["m1", "difference"])


@pytest.mark.parametrize("other", [{"data": "e"}, {"labels": ["y", "x"]}, {"template": "{label}"}])
def test_other_prompts_are_never_paired(other, tmp_path):
    made = answered(dict.fromkeys(range(12), 1))
    lay(tmp_path / "a", "classify", made, "m1")
    lay(tmp_path / "b", "classify", made, "m2", **other)
    assert compared(gather([tmp_path]))["difference"].isna().all()
    lay(tmp_path / "c", "classify", made, "m3")
    assert compared(gather([tmp_path / "a", tmp_path / "c"]))["difference"].notna().any()


def test_the_same_number_with_another_text_is_not_paired(tmp_path):
    made = answered(dict.fromkeys(range(12), 1))
    lay(tmp_path / "a", "classify", made, "m1")
    lay(tmp_path / "b", "classify", made.assign(example=made["example"] + (made["number"] >= 5)), "m2")
    table = compared(gather([tmp_path]))
    assert table.loc[table["run"] == "m2", "shared"].dropna().unique() == [5]


def test_thirds_of_the_flow_and_of_the_readout(tmp_path):
    rng = np.random.default_rng(2)
    made = [
        (n, "none", layer, name, rng.random() + (name == "s_pq") * layer)
        for n in range(12) for layer in range(6) for name in ("s_wp", "s_pq", "s_ww", "s_pq_rest")
    ]  # fmt: skip
    for model, scale in (("m1", 1.0), ("m2", 3.0)):
        own = rows(made)
        lay(tmp_path / "flow", "flow", own.assign(value=own["value"] * scale), model)
        lay(tmp_path / "readout", "readout", rows(attended([0, 1] * 6)), model)
    found = gather([tmp_path])
    flow, readout = (compared([own for own in found if own.kind == kind]) for kind in ("flow", "readout"))
    pattern = STUDIES["flow"].tabulate(rows(made))["pattern"].iloc[0]
    for end in ("first third", "last third"):
        row = flow[(flow["metric"] == "share of S_wp") & (flow["condition"] == end)]
        assert row["value"].tolist() == pytest.approx([pattern[f"s_wp_{end.replace(' ', '_')}"]] * 2)
    assert flow["difference"].dropna().abs().max() < 1e-12  # shares know no scale
    auc = STUDIES["readout"].tabulate(rows(attended([0, 1] * 6)))["summary"]
    auc = auc[auc["metric"] == "aucroc"].set_index("layer")["value"]
    assert readout.loc[readout["condition"] == "last third", "value"].tolist() == pytest.approx([auc[3]] * 2)


def test_one_table_and_one_figure(two):
    out, *_ = two
    for number in range(2):
        lay(out / "isolate", "isolate", rows(isolated(prompts=12)), f"m{number}")
    ran = CliRunner().invoke(app, ["compare", str(out), "-o", str(out / "both")], env={"COLUMNS": "80"})
    assert ran.exit_code == 0, ran.output
    assert "accuracy, untouched" in ran.stdout
    assert "…" not in ran.stdout
    written = {p.name for p in (out / "both").iterdir()}
    assert written == {
        f"compare_{k}.{e}" for k in ("classify", "isolate") for e in ("parquet", "json", "png", "pdf")
    }
    table = pd.read_parquet(out / "both" / "compare_isolate.parquet")
    figure = draw(table, "isolate")
    shown = sorted(float(x) for axes in figure.axes for line in axes.lines for x in line.get_xdata())
    assert shown == pytest.approx(sorted(table["value"]))
    assert [len(axes.get_xlabel()) > 0 for axes in figure.axes if axes.get_visible()] == [True] * 3
    again = CliRunner().invoke(app, ["compare", str(out), "-o", str(out / "both"), "--json"])
    assert set(json.loads(again.stdout)) == {"classify", "isolate", "files"}
    alone = CliRunner().invoke(app, ["compare", str(out / "both")])
    assert alone.exit_code == 2
    assert "nothing to put side by side" in " ".join(alone.stderr.split())


def test_runs_are_told_apart(two):
    out, *_ = two
    found = gather([out])
    assert labels_of(found) == ["m1", "m2"]
    assert len(set(labels_of([found[0], found[0]]))) == 2
    with pytest.raises(AnchorsError, match="cannot be compared"):
        compared(found[:1])


def test_runs_of_a_model_are_told_apart_by_their_chats(tmp_path):
    """And paired on their prompts: a chat is what may differ."""
    for name, chat in {
        "": None,
        " (chat)": {"form": "turns"},
        " (chat, one turn, system)": {"form": "one", "system": "s"},
    }.items():
        own = answered(dict.fromkeys(range(4), len(name) % 2)).assign(task=f"a{name}")
        lay(
            tmp_path / f"run{len(name)}", "classify", own, "m", examples=4, **({"chat": chat} if chat else {})
        )
    found = sorted(gather([tmp_path]), key=lambda own: own.tasks)
    assert labels_of(found) == ["m", "m, chat", "m, chat, one turn, system"]
    table = compared(found)
    own = table[table["metric"] == "accuracy"].set_index("run")
    assert own["value"].to_dict() == {"m": 0, "m, chat": 1, "m, chat, one turn, system": 1}
    assert own.loc["m, chat", "difference"] == 1


def test_an_experiment_is_no_study(tmp_path):
    made = rows(classified("xy"))
    lay(tmp_path / "table1", "classify", made, "m")
    (own,) = lying_in(tmp_path / "table1")
    assert own.name == "classify"
