"""Distances between two sets of pictures, on features: Fréchet distance, KID, CMMD, spread and nearest neighbours.

Every distance between sets carries a jackknife interval over images: bootstrap resamples hold duplicates, which pull
these distances up. The Fréchet distance is taken at one n, equal on both sides, as it is biased by an amount that
depends on n. KID and CMMD are unbiased estimates of a squared distance, may be negative, and take all of a larger
second set, which makes them more exact. Values at different n are not comparable, so that comparing them is an error.
Where both sets come from one distribution, the jackknife overestimates the variance of all three (Efron & Stein 1981):
intervals are then too long, never too short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from evaluate.statistics.intervals import LEVEL, MIN_CLUSTERS, Interval

FRECHET_WIDTHS = 2  # the Fréchet distance needs this many images for each dimension of the features
FRECHET_GROUPS = 20  # left out one after the other: one image at a time would cost n eigendecompositions
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # of the paper
SPACES = ("feature", "feature_pixels")  # the judge encoder's CLS, and 16 x 16 pixels
SPACE_NAMES = {"feature": "DINO", "feature_pixels": "mean colours"}  # as people say them
_CHUNK = 2**22  # numbers held at once


@dataclass(frozen=True)
class Distance:
    """A distance between ``n`` pictures and a second set, and its values with some of the pictures left out.

    ``without`` holds for each of the two sets the values (g,) without its first, second, ... group of pictures.
    ``measure`` names the estimator and the width of the features.
    """

    value: float
    n: int
    without: tuple[np.ndarray, np.ndarray]
    measure: str

    def interval(self) -> Interval:
        """Return the 95 % interval by the jackknife over the pictures of both sets.

        It has no bounds below MIN_CLUSTERS pictures.
        """
        return jackknife(self.value, self.without, self.n)

    def above(self, floor: Distance) -> Interval:
        """Return how far this is above ``floor``, a distance to the same second set, with its interval.

        The first sets are paired: their pictures of the same position (a drawn one and the real one of the same sample)
        are left out together. Raises ``ValueError`` where the two are not comparable: another n or another measure.
        """
        _check_comparable(self, floor)
        without = tuple(own - other for own, other in zip(self.without, floor.without))
        return jackknife(self.value - floor.value, without, self.n)

    @classmethod
    def mean(cls, distances: Sequence[Distance]) -> Distance:
        """Return the mean over several noises of the distances to one second set, at the n of each of them."""
        for other in distances:
            _check_comparable(distances[0], other)
        without = tuple(np.mean(groups, axis=0) for groups in zip(*(one.without for one in distances)))
        return cls(float(np.mean([one.value for one in distances])), distances[0].n, without, distances[0].measure)


def jackknife(value: float, without: Sequence[np.ndarray], n: int) -> Interval:
    """Return the interval of a statistic from its values with one group left out, of each of several independent sets.

    ``without`` holds for each set the values (g,); Student's t with the degrees of freedom of the smallest g. Variance
    of each set: ``(g - 1) / g sum (without - mean)^2`` (Efron & Stein 1981, eq. 1.4; for groups Shao & Tu 1995, 2.3).
    """
    if n < MIN_CLUSTERS:
        return Interval(value, None, None, n)
    variance = sum((len(values) - 1) * values.var() for values in without)
    half = special.stdtrit(min(map(len, without)) - 1, (1 + LEVEL) / 2) * math.sqrt(variance)
    return Interval(float(value), float(value - half), float(value + half), n)


def kid(first: np.ndarray, second: np.ndarray) -> Distance:
    """Return the kernel distance: unbiased MMD^2 with the kernel ``(x y / width + 1)^3``; may be negative.

    ``first``, ``second``: float (n, width) and (m, width), n and m >= 3. Binkowski et al. 2018, section 4, on all
    images at once instead of a mean over subsets.
    """
    first, second = _pair(first, second, equal=False)
    width = first.shape[1]
    return _mmd(first, second, lambda x, y: (x @ y.T / width + 1) ** 3, f"KID, width {width}")


def cmmd(first: np.ndarray, second: np.ndarray) -> Distance:
    """Return the unbiased MMD^2 x 1000 with a Gaussian kernel of sigma 10 on unit features; may be negative.

    ``first``, ``second``: float (n, width) and (m, width), n and m >= 3, of any length but zero. Jayasumana et al.
    2024, eq. 4; the published code computes the biased estimate, whose terms x = x are left out here.

    What it cannot see: unit features are at most 2 apart, where the kernel at sigma 10 is 1 - |x - y|^2 / 200 to within
    .0002, so that this is 10 |difference of the mean unit features|^2 and hardly anything else. Two sets with one mean
    are at about zero, in whatever directions they spread and around however many modes; less variety shows only by the
    little that it lengthens the mean.
    """
    first, second = (unit(features) for features in _pair(first, second, equal=False))

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        # |x - y|^2 = 2 - 2 x y for unit vectors; MMD^2 does not see the constant that expm1 takes off, and the kernel's
        # values, all within 2 % of 1, keep their digits
        return CMMD_SCALE * np.expm1((x @ y.T - 1) / CMMD_SIGMA**2)

    return _mmd(first, second, kernel, f"CMMD, width {first.shape[1]}")


def frechet(first: np.ndarray, second: np.ndarray) -> Distance:
    """Return the Fréchet distance of fitted Gaussians: ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``.

    ``first``, ``second``: float (n, width) with the same n >= :func:`frechet_needs`. Heusel et al. 2017, eq. 6. Biased
    upwards by an amount that depends on n: the interval is about the mean of this estimate at this n, and there is
    nothing to hold it against but a floor of the same n. Raises ``ValueError`` for fewer pictures.
    """
    first, second = _pair(first, second)
    n, width = first.shape
    if n < frechet_needs(width):
        raise ValueError(f"{n} pictures for {width} features: the Fréchet distance needs {frechet_needs(width)}")
    whole = _Gaussian.fit(first), _Gaussian.fit(second)
    groups = np.arange(n) % FRECHET_GROUPS
    parts = [
        [_Gaussian.fit(features[groups != group]) for group in range(FRECHET_GROUPS)] for features in (first, second)
    ]
    without = (
        np.array([_frechet(part, whole[1]) for part in parts[0]]),
        np.array([_frechet(whole[0], part) for part in parts[1]]),
    )
    return Distance(_frechet(*whole), n, without, f"FD, width {width}")


def frechet_needs(width: int) -> int:
    """Return how many pictures the Fréchet distance needs: with fewer, the covariance is mostly noise."""
    return FRECHET_WIDTHS * width


def spread(points: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean Euclidean distance over all pairs of ``points``, and without each of them (n,).

    ``points`` are float (n, width), n >= 3.
    """
    n = len(points)
    sums = np.concatenate([row.sum(1) for row in _rows(points, points, _euclidean)])
    total = sums.sum()
    return float(total / (n * (n - 1))), (total - 2 * sums) / ((n - 1) * (n - 2))


