"""A suite of scenarios: images with questions and answers, and the models that they are asked of.

A suite is a folder. `suite.json` names the models and how a prompt is written; each scenario is one file of JSON lines
beside it, one example a line. Both are described at `Suite` and `Example`.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from anchors.errors import AnchorsError, nearest, parsed

SPLITS = ("test", "tune", "demonstration")
IMAGE = "<image>"
"""Where an image stands in a prompt; `VisionLanguageModel.encode` replaces it."""
GREY = 128
"""Of blank images: close to zero after the usual normalisation by mean ½ and standard deviation ½."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Of images. Pillow's other readers are rarely used and some start programs: a suite may come from anybody."""
UNREADABLE = (
    OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What opening a picture may raise."""

Shown = Literal["own", "blank", "shuffled"]


@dataclass(frozen=True)
class Example:
    """One question on one image.

    Attributes:
        number: its line in the file, from 0.
        image: the picture's file; None for an example that is only text.
        text: what the image shows, in words; what a language model gets in its place.
        question, answer: as they stand in the template.
        kind: name of the sub-task.
        split: test, tune (settings are chosen on it) or demonstration.
        label: class of the answer, where the scenario has classes.
    """

    number: int
    image: Path | None
    text: str
    question: str
    answer: str
    kind: str
    split: str = "test"
    label: str | None = None


@dataclass(frozen=True)
class Suite:
    """Scenarios of one trained VLM and its experts.

    Attributes:
        folder: where `suite.json` lies.
        name: of the suite.
        seed: of the training of its models; suites that differ only in it are repetitions of one experiment.
        template: of a prompt, with `{image}` and `{question}`.
        answer: how the answer continues the prompt, with `{answer}`.
        caption: the question that makes the VLM describe an image in the words of `Example.text`; None where it cannot
            (an empty one in the file is none).
        vision: the scenario that the VLM was trained on, in which retention is measured.
        models: `vlm`, `base`, `experts` (by scenario) and `upper` (by scenario, VLMs fine-tuned on it, optional).
        scenarios: the examples of each.
        separator: between a demonstration's answer and the next prompt.
    """

    folder: Path
    name: str
    seed: int
    template: str
    answer: str
    caption: str | None
    vision: str
    models: dict[str, Any]
    scenarios: dict[str, tuple[Example, ...]]
    separator: str = "\n"

    @classmethod
    def open(cls, folder: str | Path) -> "Suite":
        """Read a suite.

        Raises:
            AnchorsError: it is not there, lacks something, or a line is not an example.
        """
        folder = Path(folder)
        path = folder / "suite.json"
        try:
            facts = parsed(path.read_text(encoding="utf-8-sig"))
            models = facts["models"]
            named: dict[str, Any] = {
                "template": facts["template"], "vision": str(facts["vision"]), "base": models["base"],
                "vlm": models["vlm"], "experts": models["experts"], "seed": int(facts.get("seed", 0)),
                "answer": facts.get("answer", " {answer}"),
            }  # fmt: skip
        except OSError as error:
            raise AnchorsError(
                f"There is no suite in {str(folder)!r}: {error.strerror or error}.",
                "Build one with `anchors inject demo --scale tiny --out DIR`; it lies in DIR/suite.",
                code="suite",
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise AnchorsError(
                f"{str(path)!r} does not describe a suite: {type(error).__name__} {error}.",
                "It needs template, vision, and models with vlm, base and experts.",
                code="suite",
            ) from error
        for name, fields, like in (
            ("template", ("{image}", "{question}"), "{image} {question} ="),
            ("answer", ("{answer}",), " {answer}"),
        ):
            if not isinstance(named[name], str) or any(field not in named[name] for field in fields):
                raise AnchorsError(
                    f"The {name} {named[name]!r} of {str(path)!r} lacks {' or '.join(fields)}.",
                    f'For example "{like}".',
                    code="suite",
                )
        for role, found in (("experts", models["experts"]), ("upper", models.get("upper") or {})):
            if not isinstance(found, dict):
                raise AnchorsError(
                    f"{role} in models of {str(path)!r} is {type(found).__name__}, not an object.",
                    f'For example "{role}": {{"instruction": "../{role}/instruction"}}.',
                    code="suite",
                )
        scenarios = {
            name: _read(folder, name) for name in dict.fromkeys([named["vision"], *named["experts"]])
        }
        return cls(
            folder, str(facts.get("name", folder.name)), named["seed"], named["template"], named["answer"],
            facts.get("caption") or None, named["vision"], models, scenarios,
            facts.get("separator", cls.separator),
        )  # fmt: skip

    @property
    def skills(self) -> tuple[str, ...]:
        """The scenarios that have an expert."""
        return tuple(self.models["experts"])

    def model(self, role: str, scenario: str | None = None) -> str:
        """Directory or hub id of a model: `vlm`, `base`, or of a scenario `experts` or `upper`.

        Raises:
            AnchorsError: the suite names none.
        """
        found = self.models.get(role)
        if scenario is not None:
            found = (found or {}).get(scenario)
        if not isinstance(found, str):
            what = role if scenario is None else f"{role} for {scenario}"
            raise AnchorsError(
                f"The suite {self.name!r} names no {what}.", "Add it to models in suite.json.", code="suite"
            )
        path = self.folder / found
        if path.exists():
            return str(path.resolve())
        if found.startswith((".", "/")):
            raise AnchorsError(
                f"The {role} of suite {self.name!r} is not there: {str(path)!r}.",
                "Build the suite again.",
                code="suite",
            )
        return found

    def has(self, role: str, scenario: str) -> bool:
        """Whether the suite names a model of this role for a scenario."""
        return scenario in (self.models.get(role) or {})

    def examples(
        self, scenario: str, split: str | None = "test", limit: int | None = None
    ) -> tuple[Example, ...]:
        """The first examples of a scenario's split; None is all splits.

        Raises:
            AnchorsError: no such scenario, or nothing in the split.
        """
        if scenario not in self.scenarios:
            raise AnchorsError(
                f"The suite {self.name!r} has no scenario {scenario!r}.",
                nearest(scenario, self.scenarios),
                code="unknown-name",
            )
        found = [e for e in self.scenarios[scenario] if split in (None, e.split)]
        if not found:
            raise AnchorsError(
                f"The scenario {scenario!r} of suite {self.name!r} has no examples in split {split!r}.",
                nearest(split, sorted({e.split for e in self.scenarios[scenario]})),
                code="unknown-name",
            )
        return tuple(found[:limit])

    def prompt(self, example: Example | None = None, given: str = IMAGE, question: str | None = None) -> str:
        """The prompt of an example.

        Args:
            example: whose question is asked.
            given: what stands in the place of the image: the image, or a text.
            question: to ask instead of the example's.
        """
        asked = example.question if question is None and example is not None else question or ""
        parts = {"image": given, "question": asked}
        # In one pass: a question that holds "{image}" is only text.
        return re.sub(r"\{(image|question)\}", lambda found: parts[found[1]], self.template)

    def written(self, example: Example) -> str:
        """The right answer, as it continues the prompt."""
        return self.answer.replace("{answer}", example.answer)

    def fingerprint(self, examples: Iterable[Example]) -> str:
        """Sixteen hex digits over how prompts are written and what the examples hold, images included."""
        digest = hashlib.sha256(json.dumps([self.template, self.answer, self.caption]).encode())
        for e in examples:
            digest.update(json.dumps([e.text, e.question, e.answer, e.kind, e.split, e.number]).encode())
            if e.image is not None:
                digest.update(_bytes(e.image))
        return digest.hexdigest()[:16]


def pictures(examples: Sequence[Example], shown: Shown = "own", seed: int = 0) -> list[Image.Image]:
    """What a VLM gets to see.

    Args:
        examples: whose images.
        shown: `own`; `blank`, a grey picture of the same size (what is answered right without seeing); or `shuffled`,
            the picture of another example (what does not depend on seeing the right one). Shuffling goes around one
            random circle of all different files, so that nobody keeps its own.
        seed: of the circle.

    Raises:
        AnchorsError: an example has no image, or it cannot be read; nothing to shuffle.
    """
    files = [e.image for e in examples]
    missing = [e.number for e in examples if e.image is None]
    if missing:
        raise AnchorsError(
            f"Example {missing[0]} has no image.",
            "A VLM can only be measured on examples with images.",
            code="suite",
        )
    if shown == "shuffled":
        circle = sorted({f for f in files if f is not None})
        if len(circle) < 2:
            raise AnchorsError("A single image cannot be shuffled.", "Measure more examples.", code="too-few")
        circle = [circle[i] for i in np.random.default_rng(seed).permutation(len(circle))]
        after = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
        files = [after[f] for f in files if f is not None]
    opened = {f: _picture(f) for f in dict.fromkeys(files) if f is not None}
    if shown == "blank":
        grey = {size: Image.new("RGB", size, (GREY,) * 3) for size in {p.size for p in opened.values()}}
        opened = {f: grey[p.size] for f, p in opened.items()}
    return [opened[f] for f in files if f is not None]


def in_rgb(path: Path, *, upright: bool = False) -> Image.Image:
    """A picture of one of `FORMATS`; `upright` as its file says that it is to be turned.

    Raises:
        Exception: one of `UNREADABLE`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as picture:
            return (ImageOps.exif_transpose(picture) if upright else picture).convert("RGB")


def _picture(path: Path) -> Image.Image:
    try:
        return in_rgb(path)
    except UNREADABLE as error:
        raise AnchorsError(
            f"The image {str(path)!r} cannot be read: {error}", "Build the suite again.", code="suite"
        ) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AnchorsError(
            f"The image {str(path)!r} cannot be read: {error}", "Build the suite again.", code="suite"
        ) from error


def _read(folder: Path, name: str) -> tuple[Example, ...]:
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise AnchorsError(
            f"A scenario of {str(folder)!r} is called {name!r}.",
            "Letters, digits, - and _ make a name.",
            code="suite",
        )
    path = folder / f"{name}.jsonl"
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except OSError as error:
        raise AnchorsError(
            f"The scenario {name!r} has no file: {error.strerror or error}: {str(path)!r}.",
            "Every scenario with an expert, and the vision scenario, is a file NAME.jsonl beside suite.json.",
            code="suite",
        ) from error
    except UnicodeDecodeError as error:
        raise AnchorsError(
            f"{str(path)!r} is not UTF-8: {error}.", "Save it as UTF-8.", code="suite"
        ) from error
    found = []
    for number, line in enumerate(lines):
        try:
            x = parsed(line)
            image = folder / x["image"] if x.get("image") else None
            if image is not None and not image.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"the image {x['image']!r} is outside the suite's folder")
            if x["question"] is None or x["answer"] is None:
                raise ValueError("question or answer is null")
            example = Example(
                number, image, str(x.get("text", "")), str(x["question"]), str(x["answer"]),
                str(x.get("kind", name)), str(x.get("split", "test")),
                None if x.get("label") is None else str(x["label"]),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AnchorsError(
                f"Line {number + 1} of {str(path)!r} is not an example: {type(error).__name__} {error}.",
                "Each line is an object with image, text, question, answer, kind and split.",
                code="suite",
            ) from error
        if example.split not in SPLITS:
            raise AnchorsError(
                f"Line {number + 1} of {str(path)!r} has the split {example.split!r}.",
                nearest(example.split, SPLITS),
                code="suite",
            )
        found.append(example)
    if not found:
        raise AnchorsError(f"The scenario {name!r} holds no examples: {str(path)!r} is empty.", code="suite")
    return tuple(found)
