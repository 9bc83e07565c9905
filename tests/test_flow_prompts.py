"""`anchors flow --prompts`: files of prompts, their rows against transformers' own eager attention, and what is refused."""

import copy
import json

import matplotlib as mpl
import pandas as pd
import pytest
import torch
from families import make
from test_aims import TEXT, page_of, witness
from typer.testing import CliRunner

from anchors.analyses.targets import TargetFlow
from anchors.cli import app
from anchors.errors import AnchorsError
from anchors.leavings import tables_in
from anchors.model.language import load
from anchors.model.source import Source
from anchors.study.report import conclude
from anchors.study.results import Run
from anchors.study.texts import _lots_of
from anchors.tasks.files import named

SHORT = "the best of the year is"
COLUMNS = ("prompt", "target", "against")


def run(*words: object):
    return CliRunner().invoke(app, ["flow", *map(str, words), "--device", "cpu"], env={"COLUMNS": "160"})


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(mpl.rcParams, "savefig.dpi", 30)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "asked.jsonl"
    rows = [
        {"prompt": TEXT},
        {"prompt": SHORT, "target": "the", "against": "and", "id": 7},
        {"prompt": SHORT},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_and_tables_are_what_materialised_attention_says(tokenizer, file, tmp_path):
    """S_tq, S_ww, shares and entropy by loops over the untouched model's own matrices, batched prompts of two lengths."""
    own = make("llama", len(tokenizer))
    lm = load(copy.deepcopy(own), tokenizer=tokenizer, device="cpu")
    inquiry = TargetFlow(prompts=file, target="in").on(lm)
    found = conclude(inquiry, out=tmp_path / "out", pages=2)
    by = found.tables["sources"].set_index(["number", "layer", "position"])
    rows = pd.read_parquet(tmp_path / "out" / "flow_prompts.parquet")
    value = rows.set_index(["number", "metric", "layer"])["value"]
    vocabulary = tokenizer.get_vocab()
    aims = [("Ġin", None), ("Ġthe", "Ġand"), ("Ġin", None)]
    for number, (text, (target, against)) in enumerate(zip((TEXT, SHORT, SHORT), aims, strict=True)):
        ids = tokenizer(text)["input_ids"]
        token, other = vocabulary[target], None if against is None else vocabulary[against]
        maps = witness(
            own,
            ids,
            lambda z, t=token, o=other: -z.log_softmax(-1)[t] if o is None else z[t] - z[o],
        ).double()
        q = len(ids) - 1
        told = found.tables["prompts"].set_index("number").loc[number]
        assert (told["target_id"], told["tokens"]) == (token, len(ids))
        assert told["against_id"] == other if other is not None else pd.isna(told["against_id"])
        with torch.no_grad():
            logits = own(torch.tensor([ids])).logits[0, -1]
        assert told["predicted_id"] == int(logits.argmax())
        assert told["probability"] == pytest.approx(float(logits.softmax(-1)[token]), rel=1e-3)
        for layer in range(lm.n_layers):
            row = maps[layer, q, :q]
            share = row / row.sum()
            rest = [float(maps[layer, i, j]) for i in range(q) for j in range(i)]
            right = {
                "s_tq": float(row.mean()),
                "s_ww": sum(rest) / len(rest),
                "first_token": float(share[0]),
                "entropy": float(-(share * share.log()).nansum()),
            }
            for metric, expected in right.items():
                assert value[number, metric, layer] == pytest.approx(expected, rel=1e-3, abs=1e-9)
            best = by.loc[(number, layer)]
            order = row.argsort(descending=True)[: len(best)].tolist()
            assert list(best.index) == order
            assert len(best) == min(10, q)
            assert best["share"].tolist() == pytest.approx(share[order].tolist(), rel=1e-3)
            assert best["token"].tolist() == [tokenizer.decode([ids[j]]) for j in order]
    summary = found.tables["summary"].set_index(["metric", "layer"])["value"]
    assert summary["s_tq", 1] == pytest.approx(float(value[:, "s_tq", 1].mean()))
    (said,) = found.sentences
    most = max(range(lm.n_layers), key=lambda layer: summary["s_tq", layer])
    assert f"most flows into the target in layer {most} " in said
    shown = page_of(tmp_path / "out" / "flow_prompts.html")["prompts"]
    assert [one["name"] for one in shown] == ["Line 1", "Line 2"]


def test_alone_batched_and_in_another_process_alike(model_directory, file, tmp_path):
    lm = load(str(model_directory), device="cpu")
    study = TargetFlow(prompts=file, target="top")
    found = [
        study.on(lm, batch_size=size).measure(tmp_path / str(size), lambda *_: None).rows["flow_prompts"]
        for size in (1, 3)
    ]
    kept = [rows[rows["metric"] != "identity_error"] for rows in found]  # which is of a batch
    pd.testing.assert_frame_equal(*kept, rtol=1e-4, atol=1e-7)
    inquiry = study.on(lm, batch_size=3)
    stretch = inquiry.stretch()
    elsewhere = Run.open(tmp_path / "there", "flow_prompts", stretch.config, stretch.identity)
    (lot,) = _lots_of(Source(str(model_directory), "cpu", "float32"), study, inquiry.texts, elsewhere, "cpu")
    ours = inquiry.lot().measure(None, stretch.units)
    pd.testing.assert_frame_equal(lot.measure(None, stretch.units), ours)


def test_the_verb_measures_takes_up_again_and_draws_again(model_directory, file, tmp_path):
    out = tmp_path / "out" / "flow-prompts"
    command = ("--prompts", file, "--target", "in", "-m", model_directory, "-o", out)
    done = run(*command, "--pages", 1)
    assert done.exit_code == 0, done.output
    printed = " ".join(done.output.split())
    for said in (
        "Flow into the target: asked",
        "' the' against ' and'",
        "Line 1: The flow is that of −log p of ' in' (#",
        "Line 2: The flow is that of the log-odds of ' the' (#",
        "And not that it is needed".lower(),
    ):
        assert said in printed, said
    plan = json.loads(run(*command, "--dry-run", "--json").stdout)["flow_prompts"]
    assert [(part["prompts"], part["left"]) for part in plan] == [(3, 0)]
    other = json.loads(run(*command, "--target", "the", "--dry-run", "--json").stdout)["flow_prompts"]
    assert other[0]["left"] == 3
    assert other[0]["seconds"] > 0
    told = json.loads((out / "flow_prompts.json").read_text())
    assert {"notes", "versions", "parts", "arithmetic_error"} <= set(told)
    assert set(pd.read_parquet(out / "flow_prompts_prompts.parquet")["target"]) == {" in", " the"}
    assert not [*tables_in(out)]  # none of a study without rows
    picture = out / "flow_prompts.png"
    before = picture.read_bytes()
    picture.unlink()
    again = CliRunner().invoke(app, ["figures", "flow-prompts", "-o", str(tmp_path / "out")])
    assert again.exit_code == 0, again.output
    assert picture.read_bytes() == before


def test_what_flow_does_not_take_for_prompts_is_refused(model_directory, file, tmp_path):
    model = ("-m", model_directory, "-o", tmp_path / "out")
    for more, said in (
        (("--task", "sst2"), "--task is not for `anchors flow --prompts FILE`"),
        (("--shots", 2), "--shots is not for"),
        (("--until-width", 0.1), "--until-width is not for"),
    ):
        done = run("--prompts", file, "--target", "in", *more, *model)
        assert done.exit_code == 2
        assert said in " ".join(done.output.split())
    done = run("--target", "in", *model)
    assert "Add --prompts FILE" in " ".join(done.output.split())
    done = run("--prompts", file, *model)
    assert "Line 1 of asked.jsonl has no target" in " ".join(done.output.split())
    done = run("--prompts", file, "--target", "unheard-of", *model)
    assert "[target] Line 1: The target ' unheard-of' is" in " ".join(done.output.split())
    assert not (tmp_path / "out" / "flow_prompts.parquet").exists()


def test_prompts_that_are_too_long_are_refused_or_left_out(gpt2, tmp_path):
    (tmp_path / "p.txt").write_text(f"{SHORT}\n\n{'a film ' * 400}\n{SHORT} a\n")
    study = TargetFlow(prompts=tmp_path / "p.txt", target="the")
    with pytest.raises(AnchorsError, match=r"Line 3: 1 of 1 prompts are longer .* has \d+ tokens") as caught:
        study.on(gpt2).measure(tmp_path / "out", lambda *_: None)
    assert caught.value.code == "length"
    assert "--skip-too-long" in caught.value.remedy
    found = study.on(gpt2, skip_too_long=True).measure(tmp_path / "out", lambda *_: None)
    assert sorted(found.rows["flow_prompts"]["number"].unique()) == [0, 2]
    assert "1 prompts longer than the context were left out." in found.notes


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.txt", "one two\r\n\r\n three \n", [("Line 1", {"prompt": "one two"}), ("Line 3", {"prompt": " three "})]),
        ("a.csv", "target,prompt,id\n Paris,\"it, is\",1\n,\"a\nb\",2\n",
         [("Line 2", {"prompt": "it, is", "target": " Paris"}), ("Line 3", {"prompt": "a\nb"})]),
        ("a.tsv", "prompt\tagainst\nit, is\tno\n", [("Line 2", {"prompt": "it, is", "against": "no"})]),
        ("a.csv", "prompt;target\nit, is;no\n", [("Line 2", {"prompt": "it, is", "target": "no"})]),
        ("a.jsonl", '{"prompt": "a", "target": null, "n": 3}\n\n{"prompt": "b", "target": "c"}',
         [("Line 1", {"prompt": "a"}), ("Line 3", {"prompt": "b", "target": "c"})]),
    ],
)  # fmt: skip
def test_files_of_prompts(tmp_path, name, content, rows):
    (tmp_path / name).write_bytes(content.encode())
    assert named(tmp_path / name, COLUMNS) == rows


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "\n \n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "text\na\n", "Line 2 of a.csv has no 'prompt'"),
        ("a.csv", "prompt,target\na\n", "Line 2 of a.csv has 1 field, but the header has 2"),
        ("a.csv", "prompt,prompt\na,b\n", "several columns"),
        ("a.csv", "prompt,target,Against\na,b,c\n", "a column 'Against', which is not read"),
        (
            "a.jsonl",
            '{"prompt": "a", "target": "b", "agianst": "c"}',
            "a column 'agianst', which is not read",
        ),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": 3}',
            "Line 2 of a.jsonl cannot be read: 'prompt' is a number: 3",
        ),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "stands twice"),
        ("a.jsonl", '["a"]', "it is a list"),
        ("a.jsonl", "no json", "Line 1 of a.jsonl cannot be read"),
        ("a.parquet", "", "'.parquet' are not read as prompts"),
        ("a.txt", "\udcff", "is not UTF-8"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(AnchorsError, match=said) as caught:
        named(tmp_path / name, COLUMNS)
    assert caught.value.code in ("data-file", "data-row")
