"""A training that is broken off goes on as if nothing had happened, to the bit."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from anchors.cli.nsa import app
from anchors.errors import AnchorsError
from anchors.injection.demo.build import Builder
from anchors.injection.demo.scales import TINY, Stage
from anchors.injection.demo.world import SKILLS
from anchors.model.language import load
from anchors.nsa.training.episodes import Episodes
from anchors.nsa.training.train import Training, Watch, _optimizer, evaluate, train
from anchors.nsa.training.vocabulary import Vocabulary
from anchors.study.results import read_table
from anchors.training import Team

SMALL = Episodes(
    tokens=64, classes=(2, 3), words=(2, 4), keywords=2, vocabulary=Vocabulary(label_words=8, words=32)
)
RECIPE = Training(steps=6, batch=4, warmup=2)
OFTEN = Watch(every=1, evaluate=3, save=3, held_out=8)


def small(**more: object) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    rest = {"vocab_size": len(SMALL.vocabulary), "max_position_embeddings": 64, "tie_word_embeddings": True}
    return LlamaConfig(**(sizes | rest | {"num_key_value_heads": 1, "head_dim": 8} | more))


def trained(out: Path, recipe: Training = RECIPE, **more: object):
    options = {"watch": OFTEN, "factory": LlamaForCausalLM, "device": "cpu"} | more
    return train(small(), SMALL, recipe, out=out, **options)


def apart(target: Callable, said: Path, *given: object) -> BaseProcess:
    """A process of its own, forked from one that has imported what takes longer than all that is done here."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(
        [
            "accelerate",
            "transformers.models.llama.modeling_llama",
            "anchors.nsa.training.train",
            "anchors.injection.demo.build",
            "sklearn.datasets",
            "pandas",
            "pytest",
        ]
    )
    process = forks.Process(target=target, args=(said, *given))
    process.start()
    return process


def quietly(said: Path) -> None:
    """What this process says on standard error is in a file, and it is one thread."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)


def ended(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode


# Training ----------------------------------------------------------------------------------------


def broken_at(step: int):
    def progress(done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


def same(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "training/state.safetensors"):
        mine, theirs = load_file(one / name), load_file(other / name)
        assert set(mine) == set(theirs)
        for key, tensor in mine.items():
            assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("stop", [3, 5])
def test_broken_off_and_started_again_is_the_same_to_the_bit(tmp_path, stop):
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", progress=broken_at(stop))
    with safe_open(tmp_path / "broken/training/state.safetensors", framework="pt") as file:
        assert file.metadata() == {"step": "3"}
    again = trained(tmp_path / "broken")
    same(tmp_path / "whole", tmp_path / "broken")
    kept = [x.log[x.log["metric"] != "tokens_per_second"].reset_index(drop=True) for x in (whole, again)]
    pd.testing.assert_frame_equal(*kept)
    before = (tmp_path / "broken/model.safetensors").stat().st_mtime_ns
    assert len(trained(tmp_path / "broken").log) == len(again.log)  # done: nothing is left to do
    assert (tmp_path / "broken/model.safetensors").stat().st_mtime_ns == before
    assert not list((tmp_path / "broken").glob(".*"))


def killing(said: Path, out: Path) -> None:
    def progress(done: int, total: int) -> None:
        if done == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    quietly(said)
    trained(out, progress=progress)


def test_killed_at_any_moment(tmp_path):
    assert ended(apart(killing, tmp_path / "said", tmp_path / "killed")) == -signal.SIGKILL
    trained(tmp_path / "killed")
    trained(tmp_path / "whole")
    same(tmp_path / "whole", tmp_path / "killed")


TRAIN = [
    "train",
    "--attention",
    "full",
    "--width",
    "16",
    "--layers",
    "1",
    "--heads",
    "2",
    "-T",
    "64",
    "--classes",
    "2",
    "--words",
    "2-4",
    "--keywords",
    "2",
    "--label-words",
    "8",
    "--vocabulary",
    "32",
    "-b",
    "2",
    "--steps",
    "120",
    "--warmup",
    "2",
    "--every",
    "7",
    "--evaluate",
    "60",
    "--save",
    "20",
    "--held-out",
    "4",
    "--device",
    "cpu",
    "--json",
    "--out",
]


def step_of(folder: Path) -> int:
    with safe_open(folder / "training/state.safetensors", framework="pt") as file:
        return int(file.metadata()["step"])


def commanded(said: Path, *arguments: str) -> None:
    """The command line, heeding SIGINT, which a shell's background job would not."""
    from anchors.cli import main

    quietly(said)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["anchors", *arguments]
    main()


