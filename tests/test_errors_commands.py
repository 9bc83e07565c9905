"""Commands that cannot be meant, or whose models and files are not what they seem: a sentence, its mend, exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import make
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from anchors.cli import app
from anchors.errors import AnchorsError, closest
from anchors.flow import flow
from anchors.models import load, placed
from anchors.nsa.team import Team
from anchors.tasks.data import read
from anchors.tasks.drawing import Draw, draw
from anchors.tasks.task import TASKS

MANY = "9" * 30
TRAIN = (
    "nsa",
    "train",
    "--steps",
    2,
    "-T",
    64,
    "--layers",
    1,
    "--width",
    32,
    "--held-out",
    4,
    "--device",
    "cpu",
)
PROMPT = "Review: fine\nSentiment: Positive\n\nReview: bad\nSentiment: Negative\n\nReview: good\nSentiment:"


def said(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(result.output.split())


def refused(*arguments: object) -> str:
    """What a command says that the user can mend."""
    code, text = said(*arguments)
    assert code == 2, text
    assert "error:" in text
    return text


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


# Options ------------------------------------------------------------------------------------------

MEASURED = [
    ("classify", "--shots", 10**5, "fit into the model's context"),
    ("classify", "--shots", MANY, "go up to"),
    ("classify", "--examples", MANY, "go up to"),
    ("classify", "--task", "sst2,sst2", "twice"),
    ("classify", "--policy", "frist", "Did you mean 'first'?"),
    ("classify", "--control", "permuted-lables", "Did you mean 'permuted-labels'?"),
    ("classify", "--precision", "flaot32", "Did you mean 'float32'?"),
    ("classify", "--device", "mps:3", "device"),
    ("classify", "--device", "cpu:7", "no device"),
    ("classify", "--revision", "other", "has no revision"),
    ("flow", "--layers", "0-99999999999", "has layers 0 to 2"),
    ("flow", "--layers", "²", "no list of layers|not a list of layers"),
    ("isolate", "--sides", "frist", "Did you mean 'first'?"),
    ("isolate", "--sides", "", "names nothing"),
    ("isolate", "--positions", "lable", "Did you mean 'label'?"),
    ("causal", "--positions", "lable", "Did you mean 'label'?"),
    ("causal", "--positions", "label,label", "twice"),
    ("compress", "--methods", "hidden_anker", "Did you mean 'hidden_anchor'?"),
    ("compress", "--positions", "restrat", "Did you mean 'restart'?"),
    ("compress", "--top", 10**6, "vocabulary"),
    ("diagnose", "--components", "3,3", "twice"),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "option", "value", "reason"), MEASURED)
def test_what_cannot_be_measured_is_refused(
    verb: str, option: str, value: object, reason: str, model_directory: Path, tmp_path: Path
) -> None:
    text = refused(verb, "-m", model_directory, "-n", 2, "-o", tmp_path / "out", option, value)
    assert any(each in text for each in reason.split("|")), text
    assert not [name for name in files_in(tmp_path) if name != "config.json"]


TRAINED = [
    ("--init", "nan", "--init"), ("--init", "-1", "--init"), ("--init", "0", "--init"), ("--init", "1e30", "--init"),
    ("--head-dim", 3, "even"), ("--last-lr", 5, "share"), ("--last-lr", "nan", "share"), ("--classes", "²", "range"),
    ("--rope-theta", "nan", "above 0"), ("--rope-theta", 0, "above 0"), ("--seed", MANY, "go up to"),
    ("--recent", MANY, "go up to"), ("--attention", "ful", "Did you mean 'full'?"),
    ("--phi", "mpl", "Did you mean 'mlp'?"), ("--backend", "tritn", "Did you mean 'triton'?"),
    ("--lr", "1e30", "diverged"), ("--weight-decay", "1e30", "diverged"),
    ("--device", "foo", "no device"), ("--device", "meta", "not run on"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value", "reason"), TRAINED)
def test_what_is_no_training_is_refused_and_leaves_nothing(
    option: str, value: object, reason: str, tmp_path: Path
) -> None:
    assert reason in refused(*TRAIN, "--out", tmp_path / "out", option, value)
    assert not files_in(tmp_path)


def test_weights_that_the_last_step_blew_up_are_not_published(tmp_path: Path) -> None:
    text = refused(
        *TRAIN, "--steps", 1, "--warmup", 0, "--attention", "full", "--lr", "1e30", "--out", tmp_path / "out"
    )
    assert "diverged" in text
    assert not files_in(tmp_path)


OTHERS = [
    (("nsa", "probe", "--tokens", 10**5, "-n", 1), "do not fit into the context"),
    (("nsa", "probe", "--seed", MANY), "go up to"),
    (("nsa", "probe", "--device", "foo", "--json"), "no device"),
    (("inject", "swep", "suite"), "inject sweep"),
    (("inject", "demo", "--steps-factor", "inf"), "above 0"),
    (("inject", "demo", "--steps-factor", "nan"), "above 0"),
    (("inject", "demo", "--device", "foo"), "no device"),
    (("inject", "demo", "--scale", "tinny"), "Did you mean 'tiny'?"),
    (("inject", "demo", "--seed", MANY), "go up to"),
    (("run", "figur3"), "Did you mean 'figure3'?"),
    (("run", "figure3", "--task", "sst3"), "Did you mean 'sst2'?"),
    (("run", "figure3", "--task", ""), "names nothing"),
    (("figures", "figur3"), "Did you mean 'figure3'?"),
    (("classify", "-m", ""), "is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "reason"), OTHERS)
def test_what_other_verbs_refuse(command: tuple[object, ...], reason: str, tmp_path: Path) -> None:
    assert reason in refused(*command, "-o", tmp_path / "out")
    assert not files_in(tmp_path)


MERGES = [
    ({"strength": 1e30}, "no merge"), ({"vlm_strength": -1e5}, "no merge"), ({"per_layer": (0.0, 1e30)}, "no merge"),
    ({"method": "ties", "density": 0.0}, "above 0"), ({"method": "tise"}, "Did you mean 'ties'?"),
    ({"embeddings": "kep"}, "Did you mean 'keep'?"),
    ({"method": "dare", "options": {"rescale": "nne"}}, "Did you mean 'none'?"),
    ({"method": "dare", "options": {"rescal": "none"}}, "Did you mean 'rescale'?"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "reason"), MERGES)
def test_what_is_no_merge_is_refused(fields: dict, reason: str) -> None:
    from anchors.injection.recipe import Recipe

    with pytest.raises(AnchorsError) as error:
        Recipe(**fields)
    assert reason in str(error.value)


@pytest.mark.parametrize("device", ["foo", "meta", "cpu:1", "mps:1", "cuda:99"])
def test_there_is_one_rule_for_devices(device: str) -> None:
    with pytest.raises(AnchorsError) as one:
        placed(device, "auto")
    with pytest.raises(AnchorsError) as other:
        Team.made(device)
    assert str(one.value) == str(other.value)


def test_the_name_that_is_meant() -> None:
    assert closest("swep", ["demo", "sweep", "flow"]) == "sweep"
    assert closest("SWEEP", ["demo", "sweep"]) == "sweep"
    assert closest("llava-1.5-7b", ["demo", "sweep", "flow"]) is None


# Models -------------------------------------------------------------------------------------------


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def all_zero(model: PreTrainedModel) -> None:
    for weight in model.parameters():
        weight.zero_()


def zero_head(model: PreTrainedModel) -> None:
    model.lm_head.weight.zero_()


DEAD: list[Callable[[PreTrainedModel], None]] = [all_zero, zero_head]


@pytest.fixture(scope="module", params=DEAD)
def dead(
    request: pytest.FixtureRequest,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A model whose loss depends on nothing."""
    model = make("llama", len(tokenizer))
    with torch.no_grad():
        request.param(model)
    return saved(model, tokenizer, tmp_path_factory.mktemp("dead"))


