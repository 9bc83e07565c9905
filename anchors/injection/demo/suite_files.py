"""The suite of a demonstration: held-out pictures with questions, in files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from anchors._names import forwarding
from anchors.injection.demo.pictures import HELD_OUT, Pictures
from anchors.injection.demo.prompts import Item
from anchors.injection.demo.world import SKILLS, World

SCENARIOS = ("vision", *SKILLS)


@dataclass(frozen=True)
class HeldOut:
    """A question about a held-out picture."""

    item: Item
    split: str


def examples(world: World, pictures: Pictures, seed: int) -> dict[str, list[HeldOut]]:
    """One question of each scenario about every held-out picture.

    Kinds of questions take turns, and so do digits and objects: the first so many examples are a fair part of all.
    """
    found: dict[str, list[HeldOut]] = {}
    drawn = pictures.of(*HELD_OUT)
    kinds = [[n for n in drawn if pictures.scenes[n].is_digit is digit] for digit in (True, False)]
    numbers = [n for pair in zip_longest(*kinds) for n in pair if n is not None]
    for order, scenario in enumerate(SCENARIOS):
        rng = np.random.default_rng([seed, 2, order])
        own: list[HeldOut] = []
        turns: dict[bool, int] = {}
        for number in numbers:
            scene = pictures.scenes[number]
            tasks = [task for task in world.tasks(scenario) if task.fits(scene)]
            turn = turns.get(scene.is_digit, 0)
            turns[scene.is_digit] = turn + 1
            item = Item(scene, tasks[turn % len(tasks)](scene, rng), number)
            own.append(HeldOut(item, pictures.splits[number]))
        found[scenario] = own
    return found


def write_suite(
    folder: Path,
    name: str,
    world: World,
    pictures: Pictures,
    found: Mapping[str, Sequence[HeldOut]],
    seed: int,
    models: Mapping[str, object],
) -> None:
    """Pictures as PNG, one file of lines per scenario, and `suite.json`."""
    (folder / "images").mkdir(parents=True)
    for number in pictures.of(*HELD_OUT):
        Image.fromarray(pictures.pixels[number]).save(folder / _image(number))
    for scenario, own in found.items():
        lines = []
        for example in own:
            asked = example.item.asked
            line = {
                "image": _image(example.item.picture),
                "text": world.describe(example.item.scene),
                "question": asked.question,
                "answer": asked.answer,
                "kind": asked.kind,
                "split": example.split,
                "label": asked.label,
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        (folder / f"{scenario}.jsonl").write_text("".join(lines), encoding="utf-8")
    scene = next(iter(world.scenes()))
    facts = {
        "name": name,
        "seed": seed,
        "template": world.template,
        "answer": world.answer,
        "separator": world.separator,
        "caption": world.caption(scene, np.random.default_rng(0)).question,
        "vision": "vision",
        "models": models,
    }
    (folder / "suite.json").write_text(
        json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _image(number: int | None) -> str:
    return f"images/{number:05d}.png"


__getattr__ = forwarding(__name__)
