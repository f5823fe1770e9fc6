"""The crops of a shard on their way into an encoder: decoded once for all its layers, and beside the device's work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain
from typing import Any

import numpy as np

from nanodit.faults import fault
from prep.dataset.codecs import decode_pixels

CACHE_BYTES = 400 << 20  # a usual shard at 1024 pixels: 128 crops of 3 MB

Batch = list[tuple[str, bytes | np.ndarray]]  # key, and the crop's file or the pixels that are known already
Sample = tuple[dict[str, bytes], dict[str, Any]]  # members and index columns


class CropCache:
    """Pixels of one px unit, so that its second layer need not decode them again; at most ``limit`` bytes.

    The first that come are kept: of a shard that is larger than the limit, dropping the oldest would leave nothing for
    the next layer, which reads it in the same order.
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit, self._unit, self._pixels, self._bytes = limit, "", {}, 0

    def open(self, unit: str) -> None:
        """Forget all crops but those of a unit, which its fingerprint names."""
        if unit != self._unit:
            self._unit, self._pixels, self._bytes = unit, {}, 0

    def keep(self, key: str, pixels: np.ndarray) -> None:
        """Keep a crop if there is room."""
        if key not in self._pixels and self._bytes + pixels.nbytes <= self.limit:
            self._pixels[key] = pixels
            self._bytes += pixels.nbytes

    def known(self) -> dict[str, np.ndarray]:
        """Return the crops that are kept, by key."""
        return self._pixels


def decode_batch(batch: Batch, decode: Callable[[bytes], np.ndarray] = decode_pixels) -> np.ndarray:
    """Return the pixels of a batch, uint8 (B, H, W, 3)."""
    pixels = []
    for key, crop in batch:
        if isinstance(crop, bytes):
            fault("crop.decode", key)
            crop = decode(crop)
        pixels.append(crop)
    return np.stack(pixels)


def decode_freely(data: bytes) -> np.ndarray:
    """Return what ``decode_pixels`` does, without Python's lock: Pillow holds it while it decodes WebP.

    For workers that have torch anyway.
    """
    if data[8:12] != b"WEBP":
        return decode_pixels(data)
    import torch
    from torchvision.io import ImageReadMode, decode_webp

    pixels = decode_webp(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return pixels.permute(1, 2, 0).numpy()


def encode_beside(
    batches: Iterable[Batch],
    encode: Callable[[np.ndarray], Iterable[Sample]],
    pool: ThreadPoolExecutor,
    ahead: int,
    watch: Callable[[list[str]], None],
) -> Iterator[tuple[list[str], np.ndarray, Sequence[Sample]]]:
    """Decode and encode ``batches`` in threads, ``ahead`` at a time; yields keys, pixels and samples in their order.

    The processor's part of some batches runs beside the device's part of another, which the encoder's ``Halving``
    takes one at a time. ``watch`` is told all keys that are at work: each of them may be the one that ends the process.
    """
    at_work: deque[tuple[list[str], Future]] = deque()

    def compute(batch: Batch) -> tuple[np.ndarray, list[Sample]]:
        images = decode_batch(batch, decode_freely)
        return images, list(encode(images))

    def oldest() -> tuple[list[str], np.ndarray, Sequence[Sample]]:
        keys, future = at_work[0]
        images, samples = future.result()
        at_work.popleft()
        watch(list(chain.from_iterable(keys for keys, _ in at_work)))
        return keys, images, samples

    try:
        for batch in batches:
            keys = [key for key, _ in batch]
            watch([*chain.from_iterable(keys for keys, _ in at_work), *keys])
            at_work.append((keys, pool.submit(compute, batch)))
            if len(at_work) >= ahead:
                yield oldest()
        while at_work:
            yield oldest()
    finally:  # nothing may be at work when samples are tried one by one
        for _, future in at_work:
            future.cancel()
        wait([future for _, future in at_work])
