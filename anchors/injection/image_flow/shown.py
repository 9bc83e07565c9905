"""What the page shows of prompts with pictures: the flow from each patch, on the picture, by layer, beside the arcs of the text."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anchors.injection.asking.evaluate import greedy
from anchors.injection.asking.geometry import Places, places
from anchors.injection.asking.vlm import VisionLanguageModel
from anchors.injection.image_flow.arcs import KINDS, ArcTap, pairs
from anchors.injection.image_flow.flow import ImageBatch, ImagePrompt, at_targets, collate, image_flow
from anchors.injection.image_flow.prompts import NEW_TOKENS
from anchors.places import titled
from anchors.viewer import Page, render_page
from anchors.viewer.page import KEEP

SIDE = 768
"""Pictures on the page are no longer than this, in pixels."""
LOSSLESS = 128 * 128
"""Up to so many pixels a picture is kept as PNG."""
LIKELY = 5
"""Answers that are shown with their probabilities, besides those that the prompt names."""


def inlined(picture: Image.Image) -> str:
    """A picture as a data URI: its pixels alone, scaled down, written anew."""
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    kind, more = ("PNG", {}) if small.width * small.height <= LOSSLESS else ("JPEG", {"quality": 85})
    file = io.BytesIO()
    Image.fromarray(np.asarray(small)).save(file, kind, **more)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def prompt_payload(
    vlm: VisionLanguageModel, prompt: ImagePrompt, name: str, layers: Sequence[int]
) -> dict[str, Any]:
    """One prompt with pictures, as `anchors.viewer.payload.prompt_payload` has one without.

    `patches` are the positions of the image tokens, and `into` what flows from each of them, by layer: into the target,
    into the label words (where there are demonstrations), and into all tokens of text. `pictures` say where on a picture
    each of them lies, by sheet; what has no place is a strip, in its order.

    Args:
        vlm: with its tower on the seam.
        prompt: without an answer, the loss is that of the token that the model finds most likely.
        name: of the prompt on the page.
        layers: that are shown.
    """
    batch = collate(vlm, [prompt])
    tap = ArcTap(batch, frozenset(vlm.layers), KEEP)
    found = image_flow(vlm, batch, [tap])
    surprise, target = float(found.surprise[0]), int(batch.target[0])
    ids = batch.tensors["input_ids"][0, : target + 1].tolist()
    patches = [at for at, token in enumerate(ids) if token == vlm.image_token_id]
    labels = batch.labels[0].tolist()
    shown = kinds_of(prompt)
    pictures, names, notes = _pictures(vlm, prompt, patches)
    roles = ["image" if token == vlm.image_token_id else "text" for token in ids]
    for at in labels:
        roles[at] = "label"
    roles[target] = "target"
    rows: dict[str, Mapping[int, Tensor]] = {"target": tap.target, "later": tap.given}
    if labels:
        rows["labels"] = tap.labels
    told = _said(vlm, prompt, [*notes, *([vlm.beside_attention] if vlm.beside_attention else [])])
    answers = _answers(
        vlm, batch, {ids[at]: prompt.text[slice(*own)] for at, own in zip(labels, prompt.labels, strict=True)}
    )
    first = {token: n for n, token in enumerate(answers["tokens"])}

    def by_layer(values: Tensor) -> list[float | None]:
        """Of every layer; None where there is no attention."""
        own = dict(zip(vlm.layers, (max(float(x), 0.0) for x in values), strict=True))
        return [own.get(layer) for layer in range(vlm.n_layers)]

    return {
        "name": name,
        "tokens": _pieces(vlm, ids, names),
        "roles": roles,
        "classes": [first[ids[at]] if at in labels else None for at in range(target + 1)],
        "labels": answers["words"],
        "gold": None if prompt.answer is None else first[int(batch.answer[0])],
        "predicted": first[int(found.predicted[0])],
        "probabilities": answers["probabilities"],
        "layers": list(layers),
        "keep": KEEP,
        "edges": [tap.edges(layer, surprise) for layer in layers],
        "first": [float(tap.first[layer]) * surprise for layer in layers],
        "notes": told,
        "pairs": {kind: n for kind, n in pairs(batch).items() if kind in shown},
        "begins": int(batch.query[0].nonzero()[0]),
        "patches": patches,
        "into": {
            kind: [[float(f"{x * surprise:.4g}") for x in row[layer][patches].tolist()] for layer in layers]
            for kind, row in rows.items()
        },
        "pictures": pictures,
    } | {f"s_{kind}": by_layer(found.sums[f"s_{kind}"][0]) for kind in shown}


def kinds_of(prompt: ImagePrompt) -> tuple[str, ...]:
    """Kinds of flow that a prompt has: without demonstrations none into or from label words."""
    return (
        KINDS
        if prompt.labels
        else tuple(kind for kind in KINDS if (kind[-1] == "q" and kind != "pq") or kind == "ww")
    )


def _said(vlm: VisionLanguageModel, prompt: ImagePrompt, notes: Iterable[str]) -> list[str]:
    """What stands above a prompt: what the model answers, and all that a reader must know."""
    asked = prompt.text if prompt.answer is None else prompt.text[: prompt.answer[0]].rstrip()
    (own,) = greedy(vlm, vlm.encode([asked], [prompt.images]).tensors, NEW_TOKENS)
    said = [f"The model's own answer: {own or '(nothing)'}"]
    if prompt.answer is None:
        said.append("No right answer was given: the loss is that of the model's own first token.")
    return [*said, *notes]


def _answers(vlm: VisionLanguageModel, batch: ImageBatch, words: Mapping[int, str]) -> dict[str, list[Any]]:
    """Tokens that may come after the target, the likely ones first: the demonstrations', the right one, the likeliest."""
    with torch.no_grad(), vlm.arithmetic():
        chances = at_targets(vlm, batch)[0].double().softmax(-1).cpu()
    right = [int(batch.answer[0])] * (int(batch.answer[0]) >= 0)
    tokens = {*words, *right, *chances.topk(LIKELY).indices.tolist()}
    order = sorted(tokens, key=lambda token: (-float(chances[token]), token))
    named = [words.get(token) or vlm.tokenizer.decode([token]) for token in order]
    return {"tokens": order, "words": named, "probabilities": [float(chances[token]) for token in order]}


