"""The soak's own logic, on a command of milliseconds: its moments, its table, and that it finds what it is to find."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from nanodit.files import sha256_file
from tests.soak import kills
from tests.soak.__main__ import SHARES, main, shares, verdict
from tests.soak.kills import ENDED, Row, Soak, Timeline, differing, draw, table, wanted_codes
from tests.soak.subjects import DONE, Subject

FILES = 30
# writes one small file after the other, and goes on where it was; what else it does is a fault of its own
COMMAND = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder, fault = Path(sys.argv[1]), sys.argv[2]
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: os._exit(75))
folder.mkdir(exist_ok=True)
again = any(folder.iterdir())
if again and fault == "traceback":
    print("Traceback (most recent call last):", flush=True)
if again and fault == "leaves":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(folder)], start_new_session=True)
for number in range(30):
    if not (folder / str(number)).exists():
        time.sleep(0.03)
        (folder / "part").write_bytes(bytes([number, again and fault == "byte"]))
        (folder / "part").rename(folder / str(number))
sys.exit(3 if again and fault == "code" else 0)
"""


def subject(fault: str = "") -> Subject:
    def done(output: Path) -> int:
        return len(list(output.glob("[0-9]*")))

    return Subject(
        "prep", {"driver": 1}, lambda output: [sys.executable, "-c", COMMAND, str(output), fault], done,
        lambda output, since: DONE if done(output) == FILES else f"{done(output)} files",
        lambda output: {path.name: sha256_file(path) for path in output.iterdir()},
        {"a part": lambda output, since: (output / "part").exists()},
    )  # fmt: skip


TIMELINE = Timeline(10.0, ((0.0, 0), (4.0, 1), (5.0, 2), (9.0, 7)), {})


def test_moments_are_drawn_over_the_whole_run_by_the_seed():
    assert TIMELINE.at(0.5) == (0, 0.5)
    assert TIMELINE.at(4.0) == (1, 0.0)
    assert TIMELINE.at(9.5) == (7, 0.5)
    moments = draw(subject(), TIMELINE, 400, seed=1)
    assert len(moments) == 400
    assert moments == draw(subject(), TIMELINE, 400, seed=1)
    assert moments != draw(subject(), TIMELINE, 400, seed=2)
    inside = [one for one in moments if one.place]
    assert 0.25 < len(inside) / len(moments) < 0.45
    at_first = sum(one.progress == 0 for one in moments if not one.place) / (len(moments) - len(inside))
    assert 0.35 < at_first < 0.55  # of nine seconds, after which all is done, the first four
    assert {one.signal for one in moments} == {"SIGKILL", "SIGTERM", "SIGINT"}


def test_kills_are_shared_among_the_subjects():
    assert sum(shares(list(SHARES), 20).values()) == 20
    assert shares(["train"], 7) == {"train": 7}


def test_the_table_and_the_last_line():
    rows = [
        Row("prep", "raylet", "SIGKILL", "writing a tar", 4, 9.25, True),
        Row("prep", "worker", "SIGTERM", "12 units committed", None, None, False),
        Row("train", "driver", "SIGINT", ENDED, 0, None, True),
    ]
    assert table(rows)[2:] == [
        "| 1 | prep | raylet | SIGKILL | writing a tar | 4 | 9.2 | yes |",
        "| 2 | prep | worker | SIGTERM | 12 units committed | went on | killed again | **no** |",
        "| 3 | train | driver | SIGINT | nothing: had ended | 0 |  | yes |",
    ]
    assert verdict(rows, [], 60)[0] == 1  # one differed
    assert verdict(rows[:1], [], 60) == (0, "1 kills in 1.0 min: 1 hit work (100%), 0 ended in other bytes, 0 faults")
    assert verdict(rows[:1], ["a traceback"], 60)[0] == 1
    assert verdict([rows[0]] * 80 + [rows[2]] * 20, [], 60)[0] == 0
    assert verdict([rows[0]] * 79 + [rows[2]] * 21, [], 60)[0] == 1
    assert verdict([rows[0]] * 3 + [rows[2]] * 2, [], 60)[0] == 0  # of a few
    assert verdict([rows[0], rows[2]], [], 60)[0] == 1


def test_exit_codes_that_a_kill_may_have():
    assert wanted_codes(Row("prep", "driver", "SIGKILL", "")) == (-9,)
    assert wanted_codes(Row("prep", "driver", "SIGTERM", "")) == (75, 0)
    assert wanted_codes(Row("prep", "driver", "SIGTERM", f"{DONE}; said so")) == (75, 0, -15)
    assert wanted_codes(Row("prep", "raylet", "SIGKILL", "")) == (4, 0)


def test_what_differs_is_found(tmp_path):
    (tmp_path / "a").write_bytes(b"1234")
    before = subject().outcome(tmp_path)
    (tmp_path / "a").write_bytes(b"1235")
    (tmp_path / "b").touch()
    assert differing(before, before) == []
    assert differing(subject().outcome(tmp_path), before) == ["a", "b"]


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("", None),
        ("byte", "differs in "),
        ("code", "ended with 3 after nothing"),
        ("traceback", "printed a traceback"),
        ("leaves", "left "),
    ],
)
def test_a_command_that_is_killed_again_and_again(tmp_path, monkeypatch, fault, found):
    monkeypatch.setattr(kills, "LEFT", 0.2)
    monkeypatch.setattr(kills, "LOOK", 0.01)
    soak = Soak(subject(fault), tmp_path, dict(os.environ), lambda text: None, threading.Event())
    soak.run(draw(soak.subject, soak.timeline, 4, seed=5))
    assert len(soak.rows) == 4
    assert sum(row.hit for row in soak.rows) >= 3
    assert {row.exit_code for row in soak.rows if row.hit} <= {-9, 75}
    if found is None:
        assert soak.faults == []
        assert all(row.equal for row in soak.rows)
    else:
        assert any(found in one for one in soak.faults), soak.faults
        assert (fault == "byte") == any(row.equal is False for row in soak.rows)
    for one in kills.left(set(), str(tmp_path)):
        os.kill(one.pid, 9)


def test_no_subject_is_refused():
    with pytest.raises(SystemExit):
        main(["--seed", "1", "--kills", "1", "--only", "cooking"])
