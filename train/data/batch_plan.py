"""How an optimiser step is cut into micro-batches: by the slots of the order, or by a budget of image tokens.

A step always shows the same number of images, and which ones is :class:`train.data.order.Order`'s alone: neither the
budget nor the resolution changes it. With a budget, the step's images of one bucket, from however many slots, are cut
into as few micro-batches as fit, of equal size to one image. So an image weighs the same in a large and in a small
micro-batch, and a step of many small slots costs few forwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from pydantic import Field

from nanodit.config import Config
from nanodit.errors import ConfigError
from train.data.order import Order, Slot
from train.data.samples import bucket_size


class Phase(Config):
    """Training at ``scale`` times the buckets' size, until so many optimiser steps are completed."""

    until_step: int = Field(gt=0)
    scale: float = Field(gt=0, le=1)


@dataclass(frozen=True)
class Cut(Slot):
    """A micro-batch: a slot or parts of some, its images' numbers in the step and their (width, height) in pixels."""

    images: tuple[int, ...]
    size: tuple[int, int]


def scale_of(phases: Sequence[Phase], step: int) -> float:
    """Return the scale of optimiser step ``step`` (0-based); 1 after the last phase."""
    return next((phase.scale for phase in phases if step < phase.until_step), 1.0)


def scaled_size(bucket: str, scale: float) -> tuple[int, int]:
    """Return (width, height) of a bucket at a scale, in whole pixels."""
    width, height = bucket_size(bucket)
    return round(width * scale), round(height * scale)


class BatchPlan:
    """The micro-batches of every optimiser step, a pure function of its number.

    ``slots`` is how many slots of the order a step takes; ``token_budget`` limits the image tokens of a micro-batch,
    None leaves each slot one micro-batch. Raises :class:`ConfigError` where a scale does not give whole patches, or a
    single image exceeds the budget.
    """

    def __init__(
        self, order: Order, slots: int, token_budget: int | None, phases: Sequence[Phase], patch_size: int
    ) -> None:
        self.order, self.slots, self.token_budget = order, slots, token_budget
        self.phases, self.patch_size = tuple(phases), patch_size
        self.images = slots * order.batch_size  # of a step
        # the largest number of micro-batches that a step could have, so that one integer names step and micro-batch
        self.stride = slots if token_budget is None else self.images
        self.scales = list(dict.fromkeys([*(phase.scale for phase in phases), 1.0]))
        self._check(order.sizes)
        self.of_step = lru_cache(maxsize=4)(self._cut)  # all micro-batches of a step ask for it

    def numbers(self, step: int) -> range:
        """Return the numbers of a step's micro-batches."""
        return range(step * self.stride, step * self.stride + len(self.of_step(step)))

    def tokens(self, size: tuple[int, int]) -> int:
        """Return the image tokens of an image of (width, height) pixels."""
        return (size[0] // self.patch_size) * (size[1] // self.patch_size)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """All (width, height) in pixels that the images of a run may have."""
        return [scaled_size(bucket, scale) for scale in self.scales for bucket in self.order.sizes]

    def most_images(self, bucket: str, scale: float) -> int:
        """Return the largest micro-batch of a bucket."""
        if self.token_budget is None:
            return self.order.batch_size
        return min(self.images, self.token_budget // self.tokens(scaled_size(bucket, scale)))

    def describe(self, steps: int) -> list[str]:
        """Say in which micro-batches a run of so many steps sees its samples, as far as it is not plain."""
        sizes, lines = self.order.sizes, []
        small = [f"{bucket} ({size})" for bucket, size in sizes.items() if size < self.order.batch_size]
        if small:
            lines.append(f"buckets smaller than a micro-batch, which they fill over several epochs: {', '.join(small)}")
        if (total := sum(sizes.values())) < self.images:
            lines.append(f"a step takes {self.images} images: more than the {total} training samples, so they repeat")
        ends = [f"{phase.scale:g} times their size up to step {phase.until_step}" for phase in self.phases]
        if ends:
            lines.append(f"images at {', '.join(ends)}{', then whole' if self.phases[-1].until_step < steps else ''}")
        for scale in self.scales if self.token_budget is not None else ():
            most = ", ".join(f"{bucket} {self.most_images(bucket, scale)}" for bucket in sizes)
            lines.append(f"images in a micro-batch at most{f', at scale {scale:g}' if ends else ''}: {most}")
        return lines

    def _cut(self, step: int) -> tuple[Cut, ...]:
        scale = scale_of(self.phases, step)
        chunks: dict[tuple[str, int | None], list[tuple[int, int]]] = {}  # what may go together: (sample, its number)
        for number in range(self.slots):
            slot = self.order[step * self.slots + number]
            first = number * len(slot.items)
            together = slot.bucket, number if self.token_budget is None else None
            chunks.setdefault(together, []).extend(zip(slot.items, range(first, first + len(slot.items))))
        cuts = []
        for (bucket, _), images in chunks.items():
            pieces = -(-len(images) // self.most_images(bucket, scale))
            for piece in np.array_split(np.array(images), pieces):
                items, numbers = (tuple(column.tolist()) for column in piece.T)
                cuts.append(Cut(bucket, items, numbers, scaled_size(bucket, scale)))
        return tuple(cuts)

    def _check(self, buckets: Iterable[str]) -> None:
        for bucket in buckets:
            for scale in self.scales:
                width, height = size = scaled_size(bucket, scale)
                if width % self.patch_size or height % self.patch_size or not (width and height):
                    raise ConfigError(
                        f"train.phases: bucket {bucket} at scale {scale:g} is {width}x{height}, which patches of "
                        f"{self.patch_size} do not divide. Choose another scale, or a smaller model.patch_size"
                    )
                if self.token_budget is not None and self.tokens(size) > self.token_budget:
                    raise ConfigError(
                        f"train.token_budget {self.token_budget}: one image of bucket {bucket} has "
                        f"{self.tokens(size)} tokens. Raise it to at least that"
                    )
