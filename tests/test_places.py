"""Nothing outside --out is touched: links, folders of other people, sources that change meanwhile, inputs as outputs."""

import os
from pathlib import Path

import pytest
from injection_families import Saved
from injection_merging import copies, models, nothing_at, rewrite, run  # noqa: F401 - fixtures among them
from typer.testing import CliRunner

import anchors
from anchors.cli import app
from anchors.errors import AnchorsError
from anchors.injection.demo.build import MARK
from anchors.places import file_name, require_another, require_inside
from anchors.study.results import write_atomic


def test_a_draft_that_is_a_link_is_not_followed(models: Saved, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_text("mine")
    (tmp_path / ".out.draft").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(AnchorsError, match=r"\.out\.draft' is a link"):
        run(models, tmp_path / "out")
    assert [path.name for path in elsewhere.iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "out").exists()


def test_an_ordinary_folder_of_the_drafts_name_is_not_emptied(models: Saved, tmp_path: Path) -> None:
    folder = tmp_path / ".out.draft"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(AnchorsError, match="no draft of a merge"):
        run(models, tmp_path / "out")
    assert (folder / "thesis.txt").read_text() == "mine"
    (folder / "journal.json").write_text('{"identity": 3, "shards": {"../../x": []}}')
    with pytest.raises(AnchorsError, match="no draft of a merge"):
        run(models, tmp_path / "out")
    assert len(list(folder.iterdir())) == 2


def test_out_that_is_a_link_is_refused(models: Saved, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real", target_is_directory=True)
    with pytest.raises(AnchorsError, match="is a link"):
        run(models, tmp_path / "out")
    assert not list((tmp_path / "real").iterdir())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "name", ["LICENSE-other", "additional_chat_templates/one.jinja", "model.safetensors"]
)
def test_what_links_in_a_models_folder_point_to_is_not_taken(
    name: str, models: Saved, copies: Saved, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("private")
    rewrite(copies.vlm, lambda held: held)  # one file of weights
    link = copies.vlm / name
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        outside.unlink()
        link.rename(outside)
    link.symlink_to(outside)
    with pytest.raises(AnchorsError, match="outside the model's folder"):
        run(copies, tmp_path / "out")
    assert nothing_at(tmp_path / "out")


def test_a_link_inside_the_folder_and_a_snapshots_blobs_are_the_models_own(tmp_path: Path) -> None:
    folder = tmp_path / "models--me--mine" / "snapshots" / "0123"
    blobs = tmp_path / "models--me--mine" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (folder / "config.json").symlink_to(Path("../../blobs/abc"))
    (folder / "same.json").symlink_to("config.json")
    require_inside(folder, folder.iterdir())
    (folder / "other.json").symlink_to(tmp_path / "models--me--mine")
    with pytest.raises(AnchorsError, match="outside"):
        require_inside(folder, folder.iterdir())


def test_a_source_written_again_during_a_merge_gives_no_mixture(copies: Saved, tmp_path: Path) -> None:
    expert = next(copies.expert.glob("*.safetensors"))

    def touch(done: int, total: int, name: str) -> None:
        if done == total // 2:
            os.utime(expert, ns=(1, 1))

    with pytest.raises(AnchorsError, match="written again while it was merged"):
        run(copies, tmp_path / "out", report=touch)
    assert nothing_at(tmp_path / "out")
    run(copies, tmp_path / "out")
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", "", "a\\b", "a\nb", "x" * 200])
def test_a_tasks_name_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    shown = name.replace("\\", "\\\\").replace("\n", "\\n")
    file.write_text(f'name = "{shown}"\ntemplate = "{{text}}:{{label}}"\nlabels = ["A", "B"]\n')
    with pytest.raises(AnchorsError, match="part of a file's name"):
        anchors.task(str(file))
    with pytest.raises(AnchorsError):
        file_name(name, "a test")


def test_names_in_any_script_are_names() -> None:
    assert [file_name(name, "a test") for name in ("sst2", "Stimmung 2", "情感", "v1.2")]


def test_an_output_is_not_one_of_the_inputs(tmp_path: Path) -> None:
    prompt, model = tmp_path / "p.txt", tmp_path / "model"
    prompt.write_text("Review: good\nSentiment: Positive\nReview: bad\nSentiment:")
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "link.html").symlink_to(prompt)
    before = prompt.read_text()
    for out in (prompt, tmp_path / "link.html", model / "config.json"):
        said = CliRunner().invoke(app, ["view", str(prompt), "--model", str(model), "-o", str(out)])
        assert said.exit_code == 2
        assert "which is read" in " ".join(said.output.split())
    page = str(tmp_path / "page.html")
    for maps in (prompt, page):
        said = CliRunner().invoke(
            app, ["view", str(prompt), "-m", str(model), "-o", page, "--maps", str(maps)]
        )
        assert said.exit_code == 2
    assert prompt.read_text() == before
    assert not Path(page).exists()
    require_another(tmp_path / "elsewhere.html", [prompt, model, None, "openai-community/gpt2"])


def test_a_folder_with_a_stages_name_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "demo" / "base").mkdir(parents=True)
    (tmp_path / "demo" / "base" / "thesis.txt").write_text("mine")
    said = CliRunner().invoke(app, ["inject", "demo", "-o", str(tmp_path / "demo"), "--scale", "tiny"])
    assert said.exit_code == 2, said.output
    assert (tmp_path / "demo" / "base" / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "demo" / "base" / MARK).exists()


@pytest.mark.parametrize("kind", ["pipe", "link", "link to nothing"])
def test_what_is_no_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    place, aim = tmp_path / "out.html", tmp_path / "aim"
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(aim)
        if kind == "link":
            aim.write_text("mine")
    before = place.lstat()
    with pytest.raises(AnchorsError, match="not a file: it would be replaced"):
        write_atomic(place, lambda draft: draft.write_text("x"))
    with pytest.raises(AnchorsError, match="not a file: it would be replaced"):
        require_another(place, [])
    assert os.path.samestat(place.lstat(), before)
    assert kind != "link" or aim.read_text() == "mine"
