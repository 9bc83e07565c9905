"""What every study leaves behind, written once: rows, tables, figures and pages with their provenance. Nothing here imports torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pandas as pd

from anchors.errors import AnchorsError
from anchors.places import titled
from anchors.study.registry import STUDIES, study
from anchors.study.results import key_of, plain, provenance, read_table
from anchors.study.shelf import Shelf, facts_within
from anchors.summaries import Rows, Tables, marked, tables_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from anchors.study.engine import Progress
    from anchors.study.plan import Outlook


@dataclass(frozen=True)
class Report:
    """What a run came to.

    Attributes:
        tables: what the rows come to, see `anchors.summaries`; the main one is `summary`.
        files: what was written.
        notes: what a reader must know before believing the numbers.
        facts: the provenance.
        sentences: what the tables say, see `anchors.summaries.sentences`.
    """

    tables: dict[str, pd.DataFrame]
    files: list[Path]
    notes: list[str]
    facts: dict[str, Any]
    sentences: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The model's name as titles have it."""
        return titled(str(self.facts["model"]))

    def as_json(self) -> dict[str, Any]:
        """The tables as plain data; missing values are null."""
        tables = {name: plain(table) for name, table in self.tables.items()}
        said = {"sentences": self.sentences, "files": [str(f) for f in self.files], "notes": self.notes}
        return tables | said | self.facts


@dataclass(frozen=True)
class Found:
    """What an inquiry found, before anything is written.

    Attributes:
        rows: by kind of study; the main one first, after it what was measured beside it.
        facts: of whom and of what; see `anchors.study.shelf` for `parts`.
        notes: what a reader must know before believing the numbers.
        kept: what the inquiry keeps for its notes and pages.
    """

    rows: Rows
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    kept: Any = None

    def __repr__(self) -> str:
        """What it is, in at most five lines."""
        main, counts = (
            next(iter(self.rows)),
            (f"{kind}: {len(own):,} rows" for kind, own in self.rows.items()),
        )
        return (
            f"Found: {main} by {self.facts.get('model', 'several models')}\n"
            f"  found.rows: {', '.join(counts)}\n"
            f"  found.facts: {', '.join(self.facts)}\n"
            f"  found.notes: {len(self.notes)}\n"
            "  found.tables(): with intervals; found.plot(): the picture"
        )

    def tables(self) -> Tables:
        """What the rows come to, with differences marked that are none."""
        return tabulated(self.rows, self.facts)

    def plot(self) -> "Figure | dict[str, Figure]":
        """The main study's picture, or several by name.

        Raises:
            AnchorsError: it has none.
        """
        return pictured(next(iter(self.rows)), self.tables(), str(self.facts.get("model", "")))


@runtime_checkable
class Inquiry(Protocol):
    """A study with its settings, and the models, prompts or suites that it is of."""

    def measure(self, out: Path, progress: "Progress") -> Found:
        """Measure what `out` does not hold, the models certified (see `anchors.study.engine.carry_out`)."""

    def outlook(self, out: Path) -> "list[Outlook]":
        """What is left to do; nothing is written."""

    def notes_on(self, found: Found, tables: Tables) -> list[str]:
        """What a reader must know before believing the tables."""
        return []

    def kept(self, found: Found) -> list[Path]:
        """Files that measuring left beside the rows, and that are of use by themselves."""
        return []

    def pages(
        self, found: Found, facts: dict[str, Any], *, layers: Sequence[int] | None = None, pages: int = 0
    ) -> dict[str, str]:
        """The pages by what their names have after the study's."""
        return {}


def pictured(kind: str, tables: Tables, model: str) -> "Figure | dict[str, Figure]":
    """The picture of a study's tables, or several by name.

    Raises:
        AnchorsError: it has none.
    """
    from anchors.figures import draw

    if (drawn := draw(kind, tables, model)) is None:
        raise AnchorsError(f"Rows of {kind!r} have no picture.", "Look at their tables.", code="rows")
    return drawn


def conclude(
    inquiry: Inquiry, *, out: Path, progress: "Progress" = lambda done, total: None, **how: Any
) -> Report:
    """Certify, measure, and write rows, tables, figures and pages under `out`.

    Args:
        inquiry: what is measured.
        out: folder of the results.
        progress: called with (units done, units in all).
        how: what `finish` takes.

    Raises:
        CertificateError: a model is not what it came as.
        AnchorsError: whatever preparing and measuring raise.
    """
    return finish(inquiry, inquiry.measure(out, progress), out=out, **how)


