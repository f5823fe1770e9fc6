"""Threads sleep while they wait where other programs need processors, unless somebody said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from nanodit import openmp
from nanodit.openmp import VARIABLES, let_threads_sleep

NAME = "OMP_WAIT_POLICY"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in (*VARIABLES, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("idle", "expected"), [(3.9, None), (3.6, None), (3.0, "PASSIVE"), (0.0, "PASSIVE")])
def test_threads_sleep_where_processors_are_lacking(idle, expected, monkeypatch, capsys):
    monkeypatch.setattr(openmp, "_idle", lambda processors: idle)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    let_threads_sleep()
    assert os.environ.get(NAME) == expected
    assert ("fewer than 4 processors" in capsys.readouterr().out) == bool(expected)


@pytest.mark.parametrize(("name", "value"), [(name, "") for name in VARIABLES] + [(NAME, "ACTIVE")])
def test_what_the_user_set_stays(name, value, monkeypatch):
    monkeypatch.setattr(openmp, "_idle", lambda processors: 0.0)
    monkeypatch.setenv(name, value)
    let_threads_sleep()
    assert {one: os.environ[one] for one in VARIABLES if one in os.environ} == {name: value}


def test_one_thread_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(openmp, "_idle", lambda processors: pytest.fail("looked at the machine for nothing"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    let_threads_sleep()
    assert NAME not in os.environ


def test_nothing_is_set_where_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    names = [f"cpu{number}" for number in os.sched_getaffinity(0)]
    for text in (
        None,
        "",
        "\n",
        "cpu0123 1 1 1 1 1 1 1 1\n",
        "\n".join(f"{name} 0 0 0 0 0 0 0 0 0 0" for name in names),
    ):
        monkeypatch.setattr(openmp, "STAT", tmp_path / "stat")
        if text is not None:
            (tmp_path / "stat").write_text(text)
        let_threads_sleep()
        assert NAME not in os.environ, text
    monkeypatch.delattr(os, "sched_getaffinity")
    let_threads_sleep()
    assert NAME not in os.environ


def test_hyperthreads_of_a_core_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(openmp, "CORES", tmp_path)
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings)
    assert openmp._cores({0, 1, 2, 3}) == 2
    assert openmp._cores({0, 1, 8}) == 3, "of which nothing is known"


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc/stat")
@pytest.mark.parametrize("package", ["train", "evaluate"])
def test_a_command_beside_a_program_that_spins(package):
    """On a real machine: torch's OpenMP, which prints what it read, is told before it is loaded."""
    busy = [
        subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"])
        for cpu in os.sched_getaffinity(0)
    ]
    code = (
        f"from {package} import __main__ as command\n"
        "def verb(options):\n"
        "    import torch\n"
        "command._run = verb\n"
        "class Parser:\n"
        "    def parse_args(self, arguments):\n"
        "        self.verb = verb\n"
        "        return self\n"
        "    def parse_known_args(self, arguments):\n"
        "        return self.parse_args(arguments), []\n"
        "command._parser = Parser\n"
        "raise SystemExit(command.main([]))\n"
    )
    try:
        time.sleep(0.2)  # until they spin
        environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_DISPLAY_ENV": "true"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert done.returncode == 0, done.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
