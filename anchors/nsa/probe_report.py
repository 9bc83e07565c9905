"""A probe's rows, tables, figure and page, written with their provenance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from anchors.attention.call import AttentionCall
from anchors.attention.seam import seam
from anchors.check import check, failed
from anchors.errors import AnchorsError, CertificateError, brief, parsed
from anchors.models import LanguageModel
from anchors.nsa import probe_metrics as metrics
from anchors.nsa.call import NSACall
from anchors.nsa.episodes import Episodes
from anchors.nsa.geometry import Geometry
from anchors.nsa.probe import KIND, Probe, geometry_of, measure, vocabulary_of
from anchors.nsa.probe_identity import identity_table
from anchors.report import Report, drawn
from anchors.results import provenance
from anchors.shelf import Shelf
from anchors.summaries import SUMMARIES
from anchors.tasks.prompts import Prompt

TRAINING = Path("training") / "run.json"
"""Where a training's folder says what it was trained on."""


def episodes_of(model: LanguageModel, folder: Path, **options: Any) -> Episodes:
    """The episodes a model was trained on, with some things changed.

    Args:
        model: loaded from `folder`.
        folder: of its training; where it does not say, the defaults of `Episodes` are taken.
        options: fields of `Episodes` that differ; None leaves one as it is.

    Raises:
        AnchorsError: the model was trained on something else, or the sizes do not fit.
    """
    known: dict[str, Any] = {}
    if (folder / TRAINING).is_file():
        try:
            facts = parsed((folder / TRAINING).read_text(encoding="utf-8"))["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AnchorsError(
                f"{str(folder / TRAINING)!r} does not describe a training: {brief(error)}.",
                "Take the folder of a finished `anchors nsa train`, or delete that file: defaults are taken then.",
            ) from error
        if facts.get("data") != "episodes":
            raise AnchorsError(
                f"{model.name} was trained on {facts.get('data')}, not on episodes.",
                "Label words are looked for in episodes only.",
            )
        names = set(Episodes.__dataclass_fields__) - {"vocabulary"}
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k in names}
    elif model.context is not None:
        known = {"tokens": min(Episodes.tokens, model.context)}
    known |= {name: value for name, value in options.items() if value is not None}
    if model.context is not None and known.get("tokens", Episodes.tokens) > model.context:
        raise AnchorsError(
            f"Episodes of {known.get('tokens', Episodes.tokens)} tokens do not fit into the context of {model.name}, "
            f"{model.context} tokens.",
            f"Take --tokens {model.context} at most.",
        )
    return Episodes(**known, vocabulary=vocabulary_of(model))


def report(
    model: LanguageModel,
    probe: Probe,
    *,
    out: Path,
    pages: int = 0,
    csv: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Certify the model, probe it, and write rows, tables, figure and page under `out`.

    Args:
        model: NSA, or its twin with full attention.
        probe: what is probed.
        out: folder of the results.
        pages: prompts on the HTML page.
        csv: write the rows as CSV, too.
        progress: called with (prompts done, prompts in all).

    Raises:
        CertificateError: the quick form of `anchors check` failed on this model.
        AnchorsError: see `anchors.nsa.probe.measure`.
    """
    geometry = geometry_of(model)
    first = probe.prompt(0)
    if wrong := failed(check(model, [first], [], quick=True)):
        raise CertificateError(
            f"{model.name} failed: {wrong[0].name}: {wrong[0].detail}", "See `anchors check`."
        )
    found = measure(model, probe, out=out, progress=progress)
    part = found.config | {"seeds": [probe.seed], "examples": probe.prompts}
    facts = provenance(
        model=model.name,
        revision=model.revision,
        fingerprint=model.fingerprint,
        precision=model.precision,
        device=str(model.device),
        geometry=None if geometry is None else vars(geometry),
        parts=[part],
        notes=found.notes,
    )
    tables = SUMMARIES[KIND](found.rows)
    identity = identity_table(found.vectors)
    if len(identity):
        tables["identity"] = identity
    shelf = Shelf(out, KIND)
    shelf.table(KIND, found.rows, csv=csv)
    for key, table in tables.items():
        shelf.table(f"{KIND}_{key}", table)
    shelf.figure(KIND, drawn(KIND, tables, model.name))
    if pages:
        shelf.page(KIND, _page(model, probe, geometry, pages, facts))
    files, moved = shelf.write(facts)
    return Report(tables, files, found.notes + moved, facts)


@dataclass
class Chosen:
    """A probe that keeps I_q of every layer."""

    layers: frozenset[int]
    target: int
    found: dict[int, Int[Tensor, "groups n"]] = field(default_factory=dict)

    def see(self, call: AttentionCall) -> None:
        if isinstance(call, NSACall):
            self.found[call.layer] = call.idx[0, self.target].cpu()


@dataclass(frozen=True)
class EpisodeTask:
    """As much of a task as the page asks for: an episode's own label words."""

    labels: tuple[str, ...]
    name: str = "episodes"


def blocks_payload(
    model: LanguageModel, prompt: Prompt, geometry: Geometry, layers: Sequence[int]
) -> dict[str, Any]:
    """The blocks that the last position reads, for the page: size, count, the forced ones, and those chosen by layer and
    group."""
    probe = Chosen(frozenset(range(model.n_layers)), prompt.target)
    ids = torch.tensor([prompt.ids], device=model.device)
    with torch.no_grad(), seam(model.modules, probes=[probe]):
        model.logits_at(ids, torch.tensor([prompt.target], device=model.device))
    tokens = len(prompt.ids)
    candidate = metrics.candidates(prompt.target, tokens, geometry)
    return {
        "size": geometry.lp,
        "count": geometry.blocks(tokens),
        "forced": np.flatnonzero(~candidate).tolist(),
        "chosen": [[[j for j in own.tolist() if j >= 0] for own in probe.found[layer]] for layer in layers],
    }


def _page(
    model: LanguageModel,
    probe: Probe,
    geometry: Geometry | None,
    pages: int,
    facts: dict[str, Any],
) -> str:
    from anchors.viewer import render_page
    from anchors.viewer.payload import payload, prompt_payload

    layers, shown = range(model.n_layers), []
    for number in range(min(pages, probe.prompts)):
        prompt = probe.prompt(number)
        task = EpisodeTask(tuple(model.tokenizer.convert_ids_to_tokens(list(prompt.label_ids))))
        made = prompt_payload(model, task, prompt, f"episode {number}", layers)
        if geometry is not None:
            made["blocks"] = blocks_payload(model, prompt, geometry, layers)
        shown.append(made)
    return render_page(payload("Blocks and information flow", model, task, shown, facts))
