"""The NSA probe over many prompts: resuming, tables, tests of significance, figures, page and verb."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from nsa_probing import EPISODES, SMALL, WORDS, calls, folder, found, lm, measured, prompt, same, tables  # noqa: F401 - fixtures
from typer.testing import CliRunner

from anchors.cli import nsa as nsa_cli
from anchors.errors import AnchorsError
from anchors.figures import draw
from anchors.model.language import load
from anchors.nsa import attention as nsa_attention_module
from anchors.nsa.attention import BRANCHES
from anchors.nsa.probing import metrics
from anchors.nsa.probing import probe as probing
from anchors.nsa.probing.identity import identity_table
from anchors.nsa.probing.probe import EpisodeProbe, geometry_of, measure, vocabulary_of
from anchors.nsa.probing.report import blocks_payload, episodes_of
from anchors.nsa.probing.tables import choices, null_rates
from anchors.nsa.probing.taps import Places
from anchors.summaries import SUMMARIES
from anchors.viewer import render_page

runner = CliRunner()


def test_a_probe_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    model = load(folder, device="cpu")
    small = EpisodeProbe(EPISODES, prompts=1, interventions=False)
    seen = []
    first = measure(model, small, out=tmp_path, progress=lambda *x: seen.append(x))
    assert seen == [(0, 1), (1, 1)]
    ran, true = [], probing.probe_prompt
    monkeypatch.setattr(probing, "probe_prompt", lambda *a, **k: ran.append(a[1]) or true(*a, **k))
    again = measure(model, small, out=tmp_path)
    assert not ran
    pd.testing.assert_frame_equal(first.rows, again.rows)
    more = measure(model, replace(small, prompts=2), out=tmp_path)
    assert [p.ids for p in ran] == [small.prompt(1).ids]
    pd.testing.assert_frame_equal(more.rows[more.rows["number"] == 0].reset_index(drop=True), first.rows)
    assert sorted(more.vectors["number"].unique()) == [0, 1]


def test_a_report_from_python_certifies_measures_and_writes(folder, tmp_path):
    from anchors.nsa.probing.report import Probing, report

    model, small = load(folder, device="cpu"), EpisodeProbe(EPISODES, prompts=1, interventions=False)
    done = report(model, small, out=tmp_path)
    assert {"nsa_probe.parquet", "nsa_probe.png"} <= {f.name for f in done.files}
    found = Probing(model, small).measure(tmp_path, lambda *_: None)
    assert "nsa_probe by" in repr(found)
    for name, table in found.tables().items():
        pd.testing.assert_frame_equal(table, done.tables[name])


def test_what_cannot_be_probed_is_refused(lm, gpt2, tmp_path):
    with pytest.raises(AnchorsError, match="everything is, whatever is in it"):
        measure(lm, EpisodeProbe(replace(EPISODES, tokens=64)), out=tmp_path)
    with pytest.raises(AnchorsError, match="everything is"):
        measure(lm, EpisodeProbe(EPISODES, demonstrations=3), out=tmp_path)
    with pytest.raises(AnchorsError, match="exceed the model's 256 positions"):
        measure(lm, EpisodeProbe(replace(EPISODES, tokens=400)), out=tmp_path)
    with pytest.raises(AnchorsError, match="not a model with Native Sparse Attention"):
        geometry_of(gpt2)
    with pytest.raises(AnchorsError, match="not one of the episodes"):
        vocabulary_of(gpt2)
    with pytest.raises(AnchorsError, match="prompts is 0"):
        EpisodeProbe(EPISODES, prompts=0)
    assert vocabulary_of(lm) == WORDS


def test_queries_can_be_known_and_come_from_the_held_out_stream():
    for number in range(6):
        prompt = EpisodeProbe(EPISODES, demonstrations=9).prompt(number)
        episode = EPISODES.episode(0, number, held_out=True)
        count = len(prompt.label_positions)
        assert count <= 9
        assert episode.knowable[count]
        assert prompt.ids == tuple(episode.ids[: len(prompt.ids)])


def chosen_rows(prompts: int, seed: int, planted: bool) -> pd.DataFrame:
    """Rows of a model that chooses 3 of 24 blocks, at random or those with label words first."""
    rng, table = np.random.default_rng(seed), []
    for number in range(prompts):
        weight = rng.integers(0, 4, 24) // 3
        weight[rng.integers(24)] = 1

        def add(metric, value, condition="none", group=None, place=None, number=number):
            table.append(
                (
                    0,
                    number,
                    condition,
                    0 if group is not None else None,
                    group,
                    None,
                    place,
                    metric,
                    float(value),
                )
            )

        add("chance", 3 / 24)
        for j, w in enumerate(weight):
            add("label_words", w, "label", place=j + 1)
            add("label_words", w, "answer", place=j + 1)
        for group in range(2):
            add("recall", 1, group=group)
            score = rng.random(24) + (2 * weight if planted and group == 0 else 0)
            for j in np.argsort(-score)[:3]:
                add("chosen", 1, group=group, place=j + 1)
    frame = pd.DataFrame(table, columns=probing.COLUMNS)
    return frame.astype(dict.fromkeys(("layer", "group", "head", "place"), "Int32"))


def test_planted_anchors_are_found_and_only_those():
    table = SUMMARIES["nsa_probe"](chosen_rows(30, 1, planted=True))["selection"]
    table = table[table["which"] == "label"].set_index("group")
    assert table.loc[0, "q"] < 0.01
    assert table.loc[0, "lift_low"] > 2
    assert table.loc[0, "excess_low"] > 0
    assert table.loc[1, "p"] > 0.02
    assert table.loc[1, "asr_low"] < table.loc[1, "chance"] < table.loc[1, "asr_high"]


def test_the_null_is_rejected_as_often_as_it_may_be():
    p = []
    for seed in range(60):
        rows = chosen_rows(8, seed, planted=False)
        rows[["layer", "group", "place"]] = (
            rows[["layer", "group", "place"]].astype(float).fillna(-1).astype(int)
        )
        found = choices(rows, "label")
        rate = np.mean([metrics.selection_rate(c, w, v) for c, w, v in zip(*found, strict=True)], axis=0)
        null = null_rates(found, 200)
        p.append(((null >= rate - 1e-12).sum(0) + 1).ravel() / 201)
    p = np.concatenate(p)
    assert (p < 0.05).mean() <= 0.12
    assert 0.4 < p.mean() < 0.6


def test_a_model_that_chooses_the_right_class_is_found_out(folder, tmp_path, monkeypatch):
    model = load(folder, device="cpu")
    probe = EpisodeProbe(replace(EPISODES, classes=(3, 3)), prompts=5, interventions=False, vectors=0)
    wanted: list[np.ndarray] = []
    true = nsa_attention_module.reference.select

    def pushed(importance, **options):
        bias = torch.zeros(importance.shape[-1])
        bias[wanted[0][wanted[0] < len(bias)]] = 1e3
        return true(importance, **options | {"bias": bias})

    monkeypatch.setattr(nsa_attention_module.reference, "select", pushed)
    prompt_of = EpisodeProbe.prompt

    def noted(self, number):
        made = prompt_of(self, number)
        wanted[:] = [Places.of(made, np.random.default_rng(0)).answers // 16]
        return made

    monkeypatch.setattr(EpisodeProbe, "prompt", noted)
    table = SUMMARIES["nsa_probe"](measure(model, probe, out=tmp_path).rows)["selection"]
    answer = table[table["which"] == "answer"]
    assert (answer["lift"] > 1.3).all()
    assert (answer["q"] < 0.05).all()
    assert (answer["excess"] > 0).all()


def test_tables_hold_means_shares_and_paired_differences(measured, tables):
    rows = measured.rows
    wide = rows[rows["metric"] == "accuracy"].pivot_table(index="number", columns="condition", values="value")
    summary = tables["summary"].set_index(["condition", "metric"])
    for condition in wide.columns:
        own = wide[condition].dropna()
        same(summary.loc[(condition, "accuracy"), "value"], own.mean())
        if condition != "none":
            gap = own.mean() - wide.loc[own.index, "none"].mean()
            same(summary.loc[(condition, "accuracy"), "difference"], gap)
    both = wide[["cut-cmp-label", "cut-cmp-control"]].dropna()
    same(summary.loc[("cut-cmp-label", "accuracy"), "beyond"], (both.iloc[:, 0] - both.iloc[:, 1]).mean())
    branches = tables["branches"].set_index(["layer", "pair", "branch"])
    mean = rows[(rows["metric"] == "s_pq") & (rows["layer"] == 0)].groupby("condition")["value"].mean()
    parts = sum(mean[b] for b in BRANCHES)
    for b in BRANCHES:
        same(branches.loc[(0, "pq", b), "share"], mean[b] / parts)
    same(branches.loc[(0, "pq", "all"), "cancellation"], 1 - mean["all"] / parts)
    selection = tables["selection"]
    assert ((selection["p"] > 0) & (selection["q"] >= selection["p"] - 1e-12)).all()
    assert {"stages", "gates", "gate_saliency", "measures"} <= set(tables)
    gates = tables["gates"]
    assert len(gates) == 2 * 4 * 3
    assert (gates["label_effect_p"] > 0).all()
    stages = tables["stages"]
    assert set(stages["measure"]) <= {"mass", "rate"}
    assert ((stages["gap"] - (stages["pq"] - stages["wp"])).abs() < 1e-12).all()


def test_asr_in_the_table_is_the_mean_over_prompts(measured, tables):
    rows = measured.rows
    rates = []
    for _, own in rows.groupby("number"):
        held = own[(own["metric"] == "label_words") & (own["condition"] == "answer")]
        read = set(own[(own["metric"] == "chosen") & (own["layer"] == 1) & (own["group"] == 0)]["place"])
        total = held["value"].sum()
        if total:
            rates.append(held[held["place"].isin(read)]["value"].sum() / total)
    table = tables["selection"].set_index(["which", "layer", "group"])
    same(table.loc[("answer", 1, 0), "asr"], np.mean(rates))
    assert table.loc[("answer", 1, 0), "prompts"] == len(rates)


def test_identity_is_read_where_it_is_and_not_where_it_is_not():
    rng, table = np.random.default_rng(0), []
    centres = rng.normal(size=(4, 6))
    for number in range(12):
        for token in rng.integers(0, 4, 30):
            table.append((number, token, 0, "raw", centres[token] + 0.1 * rng.normal(size=6)))
            table.append((number, token, 0, "compressed", rng.normal(size=6)))
    vectors = pd.DataFrame(table, columns=["number", "token", "layer", "kind", "vector"])
    found = identity_table(vectors).set_index("kind")
    assert found.loc["raw", "accuracy"] > 0.95
    assert found.loc["raw", "low"] > found.loc["raw", "shuffled"] + 0.3
    assert abs(found.loc["compressed", "accuracy"] - 0.25) < 0.15
    assert identity_table(vectors[vectors["number"] == 0]).empty


# ---- what is written ----


@pytest.mark.parametrize("hidden", [False, True])
def test_figures_draw_what_is_there(tables, hidden):
    if hidden:
        tables = {name: table for name, table in tables.items() if name in ("branches", "summary")}
        tables["branches"] = tables["branches"].query("branch == 'all'").drop(columns="share")
    figure = draw("nsa_probe", tables, "a_model $x$")
    figure.draw_without_rendering()
    panels = [axes for part in figure.subfigs for axes in part.axes]
    assert len(panels) == (4 if hidden else 9)


def test_the_page_shows_the_blocks_that_q_reads(lm, prompt, calls):
    own = blocks_payload(lm, prompt, SMALL, [0, 1])
    q = prompt.target
    assert own["forced"] == [0, q // 16 - 1, q // 16]
    for layer in (0, 1):
        for group in range(2):
            assert own["chosen"][layer][group] == calls[layer].idx[0, q, group].tolist()
    assert json.loads(json.dumps(own)) == own


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", 9, "are 9 of 4 tokens, for 23 tokens"),
        ("size", 0, "are 6 of 0 tokens"),
        ("chosen", [[[0]]], "has 1 entries for 4 layers"),
        ("chosen", [[[6]]] * 4, "holds 6; there are 6"),
        ("forced", [-1], "holds -1"),
    ],
)
def test_blocks_that_do_not_fit_are_rejected(field, value, message):
    from test_viewer import payload

    data = payload()
    data["prompts"][0]["blocks"] = {"size": 4, "count": 6, "forced": [0, 5], "chosen": [[[0, 2, 5]]] * 4}
    render_page(data)
    data["prompts"][0]["blocks"][field] = value
    with pytest.raises(ValueError, match=rf"\['blocks'\] {message}"):
        render_page(data)


def test_episodes_are_those_of_the_training(folder, lm, tmp_path):
    assert episodes_of(lm, folder, tokens=170).tokens == 170
    assert episodes_of(lm, folder).tokens == 256
    (tmp_path / "training").mkdir()
    run = tmp_path / "training" / "run.json"
    run.write_text(json.dumps({"data": EPISODES.facts()}))
    assert episodes_of(lm, tmp_path) == EPISODES
    assert episodes_of(lm, tmp_path, classes=(2, 2)).classes == (2, 2)
    run.write_text(json.dumps({"data": {"data": "text"}}))
    with pytest.raises(AnchorsError, match="trained on text"):
        episodes_of(lm, tmp_path)


def test_the_verb_writes_everything_and_prints_json(folder, tmp_path):
    arguments = [
        "probe",
        folder,
        "-n",
        2,
        "--tokens",
        150,
        "--classes",
        "2-3",
        "--device",
        "cpu",
        "-o",
        tmp_path,
        "--no-interventions",
    ]
    (folder / "training").mkdir(exist_ok=True)
    (folder / "training" / "run.json").write_text(json.dumps({"data": EPISODES.facts()}))
    result = runner.invoke(
        nsa_cli.app, [str(a) for a in (*arguments, "--json", "--pages", 1)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert {"branches", "selection", "gates", "summary", "identity", "files", "notes", "versions"} <= set(
        data
    )
    names = {p.name for p in tmp_path.iterdir()}
    assert {
        "nsa_probe.parquet",
        "nsa_probe.json",
        "nsa_probe.png",
        "nsa_probe.html",
        "nsa_probe_selection.parquet",
    } <= names
    assert all(Path(f).is_file() for f in data["files"])
    page = (tmp_path / "nsa_probe.html").read_text()
    assert '"blocks":{"size":16' in page
    bad = runner.invoke(nsa_cli.app, ["probe", str(tmp_path / "none")])
    assert bad.exit_code == 2