def _pieces(vlm: VisionLanguageModel, ids: Sequence[int], names: Mapping[int, str]) -> list[str]:
    """Each token as the piece of text it adds to those before it since the last picture; image tokens by their names."""
    pieces: list[str] = []
    run: list[int] = []
    before = ""
    for at, token in enumerate(ids):
        if at in names:
            run, before = [], ""
            pieces.append(names[at])
            continue
        run.append(token)
        text = str(vlm.tokenizer.decode(run, clean_up_tokenization_spaces=False))
        fits = text.startswith(before) and not text.endswith("\ufffd")
        pieces.append(text[len(before) :] if fits else str(vlm.tokenizer.decode([token])))
        before = text
    return pieces


def _pictures(
    vlm: VisionLanguageModel, prompt: ImagePrompt, patches: Sequence[int]
) -> tuple[list[dict[str, Any]], dict[int, str], list[str]]:
    """The pictures of a prompt with their patches, a name of every image token, and what a reader must know."""
    known: dict[tuple[int, int], Places] = {}
    for picture in prompt.images:
        known.setdefault(picture.size, places(vlm, picture.size))
    own = [known[picture.size] for picture in prompt.images]
    notes = list(dict.fromkeys(one.reason for one in own if one.reason))
    if sum(one.count for one in own) != len(patches):
        notes.append(
            f"The prompt has {len(patches)} image tokens, and its pictures have {sum(one.count for one in own)} when each is "
            "shown alone: which belong to which is not known."
        )
        own = [Places(None, (0,) * len(patches), len(patches)), *(Places(None, (), 0) for _ in own[1:])]
    found, names, begin = [], {}, 0
    for number, (picture, one) in enumerate(zip(prompt.images, own, strict=True), 1):
        tokens = patches[begin : begin + one.count]
        begin += one.count
        cells, there = _cells(one)
        for order, token in enumerate(tokens):
            place = "row {}, column {}".format(*there[order]) if order in there else f"token {order + 1}"
            sheet = f", view {one.sheets[order] + 1}" if max(one.sheets) else ""
            names[token] = f"▦ picture {number}{sheet}, {place}"
        sheets = [
            [[tokens[k], *cells[k]] for k in there if one.sheets[k] == n] for n in dict.fromkeys(one.sheets)
        ]
        found.append(
            {
                "src": inlined(picture), "width": picture.width, "height": picture.height,
                "sheets": [sheet for sheet in sheets if sheet],
                "strip": [token for k, token in enumerate(tokens) if k not in there],
                "columns": min(64, max((column for _, column in there.values()), default=24)),
            }
        )  # fmt: skip
    if any(picture["sheets"] and picture["strip"] for picture in found):
        notes.append(
            "Tokens that end the rows of a picture, and those that show padding alone, lie on no part of it: a strip."
        )
    if patches and patches[0] == 0:
        notes.append("The first token of the prompt is a patch: attention that has nothing to do goes there.")
    return found, names, notes


