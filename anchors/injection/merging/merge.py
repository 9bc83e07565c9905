"""Injection from disk to disk: a vision-language model whose language tower has an expert's skill.

    report = merge("llava", "math-expert", "llama", Recipe("task-arithmetic", strength=0.5), "out")

One tensor at a time is read from the three models, merged in float32 (`merge_tensor`), cast to the type that the
vision-language model has on disk, and written; memory is that of a few tensors, whatever the size of models and shards.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from anchors.errors import AnchorsError
from anchors.injection.merging.base import differing, require_base
from anchors.injection.merging.checkpoint import Checkpoint
from anchors.injection.merging.draft import Draft, Layout, finished
from anchors.injection.merging.recipe import Recipe, merge_tensor
from anchors.injection.merging.sources import Source, Sources, by_rows
from anchors.places import require_inside
from anchors.study.results import provenance

Report = Callable[[int, int, str], None]
"""Told (tensors done, tensors, name of the last one)."""

_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates", "LICENSE*", "NOTICE*")
_PIECE = 2**18
_OWN = ("*.index.json", "injection.json")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: the model.
        recipe: how it was made.
        tensors: one row per tensor of the model: name, module (attention, mlp, norm, embedding, head of the tower; or
            the name of a module outside), layer, tower (whether it belongs there), changed (whether any bit did),
            change ‖m − v‖ and norm ‖v‖ (both NaN outside the tower).
        seconds: what it took; of a merge that was broken off, the last part.
        memory: highest anonymous memory of this process meanwhile, in bytes (sampled; None where the system does
            not tell).
        notes: what a reader must know: configurations that differ, code that was not copied, shards found, a draft
            thrown away, a merge that was done already.
    """

    out: Path
    recipe: Recipe
    tensors: pd.DataFrame
    seconds: float
    memory: int | None
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> int:
        """Tensors of which a bit changed."""
        return int(self.tensors["changed"].sum())

    @property
    def kept(self) -> int:
        """Tensors that are the vision-language model's, bit for bit."""
        return len(self.tensors) - self.changed

    @property
    def relative(self) -> float:
        """‖m − v‖ / ‖v‖ over the tensors of the tower."""
        return float(_relative(self.tensors))

    def by_module(self) -> pd.DataFrame:
        """Per module: tensors, changed, kept, change, relative = change / norm; the tower first."""
        return _summed(self.tensors, "module")

    def by_layer(self) -> pd.DataFrame:
        """The same per layer of the tower."""
        return _summed(self.tensors[self.tensors["layer"].notna()].astype({"layer": int}), "layer")


