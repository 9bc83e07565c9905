"""Our flow against the plain way, in one process, both sides interleaved, medians.

The plain way: eager attention, one example at a time, gradient of the loss with respect to the materialised
attention of every layer, then |Σ_h A ⊙ ∂L/∂A| and the three sums. Errors are relative to the plain way in float64 on
the same weights. Weights are random: speed does not depend on them.

    uv run benchmarks/flow_speed.py                                   # GPT-2-small's shape, CPU, T = 200 and 800
    uv run benchmarks/flow_speed.py --shape gpt2-xl --device cuda --lengths 256 --batch 16
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from anchors.flow.metrics import Sums, flow_sums
from anchors.flow.saliency import flow, label_loss, collate
from anchors.models import DTYPES, LanguageModel, prepare
from anchors.tasks.prompts import Prompt

SHAPES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
CLASSES = 4


def make_model(shape: str, device: str, length: int, dtype: torch.dtype):
    torch.manual_seed(0)
    config = GPT2Config(**SHAPES[shape], n_positions=max(1024, length))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # Larger than the initialisation, so that attention is not uniform and gradients do not vanish.
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.mul_(2.0)
    return model.to(device, dtype).eval().requires_grad_(False)


def make_prompts(length: int, count: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(length)
    positions = tuple(length * k // (CLASSES + 1) for k in range(1, CLASSES + 1))
    return [
        Prompt(
            text="",
            ids=tuple(torch.randint(100, 50000, (length,), generator=generator).tolist()),
            roles=("text",) * length,
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
    loss, _ = label_loss(output.logits[:, -1], batch)
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


def error(sums: Sums, exact: Sums) -> float:
    """The largest relative error of the three sums over examples and layers (entries that are exactly 0 left out)."""
    worst = 0.0
    for name in ("s_wp", "s_pq", "s_ww"):
        a, b = getattr(sums, name), getattr(exact, name)
        real = b.abs() > 0
        worst = max(worst, float(((a - b).abs()[real] / b[real].abs()).max()))
    return worst


def concatenate(parts: list[Sums]) -> Sums:
    return Sums(*(torch.cat([getattr(p, n) for p in parts]) for n in ("s_wp", "s_pq", "s_ww")))


def ours(model, precision: str) -> LanguageModel:
    return prepare(model, tokenizer=None, name="random", precision=precision)


def timed(function, device: str) -> tuple[float, object]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def peak(side: str, shape: str, device: str, length: int, batch: int, precision: str, pipe) -> None:
    """Peak memory beyond the weights, in a fresh process."""
    model = make_model(shape, device, length, DTYPES[precision])
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 800])
    parser.add_argument("--batch", type=int, default=1, help="examples per batch of our side")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--precisions", nargs="+", default=["float32"])
    parser.add_argument("--exact", type=int, default=2, help="examples compared with float64")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--alone", action="store_true", help="only our side (for lengths the plain way cannot hold)")
    arguments = parser.parse_args()
    device = arguments.device
    for length in arguments.lengths:
        prompts = make_prompts(length, max(arguments.batch, arguments.exact))
        base = make_model(arguments.shape, device, length, torch.float32)
        for precision in arguments.precisions:
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            weights = {k: w.to(DTYPES[precision]).double() for k, w in base.state_dict().items()}
            routed_model = make_model(arguments.shape, device, length, DTYPES[precision])
            routed = ours(routed_model, precision)
            batch = prompts[: arguments.batch]
            flow(routed, batch)
            row = {"shape": arguments.shape, "device": device, "T": length, "precision": precision, "batch": len(batch)}
            if arguments.alone:
                times = [timed(lambda: flow(routed, batch), device)[0] for _ in range(arguments.repeats)]
                row["ours_ms"] = 1e3 * statistics.median(times) / len(batch)
                if device == "cuda":
                    row["ours_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                print(json.dumps(row), flush=True)
                continue
            plain(base, prompts[0], device)
            sides: dict[str, list[float]] = {"plain": [], "ours": []}
            for repeat in range(arguments.repeats):
                prompt = prompts[repeat % len(prompts)]
                sides["plain"].append(timed(lambda p=prompt: plain(base, p, device), device)[0])
                sides["ours"].append(timed(lambda: flow(routed, batch), device)[0] / len(batch))
            plain_ms, ours_ms = (1e3 * statistics.median(sides[s]) for s in ("plain", "ours"))
            compared = prompts[: arguments.exact]
            found = flow(routed, compared)
            if precision == arguments.precisions[0]:
                plain32 = concatenate([plain(base, p, device) for p in compared])
            exact_model = make_model(arguments.shape, device, length, torch.float64)
            exact_model.load_state_dict(weights)
            exact = concatenate([plain(exact_model, p, device) for p in compared])
            del exact_model, weights
            row |= {
                "plain_ms": round(plain_ms, 2),
                "ours_ms": round(ours_ms, 2),
                "speedup": round(plain_ms / ours_ms, 2),
                "error": error(found.sums, exact),
                "identity_error": float(found.identity_error.max()),
            }
            if precision == "float32":
                row["plain_error"] = error(plain32, exact)
            if not arguments.no_memory:
                for side in ("plain", "ours"):
                    row[f"{side}_peak_gib"] = measure_peak(
                        side, arguments.shape, device, length, arguments.batch, precision
                    )
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
