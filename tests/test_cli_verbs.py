"""Every verb that measures, as a user types it: tables, files, JSON, controls, and what is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

import pandas as pd
import pytest
from families import make
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from anchors.cli import app
from anchors.study.registry import BUILT_IN

runner = CliRunner()


@dataclass(frozen=True)
class Verb:
    """How a verb is tried: its options, the tables beside its rows, what must stand in what it prints."""

    options: tuple
    tables: tuple[str, ...]
    said: tuple[str, ...]
    printed: tuple[str, ...] = ()  # metrics of the summary whose every value is printed
    kinds: tuple[str, ...] = ()  # other kinds of rows than its own


VERBS = {
    "flow": Verb(
        ("-n", 4, "--pages", 0), ("summary", "pattern"), ("Information flow: sst2", "4 examples", "S_wp", "S_ww", "shares"),
    ),
    "classify": Verb(
        ("-n", 8, "--calibrate"), ("summary", "classes", "confusion"),
        ("8 examples", "calibrated", "confusion, calibrated", "precision", "Negative", "Δ accuracy"), ("accuracy", "loss"),
    ),
    "isolate": Verb(
        ("-n", 4, "--layers", "1,2"), ("summary",),
        ("Isolation: sst2", *(f"{s}-{k}/{p}" for s in ("first", "last") for k in (1, 2) for p in ("label", "random"))),
        ("accuracy", "label_loyalty", "word_loyalty"),
    ),
    "readout": Verb(("-n", 6, "-t", "trec", "--seeds", "1,2"), ("summary",), ("Reading out: trec", "AUCROC", "R", "not defined here"), ("aucroc",)),
    "reweight": Verb(
        ("-n", 4, "--epochs", 2, "--per-class", 2), ("summary", "beta"), ("Re-weighting: sst2", "reweighted"), ("accuracy", "loss"),
    ),
    "compress": Verb(
        ("-n", 4, "--draws", 3), ("summary", "sizes", "against", "speed"),
        ("Compression: sst2", "hidden_anchor", "text_anchor", "hidden_random_top", "MiB", "% saved", "speed-up", "L_demo", "kept in a cache change no answer"),
        ("accuracy", "label_loyalty", "word_loyalty"), ("compress_speed_rows",),
    ),
    "diagnose": Verb(
        ("-n", 8, "--components", "4", "-t", "emo"), ("summary", "pairs", "labels"),
        ("Pairs of labels: emo, components-4", "Others / Happy", "components-4: rank correlation", "are confused most", "answers are right"),
    ),
    "causal": Verb(("-n", 2), ("summary", "flow"), ("Patching: sst2", "label", "random", "follow"), ("follow",), ("causal_flow_rows",)),
}  # fmt: skip


def test_every_verb_of_a_study_is_tried():
    assert set(VERBS) == {name for name, study in BUILT_IN.items() if study.verb and study.asked == "prompts"}


@dataclass(frozen=True)
class Ran:
    """A finished run of a verb."""

    folder: Path
    stdout: str
    stderr: str

    def rows(self, kind: str) -> pd.DataFrame:
        return pd.read_parquet(self.folder / f"{kind}.parquet")


@pytest.fixture(scope="module")
def tiny(model_directory: Path) -> list[str]:
    return ["--model", str(model_directory), "--device", "cpu"]


def invoke(*arguments: object):
    return runner.invoke(app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "180"})


@pytest.fixture(scope="module")
def ran(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ran]:
    """The plain run of a verb, made once."""
    kept: dict[str, Ran] = {}

    def made(verb: str) -> Ran:
        if verb not in kept:
            folder = tmp_path_factory.mktemp(verb)
            result = invoke(verb, *tiny, *VERBS[verb].options, "-o", folder)
            assert result.exit_code == 0, result.output
            kept[verb] = Ran(folder, result.stdout, result.stderr)
        return kept[verb]

    return made


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """When each finished batch was written, and as which file."""
    found = {str(p.relative_to(folder)): p.stat() for p in (folder / "runs").rglob("*") if p.is_file()}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}


def plain(table: pd.DataFrame) -> list[dict]:
    """A table as JSON can hold it."""
    return [
        {k: None if pd.isna(v) or (isinstance(v, float) and math.isinf(v)) else v for k, v in row.items()}
        for row in table.astype(object).to_dict(orient="records")
    ]


def strict(text: str):
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def short(value: float) -> str:
    return f"{value:.2f}".replace("0.", ".") if abs(value) < 1 else f"{value:.2f}"


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_leaves_rows_tables_and_figure(verb, ran):
    folder, how = ran(verb).folder, VERBS[verb]
    tables = {verb, *how.kinds, *(f"{verb}_{name}" for name in how.tables)}
    wanted = {f"{name}.{suffix}" for name in tables for suffix in ("parquet", "json")}
    wanted |= {f"{verb}.png", f"{verb}.pdf"}
    assert {p.name for p in folder.iterdir()} == wanted | {"runs"}
    picture = Image.open(folder / f"{verb}.png")
    assert min(picture.size) > 100
    assert len(picture.convert("L").getcolors()) > 10
    assert (folder / f"{verb}.pdf").read_bytes().startswith(b"%PDF")
    rows, examples = ran(verb).rows(verb), how.options[1]
    assert sorted(rows.loc[rows["number"] >= 0, "number"].unique()) == list(range(examples))
    assert not rows["value"].isna().any()
    for name in tables:
        facts = json.loads((folder / f"{name}.json").read_text())
        assert (facts["parts"][0]["kind"], facts["parts"][0]["examples"]) == (verb, examples)
        assert facts["versions"]["torch"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_prints_its_numbers_and_names_its_files(verb, ran):
    done, how = ran(verb), VERBS[verb]
    printed = " ".join(done.stdout.split())  # titles are wrapped to the width of their table
    for words in how.said:
        assert words in printed
    table = done.rows(f"{verb}_summary")
    for metric in how.printed:
        values = table.loc[table["metric"] == metric, "value"].dropna()
        assert len(values)
        for value in values:
            assert short(value).replace("-.00", ".00") in done.stdout.replace("-.00", ".00"), (metric, value)
    errors = "".join(done.stderr.split())
    for path in done.folder.glob("*.p*"):
        assert str(path) in errors
        assert path.name not in done.stdout


def test_flow_prints_every_layer_in_thousandths(ran):
    table = ran("flow").rows("flow_summary").set_index(["layer", "metric"])
    lines = [line.split() for line in ran("flow").stdout.splitlines()]
    for layer in range(3):
        line = next(own for own in lines if own and own[0] == str(layer))
        shares = [f"{100 * table.loc[(layer, name), 'share']:.0f}" for name in ("s_wp", "s_pq", "s_ww")]
        if layer == 2:  # of the last layer nothing but the target's row reaches the answer
            assert table.loc[(layer, "s_wp"), "note"] == " ".join(line[1:4]) == "not defined here"
            shares[0] = "–"
        else:
            assert float(line[1]) == pytest.approx(
                1e3 * table.loc[(layer, "s_wp"), "mean"], rel=0.05, abs=1e-9
            )
        assert line[-3:] == shares


def test_compress_prints_a_bound_that_is_one(ran):
    row, cached = ran("compress").rows("compress_speed").to_dict(orient="records")
    assert (row["condition"], cached["condition"]) == ("hidden_anchor", "whole_cached")
    printed = " ".join(ran("compress").stdout.split())
    assert row["bound"] > row["limit"]
    assert f"at most (L_demo + L_x) / L_x = ({row['demonstration_tokens']:.0f} + " in printed
    assert f"= {row['bound']:.2f} no bound, since anchors are attended to and not run" in printed
    assert printed.count(f"= {row['limit']:.2f}") == 1


@pytest.mark.parametrize("verb", ["classify", "isolate", "reweight", "compress"])
def test_chance_and_majority_are_printed_beside_an_accuracy(verb, ran):
    table = ran(verb).rows(f"{verb}_summary").query("metric == 'accuracy'")
    rows = ran(verb).rows(verb).query("metric == 'gold' and condition == 'none'")
    most = rows["value"].value_counts(normalize=True).max()
    assert set(table["chance"]) == {0.5}
    assert table["majority"].tolist() == pytest.approx([most] * len(table))
    said = f"accuracy by chance .50, of always naming the most frequent class {short(most)}"
    assert said in " ".join(ran(verb).stdout.split())


def test_flow_says_what_the_policy_leaves_out(tiny, tmp_path):
    """Abbreviation has several tokens; the counted one is the first."""
    result = invoke("flow", *tiny, "-n", 2, "-t", "trec", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    table = pd.read_parquet(tmp_path / "flow_summary.parquet").set_index(["layer", "metric"])
    rest, counted = table.xs("s_pq_rest", level=1), table.xs("s_pq", level=1)
    assert (rest["mean"] > 0).all()
    assert rest["share"].tolist() == pytest.approx((rest["mean"] / (rest["mean"] + counted["mean"])).tolist())
    lines = [line.split() for line in result.stdout.rpartition("─")[2].splitlines()]
    for layer in range(3):
        line = next(own for own in lines if own and own[0] == str(layer))
        assert line[-1] == f"{100 * rest.loc[layer, 'share']:.0f}"
    assert "left out: how much of the flow" in " ".join(result.stdout.split())
    page = (tmp_path / "flow_trec.html").read_text()
    found = json.loads(page.split('id="payload">')[1].split("</script>")[0])
    prompt = found["prompts"][0]
    assert len(prompt["s_pq_rest"]) == 3
    assert prompt["roles"].count("label") > 6 == sum(c is not None for c in prompt["classes"])
    assert found["curves"]["s_pq_rest"]["mean"] == pytest.approx(rest["share"].tolist())
    assert found["curves"]["s_wp"]["mean"][-1] is None


def test_a_second_model_or_fewer_prompts_replace_nothing(ran, tiny, tokenizer, tmp_path):
    folder = ran("classify").folder
    model = make("gpt2", len(tokenizer))
    model.transformer.h[0].mlp.c_fc.weight.data *= 1.5
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    other = ["--model", tmp_path / "other", "--device", "cpu"]
    tried = {"fewer": (*tiny, "-n", 4, "--calibrate"), "other": (*other, "-n", 8, "--calibrate")}
    for name, arguments in tried.items():
        out = copytree(folder, tmp_path / f"out-{name}")
        result = invoke("classify", *arguments, "-o", out)
        assert result.exit_code == 0, result.output
        assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
        (own,) = (p for p in out.iterdir() if p.is_dir() and p.name != "runs")
        assert {p.name for p in own.iterdir()} == set(before)
        assert f"beside them in {str(own)!r}".replace(" ", "") in "".join(result.stderr.split())
    out = copytree(folder, tmp_path / "larger")
    assert invoke("classify", *tiny, "-n", 9, "--calibrate", "-o", out).exit_code == 0
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"runs"}
    assert pd.read_parquet(out / "classify.parquet")["number"].max() == 8


def test_classify_prints_the_confusion_matrix(ran):
    rows = ran("classify").rows("classify")
    each = rows[(rows["condition"] == "none") & (rows["number"] >= 0)].pivot_table(
        index="number", columns="metric", values="value"
    )
    printed = ran("classify").stdout.split("\nconfusion")[1].splitlines()
    for gold, label in enumerate(("Negative", "Positive")):
        line = next(
            own for own in printed if own.split()[:1] == [label] and " ".join(own.split()[1:2]).isdigit()
        )
        counts = [((each["gold"] == gold) & (each["predicted"] == other)).sum() for other in (0, 1)]
        assert [int(word) for word in line.split()[1:3]] == counts


def test_readout_says_when_there_is_no_auc(tiny, tmp_path):
    """A single prompt has a single prediction."""
    result = invoke("readout", *tiny, "-n", 1, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert "sst2: the model predicts one label only: there is no AUC." in result.stderr
    assert pd.read_parquet(tmp_path / "readout_summary.parquet")["value"].isna().all()


@pytest.mark.parametrize("verb", VERBS)
def test_a_second_run_computes_nothing_and_json_holds_the_tables(verb, ran, tiny, monkeypatch):
    monkeypatch.setattr("anchors.figures.draw", lambda *_: None)  # takes most of the time
    done, how = ran(verb), VERBS[verb]
    before, tables = stamps(done.folder), {name: done.rows(f"{verb}_{name}") for name in how.tables}
    assert len(before) > 1
    result = invoke(verb, *tiny, *how.options, "-o", done.folder, "--json")
    assert result.exit_code == 0, result.output
    assert stamps(done.folder) == before
    found = strict(result.stdout)
    for name, table in tables.items():
        assert len(table)
        assert found[name] == plain(table)
    assert found["parts"][0]["kind"] == verb
    assert {Path(f).name for f in found["files"]} >= {f"{verb}.parquet", f"{verb}_summary.parquet"}
    assert all(Path(f).is_file() for f in found["files"])


UNCHANGED = r"probability/.*|predicted|gold|accuracy|loss"
"""Without an edit, these depend on the prompt alone, not on which positions are looked at."""


@pytest.mark.parametrize("control", ["permuted-labels", "random-positions"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_control_changes_what_it_must(verb, control, ran, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("anchors.figures.draw", lambda *_: None)
    extra = {"compress": ["--no-speed"], "causal": ["--no-flow"]}.get(verb, [])
    result = invoke(verb, *tiny, *VERBS[verb].options, *extra, "-o", tmp_path, "--control", control, "--json")
    if (verb, control) == ("causal", "random-positions"):
        assert result.exit_code == 2
        assert "random-positions does not apply" in result.stderr
        assert not list(tmp_path.rglob("*.p*"))
        return
    assert result.exit_code == 0, result.output
    assert strict(result.stdout)["parts"][0]["control"] == control
    changed = pd.read_parquet(tmp_path / f"{verb}.parquet")
    assert set(changed["control"]) == {control}
    keys = ["seed", "number", "condition", "layer", "metric"]
    both = ran(verb).rows(verb).merge(changed, on=keys, how="outer", suffixes=("", "_controlled"))
    outcome = both["metric"].str.fullmatch(UNCHANGED) & (both["condition"] == "none") & (both["number"] >= 0)
    gap = (both["value"] - both["value_controlled"]).abs()
    assert outcome.any()
    if control == "permuted-labels":
        assert gap[outcome & both["metric"].str.startswith("probability/")].max() > 1e-3
    else:
        assert gap[outcome].max() < 1e-5
        assert (gap[~outcome].max() > 1e-3) == (
            verb != "classify"
        )  # which looks at no position but the target


BAD = {
    "layers that are no numbers": ("isolate", ["--layers", "x"], "--layers 'x'"),
    "no layers": ("isolate", ["--layers", ""], "--layers ''"),
    "more layers than there are": ("isolate", ["--layers", "1,4"], "4 layers"),
    "the default of 5 layers is more than there are": ("isolate", [], "5 layers"),
    "unknown sides": ("isolate", ["--layers", 1, "--sides", "middle"], "sides"),
    "no sides": ("isolate", ["--layers", 1, "--sides", ","], "sides"),
    "unknown positions": ("isolate", ["--layers", 1, "--positions", "nowhere"], "positions"),
    "no positions": ("isolate", ["--layers", 1, "--positions", ","], "positions"),
    "a layer shown that is not there": ("flow", ["--layers", "3"], "--layers '3'"),
    "layers from high to low": ("flow", ["--layers", "2-1"], "--layers '2-1'"),
    "unknown methods": ("compress", ["--methods", "magic"], "methods"),
    "no methods": ("compress", ["--methods", ","], "methods"),
    "unknown rule": ("compress", ["--positions", "nowhere"], "positions"),
    "no draws": ("compress", ["--draws", 0], "--draws"),
    "components that are no numbers": ("diagnose", ["--components", "x"], "--components 'x'"),
    "more components than queries": ("diagnose", ["--components", "9", "-n", 8], "9 components"),
    "keys of a layer that is not there": ("diagnose", ["--layer", 3], "layer 3"),
    "unknown patched positions": ("causal", ["--positions", "nowhere"], "positions"),
    "patching every 0th layer": ("causal", ["--stride", 0], "--stride"),
    "unknown control": ("classify", ["--control", "placebo"], "--control 'placebo'"),
    "no batch": ("readout", ["--batch-size", 0], "--batch-size '0'"),
    "the same seed twice": ("readout", ["--seeds", "1,1"], "--seeds names 1 twice"),
    "no examples": ("classify", ["-n", 0], "--examples"),
    "more shots than training examples": ("classify", ["--shots", 30], "shots"),
    "more training examples than there are": ("reweight", ["--per-class", 5000], "per class"),
    "no learning rate": ("reweight", ["--lr", 0], "--lr"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_refused_by_name_and_nothing_is_written(case, tiny, tmp_path):
    verb, options, named = BAD[case]
    result = invoke(verb, *tiny, "-n", 2, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert named.lower() in " ".join(result.stderr.split()).lower()
    assert not result.stdout
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "config.json"]


def test_beta_is_kept_with_its_provenance_and_used_again(ran, tiny, tmp_path):
    folder = copytree(ran("reweight").folder, tmp_path / "out")
    (path,) = (folder / "runs").glob("reweight-*/beta-42.safetensors")
    assert str(path.relative_to(folder)) in "".join(ran("reweight").stderr.split())
    with safe_open(path, "pt") as file:
        header, beta = file.metadata(), file.get_tensor("beta")
    assert beta.shape == (3, 4, 2)
    assert beta.abs().max() > 0
    assert sorted(json.loads(header["classes"])) == [0, 1]
    assert len(json.loads(header["losses"])) == 2
    facts = json.loads(header["label-anchors"])
    assert (facts["seed"], facts["shots"], facts["examples"], facts["precision"]) == (42, 1, 4, "float32")
    assert facts["task"]["labels"] == ["Negative", "Positive"]
    assert facts["fingerprint"] == json.loads((folder / "reweight.json").read_text())["fingerprint"]
    assert facts["versions"]["torch"]
    assert facts["written"]

    table = ran("reweight").rows("reweight_beta").set_index(["layer", "head", "label"])["value"]
    for column, label in enumerate(json.loads(header["classes"])):
        word = ("Negative", "Positive")[label]
        assert table[2, 1, word] == pytest.approx(float(beta[2, 1, column]))
    before = path.stat()
    assert invoke("reweight", *tiny, "-n", 5, "--epochs", 2, "--per-class", 2, "-o", folder).exit_code == 0
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    rows = pd.read_parquet(folder / "reweight.parquet")
    assert rows["number"].max() == 4


@pytest.mark.parametrize(("first", "second"), [("classify", "isolate"), ("flow", "causal")])
def test_two_verbs_in_one_folder_do_not_disturb_each_other(first, second, ran, tiny, tmp_path):
    folder = copytree(ran(first).folder, tmp_path / "out")
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert invoke(second, *tiny, *VERBS[second].options, "-o", folder).exit_code == 0
    pd.testing.assert_frame_equal(pd.read_parquet(folder / f"{second}.parquet"), ran(second).rows(second))
    touched = [str(name) for name, content in before.items() if (folder / name).read_bytes() != content]
    assert not touched


def test_until_width_goes_on_until_it_is_narrow(tiny, tmp_path):
    """The number of examples that is said is the first of its steps that is narrow enough; going on computes only what is left."""

    def widest(folder):
        table = pd.read_parquet(folder / "flow_summary.parquet")
        own = table[table["metric"] == "s_pq"]
        return (own["share_high"] - own["share_low"]).max(), own["examples"].iloc[0]

    few = invoke("flow", *tiny, "-n", 4, "-o", tmp_path / "few")
    assert few.exit_code == 0, few.output
    width = 0.7 * widest(tmp_path / "few")[0]
    out = tmp_path / "narrow"
    result = invoke("flow", *tiny, "-n", 4, "--until-width", width, "--pages", 0, "-o", out)
    assert result.exit_code == 0, result.output
    found, examples = widest(out)
    assert found <= width
    assert 4 < examples <= 200
    said = " ".join(result.stderr.split())
    assert f"{examples} examples per seed were enough for --until-width {width:g}" in said
    assert any("were enough" in note for note in json.loads((out / "flow.json").read_text())["notes"])
    assert len(list((out / "runs").iterdir())) == 1
    before = stamps(out)
    assert invoke("flow", *tiny, "-n", 4, "--until-width", width, "--pages", 0, "-o", out).exit_code == 0
    assert stamps(out) == before


def test_until_width_ends_with_the_test_set(tiny, tmp_path):
    for part in ("train", "test"):
        texts = [{"text": f"{part} word{i} again", "label": i % 2} for i in range(12)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    own = ["--data", tmp_path, "-o", tmp_path / "out", "-n", 3]
    plan = invoke("classify", *tiny, *own, "--until-width", 0.001, "--dry-run", "--json")
    assert json.loads(plan.stdout)["classify"][0]["prompts"] == 3
    said = " ".join(plan.stderr.split())
    assert "--until-width 0.001 begins with 3 examples per seed" in said
    assert "no interval of accuracy is wider, with 12, the whole test set, at the latest: 4 times" in said
    result = invoke("classify", *tiny, *own, "--until-width", 0.001)
    assert result.exit_code == 0, result.output
    assert "--until-width 0.001 is not reached" in " ".join(result.stderr.split())
    assert pd.read_parquet(tmp_path / "out" / "classify.parquet")["number"].max() == 11
    refused = invoke("classify", *tiny, *own, "--until-width", 0)
    assert refused.exit_code == 2
