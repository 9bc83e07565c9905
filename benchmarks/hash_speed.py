"""Seconds per GB (10⁹ bytes) of the digest over every weight, in memory on one core and from a GPU, beside SHA-256.

The weights are those of a Llama-shaped model in bfloat16, drawn at random; all sides take turns in one process. Where a
GPU is, the digests of both places are compared: they must be the same.

    uv run benchmarks/hash_speed.py                                              # and from the GPU where there is one
    uv run benchmarks/hash_speed.py --gb 4 --out benchmarks/hash_speed.json      # what is kept beside this file
"""

import argparse
import hashlib
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from anchors.digest import tensor_digests


def weights(gigabytes: float) -> dict[str, Tensor]:
    """Layers of a Llama of width 2048 after an embedding of 32,000 words, until they are of the size asked."""
    width, inner = 2048, 8192
    shapes = {"q": (width, width), "k": (512, width), "v": (512, width), "o": (width, width)}
    shapes |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner), "norm": (width,)}
    generator = torch.Generator().manual_seed(0)

    def one(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).view(
            torch.bfloat16
        )

    made = {"embed": one((32_000, width))}
    while sum(x.nbytes for x in made.values()) < gigabytes * 1e9:
        made |= {f"{len(made)}.{name}": one(shape) for name, shape in shapes.items()}
    return made


def sha256(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(x.view(torch.uint8).numpy()).hexdigest() for name, x in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.0, help="how much, in 10⁹ bytes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    own = weights(args.gb)
    size = sum(x.nbytes for x in own.values()) / 1e9
    sides = {"memory": lambda: tensor_digests(own), "sha256": lambda: sha256(own)}
    if torch.cuda.is_available():
        there = {name: x.cuda() for name, x in own.items()}
        sides["gpu"] = lambda: tensor_digests(there)
        assert sides["gpu"]() == sides["memory"](), "the digests of both places differ"
    took: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            took[name].append((time.perf_counter() - began) / size)
    facts = {
        "gigabytes": round(size, 2),
        "card": torch.cuda.get_device_name() if "gpu" in sides else None,
        "torch": torch.__version__,
        "seconds_per_gb": {
            name: {
                "median": round(statistics.median(t), 4),
                "least": round(min(t), 4),
                "most": round(max(t), 4),
            }
            for name, t in took.items()
        },
    }
    text = json.dumps(facts, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
