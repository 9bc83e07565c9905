"""A layer of native sparse attention at the seam.

To the analyses it looks like any other call: q, k and v (those of the selected branch), and one pattern over tokens.
A compressed token is split over the l tokens of its block by φ (`anchors.nsa.phi`), so that with the virtual pairs
(compressed token c, its m-th token) as further keys

    z_i = Σ_j g_i^slc P_ij^slc v_j^slc + g_i^win P_ij^win v_j^win + Σ_{c,m: cd+m=j} g_i^cmp P_ic^cmp φ_m(v_c)

and the saliency of a pair of tokens is the sum over everything that leads from one to the other. What the position
encoding of φ adds belongs to no token and is spread evenly over the block, so that rows keep their sum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anchors.attention.edits import Edit
from anchors.attention.form import Call
from anchors.attention.taps import Summed, SummedTap, Tap
from anchors.errors import AnchorsError
from anchors.nsa.attention import (
    BRANCHES,
    CMP,
    ROWS,
    SLC,
    WIN,
    Branches,
    Trace,
    choose,
    nsa_attention,
    resolve,
    trace,
)
from anchors.nsa.geometry import Geometry
from anchors.nsa.phi import Phi
from anchors.nsa.texts import Texts


@dataclass(frozen=True)
class Sparse:
    """What NSA needs beside queries, keys and values: see `anchors.nsa.attention`."""

    kv: Branches
    v_cmp: Float[Tensor, "batch tokens groups dim_v"]
    phi_v: Phi
    gates: Float[Tensor, "batch query heads 3"]
    geometry: Geometry
    past: int = 0
    q_cmp: Float[Tensor, "batch query heads dim"] | None = None
    backend: str = "auto"
    texts: Texts | None = None
    """Several texts in a row; at the seam there is one."""


BlockField = Callable[["NSACall"], Tensor]


@dataclass(frozen=True)
class Intervention(Edit):
    """A change of which blocks are selected, or of the gates; token pairs are changed by a plain `Edit`.

    Attributes:
        force, ban: function from the call to blocks always or never to choose, [batch, query, groups, blocks].
        gates: function from the call to a factor on the gates, broadcastable to [batch, query, heads, 3].

    One that changes no choice of blocks, or no gate, is an error unless it is `neutral`.
    """

    force: BlockField | None = None
    ban: BlockField | None = None
    gates: BlockField | None = None


@dataclass(frozen=True)
class NSACall(Call):
    """What an NSA layer hands to the seam."""

    sparse: Sparse = field(kw_only=True)

    @property
    def fusable(self) -> bool:
        return True

    def fused(self, idx: Tensor | None = None) -> Float[Tensor, "batch heads query dim_v"]:
        """The output of the layer's own backend."""
        s = self.sparse
        return nsa_attention(
            self.q.transpose(1, 2), s.kv, s.gates, s.geometry,
            scale=self.scale, q_cmp=s.q_cmp, past=s.past, idx=idx, backend=s.backend,
        ).transpose(1, 2)  # fmt: skip

    @cached_property
    def idx(self) -> Int[Tensor, "batch query groups n"]:
        """I_t: the blocks that each query and group reads, as the layer's own backend chooses them."""
        s = self.sparse
        return choose(
            self.q.transpose(1, 2), s.kv, s.geometry,
            scale=self.scale, q_cmp=s.q_cmp, past=s.past, backend=s.backend,
        )  # fmt: skip

    @cached_property
    def trace(self) -> Trace:
        """Everything between inputs and output, for all rows at once, without derivatives."""
        with torch.no_grad():
            return self._trace(slice(0, self.q.shape[2]), idx=self.idx)

    def _trace(self, rows: slice, **options: Any) -> Trace:
        s, dtype = self.sparse, self.compute_dtype
        kv = Branches(**{name: x.to(dtype) for name, x in vars(s.kv).items()})
        return trace(
            self.q.transpose(1, 2)[:, rows].to(dtype), kv, s.gates[:, rows].to(dtype), s.geometry,
            scale=self.scale, past=s.past + rows.start,
            q_cmp=None if s.q_cmp is None else s.q_cmp[:, rows].to(dtype), **options,
        )  # fmt: skip

    @cached_property
    def _block_tokens(self) -> Int[Tensor, "compressed l"]:
        g, count = self.sparse.geometry, self.sparse.kv.kc.shape[1]
        home = self.q.device
        return torch.arange(count, device=home)[:, None] * g.d + torch.arange(g.l, device=home)

    @cached_property
    def _seen_parts(self) -> Float[Tensor, "batch compressed l groups dim_v"]:
        """`_parts` without derivatives, once for all tiles of rows."""
        with torch.no_grad():
            return self._parts()

    def _parts(self) -> Float[Tensor, "batch compressed l groups dim_v"]:
        """φ_m(v) of every token of every block, with an l-th of what belongs to none."""
        g, values = self.sparse.geometry, self.sparse.v_cmp.to(self.compute_dtype)
        if not self.sparse.kv.vc.shape[1]:
            return values.new_zeros(len(values), 0, g.l, *values.shape[2:])
        per_token, rest = self.sparse.phi_v.split(values.unfold(1, g.l, g.d).transpose(-1, -2))
        return (per_token + rest[..., None, :] / g.l).transpose(2, 3)

    def products(
        self, rows: slice, dz: Float[Tensor, "batch heads rows dim_v"]
    ) -> dict[str, Float[Tensor, "batch heads rows key"]]:
        """A^c ⊙ ∂L/∂A^c of some query rows by branch, over tokens."""
        with torch.no_grad():
            found = self._trace(rows, idx=self.idx[:, rows])
            dtype, kv, tokens = self.compute_dtype, self.sparse.kv, self.k.shape[2]
            slope = dz.transpose(1, 2).to(dtype)[:, :, :, None] * found.gates[..., None]
            product = {
                BRANCHES[c]: found.patterns[c] * _against(slope[:, :, :, c], value.to(dtype))
                for c, value in ((SLC, kv.v_slc), (WIN, kv.v_win))
            }
            parts = self._seen_parts
            count, l = parts.shape[1:3]
            each = _against(slope[:, :, :, CMP], parts.flatten(1, 2)).unflatten(-1, (count, l))
            each = (each * found.patterns[CMP][..., None]).flatten(-2)
            onto = each.new_zeros(*each.shape[:-1], tokens)
            onto.index_add_(-1, self._block_tokens.flatten(), each)
            product["cmp"] = onto
            return {name: product[name].transpose(1, 2) for name in BRANCHES}

    def pattern(self) -> Float[Tensor, "batch heads query key"]:
        """Σ_c g^c P^c over tokens; a compressed token counts an l-th for each token of its block."""
        found, g = self.trace, self.sparse.geometry
        spread = found.patterns[CMP].new_zeros(found.patterns[CMP].shape[-1], self.k.shape[2])
        spread.scatter_(1, self._block_tokens, 1 / g.l)
        over_tokens = (found.patterns[CMP] @ spread, found.patterns[SLC], found.patterns[WIN])
        return reduce(
            torch.add, [found.gates[..., c, None] * p for c, p in enumerate(over_tokens)]
        ).transpose(1, 2)

    def pattern_at(self, rows: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows key"]:
        pattern = self.pattern()
        place = rows[:, None, :, None].to(pattern.device)
        return pattern.gather(2, place.expand(-1, pattern.shape[1], -1, pattern.shape[-1]))

    def edited(self, edits: Sequence[Edit]) -> Float[Tensor, "batch heads query dim_v"]:
        """The output under edits of token pairs and interventions, literally.

        A bias joins the scores of all three branches (a compressed token gets the mean over its block: −∞ anywhere
        hides it), before blocks are chosen. A weight multiplies every path from one token to another.
        """
        batch, _, queries, _ = self.q.shape
        visible = self.visible(torch.arange(queries, device=self.q.device), slice(0, self.k.shape[2]))
        bias = _total(torch.add, [edit.bias_of(self, visible) for edit in edits])
        weight = _total(torch.mul, [edit.weight_of(self, visible) for edit in edits])
        bias, weight = (
            None if x is None else _over_all(x, (batch, -1, queries, self.k.shape[2])) for x in (bias, weight)
        )
        chosen = [edit for edit in edits if isinstance(edit, Intervention)]
        found = self._trace(
            slice(0, queries),
            token_bias=bias,
            force=_total(torch.logical_or, [e.force(self) for e in chosen if e.force]),
            ban=_total(torch.logical_or, [e.ban(self) for e in chosen if e.ban]),
        )
        factors = [(edit, edit.gates(self).to(found.gates)) for edit in chosen if edit.gates]
        for edit, factor in factors:
            if not edit.neutral and bool((factor == 1).all()):
                raise AnchorsError(
                    f"{edit.name!r} fired in layer {self.layer} but changed no gate.",
                    "Check its positions, or declare it neutral.",
                    code="without-effect",
                )
        asked = [edit for edit in chosen if (edit.force or edit.ban) and not edit.neutral]
        plain = self._trace(slice(0, queries)).idx if asked else None
        for edit in asked:
            if plain is not None and torch.equal(found.idx, plain):
                raise AnchorsError(
                    f"{edit.name!r} fired in layer {self.layer} but changed no choice of blocks.",
                    "The blocks it forces are chosen anyway, or those it bans never are; a prompt of up to "
                    f"{self.sparse.geometry.n * self.sparse.geometry.lp} tokens is selected whole.",
                    code="without-effect",
                )
        gates = reduce(torch.mul, [factor for _, factor in factors], found.gates)
        branch_o = found.branch_o if weight is None else self._weighted(found, weight)
        o = reduce(torch.add, [gates[..., c, None] * o for c, o in enumerate(branch_o)])
        return o.transpose(1, 2).to(self.v.dtype)

    def _weighted(self, found: Trace, weight: Float[Tensor, "batch #heads query key"]) -> tuple[Tensor, ...]:
        weight, kv, dtype = weight.transpose(1, 2), self.sparse.kv, self.compute_dtype
        o_slc = _applied(found.patterns[SLC] * weight, kv.v_slc.to(dtype))
        o_win = _applied(found.patterns[WIN] * weight, kv.v_win.to(dtype))
        over_pairs = found.patterns[CMP][..., None] * weight[..., self._block_tokens]
        return _applied(over_pairs.flatten(-2), self._parts().flatten(1, 2)), o_slc, o_win

    def streamed(self, taps: Sequence[Tap]) -> Float[Tensor, "batch heads query dim_v"]:
        """The output; when its gradient arrives, the taps see the products of the rows that have one."""
        leaf = torch.zeros((), device=self.q.device, dtype=self.v.dtype, requires_grad=True)
        z = self.fused(self.idx if taps else None) + leaf
        seen = z.detach()  # a hook that holds z itself is never freed

        def show(dz: Tensor) -> None:
            # The autocast of whoever differentiates reaches this far, and would round the products.
            with torch.autocast(dz.device.type, enabled=False):
                self._show(taps, seen, dz)

        if taps and z.requires_grad:
            z.register_hook(show)
        return z

    def _kernels_run(self) -> bool:
        """Whether the saliency kernel computes this call: of whole prompts, where the layer's own kernels run."""
        s = self.sparse
        whole = s.past == 0 and s.texts is None and self.q.shape[2] == self.k.shape[2]
        return whole and resolve(s.backend, self.q, s.geometry) == "triton"

    @torch.no_grad()
    def sums(
        self,
        z: Float[Tensor, "batch heads query dim_v"],
        dz: Float[Tensor, "batch heads query dim_v"],
        tap: SummedTap,
    ) -> dict[str, Summed]:
        """What a tap keeps of I, by the saliency kernel; the literal twin is `products`, tile by tile."""
        from anchors.nsa.kernels.saliency import ALL, saliency

        s, whole = self.sparse, self.layer in tap.maps
        found = saliency(
            self.q.transpose(1, 2), s.kv, self._parts().to(self.q.dtype), s.gates, dz.transpose(1, 2), self.idx,
            s.geometry, scale=self.scale, q_cmp=s.q_cmp, wanted=tap.wanted, by_branch=tap.by_branch, full=whole,
        )  # fmt: skip
        inner = (z.float() * dz.float()).sum(-1)
        error = (found.head_sums - inner).abs().amax(), inner.abs().amax()
        return {
            name: Summed(
                found.rows[name],
                total,
                found.full if name == ALL else None,
                error if name == ALL else None,
            )
            for name, total in found.totals.items()
        }

    def _show(self, taps: Sequence[Tap], z: Tensor, dz: Tensor) -> None:
        summing = [tap for tap in taps if isinstance(tap, SummedTap)]
        if len(summing) == len(taps) and self._kernels_run():
            for tap in summing:
                tap.summed(self, dz, self.sums(z, dz, tap))
            return
        for tap in taps:
            tap.begin(self, z, dz)
        for start in range(0, dz.shape[2], ROWS):
            rows = slice(start, min(start + ROWS, dz.shape[2]))
            if not dz[:, :, rows].any():
                continue
            by_branch = self.products(rows, dz[:, :, rows])
            product = reduce(torch.add, by_branch.values())
            for tap in taps:
                if branches := getattr(tap, "branches", None):
                    branches(self, rows, by_branch)
                tap.tile(
                    self, torch.arange(rows.start, rows.stop, device=dz.device),
                    slice(0, self.k.shape[2]), product.clone(),
                )  # fmt: skip


def _over_all(
    field: Float[Tensor, "*all #query #key"], shape: tuple[int, int, int, int]
) -> Float[Tensor, "batch heads query key"]:
    return field[(None,) * (4 - field.dim())].expand(shape)


def _total(join: Callable[[Tensor, Tensor], Tensor], parts: Sequence[Tensor | None]) -> Tensor | None:
    total = None
    for part in parts:
        if part is not None:
            total = part if total is None else join(total, part)
    return total


def _against(
    slope: Float[Tensor, "batch query heads dim_v"], v: Float[Tensor, "batch key groups dim_v"]
) -> Float[Tensor, "batch query heads key"]:
    """⟨dz_i, v_j⟩ for the value that each query head reads."""
    folded = slope.unflatten(2, (v.shape[2], -1))
    return torch.einsum("bthgd,bshd->bthgs", folded, v).flatten(2, 3)


def _applied(
    pattern: Float[Tensor, "batch query heads key"], v: Float[Tensor, "batch key groups dim_v"]
) -> Float[Tensor, "batch query heads dim_v"]:
    folded = pattern.unflatten(2, (v.shape[2], -1))
    return torch.einsum("bthgs,bshd->bthgd", folded, v).flatten(2, 3)
