"""What a run takes on this machine, measured: memory, seconds with its data, and the bytes of a checkpoint."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanodit.errors import ConfigError
from nanodit.posix import peak_memory
from train.config import TrainConfig
from train.data.prefetch import prefetch, thread_count
from train.loop.flops import flop_counter
from train.loop.microbatch import Accumulated, MicroBatch
from train.loop.trainer import Trainer
from train.method.sampling import sample, trajectory_keep_ids
from train.plan.cost import folder_bytes
from train.plan.feed import SAMPLES, made_up_like
from train.plan.memory import CONTEXT, meta_trainer
from train.plan.rehearsal import Shapes, StandIn, changed, drawing_request, largest_batch

LEAST, SECONDS = 2, 3.0  # micro-batches that are timed at least, and for how long they are


@dataclass(frozen=True)
class Measured:
    """A step of the largest micro-batch, micro-steps of the run's first ones with their data, a drawing, a checkpoint.

    ``peak`` is in bytes: of the GPU what torch held of it and what is assumed for CUDA, or on a CPU of the whole
    process. ``flop_rate`` is in model FLOPs a second of the micro-steps with the loader's micro-batches, ``samples``
    what these were; ``update_seconds`` are the optimiser's.
    """

    peak: int
    what: str
    batch: str
    samples: str
    flop_rate: float
    update_seconds: float
    save_seconds: float
    checkpoint: int


def measure(config: TrainConfig, dataset: Any, shapes: Shapes, device: torch.device) -> Measured:
    """Run it on ``device`` and leave nothing behind; a torch.OutOfMemoryError is the caller's.

    Of a dataset that does not exist yet the samples are made up.
    """
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
        changes, kind = {"output": output}, "of the dataset"
        if isinstance(dataset, StandIn):  # as few as they are, they would all be in memory
            dataset, kind = made_up_like(dataset, Path(output) / "made-up", SAMPLES), "made up"
            changes["data.cache_gb"] = 0.0
        trainer = Trainer(changed(config, changes), dataset, device)
        trainer.flops = flop_counter(trainer.model, trainer.losses.values())
        for _ in range(2):  # the second time the gradients are there already
            values = trainer.micro_step(batch)
        what = f"{len(batch.keys)} images of {batch.x.shape[3]}x{batch.x.shape[2]}"
        done = Accumulated(batch.keys, batch.subsets, batch.t, values)
        del batch, values
        trainer.update(done)
        count, images, seconds = _with_data(trainer, device)
        flops = trainer.flops.take()
        with _timed(device) as update:
            trainer.update(done)
        if config.visual_debug.every_steps:
            draw_largest(trainer, shapes, device)
        with _timed(device) as saving:
            checkpoint = folder_bytes(Path(trainer.save()))
    return Measured(
        peak=_peak(device),
        what="GPU" if device.type == "cuda" else "process",
        batch=what,
        samples=f"{count} micro-batches of {images} images {kind}",
        flop_rate=flops / seconds,
        update_seconds=update[0],
        save_seconds=saving[0],
        checkpoint=checkpoint,
    )


def _with_data(trainer: Trainer, device: torch.device) -> tuple[int, int, float]:
    """Take micro-batches as a run does, for a few seconds; returns how many, of how many images, and the seconds.

    The first one does not count: its data is waited for, and libraries begin to work. The next few lie ready.
    """
    data, ahead = trainer.config.data, trainer.config.data.prefetch
    threads = thread_count(data.workers) if ahead else 0
    least = LEAST if device.type == "cpu" else LEAST * (ahead + threads)
    count = images = 0
    with closing(prefetch(trainer._make_batch, trainer.batches.numbers(0), ahead, threads)) as batches:
        _step(trainer, next(batches))
        trainer.flops.take()
        with _timed(device) as seconds:
            started = time.perf_counter()
            while count < least or time.perf_counter() - started < SECONDS:
                images += _step(trainer, next(batches))
                count += 1
    return count, images, seconds[0]


def _step(trainer: Trainer, batch: MicroBatch) -> int:
    with trainer.sender.sent(batch) as sent:
        trainer.micro_step(sent)
    return len(batch.keys)


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
        return torch.cuda.max_memory_reserved(device) + round(CONTEXT)  # as what is free is counted: remedies.room_of
    return peak_memory()
