"""What one micro-step needs, as a pure function of config, data and the number of the micro-batch.

The loader's threads make it of what is stored (uint8 pixels, int8 patches and their scales, float16 text), and the
device turns it into what the network sees: little travels, and little is computed on the host. Pixels come in the order
of :mod:`train.data.samples`; noise, times and dropped conditions from generators named by (seed, purpose, step, image).
So micro-batches can be made ahead, or again after a kill, without any state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanodit.rng import generator
from train.config import TrainConfig
from train.data.batch_plan import BatchPlan
from train.data.buffers import Buffer
from train.data.flip import draw_flip
from train.data.noise import Kind, noise_key, normal
from train.data.order import Order
from train.data.samples import Row, TrainingSet, to_float
from train.data.short import draw_short
from train.method.dropout import deal
from train.method.flow import timesteps
from train.method.loss import Drawn, Later, Loss
from train.method.schedule import Course
from train.model.conditions import Conditions, Subset, pack
from train.model.context import find_spans, token_counts
from train.model.modalities import present
from train.model.tread import draw_keep_ids

MIN_GROUP = 8  # images of one condition subset that are worth a forward of their own


@dataclass(frozen=True)
class Group:
    """Some images of a micro-batch that go through the network together.

    ``prepared`` holds by name what losses need of them (:meth:`train.method.loss.Loss.prepare`), as far as there is
    any.
    """

    images: slice
    conditions: Conditions
    prepared: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MicroBatch:
    """Everything that one micro-step needs: pixels and noise (B, 3, H, W), t (B,), and conditions after dropout.

    ``keep_ids`` (B, k) are the tokens that routed blocks see, None where all blocks see all; ``flipped`` counts the
    images that are mirrored, with all their conditions, ``short`` those with their short caption. Until it is
    :meth:`unpacked`, pixels are uint8 (B, H, W, 3) and ``mirror`` (B,) says whose are still to be mirrored, conditions
    are as they are stored, noise that the device draws is its keys, int64 (B, 2), and tensors may lie in a ``buffer``
    that the next micro-batch takes over.
    """

    keys: list[str]
    subsets: list[Subset]
    x: Tensor
    noise: Tensor
    t: Tensor
    groups: list[Group]
    keep_ids: Tensor | None = None
    flipped: int = 0
    mirror: Tensor | None = None
    short: int = 0
    buffer: Buffer | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """Move every tensor; without waiting where they are pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, function: Callable[[Tensor], Tensor]) -> MicroBatch:
        """Apply ``function`` to every tensor."""
        groups = [
            Group(
                group.images, group.conditions.map(function), {**group.prepared, **_tensors(group.prepared, function)}
            )
            for group in self.groups
        ]
        return replace(self, groups=groups, **_tensors(vars(self), function))

    def unpacked(self) -> MicroBatch:
        """Return it as the network sees it, computed on the device where it lies; what is unpacked stays as it is.

        Keys, subsets and t outlive the buffer.
        """
        if self.x.is_floating_point():
            return self
        pixels = self.x
        if self.mirror is not None:
            pixels = torch.where(self.mirror.view(-1, 1, 1, 1), pixels.flip(2), pixels)
        groups = []
        for group in self.groups:
            made = {name: value.made() for name, value in group.prepared.items() if isinstance(value, Later)}
            groups.append(replace(group, conditions=group.conditions.unpacked(), prepared={**group.prepared, **made}))
        x, noise = to_float(pixels), self.noise
        if not noise.is_floating_point():
            noise = normal(noise, x.shape[1:])
        return replace(self, x=x, noise=noise, t=self.t.clone(), groups=groups, mirror=None)

    def active_tokens(self, patch_size: int, routed_blocks: float) -> float:
        """Count the image tokens that a block sees, mean over the blocks; ``routed_blocks`` is the share that route."""
        images, _, height, width = self.x.shape
        tokens = (height // patch_size) * (width // patch_size)
        kept = tokens if self.keep_ids is None else self.keep_ids.shape[1]
        return images * (tokens - routed_blocks * (tokens - kept))


def _tensors(record: Mapping[str, Any], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Apply ``function`` to the values that are tensors, or made of some later, and return these."""
    found = {name: value.map(function) for name, value in record.items() if isinstance(value, Later)}
    return found | {name: function(value) for name, value in record.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Accumulated:
    """What the micro-batches of an optimiser step leave beside gradients: keys, subsets and t of each image, what
    :meth:`train.loop.trainer.Trainer.micro_step` returns (the tensors on the device), the image tokens a block saw, the
    images that were routed, those that were mirrored and those with their short caption."""

    keys: list[str]
    subsets: list[Subset]
    t: Tensor
    values: dict[str, Tensor]
    tokens: float = 0.0
    routed: int = 0
    flipped: int = 0
    short: int = 0


class MicroBatches:
    """All micro-batches of a run, by number; ``plan.numbers`` lists those of an optimiser step."""

    def __init__(self, config: TrainConfig, data: TrainingSet, table: dict[Subset, float]) -> None:
        self.config, self.data, self.table = config, data, table
        train = config.train
        self.course = Course((train.steps,))
        self.order = Order(data.sizes, train.batch_size, config.seed)
        self.modalities = present(data.info["layers"])
        self.losses: Collection[Loss] = ()  # that have something to prepare
        self.noise: Kind = "host"  # who draws it
        self.plan = BatchPlan(
            self.order, train.grad_accumulation_steps, train.token_budget, train.phases, config.model.patch_size
        )

    def numbers(self, first_step: int) -> Iterator[int]:
        """Yield the numbers of all micro-batches from a step (0-based) on, endlessly."""
        return chain.from_iterable(map(self.plan.numbers, count(first_step)))

    def make(self, index: int) -> MicroBatch:
        """Return micro-batch ``index`` of the run as the network sees it, on the CPU."""
        return self.pack(index, Buffer()).unpacked()

    def pack(self, index: int, buffer: Buffer) -> MicroBatch:
        """Return micro-batch ``index`` of the run as it is stored, in ``buffer``; other threads call ahead."""
        config, empty = self.config, buffer.empty
        step, position = divmod(index, self.plan.stride)
        cuts = self.plan.of_step(step)
        cut = cuts[position]
        images = cut.images  # their numbers in the step
        rows = self.data.select(cut)
        flips = self.flips(step, images, rows)
        shorts = self.shorts(step, images)
        conditions = pack(**self.data.features(rows, flips, shorts), count=len(rows), empty=empty)
        width, height = cut.size
        x = empty((len(rows), height, width, 3), dtype=torch.uint8)
        for image, row in zip(x.numpy(), rows):
            image[:] = self.data.pixels(row, cut.size)

        # drawn for the whole step, so that strata and shares span it; this micro-batch takes its part
        shifts = np.empty(self.plan.images)
        for other in cuts:
            shifts[list(other.images)] = config.flow.shift_of(other.size[1], other.size[0])
        t = timesteps(config.flow, generator(config.seed, "timesteps", step), shifts)[list(images)]
        sizes = [len(other.images) for other in cuts]
        subsets = deal_subsets(self.table, sizes, generator(config.seed, "conditions", step))[position]
        if self.noise == "device":
            noise = torch.tensor([noise_key(config.seed, step, i) for i in images])
        else:
            noise = empty((len(rows), 3, height, width), dtype=torch.float32)
            for values, i in zip(noise.numpy(), images):
                generator(config.seed, "noise", step, i).standard_normal(dtype=np.float32, out=values)
        size = height, width
        groups = []
        for group in split(subsets):
            own, seen = images[group], conditions.select(group)
            drawn = Drawn(
                step=step, steps=self.course.totals[0], turn=step + position, size=size,
                shift=config.flow.shift_of(*size), t=t[group].tolist(), subsets=subsets[group], conditions=seen,
                generator_of=lambda purpose, i, own=own: generator(config.seed, purpose, step, own[i]),
            )  # fmt: skip
            given = self._with_spans(seen.keeping(subsets[group]), rows[0])
            groups.append(Group(group, given, self._prepared(drawn)))
        keep_ids = self._keep_ids(index, images, *size)
        mirror = torch.tensor(flips) if any(flips) else None
        tensors = x, noise, torch.from_numpy(t), groups, keep_ids
        made = MicroBatch([row["key"] for row in rows], subsets, *tensors, sum(flips), mirror, sum(shorts))
        return replace(made.map(buffer.take), buffer=buffer)

    def flips(self, step: int, images: Sequence[int], rows: Sequence[Row]) -> list[bool]:
        """Say which of a micro-batch's images, by their numbers in the step, are mirrored."""
        share, seed = self.config.data.flip, self.config.seed
        if share == 0:
            return [False] * len(rows)
        return [draw_flip(seed, step, i, share) and self.data.flippable(row) for i, row in zip(images, rows)]

    def shorts(self, step: int, images: Sequence[int]) -> list[bool]:
        """Say which of a micro-batch's images, by their numbers in the step, are given their short caption."""
        share, seed = self.config.data.short_captions, self.config.seed
        return [share > 0 and draw_short(seed, step, i, share) for i in images]

    def _with_spans(self, conditions: Conditions, row: Row) -> Conditions:
        """Say which context tokens count, so that no device is asked; ``row`` is of the bucket of the images."""
        return replace(
            conditions, spans=find_spans(conditions, self.modalities, token_counts(conditions, self.config.model, row))
        )

    def _prepared(self, drawn: Drawn) -> dict[str, Any]:
        makers = {loss.needs: loss for loss in self.losses if loss.needs}
        made = {name: loss.prepare(drawn) for name, loss in makers.items()}
        return {name: value for name, value in made.items() if value is not None}

    def _keep_ids(self, index: int, images: Sequence[int], height: int, width: int) -> Tensor | None:
        tread, seed = self.config.tread, self.config.seed
        step = index // self.plan.stride
        if not tread.routes(*self.course.within(step), generator(seed, "routed", index)):
            return None
        tokens = (height // self.config.model.patch_size) * (width // self.config.model.patch_size)
        drawn = [draw_keep_ids(generator(seed, "keep", step, i), tokens, tread.kept(tokens)) for i in images]
        return torch.from_numpy(np.stack(drawn))


def deal_subsets(table: dict[Subset, float], sizes: Sequence[int], rng: np.random.Generator) -> list[list[Subset]]:
    """Deal the images of a step's micro-batches their condition subsets, equal ones side by side in few micro-batches.

    The micro-batches are permuted, so that a subset does not depend on the bucket; t is drawn independently.
    """
    dealt = sorted(deal(table, sum(sizes), rng), key=list(table).index)
    rank = rng.permutation(len(sizes))  # of each micro-batch along the sorted subsets
    start = 0
    if len(set(sizes)) > 1:
        # on a circle with a random start every place is equally likely for every image; on a line the small
        # micro-batches would come by the middle less often than by the ends
        start = int(rng.integers(len(dealt)))
    chunks: list[list[Subset]] = [[] for _ in sizes]
    for micro_batch in np.argsort(rank):
        end = start + sizes[micro_batch]
        chunks[micro_batch] = [dealt[place % len(dealt)] for place in range(start, end)]
        start = end
    return chunks


def split(subsets: Sequence[Subset]) -> list[slice]:
    """Cut a micro-batch into groups: a run of at least MIN_GROUP equal subsets is one, what lies between is mixed."""
    cuts = [0, *(i for i in range(1, len(subsets)) if subsets[i] != subsets[i - 1]), len(subsets)]
    groups: list[slice] = []
    mixed = False
    for start, stop in pairwise(cuts):
        small = stop - start < MIN_GROUP
        if small and mixed:
            groups[-1] = slice(groups[-1].start, stop)
        else:
            groups.append(slice(start, stop))
        mixed = small
    return groups
