"""Which images are another one altered: mirrored, brighter or darker, of other contrast, or slightly cropped.

A training image of that kind gives a holdout image away, and neither the hash nor the difference of thumbnails sees it
(``duplicates.py``). So holdout images are compared with all others by the thumbnails that are stored for those, each
described by two vectors of length 1: itself about the mean of each channel, which no brightness or contrast changes,
and what a 3x3 mean leaves of it, the details, in which two skies or two figures differ. An image is another one altered
if the mean of both cosines is above ``ALTERED``, as it is, mirrored, or as a window of the other. What was found and
what was not is tabled in ``docs/measurements.md``, "Holdout gate".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from prep.images.duplicates import THUMBNAIL_SIDE

CODE_VERSION = 1
# 2,500 figures stay below .81, photographs of different things below .66; mirrored and brighter ones are above .97
ALTERED = 0.84
CANDIDATE = 0.5  # as it is; crops of 95 % are above .57, and about one pair of figures in a thousand is
FLAT = 2.0  # grey levels of standard deviation, below which a thumbnail says nothing but noise
SCALES = (1.0, 0.975, 0.95, 0.925, 0.9)  # of the sides of a window; in nine places each
UNSURE = 1e-4  # of a cosine in float32, whose error is below 1e-6: nearer to the threshold than that, float64 decides
DENSE = 40  # a pair picked out of two arrays costs as much as this many of a product of matrices
QUERIES, TILE, PAIRS = 1024, 2048, 4096  # rows compared at once, and pairs that are picked out at once


def altered_pairs(
    thumbnails: np.ndarray,
    rows: np.ndarray,
    done: Callable[[int], None] = lambda pairs: None,
    threshold: float = ALTERED,
) -> np.ndarray:
    """Return the pairs of an image of ``rows`` and any other that are altered forms of each other, int64 (M, 2).

    ``thumbnails`` are uint8 (N, 768), ``rows`` int64 (Q,). A pair of two of ``rows`` comes once or twice. ``done`` is
    told how many pairs were compared. ``threshold`` is above CANDIDATE.
    """
    pairs = altered_between(thumbnails[rows], thumbnails, done, threshold)
    pairs[:, 0] = rows[pairs[:, 0]]
    return pairs[pairs[:, 0] != pairs[:, 1]]


def altered_between(
    queries: np.ndarray,
    others: np.ndarray,
    done: Callable[[int], None] = lambda pairs: None,
    threshold: float = ALTERED,
) -> np.ndarray:
    """Return which of ``queries`` (Q, 768) and ``others`` (N, 768), in 0..255, are altered forms: int64 (M, 2)."""
    found = [np.empty((0, 2), np.int64)]
    for start in range(0, len(queries), QUERIES):
        left = _even_and_odd(_described(_pictures(queries[start : start + QUERIES])))
        for top in range(0, len(others), TILE):
            right = _even_and_odd(_described(_pictures(others[top : top + TILE])))
            cosines = left[0] @ right[0].T + np.abs(left[1] @ right[1].T)
            pairs = np.column_stack(np.nonzero(cosines > CANDIDATE)) + np.array([start, top])
            if len(pairs):
                found.append(_aligned(queries, others, pairs, threshold))
            done(cosines.size)
    return np.concatenate(found)


def _aligned(queries: np.ndarray, others: np.ndarray, pairs: np.ndarray, threshold: float) -> np.ndarray:
    """Return the pairs (M, 2) that are altered forms at the best window of either, mirrored or not.

    Every image is described once, not once a pair: where all images are built alike most pairs come this far.
    """
    (left, first), (right, second) = (np.unique(column, return_inverse=True) for column in pairs.T)
    pictures = [_pictures(side[rows]).astype(np.float32) for side, rows in ((queries, left), (others, right))]
    best = np.full(len(pairs), -1, np.float32)
    dense = len(pairs) * DENSE > len(left) * len(right)
    for whole, cropped, at, of in ((*pictures, first, second), (*pictures[::-1], second, first)):
        target = _even_and_odd(_described(whole))
        for window in _windows(cropped):
            seen = _even_and_odd(_described(window))
            if dense:
                np.maximum(best, (seen[0] @ target[0].T + np.abs(seen[1] @ target[1].T))[of, at], out=best)
                continue
            for start in range(0, len(pairs), PAIRS):
                some = slice(start, start + PAIRS)
                even, odd = (np.einsum("ij,ij->i", ours[of[some]], its[at[some]]) for ours, its in zip(seen, target))
                np.maximum(best[some], even + np.abs(odd), out=best[some])
    counts, unsure = best > threshold, np.flatnonzero(np.abs(best - threshold) < UNSURE)
    for start in range(0, len(unsure), PAIRS):
        some = unsure[start : start + PAIRS]
        counts[some] = aligned_cosines(queries[pairs[some, 0]], others[pairs[some, 1]]) > threshold
    return pairs[counts]


def aligned_cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return how like the thumbnails (N, 768) of pairs are, at the best window of either, mirrored or not: (N,).

    In float64, and for each pair by itself, so that a pair counts everywhere or nowhere.
    """
    left, right = _pictures(left).astype(np.float64), _pictures(right).astype(np.float64)
    best = np.full(len(left), -1.0)
    for whole, cropped in ((left, right), (right, left)):
        targets = [_described(whole), _described(whole[:, :, ::-1])]
        for window in _windows(cropped):
            described = _described(window)
            for target in targets:
                np.maximum(best, (described * target).sum(axis=1), out=best)
    return best


