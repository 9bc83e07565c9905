"""Turn a payload of plain data into the viewer's page (`page.html`, beside this file)."""

import html
import json
import math
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

_ROLES = ("text", "format", "label", "target", "image")
_SUMS = ("s_wp", "s_pq", "s_ww")
_KINDS = ("ip", "tp", "iq", "pq", "tq", "ww")
"""Kinds of flow on a page with pictures, or of prompts without label words, where `kinds` names those that its prompts have."""
_REST = "s_pq_rest"
# Escaped, these cannot end the script element, and the page stays plain ASCII where the data lies.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


KEEP = 100
"""How many arcs of each flow and layer a page holds, and as many from the first token."""


def edges(matrix: np.ndarray, keep: int = KEEP, groups: np.ndarray | None = None) -> list[list[int | float]]:
    """The strongest flows of one layer, strongest first, as `[query, key, weight]`.

    Only j < i with a weight above zero counts; equal weights keep the reading order (i, then j). Weights are rounded
    to 4 significant digits.

    Args:
        matrix: I_l, [T, T]: row i receives, column j is the source.
        keep: how many of each group.
        groups: a whole number for every pair, [T, T]; without it all are one group.

    Raises:
        ValueError: no square matrix, a negative `keep`, or a weight that is no finite number.
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"edges() takes a square matrix [T, T], not one of shape {list(matrix.shape)}")
    if keep < 0:
        raise ValueError(f"keep must be at least 0, not {keep}")
    rows, columns = np.tril_indices(matrix.shape[0], k=-1)
    weights = matrix[rows, columns].astype(np.float64)
    if not np.isfinite(weights).all():
        bad = int(np.flatnonzero(~np.isfinite(weights))[0])
        raise ValueError(f"matrix[{rows[bad]}, {columns[bad]}] is {weights[bad]}, not a finite number")
    chosen = np.flatnonzero(weights > 0)
    group = np.zeros(len(chosen), int) if groups is None else groups[rows[chosen], columns[chosen]]
    kept = [_largest(weights, chosen[group == one], keep) for one in np.unique(group)]
    chosen = np.sort(np.concatenate([chosen[:0], *kept]))
    order = chosen[np.argsort(-weights[chosen], kind="stable")]
    return [[int(rows[k]), int(columns[k]), float(f"{weights[k]:.4g}")] for k in order]


def _largest(weights: np.ndarray, chosen: np.ndarray, keep: int) -> np.ndarray:
    if 0 < keep < len(chosen):  # drop what cannot be among the first, so that only few are sorted
        chosen = chosen[weights[chosen] >= np.partition(weights[chosen], -keep)[-keep]]
    return chosen[np.argsort(-weights[chosen], kind="stable")[:keep]]


def flows(classes: Sequence[int | None], target: int) -> np.ndarray:
    """Of every pair of tokens which flow it belongs to: 0 other, 1 S_wp, 2 S_pq; 3 more from the first token, [T, T].

    The first token, where much attention goes that has nothing to do, is apart so that it leaves the others their room.

    Args:
        classes: a class at each counted position of a label word, else None.
        target: q.
    """
    counted = np.array([own is not None for own in classes])
    found = np.zeros((len(counted), len(counted)), np.int8)
    found[counted] = 1
    found[target] = 2 * counted
    if not counted[0]:
        found[:, 0] += 3
    return found


def into_target(target: int) -> np.ndarray:
    """The same of a prompt without label words: 0 other, 1 into the target; 3 more from the first token, [T, T]."""
    found = np.zeros((target + 1, target + 1), np.int8)
    found[target] = 1
    found[:, 0] += 3
    return found


class Page(str):
    """A page as its HTML, which a notebook shows inline, in a frame of its own."""

    __slots__ = ()
    HEIGHT = 720
    """Of the frame, in pixels."""

    def _repr_html_(self) -> str:
        # A frame without an origin: the page's script runs, and reaches nothing of the notebook.
        frame = 'style="width: 100%; border: 0" sandbox="allow-scripts allow-downloads"'
        return f'<iframe height="{self.HEIGHT}" {frame} srcdoc="{html.escape(self)}"></iframe>'


def render_page(payload: dict[str, Any]) -> Page:
    """The whole page as one string: no file beside it, no network, no library.

    Raises ValueError, naming the field, where a number is NaN or infinite or the lists do not fit together.
    """
    try:
        data = json.dumps(payload, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
    except (TypeError, ValueError) as error:
        for field, value in _leaves(payload, ""):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"payload{field} is {value}, not a finite number") from None
            if not isinstance(value, str | int | float | None):
                raise TypeError(f"payload{field} is a {type(value).__name__}, not plain JSON data") from None
        raise error
    _check(payload)
    title = str(payload["title"]).encode("utf-8", "replace").decode("utf-8")
    parts = {"title": html.escape(title), "payload": data}
    template = files("anchors.viewer").joinpath("page.html").read_text(encoding="utf-8")
    return Page(re.sub(r"\{\{(title|payload)\}\}", lambda found: parts[found[1]], template))


def _leaves(value: Any, field: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{field}[{key!r}]")
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from _leaves(item, f"{field}[{at}]")
    else:
        yield field, value


def _check(payload: dict[str, Any]) -> None:
    """Reject a payload that the page would draw wrongly without a word."""
    if not payload["prompts"]:
        raise ValueError("payload['prompts'] is empty: the page needs at least one prompt")
    curves = payload["curves"]
    for field in (*_SUMS, *({_REST} & set(curves))) if curves else ():
        for part in ("mean", "low", "high"):
            if len(curves[field][part]) != len(curves["layers"]):
                raise ValueError(f"payload['curves']['{field}']['{part}'] is not one number per layer")
    kinds = payload.get("kinds")
    if kinds is not None and (not kinds or not set(kinds) <= set(_KINDS)):
        raise ValueError(f"payload['kinds'] holds {kinds}; known are {', '.join(_KINDS)}")
    sums = (*_SUMS, _REST) if kinds is None else tuple(f"s_{kind}" for kind in kinds)
    for at, prompt in enumerate(payload["prompts"]):
        for field, fault in _faults(prompt, sums):
            raise ValueError(f"payload['prompts'][{at}]['{field}'] {fault}")


def _faults(prompt: dict[str, Any], sums: Sequence[str]) -> Iterator[tuple[str, str]]:
    length, depth, labels = len(prompt["tokens"]), len(prompt[sums[0]]), range(len(prompt["labels"]))
    for field, wanted, what in (
        ("roles", length, "tokens"),
        ("classes", length, "tokens"),
        ("probabilities", len(labels), "labels"),
        ("edges", len(prompt["layers"]), "layers"),
        ("first", len(prompt["layers"]), "layers"),
        *((name, depth, f"layers of {sums[0]}") for name in sums[1:]),
    ):
        if len(prompt[field]) != wanted:
            yield field, f"has {len(prompt[field])} entries for {wanted} {what}"
    for role in prompt["roles"]:
        if role not in _ROLES:
            yield "roles", f"holds {role!r}; known are {', '.join(_ROLES)}"
    if prompt["predicted"] not in labels:
        yield "predicted", f"holds {prompt['predicted']}, no index of its labels"
    for field, used in (
        ("gold", [prompt["gold"]]),
        ("classes", prompt["classes"]),
        ("aims", prompt.get("aims", [])),
    ):
        for index in used:
            if index is not None and index not in labels:
                yield field, f"holds {index}, no index of its labels"
    if "blocks" in prompt:
        yield from _faulty_blocks(prompt["blocks"], length, len(prompt["layers"]))
    if "pictures" in prompt:
        yield from _faulty_pictures(prompt)
    for layer, flows in zip(prompt["layers"], prompt["edges"], strict=True):
        if not 0 <= layer < depth:
            yield "layers", f"holds {layer}; its sums have {depth} layers"
        for i, j, w in flows:
            if not (0 <= j < i < length and w > 0):
                yield "edges", f"of layer {layer} holds {[i, j, w]}; need 0 <= j < i < {length} and w > 0"


def _faulty_pictures(prompt: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every image token lies on one picture, once; pictures are inlined; boxes lie inside of them."""
    patches, found = list(prompt["patches"]), []
    if patches != [at for at, role in enumerate(prompt["roles"]) if role == "image"]:
        yield "patches", "are not the tokens with the role image"
    for picture in prompt["pictures"]:
        if not re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*", picture["src"]):
            yield "pictures", f"holds {picture['src'][:40]!r}, no inlined PNG or JPEG"
        found += picture["strip"]
        for token, left, top, right, bottom in (cell for sheet in picture["sheets"] for cell in sheet):
            found.append(token)
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                yield "pictures", f"places token {token} at {[left, top, right, bottom]}"
    if sorted(found) != patches:
        yield "pictures", "do not hold each of the patches once"
    for kind, rows in prompt["into"].items():
        if [len(row) for row in rows] != [len(patches)] * len(prompt["layers"]):
            yield (
                "into",
                f"has another shape than {len(prompt['layers'])} layers × {len(patches)} patches for {kind!r}",
            )


def _faulty_blocks(blocks: dict[str, Any], length: int, layers: int) -> Iterator[tuple[str, str]]:
    """Of sparse attention: `size` tokens a block, `count` blocks, the `forced` ones, and those `chosen` by layer and group."""
    size, count = blocks["size"], blocks["count"]
    if size < 1 or count != -(-length // size):
        yield "blocks", f"are {count} of {size} tokens, for {length} tokens"
    if len(blocks["chosen"]) != layers:
        yield "blocks", f"has {len(blocks['chosen'])} entries for {layers} layers"
    for own in (blocks["forced"], *(group for layer in blocks["chosen"] for group in layer)):
        for block in own:
            if not 0 <= block < count:
                yield "blocks", f"holds {block}; there are {count}"