def finish(
    inquiry: Inquiry,
    found: Found,
    *,
    out: Path,
    name: str | None = None,
    tables: Callable[[Rows], Tables] | None = None,
    figure: str | None = None,
    files: Mapping[str, str] | None = None,
    csv: bool = False,
    said: Sequence[str] = (),
    **view: Any,
) -> Report:
    """Write what was found: rows, tables, figures and pages.

    Args:
        inquiry, found: what was measured.
        out: folder of the results.
        name: what the files' names begin with; by default as the main study says.
        tables: from rows to tables; by default those of the kinds of rows.
        figure: the study whose picture is drawn; by default the main one.
        files: names of the rows' files by kind; by default as the main study says.
        csv: write the rows as CSV, too.
        said: notes to keep before those on the results.
        view: what the inquiry's pages show.
    """
    main = next(iter(found.rows))
    named = study(main).stems if files is None else files
    name = name or named[main]
    made = tabulated(found.rows, found.facts, tables)
    facts = provenance(**found.facts, notes=[*said, *found.notes, *inquiry.notes_on(found, made)])
    rows = {named.get(kind, f"{name}_{kind}_rows"): own for kind, own in found.rows.items()}
    pages = inquiry.pages(found, facts, **view)
    done = leave(out, name, facts, made, figure or main, rows=rows, pages=pages, csv=csv)
    said = spoken(found.rows, made | near(out, main, facts), whole=tables is None)
    return replace(done, sentences=said, files=[*done.files, *inquiry.kept(found)])


def spoken(rows: Rows, made: Tables, *, whole: bool) -> list[str]:
    """What results say.

    Args:
        rows: by kind.
        made: tables of the first kind.
        whole: whether that is all there is to say; else every kind speaks for itself, from tables of its own.
    """
    if whole:
        return study(next(iter(rows))).say(made)
    lines = {kind: STUDIES[kind] for kind in rows if kind in STUDIES and STUDIES[kind].sentences}
    return [told for kind, line in lines.items() for told in line.say(line.tabulate(rows[kind]))]


def near(out: Path, name: str, facts: Mapping[str, Any]) -> Tables:
    """The tables of the study that another one's sentences look at, by `<its name>_<table>`: those beside its results, of the
    same model, tasks and data; none where there are none."""
    if not study(name).near:
        return {}
    other = study(study(name).near)

    def asked(told: Mapping[str, Any]) -> set[str]:
        same = ("task", "data", "shots", "control", "model", "precision")
        return {key_of({k: part.get(k) for k in same}) for part in told.get("parts") or ()}

    stem, place = other.stems[other.name], out.parent / other.folder
    for folder in sorted({place, *(path.parent for path in place.glob(f"*/{stem}.parquet"))}):
        told = facts_within(folder / f"{stem}.parquet")
        if told and asked(facts) and asked(facts) <= asked(told):
            return {
                f"{other.name}_{path.stem.removeprefix(f'{stem}_')}": read_table(path)[0]
                for path in other.tables_in(folder)
            }
    return {}


def tabulated(rows: Rows, facts: Mapping[str, Any], tables: Callable[[Rows], Tables] | None = None) -> Tables:
    """What rows come to, with differences marked that are none."""
    made = tables_of(rows, facts) if tables is None else tables(rows)
    return marked(made, rows, facts.get("arithmetic_error"))


def leave(
    out: Path,
    name: str,
    facts: dict[str, Any],
    tables: Tables,
    figure: str,
    *,
    rows: Rows | None = None,
    pages: Mapping[str, str] | None = None,
    csv: bool = False,
) -> Report:
    """Write files whose names begin with `name`.

    Where results of something else lie there under the same names, these stand beside them, see `anchors.study.shelf`.

    Args:
        out: folder of the results.
        name: what names of files begin with, all but those of rows.
        facts: the provenance.
        tables: by what the files' names have after `name`.
        figure: the study whose picture is drawn of them.
        rows: by name of file.
        pages: likewise after `name`; None leaves those of the same results where they are.
        csv: write the rows as CSV, too.
    """
    from anchors.figures import draw

    shelf, drawn = Shelf(out, name, whole=pages is not None), draw(figure, tables, facts["model"])
    for key, table in (rows or {}).items():
        shelf.table(key, table, csv=csv)
    for key, table in tables.items():
        if f"{name}_{key}" not in (rows or {}):
            shelf.table(f"{name}_{key}", table)
    for key, picture in (drawn if isinstance(drawn, dict) else {"": drawn}).items():
        shelf.figure(f"{name}_{key}".rstrip("_"), picture)
    for key, page in (pages or {}).items():
        shelf.page(f"{name}_{key}".rstrip("_"), page)
    files, moved = shelf.write(facts)
    return Report(tables, files, [*facts.get("notes", ()), *moved], facts)
