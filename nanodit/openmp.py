"""How the threads of a computation on the CPU wait for each other, said in the environment before torch is imported."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from nanodit.console import say

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # of OpenMP, of GNU's and of Intel's
LOOK = 0.25  # seconds; the kernel counts in hundredths
LACKING = 0.5  # processors that the threads would have to share with other programs
STAT, CORES = Path("/proc/stat"), Path("/sys/devices/system/cpu")
IDLE, WAITING = 4, 5  # columns of /proc/stat: idle, and idle while a disk is waited for


def let_threads_sleep() -> None:
    """Let threads sleep while they wait for each other, where other programs leave too few processors for all of them.

    By default they spin, which is faster on an idle machine; beside another program, one of them spins in the place of
    the one that it waits for (``tests/benchmarks/busy.py`` measures both). The results are the same bits. Looks at the
    machine for a quarter of a second, unless one of ``VARIABLES`` is set or there is one thread only. Elsewhere than on
    Linux nothing is known, and nothing is set.
    """
    if any(name in os.environ for name in VARIABLES):
        return
    try:
        processors = os.sched_getaffinity(0)
        threads = int(os.environ.get("OMP_NUM_THREADS") or _cores(processors))
        if threads < 2 or threads - _idle(processors) <= LACKING:
            return
    except (AttributeError, OSError, ValueError):
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    say(
        f"other programs leave fewer than {threads} processors free: threads sleep while they wait for each other "
        "(OMP_WAIT_POLICY=PASSIVE; the same results)"
    )


def _cores(processors: set[int]) -> int:
    """Count the cores of some processors: as many threads as torch takes."""
    cores = set()
    for number in processors:
        core = str(number)
        with suppress(OSError):
            core = (CORES / f"cpu{number}" / "topology" / "thread_siblings_list").read_text()
        cores.add(core)
    return len(cores)


def _idle(processors: set[int]) -> float:
    """Return how many of these processors nobody used while this process slept."""
    before, start = _ticks(processors), time.monotonic()
    time.sleep(LOOK)
    idle, spent = (now - then for now, then in zip(_ticks(processors), before))
    if not spent:
        raise ValueError("this system counts nothing")
    return idle / os.sysconf("SC_CLK_TCK") / (time.monotonic() - start)


def _ticks(processors: set[int]) -> tuple[int, int]:
    """Return the ticks that these processors were idle, and all of theirs; ValueError where they are not counted."""
    names = {f"cpu{number}" for number in processors}
    lines = [line.split() for line in STAT.read_text().splitlines() if line.partition(" ")[0] in names]
    if len(lines) < len(names):
        raise ValueError("the processors have other numbers here than the scheduler's")
    counts = [[*map(int, line[1:9])] for line in lines]  # what follows is counted in these already
    return sum(count[IDLE - 1] + count[WAITING - 1] for count in counts), sum(map(sum, counts))
