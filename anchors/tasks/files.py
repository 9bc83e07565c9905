"""Tables as they stand: rows of text and label from CSV, TSV, JSON lines, JSON and parquet, with nothing guessed.

A column is text whatever it looks like: `NA`, `1.0` and `True` stay these words, and no column becomes an index.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from anchors.errors import AnchorsError, nearest, parsed

COLUMNS = ("text", "label")


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        text, label: as written; a whole number in a label column is its decimal digits.
        place: where it stands, to be named in a message.
        others: labels that its first and last line would have, were they rows by themselves; see `_delimited`.
    """

    text: str
    label: str
    place: str
    others: tuple[str, ...] = ()


def rows(path: Path) -> list[Row]:
    """The rows of a table in which the columns `text` and `label` are found by their names.

    In CSV and TSV a field that is quoted as a whole, with the quotation marks in it doubled (RFC 4180), is unquoted;
    any other quotation mark is a character. Fields may be separated by `,`, `;` or tabs: by what the header is.
    JSON holds objects, one a line or in one list, or columns as pandas writes them. A byte order mark is no text.

    Args:
        path: a file; its suffix says which format it has, see `READERS`.

    Raises:
        AnchorsError: another format, not UTF-8, doubled or missing columns, a row with another number of fields, a
            text that is no string, a label that is neither string nor whole number; with the line.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise AnchorsError(
            f"Files ending in {path.suffix!r} are not read.", nearest(path.suffix, READERS), code="data-file"
        )
    try:
        if path.stat().st_size == 0:
            raise AnchorsError(
                f"The file {str(path)!r} is empty.",
                "It needs rows with `text` and `label`.",
                code="data-file",
            )
        found = reader(path)
    except AnchorsError:
        raise
    except (ValueError, OSError) as error:
        raise AnchorsError(f"The file {str(path)!r} cannot be read: {error}", code="data-file") from error
    if not found:
        raise AnchorsError(
            f"The file {str(path)!r} has no rows.", "It needs rows with `text` and `label`.", code="data-file"
        )
    return found


def named(path: Path, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """The rows of a file by the names of their columns, each with the place where it stands.

    CSV and TSV are read as in `rows`; of plain text every line that is not blank is the first column; JSON lines hold objects.
    An empty field, and null, is left out. Other columns are not read, unless their names are nearly those of columns that are
    lacking.

    Args:
        path: a file; its suffix says which format it has.
        columns: what is read; the first one must be there.

    Raises:
        AnchorsError: another format, not UTF-8, a row without the first column or with another number of fields, a value that is
            no string.
    """
    reader = _NAMED.get(path.suffix.lower())
    if reader is None:
        raise AnchorsError(
            f"Files ending in {path.suffix!r} are not read as prompts.",
            nearest(path.suffix, _NAMED),
            code="data-file",
        )
    try:
        text = decode(path.read_bytes(), repr(str(path)))
    except OSError as error:
        raise AnchorsError(f"The file {str(path)!r} cannot be read: {error}", code="data-file") from error
    found = []
    for place, own in reader(text, path, columns):
        lacking = [name for name in columns if name not in own]
        for other in set(own) - set(columns):
            if near := get_close_matches(other.strip().casefold(), lacking, 1, 0.75):
                raise AnchorsError(
                    f"{path.name} has a column {other!r}, which is not read.",
                    f"Did you mean {near[0]!r}? Call it so, or by a name that is less like it.",
                    code="data-file",
                )
        found.append((place, {name: own[name] for name in columns if own.get(name)}))
        if columns[0] not in found[-1][1]:
            raise AnchorsError(
                f"{place} of {path.name} has no {columns[0]!r}.",
                f"Each row needs {columns[0]!r}; in CSV and TSV the header names the columns.",
                code="data-row",
            )
    if not found:
        raise AnchorsError(
            f"The file {str(path)!r} has no rows.", f"Each row needs {columns[0]!r}.", code="data-file"
        )
    return found


Places = Iterator[tuple[str, dict[str, str]]]


def _lines(text: str, path: Path, columns: Sequence[str]) -> Places:
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            yield f"Line {number}", {columns[0]: line}


def _fields(text: str, path: Path, columns: Sequence[str]) -> Places:
    names, _, found = _table(text, path, {columns[0]})
    if twice := [name for name in columns if names.count(name) > 1]:
        raise AnchorsError(
            f"The file {str(path)!r} has several columns called {twice}.", "Rename one.", code="data-file"
        )
    for line, fields, _ in found:
        yield f"Line {line}", dict(zip(names, fields, strict=True))


def _objects(text: str, path: Path, columns: Sequence[str]) -> Places:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = parsed(line, object_pairs_hook=once)
            if not isinstance(value, dict):
                raise ValueError(f"it is {_kind(value)}")
            for name in columns:
                if not isinstance(value.get(name), str | None):
                    raise ValueError(f"{name!r} is {_kind(value[name])}")
                (value.get(name) or "").encode()
        except ValueError as error:
            raise AnchorsError(
                f"Line {number} of {path.name} cannot be read: {error}.",
                'Each line is an object of texts, such as {"prompt": "…", "target": "…"}.',
                code="data-row",
            ) from error
        yield f"Line {number}", value


_NAMED = {".txt": _lines, ".jsonl": _objects, ".csv": _fields, ".tsv": _fields}
"""Readers of `named` by suffix."""


def decode(content: bytes, name: str) -> str:
    """UTF-8 as text; a byte order mark in front is no part of it.

    Raises:
        AnchorsError: another encoding.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise AnchorsError(f"{name} is UTF-16, not UTF-8.", "Save it as UTF-8.", code="data-file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise AnchorsError(
            f"Line {line} of {name.replace('The ', 'the ', 1) if name.startswith('The ') else name} is not UTF-8: it holds the byte 0x{content[error.start]:02x}.",
            "Save it as UTF-8.",
            code="data-file",
        ) from error


