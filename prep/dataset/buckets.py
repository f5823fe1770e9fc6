"""Aspect-ratio buckets: which picture size an image is brought to, and which part of the image survives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from nanodit.errors import ConfigError

# Landscape and square buckets at base 1024 (width, height); the portrait ones are their transposes.
REFERENCE_BASE = 1024
REFERENCE_BUCKETS = ((1024, 1024), (1216, 832), (1280, 768), (1344, 704))
SIDE_MULTIPLE = 8
REDUCED = ("nanodit", "reduced")  # in the ``info`` of an image, where texts of strangers have names that are no tuples


@dataclass(frozen=True, order=True)
class Bucket:
    """A picture size in pixels; its name is WIDTHxHEIGHT."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def transposed(self) -> Bucket:
        """The bucket of the same picture turned by 90 degrees."""
        return Bucket(self.height, self.width)

    @classmethod
    def parse(cls, name: str) -> Bucket:
        """Return the bucket called ``name``, for example ``80x56``."""
        width, height = name.split("x")
        return cls(int(width), int(height))


@dataclass(frozen=True)
class Crop:
    """The centred part of an image that fills a bucket: a box in source pixels and the scale from source to bucket."""

    left: float
    top: float
    right: float
    bottom: float
    scale: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom), the order of Pillow's ``box`` arguments."""
        return self.left, self.top, self.right, self.bottom


def buckets_for(base: int) -> tuple[Bucket, ...]:
    """Return the seven buckets of a base size: the square, then each landscape followed by its portrait.

    Sides are those at 1024 scaled by base / 1024 and rounded to the nearest multiple of 8, halves up, so that a base of
    64 has 80x56 and 88x48. Raises ConfigError for a base at which two buckets coincide; no multiple of 64 is one.
    """

    def side(reference: int) -> int:
        return math.floor(reference * base / REFERENCE_BASE / SIDE_MULTIPLE + 0.5) * SIDE_MULTIPLE

    landscape = [Bucket(side(width), side(height)) for width, height in REFERENCE_BUCKETS]
    buckets = [landscape[0]] + [turned for bucket in landscape[1:] for turned in (bucket, bucket.transposed)]
    if base % SIDE_MULTIPLE or base < 64 or len(set(buckets)) != len(buckets):
        raise ConfigError(f"base {base} does not give seven distinct buckets. Choose a multiple of 64")
    return tuple(buckets)


def choose_bucket(width: int, height: int, base: int) -> Bucket:
    """Return the bucket whose aspect ratio is nearest to width / height on the logarithmic scale.

    Only the landscape form is compared and the answer transposed back, so that an image and its transpose always get
    transposed buckets, rounding errors and ties included; a tie goes to the squarer bucket.
    """
    ratio = math.log(max(width, height)) - math.log(min(width, height))
    square, *rest = buckets_for(base)
    candidates = [square, *rest[::2]]
    chosen = min(candidates, key=lambda bucket: abs(ratio - math.log(bucket.width / bucket.height)))
    return chosen if width >= height else chosen.transposed


def centre_crop(width: int, height: int, bucket: Bucket) -> Crop:
    """Return the largest centred part of an image that has the bucket's aspect ratio (resize to cover)."""
    scale = max(bucket.width / width, bucket.height / height)
    # min() because W / (W / w) may exceed w by a rounding error, and Pillow refuses a box beyond the image
    crop_width, crop_height = min(bucket.width / scale, width), min(bucket.height / scale, height)
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return Crop(left, top, left + crop_width, top + crop_height, scale)


def crop_boxes(
    width: np.ndarray, height: np.ndarray, bucket_width: np.ndarray, bucket_height: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the boxes of :func:`centre_crop` of many images, to the bit; all arrays are float64 (N,)."""
    scale = np.maximum(bucket_width / width, bucket_height / height)
    crop_width, crop_height = np.minimum(bucket_width / scale, width), np.minimum(bucket_height / scale, height)
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return left, top, left + crop_width, top + crop_height


def cut_away(width: np.ndarray, height: np.ndarray, *box: np.ndarray) -> np.ndarray:
    """Return the share of each image's area that its crop cuts away, from 0 to 1; arrays (N,), ``box`` as above."""
    left, top, right, bottom = box
    # a box may miss the picture's edge by a rounding error
    return np.clip(1 - (right - left) * (bottom - top) / (width * height), 0, 1)


def reduction(width: int, height: int, bucket: Bucket) -> int:
    """Return by what (8, 4, 2 or 1) an image may be reduced and still have twice the crop's pixels on each side.

    JPEGs can be decoded so in a fraction of the time; the crop is then within 50 dB of that of all pixels.
    """
    scale = centre_crop(width, height, bucket).scale
    return next((factor for factor in (8, 4, 2) if 2 * factor * scale <= 1), 1)


def crop_to_bucket(image: Image.Image, bucket: Bucket) -> Image.Image:
    """``image`` cropped and resized to the bucket in one antialiased operation (Lanczos over the scaled support).

    Where it was reduced while it was decoded, ``info[REDUCED]`` has the size of all pixels, by what it was reduced, and
    where in it their left upper corner lies.
    """
    width, height, factor, x, y = image.info.get(REDUCED, (*image.size, 1, 0, 0))
    crop = centre_crop(width, height, bucket)
    left, top, right, bottom = (edge / factor for edge in crop.box)
    box = (left + x, top + y, min(right + x, image.width), min(bottom + y, image.height))
    return image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)
