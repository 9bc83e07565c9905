"""All that was measured under a folder as one page (HTML) and one text (Markdown): from rows and tables alone, without a
model and without torch."""

import base64
import html
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined

from anchors.collection import Results, amount
from anchors.errors import AnchorsError
from anchors.figures.style import write_figure
from anchors.places import require_file, told_apart
from anchors.study.registry import STUDIES
from anchors.study.results import write_atomic

MOST = 60
"""Rows of a table that are shown; the others stand in its file."""
MARK = "label-anchors report"
"""By which a report of ours is known."""
MAIN = ("value", "mean", "correlation", "regret", "actual")
"""Columns whose bounds are called low and high."""


@dataclass(frozen=True)
class Section:
    """One experiment or study of one model.

    Attributes:
        results: what it is of.
        sentences: what its tables say.
        legend: names of conditions, explained.
        tables: by name, as text; and how many rows each has in all.
        figures: PNG by name of the file they have beside the rows.
    """

    results: Results
    sentences: list[str]
    legend: list[str]
    tables: dict[str, tuple[list[str], list[list[str]], int]]
    figures: dict[str, bytes]

    @property
    def title(self) -> str:
        """What it is, and of which tasks."""
        own = self.results
        name = f"{own.name} on {', '.join(own.tasks)}" if own.tasks else own.name
        return f"{name}: {own.title}" if own.title != own.name else name

    @property
    def model(self) -> str:
        """Its name, whole."""
        return self.results.facts["model"]

    def where(self, folder: Path) -> str:
        """Its folder, as seen from one."""
        return os.path.relpath(self.results.folder, folder)

    def counted(self, name: str) -> str:
        """How many rows of a table are shown."""
        _, rows, total = self.tables[name]
        some = f"the first {len(rows)} of {total} rows; all of them are in {self.results.file_of(name)}"
        return f"{total} row{'s' * (total != 1)}" if len(rows) == total else some

    def about(self) -> list[tuple[str, str]]:
        """What it is of, and how it came to be, as names and values."""
        facts = self.results.facts
        known = [
            ("model", self.model), ("revision", facts.get("revision")), ("fingerprint", facts.get("fingerprint")),
            ("precision", facts.get("precision")), ("tasks", ", ".join(self.results.tasks)),
            ("examples × seeds", amount(facts)), ("asked", _asked(facts)), ("device", facts.get("device")),
            ("arithmetic error", facts.get("arithmetic_error")), ("written", facts.get("written")),
            ("platform", facts.get("platform")),
            ("versions", ", ".join(f"{k} {v}" for k, v in dict(facts.get("versions") or {}).items())),
            *(("note", note) for note in facts.get("notes") or ()),
        ]  # fmt: skip
        return [(name, str(value)) for name, value in known if value not in (None, "")]


def section(results: Results) -> Section:
    """Tables, sentences and pictures of what lies in a folder.

    Raises:
        AnchorsError: its rows cannot be read, or do not hold what is shown.
    """
    tables, drawn = results.made, results.pictures()
    with results.drawable():
        sentences = results.sentences()
    pictures: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, figure in drawn.items():
            if not isinstance(figure, bytes):
                write_figure(figure, path := Path(folder) / name)
                figure = path.read_bytes()
            pictures[name] = figure
    legend = STUDIES[results.kind].legend(tables) if results.kind in STUDIES else []
    shown = {name: (*as_text(table.head(MOST)), len(table)) for name, table in tables.items()}
    return Section(results, sentences, legend, shown, pictures)


