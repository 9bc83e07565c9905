"""Which part of a picture an image token stands for, asked of the model's own processor.

Three pictures of the same size go through it: a black one, a white one, and one whose red grows from left to right and
whose green from top to bottom. Where black and white come out alike lies padding; elsewhere red and green say which
place of the picture a pixel shows, whatever was resized, cropped, padded or cut into tiles. Which pixels an image token
then stands for is a family's own (`LAYOUTS`, each held to the gradient of the image features by a test); where a family
packs its features itself, its own code is given places in their stead. What is not understood has no place, and a reason.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from anchors.injection.asking.vlm import PLACE, VisionLanguageModel

STRAIGHT = 0.02
"""How far, as a share of the picture, a processor's output may lie off the straight line from pixels to places."""


@dataclass(frozen=True)
class Places:
    """Where in a picture its image tokens look.

    Attributes:
        boxes: left, top, right, bottom of each image token in its order, as shares of the picture's width and height,
            beyond 0 and 1 where padding is part of it; NaN for tokens without a place (line ends between rows of
            patches). None where nothing is known.
        sheets: by token, which sheet it lies on: no two tokens of a sheet overlap, so that a small view of the whole
            picture and its tiles are told apart.
        count: image tokens of the picture.
        reason: why there are no boxes, in a sentence.
    """

    boxes: Float[np.ndarray, "tokens 4"] | None
    sheets: tuple[int, ...]
    count: int
    reason: str = ""


class _Unknown(Exception):
    """Why the places cannot be told."""


def places(vlm: VisionLanguageModel, size: tuple[int, int]) -> Places:
    """The places of the image tokens of a picture that is shown alone.

    Args:
        vlm: its processor is asked, and nothing of it is run but code that packs features.
        size: of the picture, width and height in pixels.

    Raises:
        AnchorsError: the processor refuses pictures of this size.
    """
    probes = [vlm.encode([f"{PLACE} a"], [[picture]]) for picture in _probes(size)]
    count = int((probes[0].ids == vlm.image_token_id).sum())
    kind = str(vlm.model.config.model_type)
    try:
        if kind in WITHOUT:
            raise _Unknown(WITHOUT[kind])
        if kind not in LAYOUTS:
            raise _Unknown(
                f"Which image tokens stand for which part of a picture is not known of the family {kind!r}."
            )
        boxes, pieces = LAYOUTS[kind](vlm, [probe.tensors for probe in probes], count)
        if len(boxes) != count:
            raise _Unknown(
                f"The picture has {count} image tokens, and {len(boxes)} places were found for them."
            )
    except _Unknown as reason:
        return Places(None, (0,) * count, count, str(reason))
    return Places(boxes, _sheets(boxes, pieces), count)


def _probes(size: tuple[int, int]) -> list[Image.Image]:
    """Black, white, and red and green as the shares of width and height at each pixel's middle."""
    width, height = size
    ramp = np.full((height, width, 3), 128, np.uint8)
    ramp[..., 0] = np.rint(255 * (np.arange(width) + 0.5) / width)
    ramp[..., 1] = np.rint(255 * (np.arange(height) + 0.5) / height)[:, None]
    return [Image.new("RGB", size), Image.new("RGB", size, (255,) * 3), Image.fromarray(ramp)]


