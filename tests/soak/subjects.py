"""What is killed: ``prep run``, ``train run`` and ``train sweep`` on tiny data; what their files say and hold.

Nothing here asks the product: files, the process tree and exit codes tell what is at work, as they would an observer.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prep.figures.figures import write_figures
from tests.prep.runs import files_of
from tests.train.sweeps import write_sweep
from tests.train.tiny import write_config, write_dataset

FIGURES, STEPS, TRIAL_STEPS = 24, 120, 40
EVERY = 10  # steps between checkpoints
DONE = "nothing: everything was written"
FATAL = ("driver", "raylet", "gcs_server")  # whose death ends the command


@dataclass(frozen=True)
class Subject:
    """A command that is killed and run again until it ends by itself.

    ``command(output)`` writes everything below ``output``. ``progress`` counts what its files say is done; ``at_work``
    says in words what is being done, ``places`` tell whether it is in a named one: both of files that were changed
    ``since`` (seconds of the clock), as a killed command leaves some behind. ``outcome`` gives what must be equal to
    the undisturbed run's, name -> hash or value.
    """

    name: str
    victims: Mapping[str, float]  # role -> how often, relative to the others
    command: Callable[[Path], list[str]]
    progress: Callable[[Path], int]
    at_work: Callable[[Path, float], str]
    outcome: Callable[[Path], dict[str, Any]]
    places: Mapping[str, Callable[[Path, float], bool]] = field(default_factory=dict)


def new(folder: Path, pattern: str, since: float) -> Path | None:
    """Return a path that was changed since then; None where there is none, or it goes away meanwhile."""
    try:
        return next((path for path in folder.glob(pattern) if path.stat().st_mtime >= since), None)
    except OSError:
        return None


# prep


def prep(inputs: Path) -> Subject:
    """``prep run`` of figures with the demo encoders, every layer, two shards of four and less in each bucket."""
    source = inputs / "figures"
    if not source.exists():
        write_figures(source, FIGURES, size=96, seed=3, short_captions=True, workers=1)
    overrides = [f"source={source}", "base=64", "encoders=demo", "shard_size=4", "holdout_min=4"]

    def command(output: Path) -> list[str]:
        return [sys.executable, "-m", "nanodit", "prep", "run", *overrides, f"output={output}"]

    return Subject(
        "prep", {"driver": 5, "worker": 3, "actor": 2, "raylet": 2, "gcs_server": 1}, command,
        prep_progress, prep_at_work, files_of, {"a scan": in_a_scan, "a unit": in_a_unit, "a publish": in_a_publish},
    )  # fmt: skip


def prep_progress(root: Path) -> int:
    """The plan, each committed unit, and the files that publishing writes."""
    published = sum((root / name).exists() for name in ("manifest.parquet", "index.parquet", "dataset.json"))
    return published + len(list((root / "parts").glob("*.parquet")))


def in_a_scan(root: Path, since: float) -> bool:
    """Whether this run has begun, and has not yet said what it will do."""
    log = new(root, "runs/*/log.jsonl", since)
    return log is not None and b'"plan"' not in log.read_bytes()


def in_a_unit(root: Path, since: float) -> bool:
    """Whether a worker is writing a tar."""
    return new(root, "bucket_*/.*.tmp-*", since) is not None


def in_a_publish(root: Path, since: float) -> bool:
    """Whether files of the dataset are being written, the last of them not yet."""
    written = any(new(root, name, since) for name in (".index.parquet.tmp-*", ".dataset.json.tmp-*", "index.parquet"))
    return written and not (root / "dataset.json").exists()


def prep_at_work(root: Path, since: float) -> str:
    units = len(list((root / "parts").glob("*.parquet")))
    if (root / "dataset.json").exists():
        return DONE
    if in_a_publish(root, since):
        return "publishing"
    if tar := new(root, "bucket_*/.*.tmp-*", since):
        return f"writing {tar.parent.name}/{tar.name[1:].partition('.tmp')[0]}, {units} units committed"
    return f"{'scanning, ' if in_a_scan(root, since) else ''}{units} units committed"


# train


def train(inputs: Path) -> Subject:
    """``train run`` of a tiny network, which saves every ten steps."""
    dataset = made_up(inputs)

    def command(output: Path) -> list[str]:
        output.mkdir(parents=True, exist_ok=True)
        config = write_config(output / "tiny.yaml", dataset, output / "run")
        overrides = [f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "visual_debug.every_steps=40"]
        return [sys.executable, "-m", "nanodit", "train", "run", "--config", str(config), *overrides]

    return Subject(
        "train", {"driver": 1}, command, lambda output: steps_of(output / "run"),
        lambda output, since: run_at_work(output / "run", since), lambda output: run_outcome(output / "run"),
        {"a save": lambda output, since: in_a_save(output / "run", since)},
    )  # fmt: skip


def made_up(inputs: Path) -> Path:
    dataset = inputs / "dataset"
    return dataset if dataset.exists() else write_dataset(dataset)


def steps_of(run: Path) -> int:
    """The steps that are logged; a run that continues goes back to those of its checkpoint."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def in_a_save(run: Path, since: float) -> bool:
    """Whether a checkpoint is being written."""
    return new(run, "checkpoints/.step-*.tmp", since) is not None


