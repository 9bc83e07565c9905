"""Our flow against the plain way, in one process, both sides interleaved, medians.

The plain way: eager attention, one example at a time, gradient of the loss with respect to the materialised
attention of every layer, then |Σ_h A ⊙ ∂L/∂A| and the three sums. Weights are random, as the family
initialises them (times --gain): speed does not depend on them.

Errors are against the plain way in float64 on the same weights: of each of the three sums ‖ours − exact‖ /
‖exact‖ over the compared examples and all layers. "error" is the worst of the three, "worst_entry" the
largest relative error of any one example, layer and sum; "plain_..." are those of the plain way in float32.

    uv run benchmarks/flow_speed.py                      # GPT-2-small's shape, CPU, T = 200 and 800
    uv run benchmarks/flow_speed.py --shape gpt2-xl --device cuda --lengths 256 --batch 64
"""

import argparse
import json
import multiprocessing
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from anchors.flow.metrics import Sums, flow_sums
from anchors.flow.saliency import collate, flow, target_loss
from anchors.model.language import DTYPES, LanguageModel, prepare
from anchors.tasks.prompts import Prompt

SHAPES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
CLASSES = 4


def make_model(shape: str, device: str, length: int, dtype: torch.dtype, gain: float):
    torch.manual_seed(0)
    config = GPT2Config(**SHAPES[shape], n_positions=max(1024, length))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.mul_(gain)
    return model.to(device, dtype).eval().requires_grad_(False)


