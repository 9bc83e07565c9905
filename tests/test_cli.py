"""The commands as a user types them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from families import make
from PIL import Image
from typer.testing import CliRunner

from anchors.cli import app
from anchors.errors import AnchorsError
from anchors.study import shelf
from anchors.study.registry import BUILT_IN
from anchors.study.results import Run, require_writable

runner = CliRunner()
ANCHORS = [sys.executable, "-c", "from anchors.cli import main; main()"]


@pytest.fixture
def tiny(model_directory: Path) -> list[str]:
    return ["--model", str(model_directory), "--device", "cpu"]


def invoke(*arguments: object):
    return runner.invoke(app, [str(a) for a in arguments], catch_exceptions=False)


VERBS = {name for name, study in BUILT_IN.items() if study.verb and not (study.group or study.within)} | {
    "run",
    "ls",
    "compare",
    "report",
    "figures",
    "view",
    "check",
    "nsa",
    "inject",
}


def test_help_answers_without_loading_torch():
    """Of every verb there is, in one fresh interpreter, since starting one takes most of the time."""
    code = """
import sys
from typer.main import get_command
from typer.testing import CliRunner
from anchors.cli import app

for verb in [[], *([name] for name in get_command(app).list_commands(None))]:
    result = CliRunner().invoke(app, [*verb, "--help"])
    assert result.exit_code == 0, (verb, result.output)
    assert " ".join(["Usage:", "root", *verb]) in " ".join(result.output.split()), (verb, result.output)
    loaded = {"torch", "transformers", "pandas", "matplotlib"} & set(sys.modules)
    assert not loaded, (verb, loaded)
    print(*verb)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == VERBS
    assert len(VERBS) == 17


def test_help_names_the_papers_models_and_their_memory():
    text = " ".join(invoke("flow", "--help").output.replace("│", " ").split())
    assert "gpt2-xl" in text
    assert "gpt-j-6b" in text
    assert "24 GB" in text


def test_flow_leaves_rows_figure_and_page(tiny, tmp_path):
    out = tmp_path / "out"
    result = invoke(
        "flow", *tiny, "-t", "sst2,trec", "-n", 4, "-o", out, "--csv", "--pages", 1, "--layers", "0,2"
    )
    assert result.exit_code == 0, result.output
    assert "Information flow" in result.stdout
    rows = pd.read_parquet(out / "flow.parquet")
    assert set(rows["task"]) == {"sst2", "trec"}
    per_example = rows[rows["metric"] == "s_pq"].groupby(["task", "number"]).size()
    assert (per_example == 3).all()
    assert len(per_example) == 8
    probabilities = (
        rows[rows["metric"].str.startswith("probability/")].groupby(["task", "number"])["value"].sum()
    )
    assert probabilities.sub(1).abs().max() < 1e-5
    assert len(pd.read_csv(out / "flow.csv")) == len(rows)
    facts = json.loads((out / "flow.json").read_text())
    assert [part["task"]["labels"][0] for part in facts["parts"]] == ["Negative", "Abbreviation"]
    assert [part["called"] for part in facts["parts"]] == [["sst2"], ["trec"]]
    for part in facts["parts"]:
        assert (part["kind"], part["shots"], part["control"]) == ("flow", 1, "none")
        assert (part["seeds"], part["examples"], part["data_source"]) == ([42], 4, "builtin")
    assert Image.open(out / "flow.png").size[0] > 500
    assert (out / "flow.pdf").read_bytes().startswith(b"%PDF")
    for task in ("sst2", "trec"):
        assert "application/json" in (out / f"flow_{task}.html").read_text()


def test_flow_json_is_json_and_nothing_else(tiny, tmp_path):
    result = invoke("flow", *tiny, "-n", 1, "-o", tmp_path, "--json", "--pages", 0)
    found = json.loads(result.stdout)
    assert {row["metric"] for row in found["summary"]} == {"s_wp", "s_pq", "s_ww", "s_pq_rest"}
    assert found["summary"][0]["low"] is None
    assert found["fingerprint"]


def test_own_task_without_writing_python(tiny, tmp_path):
    rows = pd.DataFrame({"text": [f"thing {i}" for i in range(30)], "label": ["Happy", "Sad", "Angry"] * 10})
    rows.to_csv(tmp_path / "my.csv", index=False)
    result = invoke(
        "flow", *tiny, "--data", tmp_path / "my.csv", "--template", r"Text: {text}\nMood:{label}",
        "--labels", "Happy,Sad,Angry", "-n", 3, "-o", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "flow_own.html").is_file()


