"""The stages of NSA on a CUDA device, each in several variants that take turns in one process: times, errors, same bits.

    uv run benchmarks/nsa_variants.py --out OUT                        # 8k and 64k tokens; about two minutes on an H100
    uv run benchmarks/nsa_variants.py --stages keys.window --tokens 65536 --out OUT

`error` is against the equations in float32, on 2,048 tokens; `off` against the stage's first variant on the text itself,
relative; `same` whether two runs agree bit for bit. Times are medians in milliseconds, with the second-level cache
overwritten before each call. Every variant is compiled in processes of their own first.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from anchors.nsa.geometry import Geometry
from anchors.nsa.kernels import attention, lists, selection
from anchors.nsa.kernels import sparse_attention as gradients
from anchors.nsa.kernels.cache import Tuning
from anchors.nsa.speed.bench import drawn_tensors
from anchors.nsa.speed.decode import _steps
from anchors.nsa.speed.peers import LEAVES, SHAPES, Case, exact
from anchors.nsa.speed.timing import Clock, quartiles

PARTS = {"compressed": "cmp", "selected": "slc", "window": "win"}
SHORT = 2048


def sizes(rows: int, keys: int, warps: int, stages: int, **more: Any) -> dict[str, Any]:
    return {"rows": rows, "keys": keys, "num_warps": warps, "num_stages": stages, **more}


OLD: dict[str, dict[str, Any]] = {
    "forward.compressed": sizes(128, 128, 8, 3, peel=1, boxes=0),
    "forward.selected": sizes(64, 64, 4, 3, peel=1, boxes=0),
    "forward.window": sizes(64, 64, 4, 3, peel=0, boxes=0),
    "query.selected": sizes(64, 64, 4, 2, peel=1, boxes=0),
    "query.window": sizes(64, 64, 4, 2, peel=1, boxes=0),
    "keys.compressed": sizes(64, 128, 8, 2, peel=1, splits=4, boxes=0),
    "keys.selected": sizes(32, 64, 4, 2, peel=1, boxes=0),
    "keys.window": sizes(64, 128, 8, 1, peel=0, splits=1, boxes=0),
}
"""Without boxes, as before."""
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "forward.compressed": {
        "old": OLD["forward.compressed"], "new": {}, "256x64 8w 3s": sizes(256, 64, 8, 3), "128x128 8w 2s": sizes(128, 128, 8, 2),
        "128x32 4w 2s": sizes(128, 32, 4, 2),
    },
    "importance": {
        "not cut, no bound": {"topn": {"least": 1 << 20, "tops": 1 << 20}}, "new": {}, "not cut": {"topn": {"least": 1 << 20}},
        "no bound": {"topn": {"tops": 1 << 20}}, "a row a program": {"topn": {"scores": 1}},
        "a row a program, 512 a warp": {"topn": {"scores": 1, "per_warp": 512}},
        "256 a warp": {"topn": {"per_warp": 256}}, "256 a program": {"topn": {"scores": 256}},
    },
    "forward.selected": {
        "old": OLD["forward.selected"], "new": {}, "64x32 4w 3s": sizes(64, 32, 4, 3), "64x32 4w 2s": sizes(64, 32, 4, 2),
        "128x32 4w 3s": sizes(128, 32, 4, 3),
    },
    "window and sum": {
        "old": OLD["forward.window"], "64x64 4w 3s": sizes(64, 64, 4, 3), "new": {}, "64x32 4w 2s": sizes(64, 32, 4, 2),
    },
    "query.compressed": {"old": {}},
    "query.selected": {"old": OLD["query.selected"], "new": {}},
    "query.window": {"old": OLD["query.window"], "new": {}},
    "keys.compressed": {
        "old": OLD["keys.compressed"], "new": {}, "4s": {"num_stages": 4}, "256 programs": {"programs": 256},
        "1024 programs": {"programs": 1024},
    },
    "keys.window": {
        "old": OLD["keys.window"], "new": {}, "4s": {"num_stages": 4}, "256 programs": {"programs": 256},
        "1024 programs": {"programs": 1024}, "64x64 4w 2s": sizes(64, 64, 4, 2),
    },
    "keys.selected": {
        "old": OLD["keys.selected"], "new": {}, "2s": {"num_stages": 2}, "64x64 4w 2s": {"rows": 64, "num_stages": 2},
        "lists of 2048": {"split": 2048},
    },
    "inverse": {"new": {}},
}  # fmt: skip
"""By stage and name, settings over those of the tables; the first is what the others are compared with."""
WHOLE = {"old": OLD, "new": {}}
VARIANTS |= {f"all.{direction}": WHOLE for direction in ("forward", "backward")}
VARIANTS["all.forward"] = WHOLE | {
    "a row a program": {"topn": {"scores": 1}}, "selected 64x32 4w 3s": {"forward.selected": sizes(64, 32, 4, 3)},
}  # fmt: skip


def settings(stage: str, name: str) -> dict[str, dict[str, Any]]:
    """As the kernels' `tuning`."""
    change = VARIANTS[stage][name]
    if stage == "importance" or stage.startswith("all."):
        return change
    return {"forward.window" if stage == "window and sum" else stage: change}


