"""One trial of a sweep, in a process of its own: train, measure, and record the outcome in ``trial.json``.

``trial.json`` is the truth about a trial: whoever continues the sweep needs nothing else to know what is finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodit.config import dump_config, load_config
from nanodit.console import waiting
from nanodit.errors import DataError, Interrupted, ResourceError, gpu_is_full
from nanodit.faults import fault
from nanodit.files import no_link, sha256_file, write_atomic
from nanodit.posix import fcntl, peak_memory
from prep.dataset.reader import open_version
from train.config import TrainConfig
from train.sweep.process import secrets, without
from train.sweep.record import FINISHED, PLAN, RUNNING, read_record, write_record

LOCK = "trial.lock"
LOCK_WAIT = 90.0  # seconds for the process of a driver that was killed to save and go
PACE_STEPS = 30  # that measure how many steps a budget of hours has
RATE = "sys/iter_per_sec"
PACKAGES = ("nanodit", "prep", "train", "evaluate")
# what only reads what trials wrote
READERS = (
    "evaluate/report/", "evaluate/sweep/", "evaluate/statistics/verdicts", "evaluate/statistics/looks", "nanodit/svg",
    "nanodit/pages",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Training and measuring a trial, handed in by the entry point: ``train`` imports nothing of ``evaluate``."""

    train: Callable[[TrainConfig], None]  # as `train run` does
    # a run folder and the evaluation's config -> the name of the folder that `evaluate run` wrote
    evaluate: Callable[[Path, Path], str | None]
    evaluation: Callable[[Path, Sequence[str]], str]  # a config file and overrides -> the evaluation's config, YAML
    check: Callable[[str, TrainConfig, str, str], None]  # YAML, trial, metric, mode: refuses a metric that is not there


def run_trial(folder: Path, name: str, work: Work) -> None:
    """Train and measure a trial of the sweep in ``folder``, from where it is, and record the outcome.

    The driver has written ``trials/NAME/config.yaml`` and ``evaluate/ARM.yaml``. Raises what training and evaluation
    raise, after noting the reason; the driver decides whether the trial is tried again.
    """
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    planned = plan["trials"][name]
    trial = folder / "trials" / name
    with _alone(trial):
        before = read_record(trial)
        if before.get("status") == FINISHED:
            return
        config = _config_of(trial)
        begun = {"arm": planned["arm"], "seed": planned["seed"], "attempts": 0, "failures": 0, "started": time.time()}
        record = begun | before | {"status": RUNNING, "reason": None, "ended": None}
        record |= {"attempts": record["attempts"] + 1}
        write_record(trial, record)
        try:
            fault("sweep.trial", name)
            record |= {"cohort": cohort(config, before.get("cohort"))}
            write_record(trial, record)
            if planned["trained_by"]:
                record |= _take_over(folder / "trials" / planned["trained_by"], trial)
            else:
                if (hours := plan["budget"].get("hours")) and "planned_steps" not in record:
                    record["planned_steps"] = _steps_within(hours, trial, config, work.train)
                    write_record(trial, record)
                config = _config_of(trial)
                work.train(config)
                record |= measured(trial, config)
            fault("sweep.evaluate", name)
            record["measured_in"] = work.evaluate(trial, folder / "evaluate" / planned["evaluation"])
        except (KeyboardInterrupt, Interrupted):
            write_record(trial, record | {"reason": "interrupted; what was trained is saved"})
            raise
        except BaseException as error:
            write_record(trial, record | {"reason": reason_of(error)})
            raise
        write_record(trial, record | {"status": FINISHED, "ended": time.time()})


def _config_of(trial: Path) -> TrainConfig:
    """Return the config of a trial, which trains where its folder lies now: a sweep may be moved, or copied."""
    return load_config(TrainConfig, trial / "config.yaml").model_copy(update={"output": str(trial)})


def reason_of(error: BaseException) -> str:
    """Say why a trial failed, on one line and without secrets."""
    said = str(error).strip().partition("\n")[0]
    kind = type(error).__name__
    text = f"{kind}: {said}" if said else kind
    if isinstance(error, MemoryError) or gpu_is_full(error):
        text = f"out of memory: {text}"
    return without(secrets(os.environ), text)


