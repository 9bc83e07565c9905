"""One attention call, with everything that differs between families kept here and nowhere else.

    scores_ij  = scale · ⟨q_i, k_j⟩,  soft-capped to c · tanh(scores / c) where the family does so
    A_ij       = exp(scores_ij + mask_ij) / (Σ_j' exp(scores_ij' + mask_ij') + exp(sink))
    z_i        = Σ_j A_ij v_j

Grouped queries: `heads` counts query heads; query head h reads key-value head h // (heads / kv_heads).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anchors.errors import AnchorsError

if TYPE_CHECKING:
    from anchors.attention.edits import Edit
    from anchors.attention.taps import Tap


@dataclass(frozen=True)
class AttentionCall:
    """What a layer hands to the seam, after rotary embedding and cache.

    Attributes:
        layer: index of the layer, counted from 0 in the order in which the layers run.
        q, k, v: queries, keys and values.
        scale: factor on the scores.
        mask: which keys a query sees: boolean (True = sees) or additive; None with `causal` means j <= i.
        causal: whether `mask is None` stands for the causal mask (else: everything is seen).
        softcap: bound c of the soft cap on the scores, or None.
        sinks: one extra logit per head in the denominator, or None; rows then sum to less than 1.
    """

    layer: int
    q: Float[Tensor, "batch heads query dim"]
    k: Float[Tensor, "batch kv_heads key dim"]
    v: Float[Tensor, "batch kv_heads key dim_v"]
    scale: float
    mask: Tensor | None = None
    causal: bool = True
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None

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

    def scores(
        self, q: Float[Tensor, "batch heads rows dim"], k: Float[Tensor, "batch kv_heads keys dim"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        """Scaled and soft-capped scores, before the mask."""
        scores = grouped(q, k.transpose(-1, -2), self.groups) * self.scale
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def softmax(
        self, scores: Float[Tensor, "batch heads rows keys"], visible: Tensor | None
    ) -> Float[Tensor, "batch heads rows keys"]:
        """The attention pattern A of masked scores, with the sink's share left out."""
        if visible is not None:
            if visible.dtype == torch.bool:
                scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
            else:
                scores = scores + visible.to(scores.dtype)
        if self.sinks is None:
            return torch.softmax(scores, dim=-1)
        sinks = self.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]

    def pattern(self) -> Float[Tensor, "batch heads query key"]:
        """The whole pattern A, materialised: the literal twin of every streamed computation."""
        q, k = self.q.to(self.compute_dtype), self.k.to(self.compute_dtype)
        rows = torch.arange(q.shape[2], device=q.device)
        return self.softmax(self.scores(q, k), self.visible(rows, slice(0, k.shape[2])))

    def pattern_at(self, rows: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows key"]:
        """The rows of the pattern A of some queries of each example, without forming the others."""
        batch, heads, _, dim = self.q.shape
        keys = self.k.shape[2]
        place = rows[:, None, :, None]
        q = self.q.to(self.compute_dtype).gather(2, place.expand(-1, heads, -1, dim))
        visible = None
        if self.mask is not None:
            mask = self.mask.expand(batch, *self.mask.shape[1:])
            visible = mask[..., :keys].gather(2, place.expand(-1, mask.shape[1], -1, keys))
        elif self.causal:
            visible = torch.arange(keys, device=rows.device) <= place + self.past
        return self.softmax(self.scores(q, self.k.to(self.compute_dtype)), visible)

    def apply(
        self, pattern: Float[Tensor, "batch heads query key"]
    ) -> Float[Tensor, "batch heads query dim_v"]:
        """z = A v."""
        return grouped(pattern, self.v.to(pattern.dtype), self.groups).to(self.v.dtype)

    def edited(self, edits: Sequence["Edit"]) -> Float[Tensor, "batch heads query dim_v"]:
        """The output under some edits; literal: the pattern is formed whole, so that any derivative is possible.

        Raises:
            AnchorsError: an edit leaves a query without any key.
        """
        dtype = self.compute_dtype
        rows = torch.arange(self.q.shape[2], device=self.q.device)
        visible = self.visible(rows, slice(0, self.k.shape[2]))
        scores = self.scores(self.q.to(dtype), self.k.to(dtype))
        for edit in edits:
            bias = edit.bias_of(self, visible)
            if bias is not None:
                visible = edit.showing(self, visible)
                self._demand_a_key(visible, bias, edit.name)
            scores = scores if bias is None else scores + bias
        pattern = self.softmax(scores, visible)
        for edit in edits:
            weight = edit.weight_of(self, visible)
            pattern = pattern if weight is None else pattern * weight
        return self.apply(pattern)

    def _demand_a_key(self, visible: Tensor | None, bias: Tensor, name: str) -> None:
        """A row without a key has no pattern, unless a sink takes it; the softmax would read what is masked."""
        if self.sinks is not None:
            return
        seen = torch.ones((), dtype=torch.bool, device=bias.device) if visible is None else boolean(visible)
        emptied = seen.any(-1) & ~(seen & (bias != -torch.inf)).any(-1)
        if emptied.any():
            raise AnchorsError(
                f"{name!r} hides from some queries of layer {self.layer} all that they see: their attention is not defined.",
                "Leave them at least one key that the layer's own mask shows them.",
            )

    def streamed(self, taps: Sequence["Tap"]) -> Float[Tensor, "batch heads query dim_v"]:
        """The output, with taps shown A ⊙ ∂L/∂A when the loss is differentiated (`anchors.attention.streaming`)."""
        from anchors.attention.streaming import streaming

        return streaming(self, taps)

    @property
    def fusable(self) -> bool:
        """Whether torch's fused kernel computes exactly this call."""
        return self.softcap is None and self.sinks is None

    def fused(self) -> Float[Tensor, "batch heads query dim_v"]:
        """The output through torch's fused kernel; only where `fusable`."""
        mask, causal = self.mask, self.mask is None and self.causal and self.q.shape[2] > 1
        if causal and self.past:
            # The kernel aligns its causal mask with the first key, not with the last one.
            rows = torch.arange(self.q.shape[2], device=self.q.device)
            mask, causal = self.visible(rows, slice(0, self.k.shape[2])), False
        if mask is not None and mask.is_floating_point():
            mask = mask.to(self.q.dtype)  # the CPU kernel misreads a mask of another dtype
        return F.scaled_dot_product_attention(
            self.q,
            self.k,
            self.v,
            attn_mask=mask,
            is_causal=causal,
            scale=self.scale,
            enable_gqa=self.groups > 1,
        )


def boolean(mask: Tensor) -> Bool[Tensor, "*all"]:
    """What a mask of either kind shows: True = seen."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


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