def runs(case: Case) -> dict[str, Callable[[dict[str, Any]], list[Tensor]]]:
    """By stage, what computes it with some settings."""
    g, common = case.geometry, {"scale": case.scale}
    branches = {
        "compressed": attention.Branch("compressed", l=g.l, d=g.d),
        "selected": attention.Branch("selected", lp=g.lp),
        "window": attention.Branch("window", w=g.w),
    }
    chosen = {name: {"idx": case.idx} if name == "selected" else {} for name in branches}
    pairs = {name: tuple(getattr(case, x) for x in LEAVES[PARTS[name]]) for name in branches}
    outs = {
        name: attention.attend(branches[name], *pairs[name], **chosen[name], **common) for name in branches
    }
    sums = gradients.inner(case.dz, *(o for o, _ in outs.values()))
    gates = case.gates.float().contiguous()
    made: dict[str, Callable[[dict[str, Any]], list[Tensor]]] = {}
    for c, name in enumerate(branches):
        rows = (*pairs[name], case.dz, outs[name][1], sums[..., c], gates[..., c])

        def forward(tuning, name=name):
            return list(
                attention.attend(branches[name], *pairs[name], **chosen[name], **common, tuning=tuning)
            )

        def query(tuning, name=name, rows=rows):
            return [gradients.query_gradient(branches[name], *rows, **chosen[name], **common, tuning=tuning)]

        def keys(tuning, name=name, rows=rows):
            return list(
                gradients.key_gradients(branches[name], *rows, **chosen[name], **common, tuning=tuning)
            )

        made |= {f"forward.{name}": forward, f"query.{name}": query, f"keys.{name}": keys}
    others = outs["compressed"][0], outs["selected"][0]
    made["window and sum"] = lambda tuning: list(
        attention.attend_last(
            branches["window"], *pairs["window"], others, case.gates, **common, tuning=tuning
        )
    )
    made["importance"] = lambda tuning: [
        selection.select_blocks(
            case.q, case.kc, outs["compressed"][1], geometry=g, tokens=case.tokens, **common, tuning=tuning
        )
    ]
    made["inverse"] = lambda tuning: list(vars(lists.inverse(case.idx, g.blocks(case.tokens))).values())
    leaves = [getattr(case, x) for x in LEAVES["all"]]

    def whole(tuning: dict[str, Any], *leaves: Tensor) -> Tensor:
        q, *rest = leaves
        return gradients.sparse_attention(q, None, *rest, None, geometry=g, **common, tuning=tuning)

    made["all.forward"] = lambda tuning: [whole(tuning, *leaves)]
    held = [x.detach().requires_grad_() for x in leaves]
    kept: dict[str, Tensor] = {}

    def back(tuning: dict[str, Any]) -> list[Tensor]:
        if str(tuning) not in kept:
            kept[str(tuning)] = whole(tuning, *held)
        return list(torch.autograd.grad(kept[str(tuning)], held, case.dz, retain_graph=True))

    made["all.backward"] = back
    return made


