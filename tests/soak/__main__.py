"""Random kills over preparing, training and sweeping: in the end every byte is that of a run which nothing disturbed.

    python -m tests.soak --seed S --kills N [--output DIR] [--only prep,train,sweep]

A seeded generator draws whom to kill (the command, an actor, its worker, the raylet, the GCS, a trial), with which
signal, and when: uniformly over the undisturbed run's course, or in a named place (a scan, a unit, a publish, a save, a
measurement). The same command then runs again, until it ends by itself; what it made is compared. Prints a Markdown
table with a row for each kill; ends with 1 where anything differed, a command ended otherwise than it should, printed a
traceback or left a process, or fewer than four of five kills hit work; of fewer than a hundred, three of five.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.prep.runs import PROJECT
from tests.soak.kills import Row, Soak, draw, table
from tests.soak.subjects import SUBJECTS

SHARES = {"prep": 0.4, "train": 0.3, "sweep": 0.3}
LANES = (("prep",), ("train", "sweep"))  # two at a time: much of their time is waiting for Ray to start
HITS, MANY, HITS_OF_FEW = 0.8, 100, 0.6  # of twenty kills fewer than 80 % hit work now and then


def shares(names: Sequence[str], kills: int) -> dict[str, int]:
    """Return how many kills each subject gets."""
    total = sum(SHARES[name] for name in names)
    counts = {name: int(kills * SHARES[name] / total) for name in names}
    counts[names[0]] += kills - sum(counts.values())
    return counts


def verdict(rows: Sequence[Row], faults: Sequence[str], seconds: float) -> tuple[int, str]:
    """Return the exit code and the last line."""
    hits, different = sum(row.hit for row in rows), sum(row.equal is False for row in rows)
    share = hits / max(1, len(rows))
    line = (
        f"{len(rows)} kills in {seconds / 60:.1f} min: {hits} hit work ({share:.0%}), {different} ended in other "
        f"bytes, {len(faults)} faults"
    )
    least = HITS if len(rows) >= MANY else HITS_OF_FEW
    return int(bool(faults) or different > 0 or share < least), line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--output", type=Path, help="keeps the logs, and what differed; default: a temporary folder")
    parser.add_argument("--only", default=",".join(SUBJECTS), metavar="prep,train,sweep")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := [name for name in names if name not in SUBJECTS]:
        parser.error(f"--only {', '.join(unknown)}: choose among {', '.join(SUBJECTS)}")
    start, lock, stop = time.monotonic(), threading.Lock(), threading.Event()

    def say(text: str) -> None:
        with lock:
            print(f"{time.monotonic() - start:6.1f} s  {text}", flush=True)

    work = Path(options.output or tempfile.mkdtemp(prefix="soak-")).absolute()
    ray_folder = tempfile.mkdtemp(prefix="soak-ray-", dir="/tmp")  # sockets need short names
    outside = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "NANODIT_FAULT")}
    environment = outside | {
        "OMP_NUM_THREADS": "1", "RAY_TMPDIR": ray_folder, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(PROJECT),
    }  # fmt: skip
    (work / "inputs").mkdir(parents=True)
    counts = shares(names, options.kills)

    def lane(members: Sequence[str]) -> list[Soak]:
        done = []
        for name in members:
            if name in counts:
                (work / name).mkdir()
                soak = Soak(SUBJECTS[name](work / "inputs"), work / name, environment, say, stop)
                soak.run(draw(soak.subject, soak.timeline, counts[name], options.seed))
                done.append(soak)
        return done

    try:
        with ThreadPoolExecutor(len(LANES)) as pool:
            try:
                soaks = [soak for done in pool.map(lane, LANES) for soak in done]
            except BaseException:  # Ctrl-C reaches the commands as well
                stop.set()
                raise
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    rows = [row for soak in soaks for row in soak.rows]
    faults = [fault for soak in soaks for fault in soak.faults]
    print(*table(rows), sep="\n")
    for fault in faults:
        print(f"fault: {fault}")
    code, line = verdict(rows, faults, time.monotonic() - start)
    if not options.output and not code:
        shutil.rmtree(work)
    elif code:
        print(f"logs, and what differs: {work}")
    print(line)
    return code


if __name__ == "__main__":
    sys.exit(main())