def _shares(black: Tensor, white: Tensor, ramp: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of pixels [n, 3, height, width] their places across and down, and whether they show the picture at all."""
    span = (white - black).double().cpu()
    seen = span.abs().amin(1) > 1e-3 * span.abs().max()
    across, down = (
        ((ramp - black).double().cpu() / span.where(seen[:, None], torch.ones_like(span)))[:, :2]
        .numpy()
        .swapaxes(0, 1)
    )
    return across, down, seen.numpy()


def _edges(values: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
    """Where the first pixel begins and the last one ends, from the places of the pixels along one axis, [other, along]."""
    there = np.flatnonzero(seen.any(0))
    if len(there) < 4:
        raise _Unknown("Of a tile of the picture nearly all is padding.")
    middle = there[
        len(there) // 4 : len(there) - len(there) // 4
    ]  # borders are flat where a picture is enlarged
    lines = np.where(seen, values, np.nan)[:, middle]
    means = np.nanmean(lines, axis=0)
    slope, start = np.polyfit(middle, means, 1)
    off = max(np.nanmax(np.abs(lines - means)), np.abs(start + slope * middle - means).max())
    if not (slope > 0 and off <= STRAIGHT):
        raise _Unknown("The processor moves the picture's pixels otherwise than along straight lines.")
    return float(start - slope / 2), float(start + slope * (seen.shape[1] - 0.5))


def _tiles(probes: list[dict[str, Tensor]]) -> tuple[np.ndarray, tuple[int, int]]:
    """Left, top, right and bottom of each tile that the vision tower is shown, and a tile's height and width in pixels."""
    black, white, ramp = (p["pixel_values"].flatten(0, -4) for p in probes)
    across, down, seen = _shares(black, white, ramp)
    found = []
    for u, v, own in zip(across, down, seen, strict=True):
        (left, right), (top, bottom) = _edges(u, own), _edges(v.T, own.T)
        found.append((left, top, right, bottom))
    height, width = black.shape[-2:]
    return np.array(found), (height, width)


def _cells(tile: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A tile cut into rows × columns, in reading order."""
    left, top, right, bottom = tile
    x, y = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
    return np.array([(x[c], y[r], x[c + 1], y[r + 1]) for r in range(rows) for c in range(columns)])


def _grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of square cells, so many of them on a tile."""
    rows = round(math.sqrt(tokens * height / width))
    if rows < 1 or tokens % rows or height * (tokens // rows) != width * rows:
        raise _Unknown(f"{tokens} image tokens make no grid of squares on {height} × {width} pixels.")
    return rows, tokens // rows


Layout = tuple[np.ndarray, list[int]]
"""Boxes of all tokens, and which piece (tile) each lies on."""


def _tiled(vlm: VisionLanguageModel, probes: list[dict[str, Tensor]], count: int) -> Layout:
    """Tile by tile, each in reading order."""
    tiles, (height, width) = _tiles(probes)
    each, rest = divmod(count, len(tiles))
    if rest:
        raise _Unknown(f"{count} image tokens are not shared evenly by {len(tiles)} tiles.")
    rows, columns = _grid(each, height, width)
    cells = [_cells(tile, rows, columns) for tile in tiles]
    return np.concatenate(cells), [n for n in range(len(tiles)) for _ in range(each)]


def _merged(vlm: VisionLanguageModel, probes: list[dict[str, Tensor]], count: int) -> Layout:
    """Patches handed over one by one, in an order of the processor's; so many neighbours in it make one token."""
    frames, high, wide = probes[0]["image_grid_thw"][0].tolist()
    together, rest = divmod(frames * high * wide, count)
    side = math.isqrt(together)
    if rest or side * side != together or frames != 1 or high % side or wide % side:
        raise _Unknown(
            f"{frames} × {high} × {wide} patches are not merged into {count} image tokens by squares."
        )
    patch = vlm.processor.image_processor.patch_size
    pixels = [p["pixel_values"].view(high * wide, 3, -1, patch, patch)[:, :, 0] for p in probes]
    across, down, seen = _shares(*pixels)
    if not seen.all():
        raise _Unknown("A patch of the picture is padding.")
    middles = np.stack([x.reshape(count, -1).mean(1) for x in (across, down)], 1)
    boxes = _cells(np.array([0.0, 0, 1, 1]), high // side, wide // side)
    expected = (boxes[:, :2] + boxes[:, 2:]) / 2
    if np.abs((middles - expected) * (wide // side, high // side)).max() > 0.25:
        raise _Unknown("The processor hands its patches over in an order that is not known.")
    return boxes, [0] * count


def _packed(vlm: VisionLanguageModel, probes: list[dict[str, Tensor]], count: int) -> Layout:
    """A view of the whole picture, then tiles that the model itself joins, cuts and ends lines in: it is given places."""
    tiles, (height, width) = _tiles(probes)
    patch = vlm.model.config.vision_config.patch_size
    rows, columns = height // patch, width // patch
    own: Any = vlm.model.base_model
    given = torch.from_numpy(np.stack([_cells(tile, rows, columns) for tile in tiles])).float()
    taken: dict[str, Any] = {
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": getattr(vlm.model.config, "vision_aspect_ratio", None),
    }
    names = inspect.signature(own.pack_image_features).parameters
    more = {name: value for name, value in taken.items() if name in names}
    sizes = probes[0]["image_sizes"].cpu()
    packed, _ = own.pack_image_features([given], sizes, image_newline=torch.full((4,), torch.nan), **more)
    return packed[0].double().numpy(), [int(at >= rows * columns) for at in range(len(packed[0]))]


LAYOUTS: dict[str, Callable[[VisionLanguageModel, list[dict[str, Tensor]], int], Layout]] = {
    **dict.fromkeys(("llava", "gemma3", "idefics3", "internvl", "paligemma", "smolvlm"), _tiled),
    **dict.fromkeys(("llava_next", "llava_onevision"), _packed),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), _merged),
}
"""By a model's `model_type`."""
_QUERIES = (
    "Its image tokens are learned questions to the whole picture: none of them stands for a part of it."
)
WITHOUT = {"blip-2": _QUERIES, "instructblip": _QUERIES}
"""Families whose image tokens have no place at all."""


def _sheets(boxes: np.ndarray, pieces: list[int]) -> tuple[int, ...]:
    """Each piece goes on the first sheet on which it covers no other."""
    owner = np.array(pieces)
    taken: list[list[np.ndarray]] = []
    sheet_of = {}
    for piece in dict.fromkeys(pieces):
        own = boxes[(owner == piece) & ~np.isnan(boxes[:, 0])]
        whole = np.array([*own[:, :2].min(0), *own[:, 2:].max(0)]) if len(own) else np.zeros(4)
        free = (n for n, sheet in enumerate(taken) if not any(_cover(whole, other) for other in sheet))
        number = next(free, len(taken))
        if number == len(taken):
            taken.append([])
        taken[number].append(whole)
        sheet_of[piece] = number
    return tuple(sheet_of[piece] for piece in pieces)


def _cover(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two boxes share more than a tenth of the smaller one."""
    shared = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return bool(shared > 0.1 * min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2])))
