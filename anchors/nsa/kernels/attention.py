# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
"""Attention of NSA's three branches as one Triton kernel, and Eq. 5's sum of them.

    o_t = Σ_j P_tj v_j,  P_tj = exp(scale · ⟨q_t, k_j⟩ − lse_t),  j over the keys that the branch shows to t

The branches differ in the key tiles that a query tile walks and in the mask of the first and last of them: the
compressed branch sees the tokens i with i·d + l − 1 ≤ t, the window the last w tokens, the selected branch the
chosen blocks. There a query tile walks the union of the blocks of its positions, and a row that did not choose a block
is left out of it by its own peak, without a mask on the scores.

Source: Yuan et al., "Native Sparse Attention" (ACL 2025), section 3; the literal twin is `anchors.nsa.reference`.
"""

from dataclasses import dataclass
from typing import Any, cast, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from anchors.attention.kernels import LOG2E, cdiv, dense, power_of_2, precision_of, strides
from anchors.errors import AnchorsError
from anchors.nsa.kernels import lists, ranges
from anchors.nsa.kernels.tiles import (
    LN2,
    NEVER,
    UNION,
    demand,
    key_rows,
    key_tile,
    load_rows,
    load_tail,
    products,
    query_rows,
    save_rows,
    spanned,
    tile_bounds,
    times,
    tuned,
    widest,
    widths,
)
from anchors.nsa.texts import Spans

Tuning = dict[str, Any] | None


