"""What is printed while something takes long, and what of a file's name reaches the terminal."""

import time

import pytest

from nanodit import console
from nanodit.console import Progress, say, waiting
from nanodit.errors import PROBLEM_BREAK, DataError, printable, run_command
from prep.passes import plan
from tests.prep.passes.test_plan import config


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in seconds, as its only item; moved by the test."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_the_start_of_the_workers_is_no_part_of_the_rate(clock, capsys):
    with Progress("px", 100) as progress:
        clock[0] += 60  # workers start
        assert progress.line() == "px: 0/100 samples, starting"
        progress.update(0, captioned=0)
        assert "starting" in progress.line()
        progress.advance(10)
        clock[0] += 5
        assert progress.line() == "px: 10/100 samples  captioned 0"  # one update says nothing of the pace
        progress.advance(10)
        assert progress.line() == "px: 20/100 samples, 2/s, 40s left  captioned 0"
    assert capsys.readouterr().out == "px: 20 samples in 1m 05s (0.3077/s)  captioned 0\n"


def test_what_was_done_by_an_earlier_run_is_no_part_of_the_rate(clock):
    with Progress("export", 100, done=50) as progress:
        assert progress.line() == "export: 50/100 samples, starting"
        progress.advance(2)
        clock[0] += 4
        progress.advance(8)
        assert progress.line() == "export: 60/100 samples, 2/s, 20s left"


def test_what_is_done_aside_is_said_and_no_part_of_the_rate(clock):
    with Progress("train", 100, unit="steps") as progress:
        progress.advance(1)
        clock[0] += 4
        progress.advance(8)
        with progress.aside("drawing pictures"):
            clock[0] += 3600
            assert progress.line() == "train: 9/100 steps, drawing pictures for 1h 00m"
        assert progress.line() == "train: 9/100 steps, 2/s, 46s left"
    with Progress("train", 100, unit="steps") as progress, progress.aside("drawing pictures"):
        assert progress.line() == "train: 0/100 steps, drawing pictures for 0s"


def test_waiting_is_never_silent(monkeypatch, capsys):
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.05)
    with waiting("starting Ray on this machine"):
        time.sleep(0.2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "starting Ray on this machine"
    assert len(lines) >= 3
    assert set(lines[1:]) == {"starting Ray on this machine: 0s"}


def test_what_is_over_soon_need_not_be_said(capsys):
    with waiting("loading the code of the encoders", at_once=False):
        pass
    assert capsys.readouterr().out == ""


def test_slow_imports_of_the_encoders_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.05)
    monkeypatch.setattr(plan, "encoder_fingerprint", lambda config, layer: time.sleep(0.2) or "")
    plan.make_recipes(config(tmp_path, layers=["dino"]), {}, {}, {})
    assert "loading the code of the encoders: 0s\n" in capsys.readouterr().out


def test_names_of_files_do_not_move_the_cursor(capsys):
    name = "a\n\x1b[2Jerror\u202e.png"
    assert printable(name) == r"a\n\x1b[2Jerror\u202e.png"
    assert printable("Grüße, 図.png") == "Grüße, 図.png"
    say(name)
    assert capsys.readouterr().out == printable(name) + "\n"

    def fail() -> None:
        raise DataError(f"{name} is bad{PROBLEM_BREAK}and another problem")

    assert run_command(fail) == 3
    assert capsys.readouterr().err == f"error: {printable(name)} is bad{PROBLEM_BREAK}and another problem\n"