BAD = {
    "unknown task": (["-t", "nothing"], "Unknown task 'nothing'"),
    "labels that collide": (["--template", "{text}:{label}", "--labels", "Positive,Positive mood", "--data", "{csv}"], "begin with the same token"),
    "template without label": (["--template", "{text}", "--labels", "a,b"], "{label} 0 times"),
    "file without the columns": (["--data", "{wrong}"], "lacks the column"),
    "label not in the list": (["--data", "{csv}", "--labels", "Good,Bad", "-t", "sst2"], "which is not one of"),
    "labels of no task": (["--data", "{csv}", "--labels", "Negative,Positive"], "--labels without --template makes no task"),
    "template of no task": (["--data", "{csv}", "--template", "{text}:{label}"], "--template without --labels makes no task"),
    "empty file": (["--data", "{empty}"], "is empty"),
    "missing directory": (["--data", "no/such/place"], "does not exist"),
    "missing model": (["--model", "./no-such-model"], "does not exist"),
    "corrupt GGUF": (["--model", "{gguf}"], "cannot be read"),
    "NaN weights": (["--model", "{nan}"], "not finite"),
    "bad layers": (["--layers", "7-9"], "layers 0 to 2"),
    "bad seeds": (["--seeds", "x"], "--seeds 'x' is not a list of numbers"),
    "too long": (["--shots", "20"], "longer than the model's context"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_ends_in_a_message_exit_code_2_and_nothing_written(case, tiny, tmp_path, model_directory):
    options, said = BAD[case]
    places = {name: tmp_path / file for name, file in (("csv", "a.csv"), ("wrong", "b.csv"), ("empty", "c.csv"), ("gguf", "d.gguf"), ("nan", "nan"))}  # fmt: skip
    rows = pd.DataFrame({"text": [f"t{i}" for i in range(30)], "label": ["Negative", "Positive"] * 15})
    if "collide" in case:
        rows["label"] = ["Positive", "Positive mood"] * 15
    rows.to_csv(places["csv"], index=False)
    rows.rename(columns={"text": "sentence"}).to_csv(places["wrong"], index=False)
    places["empty"].touch()
    places["gguf"].write_bytes(b"GGUF but not really")
    if case == "NaN weights":
        from shutil import copytree

        from safetensors.torch import load_file, save_file

        copytree(model_directory, places["nan"])
        weights = load_file(places["nan"] / "model.safetensors")
        weights["transformer.ln_f.weight"].fill_(float("nan"))
        save_file(weights, places["nan"] / "model.safetensors", metadata={"format": "pt"})
    for name, path in places.items():
        options = [str(path) if o == f"{{{name}}}" else o for o in options]
    if "--model" not in options:
        options = [*tiny, *options]
    out = tmp_path / "out"
    result = invoke("flow", *options, "-n", 2, "-o", out)
    assert result.exit_code == 2, result.output
    assert said.split()[0] in result.stderr
    assert " ".join(said.split()) in " ".join(result.stderr.split())
    assert not [p for p in out.rglob("*") if p.is_file() and p.name != "config.json"]


def test_an_out_that_cannot_be_written_is_found_before_any_work(tiny, tmp_path):
    (tmp_path / "file").touch()
    result = invoke("flow", *tiny, "-o", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "is no folder" in " ".join(result.stderr.split())
    assert ".writable" not in result.stderr


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no folder in which nobody can write")
def test_a_folder_that_cannot_be_written_is_named_itself():
    with pytest.raises(AnchorsError, match="cannot be written") as refused:
        require_writable(Path("/proc/x"))
    assert refused.value.message == "The folder '/proc/x' cannot be written: No such file or directory."
    assert refused.value.remedy == "Choose another --out."


def test_the_probe_of_a_folder_leaves_nothing(tmp_path):
    require_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_check_is_green(model_directory):
    result = invoke("check", model_directory, "--device", "cpu", "--json", "-t", "sst2")
    assert result.exit_code == 0, result.output
    findings = json.loads(result.stdout)
    names = [f["name"] for f in findings]
    assert {"the model by itself is causal", "logits are the model's own", "positions"} <= set(names)
    assert all(f["ok"] for f in findings), findings
    assert "✓" in invoke("check", model_directory, "--device", "cpu", "-t", "sst2").stdout


def test_check_says_what_fails(model_directory):
    result = invoke(
        "check", model_directory, "--device", "cpu", "--template", "{text}:{label}", "--labels", "Positive,Positive mood"
    )  # fmt: skip
    assert result.exit_code == 1
    assert "✗" in result.stdout
    assert "begin with the same token" in " ".join(result.stdout.replace("│", " ").split())


@pytest.mark.parametrize("options", [["--labels", "Negative,Positive"], ["--task", "sst2"]])
def test_view_from_standard_input(tiny, tmp_path, options):
    prompt = "Review: fine <b>fun</b>\nSentiment: Positive\nReview: dull\nSentiment: Negative\nReview: so so\nSentiment:"
    page = tmp_path / "page.html"
    result = runner.invoke(app, ["view", "-", *tiny, *options, "-o", str(page)], input=prompt)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert "<b>fun</b>" not in text
    data = json.loads(text.split('type="application/json"', 1)[1].split(">", 1)[1].split("</script>")[0])
    shown = data["prompts"][0]
    assert "".join(shown["tokens"]) == prompt
    assert [c for c in shown["classes"] if c is not None] == [1, 0]
    assert shown["gold"] is None
    assert "own prediction" in shown["notes"][0]


def test_view_writes_whole_maps(tiny, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "p.txt").write_text("Review: fun\nSentiment: Positive\nReview: dull\nSentiment:")
    result = invoke(
        "view", tmp_path / "p.txt", *tiny, "-t", "sst2", "-o", tmp_path / "x.html", "--layers", "0,2",
        "--maps", tmp_path / "maps.safetensors",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    maps = load_file(tmp_path / "maps.safetensors")
    assert set(maps) == {"layer_0", "layer_2"}
    assert maps["layer_0"].triu().abs().max() == 0 < maps["layer_0"].max()


def test_data_that_lie_among_the_results_are_not_moved_with_them(tiny, tmp_path):
    rows = [f"text {i},{('Negative', 'Positive')[i % 2]}\n" for i in range(40)]
    data = tmp_path / "flow_mine.csv"
    data.write_text("".join(["text,label\n", *rows]))
    asked = ["flow", *tiny, "-n", 2, "--pages", 0, "--csv", "-d", data, "-o"]
    result = invoke(*asked, tmp_path)
    assert result.exit_code == 2
    assert "which is read, lies among the results" in " ".join(result.stderr.split())
    assert data.read_text().startswith("text,label\ntext 0,Negative\n")
    assert [path.name for path in tmp_path.iterdir()] == [data.name]
    assert invoke(*asked, tmp_path / "other").exit_code == 0
    assert data.is_file()


def test_view_asks_the_witness_on_its_own_prompt(tiny, tmp_path, monkeypatch):
    """A model that is another one beyond a few tokens, as families are that change with length: no page of it."""
    from anchors.model.language import LanguageModel

    own = LanguageModel.logits
    monkeypatch.setattr(
        LanguageModel,
        "logits",
        lambda lm, ids, *more: own(lm, ids, *more) * (1.05 if ids.shape[1] > 9 else 1),
    )
    (tmp_path / "p.txt").write_text("Review: fun\nSentiment: Positive\nReview: dull\nSentiment:")
    result = invoke("view", tmp_path / "p.txt", *tiny, "-t", "sst2", "-o", tmp_path / "x.html")
    assert result.exit_code == 1
    assert "failed: logits are the model's own" in result.stderr
    assert not (tmp_path / "x.html").exists()


def test_view_says_which_label_words_the_target_cannot_see(tokenizer, tmp_path):
    model = make("mistral_window", len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = "Review: fun\nSentiment: Positive\nReview: " + "dull and long " * 9 + "\nSentiment:"
    (tmp_path / "p.txt").write_text(text)
    options = ["-m", tmp_path / "model", "--device", "cpu", "-t", "sst2", "-o", tmp_path / "x.html"]
    result = invoke("view", tmp_path / "p.txt", *options)
    assert result.exit_code == 0, result.output
    assert "1 of 1 label words" in " ".join(result.stderr.split())


def test_view_refuses_a_prompt_without_demonstrations(tiny, tmp_path):
    (tmp_path / "p.txt").write_text("Review: fine\nSentiment:")
    result = invoke("view", tmp_path / "p.txt", *tiny, "-t", "sst2", "-o", tmp_path / "x.html")
    assert result.exit_code == 2
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"good: Positive, fine:", "The prompt is one line, 'good: Positive, fine:'"),
        (b"\xff", "Line 1 of the prompt"),
        (None, "No such file or directory. Name a text file"),
    ],
    ids=["one line", "no text", "missing"],
)
def test_view_says_what_a_prompt_lacks(tiny, tmp_path, content, said):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    result = invoke(
        "view", tmp_path / "p.txt", *tiny, "--labels", "Negative,Positive", "-o", tmp_path / "x.html"
    )
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())


def test_view_takes_a_folder_as_other_verbs_do(tiny, tmp_path):
    (tmp_path / "p.txt").write_text("Review: fun\nSentiment: Positive\nReview: dull\nSentiment:")
    result = invoke(
        "view", tmp_path / "p.txt", *tiny, "-t", "sst2", "-o", tmp_path / "there", "--layers", "0"
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "there" / "view.html").is_file()


def test_view_foretells_what_a_page_costs(tiny, tmp_path):
    (tmp_path / "p.txt").write_text("Review: fun\nSentiment: Positive\nReview: dull\nSentiment:")
    result = invoke("view", tmp_path / "p.txt", *tiny, "-t", "sst2", "-o", tmp_path / "there", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "1 × " in result.stdout
    assert "saved" in result.stdout
    assert not list((tmp_path / "there").rglob("*"))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["view", "-"], "[prompt] The prompt must end with the template's"),
        (["flow", "--shots", "5000"], "[too-few] Fewer than 5000 training examples"),
        (["isolate", "--shots", "5000"], "[too-few] Fewer than 5000 training examples"),
    ],
)
def test_what_needs_no_model_is_said_before_one_is_looked_for(command, said):
    result = runner.invoke(app, [*command, "-m", "./no-such-model"], input="No label here.")
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_label_words_are_refused_before_weights_are_read(model_directory, tmp_path):
    folder = shutil.copytree(model_directory, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    options = ["-m", folder, "--template", "Review: {text}\\nSentiment:{label}", "--data", tmp_path / "d.csv"]
    rows = "".join(f"good film {n},{n % 2}\n" for n in range(40))
    (tmp_path / "d.csv").write_text("text,label\n" + rows)
    for labels, code in (("very good,very bad", "[label-words]"), ("good,bad", "[model-broken]")):
        result = invoke("flow", *options, "--labels", labels, "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert code in result.stderr


def test_what_was_asked_to_end_says_what_is_kept_and_goes_on(tiny, tmp_path, monkeypatch, caplog):
    """SIGTERM to this process in its third batch; then the rest, then nothing."""
    command = ["classify", *tiny, "-n", "6", "--batch-size", "1", "-o", tmp_path]
    append = Run.append

    def ending(self, rows, units):
        if len(self.done()) == 2:
            signal.raise_signal(signal.SIGTERM)
        append(self, rows, units)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "append", ending)
        result = invoke(*command)
    assert result.exit_code == 143
    said = " ".join(result.stderr.split())
    assert "interrupted: 2 of 6 are kept; the same command goes on from there." in said
    with monkeypatch.context() as patch:
        patch.setattr(shelf, "write_table", lambda *_: signal.raise_signal(signal.SIGTERM))
        result = invoke(*command)
    assert result.exit_code == 143
    assert "interrupted: all 6 are kept, tables and pictures may be of before" in " ".join(
        result.stderr.split()
    )
    assert "nothing left" not in caplog.text
    assert invoke(*command).exit_code == 0
    assert "classify: nothing left to compute, all 6 are kept" in caplog.text


def test_a_killed_run_goes_on_where_it_was(tiny, tmp_path):
    """SIGKILL while batches are being written; the same command ends with the rows of an undisturbed run."""
    command = ["flow", *tiny, "-n", "60", "--batch-size", "1", "--pages", "0"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*ANCHORS, *command, "-o", str(tmp_path / "killed")], env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )  # fmt: skip
    runs = tmp_path / "killed" / "runs"
    deadline = time.monotonic() + 120
    while len(list(runs.glob("*/batch-*.parquet"))) < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "flow.parquet").exists()
    for folder in ("killed", "whole"):
        assert invoke(*command, "-o", tmp_path / folder).exit_code == 0
    killed, whole = (pd.read_parquet(tmp_path / folder / "flow.parquet") for folder in ("killed", "whole"))
    pd.testing.assert_frame_equal(killed, whole)
    assert len(killed[killed["metric"] == "loss"]) == 60
