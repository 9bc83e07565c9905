"""Flow of two builds side by side: each in a process of its own on one device, timed in turns, medians.

Random weights of GPT2-XL's shape. Beside each time stand the peak of memory beyond the weights, and the error: of prompts that
the plain way can hold, against that way in float64 (see flow_speed.py); else the certificate's. A case is
PRECISION:TOKENS:BATCH.

    uv run benchmarks/flow_builds.py ../before . --cases bfloat16:256:1 bfloat16:256:32 --out benchmarks/flow_builds.csv

"before" is a checkout of the other build. The first run of a shape is left out; recorded passes begin with the third.

    uv run benchmarks/flow_builds.py ../before . --device cpu --shape default --cases float32:2011:1   # peaks of a process
"""

import argparse
import csv
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

PLAIN = 1024
"""Tokens up to which the plain way in float64 is asked."""
DEFAULT = "default"
"""The shape that is no shape: the default model, of which only the certificate's error is told."""
WARM = 4
ASKED = 16
"""Prompts whose sums are compared with float64."""


def work(device: str, shape: str) -> None:
    """The side of one build: reads cases and orders from stdin, answers in lines of JSON."""
    from flow_speed import (
        DTYPES,
        concatenate,
        errors,
        flow,
        high_water,
        make_model,
        make_prompts,
        ours,
        plain,
    )

    from anchors.model.language import load

    gpu = device == "cuda"

    def settled() -> None:
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()

    def seconds() -> float:
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        flow(routed, prompts)
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def held() -> int:
        return torch.cuda.max_memory_allocated() if gpu else high_water()

    def forget_peak() -> int:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        return held()

    routed, model, prompts = None, None, []
    for line in sys.stdin:
        order = json.loads(line)
        said: dict[str, object] = {}
        if order["do"] == "prepare":
            routed = model = None
            settled()
            precision, tokens, batch = order["case"]
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            prompts = make_prompts(tokens, batch)
            if shape == DEFAULT:
                routed = load(device=device, precision=precision)
            else:
                model = make_model(shape, device, tokens, DTYPES[precision], 1.0)
                routed = ours(model, precision)
            try:
                before = forget_peak()
                found = flow(routed, prompts)
                said["peak_gib"] = round((held() - before) / 2**30, 2)
                for _ in range(WARM if tokens <= PLAIN else 0):
                    flow(routed, prompts)
                said["error"] = float(found.identity_error.max())
                if tokens <= PLAIN and model is not None:
                    weights = {name: weight.double() for name, weight in model.state_dict().items()}
                    exact_model = make_model(shape, device, tokens, torch.float64, 1.0)
                    exact_model.load_state_dict(weights)
                    asked = make_prompts(tokens, ASKED)
                    exact = concatenate([plain(exact_model, p, device) for p in asked])
                    del exact_model, weights
                    settled()
                    parts = [asked[i : i + batch] for i in range(0, ASKED, batch)]
                    said |= errors(concatenate([flow(routed, part).sums for part in parts]), exact)
            except torch.OutOfMemoryError:
                said["failed"] = "out of memory"
            if tokens > PLAIN:
                settled()
        else:
            said["ms"] = 1e3 * seconds()
            if len(prompts[0].ids) > PLAIN:
                settled()  # the other build needs the card, too
        print(json.dumps(said), flush=True)


class Side:
    """One build, in a process of its own."""

    def __init__(self, folder: Path, device: str, shape: str) -> None:
        here = Path(__file__).resolve()
        self.name = folder.name or str(folder.resolve().name)
        paths = [str(folder.resolve()), str(here.parent), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, here, "--work", "--device", device, "--shape", shape],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, **order: object) -> dict:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("{"):
            if not line:
                raise SystemExit(f"The build in {self.name} ended.")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("builds", nargs="*", type=Path)
    parser.add_argument("--cases", nargs="+", default=["bfloat16:256:1", "bfloat16:256:32"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="gpt2-xl")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.device, arguments.shape)
        return
    sides = [Side(folder, arguments.device, arguments.shape) for folder in arguments.builds]
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "CPU"
    rows = []
    for case in arguments.cases:
        precision, tokens, batch = case.split(":")
        facts = [side.ask(do="prepare", case=[precision, int(tokens), int(batch)]) for side in sides]
        times: list[list[float]] = [[] for _ in sides]
        for _ in range(arguments.repeats if int(tokens) <= PLAIN else 2):
            for side, fact, own in zip(sides, facts, times, strict=True):
                if "failed" not in fact:
                    own.append(side.ask(do="time")["ms"])
        for side, fact, own in zip(sides, facts, times, strict=True):
            each = round(statistics.median(own) / int(batch), 3) if own else None
            rows.append(
                {"build": side.name, "precision": precision, "tokens": int(tokens), "batch": int(batch)}
                | {"ms_per_example": each, "card": card, "torch": torch.__version__}
                | fact
            )
            print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        names = list(dict.fromkeys(name for row in rows for name in row))
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
