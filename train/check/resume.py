"""A run that is killed and continued, against one that is not: the same data to the bit, and weights within tolerance.

Each run is a process of its own; the kill is one at a named moment (:mod:`nanodit.faults`), when a checkpoint has just
got its name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from nanodit.place import child_command, child_environment
from train.check.made_up import known_data, preset, small_run, trainer_of
from train.check.parity import apart
from train.check.report import Report, Setting
from train.check.timing import seconds_of, wait
from train.checkpoint import checkpoint, tensorfile
from train.checkpoint.checkpoint import find_latest, load_checkpoint
from train.checkpoint.run_folder import StopRequest
from train.loop.microbatch import MicroBatch
from train.loop.trainer import Trainer

STEPS, EVERY, KILLED_AT = 6, 2, 4  # steps, between checkpoints, and in which the run is killed
WEIGHTS = 1e-2  # relative: sums on a GPU may come in another order
PRESET = "production-24gb"
# what saving consists of, and the functions that do it, where they are looked up
STAGES = {
    "copies to the host": ((tensorfile, "on_host"),),
    "writes": ((tensorfile, "save_file"),),
    "hashes": ((checkpoint, "sha256_file"),),
    "fsync": ((checkpoint, "sync_file"), (checkpoint, "sync_folder")),
}


def check(setting: Setting, report: Report) -> None:
    """Train straight through, and in two processes of which the first is killed; then time a real checkpoint."""
    small_run(setting)  # whose data is written before the others look for it
    kill = f"checkpoint.after_rename:kill:{KILLED_AT // EVERY}"
    first, straight = _process(setting, "straight")
    report.check(first == 0, "a run without a kill", f"exit code {first}", "0")
    killed, before = _process(setting, "killed", NANODIT_FAULT=kill)
    expected = -signal.SIGKILL
    report.check(killed == expected, f"killed in step {KILLED_AT}", f"exit code {killed}", str(expected))
    again, after = _process(setting, "killed")
    report.check(again == 0, "continued", f"exit code {again}, from step {min(after, default=0)}", "0")
    for name in ("keys", "t", "subsets", "noise"):
        joined = {**before, **after}
        same = joined.keys() == straight.keys() and all(straight[i][name] == joined[i][name] for i in straight)
        report.check(same, f"{name} of {len(joined)} steps", "equal" if same else "different", "equal")
    ends = [load_checkpoint(find_latest(setting.folder / "resume" / name)) for name in ("straight", "killed")]
    equal = all(torch.equal(ends[0].model[name], ends[1].model[name]) for name in ends[0].model)
    worst, name = apart(ends[1].model, ends[0].model, floor=1e-2)
    limit = WEIGHTS if setting.on_gpu else 0
    report.check(worst <= limit, f"weights after {STEPS} steps", f"{worst:.1e} {name}", f"<= {limit:g}")
    report.note("to the bit", "equal" if equal else "not equal, as sums on this device may come in another order")
    _stages(setting, report)


def _process(setting: Setting, name: str, **environment: str) -> tuple[int, dict[int, dict[str, str]]]:
    """Run in a process of its own, which ends with this one; return its exit code, and what each step saw."""
    shared = [str(setting.folder), name, setting.device.type]
    done = subprocess.run(
        [*child_command("train.check.resume"), *shared], env=child_environment(**environment), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode > 0:
        sys.stderr.write(done.stderr)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step"')]
    return done.returncode, {line["step"]: line for line in lines}


def main(folder: str, name: str, device: str) -> None:
    """Train, or continue to train, and print digests of what each step was computed of."""
    setting = Setting(torch.device(device), True, Path(folder), 600.0)
    output = Path(folder) / "resume" / name
    config, data = small_run(setting, perceptual__every=0, train__grad_accumulation_steps=8, output=output)
    trainer = trainer_of(config, data, setting.device)
    latest = find_latest(config.run_folder)
    if latest:
        trainer.load(load_checkpoint(latest))
    digests = _watched(trainer)
    while trainer.step < STEPS:
        step = trainer.step
        batches = map(trainer.batches.make, trainer.batches.plan.numbers(step))
        trainer.update(trainer.accumulate(batches, StopRequest()))
        print(json.dumps({"step": step, **{key: value.hexdigest() for key, value in digests.items()}}), flush=True)
        if trainer.step % EVERY == 0:
            trainer.save()


def _watched(trainer: Trainer) -> dict[str, Any]:
    """Return hashes that take in what every micro-step sees, wherever it was made; they begin anew at each step."""
    digests: dict[str, Any] = {}
    usual, steps = trainer.micro_step, [-1]

    def micro_step(batch: MicroBatch) -> dict[str, torch.Tensor]:
        if steps[0] != trainer.step:
            steps[0] = trainer.step
            digests.update({name: hashlib.sha256() for name in ("keys", "t", "subsets", "noise")})
        digests["keys"].update(" ".join(batch.keys).encode())
        digests["subsets"].update(str([sorted(subset) for subset in batch.subsets]).encode())
        digests["t"].update(batch.t.cpu().numpy().tobytes())
        digests["noise"].update(batch.noise.cpu().numpy().tobytes())
        return usual(batch)

    trainer.micro_step = micro_step  # type: ignore[method-assign]
    return digests


def _stages(setting: Setting, report: Report) -> None:
    """Split the seconds of a checkpoint of a preset's size, the second one: the first meets what is not warm."""
    config = preset(setting, PRESET, perceptual__every=0)
    trainer = trainer_of(config, known_data(setting, config, PRESET), setting.device)
    saving(setting, trainer)
    with staged(setting) as stages:
        seconds, size = saving(setting, trainer)
    parts = ", ".join(f"{name} {stages[name]:.3g} s" for name in STAGES)
    all_there = all(stages[name] > 0 for name in STAGES) and stages.total() <= seconds
    report.check(all_there, "a checkpoint", f"{size / 1e9:.3g} GB in {seconds:.3g} s: {parts}", "all four, within it")


@contextmanager
def staged(setting: Setting) -> Iterator[Counter[str]]:
    """Yield the seconds that saving spends in each of ``STAGES`` from now on."""
    seconds: Counter[str] = Counter()

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            wait(setting.device)
            started = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                seconds[stage] += time.perf_counter() - started

        return call

    with ExitStack() as stack:
        for stage, places in STAGES.items():
            for module, name in places:
                stack.enter_context(patch.object(module, name, timed(stage, getattr(module, name))))
        yield seconds


def saving(setting: Setting, trainer: Trainer) -> tuple[float, int]:
    """Return the seconds and the bytes of a checkpoint, which is removed again."""
    path: list[Path] = []
    seconds = seconds_of(lambda: path.append(Path(trainer.save())), setting.device)
    size = sum(file.stat().st_size for file in path[0].iterdir())
    shutil.rmtree(path[0])
    return seconds, size


if __name__ == "__main__":
    main(*sys.argv[1:])
