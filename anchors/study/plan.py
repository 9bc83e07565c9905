"""What is left to do, and about how long it takes: told before anything is measured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from anchors.context import encode
from anchors.model.identity import held
from anchors.model.language import LanguageModel
from anchors.model.routed import Routed, seconds
from anchors.study.engine import Cost, Stretch
from anchors.study.results import Run
from anchors.study.runner import outstanding
from anchors.tasks.drawing import Draw, draw, within_context

if TYPE_CHECKING:
    from anchors.study.prompted import Part

PROMPTS, TOKENS = 8, 48
"""What is timed: a batch of so many prompts of so many tokens."""


@dataclass(frozen=True)
class Outlook:
    """What one study has left to do on one task.

    Attributes:
        analysis, task, shots, control: which; the kind of the study.
        prompts: in all.
        left: of them, those that are not measured yet.
        tokens: that one forward pass of each of those left runs, beside the demonstrations that a seed's prompts share; of
            suites, about all that are run.
        seconds: about how long that takes: tokens · passes, times the time of one token here; of suites prompts, times the time
            of one of a few that are run here, without the merges themselves. Loading and certifying the model come on top. None
            where nobody can tell.
        flop: about how many floating-point operations: 2 · parameters · tokens · passes, of the parameters that every token is
            multiplied with (not of embeddings, and of the head only the last token needs any); without the products of
            attention itself. None where a router chooses among experts. Of suites it is what torch counts on a few prompts, vision
            tower, attention and backward passes among it.
        memory: bytes that are held at least: weights and buffers (of suites of VLM, base and expert), keys and values of the
            longest prompt.
    """

    analysis: str
    task: str
    shots: int
    control: str
    prompts: int
    left: int
    tokens: int
    seconds: float | None
    flop: float | None
    memory: int

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"seconds": None if self.seconds is None else round(self.seconds, 1)}


def outlook(model: LanguageModel, parts: "Sequence[Part]", out: Path) -> list[Outlook]:
    """What is left of each part; nothing is written.

    Args:
        model, parts: what is to be measured.
        out: folder whose `runs` holds the finished batches.

    Raises:
        AnchorsError: see `anchors.study.runner.outstanding`.
    """
    identity, rate, found = model.identity, None, []
    weights, each, cached = held_bytes(model), multiplied(model), cached_bytes(model)
    for part in parts:
        with held(model.model, identity):
            left, total, tokens = outstanding(model, part.analysis, part.task, part.data, part.how, out=out)
        if left and rate is None:
            rate = seconds_per_token(model)
        passes = tokens * part.analysis.passes
        found.append(
            Outlook(
                analysis=part.analysis.kind,
                task=part.task.name,
                shots=part.how.shots,
                control=part.how.control,
                prompts=total,
                left=left,
                tokens=tokens,
                seconds=passes * (rate or 0),
                flop=None if each is None else 2.0 * each * passes,
                memory=weights + cached * longest(model, part),
            )
        )
    return found


def foretold(stretches: Iterable[Stretch], out: Path) -> list[Outlook]:
    """What is left of each stretch of work; nothing is written.

    Args:
        stretches: the work.
        out: folder whose `runs` holds what is finished.
    """
    found = []
    for own in stretches:
        left = own.left(Run.at(out, own.config["kind"], own.config, own.identity))
        cost = own.cost(left) if left else Cost()
        found.append(
            Outlook(
                own.config["kind"], own.task, own.config.get("shots", 0), "none", len(own.units), len(left),
                round(cost.tokens), cost.seconds, cost.flop, own.memory(),
            )
        )  # fmt: skip
        del own
    return found


def by_tokens(model: LanguageModel, tokens: int, passes: float) -> Cost:
    """What so many tokens cost in so many forward passes each, see `Outlook`."""
    each = multiplied(model)
    flop = None if each is None else 2.0 * each * passes * tokens
    return Cost(tokens, passes * tokens * seconds_per_token(model), flop)


def sampled(run: Callable[[], object], tokens: int, count: int, model: Routed) -> Cost:
    """What each of some prompts costs: they are run, their operations counted and their time taken, the better of two.

    Operations are those of products and convolutions, forward and backward, as torch counts them; of kernels of our own it
    sees none.

    Args:
        run: runs them.
        tokens: of all of them.
        count: how many they are.
        model: on whose device.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    took = min(seconds(run, model) for _ in range(2))
    return Cost(tokens, took, counter.get_total_flops()) * (1 / count)


def spread(items: Sequence[Any], size: Callable[[Any], int], count: int = PROMPTS) -> list[Any]:
    """Some of them, from the smallest to the largest."""
    ordered = sorted(items, key=size)
    places = np.linspace(0, len(ordered) - 1, min(count, len(ordered)))
    return [ordered[place] for place in places.round().astype(int)]


def longest(model: LanguageModel, part: "Part") -> int:
    """Tokens of a part's longest prompt."""
    sizes = []
    for seed in part.how.seeds:
        how = Draw(part.how.shots, seed, part.analysis.fresh, part.how.control)
        drawn = draw(part.task, part.data, model.tokenizer, how, part.how.examples, context=model.context)
        sizes += [len(d.prompt.ids) for d in within_context(drawn, model.context, skip=True)[0]]
    return max(sizes, default=0)


def seconds_per_token(model: LanguageModel) -> float:
    """Of a batch, without what other batches share; the best of three."""
    ids = torch.randint(
        model.model.config.get_text_config().vocab_size, (PROMPTS, TOKENS), device=model.device
    )
    last = torch.full((PROMPTS,), TOKENS - 1, device=model.device)

    def forward() -> None:
        with torch.no_grad():
            model.logits_at(ids, last)

    forward()
    return min(seconds(forward, model) for _ in range(3)) / ids.numel()


def multiplied(model: LanguageModel) -> int | None:
    """Parameters that every token is multiplied with: all but embeddings and the head; None where experts are chosen."""
    named = dict(model.model.named_parameters())
    if any("experts" in name for name in named):
        return None
    tables = {
        id(p)
        for m in model.model.modules()
        if isinstance(m, torch.nn.Embedding)
        for p in m.parameters(recurse=False)
    }
    head = model.model.get_output_embeddings()
    tables |= set() if head is None else {id(p) for p in head.parameters()}
    return sum(p.numel() for p in named.values() if id(p) not in tables)


def held_bytes(model: Routed) -> int:
    """Bytes of weights and buffers."""
    every = [*model.model.parameters(), *model.model.buffers()]
    return sum(t.numel() * t.element_size() for t in every)


def cached_bytes(model: LanguageModel) -> int:
    """Bytes of keys and values per token, as a short context holds them."""
    ids = range(1, 9)
    return encode(model, ids).bytes // len(ids)
