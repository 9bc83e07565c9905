"""Reading labelled text, and refusing what cannot be read."""

import json

import pandas as pd
import pytest

from anchors.errors import AnchorsError
from anchors.tasks.data import alike, read
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
    path.write_text('template = "{text}\\nMood:{label}"\nlabels = ["Sad", "Happy"]\nwords = 3\n')
    with pytest.raises(AnchorsError, match=r"mood.toml' has unknown keys \['words'\]\."):
        task(str(path))
    path.write_text("not toml")
    with pytest.raises(AnchorsError, match=r"is not TOML.*\n.*It holds lines such as"):
        task(str(path))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_whole_numbers_in_toml_are_label_words(tmp_path, mark):
    path = tmp_path / "good.toml"
    path.write_text(mark + 'template = "{text}\\nGood:\\n{label}"\nlabels = [0, "1"]\n', encoding="utf-8")
    assert task(str(path)).labels == ("0", "1")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("labels = 3", "labels = 3 is not a list of strings"),
        ('labels = "ab"', "labels = 'ab' is not a list of strings"),
        ("labels = [true, false]", "is not a list of strings"),
        ("labels = [1.0, 2.0]", "is not a list of strings"),
        ('labels = [["a"], ["b"]]', "is not a list of strings"),
        ('labels = [" a", "b"]', "' a' begins or ends with white space"),
        ("template = 5", "The template of a task is 5, not a string"),
        ("separator = 1", "The separator of a task is 1, not a string"),
        ("policy = []", r"The policy of a task is \[\], not a string"),
        ("name = 2020-01-01", "The name of a task is .*, not a string"),
        ("colon_space = 0", "colon_space = 0"),
        ("labels = " + "[" * 5000 + "]" * 5000, "nested too deep"),
        ("labels = [" + "9" * 5000 + "]", "is not TOML"),
    ],
)
@pytest.mark.usefixtures("wrong_types")
def test_toml_values_of_other_types_are_refused(tmp_path, line, said):
    lines = {"template": "template = '{text}:{label}'", "labels": "labels = ['a', 'b']"}
    path = tmp_path / "mood.toml"
    path.write_text("\n".join((lines | {line.split(" = ")[0]: line}).values()))
    with pytest.raises(AnchorsError, match=said) as caught:
        task(str(path))
    assert "mood.toml" in caught.value.message


@pytest.mark.parametrize("labels", ["ab", [0, 1]])
@pytest.mark.usefixtures("wrong_types")
def test_label_words_from_python_are_strings(labels):
    with pytest.raises(AnchorsError, match="string"):
        task(template="{text}:{label}", labels=labels)


def written(path, pairs):
    pd.DataFrame(pairs, columns=["text", "label"]).to_csv(path, index=False)
    return str(path)


def labelled(data, words):
    return {e.text: words[e.label] for e in (*data.train, *data.test)}


@pytest.mark.parametrize(
    "words", [["1", "0"], ["1", "2", "3", "4", "5"], ["10", "1", "0"], ["2", "0", "Good"]]
)
def test_label_words_that_look_like_numbers_are_words(tmp_path, words):
    spec = task("own", template="{text}\nStars:\n{label}", labels=words)
    pairs = {f"film number {i}": words[i % len(words)] for i in range(60)}
    assert labelled(read(spec, written(tmp_path / "my.csv", list(pairs.items()))), words) == pairs


def test_a_label_that_is_a_word_and_the_number_of_another_one_is_refused(tmp_path):
    """Stars 1 to 5 beside a file that numbers them from 0: both readings of `1` to `4` are possible."""
    spec = task("own", template="{text}\nStars:\n{label}", labels=["1", "2", "3", "4", "5"])
    path = written(tmp_path / "my.csv", [(f"film {i}", str(i % 5)) for i in range(60)])
    with pytest.raises(
        AnchorsError, match=r"'[1-4]': as a label word it is class \d, as the number .* '[2-5]'.*'0'"
    ):
        read(spec, path)
    for part, labels in {"train": "12345", "test": "01"}.items():
        written(tmp_path / f"{part}.csv", [(f"{part} {i}", label) for i, label in enumerate(labels)])
    with pytest.raises(AnchorsError, match=r"Line . of t.*'0', which is no label word .Line 2 of test.csv"):
        read(spec, str(tmp_path))


