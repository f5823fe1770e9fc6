"""The baselines of every number: predictors and pictures that know nothing of the model."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from evaluate.metrics.training_features import TrainFeatures
from nanodit.console import Progress
from nanodit.errors import DataError
from nanodit.rng import generator
from prep.dataset.reader import Dataset
from prep.dataset.rows import Rows


def round_trip(images: np.ndarray) -> np.ndarray:
    """Pass each uint8 (B, H, W, 3) image through JPEG, quality 95, 4:4:4: as near as a lossy copy gets."""
    copies = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
        copies.append(np.asarray(Image.open(buffer).convert("RGB")))
    return np.stack(copies)


def nearest(images: np.ndarray, bucket: str, training: TrainFeatures, known: np.ndarray) -> list[str | None]:
    """Return the key of the training image nearest to each image of a bucket, and of that bucket; None without one.

    ``images`` float32 (B, width) are features of the images, ``known`` (n, width) those of the ``training`` images in
    the same space.
    """
    own = [index for index, other in enumerate(training.buckets) if other == bucket]
    if not own:
        return [None] * len(images)
    return [training.keys[own[int(np.square(known[own] - image).sum(1).argmin())]] for image in images]


class TrainingImages:
    """The predictions that the training set alone allows: a mean image per bucket and an affine map of z.

    ``images`` maps bucket -> uint8 (n, H, W, 3) of training images, ``keys`` bucket -> their keys.
    """

    def __init__(self, images: Mapping[str, np.ndarray], keys: Mapping[str, Sequence[str]]):
        self.count = sum(map(len, images.values()))
        if not self.count:
            raise ValueError("the baselines need training images")
        self._images, self._keys = images, keys
        self._fits: dict[tuple[float, float], tuple[float, float]] = {}
        self._means = {bucket: pixels.astype(np.float64).mean(0) for bucket, pixels in images.items() if len(pixels)}
        colours = [pixels.astype(np.float64).mean((1, 2)) for pixels in images.values() if len(pixels)]
        self._colour = np.concatenate(colours).mean(0)

    def mean_image(self, bucket: str) -> np.ndarray:
        """Return the mean training image of a bucket ``WxH``, float64 (H, W, 3) in [0, 255].

        The mean colour where the bucket has no training image.
        """
        if bucket in self._means:
            return self._means[bucket]
        width, height = map(int, bucket.split("x"))
        return np.broadcast_to(self._colour, (height, width, 3))

    def affine(self, low: float, high: float) -> tuple[float, float]:
        """Fit (a, b) of ``x ~ a z + b`` by least squares over all training pixels, for t uniform in [low, high].

        x in [-1, 1], ``z = (1 - t) x + t e``; t and e are functions of the image's key and the interval.
        """
        if (low, high) in self._fits:
            return self._fits[low, high]
        moments = np.zeros(5)  # n, sum z, sum x, sum z z, sum z x
        for bucket in sorted(self._images):
            for key, pixels in zip(self._keys[bucket], self._images[bucket]):
                random = generator("affine", key, repr(low), repr(high))
                t = random.uniform(low, high)
                x = pixels.astype(np.float32) / 127.5 - 1
                z = (1 - t) * x + t * random.standard_normal(x.shape, dtype=np.float32)
                moments += [x.size, z.sum(), x.sum(), np.vdot(z, z), np.vdot(z, x)]
        n, sum_z, sum_x, sum_zz, sum_zx = moments
        slope = (n * sum_zx - sum_z * sum_x) / (n * sum_zz - sum_z**2)
        self._fits[low, high] = float(slope), float((sum_x - slope * sum_z) / n)
        return self._fits[low, high]


def load_training_images(dataset: Dataset, buckets: Collection[str], count: int) -> TrainingImages:
    """Read about ``count`` training images of ``buckets``, or of all buckets where those have none.

    They are spread evenly over the keys.
    """
    train = Rows.of(dataset.rows("train"))
    if not train:
        raise DataError(f"{dataset.root}: the training split is empty, and the baselines are made from it")
    rows = train.take(pc.is_in(train.column("bucket"), pa.array(buckets, pa.string()))) or train
    rows = rows.sorted_by("bucket", "key")[:: max(1, len(rows) // count)]
    members = rows.by("bucket")
    images = {}
    with Progress("training images", len(rows), "images") as progress:
        for bucket, own in members.items():
            pixels = []
            for row in own:
                pixels.append(dataset.pixels(row))
                progress.advance()
            images[bucket] = np.stack(pixels)
    return TrainingImages(images, {bucket: [row["key"] for row in own] for bucket, own in members.items()})