DECODED: dict[str, dict[str, Any]] = {
    "today": {},
    "chunk 1088, 4s of compress": {"chunk_cmp": 1088, "stages_cmp": 4},
    "chunk 704, 2s of compress": {"chunk_cmp": 704, "stages_cmp": 2},
    "chunk 576, 3s of compress": {"chunk_cmp": 576},
    "select 4 warps": {"warps_select": 4},
    "sums of 512": {"tile_sum": 512},
    "sums of 512, 4 warps": {"tile_sum": 512, "warps_select": 4},
    "sums of 1024, 16 warps": {"tile_sum": 1024, "warps_select": 16},
    "4 bits at once": {"bits": 4},
    "4 bits at once, 4 warps": {"bits": 4, "warps_select": 4, "tile_sum": 512},
    "1 bit at once": {"bits": 1},
    "chunk 128 of the others": {"chunk": 128},
    "chunk 512 of the others": {"chunk": 512},
    "3s of the others": {"stages": 3},
    "4s of the others": {"stages": 4},
    "32 pieces merged at once": {"tile_merge": 32},
    "2 warps merge": {"warps_merge": 2},
}
"""Settings of one decode step over those that its sizes give; 16 texts of 65,536 tokens."""
BATCH, HELD, ROOM = 16, 65536, 128


def decoding(name: str, batch: int) -> dict[str, Callable[[], Any]]:
    shape, g = SHAPES["64/4 D128"], Geometry()
    own = Tuning.of(BATCH * shape[1], g.compressed(HELD + ROOM), g.blocks(HELD + ROOM), g.n * g.lp + g.w, 256)
    torch.manual_seed(0)
    place, tuning = torch.device("cuda"), replace(own, **DECODED[name])
    steps = _steps(shape, batch, HELD, ROOM, g, torch.bfloat16, place, tuning)
    return {kind: make for kind, make in steps if kind == "ours" or name == "today"}


def decoded(repeats: int) -> Iterator[dict[str, Any]]:
    calls, first, held = {}, None, []
    rows: dict[str, dict[str, Any]] = {}
    for name in DECODED:
        row = {"stage": "decode", "variant": name, "tokens": HELD}
        try:
            makers = decoding(name, BATCH)
            # A graph does not keep the cache that it reads.
            held.append(makers)
            for kind, make in makers.items():
                calls[name if kind == "ours" else kind] = make()
            out = calls[name]().clone()
            first = out if first is None else first
            row["off"] = distance(out, first)
        except Exception as error:  # noqa: BLE001 - whatever a variant raises is a result
            row["note"] = f"{type(error).__name__}: {str(error)[:200]}"
        rows[name] = row
    times, spread = Clock(torch.device("cuda")).turns(list(calls.values()), 2, repeats)
    for name, taken in zip(calls, times, strict=True):
        low, middle, high = quartiles(taken)
        row = rows.setdefault(name, {"stage": "decode", "variant": name, "tokens": HELD})
        row |= {"ms": middle, "iqr": high - low, "spread": spread}
    yield from rows.values()
    some = {name: call for name, call in calls.items() if name == "today" or name not in DECODED}
    times, spread = Clock(torch.device("cuda"), clean=True).turns(list(some.values()), 2, repeats)
    for name, taken in zip(some, times, strict=True):
        low, middle, high = quartiles(taken)
        yield {
            "stage": "decode, nothing to write back", "variant": name, "tokens": HELD,
            "ms": middle, "iqr": high - low, "spread": spread,
        }  # fmt: skip
    if "today" not in calls:
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            calls["today"]()
        torch.cuda.synchronize()
    for event in profile.key_averages():
        if event.device_time:
            yield {
                "stage": "decode, kernel", "variant": event.key[:40], "tokens": HELD, "ms": event.device_time / 1e3
            }  # fmt: skip


def draw(tokens: int, shape: str) -> Case:
    return drawn_tensors(SHAPES[shape], tokens, "chosen", Geometry(), torch.bfloat16, torch.device("cuda"))


def truths(case: Case) -> dict[str, list[Tensor]]:
    """What the stages return, by the equations: o, dq, and dk with dv, without gates."""
    found: dict[str, list[Tensor]] = {}
    for name, part in PARTS.items():
        o, (dq, dk, dv) = exact(case, part)
        found |= {f"forward.{name}": [o], f"query.{name}": [dq], f"keys.{name}": [dk, dv]}
    o, slopes = exact(case, "all")
    return found | {"all.forward": [o], "window and sum": [o], "all.backward": list(slopes)}


def distance(found: Tensor, wanted: Tensor) -> float:
    # The log-sum-exp of a row that sees nothing is −∞.
    found, wanted = (x.float().nan_to_num(float("nan"), neginf=0.0) for x in (found, wanted))
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def wide_rows(case: Case, tuning: dict[str, Any]) -> None:
    """The choice from as many blocks as longer texts have, of which a short one compiles nothing."""
    for blocks in (256, 512, 1024):
        scores, tokens = case.q.new_zeros(1, 16, case.kc.shape[2], blocks), blocks * case.geometry.lp
        selection.select(scores, geometry=case.geometry, tokens=tokens, past=tokens - 16, tuning=tuning)


