"""Labelled text: built in, from local files, or from the hub."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from anchors.errors import AnchorsError
from anchors.tasks.task import TASKS, Task

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "dev")}


@dataclass(frozen=True)
class Example:
    """One labelled text; `label` indexes the task's label words."""

    text: str
    label: int


@dataclass(frozen=True)
class Data:
    """Demonstrations are drawn from `train`, queries from `test`.

    Attributes:
        source: where it came from, as the user would name it.
        fingerprint: hash over all texts and labels of both parts, in order.
    """

    train: tuple[Example, ...]
    test: tuple[Example, ...]
    source: str

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(json.dumps([(e.text, e.label) for e in part]).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def train_by_class(self) -> dict[int, list[Example]]:
        """Training examples of each class, in order."""
        found: dict[int, list[Example]] = {}
        for example in self.train:
            found.setdefault(example.label, []).append(example)
        return found


def read(task: Task, source: str | None = None, *, test_share: float = 0.3) -> Data:
    """The data of a task.

    Args:
        task: gives the label words, which name or number the classes.
        source: None or `builtin` for the set that comes with the toolkit; `hub` for the task's pinned data set; a
            file (JSON lines, CSV, TSV, parquet) with columns `text` and `label`; or a directory with a `train` and a
            `test` file, itself or in a subdirectory named like the task.
        test_share: a single file is split by a hash of each text, this share of it becoming the test part, so that
            adding rows moves no other row.

    Raises:
        AnchorsError: nothing there, missing columns, an unknown label, an empty file, a class without examples.
    """
    if source in (None, "builtin"):
        if task.name not in TASKS:
            raise AnchorsError(
                f"Task {task.name!r} has no built-in data.", "Give --data with a file or a directory."
            )
        if task.labels != TASKS[task.name].labels:
            raise AnchorsError(
                f"The built-in data of {task.name!r} is labelled {list(TASKS[task.name].labels)}, not {list(task.labels)}.",
                "Give --data with a file whose labels are numbers or the new label words.",
            )
        folder = files("anchors.tasks.builtin")
        train, test = (
            _examples(
                task, pd.read_json(folder.joinpath(f"{task.name}.{part}.jsonl").open(), lines=True), part
            )
            for part in ("train", "test")
        )
        name = "builtin"
    elif source == "hub":
        train, test = _hub(task)
        name = f"{task.hub.path}@{task.hub.revision[:12]}" if task.hub else "hub"
    else:
        path = Path(source).expanduser()
        name = str(source)
        if path.is_dir():
            train, test = (_examples(task, *_part(path, task.name, part)) for part in SPLITS)
        elif path.is_file():
            whole = _examples(task, _frame(path), path.name)
            cut = [
                int(hashlib.sha256(e.text.encode()).hexdigest()[:8], 16) / 16**8 < test_share for e in whole
            ]
            test = tuple(e for e, held_out in zip(whole, cut, strict=True) if held_out)
            train = tuple(e for e, held_out in zip(whole, cut, strict=True) if not held_out)
        else:
            raise AnchorsError(
                f"The data {source!r} does not exist.", "Give `hub`, `builtin`, a file or a directory."
            )
    for part, examples in (("train", train), ("test", test)):
        if not examples:
            raise AnchorsError(f"The {part} part of {name!r} is empty.", "Give more examples.")
    lacking = [label for i, label in enumerate(task.labels) if all(e.label != i for e in train)]
    if lacking:
        raise AnchorsError(
            f"No training example of {name!r} is labelled {lacking}.",
            "Each demonstration set needs every class; add examples or leave the label out.",
        )
    return Data(train=tuple(train), test=tuple(test), source=name)


def _part(folder: Path, task: str, part: str) -> tuple[pd.DataFrame, str]:
    for place in (folder / task, folder):
        for stem in SPLITS[part]:
            for suffix in SUFFIXES:
                path = place / f"{stem}{suffix}"
                if path.is_file():
                    return _frame(path), path.name
    raise AnchorsError(
        f"{str(folder)!r} holds no {part} file, neither itself nor in a subdirectory {task!r}.",
        f"Looked for {' or '.join(SPLITS[part])} with one of {', '.join(SUFFIXES)}.",
    )


def _frame(path: Path) -> pd.DataFrame:
    try:
        if path.stat().st_size == 0:
            raise AnchorsError(f"The file {str(path)!r} is empty.", "It needs rows with `text` and `label`.")
        match path.suffix:
            case ".jsonl":
                frame = pd.read_json(path, lines=True, dtype=False)
            case ".json":
                frame = pd.read_json(path, dtype=False)
            case ".csv":
                frame = pd.read_csv(path, keep_default_na=False)
            case ".tsv":
                frame = pd.read_csv(path, sep="\t", keep_default_na=False)
            case ".parquet":
                frame = pd.read_parquet(path)
            case _:
                raise AnchorsError(
                    f"Files ending in {path.suffix!r} are not read.", f"One of {', '.join(SUFFIXES)}."
                )
    except AnchorsError:
        raise
    except (ValueError, OSError) as error:
        raise AnchorsError(f"The file {str(path)!r} cannot be read: {error}") from error
    missing = {"text", "label"} - set(frame.columns)
    if missing:
        raise AnchorsError(
            f"The file {str(path)!r} lacks the column{'s' * (len(missing) > 1)} {sorted(missing)}; it has {list(frame.columns)}.",
            "Rename its columns to `text` and `label`.",
        )
    if frame.empty:
        raise AnchorsError(f"The file {str(path)!r} has no rows.", "It needs rows with `text` and `label`.")
    return frame


def _examples(task: Task, frame: pd.DataFrame, where: str) -> tuple[Example, ...]:
    numbers = {label: i for i, label in enumerate(task.labels)} | {str(i): i for i in range(len(task.labels))}
    examples = []
    for row, (text, label) in enumerate(zip(frame["text"], frame["label"], strict=True), start=1):
        key = str(label.item() if isinstance(label, np.generic) else label).strip()
        if key not in numbers:
            raise AnchorsError(
                f"Row {row} of {where} has the label {label!r}, which is not one of {list(task.labels)}.",
                f"Labels are label words or their numbers 0 to {len(task.labels) - 1}; --labels sets the words.",
            )
        if not isinstance(text, str) or not text.strip():
            raise AnchorsError(f"Row {row} of {where} has no text: {text!r}.", "Remove the row.")
        examples.append(Example(text=text, label=numbers[key]))
    return tuple(examples)


def _hub(task: Task) -> tuple[tuple[Example, ...], ...]:
    if task.hub is None:
        raise AnchorsError(f"Task {task.name!r} has no data set on the hub.", "Give --data with a file.")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise AnchorsError(
            "The package `datasets` is not installed.", "pip install 'label-anchors[hub]'"
        ) from error
    hub = task.hub
    parts = []
    for split in (hub.train, hub.test):
        try:
            table: Any = load_dataset(hub.path, hub.name, split=split, revision=hub.revision)
        except Exception as error:
            raise AnchorsError(
                f"The data set {hub.path!r} could not be loaded from the hub: {error}",
                "Check the network, or leave --data out for the built-in set.",
            ) from error
        frame = pd.DataFrame({"text": list(table[hub.text]), "label": list(table[hub.label])})
        parts.append(_examples(task, frame, f"{hub.path}/{split}"))
    return tuple(parts)
