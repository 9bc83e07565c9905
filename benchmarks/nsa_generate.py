"""One step of `generate` on a model of Native Sparse Attention: with compressed keys kept, made anew, and full attention.

kept: the layers that NSA puts into any cache (`anchors.nsa.cache.NSALayer`). anew: transformers' own growing layers,
from which every compressed key is made at every step. full: the same model with full attention (torch's SDPA without
cuDNN) and transformers' own cache. full, cudnn: with cuDNN among the backends that torch chooses from; it plans anew for
every length, and a growing cache has another at every step. All in one process, in turns; a cache is filled with
random keys and values, and the same tokens follow. A step is the whole forward pass of one token of each text, host included, as `generate` pays it.

With `--padding P` every second text, the first to begin with, has P tokens of padding on its left among the tokens.

"ms" is the median over the rounds of the mean step of a round; a round is d steps, in which each text completes one
block. "cache_mb" is what the cache holds, its room to grow included; "peak_mb" the most memory that a step needs beyond
the model (CUDA only). "error" is the largest difference of a logit of kept and anew relative to the largest logit.

With `--kernels` it says, too, of what kernels a step of `kept` is, and how long they take.

    uv run benchmarks/nsa_generate.py                                        # tiny, on the CPU
    uv run benchmarks/nsa_generate.py --device cuda --out nsa_generate.csv   # 4k to 64k, 1 and 16 texts
    uv run benchmarks/nsa_generate.py --padding 100                          # of unlike lengths
"""

import argparse
import gc
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from icl_speed import show_kernels
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from anchors.attention.dense import UNPLANNED
from anchors.context import cache_argument
from anchors.nsa.config import NSAConfig
from anchors.nsa.model import NSAForCausalLM
from anchors.nsa.texts import Texts

TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "l": 32, "d": 16, "lp": 64, "n": 4, "w": 64,
}  # fmt: skip
REAL: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 2,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 1 << 17,
}  # fmt: skip
NAMES = ("kept", "anew", "full", "full, cudnn")


class Anew(DynamicLayer):
    """transformers' own layer, under another name, so that NSA leaves it alone."""


def made(attention: str, sizes: dict[str, Any], dtype: torch.dtype, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = NSAForCausalLM(NSAConfig(attention=attention, eos_token_id=None, **sizes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "phi" in name and name.endswith("down"):  # begun at zero: all keys would be means
                weight.normal_(std=weight.shape[0] ** -0.5)
    return model.to(dtype=dtype, device=device).eval()


def filled(
    model: PreTrainedModel, name: str, batch: int, tokens: int, dtype: torch.dtype, texts: Texts | None
) -> DynamicCache:
    """A cache of random keys and values of some texts, the same for kept and anew."""
    config = model.config
    heads = config.num_key_value_heads * (1 if name.startswith("full") else 3)
    cache = DynamicCache()
    if name == "anew":
        cache.layers = [Anew() for _ in range(config.num_hidden_layers)]
    draws = torch.Generator(model.device).manual_seed(1)
    for layer in range(config.num_hidden_layers):
        k, v = (
            torch.randn(batch, heads, tokens, config.head_dim, generator=draws, device=model.device).to(dtype)
            for _ in range(2)
        )
        cache.update(k, v, layer)
        vars(cache.layers[layer])["texts"] = texts
    return cache


def held(cache: DynamicCache) -> int:
    """Bytes of everything that a cache holds, each storage once."""
    tensors = []
    for layer in cache.layers:
        for x in vars(layer).values():
            tensors += x.values() if isinstance(x, dict) else [x]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors if isinstance(x, Tensor)}
    return sum(x.nbytes() for x in storages.values())


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@torch.no_grad()
def measure(batch: int, tokens: int, sizes: dict[str, Any], options: argparse.Namespace) -> list[dict]:
    dtype = getattr(torch, options.dtype)
    sparse = made("nsa", sizes, dtype, options.device)
    full = made("full", sizes, dtype, options.device)
    models = {"kept": sparse, "anew": sparse, "full": full, "full, cudnn": full}
    names = [name for name in NAMES if options.device.startswith("cuda") or "cudnn" not in name]
    a_round = sparse.config.d
    mask = torch.ones(batch, tokens + (options.rounds + 1) * a_round, dtype=torch.long, device=options.device)
    mask[::2, : options.padding] = 0
    texts = Texts.of_mask(mask[:, :tokens]) if options.padding else None
    caches = {name: filled(models[name], name, batch, tokens, dtype, texts) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks, logits = dict.fromkeys(names, float("nan")), {}
    off = 0.0
    for number in range(options.rounds + 1):  # the first is a warm-up
        ids = torch.randint(0, sizes["vocab_size"], (batch, a_round), device=options.device)
        for name in names if number % 2 else reversed(names):
            model, cache = models[name], caches[name]
            wait(options.device)
            if options.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated() - held(cache)
            start = time.perf_counter()
            for t in range(a_round):
                seen = mask[:, : tokens + number * a_round + t + 1] if options.padding else None
                with sdpa_kernel(UNPLANNED) if name == "full" else nullcontext():
                    found = model(
                        input_ids=ids[:, t : t + 1],
                        attention_mask=seen,
                        use_cache=True,
                        **{cache_argument(model): cache},
                    ).logits
            wait(options.device)
            if number:
                times[name].append((time.perf_counter() - start) * 1e3 / a_round)
            if options.device.startswith("cuda"):
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
            logits[name] = found.float()
        off = max(off, float((logits["kept"] - logits["anew"]).abs().max() / logits["anew"].abs().max()))
    if options.kernels:
        with torch.profiler.profile() as seen:
            sparse(input_ids=ids[:, :1], use_cache=True, **{cache_argument(sparse): caches["kept"]})
            wait(options.device)
        show_kernels(seen)
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    return [
        {
            "batch": batch, "tokens": tokens, "padding": options.padding, "name": name, "ms": middle[name],
            "ms_low": min(times[name]), "ms_high": max(times[name]), "times_kept": middle[name] / middle["kept"],
            "cache_mb": held(caches[name]) / 1e6, "peak_mb": peaks[name],
            "error": off if name == "kept" else float("nan"),
        }
        for name in names
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="bfloat16 on CUDA, else float32")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--padding", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernels", action="store_true", help="of a step, by torch's profiler")
    parser.add_argument("--out", type=Path, help="a table, as CSV")
    options = parser.parse_args()
    real = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bfloat16" if real else "float32")
    sizes = REAL if real else TINY
    name = torch.cuda.get_device_name() if real else "cpu"
    print(f"{name}, torch {torch.__version__}, {options.dtype}, {sizes['num_hidden_layers']} layers")
    rows = []
    for batch in options.batch or ([1, 16] if real else [1, 2]):
        for tokens in options.tokens or ([4096, 8192, 16384, 32768, 65536] if real else [256, 1024]):
            try:
                found = measure(batch, tokens, sizes, options)
            except torch.cuda.OutOfMemoryError:
                found = [{"batch": batch, "tokens": tokens, "name": "out of memory"}]
            rows += found
            print(pd.DataFrame(found).to_string(index=False, float_format=lambda x: f"{x:.4g}"), flush=True)
            gc.collect()
            if real:
                torch.cuda.empty_cache()
    if options.out:
        pd.DataFrame(rows).assign(device=name, torch=torch.__version__).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
