"""The samples that a run reads, in memory or from the shards."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor

from nanodit.errors import ConfigError, DataError
from prep.dataset.layout import Unit
from prep.dataset.rows import Rows
from train.data.order import Slot
from train.model.conditions import Conditions, collate
from train.model.mirror import flip_pixels
from train.model.modalities import MODALITIES, Modality, Stored, present

Row = Mapping[str, Any]


class TrainingSet:
    """The training split by bucket, in key order, with samples kept in memory up to ``cache_gb`` (1e9 bytes): pixels
    decoded, features as they are stored.

    ``dataset`` is a :class:`prep.dataset.reader.Dataset`. What comes first stays: with a permutation per epoch,
    replacing the oldest would always evict what is needed next. Raises :class:`DataError` where a key is in both
    splits.
    """

    def __init__(self, dataset: Any, cache_gb: float) -> None:
        self.info, self.fingerprint = dataset.info, dataset.fingerprint
        self._dataset, self._budget = dataset, int(cache_gb * 1e9)
        self._cache: dict[tuple[str, str], Stored] = {}
        self._lock = threading.Lock()  # of what is in memory, which several threads fill
        # what is being read, by thread, and since when (time.monotonic)
        self.reading: dict[int, tuple[str, float]] = {}
        self.all_rows = Rows.of(dataset.rows("train"))
        _check_split(dataset, self.all_rows)
        self.rows: dict[str, Rows] = self.all_rows.by("bucket")

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
        return load_pixels(self, rows, size, flips), self.conditions(rows, flips)

    def flippable(self, row: Row) -> bool:
        """Whether the image may be mirrored."""
        return self._dataset.flippable(row)

    def pixels(self, row: Row, size: tuple[int, int] | None = None) -> np.ndarray:
        """Return the image, uint8 (H, W, 3); kept in memory in the size that was asked for last."""
        width, height = size or bucket_size(row["bucket"])
        with self._lock:
            cached = self._cache.get((row["key"], "pixels"))
            if cached is not None and cached.shape[:2] != (height, width):  # of another phase
                self._budget += self._cache.pop((row["key"], "pixels")).nbytes
        return self._cached("pixels", "px", row, lambda: resize(self._dataset.pixels(row), width, height))

    def conditions(self, rows: Sequence[Row], flips: Sequence[bool] | None = None) -> Conditions:
        """Do what :func:`load_conditions` does, and keep what was read in memory."""
        return collate(**self.features(rows, flips), count=len(rows))

    def features(
        self, rows: Sequence[Row], flips: Sequence[bool] | None = None, shorts: Sequence[bool] | None = None
    ) -> dict[str, list[Stored]]:
        """Do what :func:`load_features` does, and keep what was read in memory."""
        return load_features(self._dataset, rows, flips, shorts, self._features)

    def _features(self, modality: Modality, dataset: Any, row: Row, flipped: bool, short: bool) -> Stored:
        if flipped and modality.mirror:  # made of what is in memory
            return modality.mirror(self._features(modality, dataset, row, False, short))
        short = short and modality.read_short is not None
        name = " ".join([modality.name, *["short"] * short, *["flipped"] * flipped])
        return self._cached(name, modality.layer, row, lambda: modality.load(dataset, row, flipped, short))

    def _cached(self, name: str, layer: str, row: Row, read: Callable[[], Stored]) -> Stored:
        place = row["key"], name
        array = self._cache.get(place)
        if array is None:
            what = f"{Unit(row['bucket'], row['shard'], layer).tar}, sample {place[0]}"
            self.reading[threading.get_ident()] = what, time.monotonic()
            try:
                array = read()
            finally:
                del self.reading[threading.get_ident()]
            with self._lock:
                if place not in self._cache and array.nbytes <= self._budget:
                    self._budget -= array.nbytes
                    self._cache[place] = array
        return array


def _check_split(dataset: Any, rows: Rows) -> None:
    """Raise :class:`DataError` for a row that is of the holdout, too."""
    if not rows:
        return
    wrong = pc.not_equal(rows.column("split"), "train")
    if holdout := Rows.of(dataset.rows("holdout")):
        wrong = pc.or_(wrong, pc.is_in(rows.column("key"), holdout.column("key")))
    if found := rows.take(wrong):
        row = found[0]
        raise DataError(
            f"{dataset.root}: sample {row['key']} ({row['source']}) is in both the holdout and the training "
            "split, so every later number would be wrong. Run nanodit prep run on this source again."
        )


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
    return to_float(torch.from_numpy(stacked))


def to_float(pixels: Tensor) -> Tensor:
    """Turn pixels, uint8 (B, H, W, 3), into what the network sees: float32 (B, 3, H, W) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


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


def load_conditions(
    dataset: Any, rows: Sequence[Row], flips: Sequence[bool] | None = None, shorts: Sequence[bool] | None = None
) -> Conditions:
    """Read the stored features of some rows of one bucket (a :class:`prep.dataset.reader.Dataset`), everything kept.

    ``flips`` says of which images the conditions of the mirror image are wanted, all of them, and ``shorts`` of which
    those of the short caption; None: of none.
    """
    return collate(**load_features(dataset, rows, flips, shorts), count=len(rows))


def load_features(
    dataset: Any,
    rows: Sequence[Row],
    flips: Sequence[bool] | None = None,
    shorts: Sequence[bool] | None = None,
    read: Callable[[Modality, Any, Row, bool, bool], Stored] = Modality.load,
) -> dict[str, list[Stored]]:
    """Read the features of each image, by modality, as they are stored; arguments as for :func:`load_conditions`.

    ``read`` takes the place of :meth:`train.model.modalities.Modality.load`.
    """
    stored = [MODALITIES[name] for name in present(dataset.info["layers"])]
    features: dict[str, list[Stored]] = {one.name: [] for one in stored}
    at_once = dataset.together()
    none = [False] * len(rows)
    for row, flip, short in zip(rows, flips or none, shorts or none):  # sample by sample: one read for each layer
        for one in stored:
            features[one.name].append(read(one, at_once, row, flip, short))
    return features
