"""The saliency of one layer of Native Sparse Attention: by the kernel, and by tiles of the equations in torch.

The flow I = |Σ_h A ⊙ ∂L/∂A| over all three branches, of which the rows of a few queries and one total are kept, as
`anchors flow` keeps them, and with --by-branch those of each branch too, as `anchors nsa probe` does. Queries, keys,
values, gates and ∂L/∂z are random; both sides read the same chosen blocks, in one process, in turns. What both need
anyway (the choice of blocks) is not in the times; the log-sums that the kernel needs again are.

"ms" is the median of the rounds; "peak_mb" the most memory beyond the layer's own tensors (CUDA only); "error" the
largest difference of the kept rows relative to their largest entry, "total_error" that of the total, "certificate"
max |Σ_j A ∂L/∂A − ⟨z, dz⟩| / max |⟨z, dz⟩| of each side.

    TRITON_INTERPRET=1 uv run benchmarks/nsa_saliency.py                        # tiny, on the CPU
    uv run benchmarks/nsa_saliency.py --device cuda --out nsa_saliency.csv      # 16k and 64k
    uv run benchmarks/nsa_saliency.py --device cuda --heads 64 --groups 4 --no-tiles
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from anchors.flow.saliency import FlowTap
from anchors.nsa import phi
from anchors.nsa.attention import BRANCHES, Branches, choose
from anchors.nsa.call import NSACall, Sparse
from anchors.nsa.geometry import Geometry
from anchors.nsa.reference import compress

NAMES = (*BRANCHES, "all")


class Tiles:
    """Listens to tiles only."""

    def __init__(self, wanted: Tensor, by_branch: bool) -> None:
        self.layers, self.wanted, self.maps, self.by_branch = frozenset([0]), wanted, frozenset(), by_branch
        self.kinds = {name: FlowTap(self.layers, wanted) for name in (NAMES if by_branch else ("all",))}

    def begin(self, call, z, dz) -> None:
        for kind in self.kinds.values():
            kind.begin(call, z, dz)

    def branches(self, call, rows, by_branch) -> None:
        for name, product in by_branch.items() if self.by_branch else ():
            index = torch.arange(rows.start, rows.stop, device=product.device)
            self.kinds[name].tile(call, index, slice(0, product.shape[-1]), product)

    def tile(self, call, rows, keys, product) -> None:
        self.kinds["all"].tile(call, rows, keys, product)


class Sums(Tiles):
    """Takes sums where there are any."""

    def summed(self, call, dz, found) -> None:
        for name, one in found.items():
            self.kinds[name].summed(call, dz, {"all": one})


@torch.no_grad()
def made(tokens: int, options: argparse.Namespace, geometry: Geometry) -> tuple[NSACall, Tensor, Tensor]:
    """A layer's call, its output and the gradient of that."""
    device, dtype = options.device, getattr(torch, options.dtype)
    draws = torch.Generator(device).manual_seed(0)
    heads, groups, dim = options.heads, options.groups, options.dim

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=draws, device=device).to(dtype)

    k, v = (draw(1, tokens, 3, groups, dim) for _ in range(2))
    pools = [phi.make(options.phi, geometry.l, dim).to(device, dtype) for _ in range(2)]
    for pool in pools:
        if isinstance(pool, phi.MLP):
            pool.down.normal_(std=dim**-0.5)
    kc, vc = (
        compress(x[:, :, 0], pool, l=geometry.l, d=geometry.d) for x, pool in zip((k, v), pools, strict=True)
    )
    kv = Branches(kc, vc, k[:, :, 1], v[:, :, 1], k[:, :, 2], v[:, :, 2])
    backend = "auto" if device.startswith("cuda") else "triton"
    sparse = Sparse(kv, v[:, :, 0], pools[1], draw(1, tokens, heads, 3).sigmoid(), geometry, backend=backend)
    q, scale = draw(1, tokens, heads, dim), dim**-0.5
    call = NSACall(
        0, q.transpose(1, 2), kv.k_slc.transpose(1, 2), kv.v_slc.transpose(1, 2), scale, sparse=sparse
    )
    vars(call)["idx"] = choose(
        q, kv, geometry, scale=scale, backend="auto" if backend == "auto" else "reference"
    )
    return call, call.fused(call.idx), draw(1, heads, tokens, dim)


