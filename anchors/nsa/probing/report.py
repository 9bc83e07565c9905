"""A probe's rows, tables, figure and page, written with their provenance."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from anchors.attention.form import Call
from anchors.attention.seam import seam
from anchors.check import demand
from anchors.errors import AnchorsError, parsed
from anchors.model.language import LanguageModel
from anchors.nsa.call import NSACall
from anchors.nsa.geometry import Geometry
from anchors.nsa.probing import metrics
from anchors.nsa.probing.identity import identity_table
from anchors.nsa.probing.interventions import conditions
from anchors.nsa.probing.probe import KIND, EpisodeProbe, geometry_of, measure, stretch, vocabulary_of
from anchors.nsa.probing.taps import Places
from anchors.nsa.training.episodes import Episodes
from anchors.study.analysis import Pass
from anchors.study.engine import Progress, Unit
from anchors.study.plan import Outlook, foretold
from anchors.study.report import Found, Inquiry, Report, conclude
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
                f"{str(folder / TRAINING)!r} cannot be read: {error}", code="file-unreadable"
            ) from error
        if facts.get("data") != "episodes":
            raise AnchorsError(
                f"{model.name} was trained on {facts.get('data')}, not on episodes.",
                "Label words are looked for in episodes only.",
                code="model-kind",
            )
        names = set(Episodes.__dataclass_fields__) - {"vocabulary"}
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k in names}
    elif model.context is not None:
        known = {"tokens": min(Episodes.tokens, model.context)}
    known |= {name: value for name, value in options.items() if value is not None}
    longest = known.get("tokens", Episodes.tokens)
    if model.context is not None and longest > model.context:
        raise AnchorsError(
            f"Episodes of {longest} tokens do not fit into the {model.context} positions of {model.name}.",
            f"Take --tokens {model.context} or fewer.",
            code="length",
        )
    return Episodes(**known, vocabulary=vocabulary_of(model))


@dataclass(frozen=True)
class Probing(Inquiry):
    """A probe of a model.

    Attributes:
        model: NSA, or its twin with full attention.
        probe: what is probed.
    """

    model: LanguageModel
    probe: EpisodeProbe

    @cached_property
    def certified(self) -> bool:
        """Whether the quick form of `anchors check` holds on all prompts; asked once.

        Raises:
            CertificateError: it does not.
        """
        demand(self.model, [self.probe.prompt(number) for number in range(self.probe.prompts)])
        return True

    def measure(self, out: Path, progress: Progress) -> Found:
        """See `anchors.nsa.probing.probe.measure`."""
        model, probe = self.model, self.probe
        geometry = geometry_of(model)
        found = measure(model, probe, out=out, progress=progress, certify=lambda: self.certified)
        facts = {
            "model": model.name, "revision": model.revision, "fingerprint": model.fingerprint, "precision": model.precision,
            "device": str(model.device), "geometry": None if geometry is None else vars(geometry),
            "parts": [found.config | {"seeds": [probe.seed], "examples": probe.prompts}],
        }  # fmt: skip
        identity = identity_table(found.vectors)
        more = {"identity": identity} if len(identity) else {}
        return Found({KIND: found.rows, **more}, facts, found.notes)

    def outlook(self, out: Path) -> list[Outlook]:
        """See `anchors.study.plan.foretold`."""
        own = stretch(self.model, self.probe, [])
        changed = 0
        if self.probe.interventions:
            first, geometry = self.probe.prompt(0), geometry_of(self.model)
            places, layers = Places.of(first, np.random.default_rng(0)), range(self.model.n_layers)
            changed = 1 + len(conditions(frozenset(layers), places, len(first.ids), geometry))

        def passes(unit: Unit) -> Sequence[Pass]:
            whole = Pass(len(self.probe.prompt(unit[1]).ids))
            return whole._replace(backward=True), whole._replace(times=changed)

        return foretold([own], out, self.model, passes)

    def pages(
        self, found: Found, facts: dict[str, Any], *, layers: Sequence[int] | None = None, pages: int = 0
    ) -> dict[str, str]:
        """Blocks and flow of some prompts."""
        if not pages or not self.certified:
            return {}
        return {"": _page(self.model, self.probe, geometry_of(self.model), pages, facts)}


def report(model: LanguageModel, probe: EpisodeProbe, **how: Any) -> Report:
    """Certify the model, probe it, and write rows, tables, figure and page: see `anchors.study.report.conclude`.

    Args:
        model, probe: as in `Probing`.
        how: what `conclude` takes, `out` among it; `pages` is the number of prompts on the HTML page.

    Raises:
        CertificateError: the quick form of `anchors check` failed on this model.
        AnchorsError: see `anchors.nsa.probing.probe.measure`.
    """
    return conclude(Probing(model, probe), **how)


@dataclass
class Chosen:
    """A probe that keeps I_q of every layer."""

    layers: frozenset[int]
    target: int
    found: dict[int, Int[Tensor, "groups n"]] = field(default_factory=dict)

    def see(self, call: Call) -> None:
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
    probe: EpisodeProbe,
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