def measured(trial: Path, config: TrainConfig) -> dict[str, Any]:
    """Return the steps, images, seconds of training and memory of a run that has ended.

    ``seconds`` is the pace of the steps that count (no warm-up, compilation, validation, saving) times all steps.
    ``peak_memory_gb`` is that of the GPU, or of this process where there is none, in 1e9 bytes.
    """
    from train.loop.tracking import read_metrics

    records = read_metrics(trial / "metrics.jsonl")
    steps, timed, seconds, before = config.train.steps, 0, 0.0, 0
    for record in records:
        if rate := record.get(RATE):
            timed += record["step"] - before
            seconds += (record["step"] - before) / rate
        before = record["step"]
    peaks = [record["memory/peak_vram_gb"] for record in records if "memory/peak_vram_gb" in record]
    return {
        "steps": steps,
        "images": steps * config.train.batch_size * config.train.grad_accumulation_steps,
        "seconds": seconds * steps / timed if timed else None,
        "peak_memory_gb": max(peaks, default=peak_memory() / 1e9),
    }


def cohort(config: TrainConfig, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what must be equal for trials to be compared: code, data, packages and machine; no host names, no paths.

    The commit is in provenance.json: one that touches other files makes no cohort, and a dirty tree may make several.
    A trial that goes on under another one belongs to neither: what differs from ``before`` is named with both values.
    """
    import torch

    device = torch.device("cuda" if config.train.device != "cpu" and torch.cuda.is_available() else "cpu")
    now = {
        "code": code_hash(),
        # a trial that goes on reads the version that it began on
        "dataset": open_version(config.dataset, (before or {}).get("dataset", "")).fingerprint,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": config.train.threads,
    }
    if not before:
        return now
    same = {name for name, value in now.items() if before.get(name) == value}
    return {name: value if name in same else f"{before.get(name)}, then {value}" for name, value in now.items()}


def code_hash() -> str:
    """Return a hash over the sources of the packages that have a part in a trial's numbers."""
    root, total = Path(__file__).parents[2], hashlib.sha256()
    for file in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if not name.startswith(READERS):
            total.update(f"{name} {sha256_file(file)}\n".encode())
    return total.hexdigest()[:16]


def _take_over(source: Path, trial: Path) -> dict[str, Any]:
    """Make the run folder of a trial that measures another one's weights; return what that one's training took."""
    theirs = read_record(source)
    if theirs.get("status") != FINISHED:
        raise DataError(f"its weights are those of {source.name}, which did not finish")
    for name in ("metrics.jsonl", "provenance.json"):
        shutil.copyfile(source / name, trial / name)
    link = trial / "checkpoints"
    if not link.is_symlink():
        link.symlink_to(Path("..") / source.name / "checkpoints")
    known = {name: theirs[name] for name in ("steps", "images", "seconds", "peak_memory_gb")}
    return {**known, "trained_by": source.name}


def _steps_within(hours: float, trial: Path, config: TrainConfig, train: Callable[[TrainConfig], None]) -> int:
    """Measure the pace of a few steps, and write into the trial's config how many the budget has room for."""
    from train.loop.tracking import read_metrics

    pace = trial / "pace"
    shutil.rmtree(pace, ignore_errors=True)
    quiet = {"every_steps": 0}
    few = config.model_copy(
        update={
            "output": str(pace),
            "train": config.train.model_copy(update={"steps": PACE_STEPS}),
            "visual_debug": config.visual_debug.model_copy(update=quiet),
            "validation": config.validation.model_copy(update=quiet),
        }
    )
    train(few)
    rates = [
        record["sys/iter_per_sec"] for record in read_metrics(pace / "metrics.jsonl") if "sys/iter_per_sec" in record
    ]
    shutil.rmtree(pace)
    steps = max(1, int(hours * 3600 * statistics.median(rates)))
    whole = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
    write_atomic(trial / "config.yaml", dump_config(whole))
    return steps


@contextmanager
def _alone(trial: Path) -> Iterator[None]:
    """Hold the trial's lock; wait for a process that is just ending, because its driver was killed, say."""
    trial.mkdir(parents=True, exist_ok=True)
    with open(trial / LOCK, "a+", encoding="utf-8", opener=no_link) as file:
        deadline = time.monotonic() + LOCK_WAIT
        if not _lock(file):
            file.seek(0)
            owner = file.read().strip() or "unknown"
            with waiting(f"{trial.name}: waiting for process {owner}, which still runs it"):
                while not _lock(file):
                    if time.monotonic() > deadline:
                        raise ResourceError(
                            f"{trial}: process {owner} still runs this trial after {LOCK_WAIT:.0f} s; end it"
                        )
                    time.sleep(0.5)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _lock(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a volume without locks
        return True
    return True
