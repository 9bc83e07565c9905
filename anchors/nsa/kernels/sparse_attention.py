# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
"""Gradients of NSA's three branches and of its gates, as Triton kernels.

With P = exp(scale · q kᵀ − lse) and o = Σ_c g_c o_c, for each branch c

    ∂L/∂g_c = ⟨dO, o_c⟩ = inner_c,      dS = g_c · P ⊙ (dO vᵀ − inner_c),
    dq = scale · dS k,      dk = scale · dSᵀ q,      dv = (g_c · P)ᵀ dO.

The gate is a factor per row, so that g_c · dO is never formed. `query_gradient` walks the tiles of the forward pass;
`key_gradients` stays at a tile of keys and walks the queries that see it: a range of positions, or, in the selected
branch, a list of those that chose the block. Long walks are cut into parts, whose sums are added in a fixed order: no
atomics, two runs agree bit for bit.

Source: Yuan et al., "Native Sparse Attention" (ACL 2025), section 3.4 for the forward pass; its gradients are not
published.
"""

from typing import Any, cast

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from anchors.attention.kernels import LOG2E, dense, precision_of, strides
from anchors.nsa.geometry import Geometry
from anchors.nsa.kernels import lists, ranges, selection
from anchors.nsa.kernels.attention import (
    Branch,
    Tuning,
    attend,
    attend_last,
    key_sources,
    seen_spans,
    tile_of,
    walked,
)
from anchors.nsa.kernels.backward import inner_kernel, key_kernel, query_kernel, sum_kernel, text_sum_kernel
from anchors.nsa.kernels.tiles import NEVER, demand, tuned, widest, widths
from anchors.nsa.texts import Spans, Texts