def test_words_and_numbers_that_agree_may_be_mixed(tmp_path):
    pairs = [(f"film {i}", ["0", "Positive", "Negative", "1"][i % 4]) for i in range(40)]
    data = read(SST2, written(tmp_path / "my.csv", pairs))
    assert labelled(data, SST2.labels) == {text: SST2.labels[label in "1Positive"] for text, label in pairs}


def test_texts_whose_marks_happen_to_pair_up_are_not_one_text(tmp_path):
    """A table written without quoting, in which one text begins and a later one ends with a quotation mark."""
    lines = [
        "text\tlabel",
        '"sharp and kind\tPositive',
        "dull\tNegative",
        'he said no"\tNegative',
        "warm\tPositive",
    ]
    path = tmp_path / "my.tsv"
    for swapped in (False, True):
        turned = ["\t".join(line.split("\t")[::-1]) for line in lines]
        path.write_text("\n".join(turned if swapped else lines))
        with pytest.raises(AnchorsError, match=r"Line 2 of my.tsv opens a text of several lines"):
            read(SST2, str(path))
    path.write_text('text\tlabel\n"two\nlines"\tPositive\n' + "\n".join(lines[2:3] * 9 + lines[4:]))
    assert "two\nlines" in {e.text for e in (*read(SST2, str(path)).train, *read(SST2, str(path)).test)}


def test_two_files_of_one_name_are_refused(tmp_path):
    for name in ("train.csv", "test.csv", "train.jsonl"):
        (tmp_path / name).write_text("text,label\na,Positive\n")
    with pytest.raises(AnchorsError, match=r"holds train.jsonl and train.csv"):
        read(SST2, str(tmp_path))


def test_both_parts_come_from_one_place(tmp_path):
    (tmp_path / "sst2").mkdir()
    ROWS.to_csv(tmp_path / "sst2" / "train.csv", index=False)
    ROWS.to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(AnchorsError, match="holds no test file"):
        read(SST2, str(tmp_path))


def test_what_was_read_is_counted(tmp_path):
    written(
        tmp_path / "train.csv", [("a", "Positive"), ("b", "Negative"), ("c", "Negative"), ("c", "Positive")]
    )
    written(
        tmp_path / "dev.csv", [("a", "Positive"), ("b", "Positive"), ("d", "Negative"), ("a", "Positive")]
    )
    data = read(SST2, str(tmp_path))
    facts = data.facts(SST2)
    assert facts.files == (("train.csv", 4), ("dev.csv", 4))
    assert (facts.train, facts.test) == ({"Negative": 2, "Positive": 2}, {"Negative": 1, "Positive": 3})
    assert (facts.repeated, facts.contradictory) == (3, 2)
    assert facts.read() == (
        "4 rows of train.csv, 4 rows of dev.csv: train 4 (Negative 2, Positive 2), test 4 (Negative 1, Positive 3)"
    )
    assert facts.caution().startswith(
        "3 test texts stand among the training texts, too; 2 texts stand under two"
    )
    builtin = read(SST2).facts(SST2)
    assert builtin.caution() is None
    assert [name for name, _ in builtin.files] == ["sst2.train.jsonl", "sst2.test.jsonl"]


def test_labels_that_look_like_slips_are_told(tmp_path):
    own = task("own", template="{text}\nMood:{label}", labels=["Good", "good", "Bad"])
    path = tmp_path / "own.jsonl"
    pairs = [(f"{label} {n}", label) for n in range(8) for label in ("Good", "good", "Bad", " Bad")]
    path.write_text("\n".join(json.dumps({"text": t, "label": label}) for t, label in pairs))
    assert read(own, str(path)).facts(own).hint() == (
        "the labels ' Bad' and 'Bad' differ only in white space: they are one class; "
        "the labels 'Good' and 'good' differ only in case: they are 2 classes."
    )
    assert sum(read(own, str(path)).facts(own).train.values()) > 8
    # Padding that all labels share is a habit, and numbers say nothing of the words.
    assert alike([" Bad", " Good"], ["Bad", "Good"]) == ()
    assert alike(["0", "1"], ["Bad", "bad"]) == (("Bad", "bad"),)
    assert read(SST2).facts(SST2).hint() is None
    written(tmp_path / "slip.csv", [("a", "positive"), ("b", "Negative")])
    with pytest.raises(AnchorsError, match="not one of") as refused:
        read(SST2, str(tmp_path / "slip.csv"))
    assert refused.value.remedy.startswith("It differs from 'Positive' only in case")


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