@pytest.mark.parametrize("verb", ["classify", "flow"])
def test_a_loss_that_no_attention_moves_is_refused_with_this_reason(
    verb: str, dead: Path, tmp_path: Path
) -> None:
    assert "does not depend on its attention" in refused(verb, "-m", dead, "-n", 2, "-o", tmp_path / "out")


@pytest.mark.parametrize("verb", ["isolate", "readout", "reweight", "compress", "diagnose", "causal"])
@pytest.mark.parametrize("dead", [all_zero], indirect=True)
def test_so_is_it_by_the_other_verbs(verb: str, dead: Path, tmp_path: Path) -> None:
    assert "does not depend on its attention" in refused(verb, "-m", dead, "-n", 2, "-o", tmp_path / "out")


def test_its_page_is_refused_and_its_check_fails_with_this_reason(dead: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(PROMPT)
    text = refused("view", tmp_path / "p.txt", "-m", dead, "-o", tmp_path / "v.html")
    assert "does not depend on its attention" in text
    result = CliRunner().invoke(app, ["check", str(dead), "-t", "sst2", "--json"])
    findings = json.loads(result.stdout)
    assert result.exit_code == 1
    assert any("does not depend on its attention" in f["detail"] for f in findings if f["ok"] is False)


def test_where_the_answer_is_certain_the_flow_is_zero_and_no_error(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = make("llama", len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    lm = load(model, tokenizer=tokenizer, device="cpu")
    task = TASKS["sst2"]
    prompt = draw(task, read(task), tokenizer, Draw(), 1)[0].prompt
    certain = [type(prompt)(**(vars(prompt) | {"gold": gold})) for gold in range(2)]
    found = [flow(lm, [each]) for each in certain]
    right = found[0] if float(found[0].loss) < float(found[1].loss) else found[1]
    assert float(right.loss) == 0
    assert not right.sums.s_wp.any()
    assert not right.sums.s_ww.any()


def config_of(folder: Path, **changed: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def index_of(folder: Path, text: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "shapes": (lambda f: config_of(f, n_embd=48), "of another shape"),
    "heads": (lambda f: config_of(f, n_head=5), "could not be loaded"),
    "no layers": (lambda f: config_of(f, n_layer=0), "no layers"),
    "a word for a number": (lambda f: config_of(f, n_layer="three"), "could not be loaded"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "could not be loaded"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "nested too deep"),
    "deep tokenizer": (lambda f: (f / "tokenizer.json").write_text("[" * 10**5), "nested too deep"),
    "deep index": (lambda f: index_of(f, '{"a":' * 10**5), "nested too deep"),
    "list of an index": (lambda f: index_of(f, '{"weight_map": ["a"]}'), "weight_map"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "without tokenizer files"),
    "gptq": (lambda f: config_of(f, quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
    "awq": (lambda f: config_of(f, quantization_config={"quant_method": "awq", "bits": 4}), "awq"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_models_that_are_none_are_refused_with_the_reason(
    name: str, model_directory: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_directory, folder)
    damage, reason = DAMAGE[name]
    damage(folder)
    assert reason in refused("classify", "-m", folder, "-n", 2, "-o", tmp_path / "out")
    assert not files_in(tmp_path / "out")


def test_a_row_that_is_not_a_number_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = make("gpt2", len(tokenizer))
    with torch.no_grad():
        model.transformer.wte.weight[7] = float("nan")
    text = refused("flow", "-m", saved(model, tokenizer, tmp_path / "m"), "-n", 2, "-o", tmp_path / "out")
    assert "transformer.wte.weight" in text
    assert "[7, 0]" in text


def test_an_embedding_smaller_than_the_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = saved(make("gpt2", len(tokenizer) - 300), tokenizer, tmp_path / "m")
    (tmp_path / "p.txt").write_text(PROMPT)
    for command in (
        ("classify", "-m", folder, "-n", 2, "-o", tmp_path / "out"),
        ("check", folder, "--json"),
        ("view", tmp_path / "p.txt", "-m", folder, "-o", tmp_path / "v.html"),
    ):
        assert "tokenizer does not belong" in refused(*command)
