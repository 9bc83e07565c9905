"""What `--dry-run` foretells beside what is then measured: seconds, operations, memory at the peak.

Each verb runs on prompts of random tokens laid out like a task's, in a process of its own: foretold, then measured with the
same studies. Seconds are wall clock, or with --busy the processor's over its threads, on both sides: on a CPU that others use,
too, wall clock says nothing. Operations are those that torch
counts in a second run (Triton's kernels it does not see); memory is what the process holds at the most beyond what it held
before (VmHWM, on Linux), or `max_memory_allocated` on CUDA, the weights on both sides.

    uv run benchmarks/forecast.py                                   # the default model on the CPU, every verb
    uv run benchmarks/forecast.py --shape gpt2-xl --device cuda --precision bfloat16 --lengths 256 2048 --verbs flow classify
"""

import argparse
import ctypes
import gc
import io
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from flow_speed import SHAPES, make_model
from torch.utils.flop_counter import FlopCounterMode

import anchors
from anchors.model.language import DTYPES, LanguageModel, prepare
from anchors.study import cost
from anchors.study.plan import Outlook, outlook
from anchors.study.prompted import Part
from anchors.study.registry import STUDIES
from anchors.study.runner import Sample, measure
from anchors.tasks.data import Data

VERBS = (
    "flow",
    "map",
    "classify",
    "isolate",
    "words",
    "readout",
    "reweight",
    "compress",
    "speed",
    "diagnose",
    "causal",
)


def loaded(arguments: argparse.Namespace) -> LanguageModel:
    own = anchors.load(arguments.model, device=arguments.device, precision=arguments.precision)
    if arguments.shape is None:
        return own
    longest = max(1024, *arguments.lengths)
    net = make_model(arguments.shape, arguments.device, longest, DTYPES[own.precision], 1.0)
    return prepare(net, own.tokenizer, arguments.shape, own.precision)


def data_of(task: anchors.Task, length: int, fresh: bool, lm: LanguageModel) -> Data:
    """The built-in texts, each said so often that a prompt with one demonstration a class is about so long."""
    data = anchors.read(task)
    if not length:
        return data
    few = data.test[:1]
    own = sum(len(lm.tokenizer(e.text).input_ids) for e in few)
    times = max(1, round(length / (len(task.labels) + 1) / own))
    longer = lambda part: tuple(replace(e, text=" ".join([e.text] * times)) for e in part)  # noqa: E731
    return replace(data, train=longer(data.train), test=longer(data.test))


class Watch:
    """Seconds, the processor's seconds and bytes of what runs inside."""

    def __init__(self, lm: LanguageModel, weights: int) -> None:
        self.cuda, self.weights = lm.device.type == "cuda", weights

    def __enter__(self) -> "Watch":
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() - self.weights
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
            self.before = status("VmRSS") - self.weights
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        self.peak = (torch.cuda.max_memory_allocated() if self.cuda else status("VmHWM")) - self.before


def processor(run: Callable[[], object], _: LanguageModel) -> float:
    """The processor's seconds of a call, over its threads; what is foretold is timed so with --busy."""
    start = time.process_time()
    run()
    return (time.process_time() - start) / torch.get_num_threads()


def status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) * 1024


def one(arguments: argparse.Namespace, verb: str, length: int, pipe: Any) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.busy:
        cost.seconds = processor
    lm = loaded(arguments)
    task = anchors.task(arguments.task)
    analysis = STUDIES[verb].make()
    data = data_of(task, length, analysis.fresh, lm)
    pd.DataFrame({"loaded": ["before"]}).to_parquet(io.BytesIO())  # pyarrow is no memory of the model's
    part = Part(analysis, task, data, Sample(examples=arguments.examples, batch_size=arguments.batch))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        began = time.perf_counter()
        (told,) = outlook(lm, [part], out)
        asked = time.perf_counter() - began
        with Watch(lm, told.peak.weights if told.peak else 0) as watch:
            measure(lm, analysis, task, data, part.how, out=out / "measured")
        with Watch(lm, 0) as again:  # kernels are compiled by now, and nothing else differs
            measure(lm, analysis, task, data, part.how, out=out / "again")
        counted = None
        if arguments.flop:
            with FlopCounterMode(display=False) as counter:
                measure(lm, analysis, task, data, part.how, out=out / "counted")
            counted = counter.get_total_flops()
    taken = watch.cpu / torch.get_num_threads() if arguments.busy else watch.wall
    pipe.send(row(verb, lm, told, asked, taken, again.wall, watch.peak, counted))


def row(
    verb: str,
    lm: LanguageModel,
    told: Outlook,
    asked: float,
    taken: float,
    again: float,
    peak: int,
    counted: int | None,
) -> dict[str, Any]:
    weights = told.peak.weights if told.peak else 0
    return {
        "verb": verb, "model": lm.name, "device": str(lm.device), "precision": lm.precision,
        "batches": told.batches, "attention": told.attention, "tokens": told.tokens,
        "dry_run_s": asked,
        "s_told": told.seconds, "s": taken,
        "s_ratio": (told.seconds or 0) / taken,
        "s_again": again, "again_ratio": (told.seconds or 0) / again,
        "TFLOP_told": (told.flop or 0) / 1e12, "TFLOP": (counted or 0) / 1e12,
        "flop_ratio": (told.flop or 0) / counted if counted else None,
        "GB_told": told.memory / 1e9, "GB": peak / 1e9, "GB_ratio": told.memory / peak,
        "beyond_ratio": (told.memory - weights) / max(1, peak - weights),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="as anchors.load takes it; its tokenizer serves a --shape, too")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--verbs", nargs="+", default=VERBS, choices=VERBS)
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[0], help="tokens of a prompt; 0: the texts as they are"
    )
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--busy", action="store_true", help="the processor's seconds, on a machine that others use"
    )
    parser.add_argument("--flop", action="store_true", help="count operations in a second run")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    rows = []
    context = multiprocessing.get_context("spawn")
    for verb in arguments.verbs:
        for length in arguments.lengths:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=one, args=(arguments, verb, length, there))
            process.start()
            there.close()
            try:
                rows.append(here.recv())
            except EOFError:
                print(f"{verb} at {length} tokens ended without a result", file=sys.stderr)
                continue
            finally:
                process.join()
            print(
                " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()),
                flush=True,
            )
            if arguments.csv:
                pd.DataFrame(rows).to_csv(arguments.csv, index=False)


if __name__ == "__main__":
    main()
