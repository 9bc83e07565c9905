"""Reading labelled text, and refusing what cannot be read."""

import json

import pandas as pd
import pytest

from anchors.errors import AnchorsError
from anchors.tasks.data import read
from anchors.tasks.task import TASKS, task

SST2 = TASKS["sst2"]
ROWS = pd.DataFrame({"text": [f"film number {i}" for i in range(40)], "label": ["Negative", "Positive"] * 20})


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("numbers", [False, True])
def test_every_format_says_the_same(tmp_path, suffix, numbers):
    rows = ROWS.assign(label=[0, 1] * 20) if numbers else ROWS
    path = tmp_path / f"mine.{suffix}"
    match suffix:
        case "csv":
            rows.to_csv(path, index=False)
        case "tsv":
            rows.to_csv(path, index=False, sep="\t")
        case "jsonl":
            rows.to_json(path, orient="records", lines=True)
        case "json":
            rows.to_json(path, orient="records")
        case "parquet":
            rows.to_parquet(path)
    data = read(SST2, str(path))
    assert len(data.train) + len(data.test) == 40
    assert data.test
    assert {e.text: e.label for e in (*data.train, *data.test)} == {
        text: i % 2 for i, text in enumerate(ROWS["text"])
    }


def test_adding_rows_moves_no_other_row(tmp_path):
    path = tmp_path / "mine.csv"
    ROWS.to_csv(path, index=False)
    before = {e.text for e in read(SST2, str(path)).test}
    more = pd.concat([pd.DataFrame({"text": ["a new one"], "label": ["Positive"]}), ROWS])
    more.to_csv(path, index=False)
    assert before <= {e.text for e in read(SST2, str(path)).test} <= before | {"a new one"}


def test_a_directory_by_task_with_a_validation_split(tmp_path):
    folder = tmp_path / "sst2"
    folder.mkdir()
    ROWS.head(10).to_csv(folder / "train.csv", index=False)
    ROWS.tail(6).to_json(folder / "validation.jsonl", orient="records", lines=True)
    for place in (tmp_path, folder):
        data = read(SST2, str(place))
        assert (len(data.train), len(data.test)) == (10, 6)


def test_text_that_looks_like_a_missing_value_stays_text(tmp_path):
    path = tmp_path / "mine.csv"
    pd.concat([ROWS, pd.DataFrame({"text": ["NA", "null"], "label": ["Negative", "Positive"]})]).to_csv(
        path, index=False
    )
    data = read(SST2, str(path))
    assert {"NA", "null"} <= {e.text for e in (*data.train, *data.test)}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.csv", "sentence,label\nx,Negative\n", r"lacks the column \['text'\]"),
        ("a.csv", "text,label\nx,Neutral\n", r"Line 2 of a.csv has the label 'Neutral'.*\['Negative', 'Positive'\]"),
        ("a.csv", "text,label\nx,7\n", "has the label"),
        ("a.csv", "text,label\n ,Negative\n", "has no text"),
        ("a.jsonl", "{broken", "cannot be read"),
        ("a.parquet", "not parquet", "cannot be read"),
        ("a.xlsx", "x", "are not read"),
        ("a.csv", "text,label\nx,Negative\ny,Negative\nz,Negative\nw,Negative\nv,Negative\n", r"labelled \['Positive'\]"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_by_name(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(AnchorsError, match=said):
        read(SST2, str(path))


def test_missing_places_are_refused(tmp_path):
    with pytest.raises(AnchorsError, match="does not exist"):
        read(SST2, str(tmp_path / "nowhere.csv"))
    with pytest.raises(AnchorsError, match="holds no train file"):
        read(SST2, str(tmp_path))


def test_own_labels_do_not_fit_builtin_data():
    with pytest.raises(AnchorsError, match="labelled"):
        read(task("sst2", labels=["Bad", "Good"]))


def test_a_task_from_toml(tmp_path):
    path = tmp_path / "mood.toml"
    path.write_text('template = "Text: {text}\\nMood:{label}"\nlabels = ["Sad", "Happy"]\npolicy = "all"\n')
    found = task(str(path))
    assert (found.name, found.labels, found.policy) == ("mood", ("Sad", "Happy"), "all")
    path.write_text('template = "Text: {text}\\nMood:{label}"\nwords = 3\n')
    with pytest.raises(AnchorsError, match=r"unknown keys \['words'\] and lacks \['labels'\]"):
        task(str(path))
    path.write_text("not toml")
    with pytest.raises(AnchorsError, match="is not TOML"):
        task(str(path))


def test_unknown_task():
    with pytest.raises(AnchorsError, match="Unknown task 'sst3'"):
        task("sst3")


def test_fingerprint_changes_with_any_label(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [json.loads(line) for line in ROWS.to_json(orient="records", lines=True).splitlines()]
    prints = set()
    for flip in (None, 0, 1):
        changed = [dict(r) for r in rows]
        if flip is not None:
            changed[flip]["label"] = "Positive" if changed[flip]["label"] == "Negative" else "Negative"
        path.write_text("\n".join(json.dumps(r) for r in changed))
        prints.add(read(SST2, str(path)).fingerprint)
    assert len(prints) == 3
