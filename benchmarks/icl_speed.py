"""Our in-context learning against the plain way, in one process, both sides interleaved, medians.

Three parts (--parts), each a table; beside the times stands how far the results of the two sides are apart.

shared: label probabilities of many test inputs. Ours runs the demonstrations once and the inputs in the runner's
batches on their cache (`Classification`); the plain way runs every whole prompt, one by one. The time of the
demonstrations is ours. "error" is the largest difference of a label probability.

reweight: one training step of β (loss, backward, Adam) at batch 1. Ours runs the last token on the cache of
everything before it (`one_token_slope`), the plain way the whole prompt (`literal_loss`). Both train a β of their own
on the same examples in the same order; "error" is the largest difference of the two β after --steps steps.
"cache_ms" is what an example costs once, its share of the demonstrations included, "break_even" the number of steps
per example after which that is earned back.

compress: seconds per test input as `Speed` takes them: whole prompts, batched, against the inputs alone on the
anchors of the demonstrations (Table 3 of the paper). Compression changes the answers: "loyalty" is the share of
unchanged predictions, "error" the largest difference of a label probability. "limit" is the ratio of the tokens,
(L_demo + L_x) / (L_x + anchors); "no_anchors" that without any, (L_demo + L_x) / L_x.

    uv run benchmarks/icl_speed.py                                   # SmolLM2-135M-Instruct, built-in data
    uv run benchmarks/icl_speed.py --parts shared --data DATASETS --json icl_speed.json

Run it on a quiet machine, or with --threads 1: a step of one token is thousands of short operations, and on busy
cores each barrier between threads waits for the scheduler. The load is printed with every table.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from flow_speed import SHAPES, make_model
from torch import Tensor, nn

import anchors
from anchors.analyses.classification import Classification
from anchors.analyses.compression import Speed
from anchors.context import answer, encode, queries
from anchors.icl import label_probabilities
from anchors.model.language import DTYPES, LanguageModel, prepare
from anchors.model.routed import seconds
from anchors.reweighting import label_head, last, literal_loss, new_beta, one_token_slope, training_prompts
from anchors.study.runner import Cell, batches
from anchors.tasks.drawing import Draw, Drawn, draw
from anchors.tasks.prompts import Prompt

PAPER = {"sst2": (18, 1.1), "trec": (61, 1.5), "agnews": (151, 2.5)}
"""L_demo and the speed-up of GPT2-XL in Table 3 of the paper."""

Row = dict[str, str | int | float]


def timed(run: Callable[[], object], model: LanguageModel) -> tuple[float, object]:
    """Seconds of a call, and what it returns."""
    kept = []
    return seconds(lambda: kept.append(run()), model), kept[0]


def make_cell(model: LanguageModel, task_name: str, arguments: argparse.Namespace) -> Cell:
    task = anchors.task(task_name)
    data = anchors.read(task, arguments.data)
    how = Draw(shots=1, seed=arguments.seed, fresh=False)
    drawn = draw(task, data, model.tokenizer, how, arguments.examples)
    return Cell(task, data, how, tuple(drawn), Path(tempfile.gettempdir()))


def runner_batches(model: LanguageModel, analysis: object, cell: Cell, size: int | None) -> list[list[Drawn]]:
    """The prompts in the batches in which the runner would measure them."""
    units = {(cell.how.seed, i): d for i, d in enumerate(cell.prompts)}
    return [[units[u] for u in part] for part in batches(model, analysis, units, list(units), size)]


def plain_probabilities(model: LanguageModel, prompt: Prompt) -> Tensor:
    """The definition: the whole prompt alone, the softmax over the label words' logits at its last token."""
    ids = torch.tensor([prompt.ids], device=model.device)
    with torch.no_grad():
        logits = model.logits_at(ids, torch.tensor([prompt.target], device=model.device))
    return logits[0, list(prompt.label_ids)].float().softmax(-1).cpu()