def merge(
    vlm: Source,
    expert: Source,
    base: Source | None,
    recipe: Recipe | None = None,
    out: str | Path = "injected",
    *,
    shard_size: str = "1GB",
    force: bool = False,
    report: Report | None = None,
) -> MergeReport:
    """Write a vision-language model into whose language tower an expert is merged.

    Names, shapes and types on disk are the vision-language model's; so are its configuration, processor, tokenizer and
    chat template. `injection.json` says what the model was made from. OUT appears in one step, when all is written and
    checked; until then finished shards lie in a hidden folder beside it, and the same call goes on from there. A call
    whose result is there already reports it and does nothing.

    Args:
        vlm: the vision-language model: directory, hub id, or an open `Checkpoint`.
        expert: the language model with the skill, or a LoRA folder of peft (`open_expert`).
        base: the language model that both were made from; None is the one that an adapter was trained on.
        recipe: method, strengths, layers, embeddings; task arithmetic at strength 1 by default.
        out: folder to be; must not be there, or be empty.
        shard_size: largest file of weights, e.g. 500MB; memory does not depend on it.
        force: merge also with a base that tower and expert seem not to come from.
        report: told of every tensor.

    Raises:
        AnchorsError: a model cannot be read, or does not fit, or is no kin (`require_base`); `out` is something else,
            or a merge that is no longer whole; the disk is full; a merged number is not finite; nothing in the tower
            changed although it should. `out` is untouched then.
    """
    recipe, out, began = recipe or Recipe(), Path(out), time.perf_counter()
    sources = Sources.open(vlm, expert, base, recipe.embeddings)
    recipe.require_depth(sources.n_layers)
    layout = Layout.of(sources.vlm.entries, shard_size)
    if not force:
        require_base(sources)
    notes = differing(sources) + _own_code(sources.vlm) + sources.expert.notes
    companions = _companions(sources.vlm.folder)
    identity = {
        "recipe": recipe.as_dict(),
        "models": sources.facts(),
        "written": {role: model.stamp() for role, model in sources.roles().items()},
        "shard_size": shard_size,
        "version": version("label-anchors"),
    }
    if (before := finished(out, identity, sources.vlm.entries)) is not None:
        notes += ("Nothing left to compute: it was there already, from the same models and recipe.",)
        return MergeReport(
            out, recipe, pd.DataFrame(before["tensors"]), before["seconds"], before["memory"], notes
        )
    total = len(sources.vlm.entries)
    with anonymous_peak() as peak, Draft.open(out, identity, layout.total) as draft:
        done = sum(len(facts) for facts in draft.finished.values())

        def made(name: str) -> tuple[Tensor, dict[str, Any]]:
            nonlocal done
            result = _made(sources, recipe, name)
            done += 1
            if report is not None:
                report(done, total, name)
            return result

        if report is not None:
            report(done, total, "")
        for file, entries in layout.shards.items():
            draft.write(file, entries, made)
        _require_unchanged(sources, identity["written"], draft)
        rows = [fact for file in layout.shards for fact in draft.finished[file]]
        if wants_change(recipe) and not any(row["changed"] for row in rows):
            draft.discard()
            raise AnchorsError(
                f"{recipe.label()} changed nothing in the language tower: expert and base are the same there, or "
                "their difference is lost in rounding.",
                "See what --inspect says; give another expert, or a larger --strength.",
                code="without-effect",
            )
        seconds, memory = time.perf_counter() - began, peak()
        facts = provenance(
            identity=identity,
            models={
                role: {"name": model.name, "commit": model.commit} for role, model in sources.roles().items()
            },
            recipe=recipe.label(),
            seconds=round(seconds, 3),
            memory=memory,
            tensors=rows,
        )
        draft.publish(layout, facts, companions)
    return MergeReport(out, recipe, pd.DataFrame(rows), seconds, memory, notes + draft.notes)


def wants_change(recipe: Recipe) -> bool:
    """Whether a recipe is meant to change anything at all."""
    return recipe.vlm_strength != 1 or any(recipe.per_layer or (recipe.strength,))


def _made(sources: Sources, recipe: Recipe, name: str) -> tuple[Tensor, dict[str, Any]]:
    """A tensor of the result and the facts about it."""
    v = sources.vlm.tensor(name)
    within = sources.vlm.apart.stacks.get(name, (name,))
    pair, _ = sources.pairs.get(within[0], (None, None))
    fact = {
        "name": name,
        "module": sources.part(name),
        "layer": pair and pair.layer,
        "tower": pair is not None,
        "changed": False,
        "change": None,
        "norm": None,
    }
    if pair is None:
        return v, fact
    m = v
    if name in sources.pairs:
        m = _merged(sources, recipe, name)
    elif recipe.strength_of(pair.layer) is not None:
        m = torch.empty_like(v)
        for own in within:
            sources.vlm.apart.slices[own].of(m).copy_(_merged(sources, recipe, own))
    fact |= _compared(name, m, v)
    return m, fact


def _merged(sources: Sources, recipe: Recipe, name: str) -> Tensor:
    """One tensor of the tower as the recipe has it."""
    pair, _ = sources.pairs[name]
    b, v, e = sources.weights(name)
    merged = partial(merge_tensor, recipe, pair.canonical, layer=pair.layer, dtype=v.dtype)
    if not by_rows(pair):
        return merged(b, v, e)
    return v if sources.rows is None else sources.rows.merge(b, v, e, merged)


