"""Several cards beside one: a model in parts (`--device-map`), and prompts handed out to a process a card (`--devices`).

Random weights; a weight is the same wherever it stands. Rows of every study are held to those of the first number of cards,
as max |a − b| / max |b| over the values of a metric; seconds are of a second run, the first one compiles; peaks are
`max_memory_allocated` of each card.

    python benchmarks/cards.py MODEL --shape gptj-6b --cards 1 2                     # parts; MODEL's tokenizer asks
    python benchmarks/cards.py MODEL --shape llama-70b --layers 8 --cards 1 2
    python benchmarks/cards.py MODEL --shape llama-70b --cards 4 --precision bfloat16 --studies flow classify
    python benchmarks/cards.py MODEL --shape gpt2-xl --handed-out --cards 1 2 --precision bfloat16 --data DATASETS --examples 800 --seeds 2 --batch 25
"""

import argparse
import gc
import json
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory, set_module_tensor_to_device
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTJConfig, LlamaConfig

import anchors
from anchors.model.identity import Identity, held
from anchors.model.language import DTYPES, LanguageModel, prepare
from anchors.model.source import Source
from anchors.study.helpers import helped
from anchors.study.registry import STUDIES

LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0}
SHAPES = {
    "gpt2-xl": lambda: GPT2Config(n_layer=48, n_head=25, n_embd=1600),
    "gptj-6b": GPTJConfig,
    "llama-8b": lambda: LlamaConfig(**LLAMA, hidden_size=4096, intermediate_size=14336),
    "llama-70b": lambda: LlamaConfig(
        **LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
    "tiny": lambda: LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    ),
}
BACK = ("o_proj", "down_proj", "out_proj", "fc_out", "c_proj")
"""Projections back into the residual stream: smaller with depth, as GPT-2's were drawn, so that rounding stays small."""
ALL = ("flow", "isolate", "readout", "classify", "reweight", "compress", "diagnose", "causal")


def make(arguments: argparse.Namespace, cards: int) -> Any:
    """A model on some cards, as transformers' `device_map="auto"` cuts it; every weight drawn on its card, by its name."""
    config = SHAPES[arguments.shape]()
    if arguments.layers:
        config.num_hidden_layers = arguments.layers
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[arguments.precision])
    if cards == 1:
        places = {"": 0 if torch.cuda.is_available() else "cpu"}
    else:
        whole = list(model._no_split_modules or ())
        most = {card: int(torch.cuda.mem_get_info(card)[0] * 0.97) for card in range(cards)}
        most = get_balanced_memory(model, max_memory=most, no_split_module_classes=whole)
        places = infer_auto_device_map(model, max_memory=most, no_split_module_classes=whole)
    for name, weight in list(model.named_parameters()):
        place = next(places[own] for own in sorted(places, key=len, reverse=True) if name.startswith(own))
        value = torch.empty(weight.shape, dtype=weight.dtype, device=place)
        generator = torch.Generator(value.device).manual_seed(zlib.crc32(name.encode()))
        value.normal_(0, 0.01 if weight.dim() == 1 else scale(name, weight, model), generator=generator)
        if weight.dim() == 1 and name.endswith("weight"):
            value += 1
        set_module_tensor_to_device(model, name, place, value=value)
        del value
    model.tie_weights()
    if cards > 1:
        print(
            json.dumps(
                {"places": {str(c): sum(p == c for p in places.values()) for c in set(places.values())}}
            )
        )
        return dispatch_model(model, places)
    return model.to(places[""])


def scale(name: str, weight: torch.Tensor, model: Any) -> float:
    """Of a matrix's weights: entries stay about as large as they come in."""
    depth = 2 * model.config.num_hidden_layers if any(own in name for own in BACK) else 1
    return (
        0.02
        if "emb" in name or "wte" in name or "wpe" in name
        else (max(weight.shape) if "c_" in name else weight.shape[1]) ** -0.5 * depth**-0.5
    )


def study(kind: str) -> Any:
    return anchors.Isolation(layers=(2,)) if kind == "isolate" else STUDIES[kind].make()


def apart(own: pd.DataFrame, first: pd.DataFrame) -> tuple[float, int]:
    """The worst difference of a metric by its size, and rows that are no numbers and differ."""
    keys = [name for name in own.columns if own[name].dtype.kind != "f"]
    other = sum(list(own[name]) != list(first[name]) for name in keys)
    worst = 0.0
    for metric, a in own.groupby("metric")["value"]:
        if metric == "identity_error":  # itself what rounding leaves
            continue
        b = first.loc[a.index, "value"]
        worst = max(worst, float((a - b).abs().max() / max(b.abs().max(), 1e-30)))
    return worst, other


