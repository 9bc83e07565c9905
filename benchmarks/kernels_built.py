"""Every Triton kernel as the Triton at hand compiles it for an H100: registers, spilled bytes, shared memory. No GPU is asked.

    uv run benchmarks/kernels_built.py                   # all; exit code 1 where one does not compile or fit
    uv run benchmarks/kernels_built.py dense --csv built.csv

The kernels' own Python launches them on tensors of the CPU; instead of a launch each is compiled, with the tiles that an H100
gets. `stack` is what a thread keeps outside its registers (cuobjdump): spilled values, mostly; `wgmma` counts products of whole
groups of warps, which tiles of fewer than 64 rows and those of float32 do not get.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from anchors.attention import kernels
from anchors.attention.call import AttentionCall
from anchors.attention.saliency_kernel import Band, saliency
from anchors.nsa.attention import Branches
from anchors.nsa.geometry import Geometry
from anchors.nsa.kernels import saliency as branch_saliency
from anchors.nsa.kernels.cache import NSACache
from anchors.nsa.kernels.decode import nsa_decode
from anchors.nsa.kernels.selection import select_blocks
from anchors.nsa.kernels.sparse_attention import sparse_attention
from anchors.nsa.texts import Texts

MEMORY = 232448
"""Bytes of shared memory that a program may have on an H100."""
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiling(seen: dict[int, tuple[Any, float]]) -> None:
    """From now on kernels are compiled for an H100 where they would be launched."""
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    launch = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        made = launch(self, *args, grid=grid, warmup=True, **kwargs)
        seen.setdefault(id(made), (made, time.perf_counter() - start))
        return made

    JITFunction.run = run


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return tuple(int(re.search(rf"{what}:(\d+)", said)[1]) for what in ("REG", "STACK"))


def dense(dim: int, dtype: torch.dtype) -> None:
    make = lambda heads: torch.randn(1, heads, 4096, dim, dtype=dtype)  # noqa: E731
    q, k, v, dz = make(4), make(2), make(2), make(4)
    call = AttentionCall(0, q, k, v, dim**-0.5)
    z, lse = kernels.forward(call)
    slopes = kernels.slopes(call, z, lse, dz)
    kernels.gradients(call, slopes)
    rows = (x.transpose(1, 2) for x in (q, k, v, slopes.dz, slopes.lse))
    saliency(
        Band(), *rows, scale=call.scale, wanted=torch.tensor([[4095]]), live=(slopes.live, slopes.block),
        base2=True, precision=slopes.precision,
    )  # fmt: skip


def sparse(dim: int, dtype: torch.dtype, dim_v: int, heads: int, packed: bool = False) -> None:
    """Forward and backward of three branches with importance and selection; one group."""
    geometry = Geometry()
    make = lambda tokens, count, width: torch.randn(1, tokens, count, width, dtype=dtype).requires_grad_()  # noqa: E731
    q, width = make(4096, heads, dim), dim_v
    compressed = (4096 - geometry.l) // geometry.d + 1
    kc, vc = make(compressed, 1, dim), make(compressed, 1, width)
    ks, vs, kw, vw = make(4096, 1, dim), make(4096, 1, width), make(4096, 1, dim), make(4096, 1, width)
    gates = make(4096, heads, 3)
    lse = torch.zeros(1, 4096, heads)
    texts = Texts.of_bounds(torch.tensor([0, 1000, 4096]), 4096) if packed else None
    layout = None if texts is None else texts.laid(geometry)
    select_blocks(
        q.detach(), kc.detach(), lse, geometry=geometry, tokens=4096, scale=dim**-0.5, layout=layout
    )
    last = torch.arange(4096)[:, None] // geometry.lp - torch.arange(geometry.n)
    idx = torch.where(last < 0, -1, last)[None, :, None]
    z = sparse_attention(
        q, None, kc, vc, ks, vs, kw, vw, gates, idx, geometry=geometry, scale=dim**-0.5, texts=texts
    )
    z.backward(torch.randn_like(z))


def flow(dim: int, dtype: torch.dtype, dim_v: int, heads: int) -> None:
    """The saliency of three branches, together and each; one group."""
    geometry, tokens = Geometry(), 4096
    make = lambda tokens, count, width: torch.randn(1, tokens, count, width, dtype=dtype)  # noqa: E731
    compressed = geometry.compressed(tokens)
    raw = (make(tokens, 1, width) for width in (dim, dim_v, dim, dim_v))
    kv = Branches(make(compressed, 1, dim), make(compressed, 1, dim_v), *raw)
    parts = torch.randn(1, compressed, geometry.l, 1, dim_v, dtype=dtype)
    idx = torch.zeros(1, tokens, 1, geometry.n, dtype=torch.int32)
    for by_branch in (False, True):
        branch_saliency.saliency(
            make(tokens, heads, dim), kv, parts, make(tokens, heads, 3), make(tokens, heads, dim_v), idx, geometry,
            scale=dim**-0.5, wanted=torch.tensor([[4095]]), by_branch=by_branch,
        )  # fmt: skip


def step(dim: int, dtype: torch.dtype, dim_v: int, heads: int, batch: int) -> None:
    """One decode step at 65,536 tokens, four groups."""
    geometry, groups = Geometry(), 4
    cache = NSACache.empty(batch, 65536, groups, groups * heads, dim, dim_v, geometry, dtype, "cpu")
    make = lambda count, width: torch.randn(batch, 1, count, width, dtype=dtype)  # noqa: E731
    nsa_decode(
        make(groups * heads, dim), [make(groups, dim)] * 3, [make(groups, dim_v)] * 3, make(groups * heads, 3), cache,
        geometry=geometry, scale=dim**-0.5,
    )  # fmt: skip


CASES: dict[str, tuple[str, Callable[[], None]]] = {
    f"dense, D = {dim}, {str(dtype)[6:]}": ("dense", lambda dim=dim, dtype=dtype: dense(dim, dtype))
    for dim in (64, 128, 256)
    for dtype in (torch.bfloat16, torch.float32)
} | {
    f"{kind}, D = {dim}/{dim_v}, {heads} heads a group, bfloat16": (
        kind,
        lambda dim=dim, dim_v=dim_v, heads=heads, kind=kind: sparse(
            dim, torch.bfloat16, dim_v, heads, kind == "packed"
        ),
    )
    for kind, head_counts in (("sparse", (16, 8, 4, 2, 1)), ("packed", (16, 4, 1)))
    for dim, dim_v in ((128, 128), (64, 64), (96, 96), (192, 128))
    for heads in head_counts
} | {
    f"flow, D = {dim}/{dim_v}, {heads} heads a group, {str(dtype)[6:]}": (
        "flow",
        lambda dim=dim, dim_v=dim_v, heads=heads, dtype=dtype: flow(dim, dtype, dim_v, heads),
    )
    for dim, dim_v, heads, dtype in (
        (128, 128, 16, torch.bfloat16), (64, 64, 4, torch.bfloat16), (192, 128, 16, torch.bfloat16),
        (128, 128, 16, torch.float32), (192, 128, 16, torch.float32),
    )
} | {
    f"decode, D = {dim}/{dim_v}, {heads} heads a group, {str(dtype)[6:]}, batch {batch}": (
        "decode",
        lambda dim=dim, dim_v=dim_v, heads=heads, dtype=dtype, batch=batch: step(dim, dtype, dim_v, heads, batch),
    )
    for dim, dim_v, heads, dtype, batch in (
        (128, 128, 16, torch.bfloat16, 16), (128, 128, 16, torch.bfloat16, 1), (64, 64, 4, torch.bfloat16, 16),
        (192, 128, 16, torch.bfloat16, 16), (128, 128, 16, torch.float32, 4),
    )
}  # fmt: skip


def rows(names: list[str]) -> Iterator[dict[str, Any]]:
    seen: dict[int, tuple[Any, float]] = {}
    compiling(seen)
    for case, (group, run) in CASES.items():
        if names and group not in names:
            continue
        before = set(seen)
        try:
            run()
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises is a row
            yield {"case": case, "kernel": "", "failed": f"{type(error).__name__}: {error}"[:200]}
        for key in [key for key in seen if key not in before]:
            made, taken = seen[key]
            registers, stack = usage(made.asm["cubin"])
            meta = made.metadata
            yield {
                "case": case, "kernel": meta.name, "warps": meta.num_warps, "stages": meta.num_stages, "registers": registers,
                "stack": stack, "shared": meta.shared, "wgmma": made.asm["ptx"].count("wgmma.mma_async"), "seconds": round(taken, 1),
                "failed": "" if meta.shared <= MEMORY else "more shared memory than there is",
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", help="which; default all")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}, torch {torch.__version__}, sm_90")
    found = []
    for row in rows(arguments.groups):
        found.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
    if arguments.csv:
        pd.DataFrame(found).to_csv(arguments.csv, index=False)
    sys.exit(any(row["failed"] for row in found))


if __name__ == "__main__":
    main()
