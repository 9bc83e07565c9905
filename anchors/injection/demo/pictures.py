"""Pictures of scenes: scikit-learn's handwritten digits, and objects drawn with Pillow. Those of a test are held out."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from anchors.injection.demo.scales import Scale
from anchors.injection.demo.words import COLOURS
from anchors.injection.demo.world import Scene, World

HELD_OUT = ("test", "tune", "demonstration")
"""Splits no model is trained on."""


@dataclass(frozen=True)
class Pictures:
    """Pictures in memory.

    Attributes:
        pixels: RGB.
        scenes: what each shows.
        splits: train, or one of `HELD_OUT`.
    """

    pixels: UInt8[np.ndarray, "pictures size size 3"]
    scenes: tuple[Scene, ...]
    splits: tuple[str, ...]

    def of(self, *splits: str) -> list[int]:
        """The numbers of the pictures of some splits."""
        return [i for i, split in enumerate(self.splits) if split in splits]


def pictures(world: World, scale: Scale, seed: int) -> Pictures:
    """All pictures of a world; which digits are held out depends on the seed."""
    rng = np.random.default_rng([seed, 1])
    parts = [_digits(scale, rng)]
    if world.shapes:
        parts.append(_objects(world, scale, rng))
    return Pictures(
        np.concatenate([pixels for pixels, _, _ in parts]),
        tuple(scene for _, scenes, _ in parts for scene in scenes),
        tuple(split for _, _, splits in parts for split in splits),
    )


def _digits(scale: Scale, rng: np.random.Generator) -> tuple[np.ndarray, list[Scene], list[str]]:
    """scikit-learn's 1,797 digits, upscaled; those to train on also a little moved and turned."""
    data = load_digits()
    order = rng.permutation(len(data.images))
    kinds = _splits(scale, len(order))
    pixels, scenes, splits = [], [], []
    for number, split in zip(order, kinds, strict=True):
        tile = Image.fromarray(np.rint(data.images[number] * (255 / 16)).astype(np.uint8))
        big = tile.resize((scale.image, scale.image), Image.Resampling.BICUBIC)
        copies = [big]
        if split == "train":
            copies += [_moved(big, rng) for _ in range(scale.copies)]
        for copy in copies:
            pixels.append(np.repeat(np.asarray(copy)[..., None], 3, axis=-1))
            scenes.append(Scene(int(data.target[number])))
            splits.append(split)
    return np.stack(pixels), scenes, splits


def _moved(tile: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turned by up to 12°, shifted by up to a twelfth of the width."""
    most = tile.width / 12
    return tile.rotate(
        float(rng.uniform(-12, 12)),
        Image.Resampling.BILINEAR,
        translate=(float(rng.uniform(-most, most)), float(rng.uniform(-most, most))),  # ty: ignore[invalid-argument-type] - takes fractions
    )


def _splits(scale: Scale, count: int) -> list[str]:
    """Which split each of so many pictures, in random order, belongs to."""
    held_out = [name for name in HELD_OUT for _ in range(scale.held_out[name])]
    return [*held_out, *["train"] * (count - len(held_out))]


def _objects(
    world: World, scale: Scale, rng: np.random.Generator
) -> tuple[np.ndarray, list[Scene], list[str]]:
    everything = [scene for scene in world.scenes() if not scene.is_digit]
    splits = _splits(scale, scale.drawings)
    scenes = [everything[i] for i in rng.integers(0, len(everything), len(splits))]
    return np.stack([drawn(scene, scale.image, rng) for scene in scenes]), scenes, splits


def drawn(scene: Scene, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "size size 3"]:
    """Objects at random places of a 3 × 3 grid, none touching another, on a light ground."""
    wide = 4 * size  # drawn large and made smaller, so that edges are smooth
    ground = tuple(int(x) for x in rng.integers(215, 250, 3))
    colour = tuple(int(np.clip(x + rng.integers(-20, 21), 0, 255)) for x in COLOURS[str(scene.colour)])
    canvas = Image.new("RGB", (wide, wide), ground)
    pen = ImageDraw.Draw(canvas)
    cell = wide / 3
    for place in rng.permutation(9)[: scene.number]:
        radius = cell * rng.uniform(0.3, 0.42)
        slack = 0.46 * cell - radius
        x = cell * (place % 3 + 0.5) + rng.uniform(-slack, slack)
        y = cell * (place // 3 + 0.5) + rng.uniform(-slack, slack)
        if scene.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        else:
            pen.polygon(_corners(str(scene.shape), x, y, radius, float(rng.uniform(-0.2, 0.2))), fill=colour)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def _corners(shape: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """The corners of a shape in a circle, turned by an angle in radians."""
    corners = {"square": 4, "triangle": 3, "star": 10}[shape]
    found = []
    for i in range(corners):
        angle = turn + 2 * math.pi * i / corners + (math.pi / 4 if shape == "square" else -math.pi / 2)
        far = radius * (0.42 if shape == "star" and i % 2 else 1)
        found.append((x + far * math.cos(angle), y + far * math.sin(angle)))
    return found
