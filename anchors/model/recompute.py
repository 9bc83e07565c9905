"""Blocks that are computed a second time while the loss is differentiated, so that of each only its input is kept.

    forward:   x_{l+1} = block_l(x_l)           without a graph; x_l is kept
    backward:  ∂L/∂x_l = (∂ block_l / ∂x_l)ᵀ ∂L/∂x_{l+1}     after block_l(x_l) has been run again, with its graph

The numbers are the same: a block is run with the same arithmetic, in the same seam. What attention gave is kept beside x_l
where memory allows (`anchors.attention.streaming`), so that only products of weights are computed twice. The literal twin is the
block itself.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import Context, copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from anchors.attention.streaming import Attended, keeping_attention
from anchors.model.alteration import Alteration

Arithmetic = Callable[[], AbstractContextManager[None]]


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, *tensors):
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return tuple(run(*tensors))

    @staticmethod
    def backward(ctx, *slopes):
        held = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
        # Autograd runs this in a thread of its own, which knows nothing of the seam around the forward pass.
        outputs = ctx.run.again(*held)
        wanted = [
            (y, dy) for y, dy in zip(outputs, slopes, strict=True) if dy is not None and y.requires_grad
        ]
        torch.autograd.backward([y for y, _ in wanted], [dy for _, dy in wanted])
        return None, *(x.grad for x in held)


class _Run:
    """One call of a block: what it was given, apart from the tensors that are differentiated."""

    def __init__(
        self, own: Callable[..., Any], arithmetic: Arithmetic, keep: bool, leaves: list[Any], spec: Any
    ) -> None:
        self.keep = keep
        self.own, self.arithmetic, self.spec = own, arithmetic, spec
        self.places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        self.leaves = [None if i in self.places else x for i, x in enumerate(leaves)]
        self.context: Context = copy_context()
        self.kept: Attended = {}

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        with keeping_attention(self.kept if self.keep else None):
            return self._once(*tensors)

    def _once(self, *tensors: Tensor) -> list[Tensor]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, options = tree_unflatten(leaves, self.spec)
        self.made, self.spec_made = tree_flatten(self.own(*args, **options))
        return [x for x in self.made if isinstance(x, Tensor)]

    def returned(self, outputs: Sequence[Tensor]) -> Any:
        """What the block gave, with the tensors that autograd knows."""
        known = iter(outputs)
        made = [next(known) if isinstance(x, Tensor) else x for x in self.made]
        self.made = []
        return tree_unflatten(made, self.spec_made)

    def again(self, *tensors: Tensor) -> list[Tensor]:
        return self.context.run(self._again, *tensors)

    def _again(self, *tensors: Tensor) -> list[Tensor]:
        with torch.enable_grad(), self.arithmetic():
            outputs = self(*tensors)
        self.made = []  # their graph, and all that it holds, must end with the block
        return outputs


def _forward(own: Callable[..., Any], arithmetic: Arithmetic, keep: bool, *args: Any, **options: Any) -> Any:
    leaves, spec = tree_flatten((args, options))
    run = _Run(own, arithmetic, keep, leaves, spec)
    if not run.places or not torch.is_grad_enabled():
        return own(*args, **options)
    outputs = _Twice.apply(run, *(leaves[place] for place in run.places))
    return run.returned(outputs)


def blocks_of(model: nn.Module, attentions: Sequence[nn.Module]) -> list[nn.Module]:
    """The block around each attention: the outermost module of a list that holds this one and no other.

    Empty where some attention stands in no such block.
    """
    found: dict[nn.Module, nn.Module] = {}
    known = set(attentions)
    for parts in model.modules():
        for block in parts if isinstance(parts, nn.ModuleList) else ():
            inside = [part for part in block.modules() if part in known]
            if len(inside) == 1:
                found.setdefault(inside[0], block)
    return list(found.values()) if len(found) == len(known) else []


@contextmanager
def recomputing(blocks: Sequence[nn.Module], arithmetic: Arithmetic, *, keep: bool = True) -> Generator[None]:
    """Run some blocks a second time in the backward pass.

    Args:
        blocks: see `blocks_of`.
        arithmetic: in which both runs compute.
        keep: what attention gave, from the first run to the second.
    """
    altered = [
        Alteration.of(block, "forward", partial(_forward, block.forward, arithmetic, keep))
        for block in blocks
    ]
    for alteration in altered:
        alteration.do()
    try:
        yield
    finally:
        for alteration in altered:
            alteration.undo()
