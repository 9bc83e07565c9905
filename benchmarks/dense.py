"""Attention without edits on one CUDA GPU, by torch's own choice of kernels and by ours (`anchors.attention.dense`).

Three things, each printed as it comes:

- classify of GPT2-XL's shape with random weights, 400 prompts of each of two tasks: a first run and a second. Other
  lengths are other plans, where cuDNN may be chosen, so --planned takes a process of its own for each side.
- one query on keys of a new length at every call: torch's choice, and its kernels without cuDNN.
- float32 with 32 query heads on 8: torch's `enable_gqa`, and `AttentionCall.fused`.

    python benchmarks/dense.py MODEL                # a folder with a tokenizer; the sizes are GPT2-XL's
    python benchmarks/dense.py MODEL --planned 0    # cuDNN's kernels are let into calls of any size
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import cards
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers import AutoTokenizer

import anchors
from anchors.attention import dense
from anchors.attention.call import AttentionCall
from anchors.model.language import prepare


def timed(run: Callable[[], object]) -> float:
    return cards.timed(run)[1]


def classified(folder: str) -> None:
    sizes = argparse.Namespace(shape="gpt2-xl", layers=None, precision="bfloat16")
    lm = prepare(cards.make(sizes, 1), AutoTokenizer.from_pretrained(folder), "gpt2-xl", "bfloat16")
    sample = anchors.Sample(seeds=tuple(range(8)), examples=50)
    for name in ("sst2", "agnews"):
        task = anchors.task(name)
        run = partial(anchors.measure, lm, cards.study("classify"), task, anchors.read(task), sample)
        print(f"classify {name}: first {timed(run):.2f} s, again {timed(run):.2f} s", flush=True)


def lengths() -> None:
    sides: dict[str, Callable[[], AbstractContextManager]] = {
        "torch's choice": nullcontext, "without cuDNN": lambda: sdpa_kernel(dense.UNPLANNED)
    }  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in sides}
    q = torch.randn(1, 25, 1, 64, dtype=torch.bfloat16, device="cuda")
    for length in range(3000, 3020):
        k = torch.randn(1, 25, length, 64, dtype=torch.bfloat16, device="cuda")
        for name, chosen in sides.items():
            with chosen():
                taken[name].append(timed(lambda k=k: F.scaled_dot_product_attention(q, k, k)))
    for name, seconds in taken.items():
        print(f"one query, a new length every call, {name}: {1e3 * statistics.median(seconds):.3f} ms")


@torch.no_grad()
def grouped(length: int, repeats: int = 3) -> None:
    q, k, v = (torch.randn(1, heads, length, 128, device="cuda") for heads in (32, 8, 8))
    call = AttentionCall(0, q, k, v, 128**-0.5)

    def own() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    for name, run in (("torch's enable_gqa", own), ("ours", call.fused)):
        try:
            run()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            seconds = statistics.median(timed(run) for _ in range(repeats))
            gib = (torch.cuda.max_memory_allocated() - held) / 2**30
            print(f"float32, 32/8 heads, T = {length}, {name}: {1e3 * seconds:.2f} ms, {gib:.2f} GiB")
        except torch.cuda.OutOfMemoryError:
            print(f"float32, 32/8 heads, T = {length}, {name}: out of memory")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder with a tokenizer")
    parser.add_argument(
        "--planned", type=float, default=dense.PLANNED, help="operations of a call from which cuDNN is let in"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device here.")
    dense.PLANNED = arguments.planned
    classified(arguments.model)
    lengths()
    torch.backends.cuda.matmul.allow_tf32 = True
    for length in (4096, 16384):
        grouped(length)


if __name__ == "__main__":
    main()
