"""Dense attention, with everything that differs between families kept here and nowhere else:

    scores_ij  = scale · ⟨q_i, k_j⟩,  soft-capped to c · tanh(scores / c) where the family does so, + bias_j with ALiBi
    A_ij       = exp(scores_ij + mask_ij) / (Σ_j' exp(scores_ij' + mask_ij') + exp(sink))
    z_i        = Σ_j A_ij v_j

How such a call is streamed stands in `anchors.attention.streaming`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anchors.attention.bands import window_of
from anchors.attention.form import Call, boolean, grouped
from anchors.errors import AnchorsError

if TYPE_CHECKING:
    from anchors.attention.edits import Edit


PLANNED = 2e11
"""Operations of a call from which torch may take cuDNN's kernels. It makes a plan for every length that it has not seen, which
takes tens of milliseconds: a few layers' calls of this size are no longer."""
UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""torch's kernels without cuDNN's."""


@dataclass(frozen=True)
class DenseCall(Call):
    """A call with one pattern over its keys. How it is streamed stands in `anchors.attention.call`.

    Attributes:
        softcap: bound c of the soft cap on the scores, or None.
        sinks: one extra logit per head in the denominator, or None; rows then sum to less than 1.
        key_bias: what is added to the scores of each key (ALiBi: slope of the head · position of the key), or None. Never
            beside a soft cap, whose slope is read off the scores.
    """

    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None
    key_bias: Float[Tensor, "#batch heads key"] | None = None

    @cached_property
    def window(self) -> int | None:
        """The w for which a row sees its last w keys, itself included; None where its mask is no such band."""
        return window_of(self.mask, self.k.shape[2], self.layer)

    def scores(
        self,
        q: Float[Tensor, "batch heads rows dim"],
        k: Float[Tensor, "batch kv_heads keys dim"],
        keys: slice = slice(None),
    ) -> Float[Tensor, "batch heads rows keys"]:
        """Scaled, soft-capped and biased scores, before the mask; `keys` says which those of `k` are."""
        scores = grouped(q, k.transpose(-1, -2), self.groups)
        # A tile that no gradient passes through is written over: half its way is through memory.
        scores = scores * self.scale if scores.requires_grad else scores.mul_(self.scale)
        if self.key_bias is not None:
            return scores + self.key_bias[:, :, None, keys].to(scores.dtype)
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def softmax(
        self, scores: Float[Tensor, "batch heads rows keys"], visible: Tensor | None
    ) -> Float[Tensor, "batch heads rows keys"]:
        """The attention pattern A of masked scores, with the sink's share left out."""
        if visible is not None:
            if visible.dtype == torch.bool:
                least = torch.finfo(scores.dtype).min
                again = scores.requires_grad or self.softcap is not None  # its slope reads the scores
                scores = (Tensor.masked_fill if again else Tensor.masked_fill_)(scores, ~visible, least)
            else:
                scores = scores + visible.to(scores.dtype)
        if self.sinks is None:
            return torch.softmax(scores, dim=-1)
        sinks = self.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]

    def pattern(self) -> Float[Tensor, "batch heads query key"]:
        q, k = self.q.to(self.compute_dtype), self.k.to(self.compute_dtype)
        rows = torch.arange(q.shape[2], device=q.device)
        return self.softmax(self.scores(q, k), self.visible(rows, slice(0, k.shape[2])))

    def pattern_at(self, rows: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows key"]:
        """Those rows alone are formed."""
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
                code="not-finite",
            )

    @property
    def fusable(self) -> bool:
        return self.softcap is None and self.sinks is None and self.key_bias is None

    def fused(self) -> Float[Tensor, "batch heads query dim_v"]:
        """The output through torch's kernel."""
        mask, causal = self.mask, self.mask is None and self.causal and self.q.shape[2] > 1
        if causal and self.past:
            # The kernel aligns its causal mask with the first key, not with the last one.
            rows = torch.arange(self.q.shape[2], device=self.q.device)
            mask, causal = self.visible(rows, slice(0, self.k.shape[2])), False
        if mask is not None and mask.is_floating_point():
            mask = mask.to(self.q.dtype)  # the CPU kernel misreads a mask of another dtype
        k, v, grouped = self.k, self.v, self.groups > 1
        if grouped and self.q.is_cuda and not (self._half and mask is None and self._flash):
            # No kernel for these shares keys among heads: torch would form the patterns, O(T²), and say nothing.
            k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))
            grouped = False
        small = 4 * self.q.numel() * k.shape[2] < PLANNED
        with sdpa_kernel(UNPLANNED) if self.q.is_cuda and self._half and small else nullcontext():
            return F.scaled_dot_product_attention(
                self.q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=grouped
            )

    @property
    def _half(self) -> bool:
        return self.q.dtype in (torch.bfloat16, torch.float16)

    @property
    def _flash(self) -> bool:
        """Whether the kernel that shares keys among heads takes these sizes."""
        return self.q.shape[-1] == self.v.shape[-1] <= 256
