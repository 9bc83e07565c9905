"""The files of one report, written together: which results may take the place of which.

Every table carries its facts, and these say of which model, task and settings it is (the report's parts), how much of it there
is (seeds, examples), and which files were written with it. Results take the place of others only if these are contained in
them: the same command again, more prompts, more seeds, more tasks. All others stand beside them, in a folder of their own that is
named by model and run, and that is said; nothing is replaced or moved.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from anchors.errors import AnchorsError, parsed
from anchors.study.results import facts_text, key_of, write_atomic, write_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AMOUNTS = ("seeds", "examples", "grid", "called")
"""Of a part: how much was measured, and under which names of its task. Everything else says what."""
PASSING = (
    "versions", "platform", "command", "written", "notes", "files", "device", "revision", "arithmetic_error",
)  # fmt: skip
"""Facts that say nothing of what was measured."""
_OURS = (".parquet", ".json", ".csv", ".png", ".pdf", ".html")


@dataclass
class Shelf:
    """Files that are gathered, and then written where nothing else is lost by it.

    Attributes:
        out: the folder.
        name: what their names begin with.
        whole: whether all that the study writes is written now, so that a page that is not is out of date.
    """

    out: Path
    name: str
    whole: bool = False
    _writers: dict[str, Callable[[Path, dict[str, Any]], object]] = field(default_factory=dict)

    def table(self, name: str, rows: pd.DataFrame, *, csv: bool = False) -> None:
        """A table as parquet with its facts beside it, and as CSV, too, where that is wanted."""
        self._writers[f"{name}.parquet"] = lambda path, facts: write_table(path, rows, facts)
        if csv:
            self._writers[f"{name}.csv"] = lambda path, _: write_atomic(
                path, lambda draft: rows.to_csv(draft, index=False)
            )

    def figure(self, name: str, drawn: "Figure | None") -> None:
        """A figure as PNG and PDF; None is no figure."""
        if drawn is not None:
            from anchors.figures.style import settle, write_figure

            box = settle(drawn)
            for suffix in (".png", ".pdf"):
                self._writers[name + suffix] = lambda path, facts: write_figure(
                    drawn, path, described(facts), box=box
                )

    def page(self, name: str, html: str) -> None:
        """A page."""
        self._writers[f"{name}.html"] = lambda path, _: write_atomic(
            path, lambda draft: draft.write_text(html, encoding="utf-8")
        )

    def write(self, facts: dict[str, Any]) -> tuple[list[Path], list[str]]:
        """Write where nothing else is lost by it.

        Args:
            facts: of the report, with its parts.

        Returns:
            The files (without the facts beside them), and where they stand if not in the folder itself, in words.

        Raises:
            AnchorsError: the folder beside others cannot be made or is a link.
        """
        names = list(self._writers)
        names += [Path(name).with_suffix(".json").name for name in names if name.endswith(".parquet")]
        place, room = next(
            (place, room)
            for place in _places(self.out, facts)
            if (room := room_in(place, self.name, names, facts)) is not None
        )
        gone = {
            file
            for file in room.rest
            if (room.old or (self.whole and file.endswith(".html"))) and _ours(file, self.name)
        }
        facts = facts | {"files": sorted({*names, *room.rest} - gone)}
        for name, write in self._writers.items():
            write(place / name, facts)
        for file in gone:
            (place / file).unlink(missing_ok=True)
        said = (
            []
            if place == self.out
            else [f"{str(self.out)!r} holds other results: these stand beside them in {str(place)!r}."]
        )
        return [place / name for name in self._writers], said


def described(facts: dict[str, Any]) -> str:
    """Of what a figure is, in a line that is kept in its file."""
    said = (facts.get("model"), facts.get("fingerprint"), f"report {key_of(parts_of(facts))}")
    return ", ".join(str(x) for x in said if x)


def parts_of(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured, and of each how much: by a key of the one, the other."""
    found: dict[str, dict[str, Any]] = {}
    for part in facts.get("parts") or [{k: v for k, v in facts.items() if k not in PASSING}]:
        what = {k: v for k, v in part.items() if k not in (*AMOUNTS, "data_source", "read")}
        key = key_of(json.loads(json.dumps(what, default=str)))
        names = [*found.get(key, {}).get("called", ()), *part.get("called", ())]
        found[key] = {k: part[k] for k in AMOUNTS if k in part} | ({"called": names} if names else {})
    return found


