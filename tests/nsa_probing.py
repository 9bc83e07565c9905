"""Small models, a prompt and what was measured on them, for the tests of the NSA probe."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from anchors.attention.seam import seam
from anchors.model.language import LanguageModel, load
from anchors.nsa.config import NSAConfig
from anchors.nsa.geometry import Geometry
from anchors.nsa.model import NSAForCausalLM
from anchors.nsa.probing.probe import EpisodeProbe, measure, probe_prompt
from anchors.nsa.probing.taps import Places
from anchors.nsa.training.episodes import Episodes
from anchors.nsa.training.vocabulary import Vocabulary
from anchors.summaries import SUMMARIES
from anchors.tasks.prompts import Prompt

SMALL = Geometry(l=8, d=4, lp=16, n=4, w=16)
WORDS = Vocabulary(8, 64)
EPISODES = Episodes(tokens=170, classes=(2, 3), keywords=3, vocabulary=WORDS)


def save(folder: Path, kind: str) -> Path:
    torch.manual_seed(3)
    config = NSAConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, l=8, d=4, lp=16, n=4, w=16, attention=kind,
    )  # fmt: skip
    model = NSAForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    WORDS.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("nsa"), "nsa")


@pytest.fixture(scope="module")
def lm(folder) -> LanguageModel:
    return load(folder, device="cpu", precision="float64")


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> LanguageModel:
    return load(save(tmp_path_factory.mktemp("full"), "full"), device="cpu", precision="float64")


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    return EpisodeProbe(EPISODES).prompt(0)


@pytest.fixture(scope="module")
def places(prompt) -> Places:
    return Places.of(prompt, np.random.default_rng(0))


@pytest.fixture(scope="module")
def calls(lm, prompt) -> list:
    """The call of every layer."""

    class Keep:
        layers = frozenset(range(2))

        def __init__(self):
            self.found = []

        def see(self, call):
            self.found.append(call)

    keep = Keep()
    with torch.no_grad(), seam(lm.modules, probes=[keep]):
        lm.logits_at(torch.tensor([prompt.ids]), torch.tensor([prompt.target]))
    return keep.found


@pytest.fixture(scope="module")
def found(lm, prompt) -> dict[tuple, float]:
    """The measures of one prompt, by metric, condition, layer, group, head and place."""
    rows, _, _ = probe_prompt(lm, prompt, SMALL, np.random.default_rng(0), interventions=False)
    table = {(m.metric, m.condition, m.layer, m.group, m.head, m.place): m.value for m in rows}
    assert len(table) == len(rows)
    return table


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    model = load(folder, device="cpu")
    return measure(model, EpisodeProbe(EPISODES, prompts=4), out=tmp_path_factory.mktemp("measured"))


@pytest.fixture(scope="module")
def tables(measured) -> dict[str, pd.DataFrame]:
    return SUMMARIES["nsa_probe"](measured.rows)


def same(one: float, other: float) -> None:
    assert one == pytest.approx(other, rel=1e-7, abs=1e-12)
