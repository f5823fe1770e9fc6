"""Torch is told to let its segments grow, before it is imported and unless somebody said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nanodit.allocator import GROWING, VARIABLES, let_segments_grow

NAME = "PYTORCH_ALLOC_CONF"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr("platform.release", lambda: "6.8.0-generic")


def test_it_is_set():
    let_segments_grow()
    assert os.environ[NAME] == GROWING


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", ["", "max_split_size_mb:512"])
def test_what_the_user_set_stays(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    let_segments_grow()
    assert {one: os.environ[one] for one in VARIABLES if one in os.environ} == {name: value}


def test_nothing_is_set_where_it_may_fail(monkeypatch):
    monkeypatch.setattr("platform.release", lambda: "6.6.87.2-microsoft-standard-WSL2")
    let_segments_grow()
    assert NAME not in os.environ
    monkeypatch.setattr("platform.release", lambda: "6.8.0-generic")
    monkeypatch.setattr(sys, "platform", "win32")
    let_segments_grow()
    assert NAME not in os.environ


@pytest.mark.parametrize("package", ["train", "evaluate"])
def test_torch_reads_it_in_a_command(package):
    """Before a verb imports torch, and torch understands it; 2.11 does not say what it read."""
    code = (
        "import os, sys\n"
        f"from {package} import __main__ as command\n"
        "def verb(options):\n"
        "    assert 'torch' not in sys.modules\n"
        "    import torch\n"
        "    read = getattr(torch._C, '_accelerator_getAllocatorSettings', lambda: os.environ['PYTORCH_ALLOC_CONF'])\n"
        "    print(read())\n"
        "class Parser:\n"
        "    def parse_args(self, arguments):\n"
        "        self.verb = verb\n"
        "        return self\n"
        "    def parse_known_args(self, arguments):\n"
        "        return self.parse_args(arguments), []\n"
        "command._parser = Parser\n"
        "sys.exit(command.main([]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, GROWING), done.stderr
