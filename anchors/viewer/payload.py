"""What the page shows of a few prompts, as plain data."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from anchors.errors import AnchorsError
from anchors.flow.aiming import aim_said, likelihoods
from anchors.flow.metrics import target_sums
from anchors.flow.saliency import flow
from anchors.model.language import LanguageModel
from anchors.places import titled
from anchors.stats import REST, SUMS, flow_summary
from anchors.study.results import provenance
from anchors.tasks.prompts import Loss, Prompt
from anchors.viewer.page import KEEP, Page, edges, flows, into_target, render_page


@runtime_checkable
class Named(Protocol):
    """As much of a task as the page shows."""

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]: ...


def shown_tokens(model: LanguageModel, prompt: Prompt) -> list[str]:
    """Each token as the piece of the prompt's text it stands for."""
    # By itself a prompt may have other tokens at its end than before its label: line breaks, mostly.
    alone = model.tokenizer(prompt.text, return_offsets_mapping=True)["offset_mapping"]
    spans = prompt.spans or alone[: len(prompt.ids)]
    # A character cut over several tokens belongs to the first of them; the others show their own bytes. A space that
    # belongs to no token goes with the one after it.
    tokens, end = [], 0
    for token, (_, b) in zip(prompt.ids, spans, strict=True):
        tokens.append(prompt.text[end:b] or model.tokenizer.decode([token]))
        end = max(end, b)
    tokens[-1] += prompt.text[end:]
    return tokens


LIKELY = 5
"""Next tokens that are shown with their probabilities, besides those that the prompt aims at."""