def compiled(jobs: list[tuple[str, str]], tokens: int, shape: str) -> list[str]:
    """Runs each job once, so that its kernels lie in Triton's cache; what failed."""
    case, lost = draw(tokens, shape), []
    made = runs(case)
    for stage, name in jobs:
        try:
            if stage == "decode":
                decoding(name, 1)["ours"]()
            else:
                made[stage](settings(stage, name))
            if stage in ("importance", "all.forward"):
                wide_rows(case, settings(stage, name))
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - whatever a variant raises is a result
            lost.append(f"{stage} {name}: {type(error).__name__}: {str(error)[:200]}")
    return lost


def checked(wanted: list[str], shape: str) -> dict[tuple[str, str], float]:
    """Errors on a short text, of gates that are all 1 for single stages."""
    case = draw(SHORT, shape)
    ones = replace(case, gates=torch.ones_like(case.gates))
    found: dict[tuple[str, str], float] = {}
    for whole, some in ((False, ones), (True, case)):
        made, truth = runs(some), truths(some)
        for stage in wanted:
            if stage.startswith("all") == whole and stage in truth:
                for name in VARIANTS[stage]:
                    try:
                        tensors = made[stage](settings(stage, name))
                    except Exception:  # noqa: BLE001, S112 - it is reported where it is timed
                        continue
                    found[stage, name] = max(
                        distance(x, y) for x, y in zip(tensors, truth[stage], strict=False)
                    )
    return found


def measured(
    wanted: list[str], tokens: int, shape: str, errors: dict[tuple[str, str], float], repeats: int
) -> Iterator[dict[str, Any]]:
    case, clock = draw(tokens, shape), Clock(torch.device("cuda"))
    made = runs(case)
    for stage in wanted:
        calls: dict[str, Callable[[], Any]] = {}
        rows: dict[str, dict[str, Any]] = {}
        first: list[Tensor] = []
        for name in VARIANTS[stage]:
            change = settings(stage, name)
            run = lambda stage=stage, change=change: made[stage](change)  # noqa: E731
            row = {"stage": stage, "variant": name, "tokens": tokens, "error": errors.get((stage, name))}
            try:
                one = [x.clone() for x in run()]
                two = run()
                row["same"] = all(map(torch.equal, one, two))
                first = first or one
                row["off"] = max(distance(x, y) for x, y in zip(one, first, strict=True) if x.dim())
                calls[name] = run
            except Exception as error:  # noqa: BLE001 - whatever a variant raises is a result
                row["note"] = f"{type(error).__name__}: {str(error)[:200]}"
            rows[name] = row
            one = two = None
        times, spread = clock.turns(list(calls.values()), 1, repeats)
        for name, taken in zip(calls, times, strict=True):
            low, rows[name]["ms"], high = quartiles(taken)
            rows[name] |= {"iqr": high - low, "spread": spread}
        first = []
        torch.cuda.empty_cache()
        yield from rows.values()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = [*VARIANTS, "decode"]
    parser.add_argument("--stages", nargs="+", default=stages, choices=stages)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 65536])
    parser.add_argument("--shape", default="64/4 D128", choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    known = VARIANTS | {"decode": DECODED}
    jobs = [(stage, name) for stage in arguments.stages for name in known[stage]]
    # Today's first, so that the children need not all compile what they start from.
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        parts = [jobs[i :: arguments.workers] for i in range(arguments.workers)]
        lost = pool.map(compiled, parts, [8192] * len(parts), [arguments.shape] * len(parts))
        for line in (line for some in lost for line in some):
            print("failed:", line, flush=True)
    asked = [stage for stage in arguments.stages if stage != "decode"]
    errors = checked(asked, arguments.shape)
    found = [
        measured(asked, tokens, arguments.shape, errors, arguments.repeats) for tokens in arguments.tokens
    ]
    if "decode" in arguments.stages:
        found.append(decoded(3 * arguments.repeats))
    rows = []
    for row in (row for some in found for row in some):
        rows.append(row)
        show = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()}
        print("  ".join(f"{key} {value}" for key, value in show.items()), flush=True)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_csv(arguments.out / "nsa_variants.csv", index=False)


if __name__ == "__main__":
    main()
