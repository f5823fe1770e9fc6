"""What the trainer reads and in which order: a pure function of (seed, epoch, position) over the dataset's index.

A slot holds ``batch_size`` samples of one bucket. A bucket's samples form one endless stream, a fresh permutation per
epoch, and its j-th slot is items ``j b .. (j + 1) b`` of that stream: what an epoch leaves over comes first in the
next, so that no sample is dropped however small its bucket. After e epochs a bucket of n samples has emitted
``floor(e n / b)`` slots; an epoch's slots of all buckets are shuffled together. A slot is a micro-batch, unless
``train.token_budget`` cuts an optimiser step's slots otherwise (:mod:`train.data.batch_plan`).
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nanodit.console import duration, say
from nanodit.errors import ConfigError, DataError
from nanodit.rng import generator
from prep.dataset.layout import Unit
from train.data.flip import flip_pixels
from train.model.conditions import Conditions, load_conditions

STALL_SECONDS = 10.0  # that reading a member may take before it is said
ABANDON_SECONDS = 5.0  # that the thread which reads ahead is waited for at the end
LAYER_OF = {"pixels": "px", "t5": "t5", "cls": "dino", "patches": "dino", "pose": "pose"}

Row = dict[str, Any]
T = TypeVar("T")


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
        # a pure function of its arguments; consecutive slots ask for the same few
        self._permutation = lru_cache(maxsize=2 * len(self.sizes))(self._permute)
        self._epoch_batches = lru_cache(maxsize=2)(self._shuffle)

    def __getitem__(self, index: int) -> Slot:
        """Return the slot number ``index``, 0 or larger."""
        epoch = self.epoch_of(index)
        bucket, batch = self._epoch_batches(epoch)[index - self._before(epoch)]
        size, first = self.sizes[bucket], batch * self.batch_size
        stream = (divmod(position, size) for position in range(first, first + self.batch_size))
        return Slot(bucket, tuple(int(self._permutation(bucket, lap)[item]) for lap, item in stream))

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
        emitted = {bucket: self._emitted(bucket, epoch) for bucket in self.sizes}
        for bucket, _ in self._epoch_batches(epoch)[: slots - self._before(epoch)]:
            emitted[bucket] += 1
        return sum(max(0, size - emitted[bucket] * self.batch_size) for bucket, size in self.sizes.items())

    def _emitted(self, bucket: str, epochs: int) -> int:
        return epochs * self.sizes[bucket] // self.batch_size

    def _before(self, epoch: int) -> int:
        return sum(self._emitted(bucket, epoch) for bucket in self.sizes)

    def _shuffle(self, epoch: int) -> list[tuple[str, int]]:
        batches = [
            (bucket, batch)
            for bucket in self.sizes
            for batch in range(self._emitted(bucket, epoch), self._emitted(bucket, epoch + 1))
        ]
        return [batches[i] for i in generator(self.seed, "epoch", epoch).permutation(len(batches))]

    def _permute(self, bucket: str, lap: int) -> np.ndarray:
        return generator(self.seed, "bucket", bucket, lap).permutation(self.sizes[bucket])


class TrainingSet:
    """The training split by bucket, in key order, with decoded samples kept in memory up to ``cache_gb`` (1e9 bytes).

    ``dataset`` is a :class:`prep.dataset.layout.Dataset`. What comes first stays: with a permutation per epoch,
    replacing the oldest would always evict what is needed next. Raises :class:`DataError` where a key is in both
    splits.
    """

    def __init__(self, dataset: Any, cache_gb: float) -> None:
        self.info, self.fingerprint = dataset.info, dataset.fingerprint
        self._dataset, self._budget = dataset, int(cache_gb * 1e9)
        self._cache: dict[tuple[str, str], np.ndarray] = {}
        self.reading: tuple[str, float] | None = None  # what is being read, and since when (time.monotonic)
        self.rows: dict[str, list[Row]] = {}
        holdout = {row["key"] for row in dataset.rows("holdout")}
        for row in dataset.rows("train"):
            if row["key"] in holdout or row["split"] != "train":
                raise DataError(
                    f"{dataset.root}: sample {row['key']} ({row['source']}) is in both the holdout and the training "
                    "split, so every later number would be wrong. Run prep again on this source."
                )
            self.rows.setdefault(row["bucket"], []).append(row)

    @property
    def sizes(self) -> dict[str, int]:
        """Samples per bucket."""
        return {bucket: len(rows) for bucket, rows in self.rows.items()}

    def select(self, slot: Slot) -> list[Row]:
        """Return the rows of a micro-batch."""
        return [self.rows[slot.bucket][item] for item in slot.items]

    def load(
        self, rows: Sequence[Row], size: tuple[int, int] | None = None, flips: Sequence[bool] | None = None
    ) -> tuple[Tensor, Conditions]:
        """Read rows of one bucket: pixels (B, 3, H, W) float32 in [-1, 1], and all they can be conditioned on.

        ``size`` (width, height) is what the images are resized to; the conditions know no size. ``flips`` says which
        are mirrored, with all their conditions.
        """
        return load_pixels(self, rows, size, flips), load_conditions(self, rows, flips)

    def flippable(self, row: Row) -> bool:
        """Whether the image may be mirrored."""
        return self._dataset.flippable(row)

    def pixels(self, row: Row, size: tuple[int, int] | None = None) -> np.ndarray:
        """The image, uint8 (H, W, 3); kept in memory in the size that was asked for last."""
        width, height = size or bucket_size(row["bucket"])
        cached = self._cache.get((row["key"], "pixels"))
        if cached is not None and cached.shape[:2] != (height, width):  # of another phase
            self._budget += self._cache.pop((row["key"], "pixels")).nbytes
        return self._cached("pixels", row, lambda array: resize(array, width, height))

    def t5(self, row: Row, flipped: bool = False) -> np.ndarray:
        """The caption's tokens, float16 (L, width)."""
        return self._cached("t5", row, flipped=flipped)

    def cls(self, row: Row, flipped: bool = False) -> np.ndarray:
        """The DINO CLS token, (width,)."""
        return self._cached("cls", row, flipped=flipped)

    def patches(self, row: Row, flipped: bool = False) -> np.ndarray:
        """The DINO patches, float32 (h, w, width)."""
        return self._cached("patches", row, flipped=flipped)

    def pose(self, row: Row) -> np.ndarray:
        """The keypoints, float32 (133, 3)."""
        return self._cached("pose", row)

    def _cached(
        self,
        member: str,
        row: Row,
        prepare: Callable[[np.ndarray], np.ndarray] = lambda array: array,
        flipped: bool = False,
    ) -> np.ndarray:
        name = row["key"], f"{member} flipped" if flipped else member
        array = self._cache.get(name)
        if array is None:
            load = getattr(self._dataset, member)
            tar = Unit(row["bucket"], row["shard"], LAYER_OF[member]).tar
            self.reading = f"{tar}, sample {row['key']}", time.monotonic()
            array = prepare(load(row, flipped=True) if flipped else load(row))
            self.reading = None
            if array.nbytes <= self._budget:
                self._budget -= array.nbytes
                self._cache[name] = array
        return array