def measure(tokens: int, options: argparse.Namespace, geometry: Geometry) -> list[dict]:
    cuda = options.device.startswith("cuda")
    call, z, dz = made(tokens, options, geometry)
    wanted = torch.linspace(0, tokens - 1, 17, device=options.device).long()[None]
    kinds: dict[str, Callable[..., Tiles]] = {"kernel": Sums} | ({} if options.no_tiles else {"tiles": Tiles})
    times: dict[str, list[float]] = {name: [] for name in kinds}
    peaks, found, failed = {}, {}, {}
    for number in range(options.rounds + 1):  # the first is a warm-up
        for name, make in kinds.items():
            if name in failed:
                continue
            vars(call).pop("_seen_parts", None)
            tap = make(wanted, options.by_branch)
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            try:
                call._show([tap], z, dz)
            except torch.cuda.OutOfMemoryError as error:
                failed[name] = str(error).splitlines()[0][:100]
                torch.cuda.empty_cache()
                continue
            if cuda:
                torch.cuda.synchronize()
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
            if number:
                times[name].append((time.perf_counter() - start) * 1e3)
            found[name] = tap
    rows = []
    for name in kinds:
        row = {"tokens": tokens, "name": name, "by_branch": options.by_branch}
        if name in failed:
            rows.append(row | {"failed": failed[name]})
            continue
        worst, size = found[name].kinds["all"].error[0]
        row |= {
            "ms": statistics.median(times[name]), "ms_low": min(times[name]), "ms_high": max(times[name]),
            "peak_mb": peaks.get(name, float("nan")), "certificate": float(worst / size),
        }  # fmt: skip
        if name == "kernel" and "tiles" in found:
            pairs = [(own, found["tiles"].kinds[kind]) for kind, own in found[name].kinds.items()]
            row["error"] = max(
                float((a.rows[0] - b.rows[0]).abs().max() / b.rows[0].abs().max()) for a, b in pairs
            )
            row["total_error"] = max(
                float(((a.total[0] - b.total[0]) / b.total[0]).abs().max()) for a, b in pairs
            )
            row["faster"] = statistics.median(times["tiles"]) / row["ms"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="bfloat16 on CUDA, else float32")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--groups", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--phi", default="mlp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--by-branch", action="store_true")
    parser.add_argument("--no-tiles", action="store_true", help="the kernel alone")
    parser.add_argument("--out", type=Path, help="a table, as CSV")
    options = parser.parse_args()
    real = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bfloat16" if real else "float32")
    usual = (16, 2, 128) if real else (4, 2, 16)
    options.heads, options.groups = options.heads or usual[0], options.groups or usual[1]
    options.dim = options.dim or usual[2]
    geometry = Geometry() if real else Geometry(l=8, d=4, lp=16, n=4, w=16)
    name = torch.cuda.get_device_name() if real else "cpu"
    print(
        f"{name}, torch {torch.__version__}, {options.dtype}, {options.heads} heads in {options.groups} groups, D = {options.dim}"
    )
    rows = []
    for tokens in options.tokens or ([16384, 65536] if real else [64]):
        found = measure(tokens, options, geometry)
        rows += found
        print(pd.DataFrame(found).to_string(index=False, float_format=lambda x: f"{x:.4g}"), flush=True)
        gc.collect()
        if real:
            torch.cuda.empty_cache()
    if options.out:
        pd.DataFrame(rows).assign(device=name, torch=torch.__version__, heads=options.heads).to_csv(
            options.out, index=False
        )


if __name__ == "__main__":
    main()
