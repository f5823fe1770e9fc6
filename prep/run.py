"""``prep run``: plan, compute what is missing, publish; one at a time per output folder."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.config import dump_config
from prep.console import Progress, duration, say
from prep.errors import ConfigError, DataError, Interrupted, ResourceError
from prep.files import write_atomic
from prep.plan import Plan, check_folders, make_plan, write_manifest
from prep.publish import Published, gate, publish
from prep.settings import PrepConfig
from prep.shards import Part, Unit, fingerprint_of, read_part

PART_FILE = re.compile(r"bucket_(?P<bucket>\d+x\d+)-shard-(?P<shard>\d+)\.(?P<layer>\w+)\.parquet")


class RunFolder:
    """``runs/NNNN/`` of a dataset: the resolved config and a log with times and host, which no other file may hold."""

    def __init__(self, root: Path, config: PrepConfig) -> None:
        runs = root / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        last = max((int(path.name) for path in runs.iterdir() if path.name.isdigit()), default=0)
        self.path = runs / f"{last + 1:04d}"
        self.path.mkdir()
        write_atomic(self.path / "config.yaml", dump_config(config))
        self.rejects = self.path / "rejects.parquet"
        self.log("start", host=socket.gethostname(), pid=os.getpid())

    def log(self, event: str, **fields: Any) -> None:
        """Append one event to ``log.jsonl``."""
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n")


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the dataset's lock; it goes with the process, however that ends. Raises ConfigError when somebody has it."""
    folder = root / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ResourceError(f"output {root} cannot be written: {error.strerror}. Choose another output") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ConfigError(
                f"{root} is being written by another prep run ({file.read().strip() or 'unknown'}). Wait for it to end"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def explain(config: PrepConfig) -> None:
    """Print what ``prep run`` would compute and why; writes nothing."""
    for line in make_plan(config).explain():
        say(line)


def run(config: PrepConfig) -> None:
    """Make the dataset complete, computing only what is missing. Raises NanoditError; the same call continues."""
    check_folders(config)
    root = Path(config.output)
    with locked(root):
        folder = RunFolder(root, config)
        start = time.monotonic()
        try:
            remove_temporary_files(root)
            plan = make_plan(config)
            folder.log("plan", seen=plan.seen, samples=len(plan.sources), shards=len(plan.shards), why=plan.explain())
            gate(config, plan.rejects + plan.expected, plan.seen, folder.rejects)
            write_manifest(plan)
            work = compute(plan, folder) if plan.missing else {}
            remove_temporary_files(root)
            with Progress("publish", len(plan.sources)) as progress:
                published = publish(plan, current_parts(plan), folder.rejects)
                progress.update(published.counts["samples"])
            remove_leftovers(root, plan)
        except KeyboardInterrupt:
            folder.log("interrupted")
            raise Interrupted(f"{root}: stopped, every finished shard is kept. The same command continues") from None
        except Exception as error:
            folder.log("failed", error=str(error))
            raise
        seconds = time.monotonic() - start
        folder.log("done", seconds=round(seconds, 1), counts=published.counts, changed=published.changed)
    summarise(plan, published, work, seconds)


@dataclass
class Work:
    """What computing a layer took: samples, and seconds summed over the actors."""

    samples: int = 0
    seconds: float = 0.0


def compute(plan: Plan, folder: RunFolder) -> dict[str, Work]:
    """Compute and commit the missing units, pass by pass."""
    from prep.pipeline import plan_passes, ray_session, run_pass  # Ray takes seconds, and often nothing is missing

    work: dict[str, Work] = defaultdict(Work)
    with ray_session(), interruptible():
        for step in plan_passes(plan.config):
            tasks = plan.tasks(step.layers)
            if not tasks:
                continue
            layers = [layer for layer in step.layers if any(layer in task.recipes for task in tasks)]
            total = sum(len(task.sources) * len(task.recipes) for task in tasks)
            with Progress("+".join(layers), total, unit="samples x layers") as progress:
                for units in run_pass(plan.config, step, tasks):
                    folder.log("shard", units=units)
                    for unit in units:
                        work[unit["layer"]].samples += unit["samples"]
                        work[unit["layer"]].seconds += unit["seconds"]
                    progress.advance(sum(unit["samples"] for unit in units))
    return work


@contextmanager
def interruptible() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C; installed after ``ray.init``, which has a handler of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def current_parts(plan: Plan) -> dict[Unit, Part]:
    """Every unit of the plan as committed. Raises DataError for one that is not there, or is of another recipe."""
    root, parts = Path(plan.config.output), {}
    for unit, recipe in plan.recipes.items():
        part = plan.parts.get(unit) or read_part(root, unit)
        if part is None or part.fingerprint != fingerprint_of(recipe):
            raise DataError(f"{root / unit.tar} was not computed. Run prep run again")
        parts[unit] = part
    return parts


def remove_temporary_files(root: Path) -> None:
    """Collect what killed runs and killed actors left half-written."""
    for folder in (root, root / "parts", *root.glob("bucket_*")):
        for path in folder.glob(".*.tmp-*"):
            path.unlink(missing_ok=True)


def remove_leftovers(root: Path, plan: Plan) -> None:
    """Delete the units of shards that the published index no longer knows, parts first; other files are not ours."""
    for part in root.glob("parts/*.parquet"):
        match = PART_FILE.fullmatch(part.name)
        if match and (match["bucket"], int(match["shard"])) not in plan.shards:
            part.unlink()
            unit = Unit(match["bucket"], int(match["shard"]), match["layer"])
            (root / unit.tar).unlink(missing_ok=True)
    for folder in root.glob("bucket_*"):
        if not any(folder.iterdir()):
            folder.rmdir()


def summarise(plan: Plan, published: Published, work: dict[str, Work], seconds: float) -> None:
    """Print what was computed, what was refused, what to look at, and what was written."""
    for layer, done in work.items():
        rate = done.samples / max(done.seconds, 1e-9)
        say(
            f"  {layer:<5}{done.samples:>8} samples {done.seconds:>9.1f} actor seconds {rate:>8.1f} samples/s per actor"
        )
    if not work:
        say("nothing to compute: every layer of every shard is current")
    for reason, count in published.reasons.most_common():
        say(f"  rejected {count}: {reason}")
    for warning in published.warnings:
        say(f"warning: {warning}")
    counts, root = published.counts, plan.config.output
    what = ", ".join(published.changed) if published.changed else "nothing (already complete)"
    say(
        f"wrote {what} in {root}: {counts['samples']} samples ({counts['train']} train, {counts['holdout']} holdout) "
        f"in {len(plan.shards)} shards, {counts['rejects']} rejects, {duration(seconds)}"
    )
