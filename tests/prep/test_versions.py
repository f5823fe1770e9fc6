"""The command prep versions: what it says, asks and leaves."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import pytest

from nanodit.console import data_size
from nanodit.errors import ConfigError, DataError
from nanodit.storage import LocalFolder
from prep.__main__ import main
from prep.config import PrepConfig
from prep.dataset.reader import Dataset
from prep.report.report import render
from prep.run import run
from prep.verify.verify import verify
from prep.versions import list_versions
from tests.prep.dataset.test_versions import change
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import compute_here


@pytest.fixture
def changed(tmp_path, monkeypatch) -> tuple[PrepConfig, str]:
    """The config of a dataset after a change, and the fingerprint of the version before."""
    compute_here(monkeypatch)
    write_images(tmp_path / "source", 10)
    settings = config(tmp_path)
    run(settings)
    before = Dataset(settings.output).fingerprint
    change(tmp_path / "source")
    run(settings, prune=True)
    return settings, before


def test_dropping_frees_what_the_table_says(changed, capsys):
    """Tables that the newest version names, too, are not kept for it."""
    settings, fingerprint = changed
    (Path(settings.source) / "image-006.txt").write_text("Mended, and its manifest stays.")
    second = Dataset(settings.output).fingerprint
    run(settings, prune=True)
    assert main(["versions", settings.output, "--drop", fingerprint, "--yes"]) == 0
    (version,) = [one for one in list_versions(LocalFolder(settings.output)) if not one.newest]
    capsys.readouterr()
    before = sum(path.stat().st_size for path in (Path(settings.output) / "kept").iterdir() if path.stat().st_nlink < 2)
    assert main(["versions", settings.output, "--drop", second, "--yes"]) == 0
    assert f"to be dropped: {second[:16]}, {data_size(before)}" in capsys.readouterr().out
    assert version.alone == before
    assert not [*(Path(settings.output) / "kept").iterdir()]


class Terminal(io.StringIO):
    """A terminal at which somebody types."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("typed", ["", "\n", "n\n"])
def test_whoever_does_not_say_yes_drops_nothing(changed, typed, monkeypatch, capsys):
    settings, fingerprint = changed
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    with pytest.raises(ConfigError, match="nothing was dropped"):
        main(["versions", settings.output, "--drop", fingerprint])
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert main(["versions", settings.output, "--drop", fingerprint]) == 0


def test_logs_and_records_that_are_none_are_left_out(changed, capsys):
    settings, fingerprint = changed
    times = ["yesterday", 1e300, True]
    events = [
        {"event": "done", "fingerprint": fingerprint, "changed": ["dataset.json"], "time": time} for time in times
    ]
    log = Path(settings.output) / "runs" / "9999" / "log.jsonl"
    log.parent.mkdir()
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    folder = Path(settings.output) / "readers"
    folder.mkdir()
    record = {"host": "h", "pid": 1, "run": "r", "version": fingerprint, "seen": time.time()}
    for name, wrong in {"pid": '{"pid": 1e999}', "seen": '{"seen": -1e999}'}.items():
        (folder / f"{name}.json").write_text(json.dumps(record)[:-1] + ", " + wrong[1:])
    assert main(["versions", settings.output]) == 0
    said = capsys.readouterr().out
    assert fingerprint[:16] in said
    assert "no reader has left a record" in said


def test_verify_says_that_a_run_did_not_come_to_its_end(changed, monkeypatch):
    """Otherwise its changes look like damage of the version that is still the newest."""
    settings, _ = changed
    newest = Dataset(settings.output)
    write_images(Path(settings.source), 3, first=40)
    monkeypatch.setattr(sys.modules["prep.passes.ray_passes"], "before", lambda layers: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(settings, prune=True)
    with pytest.raises(DataError, match="a prep run is at work, or did not come to its end"):
        verify(settings.output)
    assert Dataset(settings.output).fingerprint == newest.fingerprint
    monkeypatch.setattr(sys.modules["prep.passes.ray_passes"], "before", lambda layers: None)
    run(settings, prune=True)
    verify(settings.output)


def test_a_report_is_of_one_version_while_another_is_published(changed, monkeypatch):
    settings, _ = changed
    (Path(settings.source) / "image-500.png").write_bytes(b"no image")
    monkeypatch.setenv("NANODIT_FAULT", "publish.after_rejects:raise")
    with pytest.raises(RuntimeError, match="a fault was asked for"):
        run(settings, prune=True)
    monkeypatch.delenv("NANODIT_FAULT")
    assert "image-500" not in render(LocalFolder(settings.output))
    run(settings, prune=True)
    assert "image-500" in render(LocalFolder(settings.output))
