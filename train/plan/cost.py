"""What a run costs beside memory: computation and time, room on the disk, and what the disk must deliver."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanodit.errors import ResourceError
from train.config import TrainConfig
from train.data.batch_plan import scaled_size
from train.data.samples import bucket_size
from train.hardware import Gpu
from train.loop.flops import META, flop_counter
from train.loop.trainer import Trainer
from train.method.ema import averaged
from train.method.loss import Stretch
from train.model.conditions import Subset
from train.model.modalities import MODALITIES
from train.plan.memory import tensor_bytes
from train.plan.rehearsal import Shapes
from train.plan.work import Work, count_work, seconds_on

CARDS = ("GeForce RTX 3060", "GeForce RTX 4070", "GeForce RTX 4090", "H100 80GB HBM3")  # that ``plan`` speaks of
PNG_BYTES = 1.8  # of a photograph's pixel, of 3
RECORD_BYTES = 8e3  # of a logged step, metrics.jsonl and TensorBoard together
READ_BYTES = 1 << 26  # for measuring a disk


# Computation


@dataclass(frozen=True)
class PhaseCost:
    """What the steps of one resolution cost; FLOPs of a step are means over buckets, conditions and routing."""

    first_step: int
    last_step: int
    scale: float
    flops: dict[str, float]  # of a step, by what they are for: the model, or a loss's name
    recomputed: float  # FLOPs of a step that activation checkpointing computes a second time
    work: Work  # of a step, by kind, with what is computed twice

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return self.last_step - self.first_step + 1


def phase_costs(trainer: Trainer, shapes: Shapes) -> list[PhaseCost]:
    """Count the FLOPs of a run's phases; ``trainer`` is one on the meta device."""
    config, plan = trainer.config, trainer.batches.plan
    steps = config.train.steps
    ends = [min(phase.until_step, steps) for phase in config.train.phases]
    spans = [*zip([0, *ends], [*ends, steps], [*(phase.scale for phase in config.train.phases), 1.0])]
    count = _StepWork(trainer, shapes)
    costs = []
    for start, end, scale in spans:
        if start >= end:
            continue
        # over a base's buckets, whose tokens differ by a tenth, FLOPs are linear in them to a few parts in 10,000
        tokens = {bucket: plan.tokens(scaled_size(bucket, scale)) for bucket in plan.order.sizes}
        counts = plan.order.sizes
        mean = sum(tokens[bucket] * counts[bucket] for bucket in counts) / sum(counts.values())
        few, many = (choose(tokens, key=tokens.get) for choose in (min, max))
        share = (mean - tokens[few]) / max(1, tokens[many] - tokens[few])
        ends_of = [count(bucket, scale, start, end) for bucket in (few, many)]
        work = {
            name: plan.images * ((1 - share) * value + share * ends_of[1][name]) for name, value in ends_of[0].items()
        }
        every = config.train.checkpoint_every
        blocks = math.ceil(config.model.depth / every) / config.model.depth if every else 0.0
        again = work["model"] / 3 * blocks
        flops = {name: Work(*map(float, value)).flops for name, value in work.items()}
        kept = {name: value for name, value in flops.items() if value}
        total = Work(*map(float, sum(work.values(), again)))
        costs.append(PhaseCost(start + 1, end, scale, kept, Work(*map(float, again)).flops, total))
    return costs


class _StepWork:
    """Counts the work of one image, in the mean over its conditions and over routed and dense micro-batches."""

    def __init__(self, trainer: Trainer, shapes: Shapes) -> None:
        self.trainer, self.config, self.shapes = trainer, trainer.config, shapes
        self.counter = flop_counter(trainer.model, trainer.losses.values(), count_work)

    def __call__(self, bucket: str, scale: float, start: int, end: int) -> dict[str, np.ndarray]:
        """Return arrays by name for an image of a bucket in the steps ``start`` to ``end`` (0-based, excluded)."""
        config = self.config
        size = scaled_size(bucket, scale)
        tokens = self.trainer.batches.plan.tokens(size)
        tread, steps = config.tread, config.train.steps
        tail = steps - round(tread.dense_tail * steps)  # the first step of it
        dense = max(0, end - max(start, tail)) / (end - start) * (1 - tread.tail_routed) if tread.enabled else 1.0
        kept = tread.kept(tokens)
        model = dense * self._model(bucket, size, None) if dense else np.zeros(len(Work._fields))
        if dense < 1:
            model = model + (1 - dense) * self._model(bucket, size, kept)
        work = {"model": model}
        blocks = self.trainer.model.route
        tokens_after = lambda done: dense * tokens + (1 - dense) * (kept if done - 1 in blocks else tokens)  # noqa: E731
        stretch = Stretch(start, end, steps, size, config.flow, tokens_after)
        for loss in self.trainer.losses.values():
            work[loss.name] = np.zeros(len(Work._fields)) + loss.expected_flops(stretch, self.counter.of_one)
        return work

    def _model(self, bucket: str, size: tuple[int, int], kept: int | None) -> np.ndarray:
        """Return the network's work: what a condition adds is linear in its tokens, so it adds up over those kept."""
        share = {name: sum(p for subset, p in self.trainer.table.items() if name in subset) for name in MODALITIES}
        nothing = self._counted(bucket, size, kept, frozenset())
        present = [name for name in self.shapes.features.modalities if share[name]]
        added = {name: self._counted(bucket, size, kept, frozenset({name})) - nothing for name in present}
        return nothing + sum(share[name] * value for name, value in added.items())

    def _counted(self, bucket: str, size: tuple[int, int], kept: int | None, subset: Subset) -> Any:
        width, height = size
        conditions = self.shapes.conditions(bucket, 1, self.shapes.mean_text, META).only(subset)
        keep_ids = None if kept is None else torch.empty(1, kept, dtype=torch.int64, device=META)
        z, t = torch.empty(1, 3, height, width, device=META), torch.empty(1, device=META)
        return self.counter.of_one("model", z, t, conditions, keep_ids)


