"""The processes of a command and what each is there for, read from /proc: what a test may kill, and what is left."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

# role -> what the command line holds
ROLES = {
    "raylet": "/raylet --", "gcs_server": "/gcs_server --", "worker": " prep.passes.worker ", "trial": " --trial ",
}  # fmt: skip
ACTORS = ("MapWorker", "SupervisedTrial", "ResourceTrainable")  # in the titles that Ray gives them


@dataclass(frozen=True)
class Process:
    """A process as /proc shows it; ``begun`` tells it from a later one with the same number."""

    pid: int
    parent: int
    begun: int  # clock ticks since the system started
    command: str

    @property
    def role(self) -> str:
        """What it is there for; empty for what no test kills."""
        if self.command.startswith("ray::"):
            return "actor" if any(name in self.command for name in ACTORS) else ""
        return next((role for role, words in ROLES.items() if words in self.command), "")


def read_process(pid: int, command: bool = True) -> Process | None:
    """Return the process with this number; None where there is none, or one that has ended and was not waited for."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        words = Path(f"/proc/{pid}/cmdline").read_bytes() if command else b""
    except OSError:
        return None
    if stat[0] in (b"Z", b"X"):
        return None
    return Process(pid, int(stat[1]), int(stat[19]), words.replace(b"\0", b" ").decode(errors="replace"))


def all_processes(command: bool = True) -> dict[int, Process]:
    """Return every living process, with its command line or without."""
    found = (read_process(int(name), command) for name in os.listdir("/proc") if name.isdigit())
    return {one.pid: one for one in found if one}


def below(root: int) -> dict[int, Process]:
    """Return the living descendants of a process."""
    everything, found, parents = all_processes(command=False), set(), {root}
    while parents:
        parents = {pid for pid, one in everything.items() if one.parent in parents} - found
        found |= parents
    return {pid: one for pid in found if (one := read_process(pid))}


def with_role(role: str, root: int) -> list[int]:
    """Return the descendants of a process that have this role, the one that was begun last at the end."""
    return [one.pid for one in sorted(below(root).values(), key=lambda one: one.begun) if one.role == role]


def handles(pid: int, number: int) -> bool:
    """Return whether a process catches this signal."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    mask = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(mask >> (number - 1) & 1)


def left(seen: set[tuple[int, int]], words: str = "", seconds: float = 0.0) -> list[Process]:
    """Return which of ``seen``, (pid, begun), or of those with ``words`` in their command line still run after a time.

    Returns as soon as there is none.
    """
    end = time.monotonic() + seconds
    while True:
        living = [
            one for one in all_processes().values()
            if (one.pid, one.begun) in seen or (words and words in one.command and one.pid != os.getpid())
        ]  # fmt: skip
        if not living or time.monotonic() > end:
            return living
        time.sleep(0.1)