def run_at_work(run: Path, since: float) -> str:
    if saving := new(run, "checkpoints/.step-*.tmp", since):
        return f"saving {saving.name[1:].removesuffix('.tmp')}"
    if (run / f"checkpoints/step-{STEPS:06d}").exists():
        return DONE
    going = new(run, "metrics.jsonl", since)
    return f"after step {steps_of(run)}" if going else f"before a step, {steps_of(run)} logged"


def run_outcome(run: Path) -> dict[str, Any]:
    """Hashes of every tensor file, what a checkpoint's state says, and the logged values but those of speed.

    A run that is asked to stop saves where it is: such checkpoints are one-sided, and what follows from them is not.
    """
    found: dict[str, Any] = {}
    for file in sorted(run.glob("checkpoints/step-*/*")):
        if int(file.parent.name.removeprefix("step-")) % EVERY:
            continue
        name = file.relative_to(run).as_posix()
        if file.suffix == ".safetensors":
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.name == "state.json":
            found[name] = json.loads(file.read_text()) | {"config": None}
    for line in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else ():
        record = json.loads(line)
        kept = {key: value for key, value in record.items() if not key.startswith(("sys/", "memory/"))}
        found[f"metrics.jsonl, step {record['step']}"] = kept
    return found


# sweep


def sweep(inputs: Path) -> Subject:
    """``train sweep --resume`` of two trials, one after the other, each trained and measured."""
    dataset = made_up(inputs)
    names = ("A-seed0", "B-seed0")

    def command(output: Path) -> list[str]:
        changes = {
            "overrides": {"checkpoint.every_steps": EVERY, "train.batch_size": 2, "tread.start": 0, "tread.end": 0},
            "budget": {"steps": TRIAL_STEPS}, "retries": 50, "concurrent": 1,
        }  # fmt: skip
        config = write_sweep(output, dataset, **changes)
        return [sys.executable, "-m", "nanodit", "train", "sweep", "--config", str(config), "--resume"]

    def trials(output: Path) -> list[Path]:
        return [output / "sweep" / "trials" / name for name in names]

    def progress(output: Path) -> int:
        finished = sum(record_of(trial).get("status") == "finished" for trial in trials(output))
        return finished + sum(map(steps_of, trials(output)))

    def at_work(output: Path, since: float) -> str:
        for trial in trials(output):
            status = record_of(trial).get("status")
            if status == "finished":
                continue
            if status is None:
                return f"before {trial.name}"
            measured = " (being measured)" if steps_of(trial) == TRIAL_STEPS else ""
            return f"{trial.name}, {run_at_work(trial, since)}{measured}"
        return DONE

    def outcome(output: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for trial in trials(output):
            found[f"{trial.name}: status"] = record_of(trial).get("status")
            found |= {f"{trial.name}: {name}": value for name, value in run_outcome(trial).items()}
            for report in sorted(trial.rglob("report.json")):
                found[f"{trial.name}: metrics of {report.name}"] = json.loads(report.read_text())["metrics"]
        return found

    def being_measured(output: Path, since: float) -> bool:
        return any(
            steps_of(one) == TRIAL_STEPS
            and (one / f"checkpoints/step-{TRIAL_STEPS:06d}").exists()
            and record_of(one).get("status") == "running"
            for one in trials(output)
        )

    return Subject(
        "sweep", {"driver": 3, "trial": 4, "actor": 1, "raylet": 1}, command, progress, at_work, outcome,
        {
            "a save": lambda output, since: any(in_a_save(trial, since) for trial in trials(output)),
            "a measurement": being_measured,
        },
    )  # fmt: skip


def record_of(trial: Path) -> dict[str, Any]:
    try:
        return json.loads((trial / "trial.json").read_text())
    except OSError:
        return {}


SUBJECTS: dict[str, Callable[[Path], Subject]] = {"prep": prep, "train": train, "sweep": sweep}
