"""`anchors view` on questions about pictures, and the model that comes along."""

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from test_viewer import embedded
from typer.testing import CliRunner

from anchors.cli import app
from anchors.errors import AnchorsError
from anchors.injection.asking.evaluate import greedy
from anchors.injection.asking.vlm import TINY, TINY_FOLDER, load_vlm
from anchors.injection.image_flow.questions import (
    MOST,
    TEMPLATE,
    TEMPLATES,
    Question,
    opened,
    questions_in,
    written,
)

ROOT = Path(__file__).parents[1]


def run(*words: str):
    return CliRunner().invoke(app, ["view", *map(str, words)])


def page_of(path: Path) -> dict:
    return json.loads(embedded(path.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def tiny():
    return load_vlm(TINY, device="cpu", precision="float32", routed=True)


def test_the_model_that_comes_along_reads_digits_it_was_not_trained_on(tiny):
    asked = [*questions_in(TINY), *questions_in(str(TINY_FOLDER / "demonstrations.jsonl"))]
    assert len(asked) == 6
    wrong = []
    for one in asked:
        prompt = written(TEMPLATES[TINY], Question(one.image, one.question))
        (said,) = greedy(tiny, tiny.encode([prompt.text], [prompt.images]).tensors, 4)
        wrong += [] if said == one.answer else [one.image.name]
    assert wrong == ["demonstrations-1.png"]  # a five that it takes for a nine


def test_the_model_that_comes_along_is_small_and_says_where_it_is_from():
    tracked = subprocess.run(["git", "ls-files", str(TINY_FOLDER)], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode or not tracked.stdout:
        pytest.skip("no git checkout here")
    assert sum((ROOT / name).stat().st_size for name in tracked.stdout.split()) < 2e6
    facts = json.loads((TINY_FOLDER / "provenance.json").read_text(encoding="utf-8"))
    assert facts["commands"][0].startswith("anchors inject demo --scale tiny-patches")
    assert facts["accuracy on held-out digits"] > 0.9


def test_a_folder_of_another_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / TINY).mkdir()
    with pytest.raises(AnchorsError, match="tiny-vlm"):
        load_vlm(TINY)
    with pytest.raises(AnchorsError, match="Nothing is asked"):
        questions_in(TINY)


def test_view_asks_a_picture(tmp_path):
    out = tmp_path / "page.html"
    done = run(
        TINY_FOLDER / "questions-0.png", "--ask", "name", "--layers", "0,2", "--out", out, "--device", "cpu"
    )
    assert done.exit_code == 0, done.output
    data = page_of(out)
    (prompt,) = data["prompts"]
    assert data["kinds"] == ["iq", "tq", "ww"]
    assert prompt["layers"] == [0, 2]
    assert len(prompt["s_iq"]) == 4
    assert prompt["labels"][prompt["predicted"]] == "nine"
    assert prompt["gold"] is None
    assert [len(own["sheets"][0]) for own in prompt["pictures"]] == [16]
    assert "The model's own answer: nine" in prompt["notes"]
    assert "name" in "".join(prompt["tokens"])
    assert data["provenance"]["template"] == TEMPLATES[TINY]


def test_view_shows_demonstrations_and_the_questions_that_come_along(tmp_path):
    shown = TINY_FOLDER / "demonstrations.jsonl"
    done = run(TINY, "--demonstrations", shown, "--out", tmp_path, "--device", "cpu")
    assert done.exit_code == 0, done.output
    data = page_of(tmp_path / "view.html")
    assert [prompt["name"] for prompt in data["prompts"]] == [one.name for one in questions_in(TINY)]
    assert data["kinds"] == ["ip", "tp", "iq", "pq", "tq", "ww"]
    for prompt, asked in zip(data["prompts"], questions_in(TINY), strict=True):
        assert len(prompt["pictures"]) == 4
        assert set(prompt["into"]) == {"target", "labels", "later"}
        assert prompt["labels"][prompt["gold"]] == asked.answer
        assert [prompt["labels"][c] for c in prompt["classes"] if c is not None] == ["two", "five", "eight"]


def test_a_folder_of_pictures_is_asked_one_question(tmp_path):
    for name in ("b.png", "a.JPG"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert [(q.image.name, q.question, q.answer) for q in questions_in(str(tmp_path), "name", "one")] == [
        ("a.JPG", "name", "one"),
        ("b.png", "name", "one"),
    ]


def test_a_picture_is_shown_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert opened(tmp_path / "a.jpg").size == (10, 20)


def test_prompts_are_written_as_the_template_says(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    one, other = (
        Question(tmp_path / "a.png", question, answer)
        for question, answer in (("{answer}?", "yes"), ("b", "no"))
    )
    made = written(TEMPLATE, other, [one])
    assert made.text == "<image>\nQuestion: {answer}?\nAnswer: yes\n\n<image>\nQuestion: b\nAnswer: no"
    assert [made.text[a:b] for a, b in (*made.labels, made.answer)] == ["yes", "no"]
    assert made.text[made.query :].startswith("<image>\nQuestion: b")
    assert len(made.images) == 2
    open_end = written(TEMPLATE, Question(tmp_path / "a.png", "b"))
    assert (open_end.text, open_end.answer) == ("<image>\nQuestion: b\nAnswer:", None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "no question about a picture"),
        ('{"image": "a.png"}', "KeyError 'question'"),
        ('{"image": "a.png", "question": 3}', "must be texts"),
        ("{", "no question about a picture"),
    ],
)
def test_lines_that_are_no_questions_are_refused_by_number(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text('\n{"image": "a.png", "question": "b"}\n' + line + "\n")
    with pytest.raises(AnchorsError, match=message) as caught:
        questions_in(str(path))
    assert "Line 3" in str(caught.value)


def test_what_does_not_go_together_is_refused(tmp_path):
    path, image = tmp_path / "q.jsonl", tmp_path / "a.png"
    path.write_text('{"image": "a.png", "question": "b"}\n' * (MOST + 1))
    Image.new("RGB", (8, 8)).save(image)
    with pytest.raises(AnchorsError, match=f"holds {MOST + 1} questions"):
        questions_in(str(path))
    with pytest.raises(AnchorsError, match="questions of its own"):
        questions_in(str(path), "what")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnchorsError, match="holds 0 questions"):
        questions_in(str(tmp_path / "empty"), "what")
    with pytest.raises(AnchorsError, match="has no answer"):
        written(TEMPLATE, Question(image, "b"), [Question(image, "c")])
    for template in (
        "{question} {answer}",
        "<image> {answer} {question}",
        "<image> {question} {answer} {answer}",
    ):
        with pytest.raises(AnchorsError, match="once each"):
            written(template, Question(image, "b"))
    with pytest.raises(AnchorsError, match="cannot be read"):
        written(TEMPLATE, Question(tmp_path / "none.png", "b"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(AnchorsError, match="cannot be read"):
        opened(tmp_path / "text.png")
    for more in (
        ["--task", "sst2"],
        ["--labels", "a,b"],
        ["--chat", "one"],
        ["--system", "be brief"],
        ["--maps", tmp_path / "m"],
        ["--dry-run"],
    ):
        done = run(image, "--ask", "b", *more)
        assert done.exit_code != 0
        assert f"{more[0]} is not for questions about pictures" in " ".join(done.output.split())


def test_the_model_that_comes_along_tells_of_no_machine():
    found = list(TINY_FOLDER.glob("*.json*"))
    assert TINY_FOLDER / "config.json" in found
    for file in found:
        assert '": "/' not in file.read_text(encoding="utf-8"), file.name
