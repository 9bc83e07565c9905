"""The flow into the last token of any prompts: what a file asks for, measured, kept, with a page. See `anchors.analyses.targets`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from anchors.certificate.sight import hidden_labels
from anchors.check import demand
from anchors.errors import AnchorsError
from anchors.flow.aiming import aim_said, likeliest, likelihoods, spaced
from anchors.flow.metrics import target_sums
from anchors.flow.saliency import flow
from anchors.model.identity import software
from anchors.model.language import LanguageModel
from anchors.model.source import Source
from anchors.study.analysis import Described, Pass, Record
from anchors.study.engine import Lot, Progress, Stretch, Unit, carry_out, demand_same
from anchors.study.helpers import helpers
from anchors.study.plan import Outlook, foretold
from anchors.study.report import Found, Inquiry
from anchors.study.results import Run, key_of
from anchors.study.runner import batches, frame, unknown_code
from anchors.study.shelf import require_unread
from anchors.tasks.aims import Asked, aimed, of_text
from anchors.tasks.drawing import Drawn, within_context
from anchors.tasks.task import Chat
from anchors.viewer import render_page
from anchors.viewer.payload import payload, prompt_payload

SOURCES = 10
"""Tokens of each layer, those that give the target most, of which rows keep how much."""
TOLD = 5
"""Prompts on whose targets a note is written."""


@dataclass(frozen=True)
class Texts:
    """Prompts that need no label words.

    Attributes:
        name: of them in rows, tables and pictures.
        asked: each of them.
        source: the file that they came from.
        chat: through the model's own chat template, or None.
        batch_size: prompts per batch; None chooses by memory.
        skip_too_long: leave prompts out that exceed the model's context, instead of an error.
    """

    name: str
    asked: tuple[Asked, ...]
    source: str = ""
    chat: Chat | None = None
    batch_size: int | None = None
    skip_too_long: bool = False

    def prompts(self, model: LanguageModel) -> tuple[dict[Unit, Drawn], list[str]]:
        """The prompts that fit into the model's context, by seed (there is none: 0) and number; and notes on their targets.

        Raises:
            AnchorsError: see `anchors.tasks.aims.of_text`, `aimed` and `within_context`; with the place in the file.
        """
        drawn, notes = [], []
        for number, one in enumerate(self.asked):
            try:
                prompt, place = of_text(
                    one.text, model.tokenizer, self.chat, before=(one.target, one.against)
                )
                if self.skip_too_long and model.context is not None and len(prompt.ids) > model.context:
                    continue
                within_context([Drawn(number, prompt)], model.context)
                prompt = aimed(
                    prompt, place, model.tokenizer, one.target, one.against, likeliest=likeliest(model)
                )
            except AnchorsError as error:
                raise error.at(one.place) from error
            drawn.append(Drawn(number, prompt))
            if len(drawn) <= TOLD:
                told = aim_said(model, prompt.aim, likelihoods(model, prompt.ids)) if prompt.aim else ""
                notes += [
                    f"{one.place}: {said}"
                    for said in (told, *spaced(model, prompt, place, (one.target, one.against)))
                ]
        if not drawn:
            raise AnchorsError(
                "Every prompt is longer than the model's context.", "Shorten them.", code="length"
            )
        if len(drawn) < len(self.asked):
            notes.append(f"{len(self.asked) - len(drawn)} prompts longer than the context were left out.")
        return {(0, one.example): one for one in drawn}, notes


@dataclass(frozen=True)
class TextFlow(Inquiry):
    """The flow of prompts that need no label words.

    Attributes:
        model: that is asked.
        study: its settings, of which rows know kind and version.
        texts: the prompts.
    """

    model: LanguageModel
    study: Described
    texts: Texts

    @cached_property
    def known(self) -> tuple[dict[Unit, Drawn], list[str]]:
        """See `Texts.prompts`; asked once."""
        return self.texts.prompts(self.model)

    @cached_property
    def certified(self) -> float | None:
        """The arithmetic error of the shortest prompt, once the quick form of `anchors check` holds on all of them.

        Raises:
            CertificateError: it does not.
        """
        return demand(self.model, [one.prompt for one in self.known[0].values()])

    def stretch(self) -> Stretch:
        """The work of it."""
        model, texts, units = self.model, self.texts, self.known[0]
        config = {
            "kind": self.study.kind, "version": self.study.version, "model": dict(model.identity.parts), "software": software(),
            "precision": model.precision, "task": texts.name, "chat": None if texts.chat is None else asdict(texts.chat),
            "prompts": key_of({"asked": [[one.example, one.prompt.ids, one.prompt.aim.tokens] for one in units.values() if one.prompt.aim]}),
        }  # fmt: skip
        anew = None
        if (crew := helpers()) and crew.source:
            anew = partial(_lots_of, crew.source, self.study, texts)
        return Stretch(
            config,
            list(units),
            lambda _: [self.lot()],
            model.name,
            certify=lambda: self.certified,
            task=texts.name,
            anew=anew,
        )

    def lot(self) -> Lot:
        """All prompts: they share nothing."""
        units = self.known[0]

        def measured(_: None, part: Sequence[Unit]) -> pd.DataFrame:
            drawn = [units[unit] for unit in part]
            return frame(part, [one.example for one in drawn], list(_records(self.model, drawn)))

        def too_large(unit: Unit | None) -> AnchorsError:
            tokens = 0 if unit is None else len(units[unit].prompt.ids)  # nothing is shared
            return AnchorsError(
                f"One prompt of {tokens} tokens does not fit into memory.",
                "Shorten it, or use --precision bfloat16, another --device or --device-map auto.",
                code="memory",
            )

        return Lot(
            list(units),
            lambda: None,
            measured,
            too_large,
            lambda left: batches(self.model, self.study, units, list(left), self.texts.batch_size),
        )

    def measure(self, out: Path, progress: Progress) -> Found:
        """See `anchors.study.engine.carry_out`.

        Raises:
            AnchorsError: the file of prompts lies among the results under the name of one of them.
        """
        model, texts, work = self.model, self.texts, self.stretch()
        require_unread(out, {self.study.kind}, [texts.source])
        rows, (run,) = carry_out([work], out, progress)
        for name, value in {
            "control": "none",
            "shots": 0,
            "task": texts.name,
            "model": model.name,
        }.items():
            rows.insert(0, name, value)
        rows = rows.sort_values(["seed", "number"], kind="stable", ignore_index=True)
        part = work.config | {"data_source": texts.source, "examples": len(work.units)}
        facts = {
            "model": model.name, "revision": model.revision, "fingerprint": model.fingerprint, "precision": model.precision,
            "device": str(model.device), "parts": [part], "arithmetic_error": self.certified,
        }  # fmt: skip
        hidden = hidden_labels(model, [one.prompt for one in self.known[0].values()])
        notes = [model.beside_attention, hidden, *self.known[1], *run.notes, *unknown_code(model.identity)]
        return Found({self.study.kind: rows}, facts, [note for note in notes if note])

    def outlook(self, out: Path) -> list[Outlook]:
        """See `anchors.study.plan.foretold`."""
        units = self.known[0]
        return foretold(
            [self.stretch()],
            out,
            self.model,
            lambda unit: (own := Pass(len(units[unit].prompt.ids)), own._replace(backward=True)),
        )

    def pages(
        self, found: Found, facts: dict[str, Any], *, layers: Sequence[int] | None = None, pages: int = 0
    ) -> dict[str, str]:
        """The flow of the first prompts."""
        shown = [
            prompt_payload(
                self.model, None, one.prompt, self.texts.asked[one.example].place, layers or self.model.layers
            )
            for one in list(self.known[0].values())[:pages]
        ]
        made = payload(f"Information flow: {self.texts.name}", self.model, None, shown, facts)
        return {"": render_page(made)} if shown else {}


def _lots_of(source: Source, study: Described, texts: Texts, run: Run, device: str) -> list[Lot]:
    """The lots of a measurement, in another process."""
    own = TextFlow(source.on(device).load(), study, texts)
    demand_same(run, own.stretch().config)
    return [own.lot()]


def _records(model: LanguageModel, batch: Sequence[Drawn]) -> Iterator[list[Record]]:
    """Of each prompt: S_tq, S_ww, and who gives the target how much, by layer; its tokens and what it aims at.

    `first_token` is its share in all that flows into the target, `entropy` that of the shares of all tokens, in nats; `source/j` is
    I_l[q, j] of the strongest tokens, `token/j/text` the id of each.
    """
    prompts = [one.prompt for one in batch]
    result = flow(model, prompts)
    chances = [likelihoods(model, prompt.ids) for prompt in prompts]
    tq, ww = target_sums(result.into, result.total, torch.tensor([prompt.target for prompt in prompts]))
    for i, prompt in enumerate(prompts):
        assert prompt.aim is not None  # noqa: S101 - `Texts.prompts` gives them one
        words = dict(zip(("target", "against"), prompt.aim.tokens, strict=False))
        told = {
            "loss": result.loss[i],
            "probability": result.probabilities[i, 0],
            "predicted": chances[i].argmax(),
            "tokens": len(prompt.ids),
            "identity_error": result.identity_error.max(),
        } | {f"{name}/{model.tokenizer.decode([token])}": token for name, token in words.items()}
        found = [Record(metric, float(value)) for metric, value in told.items()]
        found += [
            Record(f"token/{j}/{model.tokenizer.decode([token])}", token)
            for j, token in enumerate(prompt.ids)
        ]
        for at, layer in enumerate(model.layers):
            row = result.into[i, at, : prompt.target]
            share = row / row.sum().clamp(min=torch.finfo(row.dtype).tiny)
            by_layer = {
                "s_tq": tq[i, at],
                "s_ww": ww[i, at],
                "first_token": share[0],
                "entropy": torch.special.entr(share).sum(),
            }
            by_layer |= {f"source/{j}": row[j] for j in row.topk(min(SOURCES, len(row))).indices.tolist()}
            found += [Record(metric, float(value), layer=layer) for metric, value in by_layer.items()]
        yield found
