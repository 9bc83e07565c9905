"""What all tests share. Shapes in signatures are checked while tests run."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook(["anchors.attention", "anchors.flow", "anchors.models"], "beartype.beartype")

import pytest
import torch
from families import CONFIGS, make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from anchors.models import LanguageModel, load
from anchors.tasks.data import read
from anchors.tasks.drawing import Draw, draw
from anchors.tasks.prompts import Prompt
from anchors.tasks.task import TASKS

SHARED = Path(__file__).parents[2] / "shared"


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the built-in texts, in which every label word but one is one token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    texts = [e.text for task in TASKS.values() for part in (read(task).train, read(task).test) for e in part]
    frames = [task.template for task in TASKS.values()]
    labels = [f"a {word}" for task in TASKS.values() for word in task.labels if word != "Abbreviation"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>"]
    )
    raw.train_from_iterator(texts + 200 * (labels + frames), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="session", params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def lm(family: str, tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    """A tiny random model of each family, on the seam."""
    return load(make(family, len(tokenizer)), tokenizer=tokenizer, device="cpu")


@pytest.fixture(scope="session")
def gpt2(tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    return load(make("gpt2", len(tokenizer)), tokenizer=tokenizer, device="cpu")


@pytest.fixture(scope="session")
def prompts(tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
    """Three prompts of different lengths with two label words each."""
    task = TASKS["sst2"]
    return [d.prompt for d in draw(task, read(task), tokenizer, Draw(), 3)]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny GPT-2 as a directory, for everything that starts from the command line."""
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    model = make("gpt2", len(tokenizer))
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The given material beside the checkout (datasets, conformance numbers)."""
    if not SHARED.is_dir():
        pytest.skip("the folder shared/ with conformance numbers and data sets is not beside this checkout")
    return SHARED
