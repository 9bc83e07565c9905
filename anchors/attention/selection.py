"""Sparse indices as masks.

Some families choose for every query which keys it may see (DeepSeek-V3.2's sparse attention and its kin), or which
blocks of keys (MiniMax-M3). transformers folds the choice into the mask for its eager and sdpa attention; to any other
attention function it hands the indices, for kernels of its own. Here they become the same mask.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from anchors.errors import RoutingError


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
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen & chosen


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
