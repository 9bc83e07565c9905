"""Train a small causal language model, on episodes or on text: AdamW, cosine schedule, checkpoints to go on from.

The loss of a batch is the mean over its label words plus `text_weight` times the mean over its other tokens. Every
random number is a function of the seed and the step, so a training that is broken off and started again goes on as if
nothing had happened; on a CPU to the bit. Under `accelerate launch` the rows of a batch are divided among processes,
and the gradients are those of the whole batch.
"""

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from anchors.errors import AnchorsError, demand_seed
from anchors.nsa.training.checkpoint import TrainingFolder, begin, digest
from anchors.nsa.training.data import Corpus, Sequences
from anchors.study.results import provenance, require_writable
from anchors.training import LARGEST, State, Team, arithmetic, claim, take_steps

Factory = Callable[[PreTrainedConfig], PreTrainedModel]
Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)

BETAS = (0.9, 0.95)
LESSONS = 4
"""Stages in which the data grows harder."""
_FREE = ("backend", "dtype", "torch_dtype", "transformers_version", "architectures", "_name_or_path")
"""Entries of a configuration that a training may change its mind about."""


@dataclass(frozen=True)
class Training:
    """What a training's numbers depend on, beside the model and the data.

    Attributes:
        steps: of the optimizer; the schedule ends there.
        batch: sequences per step, over all processes.
        lr: highest learning rate, reached after `warmup` steps.
        last_lr: what is left of it at the end, as a share.
        warmup: steps of linear warm-up.
        weight_decay: on matrices; not on norms and biases.
        clip: longest gradient.
        text_weight: of tokens that are no label words, where there are label words.
        seed: of weights and data.
        grow: share of the steps in which the data grows harder, in `LESSONS` stages; 0 for none.
    """

    steps: int = 2000
    batch: int = 32
    lr: float = 1e-3
    last_lr: float = 0.1
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    text_weight: float = 0.1
    seed: int = 0
    grow: float = 0.4

    def __post_init__(self) -> None:
        demand_seed(self.seed)
        bounds: dict[str, tuple[Callable[[float], bool], str]] = {
            "steps batch": (lambda x: x >= 1, "at least 1"),
            "warmup weight_decay text_weight": (
                lambda x: 0 <= x <= LARGEST,
                "at least 0, and a number of float32",
            ),
            "lr clip": (lambda x: 0 < x <= LARGEST, "above 0, and a number of float32"),
            "grow": (lambda x: 0 <= x <= 1, "a share of the steps, from 0 to 1"),
            "last_lr": (lambda x: 0 <= x <= 1, "a share of the highest learning rate, from 0 to 1"),
        }
        for names, (right, what) in bounds.items():
            for name in names.split():
                if not right(getattr(self, name)):
                    raise AnchorsError(
                        f"{name} is {getattr(self, name)}; it must be {what}.", code="option-value"
                    )

    def lesson(self, step: int) -> int:
        """The stage of a step, from 0 on; `LESSONS` once the data is as hard as it is to be."""
        end = self.grow * self.steps
        if step >= end:
            return LESSONS
        # Half of the time for the first: there the model learns to answer in context at all.
        return 0 if 2 * step < end else 1 + int((LESSONS - 1) * (2 * step / end - 1) + 1e-9)

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0 on."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.last_lr + (1 - self.last_lr) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Watch:
    """What is looked at, and how often; no number of the training depends on it.

    Attributes:
        every: steps between rows of the log.
        evaluate: steps between evaluations.
        save: steps between checkpoints.
        held_out: sequences of an evaluation.
        dtype: of the weights that are published.
    """

    every: int = 20
    evaluate: int = 200
    save: int = 500
    held_out: int = 64
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("every", "evaluate", "save", "held_out"):
            if getattr(self, name) < 1:
                raise AnchorsError(
                    f"{name} is {getattr(self, name)}; it must be at least 1.", code="option-value"
                )


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        folder: the model, as `from_pretrained` and `anchors --model` take it.
        log: columns step, split (train, held_out), metric, bucket, value.
        facts: the provenance.
    """

    folder: Path
    log: pd.DataFrame
    facts: dict[str, Any]

    def last(self, metric: str, bucket: str = "all", split: str = "held_out") -> float:
        """The last value of a metric."""
        log = self.log
        own = log[(log["metric"] == metric) & (log["bucket"] == bucket) & (log["split"] == split)]
        return float(own.sort_values("step")["value"].iloc[-1]) if len(own) else math.nan


def train(
    config: PreTrainedConfig,
    data: Corpus,
    recipe: Training | None = None,
    *,
    out: Path,
    watch: Watch | None = None,
    device: str = "auto",
    factory: Factory | None = None,
    init: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a model, or go on where the training in `out` was broken off.

    SIGINT and SIGTERM end it after the step that it is in, with a checkpoint of that step; of several processes after the
    next row of the log.

    Args:
        config: of the model; its vocabulary must have the size of the data's tokenizer.
        data: episodes or windows of a text.
        recipe: how to train.
        out: folder of the model.
        watch: how often to look.
        device: auto, cpu, cuda, cuda:1, mps; with several processes each has its own.
        factory: from configuration to model; `NSAForCausalLM` by default.
        init: folder of a model to begin with, instead of new weights: a curriculum is one training after another.
        progress: told (steps done, steps).

    Raises:
        AnchorsError: sizes that do not fit, a folder of another training, or a training that diverges.
        Interrupted: a signal asked for the end; says which step is kept.
    """
    recipe, watch, out = recipe or Training(), watch or Watch(), Path(out)
    if not config.initializer_range > 0:  # NaN and what is above 1 is refused by the configuration itself
        raise AnchorsError(
            f"New weights of standard deviation {config.initializer_range} make no training.",
            "Take an initializer_range above 0, such as 0.02.",
            code="option-value",
        )
    tokenizer = data.tokenizer()
    if config.vocab_size != len(tokenizer):
        raise AnchorsError(
            f"The model has a vocabulary of {config.vocab_size} tokens, the data's tokenizer {len(tokenizer)}.",
            f"Take vocab_size={len(tokenizer)}.",
            code="tokenizer",
        )
    if data.tokens > config.max_position_embeddings:
        raise AnchorsError(
            f"Sequences have {data.tokens} tokens, the model positions for {config.max_position_embeddings}.",
            f"Take max_position_embeddings={data.tokens}, or shorter sequences.",
            code="length",
        )
    team = Team.made(device)
    team.share(recipe.batch)
    described = {k: v for k, v in config.to_dict().items() if k not in _FREE}
    begun = None if init is None else {"folder": Path(init).name, "weights": digest(Path(init))}
    identity = {"model": described, "data": data.facts(), "recipe": asdict(recipe), "init": begun}
    facts = provenance(**identity, processes=team.size, device=team.name)
    checkpoint = TrainingFolder(out)
    checkpoint.check(identity)
    if team.main:
        require_writable(out)

    if factory is None:
        from anchors.nsa.model import NSAForCausalLM

        factory = cast(Factory, NSAForCausalLM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = factory(config)
    if init is not None:
        begin(model, Path(init))
    model = model.float().to(team.device).train()
    mend = "train again elsewhere with a lower --lr, a longer --warmup, a smaller --clip or --init"
    state = State(checkpoint.state, dict(model.named_parameters()), _optimizer(model, recipe), mend)
    start = state.restore()
    kept, feed = Log(checkpoint.rows(start[0])), _batches(data, recipe, start[0], team)
    if start[0] == recipe.steps:
        log.info("nothing left to compute: all %d steps are kept in %s", recipe.steps, out)

    def look(now: int, values: Float[np.ndarray, "steps 6"], speed: float) -> None:
        kept.training(now, values, recipe.rate(now - 1), speed * recipe.batch * data.tokens)
        if now % watch.evaluate == 0 or now == recipe.steps:
            kept.add(now, "held_out", evaluate(model, data, recipe, watch.held_out))

    def keep(now: int, unlogged: list[Tensor]) -> None:
        if team.main:
            claim(checkpoint.identity, identity)
            checkpoint.save(
                model, state, now, kept.table(), facts, unlogged, tokenizer=tokenizer, dtype=watch.dtype
            )

    take_steps(
        state,
        lambda _: _sums(model, next(feed), team.device),
        lambda own, total: _loss(own, total, recipe.text_weight),
        lambda step: [recipe.rate(step)] * 2,
        steps=recipe.steps,
        clip=recipe.clip,
        team=team,
        start=start,
        due=lambda now: not all(now % often for often in (watch.every, watch.evaluate, watch.save)),
        look=look,
        save=watch.save,
        keep=keep,
        told=lambda now: progress(now, recipe.steps) if progress is not None else None,
    )
    return Trained(out, kept.table(), facts)


def _batches(data: Corpus, recipe: Training, first: int, team: Team) -> Iterator[Sequences]:
    """This process's share of every batch, made one step ahead."""
    lessons = [data.lesson(i / LESSONS) for i in range(LESSONS)] + [data]
    # Of shorter sequences more, so that the tokens stay as many.
    counts = [recipe.batch * (data.tokens // own.tokens) for own in lessons]
    most = max(counts)

    def made(step: int) -> Sequences:
        own, share = lessons[recipe.lesson(step)], team.share(counts[recipe.lesson(step)])
        return own.rows(
            recipe.seed, range(step * most + share.start, step * most + share.stop)
        )  # no number is used twice

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(made, first)
        for step in range(first, recipe.steps):
            rows = ahead.result()
            if step + 1 < recipe.steps:
                ahead = pool.submit(made, step + 1)
            yield rows


def _sums(model: nn.Module, rows: Sequences, device: torch.device) -> Float[Tensor, "5"]:
    """Over rows: label loss, label words, text loss, other tokens, hits. They stay on the device."""
    where = _on(rows.labels, device)[:, 1:]
    nll, hits = losses(model, _on(rows.ids, device))
    return torch.stack(
        [(nll * where).sum(), where.sum(), (nll * ~where).sum(), (~where).sum(), (hits & where).sum()]
    )


def _loss(own: Float[Tensor, "5"], total: Float[Tensor, "5"], text_weight: float) -> Float[Tensor, ""]:
    """The mean over the label words of a batch, and of its other tokens, of which these are some."""
    weight = torch.where(total[1] > 0, text_weight, 1.0)
    return own[0] / total[1].clamp(min=1) + weight * (own[2] / total[3].clamp(min=1))


def losses(
    model: nn.Module, ids: Int[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "batch next"], Bool[Tensor, "batch next"]]:
    """For every token but the first: -log p, and whether it is the most probable one. bf16 products on CUDA."""
    with arithmetic(ids.device):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nll = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nll.view(ids.shape[0], -1), logits.argmax(-1) == ids[:, 1:]


@torch.no_grad()
def evaluate(model: nn.Module, data: Corpus, recipe: Training, count: int) -> dict[tuple[str, str], float]:
    """Held-out sequences: loss, accuracy on label words, and what could be known, by (metric, bucket).

    Buckets are numbers of the demonstration a label word belongs to, doubling: 1, 2-3, 4-7, …; `last` is the last one
    of each sequence, `all` is all.
    """
    device = next(model.parameters()).device
    model.eval()
    parts = []
    for start in range(0, count, recipe.batch):
        rows = data.rows(recipe.seed, range(start, min(start + recipe.batch, count)), held_out=True)
        nll, hits = losses(model, _on(rows.ids, device))
        parts.append((rows, nll.cpu().double().numpy(), hits.cpu().numpy()))
    model.train()
    nll, hit = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    where, known, number = (
        np.concatenate([getattr(part[0], name)[:, 1:] for part in parts])
        for name in ("labels", "knowable", "numbers")
    )
    found = {("text_loss", "all"): float(nll[~where].mean())}
    if not where.any():
        return found
    last = where & (number == np.where(where, number, -1).max(axis=1, keepdims=True))
    masks = {"all": where, "last": last}
    for power in range(int(number[where].max() + 1).bit_length()):
        low, high = 2**power, 2 ** (power + 1) - 1
        inside = where & (number + 1 >= low) & (number + 1 <= high)
        if inside.any():
            masks[str(low) if low == high else f"{low}-{high}"] = inside
    for bucket, mask in masks.items():
        found["label_loss", bucket] = float(nll[mask].mean())
        found["accuracy", bucket] = float(hit[mask].mean())
        found["knowable", bucket] = float(known[mask].mean())
    return found


class Log:
    """Rows of a training, so far."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def training(self, step: int, values: Float[np.ndarray, "steps 6"], rate: float, speed: float) -> None:
        """Means over the steps since the last row."""
        label, labels, text, others, hits, norm = values.sum(axis=0)
        found = {"text_loss": text / others, "learning_rate": rate, "tokens_per_second": speed}
        found["gradient"] = norm / len(values)
        if labels:
            found |= {"label_loss": label / labels, "accuracy": hits / labels}
        self.add(step, "train", {(metric, "all"): value for metric, value in found.items()})

    def add(self, step: int, split: str, found: dict[tuple[str, str], float]) -> None:
        self.rows += [
            {"step": step, "split": split, "metric": metric, "bucket": bucket, "value": float(value)}
            for (metric, bucket), value in found.items()
        ]

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=["step", "split", "metric", "bucket", "value"])


def _optimizer(model: nn.Module, recipe: Training) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=BETAS, fused=parameters[0].is_cuda)


def _on(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # from pinned memory the copy does not wait for the device
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
