"""NSA as one function with two backends: the equations of `reference`, and Triton kernels.

    o_t = Σ_{c ∈ {cmp, slc, win}} g_t^c · Attn(q_t, K_t^c, V_t^c)                                     (Eq. 5)

Source: Yuan et al., "Native Sparse Attention" (ACL 2025), section 3.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anchors.attention.streaming import triton_runs
from anchors.errors import AnchorsError, nearest
from anchors.nsa import reference
from anchors.nsa.geometry import BACKENDS, Geometry
from anchors.nsa.texts import Texts

ROWS = 256
"""Query rows whose patterns are formed at once, where whole ones are not needed."""
CMP, SLC, WIN = range(3)
BRANCHES = ("cmp", "slc", "win")
"""The branches, in the order of the gates."""


@dataclass(frozen=True)
class Branches:
    """The keys and values of the three branches; the compressed ones are φ of blocks of their own raw ones."""

    kc: Float[Tensor, "batch compressed groups dim"]
    vc: Float[Tensor, "batch compressed groups dim_v"]
    k_slc: Float[Tensor, "batch tokens groups dim"]
    v_slc: Float[Tensor, "batch tokens groups dim_v"]
    k_win: Float[Tensor, "batch tokens groups dim"]
    v_win: Float[Tensor, "batch tokens groups dim_v"]

    @property
    def tokens(self) -> int:
        return self.k_slc.shape[1]


@dataclass(frozen=True)
class Trace:
    """Everything between the inputs of NSA and its output.

    Attributes:
        o: the output.
        branch_o: the outputs of the branches, before the gates.
        lse: log Σ exp of each branch's scores.
        patterns: P^c of each branch; its keys are compressed tokens in the first, tokens in the others.
        importance: p^slc (Eq. 10).
        idx: the chosen blocks I_t.
        gates: g^c.
    """

    o: Float[Tensor, "batch query heads dim_v"]
    branch_o: tuple[Tensor, Tensor, Tensor]
    lse: tuple[Tensor, Tensor, Tensor]
    patterns: tuple[Tensor, Tensor, Tensor]
    importance: Float[Tensor, "batch query groups blocks"]
    idx: Int[Tensor, "batch query groups n"]
    gates: Float[Tensor, "batch query heads 3"]


def resolve(backend: str, q: Tensor, geometry: Geometry) -> str:
    """The backend that `auto` means for some queries: the kernels where they run and can compute this.

    Raises:
        AnchorsError: an unknown backend; Triton where it cannot run.
    """
    if backend not in BACKENDS:
        raise AnchorsError(
            f"There is no backend called {backend!r}.", nearest(backend, BACKENDS), code="unknown-name"
        )
    if backend == "auto":
        able = q.dtype in (torch.float32, torch.bfloat16, torch.float16) and geometry.lp % 16 == 0
        return "triton" if able and triton_runs(q.device) else "reference"
    if backend == "triton" and not triton_runs(q.device) and not _interpreted():
        raise AnchorsError(
            f"backend='triton' was asked for tensors on {q.device}.",
            "The kernels need an NVIDIA GPU (compute capability 8.0 or later); move the tensors there or use "
            "backend='reference'.",
            code="device",
        )
    return backend


def nsa_attention(
    q: Float[Tensor, "batch query heads dim"],
    kv: Branches,
    gates: Float[Tensor, "batch query heads 3"],
    geometry: Geometry,
    *,
    scale: float | None = None,
    q_cmp: Float[Tensor, "batch query heads dim"] | None = None,
    past: int | None = None,
    idx: Int[Tensor, "batch query groups n"] | None = None,
    force: Tensor | None = None,
    ban: Tensor | None = None,
    bias: Tensor | None = None,
    texts: Texts | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch query heads dim_v"]:
    """Native sparse attention, differentiable by everything but the choice of blocks.

    Args:
        q: queries; head h reads group h // G.
        kv: keys and values of the three branches.
        gates: g^cmp, g^slc, g^win of every query and head.
        geometry: l, d, l', n, w.
        scale: factor on the scores; 1/√d_k unless given.
        q_cmp: queries of the compressed branch where they differ (no rotary embedding there).
        past: tokens before the first query; all that `kv` holds beyond the queries, unless given.
        idx: the chosen blocks, where they are known: each at most once in a row, −1 for none.
        force, ban, bias: blocks always or never to choose, and what is added to their importance; broadcastable to
            [batch, query, groups, blocks].
        texts: several texts in a row, packed or padded, which do not see each other; blocks are counted within each, and
            `kv` holds the compressed keys of `texts.laid(geometry).compress`.
        backend: auto, reference or triton.

    Raises:
        AnchorsError: shapes that do not fit, a backend that cannot run here; entries that are not numbers, from the
            reference backend (the kernels would have to wait for the GPU to tell, and pass them on instead).

    Example:
        >>> kv = Branches(compress(k, phi, l=32, d=16), compress(v, phi, l=32, d=16), k, v, k, v)
        >>> nsa_attention(q, kv, gates, Geometry()).shape        # batch × tokens × heads × d_v
    """
    past, scale = _checked(q, kv, gates, geometry, past, scale, q_cmp, idx, texts)
    if texts is not None:
        texts = texts.expanded(len(q))
        gates = texts.guarded(gates)
    if resolve(backend, q, geometry) == "reference":
        return trace(
            q,
            kv,
            gates,
            geometry,
            scale=scale,
            q_cmp=q_cmp,
            past=past,
            idx=idx,
            force=force,
            ban=ban,
            bias=bias,
            texts=texts,
        ).o
    from anchors.nsa.kernels.sparse_attention import sparse_attention

    return sparse_attention(
        q, q_cmp, kv.kc, kv.vc, kv.k_slc, kv.v_slc, kv.k_win, kv.v_win, gates, idx,
        geometry=geometry, scale=scale, past=past, force=force, ban=ban, bias=bias, texts=texts,
    )  # fmt: skip


def trace(
    q: Float[Tensor, "batch query heads dim"],
    kv: Branches,
    gates: Float[Tensor, "batch query heads 3"],
    geometry: Geometry,
    *,
    scale: float | None = None,
    q_cmp: Float[Tensor, "batch query heads dim"] | None = None,
    past: int | None = None,
    idx: Int[Tensor, "batch query groups n"] | None = None,
    force: Tensor | None = None,
    ban: Tensor | None = None,
    bias: Tensor | None = None,
    token_bias: Float[Tensor, "#batch #heads query tokens"] | None = None,
    texts: Texts | None = None,
) -> Trace:
    """The same by the equations, with all that lies between; memory O(T²).

    Args:
        token_bias: added to the scores of the selected and the window branch; a compressed token gets the mean over
            its block, so that −∞ at one token hides every block it is in.
        texts: as of `nsa_attention`, of which importance and choices count blocks within each.
    """
    past, scale = _checked(q, kv, gates, geometry, past, scale, q_cmp, idx, texts)
    if texts is not None and token_bias is not None:
        raise AnchorsError(
            "Scores of pairs of tokens were to be changed where several texts lie in a row.",
            "Give one text a row.",
            code="shape",
        )
    _numbers(q=q, gates=gates, **vars(kv))
    g, groups, queries = geometry, kv.k_slc.shape[2], q.shape[1]
    q_cmp = q if q_cmp is None else q_cmp
    cmp_bias = slc_bias = None
    if token_bias is not None:
        slc_bias = token_bias.transpose(1, 2)
        cmp_bias = slc_bias.unfold(-1, g.l, g.d).mean(-1) if kv.kc.shape[1] else slc_bias[..., :0]
    layout = None if texts is None else texts.expanded(len(q)).laid(g)
    if layout is None:
        seen = reference.compressed_visible(
            queries, kv.kc.shape[1], l=g.l, d=g.d, past=past, device=q.device
        )[None]
        near = reference.window_visible(queries, kv.tokens, w=g.w, past=past, device=q.device)[None]
        position = None
    else:
        seen = layout.compressed.visible(kv.kc.shape[1], past, queries)
        near = layout.window.visible(kv.tokens, past, queries)
        position = layout.texts.position[:, past : past + queries]
    o_cmp, lse_cmp, p_cmp = reference.attention(q_cmp, kv.kc, kv.vc, seen[:, :, None], scale, cmp_bias)
    if layout is None:
        importance = reference.importance_of(
            p_cmp.detach(), groups, g.blocks(kv.tokens), l=g.l, d=g.d, lp=g.lp
        )
    else:
        importance = (
            p_cmp.detach().unflatten(2, (groups, -1)).sum(3) @ layout.overlap().to(p_cmp.dtype)[:, None]
        )
    if idx is None:
        idx = reference.select(
            importance, geometry=g, tokens=kv.tokens, past=past, force=force, ban=ban, bias=bias,
            position=position,
        )  # fmt: skip
    if layout is None:
        seen = reference.selected_visible(idx, kv.tokens, lp=g.lp, past=past)
    else:
        seen = layout.selected_visible(idx, past)
    o_slc, lse_slc, p_slc = reference.attention(q, kv.k_slc, kv.v_slc, seen, scale, slc_bias)
    o_win, lse_win, p_win = reference.attention(q, kv.k_win, kv.v_win, near[:, :, None], scale, slc_bias)
    return Trace(
        o=reference.combine(o_cmp, o_slc, o_win, gates),
        branch_o=(o_cmp, o_slc, o_win),
        lse=(lse_cmp, lse_slc, lse_win),
        patterns=(p_cmp, p_slc, p_win),
        importance=importance,
        idx=idx,
        gates=gates,
    )


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@torch.no_grad()
def choose(
    q: Float[Tensor, "batch query heads dim"],
    kv: Branches,
    geometry: Geometry,
    *,
    scale: float,
    q_cmp: Float[Tensor, "batch query heads dim"] | None = None,
    past: int = 0,
    backend: str = "auto",
) -> Int[Tensor, "batch query groups n"]:
    """I_t alone (Eqs. 8 to 11), as `nsa_attention` chooses it; the reference in parts, of O(T) memory each."""
    q, g = q if q_cmp is None else q_cmp, geometry
    common: dict[str, Any] = {"geometry": g, "tokens": kv.tokens, "scale": scale}
    if resolve(backend, q, geometry) == "triton":
        from anchors.nsa.kernels.attention import compressed_attention
        from anchors.nsa.kernels.selection import select_blocks

        _, lse = compressed_attention(q, kv.kc, kv.vc, l=g.l, d=g.d, scale=scale, past=past)
        return select_blocks(q, kv.kc, lse, past=past, **common)
    parts = []
    for start in range(0, q.shape[1], ROWS):
        rows = q[:, start : start + ROWS]
        _, lse = reference.compressed_attention(
            rows, kv.kc, kv.vc, l=g.l, d=g.d, scale=scale, past=past + start
        )
        parts.append(reference.select_blocks(rows, kv.kc, lse, past=past + start, **common))
    return torch.cat(parts, dim=1)


def _checked(
    q, kv: Branches, gates, geometry: Geometry, past, scale, q_cmp, idx, texts: Texts | None = None
) -> tuple[int, float]:
    batch, queries, heads, dim = q.shape
    if not batch or not queries:
        raise AnchorsError(
            f"The batch is empty: q has the shape {tuple(q.shape)}.", "Give at least one token.", code="shape"
        )
    reference.demand_groups(heads, kv.k_slc.shape[2])
    tokens = kv.tokens
    wanted = {
        "kc": (batch, geometry.compressed(tokens)), "vc": (batch, geometry.compressed(tokens)),
        "k_slc": (batch, tokens), "v_slc": (batch, tokens), "k_win": (batch, tokens), "v_win": (batch, tokens),
    }  # fmt: skip
    for name, shape in wanted.items():
        found = getattr(kv, name).shape
        size = dim if name.startswith("k") else kv.v_slc.shape[-1]
        if tuple(found) != (*shape, kv.k_slc.shape[2], size):
            raise AnchorsError(
                f"{name} has the shape {tuple(found)}, not {(*shape, kv.k_slc.shape[2], size)}.",
                f"The queries are {tuple(q.shape)}, the geometry is {geometry}.",
                code="shape",
            )
    if tuple(gates.shape) != (batch, queries, heads, 3):
        raise AnchorsError(
            f"The gates have the shape {tuple(gates.shape)}, not {(batch, queries, heads, 3)}.",
            "One gate for each of cmp, slc and win, per query and head.",
            code="shape",
        )
    if q_cmp is not None and q_cmp.shape != q.shape:
        raise AnchorsError(
            f"q_cmp has the shape {tuple(q_cmp.shape)}, q {tuple(q.shape)}.",
            "Give one query for each.",
            code="shape",
        )
    if texts is not None and (texts.tokens != tokens or len(texts.start) not in (1, batch)):
        raise AnchorsError(
            f"The texts divide {tuple(texts.start.shape)} tokens, but the keys are {(batch, tokens)}.",
            "Make them from the bounds, positions or mask of these keys.",
            code="shape",
        )
    if idx is not None:
        _demand_blocks(idx, (batch, queries, kv.k_slc.shape[2]), geometry.blocks(tokens))
    past = tokens - queries if past is None else past
    if past < 0 or past + queries > tokens:
        raise AnchorsError(
            f"{queries} queries after {past} tokens need {past + queries} keys, but there are {tokens}.",
            "Append the keys of the queries first.",
            code="shape",
        )
    return past, dim**-0.5 if scale is None else float(scale)


def _demand_blocks(idx: Tensor, shape: tuple[int, int, int], blocks: int) -> None:
    if tuple(idx.shape[:3]) != shape or idx.dim() != 4 or idx.is_floating_point():
        raise AnchorsError(
            f"idx has the shape {tuple(idx.shape)} of {idx.dtype}.",
            f"Give block numbers, [batch, query, groups, n] with {shape} in front.",
            code="shape",
        )
    if idx.is_cuda:  # looking would wait for the GPU
        return
    ordered = idx.sort(-1).values
    double = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if idx.numel() and (int(idx.max()) >= blocks or int(idx.min()) < -1 or bool(double.any())):
        raise AnchorsError(
            f"idx names blocks beyond 0 to {blocks - 1}, or one twice in a row.",
            "−1 stands for no block.",
            code="shape",
        )


def _numbers(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        # One entry that is not a number spoils the sum, which is much quicker; a sum may overflow without one.
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise AnchorsError(
                f"{name} holds entries that are not numbers.",
                "Look for overflow before this layer; float16 overflows easily.",
                code="not-finite",
            )
