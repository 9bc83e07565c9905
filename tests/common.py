"""What all tests share. Shapes in signatures are checked while tests run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import checking

checking.install()

import hypothesis
import pytest
import torch
from families import CONFIGS, make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from anchors.attention.seam import own_attention
from anchors.figures import style
from anchors.model.language import LanguageModel, load
from anchors.study.runner import Cell
from anchors.tasks.data import read
from anchors.tasks.drawing import Draw, draw
from anchors.tasks.prompts import Prompt
from anchors.tasks.task import TASKS

SHARED = Path(__file__).parents[2] / "shared"

Masks = dict[int, Sequence[tuple[int, int]] | torch.Tensor]
"""By layer: pairs (query, key) that are masked out beside the model's own mask, or all that is seen, as booleans."""

# A font's subset as TrueType takes a second; test_looks.py has it done once.
style.mpl.rcParams["pdf.fonttype"] = 3
torch.set_num_threads(1)
# How quickly examples come says something of the machine only.
hypothesis.settings.register_profile(
    "whole", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("whole")


@pytest.fixture
def wrong_types() -> Iterator[None]:
    """See `checking.unchecked`."""
    with checking.unchecked():
        yield


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


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """‖one − other‖ / ‖other‖."""
    return float((one.double() - other.double()).norm() / other.double().norm())


@contextmanager
def masked(lm: LanguageModel, masks: Masks) -> Iterator[None]:
    """The model on transformers' own eager attention, with an additive mask per layer: no seam, no edit of ours."""

    def hook(chosen: Sequence[tuple[int, int]] | torch.Tensor) -> Callable:
        def change(module, args, options):
            mask = options["attention_mask"].clone()
            if isinstance(chosen, torch.Tensor):
                mask[:] = torch.where(chosen, 0.0, torch.finfo(mask.dtype).min)
            else:
                for query, key in chosen:
                    mask[:, :, query, key] = torch.finfo(mask.dtype).min
            return args, options | {"attention_mask": mask}

        return change

    with ExitStack() as stack:
        stack.enter_context(own_attention(lm.model))
        for layer, chosen in masks.items():
            handle = lm.modules[layer].register_forward_pre_hook(hook(chosen), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def plainly(
    lm: LanguageModel,
    ids: Sequence[int],
    masks: Masks | None = None,
    positions: Sequence[int] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One whole prompt through transformers' own eager attention: its last logits, and every attention matrix."""
    tokens = torch.tensor([list(ids)])
    steps = torch.tensor([list(range(len(ids)) if positions is None else positions)])
    with masked(lm, masks or {}):
        output = lm.model(
            input_ids=tokens, position_ids=steps, attention_mask=torch.ones_like(tokens), use_cache=False,
            output_attentions=True,
        )  # fmt: skip
    return output.logits[0, -1], [a[0] for a in output.attentions]


@pytest.fixture
def make_cell(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., Cell]:
    """Prompts of a seed on one set of demonstrations: `make_cell("trec", 4, shots=2)`."""

    def made(name: str = "sst2", examples: int = 3, **options: object) -> Cell:
        spec = TASKS[name]
        data, how = read(spec), Draw(**({"fresh": False} | options))
        return Cell(spec, data, how, tuple(draw(spec, data, tokenizer, how, examples)), tmp_path)

    return made


@pytest.fixture(scope="session")
def shared() -> Path:
    """The given material beside the checkout (datasets, conformance numbers)."""
    if not SHARED.is_dir():
        pytest.skip("the folder shared/ with conformance numbers and data sets is not beside this checkout")
    return SHARED
