"""All that was measured under a folder as one page (HTML) and one text (Markdown): from rows alone, without a model and without
torch."""

import base64
import html
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from anchors.collection import Results, amount, tasks_of
from anchors.errors import AnchorsError
from anchors.figures import draw
from anchors.figures.style import write_figure
from anchors.places import require_file
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
        own = self.results
        return f"{own.name}: {own.title}" if own.title != own.name else own.name

    @property
    def model(self) -> str:
        return self.results.facts["model"]

    def about(self) -> list[tuple[str, str]]:
        """What it is of, and how it came to be, as names and values."""
        facts = self.results.facts
        known = [
            ("model", self.model), ("revision", facts.get("revision")), ("fingerprint", facts.get("fingerprint")),
            ("precision", facts.get("precision")), ("tasks", ", ".join(tasks_of(self.results.rows))),
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
    tables = results.made
    with results.drawable():
        drawn = draw(results.figure, tables, results.facts["model"])
        sentences = results.sentences()
    named = drawn if isinstance(drawn, dict) else {"": drawn}
    pictures: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, figure in named.items():
            if figure is not None:
                path = Path(folder) / f"{results.stem}_{key}".rstrip("_")
                write_figure(figure, path := path.with_name(path.name + ".png"))
                pictures[path.name] = path.read_bytes()
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
        found: see `anchors.collection.gather`.
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
    files = [to / "report.html", to / "report.md"]
    texts = [as_html(folder, sections, left), as_markdown(folder, sections, left, to)]
    for path in files:
        _require_ours(path)
    for path, text in zip(files, texts, strict=True):
        write_atomic(path, lambda draft, text=text: draft.write_text(text, encoding="utf-8"))
    return files, left


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


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h2{margin-top:2.2em;border-top:1px solid #ccc;padding-top:.7em;overflow-wrap:anywhere}
h1,h3,dd,li,p{overflow-wrap:anywhere}
img{max-width:100%;height:auto}
.table{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.15em .7em .15em 0;text-align:left;border-bottom:1px solid #eee;white-space:pre-wrap}
pre{background:#f4f4f4;padding:.7em;white-space:pre-wrap;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1em 1em;font-size:13px}dd{margin:0}
.said{border-left:3px solid #0072B2;padding-left:.8em}
@media print{details{display:block}h2{break-before:page}}
"""


def as_html(folder: Path, sections: Sequence[Section], left: Sequence[str] = ()) -> str:
    """One page that needs no other file, no script and no network."""
    e = html.escape
    title = f"What was measured in {folder.resolve().name}"
    out = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{MARK}">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{e(title)}</title><style>{STYLE}</style></head><body>\n<h1>{e(title)}</h1>",
        f'<p>Models: {e(", ".join(_models(sections)))}.</p>\n<ol class="contents">',
        *(f'<li><a href="#s{i}">{e(s.title)}</a>, {e(s.model)}</li>' for i, s in enumerate(sections)),
        "</ol>",
        *(f'<p class="left">{e(told)}</p>' for told in left),
        "<h3>To repeat it</h3><pre>" + e("\n".join(_commands(sections))) + "</pre>",
    ]
    for i, s in enumerate(sections):
        out.append(
            f'<section id="s{i}"><h2>{e(s.title)}</h2><p>{e(s.model)}, in <code>{e(_where(s, folder))}</code></p>'
        )
        out += [f'<p class="said">{e(told)}</p>' for told in s.sentences]
        for name, png in s.figures.items():
            out.append(
                f'<img alt="{e(s.title)}: {e(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
            )
        for name, (columns, rows, total) in s.tables.items():
            head = "".join(f"<th>{e(c)}</th>" for c in columns)
            body = "".join("<tr>" + "".join(f"<td>{e(c)}</td>" for c in row) + "</tr>" for row in rows)
            out.append(
                f"<details{' open' if name == 'summary' and total <= 12 else ''}><summary>{e(name)}: {e(_counted(s, name, rows, total))}</summary>"
                f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
            )
        if s.legend:
            out.append(
                "<details><summary>names of conditions</summary><ul>"
                + "".join(f"<li>{e(x)}</li>" for x in s.legend)
                + "</ul></details>"
            )
        about = "".join(f"<dt>{e(name)}</dt><dd>{e(value)}</dd>" for name, value in s.about())
        out.append(f"<details><summary>provenance</summary><dl>{about}</dl></details></section>")
    return "\n".join([*out, "</body></html>\n"])


def _counted(s: Section, name: str, rows: Sequence[Any], total: int) -> str:
    return (
        f"{total} rows"
        if len(rows) == total
        else f"the first {len(rows)} of {total} rows; all of them are in {s.results.stem}_{name}.parquet"
    )


def _where(s: Section, folder: Path) -> str:
    return os.path.relpath(s.results.folder, folder)


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
    for s in sections:
        out += [f"## {_plain(s.title)}", "", f"{_plain(s.model)}, in {_plain(_where(s, folder))}", ""]
        out += [f"> {_plain(told)}\n" for told in s.sentences]
        for name, png in s.figures.items():
            file = s.results.folder / name
            source = (
                f"<{Path(os.path.relpath(file, to)).as_posix()}>"
                if file.is_file()
                else f"data:image/png;base64,{base64.b64encode(png).decode()}"
            )
            out += [f"![{_plain(s.title)}]({source})", ""]
        for name, (columns, rows, total) in s.tables.items():
            out += [
                f"**{_plain(name)}**: {_counted(s, name, rows, total)}",
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
