"""The flow of many prompts: batched, resumable, tidy."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from anchors.errors import AnchorsError
from anchors.flow.saliency import flow
from anchors.models import LanguageModel
from anchors.results import Run
from anchors.stats import SUMS
from anchors.tasks.data import Data
from anchors.tasks.prompts import Draw, Drawn, draw, within_context
from anchors.tasks.task import Task

log = logging.getLogger(__name__)

VERSION = 1
"""Raised whenever the numbers of a flow run change for the same configuration."""

CPU_TOKENS = 512
"""Tokens per batch on the CPU: longer batches gain nothing there and hold more memory."""


@dataclass(frozen=True)
class Measured:
    """Tidy rows of a flow run, and what was left out.

    Attributes:
        rows: one row per example, layer and metric.
        skipped: prompts left out because they are longer than the model's context.
        config: what the rows depend on.
    """

    rows: pd.DataFrame
    skipped: int
    config: dict


def measure(
    model: LanguageModel,
    task: Task,
    data: Data,
    *,
    out: Path,
    shots: int = 1,
    seeds: Sequence[int] = (42,),
    examples: int = 100,
    batch_size: int | None = None,
    skip_too_long: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """S_wp, S_pq and S_ww of every prompt that the protocol draws, computing only what `out` does not hold.

    Args:
        model, task, data: what is measured.
        out: results folder; finished batches are kept under its `runs`.
        shots: demonstrations per class, drawn anew for every prompt (2.1).
        seeds, examples: prompts are the first `examples` of each seed.
        batch_size: prompts per batch; None chooses by memory. Out of memory halves it and goes on.
        skip_too_long: leave prompts out that exceed the model's context, instead of an error.
        progress: called with (prompts done, prompts in all).

    Raises:
        AnchorsError: see `draw`, `within_context` and `flow`.
    """
    config = {
        "kind": "flow",
        "version": VERSION,
        "model": model.fingerprint,
        "precision": model.precision,
        "task": task.identity(),
        "data": data.fingerprint,
        "shots": shots,
        "fresh": True,
    }
    skipped = 0
    work: dict[tuple[int, int], Drawn] = {}
    for seed in seeds:
        drawn = draw(task, data, model.tokenizer, Draw(shots=shots, seed=seed), examples)
        numbers = {id(d): number for number, d in enumerate(drawn)}
        fitting, left_out = within_context(drawn, model.context, skip=skip_too_long)
        skipped += left_out
        work |= {(seed, numbers[id(d)]): d for d in fitting}
    if not work:
        raise AnchorsError("Every prompt is longer than the model's context.", "Use fewer --shots.")
    run = Run.open(out, "flow", config)
    done = run.done() & work.keys()
    pending = [unit for unit in work if unit not in done]
    finished = len(work) - len(pending)
    progress(finished, len(work))
    for batch in _batches(model, work, pending, batch_size):
        for part, result in _halving(model, [work[unit].prompt for unit in batch]):
            units = [batch[i] for i in part]
            run.append(_rows(task, work, units, result), units)
            finished += len(units)
            progress(finished, len(work))
    rows = run.rows()
    assert rows is not None  # noqa: S101 - `work` is not empty
    wanted = pd.MultiIndex.from_tuples(list(work), names=["seed", "number"])
    rows = rows[pd.MultiIndex.from_frame(rows[["seed", "number"]]).isin(wanted)]
    rows.insert(0, "task", task.name)
    rows.insert(0, "model", model.name)
    rows = rows.sort_values(["seed", "number"], kind="stable", ignore_index=True)
    return Measured(rows, skipped, config)


def _batches(
    model: LanguageModel, work: dict[tuple[int, int], Drawn], pending: list[tuple[int, int]], size: int | None
) -> Iterator[list[tuple[int, int]]]:
    """Neighbours in length share a batch, within windows, so that little is padded and progress stays even."""
    length = {unit: len(work[unit].prompt.ids) for unit in pending}
    budget = size * max(length.values(), default=1) if size else tokens_per_batch(model)
    window = 16 * (size or max(1, budget // max(length.values(), default=1)))
    for start in range(0, len(pending), window):
        batch: list[tuple[int, int]] = []
        for unit in sorted(pending[start : start + window], key=length.__getitem__):
            full = len(batch) == size if size else (len(batch) + 1) * length[unit] > budget
            if batch and full:
                yield batch
                batch = []
            batch.append(unit)
        if batch:
            yield batch


def tokens_per_batch(model: LanguageModel) -> int:
    """How many tokens (with padding) to hold at once, from the free memory and the model's width."""
    if model.device.type != "cuda":
        return CPU_TOKENS
    config = model.model.config.get_text_config()
    inner = (
        getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None)
        or 4 * config.hidden_size
    )
    per_token = model.n_layers * (8 * config.hidden_size + 3 * inner) * model.model.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(model.device)
    return min(16384, max(1, int(0.5 * free / per_token)))


def _halving(model: LanguageModel, prompts: list) -> Iterator[tuple[range, object]]:
    """Run a batch; out of memory halves it and goes on."""
    stack = [range(len(prompts))]
    while stack:
        part = stack.pop()
        try:
            result = flow(model, [prompts[i] for i in part])
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            result = None
        if result is not None:
            yield part, result
            continue
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(part) == 1:
            raise AnchorsError(
                f"One prompt of {len(prompts[part[0]].ids)} tokens does not fit into memory.",
                "Use fewer --shots, --precision bfloat16, another --device or --device-map auto.",
            )
        middle = part.start + len(part) // 2
        log.warning("out of memory with %d prompts; going on with %d", len(part), middle - part.start)
        stack += [range(middle, part.stop), range(part.start, middle)]


def out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it; the CPU and MPS allocators only say so."""
    text = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "can't allocate memory" in text
        or "out of memory" in text
    )


def _rows(
    task: Task, work: dict[tuple[int, int], Drawn], units: list[tuple[int, int]], result
) -> pd.DataFrame:
    frames = []
    for i, (seed, number) in enumerate(units):
        drawn = work[seed, number]
        layers = list(range(result.sums.s_wp.shape[1]))
        records = [
            {"layer": layer, "metric": metric, "value": float(value)}
            for metric in SUMS
            for layer, value in zip(layers, getattr(result.sums, metric)[i], strict=True)
        ]
        whole = {
            "loss": result.loss[i],
            "gold": drawn.prompt.gold,
            "predicted": result.probabilities[i].argmax(),
            "tokens": len(drawn.prompt.ids),
            "identity_error": result.identity_error.max(),
        } | {f"probability/{label}": p for label, p in zip(task.labels, result.probabilities[i], strict=True)}
        records += [
            {"layer": None, "metric": metric, "value": float(value)} for metric, value in whole.items()
        ]
        frames.append(pd.DataFrame(records).assign(seed=seed, number=number, example=drawn.example))
    rows = pd.concat(frames, ignore_index=True).astype({"layer": "Int32"})
    return rows[["seed", "number", "example", "layer", "metric", "value"]]