def contained(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether all that one report is of stands in another, too: no less of it, under the same names where both say them, and of
    nothing else."""
    mine, theirs = parts_of(new), parts_of(old)

    def fits(amount: Any, most: Any) -> bool:
        if isinstance(amount, list) and isinstance(most, list):
            return set(map(str, amount)) <= set(map(str, most))
        return amount <= most if isinstance(amount, int) and isinstance(most, int) else amount == most

    return all(
        key in mine
        and all(fits(amount, ({"called": amount} | mine[key]).get(name)) for name, amount in own.items())
        for key, own in theirs.items()
    )


class Room(NamedTuple):
    """A folder in which a report can be written.

    Attributes:
        rest: files of what it takes the place of that are not written again.
        old: whether that is of fewer prompts, so that the rest is out of date.
    """

    rest: list[str]
    old: bool


def room_in(out: Path, name: str, names: list[str], facts: dict[str, Any]) -> Room | None:
    """Whether files of these names replace nothing but the same results, or less of them.

    Args:
        out: the folder.
        name: what the names begin with.
        names: of the files that will be written.
        facts: of the report that they are of.

    Returns:
        None where something else would be replaced.
    """
    there = {p.name for p in out.iterdir() if p.is_file() or p.is_symlink()} if out.is_dir() else set()
    rest: set[str] = set()
    taken: set[str] = set()
    old = False
    for told, files, sure in _reports(out, name, there):
        own = set(files) - taken
        taken |= own
        if not own & set(names):
            continue
        fewer = not contained(facts, told)
        if not contained(told, facts) or (fewer and not sure and own - set(names)):
            return None
        old |= fewer
        rest |= own - set(names)
    return None if (there - taken) & set(names) else Room(sorted(rest), old)


def _places(out: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """The folder, and in it those that bear the name of model and run."""
    yield out
    for count in itertools.count(1):
        folder = out / (run_name(facts) + (f"-{count}" if count > 1 else ""))
        if folder.is_symlink():
            raise AnchorsError(
                f"{str(folder)!r} is a link.", "Remove it, or choose another --out.", code="outside"
            )
        yield folder


def run_name(facts: Mapping[str, Any]) -> str:
    """Of model and run, as a folder: `gpt2-60x5-float32-1a2b3c4d`; examples × seeds and precision where they are known."""
    part = (facts.get("parts") or [{}])[0]
    amount = (
        f"{part['examples']}x{len(part['seeds'])}"
        if isinstance(part.get("seeds"), list) and "examples" in part
        else ""
    )
    model = re.sub(r"[^\w.-]+", "-", Path(str(facts.get("model", ""))).name).strip("-.")[:60]
    said = (model, amount, str(facts.get("precision") or ""), key_of(parts_of(dict(facts)))[:8])
    return "-".join(x for x in said if x)


def _reports(out: Path, name: str, there: set[str]) -> list[tuple[dict[str, Any], list[str], bool]]:
    """The reports in a folder: the facts of each, its files, and whether it says itself which these are.

    Tables from before they named the files written with them are of one report where their parts are the same. Pictures,
    pages and CSV files say nothing of themselves: those that begin with `name` are taken to belong to such a table of this
    name.
    """
    found: dict[str, tuple[dict[str, Any], set[str], bool]] = {}
    nameless: list[str] = []
    for file in sorted(there):
        alone = file.endswith(".parquet") and f"{Path(file).stem}.json" not in there
        beside = file.endswith(".json") and facts_beside(out / file)
        if facts := facts_within(out / file) if alone else beside:
            files = facts.get("files")
            whole = isinstance(files, list) and all(isinstance(f, str) for f in files)
            key = key_of({"parts": parts_of(facts), "whole": whole})
            own = files if whole else [file, f"{Path(file).stem}.parquet", f"{Path(file).stem}.csv"]
            found.setdefault(key, (facts, set(), whole))[1].update(own)
            nameless += [key] if not whole and _begins(file, name) else []
    if nameless:
        known = {file for _, files, _ in found.values() for file in files}
        found[nameless[0]][1].update(f for f in there - known if _ours(f, name))
    return [(facts, sorted(files & there), whole) for facts, files, whole in found.values()]


def require_unread(out: Path, names: Iterable[str], sources: Iterable[str]) -> None:
    """Refuse results among whose files one that is read lies: it could be taken for one of them.

    Args:
        out: the folder.
        names: what names of files begin with.
        sources: what is read; what is no file is no matter.

    Raises:
        AnchorsError: names the file.
    """
    for source in sources:
        path = Path(source).expanduser()
        ours = any(_ours(path.name, name) for name in names)
        if ours and path.is_file() and path.resolve().parent == out.expanduser().resolve():
            raise AnchorsError(
                f"{source!r}, which is read, lies among the results and has the name of one of them.",
                "Choose another --out, or give the file another name.",
                code="would-overwrite",
            )


def _ours(file: str, name: str) -> bool:
    return _begins(file, name) and Path(file).suffix in _OURS


def _begins(file: str, name: str) -> bool:
    return re.fullmatch(rf"{re.escape(name)}([_-].*)?", Path(file).stem) is not None


def facts_beside(path: Path) -> dict[str, Any] | None:
    """What stands beside a table; None for any other file."""
    try:
        return _told(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def facts_within(path: Path) -> dict[str, Any] | None:
    """What a table says of itself; None for any other file."""
    try:
        return _told(facts_text(path) or b"null")
    except (OSError, ValueError):
        return None


def _told(text: str | bytes) -> dict[str, Any] | None:
    found = parsed(text)
    return found if isinstance(found, dict) and {"versions", "command", "written"} <= set(found) else None
