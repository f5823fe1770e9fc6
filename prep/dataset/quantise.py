"""Patch features in int8: the stored form that ``prep`` writes and ``train`` reads, without any encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROUP = 64  # channels that share one scale


@dataclass(frozen=True)
class Quantised:
    """Features as they are stored: int8 ``values`` (..., W) and float16 ``scale`` (..., ceil(W / 64))."""

    values: np.ndarray
    scale: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the features."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """What they take in memory."""
        return self.values.nbytes + self.scale.nbytes


def quantise(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Store features (N, W) as int8 (N, W) and float16 scales (N, ceil(W / 64)), one per token and 64 channels.

    ``q = clip(round(x / s), -127, 127)`` with the scale as rounded to float16, so that ``q * s`` is the best that
    can be read back. A group without signal has scale 0 and reads back as zeros. A scale per group, not per token,
    keeps the cosine above .9999 where a few channels are far larger than the rest.
    """
    count, width = patches.shape
    groups = -(-width // GROUP)
    grouped = np.zeros((count, groups * GROUP), np.float32)
    grouped[:, :width] = patches
    grouped = grouped.reshape(count, groups, GROUP)
    scale = (np.abs(grouped).max(axis=-1) / 127).astype(np.float16)
    divisor = np.where(scale > 0, scale, 1).astype(np.float32)[..., None]
    q = np.where(scale[..., None] > 0, np.clip(np.rint(grouped / divisor), -127, 127), 0)
    return q.astype(np.int8).reshape(count, -1)[:, :width].copy(), scale


def dequantise(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Read back what :func:`quantise` stored: float32 (..., W)."""
    return q.astype(np.float32) * np.repeat(scale.astype(np.float32), GROUP, axis=-1)[..., : q.shape[-1]]


def worst_cosine(patches: np.ndarray, q: np.ndarray, scale: np.ndarray) -> float:
    """Return the smallest cosine between features (N, W) and what int8 leaves of them: the cost of storing them so.

    A token without any signal is not counted; 1.0 where all are.
    """
    back = dequantise(q, scale)
    lengths = np.linalg.norm(patches, axis=-1) * np.linalg.norm(back, axis=-1)
    products = np.einsum("nw,nw->n", patches, back)
    return float(np.min(products[lengths > 0] / lengths[lengths > 0], initial=1.0))
