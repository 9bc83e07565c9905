"""What happens to the answer when label words are kept from the last position, or pressed on it.

    ban-label        q may not choose the candidate blocks that hold label words (the initial and local ones stay)
    ban-answer       … that hold label words of the right class
    ban-*-control    … as many of the nearest other candidates instead
    force-*          the same blocks are chosen first; n of them at most
    cut-c-label      the gate of branch c is 0 at label words; cut-c-last at q; cut-c-control at words of the texts
    isolate-label    q sees no label word in any branch; isolate-answer none of the right class; isolate-control as many
                     words of the same demonstrations' texts. Of a compressed token that covers one nothing is seen.

All in every layer at once. Where every candidate holds a label word there are no others to compare with, and a control
is left out.
"""

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anchors.attention import edits
from anchors.attention.edits import Edit
from anchors.attention.seam import seam
from anchors.context import encode
from anchors.model.language import LanguageModel
from anchors.nsa.attention import BRANCHES
from anchors.nsa.call import Intervention, NSACall
from anchors.nsa.geometry import Geometry
from anchors.nsa.probing import metrics
from anchors.nsa.probing.taps import WHICH, Measure, Places
from anchors.tasks.prompts import Prompt


def targets(
    places: Places, tokens: int, geometry: Geometry
) -> dict[str, tuple[Int[np.ndarray, " blocks"], Int[np.ndarray, " blocks"] | None]]:
    """By name of `WHICH`: the candidate blocks with label words, and as many near ones without; None where too few."""
    candidate = metrics.candidates(places.target, tokens, geometry)
    found = {}
    for which in WHICH:
        weight = places.weights(which, geometry.lp, len(candidate))
        anchors = np.flatnonzero(candidate & (weight > 0))
        others = np.flatnonzero(candidate & (weight == 0))
        if len(anchors):
            found[which] = anchors, metrics.matched(anchors, others)
    return found


def conditions(
    layers: frozenset[int], places: Places, tokens: int, geometry: Geometry | None
) -> dict[str, list[Edit]]:
    """Every intervention of a prompt by name; only `isolate-*` for a model without blocks (`geometry` None)."""
    found: dict[str, list[Edit]] = {}
    for name, (ban, force) in block_changes(places, tokens, geometry).items() if geometry else ():
        edit = Intervention(layers, ban=ban, force=force, name=name, neutral=True)
        found[name] = [edit]
    where = {"label": places.labels, "control": places.controls, "last": np.array([places.target])}
    for c, branch in enumerate(BRANCHES if geometry else ()):
        for name, positions in where.items():
            gates = _gate_field(c, positions)
            found[f"cut-{branch}-{name}"] = [Intervention(layers, gates=gates, name=f"cut-{branch}-{name}")]
    for name, positions in (
        ("label", places.labels),
        ("answer", places.answers),
        ("control", places.controls),
    ):
        if len(positions):
            keys = torch.as_tensor(positions)[None]
            query = torch.full_like(keys, places.target)
            found[f"isolate-{name}"] = [edits.ban(layers, query, keys, f"isolate-{name}")]
    return found


def block_changes(places: Places, tokens: int, geometry: Geometry) -> dict[str, tuple]:
    """By name: what to ban and what to force, one of them None."""
    found: dict[str, tuple] = {}
    for which, (anchors, others) in targets(places, tokens, geometry).items():
        for suffix, blocks in (("", anchors), ("-control", others)):
            if blocks is not None:
                field = _block_field(places.target, blocks)
                found[f"ban-{which}{suffix}"] = (field, None)
                found[f"force-{which}{suffix}"] = (None, field)
    return found


def _block_field(target: int, blocks: Int[np.ndarray, " blocks"]):
    def field(call: NSACall) -> Bool[Tensor, "1 query 1 blocks"]:
        count = call.sparse.geometry.blocks(call.k.shape[2])
        mask = torch.zeros(1, call.q.shape[2], 1, count, dtype=torch.bool, device=call.q.device)
        mask[0, target - call.past, 0, torch.as_tensor(blocks)] = True
        return mask

    return field


def _gate_field(branch: int, positions: Int[np.ndarray, " positions"]):
    def field(call: NSACall) -> Float[Tensor, "1 query 1 3"]:
        factor = torch.ones(1, call.q.shape[2], 1, 3, device=call.q.device)
        factor[0, torch.as_tensor(positions) - call.past, 0, branch] = 0
        return factor

    return field


def outcome(logits: Float[Tensor, " vocabulary"], prompt: Prompt) -> dict[str, float]:
    """The answer, over the label words' logits.

    Returns:
        accuracy: whether the right label is first.
        probability: of the right label.
        margin: its logit less the largest other one.
        logit: its logit less the mean of all label words'.
    """
    over_labels = logits.cpu().double()[list(prompt.label_ids)]
    right = cast(int, prompt.gold)
    gold = over_labels[right]
    others = torch.cat([over_labels[:right], over_labels[right + 1 :]])
    return {
        "accuracy": float(over_labels.argmax() == prompt.gold),
        "probability": float(over_labels.softmax(-1)[prompt.gold]),
        "margin": float(gold - others.max()),
        "logit": float(gold - over_labels.mean()),
    }


def answers(
    model: LanguageModel, prompt: Prompt, changes: dict[str, list[Edit]]
) -> Iterator[tuple[str, Float[Tensor, " vocabulary"]]]:
    """The logits at q under each intervention.

    What happens to q alone changes nothing before it: those run the last token on a cache of the others.
    """
    before = encode(model, prompt.ids[:-1])
    last = torch.tensor([[prompt.ids[-1]]], device=model.device)
    whole = torch.tensor([prompt.ids], device=model.device)
    for name, own in changes.items():
        alone = not name.startswith("cut-") or name.endswith("-last")
        ids, context = (last, before) if alone else (whole, None)
        with torch.no_grad(), seam(model.modules, edits=own):
            yield (
                name,
                model.logits_at(ids, torch.tensor([ids.shape[1] - 1], device=model.device), context)[0],
            )


def effects(
    model: LanguageModel,
    prompt: Prompt,
    places: Places,
    geometry: Geometry | None,
    chosen: dict[int, Bool[np.ndarray, "groups blocks"]],
) -> Iterator[Measure]:
    """The outcome untouched (`none`) and under every intervention.

    `touched` is the share of layers and groups whose untouched choice holds a banned block or lacks a forced one.
    """
    tokens = len(prompt.ids)
    every = {"none": []} | conditions(frozenset(range(model.n_layers)), places, tokens, geometry)
    for name, logits in answers(model, prompt, every):
        for metric, value in outcome(logits, prompt).items():
            yield Measure(metric, value, name)
    if geometry is None:
        return
    whole = np.stack([chosen[layer] for layer in sorted(chosen)])
    for which, (anchors, others) in targets(places, tokens, geometry).items():
        for suffix, blocks in (("", anchors), ("-control", others)):
            if blocks is not None:
                own = whole[..., blocks]
                yield Measure("touched", float(own.any(-1).mean()), f"ban-{which}{suffix}")
                yield Measure("touched", float((~own).any(-1).mean()), f"force-{which}{suffix}")