def timed(run: Callable[[], pd.DataFrame]) -> tuple[pd.DataFrame, float]:
    for card in range(torch.cuda.device_count()):
        torch.cuda.synchronize(card)
    start = time.perf_counter()
    found = run()
    for card in range(torch.cuda.device_count()):
        torch.cuda.synchronize(card)
    return found, time.perf_counter() - start


def parts(arguments: argparse.Namespace) -> None:
    first: dict[str, tuple[pd.DataFrame, float]] = {}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    for cards in arguments.cards:
        start = time.perf_counter()
        net = make(arguments, cards)
        made = time.perf_counter() - start
        lm = prepare(net, tokenizer, arguments.shape, arguments.precision)
        size, certified = sum(weight.numel() for weight in net.parameters()), time.perf_counter()
        identity = lm.identity
        print(json.dumps({"cards": cards, "parameters": size, "made_s": round(made, 1),
                          "certified_s": round(certified - start - made, 1),
                          "identity_s": round(time.perf_counter() - certified, 1)}), flush=True)  # fmt: skip
        for kind in arguments.studies:
            try:
                rows, seconds, peaks = measured(lm, identity, kind, arguments)
            except (RuntimeError, anchors.AnchorsError) as error:
                print(json.dumps({"cards": cards, "study": kind, "failed": str(error)[:300]}), flush=True)
                continue
            said = {"shape": arguments.shape, "layers": lm.n_layers, "precision": arguments.precision, "cards": cards,
                    "study": kind, "rows": len(rows), "seconds": round(seconds, 3), "peak_gib": peaks}  # fmt: skip
            if kind in first:
                worst, other = apart(rows, first[kind][0])
                said |= {"apart": worst, "other": other, "times": round(seconds / first[kind][1], 3)}
            else:
                first[kind] = rows, seconds
            print(json.dumps(said), flush=True)
        del lm, net
        gc.collect()
        torch.cuda.empty_cache()


def measured(
    lm: LanguageModel, identity: Identity, kind: str, arguments: argparse.Namespace
) -> tuple[pd.DataFrame, float, list[float]]:
    task = anchors.task(arguments.task)
    how = anchors.Sample(
        seeds=tuple(range(arguments.seeds)), examples=arguments.examples, batch_size=arguments.batch
    )
    data = anchors.read(task, arguments.data)
    run = lambda: anchors.measure(lm, study(kind), task, data, how).rows  # noqa: E731
    with held(lm.model, identity):  # read once: a large model's takes seconds
        return _measured(run)


def _measured(run: Callable[[], pd.DataFrame]) -> tuple[pd.DataFrame, float, list[float]]:
    run()
    for card in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(card)
    rows, seconds = timed(run)
    peaks = [torch.cuda.max_memory_allocated(card) / 2**30 for card in range(torch.cuda.device_count())]
    return rows, seconds, [round(peak, 2) for peak in peaks]


def handed_out(arguments: argparse.Namespace) -> None:
    """The same prompts by one card and by several; the first measurement starts the processes and compiles."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        make(arguments, 1).save_pretrained(folder)
        AutoTokenizer.from_pretrained(arguments.model).save_pretrained(folder)
        first: dict[str, tuple[pd.DataFrame, float]] = {}
        for cards in arguments.cards:
            names = [f"cuda:{card}" for card in range(cards)] if kind == "cuda" else ["cpu"] * cards
            source = Source(folder, names[0], arguments.precision)
            lm = source.load()
            identity = lm.identity
            with helped(names, source):
                for study in arguments.studies:
                    rows, seconds, _ = measured(lm, identity, study, arguments)
                    said = {
                        "cards": cards,
                        "study": study,
                        "prompts": len(rows.loc[rows["number"] >= 0, ["seed", "number"]].drop_duplicates()),
                        "seconds": round(seconds, 2),
                    }
                    if study in first:
                        same = (
                            first[study][0]
                            .drop(columns="model", errors="ignore")
                            .equals(rows.drop(columns="model", errors="ignore"))
                        )
                        said |= {"same": same, "speedup": round(first[study][1] / seconds, 2)}
                    else:
                        first[study] = rows, seconds
                    print(json.dumps(said), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a folder whose tokenizer asks")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, help="only so many")
    parser.add_argument("--cards", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--studies", nargs="+", default=ALL, choices=ALL)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", help="as for `anchors flow`; default the built-in sets")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1, help="so many times so many prompts")
    parser.add_argument("--batch", type=int, help="prompts in a batch; the same on all cards")
    parser.add_argument("--handed-out", action="store_true", help="prompts to a process a card, not parts")
    arguments = parser.parse_args()
    (handed_out if arguments.handed_out else parts)(arguments)


if __name__ == "__main__":
    main()
