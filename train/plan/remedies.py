"""What to do where a run needs more memory than there is: changes of its config, tried and ranked."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nanodit.config import override_text
from nanodit.errors import PROBLEM_BREAK, ConfigError, MemoryShortage, gpu_is_full
from train.config import TrainConfig
from train.data.batch_plan import scaled_size
from train.loop.splitting import OneImageTooLarge
from train.plan.cost import gb
from train.plan.memory import CONTEXT, Memory, estimate_memory, meta_trainer
from train.plan.rehearsal import Shapes, changed

NOTHING = 0.1e9  # bytes held by others that are not worth a word


@dataclass(frozen=True)
class Remedy:
    """A change of the config, the peak that it leads to, and whether network and loss stay as they are."""

    overrides: dict[str, Any]
    peak: int
    saved: int
    same_result: bool
    fits: bool

    def __str__(self) -> str:
        values = " ".join(shlex.quote(override_text(key, value)) for key, value in self.overrides.items())
        says = [f"saves {gb(self.saved)}", f"then {gb(self.peak)}", "fits" if self.fits else "not enough"]
        says += [] if self.same_result else ["changes the network or the loss"]
        return f"{values}: {', '.join(says)}"


@dataclass(frozen=True)
class Room:
    """Bytes of a GPU that a run may have, ``limit``, and those that other programs hold at the moment."""

    limit: int
    held: int = 0

    def __str__(self) -> str:
        if self.held < NOTHING:
            return f"the GPU has {gb(self.limit)}"
        return f"the GPU has {gb(self.limit)} free, and other programs hold {gb(self.held)}"


def room_of(device: torch.device) -> Room | None:
    """Return what of a GPU is free, with what this process has of it; None for a CPU.

    How much CUDA itself takes of that for this process is nowhere to be read, so it counts as the estimate counts it.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    ours = min(total - free, torch.cuda.memory_reserved(device) + round(CONTEXT))
    return Room(free + ours, total - free - ours)


def shortage(
    config: TrainConfig, dataset: Any, shapes: Shapes, now: Memory, room: Room | None, alone: bool = False
) -> str:
    """Say that memory does not suffice and what would help, the best first; ``alone``: not even for a single image."""
    phase, limit = max(now.phases, key=now.phases.get), room and room.limit
    there = str(room) if room else "the GPU has less"
    first = f"out of memory: the run takes about {gb(now.peak)} (estimate; most in {phase}, {now.largest}), {there}"
    if alone:
        first += ". A single image alone did not fit"
    elif limit is not None and now.peak <= limit:  # as was tried, so what "fits" below is too hopeful as well
        first += ", but it ran out: the estimate is too low, or another program took some of its memory since"
    found = memory_remedies(config, dataset, shapes, now, limit)
    if alone:  # smaller micro-batches were tried
        found = [remedy for remedy in found if [*remedy.overrides] != ["train.token_budget"]]
    if not found:
        return f"{first}. Choose a smaller model, a larger model.patch_size or a dataset of a smaller base"
    return PROBLEM_BREAK.join([f"{first}. What would help:", *map(str, found)])


def memory_remedies(config: TrainConfig, dataset: Any, shapes: Shapes, now: Memory, limit: int | None) -> list[Remedy]:
    """Return the changes that take less memory: those that leave network and loss alone first, by what they save."""
    found = []
    for overrides, same in _candidates(config, dataset):
        try:
            other = changed(config, overrides)
            peak = estimate_memory(meta_trainer(other, dataset), shapes).peak
        except ConfigError:
            continue  # of this data's buckets, say
        fits = limit is not None and peak <= limit
        if peak < now.peak:
            found.append(Remedy(overrides, peak, now.peak - peak, same, fits))
    return sorted(found, key=lambda remedy: (not remedy.same_result, -remedy.saved))


def _candidates(config: TrainConfig, dataset: Any) -> list[tuple[dict[str, Any], bool]]:
    """Return changes to try, and of each whether network and loss stay as they are.

    With other micro-batches a step has the same images, times and noises, but other ones of them drop a condition.
    """
    micro = meta_trainer(config, dataset).batches.plan
    kinds = [(bucket, scale) for scale in micro.scales for bucket in micro.order.sizes]
    tokens = [micro.tokens(scaled_size(*kind)) for kind in kinds]
    image, most = max(tokens), max(count * micro.most_images(*kind) for count, kind in zip(tokens, kinds))
    half, one = ({"train.token_budget": max(image, tokens)} for tokens in (most // 2, image))
    blocks = {"train.gradient_checkpointing": "all"}
    candidates: list[tuple[dict[str, Any], bool]] = []
    if most > image:
        candidates += [(half, True)] * (half != one) + [(one, True)]
    if config.train.checkpoint_every != 1:
        candidates += [(blocks, True)]
        candidates += [(one | blocks, True)] if most > image else []
    if config.ema.snapshots:
        candidates += [({"ema.snapshots": 0}, True)]
    if config.visual_debug.every_steps and config.visual_debug.count > 1:
        candidates += [({"visual_debug.count": max(1, config.visual_debug.count // 4)}, True)]
    if config.perceptual.every:
        candidates += [({"perceptual.size": max(128, config.perceptual.size // 2)}, False)]
    return [*candidates, ({"model.patch_size": 2 * config.model.patch_size}, False)]


@contextmanager
def explained(config: TrainConfig, dataset: Any, device: torch.device) -> Iterator[None]:
    """Turn a GPU's lack of memory in a run into a :class:`MemoryShortage` that says what would help."""
    try:
        yield
    except Exception as error:
        alone = isinstance(error, OneImageTooLarge)
        if not (alone or gpu_is_full(error)):
            raise
        shapes = Shapes.of(dataset.info, dataset.rows("train"))
        now = estimate_memory(meta_trainer(config, dataset), shapes)
        found = shortage(config, dataset, shapes, now, room_of(device), alone)
        raise MemoryShortage(f"{found}{PROBLEM_BREAK}The last checkpoint, if there is one, is intact") from error
