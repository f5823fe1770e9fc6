"""The thread that watches Ray, on sockets of the test's own; with a real Ray that is killed: tests/faults."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from nanodit.errors import ResourceError
from prep.passes.ray_passes import _starting
from tests.processes import with_role

# counts on stdout while it is watched; "end" as the last argument leaves at once
WATCHED = """
import os, resource, signal, sys, time
from prep.passes import ray_watch
from prep.passes.ray_watch import RayPlace, ended_with_ray
raylet, gcs, own, end, ray_watch.GCS_AWAY, ray_watch.TRY = *sys.argv[1:5], *map(float, sys.argv[5:])
if end == "many files":
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
if end == "busy":
    signal.signal(signal.SIGTERM, lambda *_: time.sleep(60))  # a main thread that is slow to end
with ended_with_ray(lambda: RayPlace(raylet, gcs, "/logs", own == "own"), "Run it again", "lower workers") as started:
    started()
    while end != "end":
        print("here", flush=True)
        time.sleep(0.1)
print("left", flush=True)
"""


@dataclass
class Listener:
    """A socket that takes connections; ``die`` closes it and what it took, as the death of a process does."""

    socket: socket.socket
    taken: list[socket.socket] = field(default_factory=list)

    def accept(self) -> None:
        self.taken.append(self.socket.accept()[0])

    def drop(self) -> None:
        """Close what was taken, and go on listening, as a server does that minds a silent client."""
        for one in self.taken:
            one.close()
        self.taken.clear()

    def die(self) -> None:
        self.socket.close()
        self.drop()


@pytest.fixture
def ray(tmp_path) -> Iterator[tuple[Listener, Listener]]:
    """A raylet's socket and a GCS."""
    raylet, gcs = socket.socket(socket.AF_UNIX), socket.socket()
    raylet.bind(os.path.relpath(tmp_path / "raylet"))  # its path may have 107 letters
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    gcs.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    gcs.bind(address)  # a port that was asked for is kept by a socket that listens no more
    listeners = Listener(raylet), Listener(gcs)
    for one in listeners:
        one.socket.settimeout(60)
        one.socket.listen()
    yield listeners
    for one in listeners:
        one.die()


def watched(
    ray: tuple[Listener, Listener],
    own: bool = True,
    end: str = "stay",
    gcs: str = "",
    away: float = 45,
    a_try: float = 5,
) -> subprocess.Popen[str]:
    raylet, (host, port) = (one.socket.getsockname() for one in ray)
    arguments = [raylet, gcs or f"{host}:{port}", "own" if own else "joined", end, str(away), str(a_try)]
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for one in ray[: 1 if gcs else 2]:
        one.accept()
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_the_death_of_the_raylet_ends_the_process_with_a_sentence(ray):
    process = watched(ray)
    assert process.stdout.readline() == "here\n"
    ray[0].die()
    assert ended(process) == (
        4,
        "error: the raylet of this command's own Ray on this machine has ended, killed from outside, or by the system "
        "for lack of memory; /logs/raylet.out may say more. Run it again. Where that repeats itself, lower workers\n",
    )


def test_the_death_of_ones_own_gcs_ends_it_too(ray):
    process = watched(ray)
    ray[1].die()
    code, said = ended(process)
    assert code == 4
    assert said.startswith("error: the GCS of this command's own Ray, which knows its nodes and actors, has ended")


def test_a_gcs_that_minds_a_silent_connection_is_not_dead(ray):
    process = watched(ray)
    ray[1].drop()
    ray[1].accept()  # it comes again
    assert process.poll() is None
    ray[0].die()
    assert ended(process)[1].startswith("error: the raylet of")


def test_a_cluster_may_start_its_gcs_again(ray):
    process = watched(ray, own=False)
    host, port = ray[1].socket.getsockname()
    ray[1].socket.shutdown(socket.SHUT_RDWR)  # refuses, and keeps its port
    ray[1].drop()
    for _ in range(15):
        assert process.stdout.readline() == "here\n"
    ray[1].socket.listen()
    ray[1].accept()
    ray[0].die()
    assert ended(process)[1].startswith(f"error: the raylet of Ray at {host}:{port} on this machine")


def test_a_gcs_that_is_too_busy_to_answer_is_not_dead(ray):
    """As one that the system has stopped: what it took it keeps, and its queue is full."""
    gcs = ray[1].socket
    process = watched(ray, a_try=0.5)
    gcs.listen(0)
    crowd = [socket.socket() for _ in range(4)]
    try:
        for one in crowd:
            one.setblocking(False)
            one.connect_ex(gcs.getsockname())
        ray[1].drop()
        for _ in range(20):  # longer than three tries take
            assert process.stdout.readline() == "here\n", process.stderr.read()
    finally:
        for one in crowd:
            one.close()
    ray[0].die()
    assert ended(process)[1].startswith("error: the raylet of")


def test_a_cluster_whose_gcs_only_ray_can_reach_is_not_dead(ray):
    process = watched(ray, own=False, gcs="nowhere.invalid:6379", away=1)
    for _ in range(25):
        assert process.stdout.readline() == "here\n", process.stderr.read()
    ray[0].die()
    assert ended(process)[1].startswith("error: the raylet of Ray at nowhere.invalid:6379")


def test_a_process_with_many_open_files_is_watched(ray):
    process = watched(ray, end="many files")
    ray[0].die()
    assert ended(process)[1].startswith("error: the raylet of")


def test_a_signal_to_a_command_and_its_ray_ends_it_with_75(ray):
    """`timeout`, systemd and schedulers send SIGTERM to all processes of a group."""
    process = watched(ray, end="busy")
    assert process.stdout.readline() == "here\n"
    process.terminate()
    ray[0].die()
    assert ended(process) == (75, "error: stopped by a signal. Run it again\n")


def test_the_end_of_the_session_ends_the_watch(ray):
    process = watched(ray, end="end")
    assert ended(process) == (0, "")


def test_a_ray_that_does_not_start_is_said():
    said = r"could not be started on this machine: Failed to start GCS\. .* same command again"
    with pytest.raises(ResourceError, match=said), _starting():
        raise RuntimeError("Failed to start GCS.\nLast 0 lines")
    with pytest.raises(KeyError), _starting():  # a defect stays one
        raise KeyError("node")


def test_sigterm_while_ray_starts_ends_with_75():
    code = (
        "from nanodit.errors import run_command\n"
        "from prep.passes.ray_passes import ray_session\n"
        "def main():\n"
        "    with ray_session():\n"
        "        input()\n"
        "raise SystemExit(run_command(main))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"RAY_ADDRESS": ""}, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "starting Ray on this machine\n"

    while not with_role("gcs_server", process.pid):
        assert process.poll() is None
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert said.startswith("error: stopped by a signal; finished work is kept")
