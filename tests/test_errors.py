"""What the command line says of what it cannot do: a sentence and its mend, an exit code that means something."""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from injection_suites import build
from made_rows import rows
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from anchors.cli import app, common
from anchors.errors import AnchorsError, demand_seed, nearest, of_the_machine, parsed, whole_number
from anchors.icl import best_words
from anchors.injection.asking.suite import Suite
from anchors.injection.merging.checkpoint import Checkpoint
from anchors.injection.merging.merge import _compared
from anchors.nsa.config import NSAConfig
from anchors.nsa.model import NSAForCausalLM
from anchors.nsa.training import checkpoint as training
from anchors.nsa.training.vocabulary import Vocabulary
from anchors.study.results import write_atomic, write_table, writing
from anchors.tasks.files import rows as rows_of


def said(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(result.output.split())


def test_an_unforeseen_exception_is_a_sentence_a_log_and_an_exit_code_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(common.typer.Exit) as left, common.reporting():
        _ = [][3]
    assert left.value.exit_code == common.UNFORESEEN == 70
    text = re.sub(r"\s+", "", capsys.readouterr().err)
    assert "IndexError:listindexoutofrange" in text
    log = Path(re.search(r"(/\S+?\.log)", text)[1])
    assert "Traceback" in log.read_text()
    log.unlink()


def test_it_is_shown_where_no_log_can_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(common.typer.Exit) as left, common.reporting():
        _ = [][3]
    assert left.value.exit_code == common.UNFORESEEN
    assert "Traceback" in capsys.readouterr().err


MACHINE = {
    "not enough memory": [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")],
    "disk is full": [OSError(28, "No space left on device"), Exception("I/O error (os error 28)")],
    "worked with this one has ended": [RuntimeError("[gloo] Read error: Connection reset by peer. This is typically …")],
    "cannot be read or written": [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")],
}  # fmt: skip


@pytest.mark.parametrize(("reason", "error"), [(r, e) for r, errors in MACHINE.items() for e in errors])
def test_what_the_machine_lacks_is_no_defect(
    reason: str, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(common.typer.Exit) as left, common.reporting():
        raise error
    assert left.value.exit_code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [ValueError("shapes differ"), FileNotFoundError(2, "No such file"), KeyError(28)]
)
def test_other_errors_are_not_the_machines(error: Exception) -> None:
    assert of_the_machine(error) is None


@pytest.mark.parametrize("code", [0, 3])
def test_a_command_that_leaves_keeps_its_own_exit_code(code: int) -> None:
    with pytest.raises(common.typer.Exit) as left, common.reporting():
        raise common.typer.Exit(code)
    assert left.value.exit_code == code


@pytest.mark.parametrize("text", ["²", "٣", "-1", "1.0", "", " 1", "9" * 30])
def test_only_plain_digits_of_a_sensible_number_are_a_number(text: str) -> None:
    assert whole_number(text) is None


def test_plain_digits_are_a_number() -> None:
    assert [whole_number(text) for text in ("0", "007", "42")] == [0, 7, 42]


@pytest.mark.parametrize("layers", ["²", "0-99999999999", "3-1", "", "0,x"])
def test_ranges_of_layers(layers: str) -> None:
    with pytest.raises(AnchorsError):
        common.layers_from(layers, range(4))
    assert common.layers_from("0,2-3", range(4)) == [0, 2, 3]


def test_a_name_that_is_not_known_is_answered_with_the_nearest() -> None:
    assert nearest("sst3", ["sst2", "trec"]) == "Did you mean 'sst2'? There are: sst2, trec."
    assert nearest("TREC", ["sst2", "trec"]).startswith("Did you mean 'trec'?")
    assert nearest("zzz", ["sst2", "trec"]) == "There are: sst2, trec."
    assert "Did you mean 'sst2'?" in said("classify", "--task", "sst3", "--device", "cpu")[1]
    assert "Did you mean 'figure3'?" in said("run", "figur3")[1]


def test_seeds_are_those_that_a_generator_holds() -> None:
    demand_seed(0)
    demand_seed(2**63 - 1)
    for seed in (-1, 2**63, int("9" * 30)):
        with pytest.raises(AnchorsError, match="is not from 0"):
            demand_seed(seed)


# ------------------------------------------------------------------------------------- models that make none
Tensors = dict[str, torch.Tensor]


def _zero(held: Tensors) -> None:
    for weight in held.values():
        weight.zero_()


def _equal(held: Tensors) -> None:
    held["transformer.wte.weight"][:] = held["transformer.wte.weight"][0]


def _nan(held: Tensors) -> None:
    held["transformer.wte.weight"][7] = torch.nan


def _short(held: Tensors) -> None:
    held["transformer.wte.weight"] = held["transformer.wte.weight"][:100].clone()


WEIGHTS: dict[str, Callable[[Tensors], None]] = {"zero": _zero, "equal": _equal, "nan": _nan, "small": _short}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
CONFIGURATIONS: dict[str, dict] = {
    "small": {"vocab_size": 100}, "shapes": {"n_inner": 77}, "odd": {"n_head": 5}, "flat": {"n_layer": 0},
    "three": {"n_layer": "three"}, "gptq": {"quantization_config": GPTQ},
}  # fmt: skip
DEEP = '{"a":' * 100_000
INDEX = "model.safetensors.index.json"
FILES = {
    "list": ("config.json", "[1, 2]"), "deep": ("config.json", DEEP), "words": ("tokenizer.json", DEEP),
    "index": (INDEX, '{"weight_map": ["a"]}'), "deep index": (INDEX, DEEP),
}  # fmt: skip
NAMES = [*dict.fromkeys([*WEIGHTS, *CONFIGURATIONS, *FILES, "wordless"])]


@pytest.fixture(scope="module")
def broken(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny GPT-2, spoiled in all these ways, by name; `M` is whole."""
    home = tmp_path_factory.mktemp("broken")
    for name in NAMES:
        folder = copytree(model_directory, home / name)
        weights = folder / "model.safetensors"
        if name in WEIGHTS:
            held = load_file(weights)
            WEIGHTS[name](held)
            save_file(held, weights, metadata={"format": "pt"})
        if name in CONFIGURATIONS:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | CONFIGURATIONS[name]))
        if name in FILES:
            file, content = FILES[name]
            (folder / file).write_text(content)
            if file == INDEX:
                weights.rename(folder / "model-00001-of-00001.safetensors")
        if name == "wordless":
            for path in folder.glob("*token*"):
                path.unlink()
    return {name: str(home / name) for name in NAMES} | {"M": str(model_directory)}


ALIKE = "gives every token of its vocabulary the same logit"
MODELS = [
    *((verb, "zero", ALIKE) for verb in ("classify", "check", "view")),
    ("flow", "equal", ALIKE),
    *((verb, "small", "does not belong to the model") for verb in ("classify", "check", "view")),
    *((verb, "nan", "transformer.wte.weight") for verb in ("classify", "view")),
    ("classify", "wordless", "came without tokenizer files"),
    ("classify", "shapes", "c_fc.bias is 128 in the file and 77 in the model"),
    ("classify", "odd", "could not be"),
    ("classify", "flat", "has no layers"),
    ("classify", "three", "could not be read"),
    ("classify", "gptq", "quantised: gptq"),
    ("classify", "list", "could not be read"),
    *(("classify", name, "nested too deep") for name in ("deep", "words", "deep index")),
    ("classify", "index", "weight_map is no table"),
]


@pytest.mark.parametrize(("verb", "name", "message"), MODELS, ids=lambda x: str(x)[:12])
def test_models_that_make_none(
    verb: str, name: str, message: str, broken: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if verb == "check":
        code, text = said("check", broken[name], "--json")
    elif verb == "view":
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("Review: good\nSentiment: Positive\nReview: fine\nSentiment:")
        code, text = said("view", prompt, "-m", broken[name], "-t", "sst2", "-o", out / "page.html")
    else:
        code, text = said(verb, "-m", broken[name], "-n", 4, "-o", out)
    assert code == 2, text
    assert "error:" in text
    assert message in text
    assert not [path for path in out.rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------- options that cannot be meant
LONG = "9" * 30
DEVICES = (
    ("foo", "mps", "meta", "cpu:3") if not torch.backends.mps.is_available() else ("foo", "meta", "cpu:3")
)
OPTIONS = [
    *(("classify", "--device", device) for device in DEVICES),
    ("classify", "--seeds", "²"), ("classify", "--seeds", LONG), ("classify", "--batch-size", "²"),
    ("classify", "--control", "permuted-label", "Did you mean 'permuted-labels'"),
    ("classify", "--policy", "frist", "Did you mean 'first'"), ("classify", "--task", "sst3", "Did you mean 'sst2'"),
    ("classify", "--precision", "float31", "Did you mean 'float32'"),
    ("classify", "--task", "sst2,sst2", "twice"), ("classify", "--shots", "100000", "Fewer than 100000 training examples"),
    ("flow", "--layers", "²"), ("flow", "--layers", "0-99999999999", "has layers 0 to 2"),
    ("classify", "--revision", "other", "has no revision 'other'"), ("classify", "-m", "", "is empty"),
    ("classify", "--shots", LONG, "go up to"), ("isolate", "--sides", "", "names nothing"),
    ("causal", "--positions", "label,label", "names 'label' twice"), ("diagnose", "--components", "3,3", "names 3 twice"),
]  # fmt: skip


@pytest.mark.usefixtures("wrong_types")
@pytest.mark.parametrize("row", OPTIONS, ids=lambda row: " ".join(row[:3]))
def test_options_that_cannot_be_meant_are_refused(
    row: tuple[str, ...], model_directory: Path, tmp_path: Path
) -> None:
    verb, option, value, *message = row
    code, text = said(verb, "-m", model_directory, "-n", 4, "-o", tmp_path, option, value)
    assert code == 2, text
    assert "error:" in text
    assert all(part in text for part in message), text
    assert not list(tmp_path.glob("*"))


def test_a_page_is_of_one_task(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Review: good\nSentiment:")
    code, text = said("view", tmp_path / "prompt.txt", "-m", model_directory, "-t", "sst2,trec")
    assert code == 2
    assert "names several" in text


TOML = {
    'labels = ["A", true]': "not a list of strings", "labels = [true, false]": "not a list of strings",
    "labels = 3": "not a list of strings", 'labels = ["A", "B"]\nseparator = 1': "separator of a task is 1",
    f"labels = {'[' * 100_000}": "nested too deep",
}  # fmt: skip


@pytest.mark.usefixtures("wrong_types")
@pytest.mark.parametrize("table", TOML, ids=lambda table: table[:24])
def test_task_files_of_wrong_types(table: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f'template = "{{text}}:{{label}}"\n{table}')
    code, text = said("classify", "-t", path)
    assert code == 2
    assert TOML[table] in text


TRAINING = [
    ("--init", "nan"), ("--init", "-1"), ("--init", "0"), ("--init", "1e30"), ("--rope-theta", "nan"), ("--head-dim", "3"),
    ("--last-lr", "5"), ("--lr", "1e39"), ("--text-weight", "1e39"), ("--classes", "²"), ("--seed", LONG), ("--phi", "maen", "Did you mean 'mean'"),
    ("--recent", LONG, "go up to"), ("--attention", "ful", "Did you mean 'full'"), ("--backend", "tritn", "Did you mean 'triton'"),
    *(("--device", device) for device in DEVICES),
]  # fmt: skip


@pytest.mark.parametrize("row", TRAINING, ids=lambda row: " ".join(row[:2])[:24])
def test_options_that_make_no_training(row: tuple[str, ...], tmp_path: Path) -> None:
    option, value, *message = row
    code, text = said("nsa", "train", "-o", tmp_path / "out", "--steps", 2, "--layers", 1, option, value)
    assert code == 2, text
    assert "error:" in text
    assert all(part in text for part in message), text
    assert not (tmp_path / "out").exists()


SMALL = (
    "--layers", 1, "--width", 16, "--tokens", 64, "--words", 2, "--classes", 2, "--batch", 2, "--warmup", 0, "--held-out", 2,
    "--n", 4, "--lp", 8, "--l", 8, "--d", 4, "--w", 8,
)  # fmt: skip


@pytest.mark.parametrize(
    "options", [("--steps", 8, "--every", 8), ("--steps", 1, "--attention", "full")], ids=str
)
def test_a_training_that_diverges_says_so_and_leaves_the_folder_to_another(
    options: tuple[object, ...], tmp_path: Path
) -> None:
    code, text = said("nsa", "train", "-o", tmp_path, *SMALL, *options, "--lr", "1e30")
    assert code == 2, text
    assert "The training diverged" in text
    assert "lower --lr" in text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    training.TrainingFolder(tmp_path).check({"another": "training"})


@pytest.mark.parametrize(
    "command",
    [("nsa", "train", *SMALL, "--steps", 1), ("inject", "demo", "--scale", "tiny", "--steps-factor", 1e-9)],
    ids=lambda c: c[1],
)
def test_a_training_without_room_leaves_no_half_of_it(command: tuple[object, ...], tmp_path: Path) -> None:
    with files_no_larger_than(100):
        code, text = said(*command, "-o", tmp_path)
    assert code == 2, text
    assert "cannot be written" in text
    assert "Make room" in text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_truncated_model_to_begin_with(tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    save_file({"a": torch.zeros(100)}, tmp_path / "cut/model.safetensors")
    os.truncate(tmp_path / "cut/model.safetensors", 200)
    code, text = said(
        "nsa", "train", "-o", tmp_path / "out", *SMALL, "--steps", 2, "--from", tmp_path / "cut"
    )
    assert code == 2, text
    assert "cannot be read" in text


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of episodes with 64 positions."""
    folder, words = tmp_path_factory.mktemp("sparse"), Vocabulary(8, 64)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": len(words)}
    NSAForCausalLM(
        NSAConfig(**size, l=8, d=4, lp=8, n=4, w=8, tie_word_embeddings=False, initializer_range=0.3)
    ).save_pretrained(folder)
    words.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "foo", "--json"), "no device"),
        (("--tokens", 100_000), "do not fit into the 64 positions"),
        (("--seed", LONG), "is not from 0"),
    ],
)
def test_probes_that_cannot_be_meant(
    options: tuple[object, ...], message: str, sparse: Path, tmp_path: Path
) -> None:
    code, text = said("nsa", "probe", sparse, "-n", 1, "--words", 2, "-o", tmp_path / "out", *options)
    assert code == 2, text
    assert message in text