def as_text(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Names of columns and cells, an estimate and its interval in one cell."""
    merged = {}
    for name in table.columns:
        ends = [f"{name}_low", f"{name}_high"]
        if not set(ends) <= set(table.columns) and {"low", "high"} <= set(table.columns):
            ends = ["low", "high"] if name in MAIN else ends
        if set(ends) <= set(table.columns):
            merged[name] = ends
    gone = {end for ends in merged.values() for end in ends}
    names = [str(name) for name in table.columns if name not in gone]
    cells = [
        [_spanned(row[n], *(row[end] for end in merged.get(n, ()))) for n in names]
        for row in table.astype(object).where(table.notna(), float("nan")).to_dict("records")
    ]
    return names, cells


def _spanned(value: Any, *ends: Any) -> str:
    between = ", ".join(filter(None, map(_cell, ends)))
    return _cell(value) + (f" [{between}]" if between else "")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)


def _asked(facts: dict[str, Any]) -> str:
    """Templates, labels and data of the parts, each once."""
    found = []
    for part in facts.get("parts") or ():
        task = part.get("task") if isinstance(part, dict) else None
        if isinstance(task, dict):
            told = f"{json.dumps(task.get('template'), ensure_ascii=False)} with {', '.join(map(str, task.get('labels') or ()))}"
            shots = f"{part.get('shots')} per class" + (
                f", {part['control']}" if part.get("control") != "none" else ""
            )
            found.append(f"{told} ({shots}; data: {part.get('data_source')})")
    return "; ".join(dict.fromkeys(found))


def write_booklet(folder: Path, found: Sequence[Results], to: Path) -> tuple[list[Path], list[str]]:
    """Write `report.html` and `report.md`.

    Args:
        folder: whose results these are.
        found: see `anchors.leavings.everything`.
        to: the folder of both files.

    Returns:
        The files, and what was left out, in words.

    Raises:
        AnchorsError: nothing to report; a file of these names that is no report of ours; the folder cannot be written.
    """
    sections: list[Section] = []
    left: list[str] = []
    for results in found:
        try:
            sections.append(section(results))
        except AnchorsError as error:
            left.append(f"{results.name} in {str(results.folder)!r} is left out: {error.message}")
    if not sections:
        raise AnchorsError(
            f"{str(folder)!r} holds no rows of any experiment or study."
            + "".join(f" {told}" for told in left),
            "Measure something first, for example with `anchors flow`.",
            code="rows",
        )
    written = [to / "report.html", to / "report.md"]
    texts = [as_html(folder, sections, left), as_markdown(folder, sections, left, to)]
    for path in written:
        _require_ours(path)
    for path, text in zip(written, texts, strict=True):
        write_atomic(path, lambda draft, text=text: draft.write_text(text, encoding="utf-8"))
    return written, left


def _require_ours(path: Path) -> None:
    require_file(path)
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:400]:
        raise AnchorsError(
            f"{str(path)!r} is no report of this toolkit and would be replaced.",
            "Move it, or choose another --out.",
            code="would-overwrite",
        )


def _commands(sections: Iterable[Section]) -> list[str]:
    return list(
        dict.fromkeys(str(s.results.facts["command"]) for s in sections if s.results.facts.get("command"))
    )


def _models(sections: Iterable[Section]) -> list[str]:
    return list(dict.fromkeys(s.model for s in sections))


def as_html(folder: Path, sections: Sequence[Section], left: Sequence[str] = ()) -> str:
    """One page that needs no other file, no script and no network."""
    page = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    page.filters["data_url"] = _data_url
    return page.from_string(files("anchors.viewer").joinpath("report.html").read_text(encoding="utf-8")).render(
        mark=MARK, title=f"What was measured in {folder.resolve().name}", folder=folder, sections=sections, left=left,
        models=_models(sections), commands=_commands(sections), titles=told_apart(_models(sections)),
    )  # fmt: skip


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def as_markdown(folder: Path, sections: Sequence[Section], left: Sequence[str], to: Path) -> str:
    """The same as text; a picture that lies beside the rows is linked, any other stands in the text."""
    out = [f"<!-- {MARK} -->", f"# {_plain(f'What was measured in {folder.resolve().name}')}", ""]
    out += [
        f"Models: {_plain(', '.join(_models(sections)))}.",
        "",
        *(f"{_plain(told)}\n" for told in left),
        "## To repeat it",
        "",
    ]
    out += [*_fenced("\n".join(_commands(sections))), ""]
    titles = told_apart(_models(sections))
    for s in sections:
        out += [f"## {_plain(s.title)}", "", f"{_plain(titles[s.model])}, in {_plain(s.where(folder))}", ""]
        out += [f"> {_plain(told)}\n" for told in s.sentences]
        for name, png in s.figures.items():
            file = s.results.folder / name
            source = f"<{Path(os.path.relpath(file, to)).as_posix()}>" if file.is_file() else _data_url(png)
            out += [f"![{_plain(s.title)}]({source})", ""]
        for name, (columns, rows, _) in s.tables.items():
            out += [
                f"**{_plain(name)}**: {s.counted(name)}",
                "",
                _row(columns),
                _row(["---"] * len(columns)),
            ]
            out += [*map(_row, rows), ""]
        out += [*(f"- {_plain(told)}" for told in s.legend), ""] if s.legend else []
        out += [*(f"- {name}: {_plain(value)}" for name, value in s.about()), ""]
    return "\n".join(out)


def _row(cells: Iterable[str]) -> str:
    cells = list(cells)
    return "| " + " | ".join(cells if set(cells) == {"---"} else map(_plain, cells)) + " |"


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing else, on one line."""
    safe = html.escape(" ".join(text.split()), quote=False)
    return "".join("\\" + c if c in r"\`*_{}[]#|~$!" else c for c in safe)


def _fenced(text: str) -> list[str]:
    """A block of code whose fence is longer than any in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence + "bash", text, fence]
