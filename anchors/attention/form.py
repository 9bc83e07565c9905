"""What every attention call is to the seam, whatever attends: the abstract form, and products per group of heads."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from anchors.attention.edits import Edit
    from anchors.attention.taps import Tap


@dataclass(frozen=True)
class Call(ABC):
    """What a layer hands to the seam, after rotary embedding and cache.

    Its final forms are `anchors.attention.call.AttentionCall` (one pattern) and `anchors.nsa.call.NSACall` (three
    branches). Grouped queries: `heads` counts query heads; query head h reads key-value head h // (heads / kv_heads).

    Attributes:
        layer: index of the layer, counted from 0 in the order in which the layers run.
        q, k, v: queries, keys and values.
        scale: factor on the scores.
        mask: which keys a query sees: boolean (True = sees) or additive; None with `causal` means j <= i.
        causal: whether `mask is None` stands for the causal mask (else: everything is seen).
    """

    layer: int
    q: Float[Tensor, "batch heads query dim"]
    k: Float[Tensor, "batch kv_heads key dim"]
    v: Float[Tensor, "batch kv_heads key dim_v"]
    scale: float
    mask: Tensor | None = None
    causal: bool = True

    @property
    def groups(self) -> int:
        """Query heads per key-value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def past(self) -> int:
        """Keys from a cache, before the first query: query row i stands at position i + past."""
        return self.k.shape[2] - self.q.shape[2]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Scores, patterns and their sums are formed in float32 at least, whatever the weights are."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def visible(self, rows: Int[Tensor, " rows"], keys: slice) -> Bool[Tensor, "rows keys"] | Tensor | None:
        """The mask of some query rows over a range of keys, broadcastable to [batch, heads, rows, keys]."""
        if self.mask is not None:
            return self.mask[..., rows, keys]
        if not self.causal or self.q.shape[2] == 1:
            return None
        columns = torch.arange(keys.start, keys.stop, device=rows.device)
        return columns <= (rows + self.past)[:, None]

    @abstractmethod
    def pattern(self) -> Float[Tensor, "batch heads query key"]:
        """The whole pattern A, materialised: the literal twin of every streamed computation."""

    @abstractmethod
    def pattern_at(self, rows: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows key"]:
        """The rows of the pattern A of some queries of each example."""

    @abstractmethod
    def edited(self, edits: Sequence["Edit"]) -> Float[Tensor, "batch heads query dim_v"]:
        """The output under some edits; literal, so that any derivative is possible.

        Raises:
            AnchorsError: an edit leaves a query without any key, or changes nothing.
        """

    @abstractmethod
    def streamed(self, taps: Sequence["Tap"]) -> Float[Tensor, "batch heads query dim_v"]:
        """The output, with taps shown A ⊙ ∂L/∂A when the loss is differentiated."""

    @property
    @abstractmethod
    def fusable(self) -> bool:
        """Whether `fused` computes exactly this call."""

    @abstractmethod
    def fused(self) -> Float[Tensor, "batch heads query dim_v"]:
        """The output through a kernel that shows no pattern; only where `fusable`."""


def boolean(mask: Tensor) -> Bool[Tensor, "*all"]:
    """What a mask of either kind shows: True = seen."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def biased(
    bias: Float[Tensor, "batch heads query key"], mask: Tensor | None, causal: bool
) -> Float[Tensor, "batch heads query key"]:
    """A bias that a family makes of what it sees (Inkling), and its mask, as one additive mask: both have gradients."""
    if mask is None and causal:
        queries, keys = bias.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=bias.device).tril(keys - queries)
    return bias if mask is None else bias.masked_fill(~boolean(mask), torch.finfo(bias.dtype).min)


def grouped(
    left: Float[Tensor, "batch heads rows inner"],
    right: Float[Tensor, "batch kv_heads inner columns"],
    groups: int,
) -> Float[Tensor, "batch heads rows columns"]:
    """Product of per-query-head matrices with per-key-value-head ones, without repeating the latter."""
    batch, heads, rows, inner = left.shape
    folded = left.reshape(batch, heads // groups, groups * rows, inner)
    return (folded @ right).view(batch, heads, rows, right.shape[-1])


def grouped_transposed(
    left: Float[Tensor, "batch heads rows columns"],
    right: Float[Tensor, "batch heads rows inner"],
    groups: int,
) -> Float[Tensor, "batch kv_heads columns inner"]:
    """Σ over the rows and the query heads of each group of leftᵀ right."""
    batch, heads, rows, columns = left.shape
    shape = (batch, heads // groups, groups * rows)
    return left.reshape(*shape, columns).transpose(-1, -2) @ right.reshape(*shape, right.shape[-1])
