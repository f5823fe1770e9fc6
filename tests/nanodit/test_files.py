"""Whole files or none, under names that nobody can foresee, and places that are refused before the work."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from nanodit import files
from nanodit.errors import ConfigError, run_command
from nanodit.files import check_writable, named, no_link, temporary_beside, write_atomic
from nanodit.lock import LOCK, locked
from nanodit.storage import LocalFolder
from train.checkpoint.run_folder import RUN_LOCK, lock_run_folder


def test_a_temporary_name_cannot_be_foreseen(tmp_path):
    names = {temporary_beside(tmp_path / "a.png").name for _ in range(8)}
    assert len(names) == 8
    assert all(re.fullmatch(rf"\.a\.png\.tmp-[0-9a-f]{{8}}-{os.getpid()}", name) for name in names)


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path, monkeypatch):
    """As somebody could lay it who knows the name: the user's file keeps its content."""
    mine = tmp_path / "mine.txt"
    mine.write_text("kept")
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 8)
    link = temporary_beside(tmp_path / "a.txt")
    link.symlink_to(mine)
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "a.txt", "new")
    with pytest.raises(FileExistsError):
        LocalFolder(tmp_path).draft("a.txt")
    assert mine.read_text() == "kept"
    assert not (tmp_path / "a.txt").exists()


@pytest.mark.parametrize("name", [LOCK, RUN_LOCK])
def test_a_lock_that_is_a_link_is_refused_and_its_target_kept(tmp_path, name, capsys):
    mine, lock = tmp_path / "mine.txt", tmp_path / "out" / name
    mine.write_text("kept")
    lock.parent.mkdir(parents=True)
    lock.symlink_to(mine)

    def hold():
        with locked(tmp_path / "out") if name == LOCK else lock_run_folder(tmp_path / "out"):
            pytest.fail("was locked")

    assert run_command(hold) in (2, 4)
    assert mine.read_text() == "kept"
    assert "link" in capsys.readouterr().err


def test_a_log_that_is_a_link_is_not_written_to(tmp_path):
    (tmp_path / "log").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(OSError, match="log") as caught:
        open(tmp_path / "log", "a", opener=no_link).close()
    assert caught.value.errno == errno.ELOOP
    assert not (tmp_path / "mine.txt").exists()


def test_a_full_disk_names_the_file(tmp_path):
    """A real one: a device that is always full."""
    with (
        pytest.raises(OSError, match="No space left") as caught,
        named("a.tar"),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "a.tar")


def test_writing_to_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(tmp_path / "a.txt", "new")
    assert caught.value.filename == str(tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_places_that_can_be_written(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "a.png")
    check_writable(tmp_path / "new", folder=True)
    check_writable(tmp_path, folder=True)
    (tmp_path / "a.png").touch()
    check_writable(tmp_path / "a.png")
    assert [*tmp_path.iterdir()] == [tmp_path / "a.png"]


@pytest.mark.parametrize(
    ("place", "folder", "expected"),
    [
        ("file/a.png", False, "file is not a folder"),
        ("file/b/c/a.png", False, "file is not a folder"),
        ("folder", False, "is a folder; name a file"),
        ("file", True, "is a file; name a folder"),
        ("gone/a.png", False, "gone is not a folder"),
    ],
)
def test_places_that_cannot_be_written(tmp_path, place, folder, expected):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=re.escape(expected)):
        check_writable(tmp_path / place, folder=folder)


def test_a_place_that_nobody_may_write_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(ConfigError, match="may not be written"):
        check_writable(tmp_path / "a" / "b.png")