def test_signals_leave_a_checkpoint_of_the_step_they_come_in(tmp_path, caplog):
    """SIGINT to a process, SIGTERM to this one; the same command ends as if there had been none, and then has nothing to do."""
    broken, state = tmp_path / "broken", tmp_path / "broken/training/state.safetensors"
    process = apart(commanded, tmp_path / "said", "nsa", *TRAIN, str(broken))
    while not state.is_file() and process.is_alive():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    said = " ".join((tmp_path / "said").read_text().split()) if ended(process) is not None else ""
    assert process.exitcode == 130, said
    first = step_of(broken)
    assert f"interrupted: step {first} of 120 is kept" in said

    def invoked(folder: Path):
        return CliRunner().invoke(app, [*TRAIN, str(folder)])

    def send(before: int = state.stat().st_mtime_ns) -> None:
        while state.stat().st_mtime_ns == before:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    done = invoked(broken)
    sender.join()
    assert done.exit_code == 143, done.output
    assert first < step_of(broken) < 120
    assert f"interrupted: step {step_of(broken)} of 120 is kept" in " ".join(done.stderr.split())
    logs = []
    for name in ("whole", "broken"):
        assert invoked(tmp_path / name).exit_code == 0
        log, _ = read_table(tmp_path / name / "training/log.parquet")
        logs.append(log[log["metric"] != "tokens_per_second"].reset_index(drop=True))
    same(tmp_path / "whole", broken)
    pd.testing.assert_frame_equal(*logs)
    assert "nothing left" not in caplog.text
    assert invoked(broken).exit_code == 0
    assert "nothing left to compute: all 120 steps are kept" in caplog.text


