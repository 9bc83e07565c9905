"""A model in parts: on disk, or on two cards, every study's rows are those of the model in one place."""

import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from families import make
from gpu import needs_cuda
from transformers import AutoModelForCausalLM, AutoTokenizer

import anchors
from anchors.model.language import LanguageModel
from anchors.model.preparation import undone
from anchors.study.analysis import Analysis

STUDIES = (
    anchors.InformationFlow(),
    anchors.Isolation(layers=(1,)),
    anchors.Readout(),
    anchors.Classification(),
    anchors.Causal(),
    anchors.Compression(),
    anchors.Diagnosis(components=(2,)),
    anchors.Reweighting(epochs=1, per_class=1),
)
AROUND = {
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"),
    "llama": ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"),
}
BLOCKS = {"gpt2": "transformer.h.", "llama": "model.layers."}


@pytest.fixture(scope="module", params=BLOCKS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    make(request.param, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(lm: LanguageModel, study: Analysis) -> pd.DataFrame:
    task = anchors.task("sst2")
    return anchors.measure(lm, study, task, anchors.read(task), anchors.Sample(examples=4)).rows


def spread(folder: Path, first: int | str, second: int | str) -> LanguageModel:
    """Block 0 and all that stands before and behind the blocks in one place, the other blocks in another."""
    block = BLOCKS[folder.name]
    names = AROUND[folder.name]
    places = dict.fromkeys(names, first) | {f"{block}{i}": second if i else first for i in range(3)}
    return anchors.load(folder, device_map=places, precision="float32")


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.kind)
def test_blocks_on_disk(saved: Path, study: Analysis) -> None:
    pytest.importorskip("accelerate")
    same(rows(anchors.load(saved, device="cpu"), study), rows(spread(saved, "cpu", "disk"), study))


def test_hooks_stand_on_blocks_only(saved: Path) -> None:
    """accelerate hooks every submodule; without those inside of blocks the model is the same, and undone it is as it was."""
    accelerate = pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(saved)
    block = BLOCKS[saved.name]
    places = dict.fromkeys(AROUND[saved.name], "cpu") | {
        f"{block}{i}": "disk" if i == 2 else "cpu" for i in range(3)
    }
    with tempfile.TemporaryDirectory() as folder:
        accelerate.dispatch_model(model, places, offload_dir=folder, force_hooks=True)
        before = hooked(model)
        assert any(name.startswith(f"{block}0.") for name in before)
        ids = torch.arange(5, 25)[None]
        expected = model(ids).logits
        tokenizer = AutoTokenizer.from_pretrained(saved)
        lm = anchors.load(model, tokenizer=tokenizer, precision="float32")
        left = hooked(model)
        torch.testing.assert_close(lm.model(ids).logits, expected, rtol=0, atol=1e-5)
        assert {f"{block}{i}" for i in (0, 1)} <= left
        assert not any(name.startswith((f"{block}0.", f"{block}1.")) for name in left)
        fetched = {name for name in before if name.startswith(f"{block}2")}
        assert fetched
        assert fetched <= left
        with undone(lm.altered):
            assert hooked(model) == before
            assert torch.equal(model(ids).logits, expected)


def hooked(model: torch.nn.Module) -> set[str]:
    return {
        name
        for name, part in model.named_modules()
        if "_hf_hook" in vars(part) and "_old_forward" in vars(part)
    }


@needs_cuda
@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.kind)
def test_two_cards(saved: Path, study: Analysis) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    whole = anchors.load(saved, device="cuda", precision="float32")
    same(rows(whole, study), rows(spread(saved, 0, 1), study))


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    """Metric by metric, by the size of its values; the certificate's own error is nothing but rounding."""
    assert len(one) == len(other) > 0
    for name in one.columns:
        if one[name].dtype.kind != "f":
            assert list(one[name]) == list(other[name]), name
    for metric, a in one[one["metric"] != "identity_error"].groupby("metric")["value"]:
        assert a.isna().equals(other.loc[a.index, "value"].isna()), metric
        apart = float((a - other.loc[a.index, "value"]).abs().max() / a.abs().max())
        allowed = 1e-4 if metric in ("follow", "shift") else 1e-5  # shares of a difference of logits
        assert not apart > allowed, (metric, apart)
