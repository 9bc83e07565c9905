"""Native Sparse Attention, equation by equation: the oracle of the kernels.

    o_t = Σ_{c ∈ {cmp, slc, win}} g_t^c · Attn(q_t, K_t^c, V_t^c)                                     (Eq. 5)

Plain torch on any device and in any precision, float64 too; patterns are formed whole, so memory is O(T²). Positions
count from 0. Query head h reads group h // G, with G query heads per group. With a cache, query row i stands at
position i + `past`. Gates and compressed keys come from `anchors.nsa.model`; nothing here has weights.

Source: Yuan et al., "Native Sparse Attention" (ACL 2025), section 3.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anchors.errors import AnchorsError
from anchors.nsa.geometry import Geometry

Phi = Callable[[Tensor], Tensor]
"""φ of Eq. 7: [..., l, D] → [..., D']."""


def compress(
    x: Float[Tensor, "batch tokens groups dim"], phi: Phi, *, l: int, d: int
) -> Float[Tensor, "batch compressed groups dim_out"]:
    """K^cmp = {φ(k_{id : id+l})}: one key (or value) per complete block of l tokens, every d tokens (Eq. 7)."""
    batch, tokens, groups, dim = x.shape
    if tokens < l:
        # Through φ, so that its weights have a gradient, of 0, from short texts too.
        return phi(x.new_zeros(batch, 0, groups, l, dim))
    return phi(x.unfold(1, l, d).transpose(-1, -2))


def compressed_visible(
    queries: int, compressed: int, *, l: int, d: int, past: int = 0, device: torch.device | str = "cpu"
) -> Bool[Tensor, "query compressed"]:
    """A query sees a compressed token once its whole block lies in the past: i·d + l − 1 ≤ t."""
    t = torch.arange(queries, device=device)[:, None] + past
    return torch.arange(compressed, device=device) * d + l - 1 <= t


def selected_visible(
    idx: Int[Tensor, "batch query groups n"], tokens: int, *, lp: int, past: int = 0
) -> Bool[Tensor, "batch query groups token"]:
    """The tokens of the chosen blocks that are not in the future (Eq. 12)."""
    blocks = -(-tokens // lp)
    chosen = idx.new_zeros(*idx.shape[:-1], blocks + 1, dtype=torch.bool)
    chosen.scatter_(-1, idx.long().where(idx >= 0, blocks), True)
    per_token = chosen[..., :blocks].repeat_interleave(lp, -1)[..., :tokens]
    t = torch.arange(idx.shape[1], device=idx.device)[:, None] + past
    return per_token & (torch.arange(tokens, device=idx.device) <= t)[:, None]


def window_visible(
    queries: int, tokens: int, *, w: int, past: int = 0, device: torch.device | str = "cpu"
) -> Bool[Tensor, "query token"]:
    """The last w tokens, the current one included."""
    t = torch.arange(queries, device=device)[:, None] + past
    j = torch.arange(tokens, device=device)
    return (j <= t) & (j > t - w)


def attention(
    q: Float[Tensor, "batch query heads dim"],
    k: Float[Tensor, "batch key groups dim"],
    v: Float[Tensor, "batch key groups dim_v"],
    visible: Bool[Tensor, "..."],
    scale: float,
    bias: Tensor | None = None,
) -> tuple[
    Float[Tensor, "batch query heads dim_v"],
    Float[Tensor, "batch query heads"],
    Float[Tensor, "batch query heads key"],
]:
    """Output, log Σ exp of the scores, and the pattern P. A row that sees nothing has o = 0, lse = −∞ and P = 0.

    Args:
        visible: broadcastable to [batch, query, groups, key].
        bias: added to the scaled scores, broadcastable to [batch, query, heads, key]; −∞ hides a key.
    """
    batch, queries, heads, _ = q.shape
    groups = k.shape[2]
    folded = q.unflatten(2, (groups, heads // groups))
    scores = torch.einsum("btghd,bshd->btghs", folded.transpose(2, 3), k).transpose(2, 3) * scale
    if bias is not None:
        scores = scores + bias.expand(batch, queries, heads, -1).unflatten(2, (groups, heads // groups))
    scores = scores.masked_fill(~visible.expand(batch, queries, groups, -1)[:, :, :, None], -math.inf)
    # The peak is finite even where nothing is seen: exp(−∞ − 0) = 0 has a gradient, −∞ − (−∞) has none.
    peak = scores.detach().amax(-1, keepdim=True) if k.shape[1] else scores.new_zeros(*scores.shape[:-1], 1)
    peak = peak.masked_fill(peak == -math.inf, 0)
    weights = (scores - peak).exp()
    mass = weights.sum(-1, keepdim=True)
    pattern = weights / mass.where(mass > 0, 1)
    lse = (mass.where(mass > 0, 1).log() + peak).masked_fill(mass == 0, -math.inf)[..., 0]
    o = torch.einsum("btghs,bshd->bthgd", pattern.transpose(2, 3), v)
    return o.flatten(2, 3), lse.flatten(2, 3), pattern.flatten(2, 3)


def compressed_attention(q, kc, vc, *, l: int, d: int, scale: float, past: int = 0):
    """Attn(q_t, K^cmp, V^cmp): output and log-sum-exp. Before the first block is complete (t < l − 1) the output is 0."""
    visible = compressed_visible(q.shape[1], kc.shape[1], l=l, d=d, past=past, device=q.device)
    return attention(q, kc, vc, visible[None, :, None], scale)[:2]


def selected_attention(q, k, v, idx, *, lp: int, scale: float, past: int = 0):
    """Attn over the tokens of the chosen blocks (Eq. 12): output and log-sum-exp."""
    return attention(q, k, v, selected_visible(idx, k.shape[1], lp=lp, past=past), scale)[:2]


def window_attention(q, k, v, *, w: int, scale: float, past: int = 0):
    """Attn over the last w tokens: output and log-sum-exp."""
    visible = window_visible(q.shape[1], k.shape[1], w=w, past=past, device=q.device)
    return attention(q, k, v, visible[None, :, None], scale)[:2]


def overlap(
    compressed: int, blocks: int, *, l: int, d: int, lp: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "compressed blocks"]:
    """W of Eq. 9: how many strides compressed token i shares with selection block j.

        W_ij = |[i·d, i·d + l) ∩ [j·l', (j + 1)·l')| / d

    For l = 32, d = 16, l' = 64 a block weighs its compressed tokens 1, 2, 2, 2, 1 (the paper's indices count from 1).
    """
    start = torch.arange(compressed, device=device, dtype=torch.float32)[:, None] * d
    edge = torch.arange(blocks, device=device, dtype=torch.float32) * lp
    return (torch.minimum(start + l, edge + lp) - torch.maximum(start, edge)).clamp(min=0) / d


def importance_of(
    pattern: Float[Tensor, "batch query heads compressed"],
    groups: int,
    blocks: int,
    *,
    l: int,
    d: int,
    lp: int,
) -> Float[Tensor, "batch query groups blocks"]:
    """p^slc = Σ_{h in group} p^cmp_h W (Eqs. 9 and 10)."""
    heads = pattern.shape[2]
    weights = overlap(pattern.shape[-1], blocks, l=l, d=d, lp=lp, device=pattern.device)
    return pattern.unflatten(2, (groups, heads // groups)).sum(3) @ weights.to(pattern.dtype)


def block_importance(
    q, kc, lse, *, l: int, d: int, lp: int, tokens: int, scale: float, past: int = 0
) -> Float[Tensor, "batch query groups blocks"]:
    """Importance of every selection block for every query and group (Eqs. 8 to 10), from the branch's log-sum-exp."""
    groups = kc.shape[2]
    folded = q.unflatten(2, (groups, q.shape[2] // groups))
    scores = torch.einsum("btghd,bshd->btghs", folded.transpose(2, 3), kc).transpose(2, 3) * scale
    visible = compressed_visible(q.shape[1], kc.shape[1], l=l, d=d, past=past, device=q.device)
    finite = lse.masked_fill(lse == -math.inf, 0).to(scores.dtype)
    pattern = (scores - finite.unflatten(2, (groups, -1))[..., None]).exp() * visible[:, None, None]
    return importance_of(pattern.flatten(2, 3), groups, -(-tokens // lp), l=l, d=d, lp=lp)


def select(
    importance: Float[Tensor, "batch query groups blocks"],
    *,
    geometry: Geometry,
    tokens: int,
    past: int = 0,
    force: Tensor | None = None,
    ban: Tensor | None = None,
    bias: Tensor | None = None,
    position: Int[Tensor, "batch query"] | None = None,
) -> Int[Tensor, "batch query groups n"]:
    """I_t: the top-n blocks of each query and group (Eq. 11), ascending, −1 at the end where there are fewer.

    Candidates are the blocks j ≤ ⌊t / l'⌋. The first `n_init`, the last `n_local` and the `force`d ones come first,
    then the higher score, then the lower index.

    Args:
        force, ban: blocks always or never to choose; `ban` wins.
        bias: added to the importance. All three broadcast to [batch, query, groups, blocks].
        position: where the queries stand in their texts; from `past` on unless given.
    """
    batch, queries, groups, blocks = importance.shape
    device = importance.device
    t = torch.arange(queries, device=device) + past if position is None else position
    own = (t // geometry.lp)[..., None, None]
    j = torch.arange(blocks, device=device)
    first = (j < geometry.n_init) | ((j > own - geometry.n_local) & (j <= own))
    candidate = (j <= own).expand(batch, queries, groups, blocks)
    if force is not None:
        first = first | force
    if ban is not None:
        candidate = candidate & ~ban
    score = importance if bias is None else importance + bias
    # Two stable sorts order by (first, score, index), however large a score is.
    order = score.masked_fill(~candidate, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = (candidate & first).long() * 2 + candidate.long()
    order = order.gather(-1, rank.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
    chosen = order[..., : geometry.n]
    chosen = chosen.where(candidate.gather(-1, chosen), blocks).sort(-1).values
    if blocks < geometry.n:
        chosen = torch.nn.functional.pad(chosen, (0, geometry.n - blocks), value=blocks)
    return chosen.where(chosen < blocks, -1).int()


def select_blocks(
    q,
    kc,
    lse,
    *,
    geometry: Geometry,
    tokens: int,
    scale: float,
    past: int = 0,
    force=None,
    ban=None,
    bias=None,
) -> Int[Tensor, "batch query groups n"]:
    """I_t from the queries and the compressed keys (Eqs. 8 to 11); no gradient flows through the choice."""
    with torch.no_grad():
        importance = block_importance(
            q, kc, lse, l=geometry.l, d=geometry.d, lp=geometry.lp, tokens=tokens, scale=scale, past=past
        )
        return select(
            importance, geometry=geometry, tokens=tokens, past=past, force=force, ban=ban, bias=bias
        )


def combine(
    o_cmp: Float[Tensor, "batch query heads dim_v"],
    o_slc: Float[Tensor, "batch query heads dim_v"],
    o_win: Float[Tensor, "batch query heads dim_v"],
    g: Float[Tensor, "batch query heads 3"],
) -> Float[Tensor, "batch query heads dim_v"]:
    """Σ_c g^c o^c (Eq. 5)."""
    return o_cmp * g[..., 0:1] + o_slc * g[..., 1:2] + o_win * g[..., 2:3]


def demand_groups(heads: int, groups: int) -> None:
    """Raises when the query heads cannot be divided among the groups."""
    if groups < 1 or heads % groups:
        raise AnchorsError(
            f"{heads} query heads cannot be divided among {groups} groups.",
            "Choose a number of groups (key-value heads) that divides the query heads.",
            code="geometry",
        )
