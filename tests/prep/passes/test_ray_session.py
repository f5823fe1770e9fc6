"""Which Ray a command uses, and what it needs of the machine: a cluster that answers, short names, open files."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanodit.errors import ConfigError, ResourceError
from prep.dataset.reader import Dataset
from prep.doctor.node import _address
from prep.passes import ray_passes
from prep.passes.ray_passes import cluster_address, ray_session, temporary_folder
from prep.run import run
from tests.prep.passes.test_plan import write_images
from tests.prep.runs import PROJECT, command, parent_of, poses

STARTED = (
    "from nanodit.errors import run_command\n"
    "from prep.passes.ray_passes import ray_session\n"
    "def main():\n"
    "    with ray_session():\n"
    "        print('started')\n"
    "raise SystemExit(run_command(main))\n"
)


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


def test_too_few_open_files_are_said():
    done = subprocess.run(
        [sys.executable, "-c", STARTED], env=os.environ | {"RAY_ADDRESS": ""}, text=True, capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )  # fmt: skip
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert f"ulimit -n {ray_passes.OPEN_FILES}" in done.stderr


def listening(parent: int) -> dict[str, set[str]]:
    """Names of a process and all below it -> addresses at which they listen."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = parent_of(int(folder.name))
        except (OSError, StopIteration):  # it has ended
            continue
    tree = {parent}
    while more := {process for process, above in parents.items() if above in tree} - tree:
        tree |= more
    inodes = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for fields in map(str.split, Path(table).read_text().splitlines()[1:]):
            if fields[3] == "0A":  # LISTEN
                inodes[f"socket:[{fields[9]}]"] = _address(fields[1].partition(":")[0])
    found: dict[str, set[str]] = {}
    for process in tree:
        try:
            name = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip().partition(" ")[0]
            sockets = {os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir()} & set(inodes)
        except OSError:
            continue
        if sockets:
            found.setdefault(name.rpartition("/")[2], set()).update(inodes[one] for one in sockets)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_with_a_ray_of_its_own_listens_on_loopback_alone_stops_when_asked_and_continues(
    tmp_path, monkeypatch, without_ray
):
    """A long TMPDIR and few open files are no hindrance to it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    long = tmp_path / ("x" * 60)
    long.mkdir()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    write_images(tmp_path / "source", 40, size=(400, 400))
    settings = poses(tmp_path, shard_size=1)
    process = subprocess.Popen(
        command(settings, "workers=1"), cwd=PROJECT, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(long), "RAY_TMPDIR": ""},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)),
    )  # fmt: skip
    parts = tmp_path / "out" / "parts"
    while process.poll() is None and not list(parts.glob("*.parquet")):
        time.sleep(0.05)
    found = listening(process.pid)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "The same command continues" in errors
    assert not (tmp_path / "out" / "index.parquet").exists()
    assert {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= set(found)
    outside = {one for at in found.values() for one in at if not ipaddress.ip_address(one).is_loopback}
    assert {name: at for name, at in found.items() if at & outside} == {}
    run(settings)
    assert len(Dataset(tmp_path / "out")) == 40


def test_a_ray_that_listens_elsewhere_is_said(monkeypatch, capsys):
    """As a version of Ray would that decides in another way where it listens."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for name in ("init", "shutdown"):  # a Ray of this test worker goes on
        monkeypatch.setattr(f"ray.{name}", lambda **options: None)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "192.0.2.7")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ray_session():
        pass
    assert "listens at 192.0.2.7" in capsys.readouterr().out
