"""Labelled text: built in, from local files, or from the hub."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

from anchors._names import forwarding
from anchors.errors import AnchorsError
from anchors.tasks.files import READERS, Row, row, rows
from anchors.tasks.task import TASKS, Task

SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "dev")}


@dataclass(frozen=True)
class Example:
    """One labelled text; `label` indexes the task's label words."""

    text: str
    label: int


@dataclass(frozen=True)
class Facts:
    """What was read, for comparison with what was meant.

    Attributes:
        files: name and rows of each file.
        train, test: examples by label word.
        repeated: test examples whose text stands among the training texts, too.
        contradictory: texts that stand under two labels or more.
        alike: labels, as written, that differ only in case or in white space around them; see `hint`.
    """

    files: tuple[tuple[str, int], ...]
    train: dict[str, int]
    test: dict[str, int]
    repeated: int
    contradictory: int
    alike: tuple[tuple[str, ...], ...] = ()

    def read(self) -> str:
        """Which files, how many rows, and how many of each class, in a line."""

        def part(counts: dict[str, int]) -> str:
            each = ", ".join(f"{label} {count}" for label, count in counts.items())
            return f"{sum(counts.values())} ({each})"

        named = ", ".join(f"{count} rows of {name}" for name, count in self.files)
        return f"{named or 'rows'}: train {part(self.train)}, test {part(self.test)}"

    def hint(self) -> str | None:
        """Labels that look like slips of the pen, and how they were read; None where there are none."""
        said = []
        for group in self.alike:
            named = " and ".join(map(repr, group))
            if len(classes := {label.strip() for label in group}) > 1:
                said.append(f"the labels {named} differ only in case: they are {len(classes)} classes")
            else:
                said.append(f"the labels {named} differ only in white space: they are one class")
        return f"{'; '.join(said)}." if said else None

    def caution(self) -> str | None:
        """What repeats, and what is done about it; None where nothing does."""
        said = []
        if self.repeated:
            said.append(f"{self.repeated} test texts stand among the training texts, too")
        if self.contradictory:
            said.append(f"{self.contradictory} texts stand under two labels")
        if not said:
            return None
        return (
            f"{'; '.join(said)}: no prompt shows its own text or a text under two labels as a demonstration."
        )


