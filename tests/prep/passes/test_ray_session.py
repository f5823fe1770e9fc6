"""Which Ray a command uses, and what it needs of the machine: a cluster that answers, short names, open files."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time

import pytest

from nanodit.errors import ConfigError, ResourceError
from prep.passes import ray_passes
from prep.passes.ray_passes import cluster_address, temporary_folder

STARTED = (
    "import ray\n"
    "from nanodit.errors import run_command\n"
    "from prep.passes.ray_passes import ray_session\n"
    "def main():\n"
    "    with ray_session():\n"
    "        print(ray.get(ray.remote(lambda: 'ran').remote()))\n"
    "raise SystemExit(run_command(main))\n"
)


def started(limits: tuple[int, int] | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that starts a Ray of its own, in a process with this environment."""
    return subprocess.run(
        [sys.executable, "-c", STARTED], env={**os.environ, "RAY_ADDRESS": "", **environment}, text=True,
        capture_output=True, check=False,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits)) if limits else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ("ray://127.0.0.1:10001", ConfigError, "ray job submit"),
        ("nowhere", ConfigError, "is no HOST:PORT"),
        ("127.0.0.1:head", ConfigError, "is no HOST:PORT"),
        ("127.0.0.1:9", ResourceError, "nobody answers at 127.0.0.1:9"),
        ("127.0.0.1:99999", ResourceError, "nobody answers at 127.0.0.1:99999"),
        ("no-such-host.invalid:6379", ResourceError, "nobody answers at no-such-host.invalid:6379"),
    ],
)
def test_an_address_where_no_cluster_is_ends_at_once(given, kind, said):
    start = time.monotonic()
    with pytest.raises(kind, match=said):
        cluster_address(given)
    assert time.monotonic() - start < 30


def test_auto_is_a_cluster_that_was_started_for_others(monkeypatch):
    """The Ray that a command started for itself writes no address; others could only guess it."""
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda: None)
    with pytest.raises(ConfigError, match="no cluster was started on this machine with `ray start`, or"):
        cluster_address("auto")
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        monkeypatch.setattr("ray._private.utils.read_ray_address", lambda: address)
        assert cluster_address("auto") == address
    with pytest.raises(ResourceError, match="nobody answers"):
        cluster_address("auto")


def test_a_folder_with_a_long_name_is_not_used(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    assert temporary_folder() == f"/tmp/ray-{os.getuid()}"
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert temporary_folder() is None
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="Set RAY_TMPDIR to one of at most"):
        temporary_folder()


@pytest.mark.slow
def test_a_long_tmpdir_and_few_open_files_are_no_hindrance(tmp_path):
    long = tmp_path / ("x" * 60)
    long.mkdir()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    done = started((64, hard), TMPDIR=str(long), RAY_TMPDIR="")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "ran"), done.stderr


def test_too_few_open_files_are_said():
    done = started((64, 64))
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert f"ulimit -n {ray_passes.OPEN_FILES}" in done.stderr
