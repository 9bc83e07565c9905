"""What is left to do, and what it costs: told before anything is measured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from anchors.model.identity import held
from anchors.model.language import LanguageModel
from anchors.model.routed import Routed, seconds
from anchors.study.analysis import Costs, Pass, Sizes, costs_of
from anchors.study.cost import Cost, Peak, rounded
from anchors.study.engine import Spent, Stretch, Unit
from anchors.study.results import Run
from anchors.study.runner import batches, pending, width

if TYPE_CHECKING:
    from anchors.study.prompted import Part

PROMPTS = 8
"""Prompts of a suite that are run to see what one costs."""


@dataclass(frozen=True)
class Outlook:
    """What one study has left to do on one task.

    Attributes:
        analysis, task, shots, control: which; the kind of the study.
        prompts: in all.
        left: of them, those that are not measured yet.
        tokens: that one forward pass of each of those left runs, beside the demonstrations that a seed's prompts share; of
            suites, about all that are run.
        seconds: about how long that takes here; of suites prompts, times the time of one of a few that are run, without the merges
            themselves. Loading and certifying the model come on top. None where nobody can tell.
        flop: about how many floating-point operations, those of products (see `anchors.study.cost`); of suites what torch counts on
            a few prompts. None where nobody can tell.
        peak: about how many bytes are held at the most, by what they are (of suites the weights of VLM, base and expert alone);
            None where nobody can tell.
        batches: the largest batch, as prompts × tokens + those of the demonstrations they share; empty where nothing is left.
        attention: what runs it: `kernel` (torch's), `tiles`, or `triton`.
    """

    analysis: str
    task: str
    shots: int
    control: str
    prompts: int
    left: int
    tokens: int
    seconds: float | None = None
    flop: float | None = None
    peak: Peak | None = None
    batches: str = ""
    attention: str = ""

    @property
    def memory(self) -> int:
        """About how many bytes are held at the most; 0 where nobody can tell."""
        return 0 if self.peak is None else self.peak.total

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        seconds = None if self.seconds is None else round(self.seconds, 1)
        peak = None if self.peak is None else self.peak._asdict()
        return asdict(self) | {"seconds": seconds, "memory": self.memory, "peak": peak}


def outlook(
    model: LanguageModel, parts: "Sequence[Part]", out: Path, cost: Cost | None = None
) -> list[Outlook]:
    """What is left of each part; nothing is written.

    Args:
        model, parts: what is to be measured.
        out: folder whose `runs` holds the finished batches.
        cost: of the model, so that several outlooks time its passes once.

    Raises:
        AnchorsError: see `anchors.study.runner.pending`.
    """
    cost, found = cost or Cost(model), []
    identity, _ = cost.read
    for part in parts:
        analysis, task, how = part.analysis, part.task, part.how
        with held(model.model, identity):
            cells = pending(model, analysis, task, part.data, how, out=out)
        whole, largest, spent = [], None, []
        for units, left in cells:
            own = []
            for batch in batches(model, analysis, units, left, how.batch_size):
                sizes = _sizes(model, part, [units[unit] for unit in batch])
                largest = max(largest or sizes, sizes, key=lambda s: s.rows * s.tokens)
                own.append(costs_of(analysis, sizes))
            if own:
                spent += [p for costs in own for p in costs.batch]
                spent += own[0].once
                whole += own
        found.append(
            Outlook(
                analysis.kind,
                task.called,
                how.shots,
                how.control,
                prompts=sum(len(units) for units, _ in cells),
                left=sum(len(left) for _, left in cells),
                tokens=sum(width(analysis, units[unit]) for units, left in cells for unit in left),
                batches=_said(largest),
                **_priced(cost, spent, whole),
            )
        )
    return found


def foretold(
    stretches: Iterable[Stretch],
    out: Path,
    model: LanguageModel | None = None,
    passes: Callable[[Unit], Sequence[Pass]] | None = None,
) -> list[Outlook]:
    """What is left of each stretch of work; nothing is written.

    Args:
        stretches: the work.
        out: folder whose `runs` holds what is finished.
        model, passes: by which time, operations and memory are foretold, and what it runs for a unit, the longest prompt first;
            without them the stretch's own `cost` and `memory` tell.
    """
    found = []
    for own in stretches:
        left = own.left(Run.at(out, own.config["kind"], own.config, own.identity))
        if model is None or passes is None:
            told = own.cost(left) if left else Spent()
            tokens, peak = round(told.tokens), Peak(weights=own.memory()) if own.memory() else None
            priced: dict[str, Any] = {"seconds": told.seconds, "flop": told.flop, "peak": peak}
        else:
            spent = [tuple(passes(unit)) for unit in left]
            tokens = sum(unit[0].tokens for unit in spent)
            priced = _priced(
                Cost(model), [p for unit in spent for p in unit], [Costs(unit) for unit in spent]
            )
        found.append(
            Outlook(
                own.config["kind"], own.task, own.config.get("shots", 0), "none", len(own.units), len(left),
                tokens, **priced,
            )
        )  # fmt: skip
        del own
    return found


def of_prompt(model: LanguageModel, task: str, tokens: int, times: int = 1) -> Outlook:
    """What the flow of one prompt of so many tokens costs, measured so often."""
    p = Pass(tokens, times=times, backward=True)
    priced = _priced(Cost(model), [p], [Costs((p,))])
    return Outlook("flow", task, 0, "none", 1, 1, tokens, batches=f"1 × {tokens}", **priced)


def _sizes(model: LanguageModel, part: "Part", drawn: Sequence[Any]) -> Sizes:
    prompt, widths = drawn[0].prompt, [width(part.analysis, d) for d in drawn]
    shared = 0 if part.analysis.fresh else prompt.query
    anchors = sum(role in ("label", "format") for role in prompt.roles[:shared])
    classes = len(part.task.labels)
    return Sizes(
        model.n_layers,
        classes,
        shared,
        max(widths),
        len(drawn),
        len(set(widths)),
        anchors,
        round(sum(widths) / len(widths)),
        model.beside_attention is not None,
    )


def _said(sizes: Sizes | None) -> str:
    if sizes is None:
        return ""
    return f"{sizes.rows} × {sizes.tokens}" + (f" + {sizes.shared}" if sizes.shared else "")


def _priced(cost: Cost, spent: Sequence[Pass], whole: Sequence[Costs]) -> dict[str, Any]:
    """Seconds, operations and memory of passes; the memory of what is held beside them, too."""
    work = [cost.flop(p) for p in spent]
    peaks = [cost.peak(p, costs.held) for costs in whole for p in (*costs.once, *costs.batch)]
    flow = any(p.backward and not p.edited for p in spent)
    return {
        "seconds": _seconds(cost, spent) + cost.read[1] if spent else 0.0,
        "flop": sum(p.times * w for p, w in zip(spent, work, strict=True) if w is not None)
        if None not in work
        else None,
        "peak": max(peaks, key=lambda peak: peak.total, default=None),
        "attention": ("triton" if cost.fused else "tiles") if flow else "kernel" if spent else "",
    }


def _seconds(cost: Cost, spent: Sequence[Pass]) -> float:
    """Of each kind of passes the one of median work is timed; the others take as long as their work says."""
    kinds: dict[tuple, list[tuple[float, Pass]]] = {}
    for p in spent:
        kind = (rounded(p.past), p.backward, p.edited, p.kept)
        kinds.setdefault(kind, []).append((cost.flop(p) or float(p.rows * p.tokens), p))
    total = 0.0
    for own in kinds.values():
        own.sort()
        work, middle = own[len(own) // 2]
        total += cost.seconds(middle) * sum(w * p.times for w, p in own) / work
    return total


def held_bytes(model: Routed) -> int:
    """Bytes of weights and buffers."""
    every = [*model.model.parameters(), *model.model.buffers()]
    return sum(t.numel() * t.element_size() for t in every)


def sampled(run: Callable[[], object], tokens: int, count: int, model: Routed) -> Spent:
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
    return Spent(tokens, took, counter.get_total_flops()) * (1 / count)


def spread(items: Sequence[Any], size: Callable[[Any], int], count: int = PROMPTS) -> list[Any]:
    """Some of them, from the smallest to the largest."""
    ordered = sorted(items, key=size)
    places = np.linspace(0, len(ordered) - 1, min(count, len(ordered)))
    return [ordered[place] for place in places.round().astype(int)]