def test_another_configuration_is_refused(tmp_path):
    trained(tmp_path / "a", Training(steps=1, batch=2, warmup=0))
    for recipe, what in ((Training(steps=2, batch=2, warmup=0), "recipe.steps = 1, not 2"),):
        with pytest.raises(AnchorsError, match=what):
            trained(tmp_path / "a", recipe)
    with pytest.raises(AnchorsError, match=r"model\.num_hidden_layers = 2, not 3"):
        train(small(num_hidden_layers=3), SMALL, Training(steps=1, batch=2, warmup=0), out=tmp_path / "a")
    small().save_pretrained(tmp_path / "b")
    with pytest.raises(AnchorsError, match="was not trained here"):
        trained(tmp_path / "b")
    with pytest.raises(AnchorsError, match="vocabulary of 7"):
        train(small(vocab_size=7), SMALL, RECIPE, out=tmp_path / "c")
    with pytest.raises(AnchorsError, match="positions for 32"):
        train(small(max_position_embeddings=32), SMALL, RECIPE, out=tmp_path / "c")
    for wrong in ({"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"warmup": -1}, {"clip": 0.0}):
        with pytest.raises(AnchorsError, match=next(iter(wrong))):
            Training(**wrong)


def test_a_damaged_checkpoint_is_said_to_be_one(tmp_path):
    trained(tmp_path, Training(steps=1, batch=2, warmup=0))
    (tmp_path / "training/state.safetensors").write_bytes(b"what is this")
    with pytest.raises(AnchorsError, match="cannot be used"):
        trained(tmp_path, Training(steps=1, batch=2, warmup=0))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    class Poisoned(LlamaForCausalLM):
        calls = 0

        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            Poisoned.calls += self.training
            if Poisoned.calls == 5:
                found.logits = found.logits * float("nan")
            return found

    with pytest.raises(AnchorsError, match="not finite at step 5") as caught:
        trained(tmp_path, factory=Poisoned, watch=Watch(every=6, evaluate=6, save=3, held_out=4))
    assert "last checkpoint is kept" in caught.value.remedy
    state = load_file(tmp_path / "training/state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())
    with safe_open(tmp_path / "training/state.safetensors", framework="pt") as file:
        assert file.metadata() == {"step": "3"}


def test_norms_do_not_decay_and_the_schedule_is_a_cosine():
    model = LlamaForCausalLM(small())
    decayed, free = _optimizer(model, RECIPE).param_groups
    assert free["weight_decay"] == 0
    assert {id(p) for p in free["params"]} == {
        id(p) for name, p in model.named_parameters() if "norm" in name
    }
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    recipe = Training(steps=110, lr=1.0, warmup=10, last_lr=0.1)
    rates = [recipe.rate(step) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)


def test_the_model_can_be_loaded_and_the_log_is_tidy(tmp_path):
    result = trained(tmp_path, watch=Watch(every=2, evaluate=3, save=6, held_out=8, dtype=torch.bfloat16))
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    lm = load(str(tmp_path), device="cpu")
    prompt = SMALL.episode(0, 0).prompt()
    assert tuple(lm.tokenizer(prompt.text)["input_ids"]) == prompt.ids
    log, facts = read_table(tmp_path / "training/log.parquet")
    assert facts["recipe"]["steps"] == 6
    assert facts["data"]["data"] == "episodes"
    assert not log.duplicated(["step", "split", "metric", "bucket"]).any()
    assert set(log[log["split"] == "train"]["step"]) == {2, 3, 4, 6}
    held = log[(log["split"] == "held_out") & (log["metric"] == "accuracy")]
    assert set(held["step"]) == {3, 6}
    assert {"all", "last", "1", "2-3", "4-7"} <= set(held["bucket"])
    assert result.last("knowable", "1") == 0
    assert result.last("knowable") == pytest.approx(
        SMALL.rows(0, range(8), held_out=True).knowable.sum()
        / SMALL.rows(0, range(8), held_out=True).labels.sum()
    )


def test_what_is_logged_is_what_the_model_does():
    torch.manual_seed(0)
    model = LlamaForCausalLM(small())
    found = evaluate(model, SMALL, RECIPE, 6)
    rows = SMALL.rows(RECIPE.seed, range(6), held_out=True)
    with torch.no_grad():
        logits = model(torch.from_numpy(rows.ids)).logits
    places = [(r, t) for r, t in zip(*np.nonzero(rows.labels), strict=True)]
    losses = [-float(logits[r, t - 1].log_softmax(-1)[rows.ids[r, t]]) for r, t in places]
    assert found["label_loss", "all"] == pytest.approx(np.mean(losses), rel=1e-5)
    hits = [int(logits[r, t - 1].argmax()) == rows.ids[r, t] for r, t in places]
    assert found["accuracy", "all"] == pytest.approx(np.mean(hits))


# Several processes -------------------------------------------------------------------------------
def together(target: Callable, said: Path, *given: object) -> list[int | None]:
    """Two processes with what a launcher sets, for starting one takes longer than a training; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [address | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"} for rank in "01"]
    return [ended(each) for each in [apart(target, said / rank["RANK"], rank, *given) for rank in ranks]]


def sharing(said: Path, rank: dict[str, str], out: Path, stop: int = -1) -> None:
    def progress(done: int, total: int) -> None:
        if done == stop and rank["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    quietly(said)
    os.environ.update(rank)
    trained(out, THIRDS, progress=progress)


THIRDS = Training(steps=6, batch=3, warmup=2)
"""Of three sequences one process has one, the other two, with other numbers of label words."""


def logged(folder: Path) -> pd.DataFrame:
    log, _ = read_table(folder / "training/log.parquet")
    return log[log["metric"] != "tokens_per_second"].reset_index(drop=True)


def test_several_processes_train_as_one(tmp_path):
    """The same curve as of one process, to rounding; of two, killed and started again, to the bit."""
    pytest.importorskip("accelerate")
    assert together(sharing, tmp_path, tmp_path / "two") == [0, 0], (tmp_path / "0").read_text()[-3000:]
    trained(tmp_path / "one", THIRDS)
    pd.testing.assert_frame_equal(logged(tmp_path / "two"), logged(tmp_path / "one"), rtol=1e-5, atol=1e-6)
    assert read_table(tmp_path / "two/training/log.parquet")[1]["processes"] == 2
    first, second = together(sharing, tmp_path, tmp_path / "broken", 4)
    assert first
    assert second == -signal.SIGKILL
    assert step_of(tmp_path / "broken") == 3
    assert together(sharing, tmp_path, tmp_path / "broken") == [0, 0], (tmp_path / "0").read_text()[-3000:]
    same(tmp_path / "two", tmp_path / "broken")
    pd.testing.assert_frame_equal(logged(tmp_path / "two"), logged(tmp_path / "broken"))


STEPS = Stage(steps=4, lr=1e-3, items=15, lm_lr=1e-3)
WORLD = replace(
    TINY, base=STEPS, classify=STEPS, project=STEPS, gentle=STEPS, experts=dict.fromkeys(SKILLS, STEPS), rows=6, copies=0,
    held_out={"test": 8, "tune": 4, "demonstration": 4},
)  # fmt: skip


def building(said: Path, rank: dict[str, str], out: Path, stop: int = -1) -> None:
    from anchors.injection.demo import training

    def report(stage: str, done: int, total: int) -> None:
        if done == stop and rank["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    quietly(said)
    os.environ.update(rank)
    training.OFTEN, training.KEPT = 1, 2
    team = Team.made("cpu")
    Builder(out, WORLD, 0, team.device, upper=False, several=team).build(report)


def test_several_processes_build_one_world(tmp_path):
    """Killed in a stage and started again, the same curves as of one process, to rounding."""
    pytest.importorskip("accelerate")
    one, two = tmp_path / "one", tmp_path / "two"
    assert ended(apart(building, tmp_path / "0", {"RANK": "0"}, one)) == 0, (tmp_path / "0").read_text()
    first, second = together(building, tmp_path, two, 3 * STEPS.steps + 3)
    assert first
    assert second == -signal.SIGKILL
    assert [path.name for path in two.glob("unfinished-*")] == ["unfinished-vlm.safetensors"]
    assert together(building, tmp_path, two) == [0, 0], (tmp_path / "0").read_text()[-3000:]
    files = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (one, two)]
    assert files[0] == files[1]
    stages = [file for file in files[0] if file.name == "stage.json"]
    assert len(stages) == 8
    for stage in stages:
        mine, theirs = (json.loads((folder / stage).read_text()).get("loss", []) for folder in (one, two))
        assert len(mine) == (0 if stage.parent.name == "suite" else STEPS.steps)
        assert theirs == pytest.approx(mine, rel=1e-5)


def test_what_several_processes_cannot_do_is_refused(monkeypatch):
    team = Team(torch.device("cpu"))
    shares = []
    for size in (1, 3, 5):
        for rank in range(size):
            team.rank, team.size = rank, size
            shares += list(range(7))[team.share(7)]
    assert shares == 3 * list(range(7))
    with pytest.raises(AnchorsError, match="batch of 4 cannot be divided among 5"):
        team.share(4)
    monkeypatch.setattr(team, "total", lambda own: own + torch.tensor([3 * 4, 3 * 4**2]))
    team.size = 4
    team.demand_same(4, "checkpoint")
    with pytest.raises(AnchorsError, match="do not see the same checkpoint: 5 here"):
        team.demand_same(5, "checkpoint")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("anchors.training.placed", lambda device, precision: (torch.device("cuda:1"), ""))
    with pytest.raises(AnchorsError, match="2 processes cannot all train on cuda:1"):
        Team.made("cuda:1")


def test_lessons_grow(tmp_path):
    seen = []

    class Watched(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            seen.append(tuple(input_ids.shape))
            return super().forward(input_ids, **kwargs)

    how = Episodes(tokens=256, classes=(3, 4), words=(3, 5), keywords=3, vocabulary=SMALL.vocabulary)
    easiest = how.lesson(0)
    assert (easiest.classes, easiest.words, easiest.keywords, easiest.keyword_rate) == ((2, 3), (1, 2), 1, 1)
    assert [how.lesson(i / 4).tokens for i in range(5)] == [64, 64, 64, 128, 256]
    assert how.lesson(1) == how
    recipe = Training(steps=14, batch=2, warmup=0, grow=12 / 14)
    assert [recipe.lesson(step) for step in range(14)] == [0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert Training(grow=0.0).lesson(0) == 4
    train(
        small(max_position_embeddings=256), how, recipe, out=tmp_path, factory=Watched, device="cpu",
        watch=Watch(every=14, evaluate=14, save=14, held_out=2),
    )  # fmt: skip
    assert seen == 10 * [(8, 64)] + 2 * [(4, 128)] + 3 * [(2, 256)]


# The command -------------------------------------------------------------------------------------

SIZES = [
    *(
        "--layers",
        2,
        "--width",
        16,
        "--heads",
        2,
        "-T",
        64,
        "--classes",
        "2-3",
        "--words",
        "2-3",
        "--keywords",
        2,
    ),
    *(
        "--vocabulary",
        32,
        "--label-words",
        8,
        "--steps",
        4,
        "-b",
        2,
        "--warmup",
        2,
        "--evaluate",
        2,
        "--save",
        2,
    ),
    *("--held-out", 4, "--every", 1, "--device", "cpu"),
]


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_help_loads_no_torch():
    code = """
import sys
from typer.testing import CliRunner
from anchors.cli.nsa import app
for verb in ([], ["train"], ["curves"]):
    result = CliRunner().invoke(app, [*verb, "--help"])
    assert result.exit_code == 0, result.output
assert not {"torch", "transformers", "pandas", "matplotlib", "numpy"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("attention", ["full", "nsa"])
def test_the_command_leaves_model_log_and_figure(tmp_path, attention):
    geometry = ["--l", 8, "--d", 4, "--lp", 16, "--n", 3, "--w", 16, "--backend", "reference"]
    out = tmp_path / attention
    result = invoke("train", "-o", out, "--attention", attention, *SIZES, *geometry)
    assert result.exit_code == 0, result.output
    assert "held-out" in result.output
    for name in (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "training/loss.png",
        "training/log.parquet",
    ):
        assert (out / name).is_file(), name
    again = invoke("train", "-o", out, "--attention", attention, *SIZES, *geometry, "--json")
    assert again.exit_code == 0, again.output
    assert '"label_loss"' in again.stdout
    both = invoke("curves", out, "-o", tmp_path / "curves")
    assert both.exit_code == 0, both.output
    assert (tmp_path / "curves.png").is_file()


def test_the_command_trains_on_a_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("so it goes. " * 300, encoding="utf-8")
    result = invoke("train", "-o", tmp_path / "out", "--attention", "full", "--text", path, *SIZES)
    assert result.exit_code == 0, result.output
    log, _ = read_table(tmp_path / "out/training/log.parquet")
    assert set(log["metric"]) == {"text_loss", "learning_rate", "tokens_per_second", "gradient"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "many"], "neither a number nor a range"),
        (["--tokenizer", "x"], "--text"),
        (["--heads", 3], "divided"),
        (["--attention", "none"], "attention"),
        (["--lr", 0], "lr"),
        (["--text", "nowhere.txt"], "cannot be read"),
        (["--device", "abacus"], "abacus"),
        (["--l", 8, "--d", 3], ""),
    ],
)
def test_bad_options_end_in_two(tmp_path, options, message):
    result = invoke("train", "-o", tmp_path / "out", *SIZES, *options)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_curves_do_not_average_what_is_not_alike(tmp_path):
    from typer.testing import CliRunner

    from anchors.cli import app
    from anchors.study.results import write_table

    def left(name, seed, lr):
        table = pd.DataFrame(
            [{"step": 1, "split": "held_out", "metric": "accuracy", "bucket": "all", "value": 0.5}]
        )
        facts = {"model": {"attention": "nsa"}, "data": {}, "recipe": {"seed": seed, "lr": lr}}
        write_table(tmp_path / name / "training" / "log.parquet", table, facts)
        return str(tmp_path / name)

    one, again, other = left("one", 0, 1.0), left("again", 0, 1.0), left("other", 1, 2.0)
    for folder, said in ((again, "both of seed 0"), (other, "differ in their recipe")):
        result = CliRunner().invoke(app, ["nsa", "curves", one, folder, "-o", str(tmp_path / "curves")])
        assert result.exit_code == 2
        assert said in " ".join(result.stderr.split())
