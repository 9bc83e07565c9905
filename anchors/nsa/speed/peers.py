"""What the benchmark of NSA compares: our kernels in parts, torch's attention, other packages, and the exact values.

Every implementation gets the same tensors, and every selected attention the same blocks. A package that is not
installed, or that cannot take the shape, raises; the benchmark reports it.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anchors.errors import AnchorsError
from anchors.nsa import reference
from anchors.nsa.geometry import Geometry

SHAPES = {
    "64/4 D128": (64, 4, 128, 128),
    "64/4 D192/128": (64, 4, 192, 128),
    "32/8 D128": (32, 8, 128, 128),
    "16/16 D64": (16, 16, 64, 64),
}
"""Query heads, groups, and sizes of keys and of values."""
LEAVES = {
    "full": ("q", "k", "v"),
    "cmp": ("q", "kc", "vc"),
    "slc": ("q", "k", "v"),
    "win": ("q", "k_win", "v_win"),
    "all": ("q", "kc", "vc", "k", "v", "k_win", "v_win", "gates"),
}
"""What each part is differentiated by, in the order of `Timed.backward`."""
PATIENCE = 300
"""Seconds that FlexAttention's compiler may take for one length."""
EAGER = 4096
CHUNK = 32
"""The longest text whose patterns are formed whole; queries whose patterns are formed at once on a longer one."""