def _columns(names: Sequence[str], path: Path) -> tuple[int, int]:
    """Where `text` and `label` stand."""
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise AnchorsError(
            f"The file {str(path)!r} has several columns called {twice}.", "Rename one.", code="data-file"
        )
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise AnchorsError(
            f"The file {str(path)!r} lacks the column{'s' * (len(missing) > 1)} {sorted(missing)}; it has {list(names)}.",
            "Rename its columns to `text` and `label`.",
            code="data-file",
        )
    return names.index("text"), names.index("label")


# ------------------------------------------------------------------------------------------- delimited text
def _records(text: str, delimiter: str, name: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """By record: the number of its first line, its fields, and its lines.

    `csv.reader` does not do: it takes any quotation mark that opens a field at its word, and swallows the lines up to
    the next one. Lines end as the header does, since writers quote no other line end; a field may then hold it.
    """
    first = text.find("\n")
    end = r"\r" if first < 0 else r"\r?\n" if text.endswith("\r", 0, first) else r"\n"
    stop = rf"(?={delimiter}|{end}|\Z)"
    other = rf"[^{delimiter}\r\n]*+" if end == r"\r?\n" else rf"[^{delimiter}{end}]*+"
    field = re.compile(rf'"([^"]*+(?:""[^"]*+)*+)"{stop}|({other}(?:(?!{end})\r{other})*+)')
    ending, breaks = re.compile(rf"{end}|\Z"), re.compile(end)
    at, line = 0, 1
    while at < len(text):
        start, fields = at, []
        while True:
            found = field.match(text, at)
            assert found is not None  # noqa: S101 - the second alternative matches anywhere
            quoted, bare = found.groups()
            fields.append(bare if quoted is None else quoted.replace('""', '"'))
            at = found.end()
            if not text.startswith(delimiter, at):
                break
            at += 1
        lines = breaks.split(text[start:at])
        yield line, fields, lines
        closing = ending.match(text, at)
        assert closing is not None  # noqa: S101 - a field ends at a delimiter, a line end or the end
        if end == r"\n" and bare is not None and text.endswith("\r", start, at) and closing.end() > at:
            raise AnchorsError(
                f"Line {line} of {name} ends in \\r\\n, its header in \\n: whether \\r belongs to the last field is open.",
                "Save the file with one kind of line end.",
                code="data-file",
            )
        at, line = closing.end(), line + len(lines)


def _table(
    text: str, path: Path, wanted: set[str]
) -> tuple[list[str], str, Iterator[tuple[int, list[str], list[str]]]]:
    """Names of the columns, the delimiter (that under which the wanted ones are there), and the records behind the header."""
    own = "\t" if path.suffix.lower() == ".tsv" else ","
    headers = {d: next(_records(text, d, path.name), (1, [], []))[1] for d in (own, ",", ";", "\t")}
    delimiter = next((d for d, names in headers.items() if wanted <= set(names)), own)
    names = headers[delimiter]

    def behind() -> Iterator[tuple[int, list[str], list[str]]]:
        for line, fields, lines in itertools.islice(_records(text, delimiter, path.name), 1, None):
            if fields == [""]:
                continue
            if len(fields) != len(names):
                raise AnchorsError(
                    f"Line {line} of {path.name} has {len(fields)} field{'s' * (len(fields) > 1)}, but the header has "
                    f"{len(names)}: {names}.",
                    f'A text that holds {delimiter!r} is quoted as a whole: "…", with quotation marks in it doubled.',
                    code="data-row",
                )
            yield line, fields, lines

    return names, delimiter, behind()


def _delimited(path: Path) -> list[Row]:
    """Rows of CSV or TSV.

    A text of several lines may be two rows in which one text begins and another ends with a quotation mark; whether
    its lines could be rows depends on the labels, which are handed on as `Row.others`.
    """
    names, delimiter, records = _table(decode(path.read_bytes(), repr(str(path))), path, set(COLUMNS))
    text_at, label_at = _columns(names, path)
    found = []
    for line, fields, lines in records:
        alone = [each.split(delimiter) for each in (lines[0], lines[-1])] if len(lines) > 1 else []
        others = tuple(cells[label_at] for cells in alone if len(cells) == len(names))
        found.append(
            Row(fields[text_at], fields[label_at], f"Line {line}", others if len(others) == 2 else ())
        )
    return found


# ------------------------------------------------------------------------------------------- JSON
def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which no key stands twice, for `parsed(…, object_pairs_hook=once)`.

    Raises:
        ValueError: a key twice; plain `json` keeps the last one silently.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object"
        )
    return found