def nearest(queries: np.ndarray, points: np.ndarray, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Find the ``count`` nearest of ``points`` (m, width) to each of ``queries`` (n, width).

    Returns Euclidean distances and indices, both (n, count), nearest first. Exact for duplicates to about 1e-8.
    """
    distances, indices = [], []
    for rows in _rows(queries, points, _euclidean):
        chosen = np.sort(np.argpartition(rows, count - 1, axis=1)[:, :count], axis=1)
        order = np.argsort(np.take_along_axis(rows, chosen, axis=1), axis=1, kind="stable")
        indices.append(np.take_along_axis(chosen, order, axis=1))
        distances.append(np.take_along_axis(rows, indices[-1], axis=1))
    return np.concatenate(distances), np.concatenate(indices)


def as_points(features: Sequence[Sequence[float]] | np.ndarray, space: str) -> np.ndarray:
    """Return features as float64 (n, width) whose Euclidean distances mean something.

    In ``feature`` they have unit length: distances in [0, 2]. In ``feature_pixels`` the distance is the root mean
    square difference of pixels: in [0, 1].
    """
    points = np.asarray(features, np.float64)
    return unit(points) if space == "feature" else points / math.sqrt(points.shape[1])


def unit(features: np.ndarray) -> np.ndarray:
    """Scale rows to length 1."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _mmd(first: np.ndarray, second: np.ndarray, kernel: Callable[..., np.ndarray], measure: str) -> Distance:
    """Return unbiased MMD^2 (Gretton et al. 2012, eq. 3), and without each picture, from the kernel's row sums."""
    n, m = len(first), len(second)
    if min(n, m) < 3:
        raise ValueError(f"{min(n, m)} pictures: a kernel distance needs 3")
    within = []
    for features in (first, second):
        sums = np.concatenate([rows.sum(1) for rows in _rows(features, features, kernel)])
        diagonal = np.array([kernel(row[None], row[None])[0, 0] for row in features])
        within.append(sums - diagonal)
    across = [np.zeros(n), np.zeros(m)]
    start = 0
    for rows in _rows(first, second, kernel):
        across[0][start : start + len(rows)] = rows.sum(1)
        across[1] += rows.sum(0)
        start += len(rows)
    both = across[0].sum()

    def mmd(own: np.ndarray, size: int, other: np.ndarray, others: int, crossing: np.ndarray) -> np.ndarray:
        return own / (size * (size - 1)) + other.sum() / (others * (others - 1)) - 2 * crossing / (size * others)

    value = mmd(within[0].sum(), n, within[1], m, both)
    without = tuple(
        mmd(own.sum() - 2 * own, size - 1, other, others, both - crossing)
        for own, size, other, others, crossing in (
            (within[0], n, within[1], m, across[0]),
            (within[1], m, within[0], n, across[1]),
        )
    )
    return Distance(float(value), n, without, measure if n == m else f"{measure}, reference of {m}")


@dataclass(frozen=True)
class _Gaussian:
    mean: np.ndarray  # (width,)
    trace: float  # of the covariance
    root: np.ndarray  # symmetric square root of the covariance (width, width)

    @classmethod
    def fit(cls, features: np.ndarray) -> _Gaussian:
        covariance = np.cov(features, rowvar=False).reshape(features.shape[1], -1)
        values, vectors = np.linalg.eigh(covariance)
        root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
        return cls(features.mean(0), float(np.trace(covariance)), root)


def _frechet(first: _Gaussian, second: _Gaussian) -> float:
    # tr (S1 S2)^(1/2) is the sum of singular values of S1^(1/2) S2^(1/2): real, never negative, and exact for singular
    # covariances too, for which the root of the product is not
    overlap = np.linalg.svd(first.root @ second.root, compute_uv=False).sum()
    return float(np.sum((first.mean - second.mean) ** 2) + first.trace + second.trace - 2 * overlap)


def _rows(first: np.ndarray, second: np.ndarray, function: Callable[..., np.ndarray]):
    """Yield ``function(some rows of first, second)``, as many rows at a time as memory allows."""
    size = max(1, _CHUNK // len(second))
    for start in range(0, len(first), size):
        yield function(first[start : start + size], second)


def _euclidean(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.sqrt(squares.clip(0))


def _pair(first: np.ndarray, second: np.ndarray, equal: bool = True) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if not first.ndim == second.ndim == 2 or first.shape[equal ^ 1 :] != second.shape[equal ^ 1 :]:
        wanted = "one n and one width" if equal else "one width"
        raise ValueError(f"features {first.shape} against {second.shape}: distances are taken between sets of {wanted}")
    return first, second


def _check_comparable(one: Distance, other: Distance) -> None:
    if (one.n, one.measure) != (other.n, other.measure):
        raise ValueError(
            f"{one.measure} of {one.n} pictures and {other.measure} of {other.n} pictures are not comparable: "
            "take both at the same n"
        )
