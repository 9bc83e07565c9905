"""What lies under a folder and is no rows of a study: trainings, their curves, times, and tables without their rows.

Nothing here imports torch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from anchors.collection import Results, gather, lying_in
from anchors.errors import AnchorsError
from anchors.study.registry import STUDIES
from anchors.study.results import columns_of, read_rows, read_table
from anchors.summaries import Rows, Tables
from anchors.summaries.training import held_out

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG = ("step", "split", "metric", "bucket", "value")
"""Columns of a training's log; those of curves have `run` and `seed`, too."""
TIMES = ("implementation", "part", "tokens", "ms")


@dataclass(frozen=True)
class Leaving(Results):
    """What a verb leaves that is no study."""

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What is kept with it, and what stands for the name of a model."""
        facts = read_table(self.files[self.kind])[1]
        return facts | {"model": KINDS[self.name].model(facts, self.folder)}

    @cached_property
    def tasks(self) -> list[str]:
        """None: it is of no task."""
        return []

    def sentences(self) -> list[str]:
        """None: it is not judged."""
        return []

    @cached_property
    def rows(self) -> Rows:
        """Its rows, and those of what lies beside it."""
        numeric = [name for name in self.columns if name in ("step", "value", "tokens", "iqr", "ms")]
        read = {name: read_table(file)[0] for name, file in self.files.items()}
        return read | {self.kind: read_rows(self.files[self.kind], self.columns, numeric, {})[0]}

    @cached_property
    def made(self) -> Tables:
        """Its tables."""
        with self.drawable():
            return KINDS[self.name].tables(self.rows)

    def pictures(self) -> "dict[str, Figure | bytes]":
        """The picture that its verb draws."""
        with self.drawable():
            drawn = KINDS[self.name].draw(self.rows, self.facts)
        return {} if drawn is None else {f"{self.stem}.png": drawn}

    def file_of(self, table: str) -> str:
        """All of it stands in its rows."""
        return self.files[self.kind].name


@dataclass(frozen=True)
class Kind:
    """How a `Leaving` is shown.

    Attributes:
        title: what it is, in a line.
        columns: of its rows, by which it is known.
        model: from its facts and its folder to what stands for the name of a model.
        tables, draw: from its rows, and its facts, to tables and a picture.
    """

    title: str
    columns: tuple[str, ...]
    model: Callable[[Mapping[str, Any], Path], str]
    tables: Callable[[Rows], Tables]
    draw: "Callable[[Rows, Mapping[str, Any]], Figure | None]"


def _attention(facts: Mapping[str, Any]) -> str:
    model = facts.get("model")
    return f"{model['attention'] if isinstance(model, dict) and 'attention' in model else 'some'} attention"


def _draw_log(rows: Rows, facts: Mapping[str, Any]) -> "Figure":
    from anchors.figures.nsa_train import draw

    (log,) = rows.values()
    alone = {"run": facts["model"], "seed": 0} if "run" not in log else {}
    return draw({"log": log.assign(**alone)}, "")


def _draw_times(rows: Rows, facts: Mapping[str, Any]) -> "Figure | None":
    from anchors.figures.nsa_bench import draw

    times = next(iter(rows.values()))
    return draw(times, str(times["shape"].iloc[0])) if times["ms"].notna().any() else None


KINDS = {
    "nsa-train": Kind(
        "What a training came to on held-out sequences", LOG,
        lambda facts, folder: f"{folder.parent.name}, {_attention(facts)}",
        lambda rows: {"summary": held_out(rows["log"])}, _draw_log,
    ),
    "nsa-curves": Kind(
        "Trainings beside each other on held-out sequences", (*LOG, "run", "seed"),
        lambda facts, _: ", ".join(dict.fromkeys(map(_attention, dict(facts.get("runs") or {}).values()))) or "several trainings",
        lambda rows: {"summary": held_out(rows["log"])}, _draw_log,
    ),
    "nsa-bench": Kind(
        "Milliseconds of NSA, full attention and their peers", (*TIMES, "direction", "shape", "pattern", "iqr"),
        lambda facts, _: f"attention alone on {facts.get('device')}",
        lambda rows: {name: own.dropna(axis=1, how="all") for name, own in rows.items()}, _draw_times,
    ),
}  # fmt: skip
"""By name."""


def left_in(folder: Path) -> Iterator[Leaving]:
    """What lies in one folder and is known by its columns, whatever it is called; a training also by its place."""
    for path in sorted(folder.glob("*.parquet")):
        try:
            there = set(columns_of(path))
        except AnchorsError:
            continue  # no table at all
        found = [name for name, kind in KINDS.items() if there >= {*kind.columns}]
        if not found or (found == ["nsa-train"] and (folder.name, path.name) != ("training", "log.parquet")):
            continue
        name, files = found[-1], {"log" if "nsa-train" in found else path.stem: path}
        decoding = folder / "nsa-decode.parquet"
        if path.name == "nsa-bench.parquet" and decoding.is_file():
            files["nsa-decode"] = decoding
        stem = "loss" if name == "nsa-train" else path.stem
        mend, kind = f"anchors {name.replace('-', ' ')}", KINDS[name]
        yield Leaving(name, kind.title, folder, stem, files, None, name, mend, kind.columns)


@dataclass(frozen=True)
class TablesAlone(Results):
    """Tables of a study whose rows are not there, as they were written, with the pictures beside them."""

    @property
    def kind(self) -> str:
        """None: there are no rows."""
        return ""

    @cached_property
    def _whole(self) -> dict[str, tuple[pd.DataFrame, dict[str, Any]]]:
        return {name: read_table(file) for name, file in self.files.items()}

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What is kept with the first of them; before 0.5.0 flow through a merge named its suites alone."""
        facts = next(iter(self._whole.values()))[1]
        named = (
            facts.get("model") or ", ".join(map(str, facts.get("suites") or ())) or "a model without a name"
        )
        notes = [
            *(facts.get("notes") or ()),
            "The rows are not there: these are the tables as they were written.",
        ]
        return facts | {"model": named, "notes": notes}

    @cached_property
    def rows(self) -> Rows:
        """None."""
        return {}

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks, or scenarios, of the first table that has any."""
        named = [own[c] for own, _ in self._whole.values() for c in ("task", "scenario") if c in own]
        return [str(task) for task in named[0].unique()] if named else []

    @cached_property
    def made(self) -> Tables:
        """Its tables."""
        return {name: table for name, (table, _) in self._whole.items()}

    def sentences(self) -> list[str]:
        """What the tables say, where all that the sentences look at is there."""
        try:
            return STUDIES[self.figure].say(self.made)
        except (LookupError, ValueError):
            return []

    def pictures(self) -> "dict[str, Figure | bytes]":
        """Those that lie there."""
        return {path.name: path.read_bytes() for path in sorted(self.folder.glob(f"{self.stem}*.png"))}

    def file_of(self, table: str) -> str:
        """The one it was read from."""
        return self.files[table].name


def tables_in(folder: Path) -> Iterator[TablesAlone]:
    """Tables of studies whose rows do not lie in the same folder."""
    for line in STUDIES.values():
        stem = line.stems[line.name]
        if not line.verb or (folder / f"{stem}.parquet").is_file():
            continue
        found = {f"{stem}_": line.tables_in(folder)}
        if line.formerly:
            old = sorted(folder.glob(f"{line.formerly}-*.parquet"))
            found[f"{line.formerly}-"] = [p for p in old if read_table(p)[1].get("kind") == line.name]
        for begin, paths in found.items():
            if paths:
                files = {path.stem.removeprefix(begin): path for path in paths}
                yield TablesAlone(
                    line.folder, line.help.rstrip("."), folder, begin[:-1], files, None, line.name,
                    f"anchors {line.command}",
                )  # fmt: skip


def everything(folders: Iterable[Path]) -> list[Results]:
    """What `anchors.collection.gather` finds, and all that is left beside it.

    Raises:
        AnchorsError: one is no folder.
    """
    return gather(folders, (lying_in, left_in, tables_in))