@dataclass(frozen=True)
class Case:
    """The tensors of one comparison; `k` and `v` are those of the selected branch and of full attention."""

    geometry: Geometry
    q: Float[Tensor, "batch tokens heads dim"]
    k: Float[Tensor, "batch tokens groups dim"]
    v: Float[Tensor, "batch tokens groups dim_v"]
    kc: Float[Tensor, "batch compressed groups dim"]
    vc: Float[Tensor, "batch compressed groups dim_v"]
    k_win: Float[Tensor, "batch tokens groups dim"]
    v_win: Float[Tensor, "batch tokens groups dim_v"]
    gates: Float[Tensor, "batch tokens heads 3"]
    dz: Float[Tensor, "batch tokens heads dim_v"]
    idx: Int[Tensor, "batch tokens groups n"]
    tuning: Any = None

    @property
    def tokens(self) -> int:
        return self.q.shape[1]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @cached_property
    def pairs(self) -> dict[str, int]:
        """Pairs of a query and a key that it attends to, over all heads, by part."""
        g, t = self.geometry, torch.arange(self.tokens, device=self.q.device)
        batch, _, heads, _ = self.q.shape
        seen = {
            "full": t + 1,
            "cmp": ((t + 1 - g.l + g.d).clamp(min=0) // g.d).clamp(max=self.kc.shape[1]),
            "win": (t + 1).clamp(max=g.w),
        }
        counts = {name: int(keys.sum()) * batch * heads for name, keys in seen.items()}
        chosen = (t[:, None, None] - self.idx * g.lp + 1).clamp(0, g.lp).where(self.idx >= 0, 0)
        counts["slc"] = int(chosen.sum()) * heads // self.k.shape[2]
        return counts | {"all": counts["cmp"] + counts["slc"] + counts["win"], "select": counts["cmp"]}


def _same(slopes: Sequence[Tensor]) -> Sequence[Tensor]:
    return slopes


@dataclass(frozen=True)
class Timed:
    """Something to time.

    Attributes:
        part: what it computes: a key of `LEAVES`, or a step without exact values.
        forward: the output, [batch, tokens, heads, dim_v] for the parts of `LEAVES`.
        backward: the slopes of Σ dz · output; whatever precedes them is computed once, at the first call.
        restore: those slopes in the shapes of `LEAVES`.
        variant: one of several ways of which the fastest counts.
    """

    implementation: str
    part: str
    forward: Callable[[], Any]
    backward: Callable[[], Sequence[Tensor]] | None = None
    restore: Callable[[Sequence[Tensor]], Sequence[Tensor]] = _same
    variant: str = ""


def exact(case: Case, part: str, rows: Tensor | None = None) -> tuple[Tensor, Sequence[Tensor]]:
    """Output and slopes in float32 by the equations; with `rows`, of these queries only, and only the slope by q."""
    if rows is None:
        return _exact(case, part, torch.arange(case.tokens, device=case.q.device), LEAVES[part])
    pieces = [_exact(case, part, some, LEAVES[part][:1]) for some in rows.split(CHUNK)]
    return torch.cat([o for o, _ in pieces], 1), [torch.cat([slopes[0] for _, slopes in pieces], 1)]


def _exact(case: Case, part: str, rows: Tensor, wanted: Sequence[str]) -> tuple[Tensor, Sequence[Tensor]]:
    held = {name: getattr(case, name).float() for name in LEAVES[part]}
    for name in {"q", "gates"} & set(held):
        held[name] = held[name][:, rows]
    held |= {name: held[name].detach().requires_grad_() for name in wanted}
    if part == "all":
        pairs = (("cmp", "kc", "vc"), ("slc", "k", "v"), ("win", "k_win", "v_win"))
        parts = [_attended(case, one, held["q"], held[k], held[v], rows) for one, k, v in pairs]
        o = reference.combine(*parts, held["gates"])
    else:
        o = _attended(case, part, *(held[name] for name in LEAVES[part]), rows)
    slopes = torch.autograd.grad(o, [held[name] for name in wanted], case.dz[:, rows].float())
    return o.detach(), slopes


def _attended(case: Case, part: str, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    g, t, j = case.geometry, rows[:, None], torch.arange(k.shape[1], device=k.device)
    if part == "cmp":
        seen = (j * g.d + g.l - 1 <= t)[None, :, None]
    elif part == "slc":
        # As if all queries stood at the end, so that the causal mask of these rows is the only one.
        chosen = reference.selected_visible(case.idx[:, rows], case.tokens, lp=g.lp, past=case.tokens)
        seen = chosen & (j <= t)[:, None]
    else:
        seen = ((j <= t) & ((j > t - g.w) | (part != "win")))[None, :, None]
    return reference.attention(q, k, v, seen, case.scale)[0]


def ours(case: Case) -> list[Timed]:
    """Our kernels: the three branches, the steps between them, and all of it."""
    from anchors.nsa.kernels import attention, lists, selection
    from anchors.nsa.kernels import sparse_attention as gradients

    g = case.geometry
    common: dict[str, Any] = {"scale": case.scale, "tuning": case.tuning}

    def piece(part: str, branch: attention.Branch) -> Timed:
        q, k, v = (getattr(case, name) for name in LEAVES[part])
        chosen: dict[str, Any] = {"idx": case.idx} if part == "slc" else {}
        held: list[Tensor] = []

        def backward() -> Sequence[Tensor]:
            if not held:
                o, lse = attention.attend(branch, q, k, v, **chosen, **common)[:2]
                sums = gradients.inner(case.dz, o, o, o)
                held.extend([lse, sums[..., 0], torch.ones_like(sums)[..., 0]])
            rows = (q, k, v, case.dz, *held)
            dq = gradients.query_gradient(branch, *rows, **chosen, **common)
            return dq, *gradients.key_gradients(branch, *rows, **chosen, **common)

        forward = lambda: attention.attend(branch, q, k, v, **chosen, **common)[0]  # noqa: E731
        return Timed("ours", part, forward, backward)

    def whole(q, kc, vc, k, v, k_win, v_win, gates) -> Tensor:
        return gradients.sparse_attention(
            q, None, kc, vc, k, v, k_win, v_win, gates, None, geometry=g, **common
        )

    branches = {
        "cmp": attention.Branch("compressed", l=g.l, d=g.d),
        "slc": attention.Branch("selected", lp=g.lp),
    }
    branches["win"] = attention.Branch("window", w=g.w)
    lse = attention.attend(branches["cmp"], case.q, case.kc, case.vc, **common)[1]
    choose: dict[str, Any] = {"geometry": g, "tokens": case.tokens, **common}
    others = case.dz, case.dz.roll(1, 1)
    window = [getattr(case, name) for name in LEAVES["win"]]
    group = case.q.shape[2] // case.k.shape[2]
    tile = branches["slc"].tile(group, 64)[0]
    return [
        *(piece(part, branch) for part, branch in branches.items()),
        Timed("ours", "select", lambda: selection.select_blocks(case.q, case.kc, lse, **choose)),
        Timed("ours", f"union of {tile}", lambda: vars(lists.union(case.idx, tile, case.tuning)).values()),
        Timed("ours", "inverse", lambda: vars(lists.inverse(case.idx, g.blocks(case.tokens))).values()),
        Timed(
            "ours",
            "win and sum",
            lambda: attention.attend_last(branches["win"], *window, others, case.gates, **common),
        ),
        _differentiable("ours", "all", whole, case),
    ]


def eager(case: Case) -> list[Timed]:
    """The equations in torch, with the blocks given."""
    from anchors.nsa.attention import Branches, nsa_attention

    if case.tokens > EAGER:
        raise AnchorsError(f"patterns of {case.tokens} tokens are not formed whole.", code="length")

    def whole(q, kc, vc, k, v, k_win, v_win, gates) -> Tensor:
        kv = Branches(kc, vc, k, v, k_win, v_win)
        return nsa_attention(q, kv, gates, case.geometry, idx=case.idx, backend="reference")

    return [_differentiable("eager", "all", whole, case)]


def sdpa(case: Case, name: str, backend: SDPBackend) -> list[Timed]:
    """Full attention of torch, with grouped heads and with expanded ones."""
    groups, dim_v = case.k.shape[2], case.v.shape[-1]
    wide = max(case.q.shape[-1], dim_v) if backend == SDPBackend.FLASH_ATTENTION else dim_v

    def task(expanded: bool) -> Timed:
        q, k, v = (x.transpose(1, 2) for x in (case.q, case.k, F.pad(case.v, (0, wide - dim_v))))
        if expanded:
            k, v = (x.repeat_interleave(q.shape[1] // groups, 1) for x in (k, v))

        def call(q, k, v) -> Tensor:
            with sdpa_kernel(backend):
                o = F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=case.scale, enable_gqa=not expanded
                )
            return o.transpose(1, 2)[..., :dim_v]

        def restore(slopes: Sequence[Tensor]) -> Sequence[Tensor]:
            dq, *rest = (x.transpose(1, 2) for x in slopes)
            dk, dv = (x.float().unflatten(2, (groups, -1)).sum(3) for x in rest)
            return dq, dk, dv[..., :dim_v]

        made = _over(name, "full", call, [x.contiguous() for x in (q, k, v)], case.dz)
        return replace(made, restore=restore, variant="expanded heads" if expanded else "grouped heads")

    return [task(False)] if groups == case.q.shape[2] else [task(False), task(True)]


def flex_compiled(shape: list[int], shape_v: list[int], w: int) -> None:
    """Runs FlexAttention once, so that what it compiles for these sizes is kept."""
    (batch, tokens, heads, dim), (_, _, groups, dim_v) = shape, shape_v
    draw = lambda *size: torch.randn(batch, tokens, *size, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    q, k, v, gates = draw(heads, dim), draw(groups, dim), draw(groups, dim_v), draw(heads, 3)
    idx = torch.zeros(batch, tokens, groups, 1, dtype=torch.int32, device="cuda")
    case = Case(Geometry(w=w), q, k, v, k, v, k, v, gates, draw(heads, dim_v), idx)
    for task in flex(case, alone=True):
        task.forward()
        if task.backward is not None:
            task.backward()
    torch.cuda.synchronize()


def flex(case: Case, alone: bool = False) -> list[Timed]:
    """FlexAttention, compiled: full attention and the window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cuda = case.q.is_cuda
    if cuda and not alone:
        # Its compiler was seen not to end; what a process of its own has compiled lies in the cache on the disk.
        call = f"flex_compiled({list(case.q.shape)}, {list(case.v.shape)}, {case.geometry.w})"
        try:
            subprocess.run(
                [sys.executable, "-c", f"from anchors.nsa.speed.peers import flex_compiled; {call}"],
                timeout=PATIENCE, check=True, capture_output=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"its kernels were not compiled after {PATIENCE} seconds") from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(error.stderr.decode().strip().splitlines()[-1]) from None
    if cuda:
        torch.compiler.reset()  # or the eighth length would find that it has been compiled too often
    run = torch.compile(flex_attention, dynamic=False) if cuda else flex_attention
    w = case.geometry.w

    def causal(b, h, t, j):
        return t >= j

    def window(b, h, t, j):
        return (t >= j) & (t - j < w)

    def task(part: str, sees: Callable) -> Timed:
        mask = create_block_mask(
            sees, None, None, case.tokens, case.tokens, device=case.q.device.type, _compile=cuda
        )
        grouped = case.q.shape[2] != case.k.shape[2]

        def call(q, k, v) -> Tensor:
            o = run(q, k, v, block_mask=mask, scale=case.scale, enable_gqa=grouped)
            return cast(Tensor, o).transpose(1, 2)

        leaves = [getattr(case, name).transpose(1, 2).contiguous() for name in LEAVES[part]]
        made = _over("flex", part, call, leaves, case.dz)
        return replace(made, restore=lambda slopes: [x.transpose(1, 2) for x in slopes])

    return [task("full", causal), task("win", window)]


def fla(case: Case) -> list[Timed]:
    """flash-linear-attention: the selected branch; where l = d = l', the compressed branch and its choice too."""
    from fla.ops.nsa.compression import parallel_nsa_compression
    from fla.ops.nsa.parallel import ParallelNSAFunction, parallel_nsa_topk

    g = case.geometry

    def slc(q, k, v) -> Tensor:
        return ParallelNSAFunction.apply(q, k, v, case.idx, g.n, g.lp, case.scale, None)

    def cmp(q, kc, vc) -> tuple[Tensor, Tensor]:
        return parallel_nsa_compression(q, kc, vc, case.tokens, g.lp, case.scale)

    tasks = [_differentiable("fla", "slc", slc, case)]
    if g.l == g.d == g.lp:
        with torch.no_grad():
            _, lse = cmp(case.q, case.kc, case.vc)
        tasks += [
            _differentiable("fla", "cmp", lambda *leaves: cmp(*leaves)[0], case),
            Timed(
                "fla", "select",
                lambda: parallel_nsa_topk(case.q, case.kc, case.tokens, lse, g.n, g.lp, case.scale),
            ),
        ]  # fmt: skip
    return tasks


def xunhaolai(case: Case) -> list[Timed]:
    """native-sparse-attention-triton, where it is installed: the selected branch, and the compressed with its choice."""
    from native_sparse_attention.ops import (  # ty: ignore[import-not-found] - where it is installed
        compressed_attention,
        topk_sparse_attention,
    )

    g = case.geometry
    if len(case.q) > 1:
        raise AnchorsError("batches are not joined into one text here.", code="shape")

    def ends(tokens: int) -> Tensor:
        return torch.tensor([0, tokens], dtype=torch.int32, device=case.q.device)

    listed = case.idx[0].transpose(0, 1).contiguous()

    def slc(q, k, v) -> Tensor:
        return topk_sparse_attention(q[0], k[0], v[0], listed, g.lp, ends(case.tokens), case.scale)[None]

    def both() -> tuple[Tensor, Tensor]:
        return compressed_attention(
            case.q[0], case.kc[0], case.vc[0], g.l, g.d, g.lp, g.n, ends(case.tokens), ends(case.kc.shape[1]),
            init_blocks=g.n_init, local_blocks=g.n_local,
        )  # fmt: skip

    return [_differentiable("xunhaolai", "slc", slc, case), Timed("xunhaolai", "cmp and select", both)]


def scalable(case: Case) -> list[Timed]:
    """Scalable-Flash-Native-Sparse-Attention (commit fcf117c), where it is installed: all of NSA.

    Its branches share one k and one v, it compresses by means itself, and it has no choice that could be given: none of
    our tasks is the same, so that its output is not compared with the equations. Its importance is kept in 16 bits,
    and its dq is added up atomically. Its window of w tokens sees w + 1, and needs FlashAttention.
    """
    from flash_nsa.config import NSAConfig  # ty: ignore[import-not-found] - where it is installed
    from flash_nsa.modules.megatron_level_nsa import NSACore  # ty: ignore[import-not-found]

    if len(case.q) > 1:
        raise AnchorsError("batches are not joined into one text here.", code="shape")
    g, config = case.geometry, NSAConfig()
    sizes = {
        "num_heads": case.q.shape[2], "num_kv_heads": case.k.shape[2], "qk_head_dim": case.q.shape[-1],
        "v_head_dim": case.v.shape[-1], "kernel_size": g.l, "stride": g.d, "block_size": g.lp, "top_n": g.n,
        "num_init_blocks": g.n_init, "num_local_blocks": g.n_local, "window_size": g.w - 1, "cmp_k_method": "mean",
        "cmp_v_method": "mean",
    }  # fmt: skip
    for name, size in sizes.items():
        setattr(config, name, size)
    core = NSACore(config).to(case.q)
    ends = torch.tensor([0, case.tokens], dtype=torch.int32, device=case.q.device)

    def whole(q, k, v, gates) -> Tensor:
        return core(q[0], k[0], v[0], gates[0], ends)[None]

    leaves = [case.q, case.k, case.v, case.gates.logit(eps=1e-3)]
    return [_over("scalable-flash-nsa", "all of one k and v", whole, leaves, case.dz)]


def cudnn(case: Case) -> list[Timed]:
    """cuDNN's selected branch (wheel nvidia-cudnn-frontend), where it is installed: on Hopper only this, only forward."""
    from cudnn import NSA  # ty: ignore[import-not-found] - where it is installed

    if len(case.q) > 1:
        raise AnchorsError("batches are not joined into one text here.", code="shape")
    q, k, v, idx = case.q[0], case.k[0], case.v[0], case.idx[0].contiguous()
    o = q.new_empty(*q.shape[:2], v.shape[-1])
    mass, top = (q.new_empty(q.shape[:2], dtype=torch.float32) for _ in range(2))
    counts = (idx >= 0).sum(-1, dtype=torch.int32)
    ends = torch.tensor([0, case.tokens], dtype=torch.int32, device=q.device)
    kernel = NSA.SelectionAttention(
        q, k, v, o, mass, top, idx, counts, ends, ends, max_s_q=case.tokens, max_s_k=case.tokens,
        block_size=case.geometry.lp, scale_softmax=case.scale,
    )  # fmt: skip
    kernel.check_support()
    kernel.compile()

    def run() -> Tensor:
        kernel.execute(q, k, v, o, mass, top, idx, counts, ends, ends, scale_softmax=case.scale)
        return o[None]

    return [Timed("cudnn-nsa", "slc", run)]


def flash(case: Case, name: str) -> list[Timed]:
    """Full attention of FlashAttention 3 (wheel fa3-fwd, only forward) or 4 (wheel flash-attn-4), where installed."""
    if name == "flash-3":
        from fa3_fwd_interface import flash_attn_func  # ty: ignore[import-not-found] - where it is installed
    else:
        from flash_attn.cute import flash_attn_func  # ty: ignore[import-not-found] - where it is installed

    def call(q, k, v) -> Tensor:
        found = flash_attn_func(q, k, v, softmax_scale=case.scale, causal=True)
        return found if isinstance(found, Tensor) else found[0]

    made = _differentiable(name, "full", call, case)
    return [replace(made, backward=None) if name == "flash-3" else made]


IMPLEMENTATIONS: dict[str, Callable[[Case], list[Timed]]] = {
    "ours": ours,
    "sdpa-flash": lambda case: sdpa(case, "sdpa-flash", SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": lambda case: sdpa(case, "sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
    "fla": fla,
    "xunhaolai": xunhaolai,
    "scalable-flash-nsa": scalable,
    "cudnn-nsa": cudnn,
    "flash-3": lambda case: flash(case, "flash-3"),
    "flash-4": lambda case: flash(case, "flash-4"),
    "eager": eager,
}
"""By name, what makes the tasks of a case."""
SELECTED = ("ours", "fla", "xunhaolai", "cudnn-nsa")
"""Those that have a selected branch."""


def _differentiable(name: str, part: str, call: Callable[..., Tensor], case: Case) -> Timed:
    return _over(name, part, call, [getattr(case, leaf) for leaf in LEAVES[part]], case.dz)


def _over(name: str, part: str, call: Callable[..., Tensor], leaves: list[Tensor], dz: Tensor) -> Timed:
    """The task of a function that autograd differentiates."""
    held = [x.detach().requires_grad_() for x in leaves]
    output: list[Tensor] = []

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*leaves)

    def backward() -> Sequence[Tensor]:
        if not output:
            output.append(call(*held))
        return torch.autograd.grad(output[0], held, dz, retain_graph=True)

    return Timed(name, part, forward, backward)
