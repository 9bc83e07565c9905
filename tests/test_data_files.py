"""Tables are read as they stand: whatever csv, pandas, json and pyarrow write comes back, and what is no table is refused."""

import csv
import io
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from anchors.errors import AnchorsError
from anchors.tasks.files import rows

TELLING = '"",;\t\r\n\\\ufeff\u2028\u2029\x85\x0b\x0c\x1c\x00 aNA1.0é\U0001f600'
CELLS = st.one_of(
    st.text(st.sampled_from(TELLING), max_size=8),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(["NA", "nan", "None", "True", "1", "1.0", "01", "1e5", "", '"', '""', "a\r", "\ufeff"]),
)
TABLES = st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6)
MANY = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def by_csv(table, dialect):
    file = io.StringIO()
    csv.writer(file, dialect).writerows([("text", "label"), *table])
    return file.getvalue()


def by_pandas(table, **how):
    return pd.DataFrame(table, columns=["text", "label"], dtype=object).to_csv(index=False, **how)


def by_json(table, **how):
    return "\n".join(json.dumps({"text": text, "label": label}, **how) for text, label in table)


def columns(table):
    return pd.DataFrame(table, columns=["text", "label"], dtype=object)


WRITERS = {
    "csv": (".csv", lambda table: by_csv(table, "excel")),
    "csv, newline": (".csv", lambda table: by_csv(table, "unix")),
    "csv, tabs": (".tsv", lambda table: by_csv(table, "excel-tab")),
    "pandas": (".csv", by_pandas),
    "pandas, tabs": (".tsv", lambda table: by_pandas(table, sep="\t")),
    "pandas, semicolons": (".csv", lambda table: by_pandas(table, sep=";")),
    "pandas, all quoted": (".csv", lambda table: by_pandas(table, quoting=csv.QUOTE_ALL)),
    "json lines": (".jsonl", by_json),
    "json lines, unescaped": (".jsonl", lambda table: by_json(table, ensure_ascii=False)),
    "pandas, json lines": (".jsonl", lambda table: columns(table).to_json(orient="records", lines=True)),
    "pandas, records": (".json", lambda table: columns(table).to_json(orient="records")),
    "pandas, columns": (".json", lambda table: columns(table).to_json()),
    "json, lists": (
        ".json",
        lambda table: json.dumps({"text": [a for a, _ in table], "label": [b for _, b in table]}),
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@MANY
@given(table=TABLES)
@example(table=[('"', "a"), ("b\n", '"c')])
@example(table=[("a,b;c\td", "\ufeffe"), ("", "")])
def test_any_table_of_strings_comes_back(tmp_path, writer, table):
    suffix, write = WRITERS[writer]
    path = tmp_path / f"table{suffix}"
    if suffix in (
        ".csv",
        ".tsv",
    ):  # \r\n behind an unquoted field is a line end, and refused where lines end in \n
        table = [(text, label.rstrip("\r")) for text, label in table]
    path.write_bytes(write(table).encode())
    assert [(row.text, row.label) for row in rows(path)] == table


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_any_parquet_of_strings_comes_back(tmp_path, kind):
    table = [("NA", "1.0"), ("", "True"), ('"\r\n\u2028', "nan"), ("\ufeff", "01")]
    strings = [pa.array([row[i] for row in table]).cast(kind) for i in (0, 1)]
    pq.write_table(pa.table({"text": strings[0], "label": strings[1]}), tmp_path / "t.parquet")
    assert [(row.text, row.label) for row in rows(tmp_path / "t.parquet")] == table


@given(table=TABLES)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_table_written_without_quoting_comes_back_line_by_line(tmp_path, table):
    """Every quotation mark is a character here, where no field happens to be quoted as a whole."""
    plain = [["".join(c for c in cell if c not in "\t\r\n") for cell in row] for row in table]
    plain = [[cell.rstrip('"') for cell in row] for row in plain]
    (tmp_path / "t.tsv").write_bytes("\n".join(["text\tlabel", *map("\t".join, plain)]).encode())
    expected = [row for row in plain if row != [""]]
    assert [[row.text, row.label] for row in rows(tmp_path / "t.tsv")] == expected


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(row.text, row.label) for row in rows(path)]


def test_quotation_marks_that_quote_no_whole_field_are_characters(tmp_path):
    said = 'text\tlabel\n"So kind\tgood\n"No," he said\tbad\n"whole ""field"""\tgood\nthe "end"\tbad\n'
    found = [("\"So kind", "good"), ('"No," he said', "bad"), ('whole "field"', "good"), ('the "end"', "bad")]  # fmt: skip
    assert read(tmp_path / "t.tsv", said) == found
    assert read(tmp_path / "t.csv", said.replace("\t", ";").replace("No,", "No")) == [
        (text.replace("No,", "No"), label) for text, label in found
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_the_header_does(tmp_path, end):
    content = f'text,label{end}a,x{end}{end}"b{end}c",y{end}'
    assert read(tmp_path / "t.csv", content) == [("a", "x"), (f"b{end}c", "y")]
    assert [row.place for row in rows(tmp_path / "t.csv")] == ["Line 2", "Line 4"]


def test_mixed_line_ends(tmp_path):
    assert read(tmp_path / "t.csv", "text,label\r\na,x\nb,y\r\n") == [("a", "x"), ("b", "y")]
    with pytest.raises(AnchorsError, match=r"Line 3 of t.csv ends in \\r\\n"):
        read(tmp_path / "t.csv", "text,label\na,x\nb,y\r\n")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_text(tmp_path, mark):
    for name, content in {
        "t.csv": "text,label\na,x\n", "t.tsv": "text\tlabel\na\tx\n", "t.jsonl": '{"text": "a", "label": "x"}',
        "t.json": '[{"text": "a", "label": "x"}]',
    }.items():  # fmt: skip
        assert read(tmp_path / name, mark + content.encode()) == [("a", "x")]


def test_no_column_becomes_an_index(tmp_path):
    assert read(tmp_path / "t.csv", ",text,label\n0,a,x\n1,b,y\n") == [("a", "x"), ("b", "y")]
    columns([("a", "x"), ("b", "y")]).set_index("text").to_parquet(tmp_path / "t.parquet")
    assert [(row.text, row.label) for row in rows(tmp_path / "t.parquet")] == [("a", "x"), ("b", "y")]


def test_whole_numbers_as_labels_are_their_digits(tmp_path):
    table = pa.table({"text": ["a", "b"], "label": pa.array([2**63 + 1, 1], pa.uint64())})
    pq.write_table(table, tmp_path / "t.parquet")
    assert [row.label for row in rows(tmp_path / "t.parquet")] == [str(2**63 + 1), "1"]
    assert read(tmp_path / "t.jsonl", '{"text": "1", "label": 1}') == [("1", "1")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "text,label\na,b,x\n", r"Line 2 of t.csv has 3 fields, but the header has 2"),
        ("t.csv", 'text,label\n"a\nb",x\nc\n', r"Line 4 of t.csv has 1 field,"),
        ("t.tsv", "text\tlabel\na\tx\ty\n", r"Line 2 of t.tsv has 3 fields"),
        ("t.csv", "text,label,text\na,x,b\n", r"several columns called \['text'\]"),
        ("t.csv", "text|label\na|x\n", r"lacks the columns \['label', 'text'\]; it has \['text|label'\]"),
        ("t.csv", b"text,label\na\xe9,x\n", r"Line 2 of .* is not UTF-8: it holds the byte 0xe9"),
        ("t.csv", "text,label\na,x\n".encode("utf-16"), "is UTF-16"),
        ("t.csv", b"\xef\xbb\xbf", "lacks the columns"),
        ("t.jsonl", '{"text": "a", "label": "x", "label": "y"}', r"Line 1 of t.jsonl .*'label' stands twice"),
        ("t.jsonl", '\n{"text": "a"}', r"Line 2 of t.jsonl lacks \['label'\]"),
        ("t.jsonl", '["a", "x"]', r"Line 1 of t.jsonl holds a list"),
        ("t.jsonl", '{"text": 5, "label": "x"}', r"The text of line 1 of t.jsonl is no string but a number: 5"),
        ("t.jsonl", '{"text": ["a"], "label": "x"}', r"is no string but a list"),
        ("t.jsonl", '{"text": null, "label": "x"}', r"is no string but null"),
        ("t.jsonl", '{"text": "a", "label": true}', r"neither a string nor a whole number but true"),
        ("t.jsonl", '{"text": "a", "label": 1.0}', r"neither a string nor a whole number but a number: 1.0"),
        ("t.jsonl", '{"text": "a", "label": NaN}', r"neither a string nor a whole number but a number: nan"),
        ("t.jsonl", '{"text": "\\ud800", "label": "x"}', r"holds half a character"),
        ("t.jsonl", "[" * 100000, "nested too deep"),
        ("t.json", '{"text": ["a", "b"], "label": ["x"]}', "no columns of the same rows"),
        ("t.json", '{"text": {"0": "a", "1": "b"}, "label": {"1": "x", "0": "y"}}', "no columns of the same"),
        ("t.json", '"text"', "holds no list"),
    ],
)  # fmt: skip
def test_what_is_no_table_of_text_is_refused(tmp_path, name, content, said):
    with pytest.raises(AnchorsError, match=said):
        read(tmp_path / name, content)


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("text", pa.array([1, 2]), "The column 'text' of .* holds int64, not strings"),
        ("text", pa.array([b"a", b"b"]), "holds binary, not strings"),
        ("label", pa.array([0.0, 1.0]), "The column 'label' of .* holds double, not strings or whole numbers"),
        ("label", pa.array([True, False]), "holds bool"),
        ("label", pa.array(["x", None]), "The label of row 2 of t.parquet is neither a string nor a whole number but null"),
    ],
)  # fmt: skip
def test_parquet_columns_of_other_types_are_refused(tmp_path, column, values, said):
    table = {"text": pa.array(["a", "b"]), "label": pa.array(["x", "y"])} | {column: values}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    with pytest.raises(AnchorsError, match=said):
        rows(tmp_path / "t.parquet")