def _compared(name: str, m: Tensor, v: Tensor) -> dict[str, Any]:
    """Whether a tensor changed, ‖m − v‖ and ‖v‖.

    Raises:
        AnchorsError: a number of it is too large for its type, or for a norm.
    """
    changed, change, norm = False, 0.0, 0.0
    # In pieces that stay in the processor's cache: this costs as much as the merge otherwise.
    for new, old in zip(m.reshape(-1).split(_PIECE), v.reshape(-1).split(_PIECE), strict=True):
        wide = old.to(torch.float32, copy=True)
        norm += float(torch.linalg.vector_norm(wide)) ** 2
        if m is v:
            continue
        changed = changed or not torch.equal(new, old)
        change += float(torch.linalg.vector_norm(wide.sub_(new))) ** 2
        if not math.isfinite(change) and not torch.isfinite(new).all():
            count = int((~torch.isfinite(m)).sum())
            raise AnchorsError(
                f"{count} merged numbers of {name} are too large for {v.dtype}.",
                "Lower --strength.",
                code="not-finite",
            )
    if not math.isfinite(change) or not math.isfinite(norm):
        largest = max(float(t.abs().max()) for t in (m, v))
        raise AnchorsError(
            f"{name} holds numbers up to {largest:.1e}: how far it changes is beyond float32, and so would be what it computes.",
            "One of the models is damaged, or --strength too large.",
            code="not-finite",
        )
    return {"changed": changed, "change": change**0.5, "norm": norm**0.5}


def _companions(folder: Path) -> list[Path]:
    """What goes with the weights of a model, no code among it.

    Raises:
        AnchorsError: one is a link out of the model's folder.
    """
    found = {path for pattern in _COMPANIONS for path in folder.glob(pattern)}
    chosen = sorted(found - {path for pattern in _OWN for path in folder.glob(pattern)})
    require_inside(folder, chosen)
    return chosen


def _own_code(vlm: Checkpoint) -> tuple[str, ...]:
    """A note where a model is read by code of its own, which is never copied."""
    named = vlm.config.get("auto_map")
    files = (
        {str(place).split("--")[-1].split(".")[0] + ".py" for place in named.values()}
        if isinstance(named, Mapping)
        else ()
    )
    if not files:
        return ()
    return (
        f"{vlm.name!r} is read by code of its own ({', '.join(sorted(files))}), which is not copied: put it beside the "
        "merged model if you trust it.",
    )


def _require_unchanged(sources: Sources, written: dict[str, Any], draft: Draft) -> None:
    """Refuse a result whose models were written again while it was made, and throw it away."""
    for role, model in sources.roles().items():
        try:
            now = model.stamp()
        except OSError:
            now = None
        if json.loads(json.dumps(now)) != json.loads(json.dumps(written[role])):
            draft.discard()
            raise AnchorsError(
                f"{model.name!r} was written again while it was merged: the result would be a mixture, and is thrown away.",
                "Run the same command again once nothing writes there.",
                code="busy",
            )


def _relative(tensors: pd.DataFrame) -> float:
    tower = tensors[tensors["tower"]]
    return (tower["change"].pow(2).sum() / tower["norm"].pow(2).sum()) ** 0.5


def _summed(tensors: pd.DataFrame, column: str) -> pd.DataFrame:
    rows = []
    for value, own in tensors.groupby(column, sort=column == "layer"):
        change = float(own["change"].astype(float).pow(2).sum(min_count=1) ** 0.5)
        rows.append(
            {
                column: value,
                "tower": bool(own["tower"].all()),
                "tensors": len(own),
                "changed": int(own["changed"].sum()),
                "kept": int((~own["changed"]).sum()),
                "change": change,
                "relative": float(_relative(own)) if own["tower"].all() else float("nan"),
            }
        )
    table = pd.DataFrame(rows)
    return table.sort_values("tower", ascending=False, kind="stable", ignore_index=True)


@contextmanager
def anonymous_peak(every: float = 0.05) -> Generator[Callable[[], int | None]]:
    """Sample this process's anonymous memory; what is yielded gives the highest so far, in bytes (Linux, else None)."""
    first = _anonymous()
    if first is None:
        yield lambda: None
        return
    stop, seen = threading.Event(), [first]

    def watch() -> None:
        while not stop.wait(every):
            seen[0] = max(seen[0], _anonymous() or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: seen[0]
    finally:
        stop.set()
        watcher.join()


def _anonymous() -> int | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), None)
    return None if line is None else int(line.split()[1]) * 1024