def shared(model: LanguageModel, arguments: argparse.Namespace) -> list[Row]:
    cell = make_cell(model, "agnews", arguments)
    analysis = Classification()
    state = analysis.prepare(model, cell)
    plain_probabilities(model, cell.prompts[0].prompt)
    once = statistics.median(
        timed(lambda: analysis.prepare(model, cell), model)[0] for _ in range(arguments.repeats)
    )
    parts = runner_batches(model, analysis, cell, arguments.batch)
    ours = plain = error = 0.0
    for part in parts:
        prompts = [d.prompt for d in part]
        taken: list[tuple[float, float]] = []
        for _ in range(arguments.repeats):
            of_ours, records = timed(lambda: analysis.measure(model, state, cell.task, part), model)
            of_plain, exact = timed(lambda: [plain_probabilities(model, p) for p in prompts], model)
            taken.append((of_ours, of_plain))
        ours += statistics.median(t for t, _ in taken)
        plain += statistics.median(t for _, t in taken)
        found = [[r.value for r in own if r.metric.startswith("probability/")] for own in records]
        error = max(error, float((torch.tensor(found) - torch.stack(exact)).abs().max()))
    count = len(cell.prompts)
    return [
        {
            "task": cell.task.name,
            "examples": count,
            "L_demo": cell.prompts[0].prompt.query,
            "T": statistics.mean(len(d.prompt.ids) for d in cell.prompts),
            "batch": count / len(parts),
            "plain_ms": 1e3 * plain / count,
            "ours_ms": 1e3 * (once + ours) / count,
            "demonstrations_ms": 1e3 * once,
            "faster": plain / (once + ours),
            "error": error,
        }
    ]


class Trained(NamedTuple):
    beta: nn.Parameter
    optimiser: torch.optim.Adam

    @classmethod
    def of(cls, model: LanguageModel, prompt: Prompt) -> "Trained":
        beta = new_beta(model, prompt)
        return cls(beta, torch.optim.Adam([beta], lr=0.01))


