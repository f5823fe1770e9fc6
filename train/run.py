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
from prep.dataset.reader import Dataset, open_version
from prep.dataset.readers import reading
from train.checkpoint.checkpoint import Checkpoint
from train.checkpoint.initial import check_same_parent, load_parent
from train.checkpoint.provenance import dataset_summary, environment, write_provenance
from train.checkpoint.resume import began_on, changed_versions, check_same_run, choose_checkpoint
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
    newest_version: bool = False,
    stop_at: float = math.inf,
) -> None:
    """Train what ``config`` describes, or continue it, up to ``train.steps``.

    ``build_validation`` is called where ``validation.every_steps`` asks for it. ``resume`` is ``auto``, ``never`` or a
    checkpoint's path; ``init_from`` is a checkpoint whose averaged weights a new run begins with; ``allow_change``
    names config keys that may differ from the checkpoint's. A run that is continued reads the version of the dataset
    that it began on, or with ``newest_version`` the newest one. From ``stop_at`` (time.monotonic()) on the run saves
    and raises :class:`Interrupted`. Raises :class:`ConfigError` for contradictory arguments or a changed run,
    :class:`DataError` for damaged data or checkpoints and :class:`ResourceError` where memory or disk do not suffice.
    """
    if init_from and resume not in ("auto", "never"):
        raise ConfigError("--init-from begins a run and --resume PATH continues one; give one of the two")
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    device = pick_device(config.train.device)
    dataset = Dataset(config.dataset)
    with lock_run_folder(config.run_folder):
        checkpoint = choose_checkpoint(config.run_folder, resume)
        began = None if resume == "never" else began_on(config.run_folder, checkpoint)
        dataset, same = _version_of(dataset, began, newest_version, checkpoint)
        with explained(config, dataset, device):
            step = 0
            if checkpoint is not None:
                step = checkpoint.state["step"]
                finished = step >= config.train.steps
                check_same_run(
                    checkpoint, config, same, environment(device), allowed_changes=allow_change,
                    allow_environment_change=allow_environment_change or finished,  # nothing is computed any more
                )  # fmt: skip
                if init_from:
                    check_same_parent(init_from, checkpoint.state, config.run_folder)
                if finished:
                    say(f"{config.run_folder}: already trained to step {step}; nothing to do")
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
            write_atomic(config.run_folder / "config.yaml", dump_config(config))
            write_provenance(config.run_folder, device, dataset_summary(dataset.info), step, trainer.parent)
            if device.type == "cuda":
                probe(trainer)
            announce(trainer)
            with reading(dataset, config.run_folder):
                trainer.run(stop_at)
    say(f"wrote {config.run_folder}: {config.train.steps} steps, checkpoints/step-{config.train.steps:06d}")


def _version_of(newest: Dataset, began: str | None, wanted: bool, checkpoint: Checkpoint | None) -> tuple[Dataset, str]:
    """Return the version of the dataset that a run goes on with, and the fingerprint that its checkpoint must name."""
    if began in (None, newest.fingerprint):
        return newest, newest.fingerprint
    before = open_version(newest.storage, began)
    if before.fingerprint != began:
        if checkpoint is None:  # no step of it was saved
            say(f"{newest.root}: version {began} is not kept; beginning anew with version {before.fingerprint}")
        return before, before.fingerprint
    if wanted:
        for earlier in checkpoint.state.get("earlier_datasets", []) if checkpoint else []:  # it was trained on, too
            changed_versions(open_version(newest.storage, earlier["fingerprint"]), newest)
        say(f"{newest.root}: {changed_versions(before, newest)}")
        return newest, began
    say(f"{newest.root}: going on with version {began}; --dataset-version new takes {newest.fingerprint}")
    return before, began
