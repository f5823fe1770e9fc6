"""The ablation grid on Ray Tune: every trial in a process of its own, retried, isolated, and resumable after a kill.

Only this module and ``actor.py`` of ``train`` import Ray. Tune decides when and on what a trial runs, how often one
that died is tried again, and (``early_stopping: asha``) which one ends early. What is finished is decided by the
trials' own ``trial.json``: ``--resume`` gives Tune the trials that are not, so that its state under ``tune/`` may be
lost, and no pickle is ever read back.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from nanodit.console import say
from nanodit.errors import DataError, Interrupted
from prep.passes.ray_passes import ray_session
from train.checkpoint.run_folder import lock_run_folder
from train.sweep.actor import CURVE, SupervisedTrial
from train.sweep.config import Sweep
from train.sweep.plan import (
    capacity,
    check_cohort,
    check_folder,
    demands,
    describe,
    planned_arms,
    reset_failed,
    write_plan,
)  # fmt: skip
from train.sweep.process import SECRET
from train.sweep.record import ENDED, FAILED, FINISHED, STOPPED, read_record, write_record
from train.sweep.table import show_progress, table
from train.sweep.trial import Work

# Tune's own output and files: ours say it all
os.environ.update(
    {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # a signal ends the driver, and with it the trials, which save
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the last word of a trial has no value, nor that of a failed one
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
)

import ray
from ray import tune

RESUME = "The same command with --resume continues: finished trials are kept, others go on from their last checkpoint"


def run_sweep(
    sweep: Sweep, work: Work, *, arms: Sequence[str] = (), resume: bool = False, retry_failed: bool = False,
    new_cohort: bool = False,
) -> None:  # fmt: skip
    """Run every trial that is not finished, print the table of arms, and say how to read the result.

    Only those of ``arms``, if any are named; the sweep's files then hold these and what was asked for before.
    Raises :class:`ConfigError` for a folder that holds another sweep (or one at all, without ``resume``), for a primary
    metric that the evaluation does not hold and for code or data that changed since (without ``new_cohort``);
    :class:`ResourceError` where a trial asks for more than there is; :class:`DataError` where no trial finished.
    """
    folder, chosen = sweep.folder, sweep.choose(arms)
    with lock_run_folder(folder):
        check_folder(sweep, work, resume)
        sweep = sweep.choose([*chosen.arms, *planned_arms(folder)])
        with _resumable(folder), ray_session(RESUME, "lower concurrent"):
            concurrent, fractional = capacity(sweep.config, ray.cluster_resources())
            check_cohort(sweep, new_cohort)
            write_plan(sweep, work, concurrent, fractional)
            for line in describe(sweep, concurrent):
                say(line)
            if len(chosen.arms) < len(sweep.arms):
                say(f"of these, {', '.join(chosen.arms)} run now")
            if retry_failed:
                reset_failed(chosen)
            _run_trials(chosen, fractional)
    for line in table(sweep):
        say(line)
    records = [read_record(chosen.trials_folder / trial.name) for trial in chosen.trials]
    finished = sum(record.get("status") == FINISHED for record in records)
    if not finished:
        raise DataError(f"{folder}: no trial finished; the reasons are above and in trials/*/trial.log")
    say(
        f"wrote {folder}: {finished} of {len(chosen.trials)} trials finished. Next: nanodit evaluate report "
        f"{quote(str(folder))} --output {quote(str(folder / 'report.html'))}"
    )
    if failed := [trial.name for trial, record in zip(chosen.trials, records) if record.get("status") == FAILED]:
        say(
            f"warning: {len(failed)} of {len(chosen.trials)} trials failed: {', '.join(failed)}. Why stands in "
            "trials/*/trial.log; --resume --retry-failed tries them again"
        )


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Say after a signal how the sweep goes on: the same command alone would be refused."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"{folder}: stopped by a signal. {RESUME}") from None


def _run_trials(sweep: Sweep, fractional: bool) -> None:
    """Let Tune run what has not ended: first the trials that train, then those that measure others' weights."""
    shutil.rmtree(sweep.folder / "tune", ignore_errors=True)
    with show_progress(sweep):
        for number, taken_over in enumerate((False, True)):
            waiting = [
                trial.name
                for trial in sweep.trials
                if bool(trial.trained_by) == taken_over
                and read_record(sweep.trials_folder / trial.name).get("status") not in ENDED
            ]
            if waiting:
                _tune(sweep, waiting, f"state-{number}", fractional)


def _tune(sweep: Sweep, names: Sequence[str], state: str, fractional: bool) -> None:
    config = sweep.config
    needed = demands(config, ray.cluster_resources())
    asha = config.early_stopping == "asha"
    steps = sweep.trials[0].config.train.steps
    grace = max(1, round(config.asha_grace * steps))
    scheduler = tune.schedulers.ASHAScheduler(
        time_attr="step", metric=CURVE, mode="min", max_t=steps, grace_period=grace, stop_last_trials=False
    )
    for module in ("ray.tune", "ray.air", "ray.train"):
        logging.getLogger(module).setLevel(logging.CRITICAL)  # trial.json and our lines say it
    tuner = tune.Tuner(
        tune.with_resources(SupervisedTrial, {"cpu": needed["CPU"], "gpu": needed["GPU"]}),
        param_space={
            "trial": tune.grid_search(list(names)),
            "folder": str(sweep.folder.absolute()),
            "directory": os.getcwd(),
            "retries": config.retries,
            "watch": asha,
            "whole_gpus": needed["GPU"] >= 1 and not fractional,
            "threads": max(1, int(config.resources.cpu)),
            "fault": os.environ.get("NANODIT_FAULT"),
        },
        tune_config=tune.TuneConfig(
            max_concurrent_trials=config.concurrent,
            reuse_actors=True,
            scheduler=scheduler if asha else None,
            trial_dirname_creator=lambda trial: f"{trial.config['trial']}_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=state,
            storage_path=str((sweep.folder / "tune").absolute()),
            failure_config=tune.FailureConfig(max_failures=config.retries),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the run folder has its own
            verbose=0,
        ),
    )
    with _without_secrets():
        results = tuner.fit()
    errors = {result.config["trial"]: result.error for result in results if result.config}
    for name in names:
        record = read_record(sweep.trials_folder / name)
        if record.get("status") in ENDED:
            continue
        error = errors.get(name)
        # its supervisor died with it: the memory monitor, say, or the whole node
        how = {"status": STOPPED, "reason": "stopped early by asha"} if error is None else _lost(error)
        write_record(sweep.trials_folder / name, _blank(sweep, name) | record | how | {"ended": time.time()})


def _lost(error: BaseException) -> dict[str, str]:
    said = " ".join(str(error).split())
    return {"status": FAILED, "reason": f"its supervisor died: {said[:300]}"}


def _blank(sweep: Sweep, name: str) -> dict[str, Any]:
    trial = next(trial for trial in sweep.trials if trial.name == name)
    return {"arm": trial.arm.name, "seed": trial.config.seed, "attempts": 0, "failures": 0, "started": None}


@contextmanager
def _without_secrets() -> Iterator[None]:
    """Hide credentials from Tune, which copies those of AWS into the environment that Ray logs.

    Trials have them all the same: a local Ray was started with them, another one has its own.
    """
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if SECRET.search(name) and "RAY" not in name}
    try:
        yield
    finally:
        os.environ.update(hidden)
