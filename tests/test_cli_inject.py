"""`anchors inject` as a user types it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from injection_families import ROWS, TOKENS, VLM_ROWS, Saved, saved
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from anchors.cli import inject

runner = CliRunner()


def invoke(*arguments: object):
    return runner.invoke(inject.app, [str(a) for a in arguments], catch_exceptions=False)


def three(family: str) -> list[str]:
    own = saved(family)
    return [str(own.vlm), str(own.expert), "--base", str(own.base)]


def flat(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def test_help_shows_the_merges_options_and_the_commands_without_loading_torch():
    code = """
import sys
import typer
from typer.testing import CliRunner
from anchors.cli.inject import app

commands = [name for name, command in typer.main.get_command(app).commands.items() if not command.hidden]
assert commands == ["sweep", "flow", "demo"], commands
for command in commands:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0, (command, result.output)
    assert f"{command} [OPTIONS]" in " ".join(result.output.split()), result.output
for arguments in (["--help"], ["-h"], [], ["VLM", "EXPERT", "--help"]):
    result = CliRunner().invoke(app, arguments)
    text = " ".join(result.output.replace("│", " ").split())
    for wanted in ("VLM EXPERT --base LLM --out DIR | COMMAND ...", "--strength", "--per-layer", "--inspect"):
        assert wanted in text, (arguments, wanted, text)
    for command in commands:
        assert f" {command} " in text, (command, text)
loaded = {"torch", "transformers", "pandas", "matplotlib"} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_merging_writes_the_model_and_says_what_changed(family, tmp_path):
    out = tmp_path / "out"
    result = invoke(*three(family), "--strength", 0.5, "-o", out)
    assert result.exit_code == 0, result.output
    assert "task-arithmetic λ=0.5" in result.stdout
    assert "attention 12 12 0" in flat(result.stdout)
    assert "embedding 1 0 1" in flat(result.stdout)
    own = saved(family)
    v, b, e, m = (weights(folder) for folder in (own.vlm, own.base, own.expert, out))
    assert set(m) == set(v)
    place = {"llava": "language_model.model.", "smolvlm": "model.text_model."}[family]
    name = "layers.1.mlp.up_proj.weight"
    injected = v[place + name] + 0.5 * (e["model." + name] - b["model." + name])
    assert torch.allclose(m[place + name], injected, atol=1e-6)
    assert not torch.equal(m[place + name], v[place + name])
    assert torch.equal(m[place + "embed_tokens.weight"], v[place + "embed_tokens.weight"])
    assert (out / "tokenizer.json").is_file()
    again = invoke(*three(family), "--strength", 0.5, "-o", out)
    assert again.exit_code == 0
    assert "already" in again.output


def test_options_reach_the_recipe(tmp_path):
    listed = tmp_path / "strengths.json"
    listed.write_text("[0, 0.25,\n 1]")
    result = invoke(
        *three("llava"), "--method", "dare", "--density", 0.25, "--seed", 3, "--vlm-strength", 0.9, "--per-layer",
        listed, "--option", "rescale=none", "--option", "drop=both", "--embeddings", "shared-rows",
        "-o", tmp_path / "out", "--shard-size", "20KB", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["recipe"] == {
        "method": "dare", "strength": 0.0, "vlm_strength": 0.9, "density": 0.25, "seed": 3, "layers": None,
        "per_layer": [0.0, 0.25, 1.0], "embeddings": "shared-rows", "options": {"rescale": "none", "drop": "both"},
    }  # fmt: skip
    assert facts["changed"] == 30
    assert facts["kept"] == 43
    assert {"attention", "mlp", "norm", "embedding", "head"} < {row["module"] for row in facts["modules"]}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_a_layer_range_leaves_everything_else_as_it_was(tmp_path):
    out = tmp_path / "out"
    assert invoke(*three("gemma3"), "--layers", "1-2", "-o", out).exit_code == 0
    before, after = weights(saved("gemma3").vlm), weights(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers.1." in name or ".layers.2." in name} - {
        name for name in before if "vision" in name
    }


def test_inspecting_prints_both_task_vectors_by_layer_and_writes_nothing(tmp_path):
    before = sorted(tmp_path.iterdir())
    result = invoke(*three("llava"), "--inspect")
    assert result.exit_code == 0, result.output
    assert "cosine" in result.stdout
    for row in ("0", "1", "2", "all"):
        assert any(line.split()[:1] == [row] for line in result.stdout.splitlines()), row
    assert "warning" not in result.output
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("option", [["-o", "out"], ["--shard-size", "20KB"]])
def test_inspecting_says_that_it_writes_nothing(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*three("llava"), "--inspect", *option)
    assert result.exit_code == 0
    assert "--inspect writes nothing" in flat(result.stderr)
    assert not list(tmp_path.iterdir())
    assert "writes nothing" not in invoke(*three("llava"), "--inspect").output


def test_inspecting_shows_damage(tmp_path):
    own, name = saved("llava"), "model.layers.1.mlp.up_proj.weight"
    expert = changed_copy(own.expert, tmp_path / "damaged", {name: torch.full((24, 16), torch.nan)})
    result = invoke(*with_expert(own, expert), "--inspect")
    assert result.exit_code == 0
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.split()}
    assert rows["1"][2] == rows["all"][2] == "nan"
    assert rows["0"][2] != "nan"
    assert "NaN or infinite in" in flat(result.stderr)


