"""``train run``: begin or continue a run, from its config to its last checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from nanodit.config import dump_config
from nanodit.console import say
from nanodit.errors import ConfigError
from nanodit.files import write_atomic
from prep.dataset.reader import Dataset
from train.checkpoint.initial import check_same_parent, load_parent
from train.checkpoint.provenance import dataset_summary, environment, write_provenance
from train.checkpoint.resume import check_same_run, choose_checkpoint
from train.checkpoint.run_folder import lock_run_folder
from train.config import TrainConfig
from train.hardware import pick_device
from train.loop.announce import announce
from train.loop.trainer import Trainer, Validate
from train.plan.cost import check_disk
from train.plan.rehearsal import probe
from train.plan.remedies import explained


def run(
    config: TrainConfig,
    build_validation: Callable[[TrainConfig, Dataset], Validate],
    *,
    resume: str = "auto",
    init_from: Path | None = None,
    allow_change: Collection[str] = (),
    allow_environment_change: bool = False,
    stop_at: float = math.inf,
) -> None:
    """Train what ``config`` describes, or continue it, up to ``train.steps``.

    ``build_validation`` is called where ``validation.every_steps`` asks for it. ``resume`` is ``auto``, ``never`` or a
    checkpoint's path; ``init_from`` is a checkpoint whose averaged weights a new run begins with; ``allow_change``
    names config keys that may differ from the checkpoint's. From ``stop_at`` (time.monotonic()) on the run saves and
    raises :class:`Interrupted`. Raises :class:`ConfigError` for contradictory arguments or a changed run,
    :class:`DataError` for damaged data or checkpoints and :class:`ResourceError` where memory or disk do not suffice.
    """
    if init_from and resume not in ("auto", "never"):
        raise ConfigError("--init-from begins a run and --resume PATH continues one; give one of the two")
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    device = pick_device(config.train.device)
    dataset = Dataset(config.dataset)
    run_folder = config.run_folder
    with lock_run_folder(run_folder), explained(config, dataset, device):
        checkpoint = choose_checkpoint(run_folder, resume)
        step = 0
        if checkpoint is not None:
            step = checkpoint.state["step"]
            finished = step >= config.train.steps
            check_same_run(
                checkpoint, config, dataset.fingerprint, environment(device), allowed_changes=allow_change,
                allow_environment_change=allow_environment_change or finished,  # nothing is computed any more
            )  # fmt: skip
            if init_from:
                check_same_parent(init_from, checkpoint.state, run_folder)
            if finished:
                say(f"{run_folder}: already trained to step {step}; nothing to do")
                return
        validate = build_validation(config, dataset) if config.validation.every_steps else None
        trainer = Trainer(config, dataset, device, validate)
        if checkpoint is not None:
            trainer.load(checkpoint)
            say(f"continuing from {checkpoint.path}")
            del checkpoint  # as large as weights, average and optimiser together
        elif init_from:
            trainer.begin_with(load_parent(init_from))
        check_disk(trainer)
        write_atomic(run_folder / "config.yaml", dump_config(config))
        write_provenance(run_folder, device, dataset_summary(dataset.info), step, trainer.parent)
        if device.type == "cuda":
            probe(trainer)
        announce(trainer)
        trainer.run(stop_at)
    say(f"wrote {run_folder}: {config.train.steps} steps, checkpoints/step-{config.train.steps:06d}")
