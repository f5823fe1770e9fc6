"""The training images in the two feature spaces: the judge's class token, and mean colours on a grid.

The judge's features of a training set are kept in the cache folder, by dataset, judge and images: every run on the
same data shares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluate.metrics.likeness import Judge, pixel_features
from evaluate.subject import Row
from nanodit.console import Progress
from nanodit.files import sha256_bytes, write_atomic
from prep.dataset.codecs import load_npy, npy_bytes
from prep.dataset.reader import Dataset

BATCH = 32  # images encoded at once: fixed, since the last bits depend on it


@dataclass(frozen=True)
class TrainFeatures:
    """Training images by key (n,) and bucket (n,): ``feature`` float32 (n, width) or None, ``feature_pixels`` (n, 768).

    In key order; keys are content hashes, so this is a random sample of the training set.
    """

    keys: tuple[str, ...]
    buckets: tuple[str, ...]
    feature: np.ndarray | None
    feature_pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


def load_train_features(dataset: Dataset, judge: Judge | None, count: int) -> TrainFeatures:
    """Return features of the first ``count`` training images in key order, from the cache where it has them."""
    rows = dataset.rows("train")[:count]  # which are in key order
    path = _cache(dataset, judge, rows)
    table = _read(path, len(rows), judge)
    if table is None:
        table = _compute(dataset, judge, rows)
        write_atomic(path, npy_bytes(table))
    pixels, feature = np.split(table, [table.shape[1] - (judge.width if judge else 0)], axis=1)
    return TrainFeatures(
        tuple(row["key"] for row in rows), tuple(row["bucket"] for row in rows), feature if judge else None, pixels
    )


def _cache(dataset: Dataset, judge: Judge | None, rows: Sequence[Row]) -> Path:
    from prep.encoders.demo import demo_folder  # imports transformers, which no config and no report needs

    keys = sha256_bytes("".join(row["key"] for row in rows).encode())[:16]
    name = f"{dataset.fingerprint[:16]}-{judge.fingerprint if judge else 'pixels'}-{keys}.npy"
    return demo_folder().parent / "features" / name


def _read(path: Path, count: int, judge: Judge | None) -> np.ndarray | None:
    """Read the cache; None where there is nothing, or nothing usable."""
    try:
        table = load_npy(path.read_bytes())
    except (OSError, ValueError, EOFError):
        return None
    return table if table.ndim == 2 and len(table) == count and np.isfinite(table).all() else None


def _compute(dataset: Dataset, judge: Judge | None, rows: Sequence[Row]) -> np.ndarray:
    """Compute both features of each image side by side, float32 (n, 768 + width)."""
    places: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(row["bucket"], []).append(index)
    table: np.ndarray | None = None
    with Progress("features of training images", len(rows), "images") as progress:
        for bucket in sorted(places):
            for start in range(0, len(places[bucket]), BATCH):
                chunk = places[bucket][start : start + BATCH]
                pixels = np.stack([dataset.pixels(rows[index]) for index in chunk])
                parts = [pixel_features(pixels)] + ([judge.features(pixels)] if judge else [])
                features = np.concatenate(parts, axis=1)
                table = np.zeros((len(rows), features.shape[1]), np.float32) if table is None else table
                table[chunk] = features
                progress.advance(len(chunk))
    return table
