"""Experts of a mixture that a model holds stacked, taken apart into the matrices that another model holds one by one.

Qwen3-MoE's checkpoints have three matrices an expert; Qwen3-VL-MoE's have two tensors a layer, with all experts in them:

    …experts.N.gate_proj.weight [inner, hidden]   ┐  …experts.gate_up_proj [expert, hidden, 2·inner]  as published,
    …experts.N.up_proj.weight   [inner, hidden]   ┘                        [expert, 2·inner, hidden]  in memory and as saved anew
    …experts.N.down_proj.weight [hidden, inner]      …experts.down_proj    [expert, inner, hidden]    as published, or turned

Gate comes before up. Both tensors of a layer say together which way round they are, whatever the sizes. A merge is one of
single matrices in every layout, so that thresholds, masks and singular directions are those of one expert's matrix.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from anchors.errors import AnchorsError

Shape = Sequence[int]

_STACK = re.compile(r"(?P<prefix>.*\blayers\.\d+\..*\bexperts\.)gate_up_proj")


class Slice(NamedTuple):
    """Where a stack holds one matrix of an expert.

    Attributes:
        stack: name of the stacked tensor.
        expert: its number.
        first, last: of the rows, outputs, that are the matrix.
        turned: whether the stack has inputs before outputs.
    """

    stack: str
    expert: int
    first: int
    last: int
    turned: bool

    def of(self, stack: Tensor) -> Tensor:
        """The matrix [out, in], a view into the stack."""
        own = stack[self.expert]
        return (own.T if self.turned else own)[self.first : self.last]


@dataclass(frozen=True)
class Apart:
    """A model's tensors with those of experts one by one.

    Attributes:
        shapes: by name; a stack is not among them, its matrices are.
        slices: by name, the matrices that lie in a stack.
        stacks: by name of a stack, its matrices.
    """

    shapes: Mapping[str, Shape]
    slices: Mapping[str, Slice]
    stacks: Mapping[str, Sequence[str]]

    def taken(self, weights: Mapping[str, Tensor], name: str) -> Tensor:
        """A tensor by its name in `shapes`: of a matrix in a stack, a view."""
        place = self.slices.get(name)
        return weights[name] if place is None else place.of(weights[place.stack])


def apart(shapes: Mapping[str, Shape]) -> Apart:
    """Take stacks of experts apart; what is not understood as one stays a tensor as it is.

    Args:
        shapes: of a model's tensors by name, on disk or in memory.

    Raises:
        AnchorsError: a stack is square, and read one way round or the other.
    """
    slices: dict[str, Slice] = {}
    for name in shapes:
        found = _STACK.fullmatch(name)
        down = f"{found['prefix']}down_proj" if found else ""
        # Gates and ups that alternate, as in GPT-OSS, come with biases.
        if found is None or down not in shapes or f"{name}_bias" in shapes:
            continue
        way = _turned(name, tuple(shapes[name]), tuple(shapes[down]))
        if way is None:
            continue
        inner = shapes[down][1 if way else 2]
        hidden = shapes[down][2 if way else 1]
        for expert in range(shapes[name][0]):
            prefix = f"{found['prefix']}{expert}."
            slices |= {
                f"{prefix}gate_proj.weight": Slice(name, expert, 0, inner, way),
                f"{prefix}up_proj.weight": Slice(name, expert, inner, 2 * inner, way),
                f"{prefix}down_proj.weight": Slice(down, expert, 0, hidden, way),
            }
    if not slices.keys().isdisjoint(shapes):
        slices = {}
    stacks: dict[str, list[str]] = {}
    for name, place in slices.items():
        stacks.setdefault(place.stack, []).append(name)
    sizes = {name: _size(place, shapes[place.stack]) for name, place in slices.items()}
    return Apart(
        {name: shape for name, shape in shapes.items() if name not in stacks} | sizes, slices, stacks
    )


def _turned(name: str, gate_up: Shape, down: Shape) -> bool | None:
    """Whether stacks have inputs before outputs; None where they are no stacks of gates, ups and downs.

    Raises:
        AnchorsError: transformers reads gates and ups by their shape, which is the same both ways.
    """
    if len(gate_up) != 3 or len(down) != 3 or gate_up[0] != down[0]:
        return None
    plain = (gate_up[1], gate_up[2]) == (2 * down[2], down[1])
    turned = (gate_up[1], gate_up[2]) == (down[2], 2 * down[1])
    if turned and gate_up[1] == gate_up[2]:
        raise AnchorsError(
            f"{name} has matrices of {gate_up[1]}×{gate_up[2]}: that outputs are rows or columns cannot be told, and "
            "transformers takes the one way in memory and writes the other.",
            "Load and save the model with transformers 5, which writes outputs as rows in both tensors.",
            code="merge-layout",
        )
    return turned if plain or turned else None


def _size(place: Slice, stack: Shape) -> tuple[int, int]:
    return place.last - place.first, stack[1 if place.turned else 2]