def prompt_payload(
    model: LanguageModel,
    task: Named | None,
    prompt: Prompt,
    name: str,
    layers: Sequence[int],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """One prompt: tokens, roles, the strongest edges of I_l by layer, the three sums, the label probabilities.

    `edges` are of every flow the `keep` strongest, and as many from the first token; `first` is all that leaves it.

    `classes` holds a class at the label-word positions p_k and nowhere else: these are what S_wp and S_pq are sums over.
    `s_pq_rest` is what S_pq leaves out, see `anchors.flow.metrics.left_out`.

    A prompt without a right answer is differentiated against the model's own prediction, and says so; one with an aim against
    that. One without label words (no `task`) has the sums S_tq and S_ww, and likely next tokens in place of label words.
    """
    notes = [*notes, *([model.beside_attention] if model.beside_attention else [])]
    prompt_run, aim = prompt, prompt.aim
    if aim is not None:
        chances = likelihoods(model, prompt.ids)
        notes.append(aim_said(model, aim, chances))
        answers = _likely(model, aim, chances)
        if task is not None:
            answers = _shown(task.labels, chances[list(prompt.label_ids)].softmax(-1))
    elif task is None:
        raise AnchorsError(
            "A prompt without label words needs something to aim at.",
            "Make it with anchors.tasks.aims.aimed.",
            code="prompt",
        )
    elif prompt.gold is None:
        guess = int(flow(model, [replace(prompt, gold=0)]).probabilities[0].argmax())
        prompt_run = replace(prompt, gold=guess)
        notes.append(
            f"No right answer was given: the loss is that of the model's own prediction, {task.labels[guess]}."
        )
    result = flow(model, [prompt_run], maps=layers)
    classes: list[int | None] = [None] * len(prompt.ids)
    for position, label in zip(prompt.label_positions, prompt.label_classes, strict=True):
        classes[position] = label
    target = prompt.roles.index("target")
    groups = flows(classes, target) if task else into_target(target)
    if aim is None and task is not None:
        answers = _shown(task.labels, result.probabilities[0])
    if task is None:
        tq, ww = target_sums(result.into, result.total, torch.tensor([target]))
        sums = {"s_tq": tq, "s_ww": ww}
    else:
        sums = {REST: result.rest, **vars(result.sums)}

    def by_layer(values: Any) -> list[float | None]:
        """Of every layer; None where there is no attention."""
        own = dict(zip(model.layers, map(float, values), strict=True))
        return [own.get(layer) for layer in range(model.n_layers)]

    own_maps = [result.maps[layer][0].numpy()[: target + 1, : target + 1] for layer in layers]
    return {
        "name": name,
        "tokens": shown_tokens(model, prompt),
        "roles": list(prompt.roles),
        "classes": classes,
        "gold": prompt.gold,
        "layers": list(layers),
        "keep": KEEP,
        "edges": [edges(own, groups=groups) for own in own_maps],
        "first": [float(own[1:, 0].sum(dtype=np.float64)) for own in own_maps],
        "notes": notes,
        **answers,
        **({} if task else {"begins": 0, "pairs": {"tq": target, "ww": target * (target - 1) // 2}}),
    } | {name: by_layer(values[0]) for name, values in sums.items()}


def _shown(labels: Sequence[str], chances: Float[Tensor, " labels"]) -> dict[str, Any]:
    """What may come after the target, with its probabilities."""
    return {
        "labels": list(labels),
        "predicted": int(chances.argmax()),
        "probabilities": [float(p) for p in chances],
    }


def _likely(model: LanguageModel, aim: Loss, chances: Float[Tensor, " vocabulary"]) -> dict[str, Any]:
    """The likeliest next tokens and those that are aimed at, the likeliest first."""
    tokens = {*chances.topk(min(LIKELY, len(chances))).indices.tolist(), *aim.tokens}
    order = sorted(tokens, key=lambda token: (-float(chances[token]), token))
    words = [str(model.tokenizer.decode([token])) for token in order]
    return _shown(words, chances[order].exp()) | {"aims": [order.index(token) for token in aim.tokens]}


def curves_payload(rows: pd.DataFrame) -> dict[str, Any] | None:
    """The shares of the three sums by layer over all examples of one task, with their intervals, and of what S_pq leaves
    out; missing where a sum is not defined."""
    summary = flow_summary(rows)
    if not np.isfinite(summary[["share_low", "share_high"]]).all(axis=None):
        return None
    by_metric = dict(list(summary.groupby("metric")))

    def shown(name: str) -> dict[str, list[float | None]]:
        own = by_metric[name]
        defined = own["note"] == ""
        return {
            part: [float(x) if there else None for x, there in zip(own[column], defined, strict=True)]
            for part, column in (("mean", "share"), ("low", "share_low"), ("high", "share_high"))
        }

    return {
        "layers": by_metric["s_wp"]["layer"].astype(int).tolist(),
        "examples": int(summary["examples"].iloc[0]),
    } | {name: shown(name) for name in (*SUMS, REST) if name in by_metric}


def payload(
    title: str,
    model: LanguageModel,
    task: Named | None,
    prompts: list[dict[str, Any]],
    facts: dict[str, Any],
    curves: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole page's data; without a task that of prompts without label words."""
    flat = {k: v for k, v in facts.items() if isinstance(v, str | int | float)}
    flat |= {f"version of {k}": v for k, v in facts.get("versions", {}).items()}
    return {
        "title": title,
        "model": titled(model.name),
        "task": "" if task is None else getattr(task, "called", task.name),
        "command": facts.get("command"),
        "provenance": flat,
        "curves": curves,
        "prompts": prompts,
    } | ({} if task else {"kinds": ["tq", "ww"]})


def page(
    model: LanguageModel,
    task: Named | None,
    prompts: Sequence[Prompt],
    layers: Sequence[int] | None = None,
) -> Page:
    """The page of some prompts: tokens by role, flow by layer, label probabilities. A notebook shows it where a cell ends in it.

    Args:
        model: of `anchors.load`.
        task: whose prompts they are; None where they have no label words (`anchors.tasks.aims`).
        prompts: of `anchors.draw`, or of `anchors.tasks.prompts.from_text` for a text of your own.
        layers: that are shown; all by default.

    Returns:
        The HTML, as a string: `Path("page.html").write_text(page, encoding="utf-8")`.

    Example:
        >>> drawn = anchors.draw(task, data, model.tokenizer, anchors.Draw(seed=42), 2)
        >>> anchors.page(model, task, [one.prompt for one in drawn])
    """
    every = model.layers if layers is None else layers
    shown = [prompt_payload(model, task, one, f"prompt {n}", every) for n, one in enumerate(prompts, 1)]
    facts = provenance(
        model=model.name, fingerprint=model.fingerprint, precision=model.precision, device=str(model.device)
    )
    return render_page(payload("Information flow", model, task, shown, facts))