def _json_lines(path: Path) -> list[Row]:
    found = []
    for number, line in enumerate(decode(path.read_bytes(), repr(str(path))).split("\n"), start=1):
        if line.strip():
            try:
                value = parsed(line, object_pairs_hook=once)
            except ValueError as error:
                raise AnchorsError(
                    f"Line {number} of {path.name} cannot be read as JSON: {error}",
                    "Each line is an object with `text` and `label`.",
                    code="data-row",
                ) from error
            found.append(_from_object(value, f"Line {number}", path))
    return found


def _json(path: Path) -> list[Row]:
    whole = parsed(decode(path.read_bytes(), repr(str(path))), object_pairs_hook=once)
    if isinstance(whole, dict):
        columns = [whole[name] for name in _columns_of(whole, path)]
        if all(isinstance(column, dict) for column in columns) and list(columns[0]) == list(columns[1]):
            columns = [list(column.values()) for column in columns]
        if not all(isinstance(column, list) for column in columns) or len(columns[0]) != len(columns[1]):
            raise AnchorsError(
                f"In the file {str(path)!r} `text` and `label` are no columns of the same rows.",
                "Write a list of objects, each with `text` and `label`.",
                code="data-file",
            )
        whole = [dict(zip(COLUMNS, pair, strict=True)) for pair in zip(*columns, strict=True)]
    if not isinstance(whole, list):
        raise AnchorsError(
            f"The file {str(path)!r} holds no list.",
            "Write a list of objects, each with `text` and `label`.",
            code="data-file",
        )
    return [_from_object(value, f"Row {number}", path) for number, value in enumerate(whole, start=1)]


def _columns_of(value: dict[str, Any], path: Path) -> tuple[str, ...]:
    _columns(list(value), path)
    return COLUMNS


def _from_object(value: Any, place: str, path: Path) -> Row:
    if not isinstance(value, dict):
        raise AnchorsError(
            f"{place} of {path.name} holds {_kind(value)}, not an object.",
            'Each row is an object such as {"text": "…", "label": "…"}.',
            code="data-row",
        )
    if missing := [name for name in COLUMNS if name not in value]:
        raise AnchorsError(
            f"{place} of {path.name} lacks {missing}; it has {list(value)}.",
            "Each row needs `text` and `label`.",
            code="data-row",
        )
    return row(value["text"], value["label"], place, path.name)


def row(text: Any, label: Any, place: str, where: str) -> Row:
    """A row whose values have types of their own: a text must be a string, a label a string or a whole number."""
    if not isinstance(text, str):
        raise AnchorsError(
            f"The text of {place.lower()} of {where} is no string but {_kind(text)}.", _QUOTE, code="data-row"
        )
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise AnchorsError(
            f"The label of {place.lower()} of {where} is neither a string nor a whole number but {_kind(label)}.",
            _QUOTE,
            code="data-label",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AnchorsError(
            f"The text of {place.lower()} of {where} holds half a character: {text[error.start]!r} is one of two surrogates.",
            "Write the whole character, or remove the row.",
            code="data-row",
        ) from error
    return Row(text, str(label), place)


_QUOTE = "Write it in quotation marks, or remove the row."


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kind = {
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        bytes: "bytes",
        str: "a string",
    }
    shown = repr(value)
    return f"{kind.get(type(value), type(value).__name__)}: {shown if len(shown) <= 40 else shown[:40] + '…'}"


# ------------------------------------------------------------------------------------------- parquet
def _parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        _columns(schema.names, path)
        for name in COLUMNS:
            kind = schema.field(name).type
            plain = kind.value_type if pa.types.is_dictionary(kind) else kind
            whole = name == "label" and pa.types.is_integer(plain)
            if not (
                whole
                or pa.types.is_string(plain)
                or pa.types.is_large_string(plain)
                or plain == pa.string_view()
            ):
                also = " or whole numbers" if name == "label" else ""
                raise AnchorsError(
                    f"The column {name!r} of {str(path)!r} holds {kind}, not strings{also}.",
                    "Write it as strings; a missing value makes a column of whole numbers one of floats.",
                    code="data-file",
                )
        table = file.read(columns=list(COLUMNS))
    pairs = zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True)
    return [row(*pair, f"Row {number}", path.name) for number, pair in enumerate(pairs, start=1)]


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _delimited,
    ".tsv": _delimited,
    ".parquet": _parquet,
}
"""By suffix."""