def range_on(gpu: Gpu, costs: Iterable[PhaseCost]) -> tuple[float, float]:
    """Return the least and the most seconds that a run is expected to take on a GPU."""
    spans = [[cost.steps * seconds for seconds in seconds_on(gpu, cost.work)] for cost in costs]
    return sum(fast for fast, _ in spans), sum(slow for _, slow in spans)


# Disk


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes below its folder, and what is free there; ``most`` is how many checkpoints at once."""

    checkpoint: int
    most: int
    snapshots: int
    pictures: int
    logs: int
    there: int  # of all this, from before
    free: int

    @property
    def needed(self) -> int:
        """Bytes that must be free now."""
        written = self.checkpoint * self.most + self.snapshots + self.pictures + self.logs
        return max(0, written - self.there)


def disk_of(trainer: Trainer) -> Disk:
    """Return what a run writes in all; ``trainer`` may be on any device."""
    config, power = trainer.config, tensor_bytes(trainer.power.tensors().values())
    steps, debug = config.train.steps, config.visual_debug
    state = [*trainer.model.state_dict().values(), *trainer.ema.state.values(), *trainer.optimizer.tensors().values()]
    picture = 0.0
    if debug.every_steps:
        largest = max(map(math.prod, map(bucket_size, trainer.batches.plan.order.sizes)))
        rows = 1 + len(trainer.visual.arms)
        picture = 2 * debug.count * rows * largest * PNG_BYTES  # in visual_debug and in TensorBoard's events
    folder = config.run_folder.absolute()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    return Disk(
        checkpoint=tensor_bytes(state) + power,
        most=most_checkpoints(config),
        snapshots=config.ema.snapshots * power,
        pictures=round(steps // debug.every_steps * picture) if debug.every_steps else 0,
        logs=round(steps / config.log_every * RECORD_BYTES),
        there=folder_bytes(folder),
        free=shutil.disk_usage(parent).free,
    )


def most_checkpoints(config: TrainConfig) -> int:
    """Return how many checkpoints there are at once, at most: the next one is whole before the oldest goes.

    Without ``keep_last`` those of ``every_minutes`` come on top, which no one knows the number of.
    """
    section, steps = config.checkpoint, config.train.steps
    saved = math.ceil(steps / section.every_steps)
    if section.keep_last is None:
        return saved
    for_good = steps // math.lcm(section.every_steps, section.keep_every) if section.keep_every else 0
    most = section.keep_last + for_good + 1
    return most if section.every_minutes else min(saved, most)


def folder_bytes(folder: Path) -> int:
    """Return what the files below a folder take; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


def check_disk(trainer: Trainer) -> None:
    """Raise :class:`ResourceError`, with the numbers, where what a run writes does not fit on its disk."""
    disk = disk_of(trainer)
    if disk.needed > disk.free:
        raise ResourceError(
            f"{trainer.config.output}: {disk_text(disk)}. {'; '.join(disk_remedies(trainer.config, disk))}"
        )


def disk_text(disk: Disk) -> str:
    """Say what a run writes and whether there is room."""
    return (
        f"{gb(disk.checkpoint)} a checkpoint, {disk.most} at once, {gb(disk.snapshots)} of EMA snapshots, "
        f"{gb(disk.pictures)} of pictures and {gb(disk.logs)} of logs take {gb(disk.needed)} more, "
        f"and {gb(disk.free)} are free"
    )


def disk_remedies(config: TrainConfig, disk: Disk) -> list[str]:
    """Return what would take less room, the largest saving first, with what it saves."""
    saved = {"checkpoint.keep_last=2 saves {}": (disk.most - 3) * disk.checkpoint}
    if config.visual_debug.every_steps:
        saved[f"visual_debug.every_steps={10 * config.visual_debug.every_steps} saves {{}}"] = disk.pictures * 9 // 10
    saved["ema.snapshots=0 saves {}"] = disk.snapshots
    ranked = sorted(((size, text) for text, size in saved.items() if size > 0), reverse=True)
    return ["Make room, or choose another `output`", *(text.format(gb(size)) for size, text in ranked)]


def read_rate(files: Iterable[Path]) -> float | None:
    """Measure how fast a disk delivers what is not in memory, bytes/s; None where nothing is large enough to tell."""
    for file in files:
        if file.stat().st_size < READ_BYTES // 16:
            continue
        with open(file, "rb", buffering=0) as opened:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            count = 0
            while count < READ_BYTES and (block := opened.read(1 << 20)):
                count += len(block)
            return count / (time.perf_counter() - start)
    return None


def gb(size: float) -> str:
    """Write bytes as GB (1e9), MB or kB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= 0.1 * scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def parameters_by_part(trainer: Trainer) -> Mapping[str, int]:
    """Return the number of parameters of each part of the network, in its order; ``blocks`` is one part."""
    parts: dict[str, int] = {}
    for name, parameter in trainer.model.named_parameters():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts | {"averaged in the EMA": sum(p.numel() for p in averaged(trainer.model).values())}
