"""The order of the data, addressed by one integer: a pure function of (seed, epoch, position).

A slot holds ``batch_size`` samples of one bucket. A bucket's samples form one endless stream, a fresh permutation per
epoch, and its j-th slot is items ``j b .. (j + 1) b`` of that stream: what an epoch leaves over comes first in the
next, so that no sample is dropped however small its bucket. After e epochs a bucket of n samples has emitted
``floor(e n / b)`` slots; an epoch's slots of all buckets are shuffled together. A slot is a micro-batch, unless
``train.token_budget`` cuts an optimiser step's slots otherwise (:mod:`train.data.batch_plan`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nanodit.errors import DataError
from nanodit.rng import generator


@dataclass(frozen=True)
class Slot:
    """Some samples of one bucket: their positions among the bucket's rows."""

    bucket: str
    items: tuple[int, ...]


class Order:
    """The order of slots, addressed by one integer: the number of slots before it.

    ``sizes`` maps each bucket to its number of samples.
    """

    def __init__(self, sizes: Mapping[str, int], batch_size: int, seed: int) -> None:
        self.sizes = {bucket: size for bucket, size in sorted(sizes.items()) if size > 0}
        self.batch_size, self.seed = batch_size, seed
        if not self.sizes:
            raise DataError("the training split is empty; prepare a dataset with more images")
        self._names = list(self.sizes)
        # a pure function of its arguments; consecutive slots ask for the same few
        self._permutation = lru_cache(maxsize=2 * len(self.sizes))(self._permute)
        self._epoch_batches = lru_cache(maxsize=2)(self._shuffle)

    def __getitem__(self, index: int) -> Slot:
        """Return the slot number ``index``, 0 or larger."""
        epoch = self.epoch_of(index)
        number, batch = self._epoch_batches(epoch)[:, index - self._before(epoch)].tolist()
        bucket = self._names[number]
        size, first = self.sizes[bucket], batch * self.batch_size
        items: list[int] = []
        while len(items) < self.batch_size:  # from as many laps as it takes
            lap, item = divmod(first + len(items), size)
            items += self._permutation(bucket, lap)[item : item + self.batch_size - len(items)].tolist()
        return Slot(bucket, tuple(items))

    def epoch_of(self, index: int) -> int:
        """Return the epoch of slot ``index``; epochs too small for a single slot are passed over."""
        total = sum(self.sizes.values())
        epoch = index * self.batch_size // total  # never too late: floor(e n / b) summed is at most e N / b
        while self._before(epoch + 1) <= index:
            epoch += 1
        return epoch

    def unseen(self, slots: int) -> int:
        """Count the samples that the first ``slots`` never show."""
        epoch = self.epoch_of(slots)
        numbers, _ = self._epoch_batches(epoch)[:, : slots - self._before(epoch)]
        further = np.bincount(numbers, minlength=len(self._names)).tolist()
        emitted = (self._emitted(bucket, epoch) + more for bucket, more in zip(self._names, further))
        return sum(max(0, size - slots * self.batch_size) for size, slots in zip(self.sizes.values(), emitted))

    def _emitted(self, bucket: str, epochs: int) -> int:
        return epochs * self.sizes[bucket] // self.batch_size

    def _before(self, epoch: int) -> int:
        return sum(self._emitted(bucket, epoch) for bucket in self.sizes)

    def _shuffle(self, epoch: int) -> np.ndarray:
        """Return an epoch's slots in their order, (2, n): the number of the bucket, and which of its slots."""
        spans = [(self._emitted(bucket, epoch), self._emitted(bucket, epoch + 1)) for bucket in self._names]
        numbers = np.repeat(np.arange(len(spans)), [end - start for start, end in spans])
        batches = np.concatenate([np.arange(*span) for span in spans])
        order = generator(self.seed, "epoch", epoch).permutation(len(batches))
        return np.stack((numbers[order], batches[order]))

    def _permute(self, bucket: str, lap: int) -> np.ndarray:
        return generator(self.seed, "bucket", bucket, lap).permutation(self.sizes[bucket])