# ------------------------------------------------------------------------------------- injection
@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("injection"))


SWEEPS = [
    ("sweep", ("--device", "foo"), "no device"), ("sweep", ("--scenarios", ""), "names nothing"),
    ("sweep", ("--scenarios", "instructio"), "Did you mean 'instruction'"), ("sweep", ("--strengths", "1e30"), "would drown"),
    ("sweep", ("--methods", "ties:density=0"), "density is 0"), ("sweep", ("--methods", "teis"), "Did you mean 'ties'"),
    ("sweep", ("--grid", "smal"), "Did you mean 'small'"), ("flow", ("--device", "meta"), "not run on the device"),
    ("flow", ("--seed", LONG), "is not from 0"), ("sweep", ("--strengths", "inf"), "not a list of numbers"),
    ("sweep", ("--strengths", "1,1"), "names 1.0 twice"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "options", "message"), SWEEPS, ids=lambda x: str(x)[:30])
def test_sweeps_that_cannot_be_meant(
    command: str, options: tuple[str, ...], message: str, suite: Path, tmp_path: Path
) -> None:
    code, text = said("inject", command, suite, "-o", tmp_path, *options)
    assert code == 2, text
    assert message in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strength", "1e30"), "would drown"), (("--method", "ties", "--density", 0), "density is 0"),
        (("--layers", "²"), "neither a number nor a range"), (("--method", "teis"), "Did you mean 'ties'"),
        (("--embeddings", "kep"), "Did you mean 'keep'"),
    ],
)  # fmt: skip
def test_merges_that_cannot_be_meant(
    options: tuple[object, ...], message: str, suite: Path, tmp_path: Path
) -> None:
    home, out = suite.parent, tmp_path / "out"
    own = [home / "vlm", home / "experts/instruction", "--base", home / "base", "-o", out]
    code, text = said("inject", *own, *options)
    assert code == 2, text
    assert message in text
    assert not list(tmp_path.iterdir())