def reweight(model: LanguageModel, arguments: argparse.Namespace) -> list[Row]:
    """In two rounds of many steps each: while the head is cut for ours, the whole prompt cannot be asked."""
    cell = make_cell(model, "agnews", arguments)
    prompts = training_prompts(model, cell, per_class=4)
    label_ids, start = prompts[0].label_ids, prompts[0].query
    encode(model, prompts[0].ids[:start])
    once, context = timed(lambda: encode(model, prompts[0].ids[:start]), model)
    with label_head(model, label_ids):
        encoded = [timed(lambda: encode(model, p.ids[start:-1], context), model) for p in prompts]
    cache = once / len(prompts) + statistics.median(t for t, _ in encoded)

    def literal_slope(number: int, beta: nn.Parameter) -> tuple[Tensor, ...]:
        return torch.autograd.grad(literal_loss(model, prompts[number], beta), beta)

    def fast_slope(number: int, beta: nn.Parameter) -> tuple[Tensor, ...]:
        return one_token_slope(model, encoded[number][1], beta, *last(model, prompts[number]))[1:]

    def step(slope: Callable[[int, nn.Parameter], tuple[Tensor, ...]], number: int, side: Trained) -> float:
        def run() -> None:
            (side.beta.grad,) = slope(number, side.beta)
            side.optimiser.step()

        return seconds(run, model)

    order = [i % len(prompts) for i in range(arguments.steps)]
    ours, plain = Trained.of(model, prompts[0]), Trained.of(model, prompts[0])
    fast: list[float] = []
    literal: list[float] = []
    for part in (order[: len(order) // 2], order[len(order) // 2 :]):
        with label_head(model, label_ids):
            fast += [step(fast_slope, n, ours) for n in part]
            if arguments.kernels:
                with torch.profiler.profile() as seen:
                    timed(partial(fast_slope, part[-1], ours.beta), model)
        literal += [step(literal_slope, n, plain) for n in part]
    if arguments.kernels:
        show_kernels(seen)
    ours_ms, plain_ms = 1e3 * statistics.median(fast), 1e3 * statistics.median(literal)
    return [
        {
            "task": cell.task.name,
            "T": statistics.mean(len(p.ids) for p in prompts),
            "T_min": min(len(p.ids) for p in prompts),
            "steps": arguments.steps,
            "plain_ms": plain_ms,
            "ours_ms": ours_ms,
            "ours_mean_ms": 1e3 * statistics.mean(fast[1:]),
            "faster": plain_ms / ours_ms,
            "error": float((ours.beta - plain.beta).detach().abs().max()),
            "largest_beta": float(plain.beta.detach().abs().max()),
            "cache_ms": 1e3 * cache,
            "break_even": 1e3 * cache / (plain_ms - ours_ms),
        }
    ]


def compress(model: LanguageModel, arguments: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for name, (length, speed_up) in PAPER.items():
        cell = make_cell(model, name, arguments)
        analysis = Speed(repeats=arguments.repeats)
        state = analysis.prepare(model, cell)
        of_seed = {r.metric: r.value for r in analysis.once(model, state, cell)}
        taken: dict[str, list[float]] = {"none": [], "hidden_anchor": []}
        loyal = error = 0.0
        for part in runner_batches(model, analysis, cell, arguments.batch):
            for own in analysis.measure(model, state, cell.task, part):
                for record in own:
                    taken[record.condition].append(record.value)
            before, after = both_answers(model, state, [d.prompt for d in part])
            loyal += float((before.argmax(-1) == after.argmax(-1)).sum())
            error = max(error, float((before - after).abs().max()))
        demonstrations = of_seed["demonstration_tokens"]
        tokens, kept = of_seed["input_tokens"], of_seed["kept_tokens"]
        vanilla, compressed = (statistics.mean(taken[c]) for c in ("none", "hidden_anchor"))
        rows.append(
            {
                "task": name,
                "L_demo": demonstrations,
                "L_x": tokens,
                "anchors": kept,
                "vanilla_ms": 1e3 * vanilla,
                "ours_ms": 1e3 * compressed,
                "faster": vanilla / compressed,
                "limit": (demonstrations + tokens) / (tokens + kept),
                "no_anchors": (demonstrations + tokens) / tokens,
                "paper": speed_up,
                "paper_L_demo": length,
                "loyalty": loyal / len(cell.prompts),
                "error": error,
            }
        )
    return rows


def both_answers(model: LanguageModel, state: tuple, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Label probabilities on whole prompts and on the anchors."""
    whole, kept = state
    entire = queries(prompts, 0, model.device)
    rest = queries(prompts, len(whole.ids), model.device)
    return (
        label_probabilities(answer(model, None, entire), entire),
        label_probabilities(answer(model, kept, rest), rest),
    )


def show(title: str, rows: Sequence[Row]) -> None:
    lines = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def shown(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.4g}"
    return str(value)


def show_kernels(seen: torch.profiler.profile) -> None:
    """How many kernels a step is, how long they take, from the first one's begin to the last one's end, and which ones."""
    kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [e.time_range for e in kernels]
    if spans:
        busy = sum(span.elapsed_us() for span in spans) / 1e3
        whole = (max(span.end for span in spans) - min(span.start for span in spans)) / 1e3
        print(f"{len(kernels)} kernels, {busy:.2f} ms of work within {whole:.2f} ms")
    table = seen.key_averages().table(
        sort_by="self_device_time_total", row_limit=20, max_name_column_width=60
    )
    print(table)


PARTS = {"shared": shared, "reweight": reweight, "compress": compress}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", help="as for `anchors flow`; default SmolLM2-135M-Instruct")
    parser.add_argument(
        "--shape", choices=SHAPES, help="random weights of this shape, with that model's tokenizer"
    )
    parser.add_argument(
        "--batch", type=int, help="inputs in a batch of `shared`; default as the runner chooses"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--data", help="as for `anchors flow`; default the built-in sets")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--examples", type=int, default=200, help="test inputs of `shared` and `compress`")
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each batch, of which the median counts"
    )
    parser.add_argument("--steps", type=int, default=16, help="training steps of `reweight`")
    parser.add_argument(
        "--kernels", action="store_true", help="where a step of `reweight` goes, by torch's profiler"
    )
    parser.add_argument("--threads", type=int, help="of torch; default: as the machine gives")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = anchors.load(arguments.model, device=arguments.device, precision=arguments.precision)
    if arguments.shape:
        net = make_model(arguments.shape, arguments.device, 1024, DTYPES[model.precision], 1.0)
        model = prepare(net, model.tokenizer, arguments.shape, model.precision)
    print(f"{model.name}, {model.precision} on {model.device}, {torch.get_num_threads()} threads")
    found = {}
    for name in arguments.parts:
        found[name] = PARTS[name](model, arguments)
        show(f"{name} (load {os.getloadavg()[0]:.1f})", found[name])
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