def inner(
    dz: Float[Tensor, "batch query heads dim_v"],
    o_cmp: Float[Tensor, "batch query heads dim_v"],
    o_slc: Float[Tensor, "batch query heads dim_v"],
    o_win: Float[Tensor, "batch query heads dim_v"],
) -> Float[Tensor, "batch query heads 3"]:
    """⟨dO, o_c⟩ of the three branches, in float32: the gradient of the gates, and the mean of dO vᵀ under P."""
    dz, o_cmp, o_slc, o_win = (x.contiguous() for x in (dz, o_cmp, o_slc, o_win))
    sums = dz.new_empty(*dz.shape[:3], 3, dtype=torch.float32)
    rows, dim = sums.numel() // 3, dz.shape[-1]
    width = max(16, triton.next_power_of_2(dim))
    tall = max(1, 4096 // width)
    with torch.cuda.device_of(dz):
        inner_kernel[(triton.cdiv(rows, tall),)](
            o_cmp, o_slc, o_win, dz, sums, rows, DIM_V=dim, WIDTH_V=width, ROWS=tall
        )
    return sums


def _masses(lse: Float[Tensor, "batch query heads"]) -> Float[Tensor, "batch query heads"]:
    """log₂ Σ exp; of rows that see nothing, one that makes their pattern 0."""
    return torch.where(lse == -torch.inf, NEVER.value, lse * LOG2E.value)


def query_gradient(
    branch: Branch,
    q: Float[Tensor, "batch query heads dim"],
    k: Float[Tensor, "batch key groups dim"],
    v: Float[Tensor, "batch key groups dim_v"],
    dz: Float[Tensor, "batch query heads dim_v"],
    lse: Float[Tensor, "batch query heads"],
    inner: Float[Tensor, "batch query heads"],
    gate: Float[Tensor, "batch query heads"],
    *,
    scale: float,
    past: int = 0,
    idx: Int[Tensor, "batch query groups n"] | None = None,
    union: Any = None,
    spans: Spans | None = None,
    onto: Float[Tensor, "batch query heads dim"] | None = None,
    tuning: Tuning = None,
) -> Float[Tensor, "batch query heads dim"]:
    """dq of one branch, in q's dtype.

    Args:
        dz: ∂L/∂o, before the gates.
        lse: contiguous, of `attend`.
        inner, gate: ⟨dO, o_c⟩ and g_c in float32: contiguous, or a slice [..., c] of contiguous tensors.
        idx, union, spans: as of `attend`.
        onto: a contiguous dq of other branches, which is added to in place and returned.
    """
    groups = demand(q, k, v, scale)
    q, k, v, dz = map(dense, (q, k, v, dz))
    shape = widths(q.shape[-1], v.shape[-1])
    fits = ranges.fits(shape, k, v)
    settings = tuned(f"query.{branch.name}", q, widest(q.shape[-1], v.shape[-1]), tuning, boxed=fits)
    tile, group = branch.tile(groups, settings["rows"])
    columns = branch.keys(settings["keys"])
    listed, entries, padded = walked(branch, idx, tile, union)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if onto is None else onto
    boxes = fits and bool(settings.get("boxes"))
    sources = key_sources(k, v, columns, boxes)
    with torch.cuda.device_of(q):
        query_kernel[triton.cdiv(q.shape[1], tile), q.shape[0] * k.shape[2]](
            q, *sources, dz, dq, lse.contiguous(), inner, gate, seen_spans(spans, past + q.shape[1]), *listed,
            *map(strides, (q, k, v, dz)),
            q.shape[1], k.shape[1], past, scale, scale * LOG2E.value, k.shape[2], groups, *branch.sizes, entries,
            inner.stride(-1), gate.stride(-1), BRANCH=branch.name, LOW=branch.bounded(spans), TILE=tile, GROUP=group,
            KEYS=columns, PARTS=max(1, branch.lp // columns), ENTRIES=padded, PEEL=bool(settings["peel"]),
            ACCUMULATE=onto is not None, BOXES=boxes, **shape, PRECISION=precision_of(q.dtype),
            num_warps=settings["num_warps"], num_stages=settings["num_stages"],
        )  # fmt: skip
    return dq


def key_gradients(
    branch: Branch,
    q: Float[Tensor, "batch query heads dim"],
    k: Float[Tensor, "batch key groups dim"],
    v: Float[Tensor, "batch key groups dim_v"],
    dz: Float[Tensor, "batch query heads dim_v"],
    lse: Float[Tensor, "batch query heads"],
    inner: Float[Tensor, "batch query heads"],
    gate: Float[Tensor, "batch query heads"],
    *,
    scale: float,
    past: int = 0,
    idx: Int[Tensor, "batch query groups n"] | None = None,
    spans: Spans | None = None,
    tuning: Tuning = None,
) -> tuple[Float[Tensor, "batch key groups dim"], Float[Tensor, "batch key groups dim_v"]]:
    """dk and dv of one branch, in k's dtype; 0 for keys that nobody sees. Arguments as of `query_gradient`."""
    groups = demand(q, k, v, scale)
    q, k, v, dz = map(dense, (q, k, v, dz))
    batch, keys, heads, dim = k.shape
    shape = widths(dim, v.shape[-1])
    chosen, fits = branch.name == "selected", ranges.fits(shape, q, dz)
    many = fits and (not chosen or groups >= ranges.MANY)
    settings = tuned(f"keys.{branch.name}", q, widest(q.shape[-1], v.shape[-1]), tuning, boxed=many)
    boxed = fits and settings.get("boxes")
    _, group = branch.tile(groups, settings["rows"])
    tile, columns = max(1, settings["rows"] // group), branch.keys(settings["keys"])
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    if not dk.numel():
        return dk, dv
    # The queries of a block are cut by their list.
    splits = 1 if chosen or boxed else settings["splits"]
    if boxed and not chosen:
        # Short texts have few tiles of keys: as many parts as fill the device.
        tiles = triton.cdiv(keys, columns) * batch * heads
        splits = max(1, min(ranges.SPLITS, settings.get("programs", ranges.PROGRAMS) // tiles))
    if branch.name == "selected":
        # Blocks of texts are named by their first tokens: any token may begin one.
        blocks = -(-keys // branch.lp) if spans is None else keys
        inverse = lists.inverse(cast(Tensor, idx), blocks, settings["split"])
        rows = (
            None
            if spans is None
            else lists.rows_of_texts(inverse, cast(Tensor, idx).numel() // settings["split"], branch.lp)
        )
        sizes = (len(inverse.items), branch.lp) if rows is None else (rows.number,)
        parts = [k.new_empty(*sizes, x.shape[-1], dtype=torch.float32) for x in (k, v)]
        grid = len(inverse.items), branch.lp // columns
        listed = inverse.queries, inverse.items, None if rows is None else rows.bases
    else:
        parts = (
            [x.new_empty(splits, *x.shape, dtype=torch.float32) for x in (k, v)] if splits > 1 else [dk, dv]
        )
        grid, listed = (triton.cdiv(keys, columns) * splits, batch * heads), (None, None, None)
    seers = None if spans is None else spans.seers
    if boxed and not chosen:
        _range_gradients(
            branch, q, k, v, dz, lse, inner, gate, seers, parts, scale, past, shape, settings, splits
        )
        if splits > 1:
            dk, dv = (part.sum(0).to(x.dtype) for part, x in zip(parts, (k, v), strict=True))
        return dk, dv
    with torch.cuda.device_of(q):
        if boxed:
            masses, means, signs = ranges.rows_by_head(lse, inner, gate)
            ranges.list_kernel[grid](
                q, k, v, dz, *parts, masses, means, signs, gate.amin(), seers, *listed, *map(strides, (q, k, v, dz)),
                masses.shape[-1], keys, past, scale, scale * LOG2E.value, heads, HEADS=groups, ROWS=settings["rows"],
                KEYS=columns, PARTS=max(1, branch.lp // columns),
                SPLIT=triton.next_power_of_2(settings.get("split", 1)), **shape, PRECISION=precision_of(q.dtype),
                num_warps=settings["num_warps"], num_stages=settings["num_stages"],
            )  # fmt: skip
        else:
            key_kernel[grid](
                q, k, v, dz, *parts, _masses(lse), inner, gate, seers, *listed,
                *map(strides, (q, k, v, dz)),
                q.shape[1], keys, past, scale, scale * LOG2E.value, heads, groups, *branch.sizes,
                inner.stride(-1), gate.stride(-1), BRANCH=branch.name, UNTIL=branch.bounded(spans), TILE=tile, GROUP=group,
                KEYS=columns, PARTS=max(1, branch.lp // columns), SPLITS=splits,
                SPLIT=triton.next_power_of_2(settings.get("split", 1)),
                PEEL=bool(settings["peel"]), **shape, PRECISION=precision_of(q.dtype),
                num_warps=settings["num_warps"], num_stages=settings["num_stages"],
            )  # fmt: skip
        if branch.name == "selected":
            for part, total in zip(parts, (dk, dv), strict=True):
                width = max(16, triton.next_power_of_2(total.shape[-1]))
                common = {"DIM": total.shape[-1], "WIDTH": width, "ROWS": 16}
                if rows is None or spans is None:
                    sum_kernel[-(-keys // branch.lp), batch * heads, triton.cdiv(branch.lp, 16)](
                        part, total, inverse.first, inverse.number, heads, keys, branch.lp, **common
                    )
                else:
                    text_sum_kernel[triton.cdiv(keys, 16), batch * heads](
                        part, total, spans.seen, inverse.number, rows.extra, heads, keys, branch.lp, **common
                    )
    if splits > 1:
        dk, dv = (part.sum(0).to(x.dtype) for part, x in zip(parts, (k, v), strict=True))
    return dk, dv


def _range_gradients(
    branch, q, k, v, dz, lse, inner, gate, seers, parts, scale, past, shape, settings, splits
) -> None:
    batch, length, heads, _ = q.shape
    keys, groups, rows = k.shape[1], k.shape[2], settings["rows"]
    masses, means, signs = ranges.rows_by_head(lse, inner, gate)
    with torch.cuda.device_of(q):
        ranges.range_kernel[triton.cdiv(keys, settings["keys"]) * splits, batch * groups](
            ranges.boxes(q, rows), k, v, ranges.boxes(dz, rows), *parts,
            *(ranges.line_boxes(x, rows) for x in (masses, means)), signs, gate.amin(), seers, strides(k), strides(v),
            length, masses.shape[-1], keys, past, scale, scale * LOG2E.value, groups, *branch.sizes,
            BRANCH=branch.name, UNTIL=seers is not None or branch.name == "window", HEADS=heads // groups, ROWS=rows,
            KEYS=settings["keys"], SPLITS=splits, DIM=shape["DIM"], DIM_V=shape["DIM_V"],
            PRECISION=precision_of(q.dtype), num_warps=settings["num_warps"], num_stages=settings["num_stages"],
        )  # fmt: skip


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, q_cmp, kc, vc, ks, vs, kw, vw, g, idx, geometry, scale, past, change, texts, tuning):
        branches = (
            Branch("compressed", l=geometry.l, d=geometry.d), Branch("selected", lp=geometry.lp), Branch("window", w=geometry.w)
        )  # fmt: skip
        first = q if q_cmp is None else q_cmp
        common = {"scale": scale, "past": past, "tuning": tuning}
        layout = None if texts is None else texts.expanded(len(q)).laid(geometry)
        spans = (None,) * 3 if layout is None else (layout.compressed, layout.selected, layout.window)
        o_cmp, lse_cmp = attend(branches[0], first, kc, vc, spans=spans[0], **common)
        if idx is None:
            idx = selection.select_blocks(
                first, kc, lse_cmp,
                geometry=geometry, tokens=ks.shape[1], layout=layout, **common, **change,
            )  # fmt: skip
        if layout is not None:
            idx = layout.blocks_at(idx, past)
        sizes = [
            tile_of(branches[1], kernel, q, ks, vs, tuning)
            for kernel in ("forward.selected", "query.selected")
        ]
        union = lists.union(idx, sizes[0])
        o_slc, lse_slc = attend(branches[1], q, ks, vs, idx=idx, union=union, spans=spans[1], **common)
        keep = any(ctx.needs_input_grad)
        z, o_win, lse_win = attend_last(
            branches[2], q, kw, vw, (o_cmp, o_slc), g, keep=keep, spans=spans[2], **common
        )
        if not keep:
            return z
        ctx.union = union if sizes[0] == sizes[1] else None
        ctx.save_for_backward(
            q, q_cmp, kc, vc, ks, vs, kw, vw, g, idx, lse_cmp, lse_slc, lse_win, o_cmp, o_slc, o_win
        )
        ctx.branches, ctx.spans, ctx.common = branches, spans, common
        return z

    @staticmethod
    def backward(ctx, *given):
        (dz,) = given
        q, q_cmp, kc, vc, ks, vs, kw, vw, g, idx, *rest = ctx.saved_tensors
        dz, lse, gates = dz.contiguous(), rest[:3], g.float().contiguous()
        sums = inner(dz, *rest[3:])
        queries = (q if q_cmp is None else q_cmp, q, q)
        pairs = ((kc, vc), (ks, vs), (kw, vw))
        dq, dq_cmp, slopes = None, None, []
        # The window first: its work covers the time that the host needs to launch the lists of the selected branch.
        for c in (2, 1, 0):
            rows = (queries[c], *pairs[c], dz, lse[c], sums[..., c], gates[..., c])
            chosen = {"spans": ctx.spans[c]} | ({"idx": idx} if c == 1 else {})
            onto = dq if c or q_cmp is None else None
            union = ctx.union if c == 1 else None
            found = query_gradient(ctx.branches[c], *rows, onto=onto, union=union, **chosen, **ctx.common)
            if c or q_cmp is None:
                dq = found
            else:
                dq_cmp = found
            slopes.append(key_gradients(ctx.branches[c], *rows, **chosen, **ctx.common))
        win, slc, cmp = slopes
        return dq, dq_cmp, *cmp, *slc, *win, sums.to(g.dtype), *(None,) * 7


def sparse_attention(
    q: Float[Tensor, "batch query heads dim"],
    q_cmp: Float[Tensor, "batch query heads dim"] | None,
    kc: Float[Tensor, "batch compressed groups dim"],
    vc: Float[Tensor, "batch compressed groups dim_v"],
    ks: Float[Tensor, "batch key groups dim"],
    vs: Float[Tensor, "batch key groups dim_v"],
    kw: Float[Tensor, "batch key groups dim"],
    vw: Float[Tensor, "batch key groups dim_v"],
    g: Float[Tensor, "batch query heads 3"],
    idx: Int[Tensor, "batch query groups n"] | None,
    *,
    geometry: Geometry,
    scale: float,
    past: int = 0,
    force: Tensor | None = None,
    ban: Tensor | None = None,
    bias: Tensor | None = None,
    texts: Texts | None = None,
    tuning: Tuning = None,
) -> Float[Tensor, "batch query heads dim_v"]:
    """Σ_c g_c Attn(q, K^c, V^c), differentiable by everything but the choice of blocks.

    Args:
        q_cmp: queries of the compressed branch where they differ from q.
        idx: the chosen blocks; without them, they are chosen by `selection.select_blocks`.
        force, ban, bias: its arguments.
        texts: several texts in a row, with the compressed keys of `Layout.compress`; nothing waits for the device.
        tuning: settings put over those of `TUNING`, by kernel.

    Raises:
        AnchorsError: a dtype, a number of heads, a scale or blocks that the kernels cannot take.
    """
    change = {"force": force, "ban": ban, "bias": bias}
    return _SparseAttention.apply(
        q, q_cmp, kc, vc, ks, vs, kw, vw, g, idx, geometry, scale, past, change, texts, tuning
    )
