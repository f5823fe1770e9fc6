"""What two steps of a run take on this machine, measured: memory, seconds, and the bytes of a checkpoint."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from nanodit.errors import ConfigError
from nanodit.posix import peak_memory
from train.checkpoint.run_folder import StopRequest
from train.config import TrainConfig
from train.loop.flops import flop_counter
from train.loop.trainer import Trainer
from train.method.sampling import sample, trajectory_keep_ids
from train.plan.cost import folder_bytes
from train.plan.memory import meta_trainer
from train.plan.rehearsal import Shapes, changed, drawing_request, largest_batch


@dataclass(frozen=True)
class Measured:
    """Two optimiser steps of two of the largest micro-batches each, without data, a drawing and a checkpoint.

    ``peak`` is in bytes: of the GPU with all that torch holds of it, or on a CPU of the whole process. ``flop_rate`` is
    in model FLOPs a second of the second step's micro-batches, ``update_seconds`` its optimiser's.
    """

    peak: int
    what: str
    batch: str
    flop_rate: float
    update_seconds: float
    save_seconds: float
    checkpoint: int


def measure(config: TrainConfig, dataset: Any, shapes: Shapes, device: torch.device) -> Measured:
    """Run it on ``device`` and leave nothing behind; a torch.OutOfMemoryError is the caller's."""
    batch = largest_batch(meta_trainer(config, dataset), shapes, device)
    folder = config.run_folder.absolute()
    parent = next(path for path in (folder.parent, *folder.parents) if path.exists())
    try:
        temporary = tempfile.TemporaryDirectory(dir=parent, prefix=".plan-")
    except OSError as error:
        raise ConfigError(f"{parent}: cannot be written: {error.strerror}; choose another `output`") from None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with temporary as output:
        two = {"train.batch_size": len(batch.keys), "train.grad_accumulation_steps": 2, "train.token_budget": None}
        trainer = Trainer(changed(config, {**two, "output": output}), dataset, device)
        trainer.flops = flop_counter(trainer.model, trainer.losses.values())
        for _ in range(2):
            with _timed(device) as forward:
                accumulated = trainer.accumulate(repeat(batch), StopRequest())
            flops = trainer.flops.take()
            with _timed(device) as update:
                trainer.update(accumulated)
        if config.visual_debug.every_steps:
            draw_largest(trainer, shapes, device)
        with _timed(device) as saving:
            checkpoint = folder_bytes(Path(trainer.save()))
    return Measured(
        peak=_peak(device),
        what="GPU" if device.type == "cuda" else "process",
        batch=f"{len(batch.keys)} images of {batch.x.shape[3]}x{batch.x.shape[2]}",
        flop_rate=flops / forward[0],
        update_seconds=update[0],
        save_seconds=saving[0],
        checkpoint=checkpoint,
    )


def draw_largest(trainer: Trainer, shapes: Shapes, device: torch.device) -> None:
    """Draw, in one step, as many of the largest images as the visual debug may draw at once."""
    config: TrainConfig = trainer.config
    conditions, noise = drawing_request(trainer, shapes, device)
    sampling = replace(config.visual_debug.sampling(frozenset(trainer.model.features.modalities)), steps=1)
    tokens = noise[0, 0].numel() // config.model.patch_size**2
    keep_ids = trajectory_keep_ids(config.tread, [("", i) for i in range(len(noise))], tokens)
    sample(trainer.ema_model(), conditions, noise, flow=config.flow, sampling=sampling, keep_ids=keep_ids)


@contextmanager
def _timed(device: torch.device) -> Iterator[list[float]]:
    """Yield a list that holds the seconds afterwards, what the device still computes included."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds.append(time.perf_counter() - start)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        context = total - free - torch.cuda.memory_reserved(device)  # and other programs, whose room is not ours either
        return torch.cuda.max_memory_reserved(device) + context
    return peak_memory()