@dataclass(frozen=True)
class Data:
    """Demonstrations are drawn from `train`, queries from `test`.

    Attributes:
        source: where it came from, as the user would name it.
        files: name and rows of each file that was read.
        written: its labels, each as it is written there once.
        fingerprint: hash over all texts and labels of both parts, in order.
    """

    train: tuple[Example, ...]
    test: tuple[Example, ...]
    source: str
    files: tuple[tuple[str, int], ...] = ()
    written: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(json.dumps([(e.text, e.label) for e in part]).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def train_by_class(self) -> dict[int, list[Example]]:
        """What may be shown: training examples of each class, in order, each text once, without texts under two labels there."""
        twice = contradictory(self.train)
        found: dict[int, list[Example]] = {}
        for example in dict.fromkeys(self.train):
            if example.text not in twice:
                found.setdefault(example.label, []).append(example)
        return found

    @cached_property
    def repeated(self) -> frozenset[str]:
        """Texts that stand in both parts: no prompt that asks about one shows it."""
        return frozenset(e.text for e in self.test) & {e.text for e in self.train}

    @cached_property
    def left_out(self) -> int:
        """Training examples that some prompt or all may not show."""
        free = sum(e.text not in self.repeated for pool in self.train_by_class.values() for e in pool)
        return len(self.train) - free

    def facts(self, task: Task) -> Facts:
        """What was read; `task` names the classes."""

        def counts(part: Sequence[Example]) -> dict[str, int]:
            found = Counter(e.label for e in part)
            return {label: found[i] for i, label in enumerate(task.labels)}

        return Facts(
            files=self.files,
            train=counts(self.train),
            test=counts(self.test),
            repeated=sum(e.text in self.repeated for e in self.test),
            contradictory=len(contradictory((*self.train, *self.test))),
            alike=alike(self.written, task.labels),
        )


def contradictory(examples: Iterable[Example]) -> set[str]:
    """Texts that stand under more than one label."""
    labels = defaultdict(set)
    for example in examples:
        labels[example.text].add(example.label)
    return {text for text, found in labels.items() if len(found) > 1}


def alike(written: Iterable[str], words: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Labels of which several are the same but for case and white space around them.

    Args:
        written: as the data have them.
        words: the label words; those that only they have count where case makes another word of them.
    """
    there = set(written)
    groups: dict[str, set[str]] = defaultdict(set)
    for label in {*there, *(word for word in words if word not in {label.strip() for label in there})}:
        groups[label.strip().casefold()].add(label)
    return tuple(tuple(sorted(group)) for _, group in sorted(groups.items()) if len(group) > 1)


def read(task: Task, source: str | None = None, *, test_share: float = 0.3) -> Data:
    """The data of a task.

    A label is a label word or the number of one. Where all labels are words, they are read as words, even if they
    look like numbers (`1` and `0`, stars `1` to `5`); where some are not, a label that is a word and also the number
    of another one is refused.

    Args:
        task: gives the label words, which name or number the classes.
        source: None or `builtin` for the set that comes with the toolkit; `hub` for the task's pinned data set; a
            file (JSON lines, JSON, CSV, TSV, parquet) with columns `text` and `label`, see `anchors.tasks.files.rows`;
            or a directory with a `train` and a `test` file, itself or in a subdirectory named like the task.
        test_share: a single file is split by a hash of each text, this share of it becoming the test part, so that
            adding rows moves no other row.

    Raises:
        AnchorsError: nothing there, missing columns, an unknown label, an empty file, a class without examples.
    """
    if source in (None, "builtin"):
        if task.name not in TASKS:
            raise AnchorsError(
                f"Task {task.name!r} has no built-in data.",
                "Give --data with a file or a directory.",
                code="data-missing",
            )
        if task.labels != TASKS[task.name].labels:
            raise AnchorsError(
                f"The built-in data of {task.name!r} is labelled {list(TASKS[task.name].labels)}, not {list(task.labels)}.",
                "Give --data with a file whose labels are numbers or the new label words.",
                code="data-label",
            )
        name = "builtin"
        parts = [_builtin(f"{task.name}.{part}.jsonl") for part in SPLITS]
    elif source == "hub":
        name = f"{task.hub.path}@{task.hub.revision[:12]}" if task.hub else "hub"
        parts = _hub(task)
    else:
        path, name = Path(source).expanduser(), str(source)
        if path.is_dir():
            parts = [_Part(found.name, rows(found)) for found in _parts(path, task.name)]
        elif path.is_file():
            parts = [_Part(path.name, rows(path))]
        else:
            raise AnchorsError(
                f"The data {source!r} does not exist.",
                "Give `hub`, `builtin`, a file or a directory.",
                code="data-missing",
            )
    # The classes of a hub's data set are numbers by its own features, whatever the words.
    read_as = _classes(task.labels if source != "hub" else (), len(task.labels), parts)
    train, test = (
        [_examples(task, part, read_as) for part in parts]
        if len(parts) == 2
        else _split(_examples(task, parts[0], read_as), test_share)
    )
    for part, examples in (("train", train), ("test", test)):
        if not examples:
            raise AnchorsError(
                f"The {part} part of {name!r} is empty.", "Give more examples.", code="too-few"
            )
    lacking = [label for i, label in enumerate(task.labels) if all(e.label != i for e in train)]
    if lacking:
        raise AnchorsError(
            f"No training example of {name!r} is labelled {lacking}.",
            "Each demonstration set needs every class; add examples or leave the label out.",
            code="too-few",
        )
    return Data(
        train,
        test,
        name,
        tuple((part.name, len(part.rows)) for part in parts),
        tuple(dict.fromkeys(each.label for part in parts for each in part.rows)),
    )


class _Part(NamedTuple):
    name: str
    rows: list[Row]


def _builtin(name: str) -> _Part:
    with as_file(files("anchors.tasks.builtin").joinpath(name)) as path:
        return _Part(name, rows(path))


def _parts(folder: Path, task: str) -> list[Path]:
    """The train and the test file of a directory: both in its subdirectory named like the task, or both in itself."""
    for place in (folder / task, folder):
        found = {
            part: next(filter(None, (_sole(place, stem) for stem in stems)), None)
            for part, stems in SPLITS.items()
        }
        if any(found.values()):
            break
    for part, path in found.items():
        if path is None:
            raise AnchorsError(
                f"{str(folder)!r} holds no {part} file, neither itself nor in a subdirectory {task!r}.",
                f"Looked for {' or '.join(SPLITS[part])} with one of {', '.join(READERS)}, both parts in one place.",
                code="data-missing",
            )
    return [path for path in found.values() if path is not None]


def _sole(place: Path, stem: str) -> Path | None:
    """The one file of a name, whatever its format."""
    found = [path for suffix in READERS if (path := place / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise AnchorsError(
            f"{str(place)!r} holds {' and '.join(path.name for path in found)}: which of them is meant is open.",
            "Keep one of them there, or give a file.",
            code="data-file",
        )
    return found[0] if found else None


def _classes(labels: Sequence[str], count: int, parts: Sequence[_Part]) -> dict[str, int]:
    """The class of every label that occurs: of a label word where all labels are words, otherwise of a word or number.

    Raises:
        AnchorsError: a label that is neither; one that is both, of two classes, beside labels that are no words.
    """
    words = {label: i for i, label in enumerate(labels)}
    numbers = {str(i): i for i in range(count)}
    seen: dict[str, str] = {}
    for part in parts:
        for each in part.rows:
            seen.setdefault(each.label.strip(), f"{each.place} of {part.name}")
    for label, place in seen.items():
        if label not in words and label not in numbers:
            near = [word for word in words if word.casefold() == label.casefold()]
            raise AnchorsError(
                f"{place} has the label {label!r}, which is not one of {list(labels)}.",
                (f"It differs from {near[0]!r} only in case: write both alike. " if near else "")
                + f"Labels are label words or their numbers 0 to {count - 1}; --template and --labels make a task of your own.",
                code="data-label",
            )
    if no_words := [label for label in seen if label not in words]:
        for label in seen.keys() & words.keys() & numbers.keys():
            if words[label] != numbers[label]:
                raise AnchorsError(
                    f"{seen[label]} has the label {label!r}: as a label word it is class {words[label]}, as the number "
                    f"of a label word it is {labels[numbers[label]]!r}. That some labels are numbers is "
                    f"shown by {no_words[0]!r}, which is no label word ({seen[no_words[0]]}).",
                    "Write label words only, or number label words that are no numbers themselves.",
                    code="data-label",
                )
    return numbers | words


def _examples(task: Task, part: _Part, read_as: dict[str, int]) -> tuple[Example, ...]:
    examples = []
    for each in part.rows:
        if each.others and all(label.strip() in read_as for label in each.others):
            raise AnchorsError(
                f"{each.place} of {part.name} opens a text of several lines by a quotation mark, but its lines would be "
                "rows of their own: one text may begin with that mark and a later one end with another.",
                'Quote such texts as a whole, with the marks in them doubled ("""So", she said), or write JSON lines.',
                code="data-row",
            )
        if not each.text.strip():
            raise AnchorsError(
                f"{each.place} of {part.name} has no text: {each.text!r}.", "Remove the row.", code="data-row"
            )
        examples.append(Example(each.text, read_as[each.label.strip()]))
    return tuple(examples)


def _split(examples: Sequence[Example], test_share: float) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Train and test by a hash of each text."""
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        share = int(hashlib.sha256(example.text.encode()).hexdigest()[:8], 16) / 16**8
        parts[share < test_share].append(example)
    return tuple(parts[0]), tuple(parts[1])


def _hub(task: Task) -> list[_Part]:
    if task.hub is None:
        raise AnchorsError(
            f"Task {task.name!r} has no data set on the hub.", "Give --data with a file.", code="data-missing"
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise AnchorsError(
            "The package `datasets` is not installed.", "pip install 'label-anchors[hub]'", code="package"
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
                code="data-missing",
            ) from error
        where = f"{hub.path}/{split}"
        pairs = zip(list(table[hub.text]), list(table[hub.label]), strict=True)
        parts.append(_Part(where, [row(*pair, f"Row {n}", where) for n, pair in enumerate(pairs, start=1)]))
    return parts


__getattr__ = forwarding(__name__)