def _pictures(thumbnails: np.ndarray) -> np.ndarray:
    return thumbnails.reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)


def _described(pictures: np.ndarray) -> np.ndarray:
    """Describe (N, 16, 16, 3) by (N, 1536), whose products are the mean of both cosines; 0 where nothing is to see."""
    exact = pictures.astype(np.promote_types(pictures.dtype, np.float32))
    about = exact - exact.mean(axis=(1, 2), keepdims=True)
    padded = np.pad(exact, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    details = exact - (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9
    parts = [part.reshape(len(part), -1) for part in (about, details)]
    seen = parts[0].std(axis=1, keepdims=True) > FLAT
    lengths = [np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    scaled = [np.where(seen, part, 0) / np.maximum(length, 1e-9) for part, length in zip(parts, lengths)]
    return np.hstack(scaled) * exact.dtype.type(np.sqrt(0.5))


def _even_and_odd(described: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split descriptions into what mirroring keeps and what it turns round, (N, 768) each.

    The cosine is the sum of the products of both, and that with the mirrored image their difference.
    """
    planes = described.reshape(len(described), -1, THUMBNAIL_SIDE, 3)
    half = THUMBNAIL_SIDE // 2
    first, second = planes[:, :, :half], planes[:, :, : half - 1 : -1]
    scale = described.dtype.type(np.sqrt(0.5))
    return tuple((part * scale).reshape(len(described), -1) for part in (first + second, first - second))


def _windows(pictures: np.ndarray) -> Iterator[np.ndarray]:
    """Yield (N, 16, 16, 3) as seen through each window, by areas."""
    planes = pictures.reshape(len(pictures), THUMBNAIL_SIDE, -1)
    for scale in SCALES:
        ways = [_interval(start, scale).astype(pictures.dtype) for start in sorted({0.0, (1 - scale) / 2, 1 - scale})]
        channels = [np.kron(way.T, np.eye(3, dtype=way.dtype)) for way in ways]
        for down in ways:
            rows = np.matmul(down, planes).reshape(-1, planes.shape[2])
            for across in channels:
                yield (rows @ across).reshape(pictures.shape)


def _interval(start: float, length: float) -> np.ndarray:
    """Return (16, 16): which share of each of 16 cells an interval of [0, 1], cut into 16, averages."""
    edges = np.linspace(start, start + length, THUMBNAIL_SIDE + 1) * THUMBNAIL_SIDE
    cells = np.arange(THUMBNAIL_SIDE)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    shares = np.clip(overlap, 0, None)
    return shares / shares.sum(axis=1, keepdims=True)
