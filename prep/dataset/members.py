"""The kinds of files that samples have in a layer, each with the check that ``prep verify`` makes of its bytes.

A check takes the bytes, the sample's row of the index part, and the part. It raises :class:`DataError` or one of the
errors of damaged content (ValueError, KeyError, TypeError, OSError).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from nanodit.errors import DataError
from prep.dataset.buckets import Bucket
from prep.dataset.codecs import parse_npy

if TYPE_CHECKING:
    from prep.dataset.layout import Part

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Array:
    """An NPY file of finite numbers; ``shape`` follows from the sample's row and the facts of its unit.

    ``negative`` is the problem of an array with numbers below 0 where there must be none.
    """

    dtype: type
    shape: Callable[[Row, Row], tuple[int, ...]]
    negative: str = ""

    def check(self, data: bytes, row: Row, part: Part) -> np.ndarray:
        """Return the array."""
        array, shape = parse_npy(data), self.shape(row, part.facts)
        if (array.dtype, array.shape) != (np.dtype(self.dtype), shape):
            raise DataError(f"is {array.dtype} {array.shape}, expected {np.dtype(self.dtype)} {shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError("has numbers that are not finite")
        if self.negative and (array < 0).any():
            raise DataError(self.negative)
        return array


@dataclass(frozen=True)
class Picture:
    """A WebP or JPEG of the bucket's size."""

    def check(self, data: bytes, row: Row, part: Part) -> None:
        """Look at the header."""
        bucket = Bucket.parse(part.unit.bucket)
        with Image.open(io.BytesIO(data), formats=["WEBP", "JPEG"]) as image:
            if image.size != (bucket.width, bucket.height):
                raise DataError(f"is {image.width}x{image.height}, expected {bucket}")


@dataclass(frozen=True)
class Text:
    """UTF-8 text that ``column`` of the index repeats; ``empty``: it may be, where the column is null."""

    column: str
    problem: str
    empty: bool = False

    def check(self, data: bytes, row: Row, part: Part) -> None:
        """Compare with the column."""
        if not (self.empty or data.strip()) or data.decode() != (row[self.column] or ""):
            raise DataError(self.problem)  # a UnicodeDecodeError is a ValueError


@dataclass(frozen=True)
class Json:
    """A JSON document, whose entry ``column`` the index repeats where one is named."""

    column: str = ""
    problem: str = ""

    def check(self, data: bytes, row: Row, part: Part) -> None:
        """Parse it and compare with the column."""
        document = json.loads(data)
        if self.column and document[self.column] != row[self.column]:
            raise DataError(self.problem)


@dataclass(frozen=True)
class Member:
    """A file of every sample of a layer; in the tar it is called KEY.NAME."""

    name: str
    kind: Array | Picture | Text | Json