def test_shards_of_no_size_are_refused(tmp_path):
    result = invoke(*three("llava"), "--shard-size", "0KB", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "is not a size of shards" in flat(result.stderr)
    assert not list(tmp_path.iterdir())


def test_inspecting_warns_of_a_wrong_base():
    own = saved("llava")
    result = invoke(own.vlm, own.expert, "--base", saved("idefics3").base, "--inspect", "--json")
    assert result.exit_code == 0, result.output
    start = result.stdout
    found = json.loads(start)
    assert found["warnings"]
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2]
    assert found["total"]["norm_vlm"] > found["total"]["norm_base"] * 0.7


def test_a_dry_run_shows_what_belongs_together_and_writes_nothing(tmp_path):
    result = invoke(*three("qwen2_5_vl"), "--dry-run", "--layers", "0-1", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    text = flat(result.stdout)
    assert "model.layers.{0-1}.mlp.up_proj.weight 24×16 yes model.layers.{…}.mlp.up_proj.weight" in text
    assert "model.layers.{2}.mlp.up_proj.weight 24×16 no model.layers.{…}.mlp.up_proj.weight" in text
    assert "24 of the 39 tensors of the tower would change; 30 outside it stay" in flat(result.output)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", ["keep", "shared-rows", "by-token"])
def test_a_dry_run_foretells_the_merge(policy, tmp_path):
    wanted = [*three("llava"), "--embeddings", policy]
    foretold = json.loads(invoke(*wanted, "--dry-run", "--json").stdout)
    assert invoke(*wanted, "-o", tmp_path / "out").exit_code == 0
    before, after = weights(saved("llava").vlm), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {row["vlm"] for row in foretold["tower"] if row["change"] != "no"} == changed
    assert set(foretold["kept"]) | {row["vlm"] for row in foretold["tower"]} == set(before)
    rows = {row["kind"]: row["change"] for row in foretold["tower"]}
    assert rows["embedding"] == rows["head"] == ("no" if policy == "keep" else f"{TOKENS} rows")
    if policy != "keep":
        name = "language_model.model.embed_tokens.weight"
        assert len(after[name]) == VLM_ROWS > ROWS
        assert torch.equal(after[name][TOKENS:], before[name][TOKENS:])


def test_methods_are_listed_with_their_sources():
    result = invoke("--method", "help")
    assert result.exit_code == 0
    for name in ("task-arithmetic", "ties", "della", "tsv-m", "wudi"):
        assert name in result.stdout
    assert "2306.01708" in result.stdout
    listed = json.loads(invoke("--method", "help", "--json").stdout)
    assert listed["ties"]["parameters"]["convention"] == "paper"


def test_a_revision_of_the_hub_follows_an_at_sign(monkeypatch, tmp_path):
    asked = []

    def download(source: str, revision: str | None, **_: object) -> str:
        asked.append((source, revision))
        return str(saved("llava").vlm)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    own = saved("llava")
    arguments = [str(own.expert), "--base", str(own.base), "--dry-run"]
    assert invoke("someone/llava@v1.5", *arguments).exit_code == 0
    assert invoke("someone/llava", *arguments).exit_code == 0
    assert asked == [("someone/llava", "v1.5"), ("someone/llava", None)]
    odd = tmp_path / "llava@home"
    shutil.copytree(own.vlm, odd)
    assert invoke(odd, *arguments).exit_code == 0
    assert len(asked) == 2


def refused(tmp_path: Path, *arguments: object) -> str:
    """What is said when nothing is done: exit code 2, nothing written, not even half."""
    here = tmp_path / "results"
    here.mkdir(exist_ok=True)
    for mode in (["-o", str(here / "out")], ["--dry-run"]):
        result = invoke(*arguments, *mode)
        assert result.exit_code == 2, result.output
        assert "error:" in result.stderr
        assert not list(here.iterdir())
    return flat(result.stderr)


def changed_copy(folder: Path, to: Path, change: "dict[str, torch.Tensor | None]") -> Path:
    """A checkpoint with tensors replaced, or left out where the change is None."""
    shutil.copytree(folder, to)
    own = load_file(to / "model.safetensors") | change
    save_file({k: t for k, t in own.items() if t is not None}, to / "model.safetensors", {"format": "pt"})
    return to


def with_expert(own: Saved, expert: Path) -> list[object]:
    return [own.vlm, expert, "--base", own.base]


def test_models_that_do_not_fit_are_refused(tmp_path):
    own = saved("llava")
    said = refused(tmp_path, *with_expert(own, saved("qwen2_vl").expert))
    assert "The expert is not what the language tower was made from" in said
    assert "9 missing in the tower" in said  # Qwen2 has biases
    said = refused(tmp_path, own.vlm, own.expert, "--base", saved("gemma3").base)
    assert "The base is not what the language tower was made from" in said
    said = refused(tmp_path, saved("gemma3").vlm, own.expert, "--base", own.base)
    assert "missing in the language model" in said
    other = load_file(own.expert / "model.safetensors")
    wide = {name: torch.cat([t, t], dim=-1) for name, t in other.items()}
    said = refused(tmp_path, *with_expert(own, changed_copy(own.expert, tmp_path / "wide", wide)))
    assert "30 of another shape" in said
    assert "model of the size that the tower was made from" in said


def test_a_base_of_the_right_shapes_that_is_another_model_is_refused(tmp_path):
    own, other = saved("llava"), saved("idefics3")
    said = refused(tmp_path, own.vlm, own.expert, "--base", other.base)
    assert "is not what the vision-language model and the expert came from" in said
    assert "is 1.4" in said
    assert "is not what the expert came from" in refused(tmp_path, *with_expert(own, other.expert))
    assert invoke(*with_expert(own, other.expert), "-o", tmp_path / "out", "--force").exit_code == 0


def test_missing_and_doubled_tensors_are_refused(tmp_path):
    own = saved("llava")
    name = "layers.2.mlp.up_proj.weight"
    lacking = changed_copy(own.expert, tmp_path / "lacking", {f"model.{name}": None})
    said = refused(tmp_path, *with_expert(own, lacking))
    assert f"1 missing in the language model. missing in the language model: {name}" in said
    inside = f"language_model.model.{name}"
    blind = changed_copy(own.vlm, tmp_path / "blind", {inside: None})
    assert f"missing in the tower: {name}" in refused(tmp_path, blind, own.expert, "--base", own.base)
    twice = changed_copy(own.vlm, tmp_path / "twice", {f"model.language_model.{name}": torch.zeros(24, 16)})
    assert "1 doubled in the tower" in refused(tmp_path, twice, own.expert, "--base", own.base)


def test_folders_that_hold_no_model_are_refused(tmp_path):
    own = saved("llava")
    said = refused(tmp_path, tmp_path / "nothing", own.expert, "--base", own.base)
    assert "nothing" in said
    broken = tmp_path / "broken"
    shutil.copytree(own.expert, broken)
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "model.safetensors" in refused(tmp_path, *with_expert(own, broken))
    shards = shutil.copytree(saved("llava", shard="20KB").vlm, tmp_path / "shards")
    next(iter(sorted(shards.glob("*.safetensors")))).unlink()
    assert "lacks 1 of its" in refused(tmp_path, shards, own.expert, "--base", own.base)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "magic"], "no merging method 'magic'"),
        (["--density", "0.5"], "takes no density"),
        (["--layers", "1-3"], "the tower has layers 0 to 2"),
        (["--layers", "first"], "neither a number nor a range"),
        (["--per-layer", "1,1"], "strengths of 2 layers, the tower has 3"),
        (["--per-layer", "1,b,1"], "neither a list of numbers"),
        (["--per-layer", ""], "neither a list of numbers"),
        (["--option", "convention"], "not of the form name=value"),
        (["--option", "convention=paper"], "no option 'convention'"),
        (["--embeddings", "all"], "keep, shared-rows, by-token"),
        (["--strength", "nan"], "not finite"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, says, tmp_path):
    assert says in refused(tmp_path, *three("llava"), *options)


def test_what_must_be_given_is_named(tmp_path):
    own = three("llava")
    for arguments, says in [
        (own, "--out must be given"),
        (own[:2], "--base and --out must be given"),
        (["org/vlm"], "EXPERT and --base and --out must be given"),
        (["sweeep"], "Did you mean 'sweep'?"),
        ([*own, "--inspect", "--dry-run"], "two different things"),
    ]:
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert says in flat(result.stderr)


def test_a_merge_that_changes_nothing_is_an_error(tmp_path):
    own = saved("llava")
    here = tmp_path / "results"
    here.mkdir()
    result = invoke(own.vlm, own.base, "--base", own.base, "-o", here / "out")
    assert result.exit_code == 2
    assert "changed nothing in the language tower" in flat(result.stderr)
    assert not list(here.iterdir())