def make_prompts(length: int, count: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(length)
    positions = tuple(length * k // (CLASSES + 1) for k in range(1, CLASSES + 1))
    return [
        Prompt(
            text="",
            ids=tuple(torch.randint(100, 49000, (length,), generator=generator).tolist()),
            roles=("text",) * length,
            demonstrations=(0,) * (length - 1) + (-1,),
            label_positions=positions,
            label_classes=tuple(range(CLASSES)),
            label_ids=tuple(range(1000, 1000 + CLASSES)),
            gold=i % CLASSES,
        )
        for i in range(count)
    ]


def plain(model, prompt: Prompt, device: str) -> Sums:
    batch = collate([prompt], device)
    # Without a parameter that needs a gradient, the embedding is what the graph starts from.
    embedded = model.get_input_embeddings()(batch.ids).requires_grad_()
    output = model(inputs_embeds=embedded, output_attentions=True, use_cache=False)
    loss, _ = target_loss(output.logits[:, -1], batch)
    gradients = torch.autograd.grad(loss.sum(), output.attentions)
    rows, totals, target = [], [], []
    for attention, gradient in zip(output.attentions, gradients, strict=True):
        saliency = (attention * gradient).sum(1).abs().detach()
        saliency = saliency.tril(-1)
        rows.append(saliency[:, batch.labels[0]])
        target.append(saliency[:, batch.target[0]])
        totals.append(saliency.sum((1, 2)))
    return flow_sums(
        torch.stack(rows, 1).double().cpu(),
        torch.stack(target, 1).double().cpu(),
        torch.stack(totals, 1).double().cpu(),
        batch.labels.cpu(),
        batch.target.cpu(),
    )


def errors(sums: Sums, exact: Sums, side: str = "") -> dict[str, float]:
    """The worst of the three sums by norm, and the worst single entry (those that are exactly 0 left out)."""
    norm, entry = 0.0, 0.0
    for name in ("s_wp", "s_pq", "s_ww"):
        a, b = getattr(sums, name), getattr(exact, name)
        norm = max(norm, float((a - b).norm() / b.norm()))
        real = b != 0
        entry = max(entry, float(((a - b).abs()[real] / b[real].abs()).max()))
    return {f"{side}error": norm, f"{side}worst_entry": entry}


def concatenate(parts: list[Sums]) -> Sums:
    return Sums(*(torch.cat([getattr(p, n) for p in parts]) for n in ("s_wp", "s_pq", "s_ww")))


def first(sums: Sums, count: int) -> Sums:
    return Sums(*(getattr(sums, n)[:count] for n in ("s_wp", "s_pq", "s_ww")))


def ours(model, precision: str) -> LanguageModel:
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    spelled = Tokenizer(BPE(vocab=letters, merges=[]))
    spelled.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelled)
    return prepare(model, tokenizer, "random", precision)


def timed(function, device: str) -> tuple[float, object]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def peak(
    side: str, shape: str, device: str, length: int, gain: float, batch: int, precision: str, pipe
) -> None:
    """Peak memory beyond the weights, in a fresh process."""
    model = make_model(shape, device, length, DTYPES[precision], gain)
    prompts = make_prompts(length, batch)
    run = (lambda: plain(model, prompts[0], device)) if side == "plain" else None
    if run is None:
        routed = ours(model, precision)
        run = lambda: flow(routed, prompts)  # noqa: E731
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        pipe.send((torch.cuda.max_memory_allocated() - before) / 2**30)
        return
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = high_water()
    run()
    pipe.send((high_water() - before) / 2**30)


def high_water() -> int:
    """Peak resident bytes of this process (Linux)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure_peak(*arguments) -> float | None:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=peak, args=(*arguments, send))
    child.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return None
    finally:
        child.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 800])
    parser.add_argument("--batch", type=int, default=1, help="examples per batch of our side")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--precisions", nargs="+", default=["float32"])
    parser.add_argument("--exact", type=int, default=2, help="examples compared with float64")
    parser.add_argument("--gain", type=float, default=1.0, help="factor on the initial weight matrices")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument(
        "--alone", action="store_true", help="only our side (for lengths the plain way cannot hold)"
    )
    parser.add_argument(
        "--kernels", action="store_true", help="with --alone: where the time goes, by torch's profiler"
    )
    arguments = parser.parse_args()
    device = arguments.device
    for length in arguments.lengths:
        prompts = make_prompts(length, max(arguments.batch, arguments.exact))
        base = make_model(arguments.shape, device, length, torch.float32, arguments.gain)
        for precision in arguments.precisions:
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            weights = {k: w.to(DTYPES[precision]).double() for k, w in base.state_dict().items()}
            routed_model = make_model(arguments.shape, device, length, DTYPES[precision], arguments.gain)
            routed = ours(routed_model, precision)
            batch = prompts[: arguments.batch]
            before = timed(partial(flow, routed, batch), device)[0]
            row = {
                "shape": arguments.shape,
                "device": device,
                "T": length,
                "precision": precision,
                "batch": len(batch),
                "first_ms": 1e3 * before,
            }
            if arguments.alone:
                times = [timed(partial(flow, routed, batch), device)[0] for _ in range(arguments.repeats)]
                row["ours_ms"] = 1e3 * statistics.median(times) / len(batch)
                if device == "cuda":
                    row["ours_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                print(json.dumps(row), flush=True)
                if arguments.kernels:
                    with torch.profiler.profile() as seen:
                        timed(partial(flow, routed, batch), device)
                    by = f"self_{device}_time_total"
                    print(seen.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=80))
                continue
            plain(base, prompts[0], device)
            sides: dict[str, list[float]] = {"plain": [], "ours": []}
            for repeat in range(arguments.repeats):
                prompt = prompts[repeat % len(prompts)]
                sides["plain"].append(timed(partial(plain, base, prompt, device), device)[0])
                sides["ours"].append(timed(partial(flow, routed, batch), device)[0] / len(batch))
            plain_ms, ours_ms = (1e3 * statistics.median(sides[s]) for s in ("plain", "ours"))
            compared = prompts[: arguments.exact]
            found = flow(routed, prompts)
            if precision == arguments.precisions[0]:
                plain32 = concatenate([plain(base, p, device) for p in compared])
            exact_model = make_model(arguments.shape, device, length, torch.float64, arguments.gain)
            exact_model.load_state_dict(weights)
            exact = concatenate([plain(exact_model, p, device) for p in compared])
            del exact_model, weights
            row |= {
                "plain_ms": round(plain_ms, 2),
                "ours_ms": round(ours_ms, 2),
                "speedup": round(plain_ms / ours_ms, 2),
                "gain": arguments.gain,
                **errors(first(found.sums, len(compared)), exact),
                "identity_error": float(found.identity_error.max()),
            }
            if DTYPES[precision] == torch.float32:
                row |= errors(plain32, exact, "plain_")
            if not arguments.no_memory:
                for side in ("plain", "ours"):
                    row[f"{side}_peak_gib"] = measure_peak(
                        side, arguments.shape, device, length, arguments.gain, arguments.batch, precision
                    )
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
