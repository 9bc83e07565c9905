"""Sparse indices as masks.

Some families choose for every query which keys it may see (DeepSeek-V3.2's sparse attention and its kin), or which
blocks of keys (MiniMax-M3). transformers folds the choice into the mask for its eager and sdpa attention; to any other
attention function it hands the indices, for kernels of its own. Here they become the same mask.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anchors.attention.form import boolean
from anchors.errors import AnchorsError, RoutingError


def chosen_keys(
    indices: Int[Tensor, "batch query top"], mask: Tensor | None, keys: int
) -> Bool[Tensor, "batch #heads query keys"]:
    """The keys that are both chosen and seen: where fewer than k are seen, the indices name unseen ones, too.

    Raises:
        RoutingError: no mask, or indices of another shape.
    """
    if mask is None or indices.dim() != 3:
        raise RoutingError(
            f"A sparse index of shape {list(indices.shape)} came {'without a' if mask is None else 'with its'} mask.",
            "This family needs support in anchors/attention/selection.py.",
        )
    chosen = indices.new_zeros((*indices.shape[:2], keys), dtype=torch.bool)
    chosen = chosen.scatter(-1, indices.long(), True)[:, None]
    return boolean(mask) & chosen


def chosen_blocks(
    module: nn.Module,
    indices: Int[Tensor, "batch index_heads query top"],
    mask: Tensor | None,
    keys: int,
    positions: Int[Tensor, "#batch query"] | None,
) -> Bool[Tensor, "batch heads query keys"]:
    """The keys of chosen blocks that are seen, by the family's own translation; a choice per group of heads.

    Raises:
        RoutingError: the module has no such translation.
    """
    translate = getattr(getattr(module, "indexer", None), "build_block_mask", None)
    if translate is None:
        raise RoutingError(
            f"{type(module).__name__} hands a sparse index of blocks to its attention without saying which keys they hold.",
            "This family needs support in anchors/attention/selection.py.",
        )
    queries = indices.shape[2]
    if positions is None:
        positions = torch.arange(keys - queries, keys, device=indices.device)[None]
    positions = (positions if positions.dim() > 1 else positions[None]).expand(indices.shape[0], -1)
    return translate(indices, mask, keys, torch.float32, indices.device, positions) == 0


class _Untied(TorchFunctionMode):
    """Looks at every top-k: the last one that is chosen must score higher than the first one that is not."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.topk, torch.Tensor.topk):
            scores, k = args[0], args[1] if len(args) > 1 else (kwargs or {})["k"]
            if k < scores.shape[-1]:
                last, next_ = scores.topk(k + 1, dim=-1).values[..., -2:].unbind(-1)
                if ((last == next_) & (next_ > torch.finfo(scores.dtype).min / 2)).any():
                    raise AnchorsError(
                        f"This model's choice of keys scores some alike at the edge of its top {k}: which of them a "
                        "query reads depends on how many tokens are run with it, in the model itself. Demonstrations "
                        "cannot be run once and shared by many queries.",
                        "Use flow or view, which run every prompt as a whole and alone, or prompts below the top-k.",
                        code="no-shared-context",
                    )
        return func(*args, **(kwargs or {}))


@contextmanager
def untied(model: nn.Module) -> Generator[None]:
    """Refuse choices of keys that are a matter of chance.

    DeepSeek's index clips its scores at 0, and an untrained Doge scores all keys alike; torch.topk then chooses by the
    number of keys, and a prompt is another one with later tokens behind it.

    Raises:
        AnchorsError: inside, when two keys at the edge of a top-k score alike.
    """

    def guarded(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        with _Untied():
            return forward(*args, **kwargs)

    with ExitStack() as stack:
        for module in model.modules():
            chooser = module if hasattr(module, "keep_window_size") else getattr(module, "indexer", None)
            if isinstance(chooser, nn.Module):
                chooser.forward = partial(guarded, chooser.forward)
                stack.callback(delattr, chooser, "forward")
        yield
