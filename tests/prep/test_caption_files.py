"""Captions that a person reads and mends: the list, the files, and what a run takes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from nanodit.errors import ConfigError
from prep.__main__ import main
from prep.caption_files import list_captions, write_captions
from prep.captions.written import NAME
from prep.config import PrepConfig
from prep.dataset.reader import Dataset
from prep.passes.plan import make_plan
from prep.run import run
from tests.prep.caption_server import CaptionServer
from tests.prep.captioning import FAST
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import compute_here

MENDED = "Two dogs sleep beside a grey wall, as a person wrote it."


@pytest.fixture
def server() -> Iterator[CaptionServer]:
    with CaptionServer() as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path, server: CaptionServer) -> PrepConfig:
    write_images(tmp_path / "source", 6)
    for path in sorted((tmp_path / "source").glob("*.txt"))[2:]:
        path.unlink()  # two images come with a caption
    captions = {"backend": "ollama", "hosts": [server.url]} | FAST
    return config(tmp_path, layers=["text"], captions=captions, shard_size=6)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_here(monkeypatch)


def prepare(settings: PrepConfig) -> list[str]:
    """Do what ``prep run`` does; returns the layers that had to be computed."""
    missing = sorted({unit.layer for unit in make_plan(settings).missing})
    run(settings)
    return missing


def captions_of(settings: PrepConfig) -> dict[str, str]:
    return {row["source"]: row["caption"] for row in Dataset(settings.output).rows()}


def asked(server: CaptionServer) -> int:
    return sum(bool(request.get("image")) for request in server.log)


def test_a_mended_file_is_taken_and_the_others_stay_the_models(settings: PrepConfig, server: CaptionServer) -> None:
    prepare(settings)
    before, questions = captions_of(settings), asked(server)
    write_captions(settings.output, Path(settings.source), beside=True)
    files = {path.name: path for path in Path(settings.source).glob("*.txt")}
    assert len(files) == 6
    for name, text in before.items():
        assert files[name.replace(".png", ".txt")].read_text().strip() == text
    assert prepare(settings) == []  # files that nobody changed change nothing
    files["image-003.txt"].write_text(MENDED)
    assert prepare(settings) == ["t5", "text"]
    assert captions_of(settings) == before | {"image-003.png": MENDED}
    assert asked(server) == questions

    # a model that is asked otherwise writes what a person has not written
    options = settings.captions.options.model_copy(update={"seed": 5, "temperature": 1.0})
    for overwrite, kept in ((False, {"image-000.png", "image-001.png", "image-003.png"}), (True, {"image-003.png"})):
        section = settings.captions.model_copy(update={"overwrite": overwrite, "options": options})
        other = settings.model_copy(update={"captions": section})
        prepare(other)
        after = captions_of(other)
        assert {name for name in after if after[name] == (before | {"image-003.png": MENDED})[name]} == kept
    write_captions(settings.output, Path(settings.source), beside=True)  # brings those up to date that nobody changed
    assert files["image-004.txt"].read_text().strip() == captions_of(other)["image-004.png"] != before["image-004.png"]
    assert files["image-003.txt"].read_text() == MENDED


def test_what_a_person_changed_is_written_anew_only_where_that_is_asked_for(settings: PrepConfig) -> None:
    prepare(settings)
    before = captions_of(settings)
    write_captions(settings.output, Path(settings.source), beside=True)
    (Path(settings.source) / "image-003.txt").write_text(MENDED)
    for keep, caption in ((True, MENDED), (False, before["image-003.png"])):
        section = settings.captions.model_copy(update={"overwrite": True, "keep_edited": keep})
        prepare(settings.model_copy(update={"captions": section}))
        assert captions_of(settings)["image-003.png"] == caption


def test_files_of_a_person_are_never_written_over(settings: PrepConfig, tmp_path: Path, capsys) -> None:
    prepare(settings)
    mine = Path(settings.source) / "image-004.txt"
    mine.write_text("Mine, and not yet taken.")
    (Path(settings.source) / "image-005.txt").symlink_to(tmp_path / "elsewhere")
    (Path(settings.source) / "image-002.png").unlink()
    capsys.readouterr()
    write_captions(settings.output, Path(settings.source), beside=True)
    assert mine.read_text() == "Mine, and not yet taken."
    assert not (tmp_path / "elsewhere").exists()
    out = capsys.readouterr().out
    assert "wrote 1 captions" in out
    assert "2 files stay as a person wrote them" in out
    assert "1 images are not in" in out


def test_only_a_file_that_was_written_counts_as_changed(settings: PrepConfig) -> None:
    source, section = Path(settings.source), settings.captions.model_copy(update={"overwrite": True})
    settings = settings.model_copy(update={"captions": section})
    (source / "metadata.csv").write_text("file_name,text\nimage-003.png,From a table.\n")
    prepare(settings)
    before = captions_of(settings)
    write_captions(settings.output, source, beside=True)
    (source / "image-003.txt").unlink()
    assert prepare(settings) == []
    assert captions_of(settings) == before


def test_two_images_that_would_share_a_file_get_none(settings: PrepConfig, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(settings.source)
    Image.effect_noise((80, 64), 50).convert("RGB").save(source / "image-004.jpg")
    prepare(settings)
    before = captions_of(settings)
    assert before["image-004.jpg"] != before["image-004.png"]
    capsys.readouterr()
    write_captions(settings.output, source, beside=True)
    assert prepare(settings) == []
    assert captions_of(settings) == before
    assert not (source / "image-004.txt").exists()
    assert "2 images would share a file with another, such as image-004.jpg" in capsys.readouterr().out
    (source / "image-004.txt").write_text(MENDED)  # of a person it is the caption of both
    prepare(settings)
    assert captions_of(settings) == before | dict.fromkeys(("image-004.jpg", "image-004.png"), MENDED)


def test_another_folder_gets_all_and_is_not_remembered(settings: PrepConfig, tmp_path: Path) -> None:
    prepare(settings)
    write_captions(settings.output, tmp_path / "texts", beside=False)
    assert len(list((tmp_path / "texts").glob("*.txt"))) == 4  # those of the model
    assert not (Path(settings.output) / NAME).exists()


def test_doubtful_captions_are_listed_with_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "source", 5)
    texts = [
        "1girl, solo, sunset, beach, masterpiece, best quality",
        "Here is a caption for the image: a dog sleeps.",
        "A dog sleeps beside a wall.",
        "A dog sleeps, beside a wall",
        "A cat looks at the sea from a stone, in the light of the evening, and waits for the boats to come back.",
    ]
    for number, text in enumerate(texts):
        (tmp_path / "source" / f"image-{number:03d}.txt").write_text(text)
    settings = config(tmp_path, layers=["text"])
    prepare(settings)
    capsys.readouterr()
    assert main(["captions", settings.output, "--list", "--flagged"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    listed = {line.split()[1]: line for line in lines}
    assert set(listed) == {f"image-{number:03d}.png" for number in range(4)}
    assert "[a list of tags]" in listed["image-000.png"]
    assert "[the model talks to the reader" in listed["image-001.png"]
    assert "[the same as another's]" in listed["image-003.png"]
    assert last.startswith("5 captions, 0 by a model; 4 doubtful (")
    list_captions(settings.output)
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--write-txt"], "where to\\? Give --source FOLDER"),
        (["--write-txt", "--flagged", "--to", "x"], "--flagged belongs to --list"),
        (["--list", "--to", "x"], "--source and --to say where"),
        (["--write-txt", "--source", "nowhere-at-all"], "is not a folder|does not exist|cannot"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        main(["captions", str(tmp_path), *options])