def test_a_command_that_is_not_one_is_no_model() -> None:
    for arguments in (["swep"], ["swep", "suite"]):
        code, text = said("inject", *arguments)
        assert code == 2
        assert "Did you mean 'sweep'?" in text


@pytest.mark.parametrize("factor", ["inf", "nan", "0"])
def test_trainings_without_end(factor: str, tmp_path: Path) -> None:
    code, text = said("inject", "demo", "--steps-factor", factor, "-o", tmp_path / "out")
    assert code == 2
    assert "--steps-factor" in text
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- rows and outputs
SPOILED: dict[str, tuple[Callable, str]] = {
    "no rows": (lambda table: table[:0], "has no rows"),
    "a column less": (lambda table: table.drop(columns="value"), "have no column 'value'"),
    "all NaN": (lambda table: table.assign(value=np.nan), "are missing"),
    "text": (lambda table: table.assign(value="much"), "which is no number"),
    "a gap": (lambda table: table.assign(metric=None), "has gaps"),
    "no facts": (lambda table: table, "does not say how it was measured"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_rows_that_cannot_be_drawn(how: str, tmp_path: Path) -> None:
    spoil, message = SPOILED[how]
    found = rows(
        [(0, "none", layer, metric, 0.1) for layer in range(3) for metric in ("s_wp", "s_pq", "s_ww")]
    )
    log = found.assign(step=1, split="train", bucket="all")[["step", "split", "metric", "bucket", "value"]]
    known: dict = {} if how == "no facts" else {"model": "a model"}
    write_table(tmp_path / "figure3/flow.parquet", spoil(found), known)
    trained = known and {"model": {"attention": "nsa"}, "data": {}, "recipe": {"seed": 0}}
    write_table(tmp_path / "run/training/log.parquet", spoil(log), trained)
    for arguments in (
        ("figures", "figure3", "-o", tmp_path),
        ("nsa", "curves", tmp_path / "run", "-o", tmp_path / "curves"),
    ):
        code, text = said(*arguments)
        assert code == 2, text
        assert message in text


def test_rows_without_what_a_figure_shows(tmp_path: Path) -> None:
    write_table(tmp_path / "figure3/flow.parquet", rows([(0, "none", 0, "other", 0.1)]), {"model": "a model"})
    code, text = said("figures", "figure3", "-o", tmp_path)
    assert code == 2, text
    assert "cannot be drawn from the rows" in text
    assert "metrics are other" in text


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A process's limit on the size of its files stands in for a full disk: libraries say either in the same way."""
    old, cached = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # or half a module would be left of one that is imported meanwhile
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        sys.dont_write_bytecode = cached


def test_a_full_disk_is_one_to_the_writers_of_libraries_too(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "maps.safetensors"
    with files_no_larger_than(1 << 10):
        with pytest.raises(AnchorsError, match=r"cannot be written.*\n.*Make room"):
            write_atomic(path, lambda draft: save_file({"a": torch.zeros(1 << 18)}, draft))
        assert not list(tmp_path.iterdir())
        with pytest.raises(AnchorsError, match=r"cannot be written.*\n.*Make room"), writing(tmp_path):
            tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))


READERS: dict[str, Callable[[Path], object]] = {
    "suite.json": lambda path: Suite.open(path.parent),
    "config.json": lambda path: Checkpoint.open(path.parent),
    "training/run.json": lambda path: training.TrainingFolder(path.parents[1]).check({}),
    "data.json": rows_of,
    "data.jsonl": rows_of,
}


@pytest.mark.parametrize("name", READERS)
def test_json_nested_too_deep_is_none_to_every_reader(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(AnchorsError, match="nested too deep"):
        READERS[name](tmp_path / name)
    assert parsed('{"a": [1]}') == {"a": [1]}


def test_all_words_are_not_the_best_ones() -> None:
    assert best_words(torch.tensor([[1.0, 3.0, 2.0]]), 2).indices.tolist() == [[1, 2]]
    with pytest.raises(AnchorsError, match="the vocabulary has 3"):
        best_words(torch.zeros(1, 3), 3)


def test_a_merge_beyond_any_norm_is_refused() -> None:
    plain = torch.ones(4, 4)
    assert _compared("q", 2 * plain, plain)["change"] == 4
    with pytest.raises(AnchorsError, match="beyond float32"):
        _compared("q", torch.full((4, 4), 3e38), plain)


def test_json_is_whole_or_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    common.print_json({"change": float("inf"), "parts": [float("nan"), 1.0]})
    assert json.loads(capsys.readouterr().out) == {"change": None, "parts": [None, 1.0]}
    with pytest.raises(TypeError):
        common.print_json({"first": 1, "then": object()})
    assert capsys.readouterr().out == ""


def test_an_output_of_another_encoding_is_still_written() -> None:
    code = (
        "import sys; from anchors.cli import common, main; common.print_json(['Σ', 'é', '😀']); "
        "sys.argv = ['anchors', 'run', '--help']; main()"
    )
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=ascii_only, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    shown, _ = json.JSONDecoder().raw_decode(done.stdout.decode("ascii"))
    assert shown == ["Σ", "é", "😀"]