def load_pixels(
    dataset: Any, rows: Sequence[Row], size: tuple[int, int] | None = None, flips: Sequence[bool] | None = None
) -> Tensor:
    """Read the images of some rows of one bucket as (B, 3, H, W) float32 in [-1, 1].

    ``size`` (width, height) asks a :class:`TrainingSet` for them in another size than the bucket's; ``flips`` says
    which are mirrored.
    """
    images = [dataset.pixels(row, size) if size else dataset.pixels(row) for row in rows]
    stacked = np.stack(
        [flip_pixels(image) if flip else image for image, flip in zip(images, flips or [False] * len(rows))]
    )
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return an image, uint8 (H, W, 3), in another size, by the filter that cut the crops to their buckets.

    So a phase of a smaller scale sees what ``prep`` would have made at a smaller base. Pillow computes in integers, so
    the result is the same on every machine.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def bucket_size(bucket: str) -> tuple[int, int]:
    """Return (width, height) of a bucket's name, e.g. ``832x1216``."""
    width, height = bucket.split("x")
    return int(width), int(height)


def check_patch_size(buckets: Iterable[str], patch_size: int) -> None:
    """Raise :class:`ConfigError` where a bucket cannot be cut into whole patches."""
    odd = [bucket for bucket in buckets if any(side % patch_size for side in bucket_size(bucket))]
    if odd:
        sides = [side for bucket in buckets for side in bucket_size(bucket)]
        raise ConfigError(
            f"model.patch_size {patch_size} does not divide the sides of bucket {', '.join(odd)}. "
            f"Choose a divisor of {math.gcd(*sides)}, or prepare the dataset at another base"
        )


@contextmanager
def stalls_are_said(data: TrainingSet) -> Iterator[None]:
    """While this is open, say which read of ``data`` takes longer than STALL_SECONDS, again and again until it ends."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(STALL_SECONDS / 2):
            reading = data.reading
            if reading and (taken := time.monotonic() - reading[1]) >= STALL_SECONDS:
                say(f"waiting for the storage: {reading[0]} is being read for {duration(taken)}")

    thread = threading.Thread(target=watch, daemon=True, name="stalls")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def prefetch(
    make: Callable[[int], T], numbers: Iterable[int], depth: int, give_up: Callable[[], bool] = lambda: False
) -> Iterator[T]:
    """Yield ``make(number)`` for endless numbers, made up to ``depth`` ahead by a background thread (0: none).

    The order and the values are those of calling ``make`` in place; so is an exception, which ends the iteration where
    the value would have come. ``give_up`` is asked while nothing comes, and ends it too. Close the iterator to stop the
    thread.
    """
    if depth == 0:
        yield from map(make, numbers)
        return
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def work() -> None:
        # of this thread alone: a second team of torch threads would fight with the training's for the cores
        torch.set_num_threads(1)
        for number in numbers:
            if stop.is_set():
                return
            try:
                made = (make(number), None)
            except BaseException as error:  # handed to the consumer, which raises it
                made = (None, error)
            ready.put(made)
            if made[1] is not None:
                return

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            try:
                value, error = ready.get(timeout=0.5)
            except queue.Empty:
                if give_up():
                    return
                continue
            if error is not None:
                raise error
            yield value
    finally:
        stop.set()
        abandoned = time.monotonic() + ABANDON_SECONDS  # a read may hang with its storage, for ever
        while thread.is_alive() and time.monotonic() < abandoned:  # it may be waiting for room in the queue
            while not ready.empty():
                ready.get_nowait()
            thread.join(timeout=0.01)
