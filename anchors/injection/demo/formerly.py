"""Functions of 0.4.0 that nothing here calls any more, for those who do: `anchors._names.forwarding` leads to them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anchors.injection.demo.scales import Scale, Stage
from anchors.injection.demo.training import Told, answer_sums, fit_stage
from anchors.training import Team, arithmetic


def answer_loss(*given: Any) -> Tensor:
    """Mean -log p over the tokens of answers and their ends, of what `answer_sums` is given."""
    return torch.div(*answer_sums(*given))


def fit(
    groups: Sequence[tuple[list[nn.Parameter], float]],
    loss: Callable[[int], Tensor],
    stage: Stage,
    scale: Scale,
    told: Told,
    unfinished: Path,
) -> None:
    """`fit_stage` of a loss that is a mean, in one process."""
    device = groups[0][0][0].device

    def sums(step: int) -> Tensor:
        with arithmetic(device):
            value = loss(step)
        return torch.stack([value, torch.ones_like(value)])

    fit_stage(groups, sums, stage, scale, told, unfinished, Team(device))