def _cells(one: Places) -> tuple[dict[int, list[float]], dict[int, tuple[int, int]]]:
    """By number of an image token its box inside the picture, and its row and column on its sheet, both from 1."""
    if one.boxes is None:
        return {}, {}
    inside = np.clip(one.boxes, 0, 1)
    shown = {
        k: [round(float(x), 4) for x in box]
        for k, box in enumerate(inside)
        if not np.isnan(box[0]) and min(box[2:] - box[:2]) > 1e-3
    }
    middles = (one.boxes[:, :2] + one.boxes[:, 2:]) / 2
    there = {}
    for sheet in set(one.sheets):
        own = [k for k in shown if one.sheets[k] == sheet]
        across, down = (_ranks(middles[own, axis]) for axis in (0, 1))
        there |= {k: (down[n], across[n]) for n, k in enumerate(own)}
    return shown, {k: there[k] for k in shown}


def _ranks(values: np.ndarray) -> list[int]:
    """Which of the different values each is, from 1."""
    different: list[float] = []
    for value in sorted(values):
        if not different or value - different[-1] > 1e-3:
            different.append(value)
    return [int(np.searchsorted(different, value + 5e-4)) for value in values]


def picture_page(
    vlm: VisionLanguageModel,
    prompts: Mapping[str, ImagePrompt],
    facts: Mapping[str, Any],
    layers: Sequence[int] | None = None,
) -> Page:
    """The page of some prompts with pictures, all with demonstrations or all without.

    Args:
        vlm: with its tower on the seam.
        prompts: by the name that they get on the page.
        facts: provenance (`anchors.study.results.provenance`).
        layers: that are shown; all that attend by default.

    Example:
        >>> vlm = load_vlm("tiny-vlm", routed=True)
        >>> asked = ImagePrompt("<image> name =", (picture,), (), 0, None)
        >>> picture_page(vlm, {"a digit": asked}, provenance())
    """
    every = vlm.layers if layers is None else layers
    shown = [prompt_payload(vlm, prompt, name, every) for name, prompt in prompts.items()]
    flat = {k: v for k, v in facts.items() if isinstance(v, str | int | float)}
    flat |= {f"version of {k}": v for k, v in facts.get("versions", {}).items()}
    return render_page(
        {
            "title": "Information flow from pictures",
            "model": titled(vlm.name),
            "task": "",
            "command": facts.get("command"),
            "provenance": flat,
            "curves": None,
            "kinds": list(kinds_of(next(iter(prompts.values())))),
            "prompts": shown,
        }
    )