@dataclass(frozen=True)
class Branch:
    """Which keys a query sees.

    Attributes:
        name: compressed, selected or window; a compile-time constant of the kernels.
        l, d: size and stride of the compression blocks.
        lp: size of the selection blocks.
        w: tokens of the window.
    """

    name: str
    l: int = 1
    d: int = 1
    lp: int = 16
    w: int = 1

    def __post_init__(self) -> None:
        if self.lp % 16:
            raise AnchorsError(
                f"Selection blocks of {self.lp} tokens do not fit the tensor cores.",
                "Choose a multiple of 16, or backend='reference'.",
                code="geometry",
            )

    def tile(self, groups: int, rows: int) -> tuple[int, int]:
        """Positions of a query tile of about `rows` rows, and its heads per position with padding."""
        group = power_of_2(groups)
        tile = max(1, rows // group)
        return (min(tile, UNION) if self.name == "selected" else tile), group

    def keys(self, wanted: int) -> int:
        """Keys of a tile: of the selected branch a power of two that divides the block."""
        return min(wanted, self.lp & -self.lp) if self.name == "selected" else wanted

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.l, self.d, self.w

    def bounded(self, spans: Spans | None) -> bool:
        """Whether the first keys that a query sees, and the last queries that see a key, must be looked for."""
        return self.name == "window" or (self.name == "compressed" and spans is not None)


@triton.jit
@no_type_check
def _step(
    q_tile, q_tail, k, v, k_stride, v_stride, example, group, start, keys, member, low, high, factor, top, mass, total,
    BRANCH: tl.constexpr, LOW: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, BOXES: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, WIDTH_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k_tile, k_tail = key_rows(
        k, k_stride, example, group, start, keys, KEYS, MASKED, BOXES, DIM, WIDTH, TAIL, PRECISION
    )
    v_tile, _ = key_rows(
        v, v_stride, example, group, start, keys, KEYS, MASKED, BOXES, DIM_V, WIDTH_V, 0, PRECISION
    )
    scores = products(q_tile, q_tail, k_tile, k_tail, TAIL, PRECISION)
    if MASKED:
        columns = start + tl.arange(0, KEYS)
        seen = columns[None, :] < high[:, None]
        if LOW:
            seen &= columns[None, :] >= low[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    peak = tl.max(scores, 1) * factor
    if BRANCH == "selected":
        higher = tl.where(member, tl.maximum(top, peak), top)
        base = tl.where(member, higher, NEVER)
    else:
        higher = tl.maximum(top, peak)
        base = higher
    pattern = tl.exp2(scores * factor - base[:, None])
    shrink = tl.exp2(top - higher)
    mass = mass * shrink + tl.sum(pattern, 1)
    total = times(pattern, v_tile, total * shrink[:, None], PRECISION, True)
    return higher, mass, total


@triton.jit
@no_type_check
def _attend(
    q, k, v, o, lse, spans, blocks, members, counts, o_cmp, o_slc, gates, z, q_strides, k_strides, v_strides,
    length, keys, past, factor, heads, groups, size, stride, reach, entries,
    BRANCH: tl.constexpr, LOW: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr,
    PARTS: tl.constexpr, ENTRIES: tl.constexpr, PEEL: tl.constexpr, KEEP: tl.constexpr, BOXES: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, WIDTH_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0), tl.program_id(1) % heads
    example = (tl.program_id(1) // heads).to(tl.int64)
    if BRANCH == "compressed":
        # The longest loops first: short ones fill the gaps at the end.
        tile = tl.num_programs(0) - 1 - tile
    inner, query, head, inside = query_rows(tile, length, groups, group, TILE, GROUP)
    q += example * q_strides[0]
    if not BOXES:
        k += example * k_strides[0] + group * k_strides[2]
        v += example * v_strides[0] + group * v_strides[2]
    count = 0
    if BRANCH == "selected":
        listed = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tile
        count = tl.load(counts + listed)
        blocks += listed * entries
        members += listed * entries
    places = query.to(tl.int64) * q_strides[1] + head * q_strides[2]
    q_tile = load_rows(q, places, min(DIM, WIDTH), WIDTH, PRECISION)
    q_tail = load_tail(q, places, q_tile, DIM, WIDTH, TAIL, PRECISION)
    if spans is not None:
        spans += example * (length + past) * 2
    low, high = spanned(query + past, spans, keys, size, stride, reach, BRANCH)
    bounds = tile_bounds(
        tile * TILE + past, tl.minimum(tile * TILE + TILE, length) - 1 + past, spans, keys, size, stride, reach,
        blocks, count, BRANCH, KEYS, PARTS, ENTRIES, PEEL,
    )  # fmt: skip
    top = tl.full([TILE * GROUP], -NEVER, tl.float32)
    mass = tl.zeros([TILE * GROUP], tl.float32)
    total = tl.zeros([TILE * GROUP, WIDTH_V], tl.float32)
    for part in tl.static_range(3):
        if part > 0 or LOW:
            for index in range(bounds[part], bounds[part + 1]):
                start, member = key_tile(index, inner, spans, blocks, members, BRANCH, KEYS, PARTS)
                top, mass, total = _step(
                    q_tile, q_tail, k, v, k_strides[1], v_strides[1], example, group, start, keys, member, low, high,
                    factor, top, mass, total, BRANCH, LOW, KEYS, part != 1, BOXES, DIM, DIM_V, WIDTH, TAIL, WIDTH_V, PRECISION,
                )  # fmt: skip
    some = mass > 0
    mass = tl.where(some, mass, 1.0)
    line = (example * length + query) * (heads * groups) + head
    total = total / mass[:, None]
    if KEEP:
        save_rows(o, line * DIM_V, inside, total, DIM_V, WIDTH_V)
        tl.store(lse + line, tl.where(some, (top + tl.log2(mass)) * LN2, float("-inf")), mask=inside)
    if z is not None:
        # Rounded as the others are, so that the sum is that of the outputs that are kept.
        total = total.to(z.dtype.element_ty).to(tl.float32) * tl.load(gates + line * 3 + 2)[:, None]
        total += load_rows(o_cmp, line * DIM_V, DIM_V, WIDTH_V, "ieee") * tl.load(gates + line * 3)[:, None]
        total += (
            load_rows(o_slc, line * DIM_V, DIM_V, WIDTH_V, "ieee") * tl.load(gates + line * 3 + 1)[:, None]
        )
        save_rows(z, line * DIM_V, inside, total, DIM_V, WIDTH_V)


def walked(branch: Branch, idx: Tensor | None, tile: int, union: Any = None) -> tuple[Any, ...]:
    """The lists of blocks of all query tiles, their length, and that as a power of two; nothing for other branches."""
    if branch.name != "selected":
        return (None, None, None), 1, 1
    union = lists.union(cast(Tensor, idx), tile) if union is None else union
    entries = union.blocks.shape[-1]
    return (union.blocks, union.members, union.counts), entries, power_of_2(entries)


def attend(
    branch: Branch,
    q: Float[Tensor, "batch query heads dim"],
    k: Float[Tensor, "batch key groups dim"],
    v: Float[Tensor, "batch key groups dim_v"],
    *,
    scale: float,
    past: int = 0,
    idx: Int[Tensor, "batch query groups n"] | None = None,
    union: Any = None,
    spans: Spans | None = None,
    tuning: Tuning = None,
) -> tuple[Float[Tensor, "batch query heads dim_v"], Float[Tensor, "batch query heads"]]:
    """Output and natural log-sum-exp of one branch; a row that sees nothing has o = 0 and lse = −∞.

    Args:
        idx: the chosen blocks, of the selected branch.
        spans: who sees whom in this branch, where several texts lie in a row; `idx` then names blocks by their first
            tokens (`anchors.nsa.texts`).
        union: `lists.union(idx, tile)` where it is known; `tile` must be `tile_of(...)`.
        tuning: settings put over those of `TUNING`, by kernel.
    """
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    _launch(branch, q, k, v, o, lse, None, None, scale, past, idx, union, spans, tuning)
    return o, lse


def attend_last(
    branch: Branch,
    q: Float[Tensor, "batch query heads dim"],
    k: Float[Tensor, "batch key groups dim"],
    v: Float[Tensor, "batch key groups dim_v"],
    others: tuple[Tensor, Tensor],
    g: Float[Tensor, "batch query heads 3"],
    *,
    scale: float,
    past: int = 0,
    keep: bool = True,
    spans: Spans | None = None,
    tuning: Tuning = None,
) -> tuple[Float[Tensor, "batch query heads dim_v"], Tensor | None, Tensor | None]:
    """Σ_c g^c o^c (Eq. 5) with this branch as the last; and its own output and log-sum-exp, if they are to be kept.

    Args:
        others: the outputs of the other two, contiguous.
        g: the gates, this branch's as the third.
    """
    z = q.new_empty(*q.shape[:3], v.shape[-1])
    o = torch.empty_like(z) if keep else None
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if keep else None
    _launch(branch, q, k, v, o, lse, z, (*others, g.contiguous()), scale, past, None, None, spans, tuning)
    return z, o, lse


def tile_of(branch: Branch, kernel: str, q: Tensor, k: Tensor, v: Tensor, tuning: Tuning) -> int:
    """Positions of a query tile of a kernel."""
    fits = ranges.fits(widths(k.shape[-1], v.shape[-1]), dense(k), dense(v))
    settings = tuned(kernel, q, widest(q.shape[-1], v.shape[-1]), tuning, boxed=fits)
    return branch.tile(q.shape[2] // k.shape[2], settings["rows"])[0]


def seen_spans(spans: Spans | None, tokens: int) -> Tensor | None:
    """The keys that each of the first tokens sees, as the kernels read them."""
    return None if spans is None else spans.seen[:, :tokens].contiguous()


def _launch(branch, q, k, v, o, lse, z, others, scale, past, idx, union, spans, tuning) -> None:
    groups = demand(q, k, v, scale)
    q, k, v = map(dense, (q, k, v))
    batch, length, _, _ = q.shape
    shape = widths(q.shape[-1], v.shape[-1])
    fits = ranges.fits(shape, k, v)
    settings = tuned(f"forward.{branch.name}", q, widest(q.shape[-1], v.shape[-1]), tuning, boxed=fits)
    tile, group = branch.tile(groups, settings["rows"])
    columns = branch.keys(settings["keys"])
    listed, entries, padded = walked(branch, idx, tile, union)
    boxes = fits and bool(settings.get("boxes"))
    sources = key_sources(k, v, columns, boxes)
    with torch.cuda.device_of(q):
        _attend[cdiv(length, tile), batch * k.shape[2]](
            q, *sources, o, lse, seen_spans(spans, past + length), *listed, *(others or (None, None, None)), z, *map(strides, (q, k, v)),
            length, k.shape[1], past, scale * LOG2E.value, k.shape[2], groups, *branch.sizes, entries,
            BRANCH=branch.name, LOW=branch.bounded(spans), TILE=tile, GROUP=group, KEYS=columns, PARTS=max(1, branch.lp // columns),
            ENTRIES=padded, PEEL=bool(settings["peel"]), KEEP=o is not None, BOXES=boxes, **shape, PRECISION=precision_of(q.dtype),
            num_warps=settings["num_warps"], num_stages=settings["num_stages"],
        )  # fmt: skip


def key_sources(k: Tensor, v: Tensor, columns: int, boxed: bool) -> tuple[Any, Any]:
    """Keys and values as a kernel reads them."""
    return (ranges.boxes(k, columns), ranges.boxes(v, columns)) if boxed else (k, v)


def compressed_attention(
    q: Float[Tensor, "batch query heads dim"],
    kc: Float[Tensor, "batch compressed groups dim"],
    vc: Float[Tensor, "batch compressed groups dim_v"],
    *,
    l: int,
    d: int,
    scale: float,
    past: int = 0,
    tuning: Tuning = None,
) -> tuple[Float[Tensor, "batch query heads dim_v"], Float[Tensor, "batch query heads"]]:
    """Attn(q_t, K^cmp, V^cmp): output and log-sum-exp. Before the first block is complete (t < l − 1) the output is 0."""
    return attend(Branch("compressed", l=l, d=d), q, kc, vc, scale=scale, past=past, tuning=tuning)


def selected_attention(
    q: Float[Tensor, "batch query heads dim"],
    k: Float[Tensor, "batch key groups dim"],
    v: Float[Tensor, "batch key groups dim_v"],
    idx: Int[Tensor, "batch query groups n"],
    *,
    lp: int,
    scale: float,
    past: int = 0,
    tuning: Tuning = None,
    union: Any = None,
) -> tuple[Float[Tensor, "batch query heads dim_v"], Float[Tensor, "batch query heads"]]:
    """Attn over the tokens of the chosen blocks (Eq. 12): output and log-sum-exp."""
    return attend(
        Branch("selected", lp=lp), q, k, v, scale=scale, past=past, idx=idx, union=union, tuning=tuning
    )


def window_attention(
    q: Float[Tensor, "batch query heads dim"],
    k: Float[Tensor, "batch key groups dim"],
    v: Float[Tensor, "batch key groups dim_v"],
    *,
    w: int,
    scale: float,
    past: int = 0,
    tuning: Tuning = None,
) -> tuple[Float[Tensor, "batch query heads dim_v"], Float[Tensor, "batch query heads"]]:
    """Attn over the last w tokens: output and log-sum-exp."""
    return attend(Branch("window", w=w), q, k, v, scale=scale, past=past, tuning=tuning)
