"""Precision, recall, density and coverage of pictures: two sets of features as balls around each of their images.

The ball of an image reaches to its k-th nearest neighbour within its own set; together a set's balls estimate its
manifold. Precision is the share of pictures that lie in a ball of a reference image, recall the share of reference
images that lie in a ball of a picture (Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing
generative models", eqs. 1 and 2, k = 3). Density counts for each picture the reference balls that it lies in, over k;
coverage is the share of reference images whose ball holds a picture (Naeem et al. 2020, "Reliable fidelity and
diversity metrics for generative models", eqs. 3 and 4, k = 5). Balls are closed, as in the former.

All four depend on the size of the reference, recall and coverage on the number of pictures too: they are held against
real images of the same n alone.

No bootstrap: a resample has images twice, and the balls around these shrink to nothing. To resample only what is
counted and hold the balls still leaves out how the balls vary: such intervals are too short. The intervals here are by
the jackknife over GROUPS of clusters left out of either set, each with the balls that the others then have. Its
variance is too large on average, never too small (Efron & Stein 1981). Of shares the interval is never shorter than the
exact one for the clusters counted, as nothing varies where all or none are inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evaluate.metrics.distances import jackknife
from evaluate.statistics import intervals
from evaluate.statistics.intervals import MIN_CLUSTERS, Interval

SHARE_K, COUNT_K = 3, 5  # neighbours: of precision and recall, and of density and coverage, as published
NEEDED = COUNT_K + 1  # images that a set must have
GROUPS = 20  # of clusters, left out one after the other
LISTED = 32  # neighbours remembered beyond the k-th: without a group, the k-th is nearly always among them
_CHUNK = 2**21  # distances held at once


@dataclass(frozen=True)
class Balls:
    """A set of images in a space of features, each the centre of a ball.

    ``features`` float32 (n, width); ``clusters`` names for each image what it is left out with; ``groups`` (n,) counts
    from 1. ``radii`` maps SHARE_K and COUNT_K to squared radii, float32 (1 + groups, n): first of the whole set, then
    without each group, whose own images have -inf: nothing lies in their balls.
    """

    features: np.ndarray
    clusters: tuple[str, ...]
    groups: np.ndarray
    radii: dict[int, np.ndarray]

    @classmethod
    def of(cls, features: np.ndarray, clusters: Sequence[str]) -> Balls:
        """Measure the radii; (n, width) finite features with n >= NEEDED, otherwise ``ValueError``."""
        features = np.ascontiguousarray(features, np.float32)
        if features.ndim != 2 or len(features) < NEEDED or len(features) != len(clusters):
            raise ValueError(
                f"features {features.shape} of {len(clusters)} images: balls that reach to neighbour {COUNT_K} need "
                f"features (n, width) of {NEEDED} images and more"
            )
        names, members = np.unique(np.asarray(clusters), return_inverse=True)
        count = min(GROUPS, len(names)) if len(names) >= MIN_CLUSTERS else 0  # fewer have no interval
        groups = 1 + members % count if count else np.zeros(len(features), int)
        return cls(features, tuple(clusters), groups, _radii(features, groups, count))

    def __len__(self) -> int:
        return len(self.features)

    @property
    def count(self) -> int:
        """The number of groups."""
        return len(self.radii[SHARE_K]) - 1


def fidelity(pictures: Balls, reference: Balls) -> dict[str, Interval]:
    """Return ``precision``, ``recall``, ``density`` and ``coverage`` of pictures; ``n`` is the smaller set's clusters.

    Time grows with the product of the sizes, memory with the sizes. Below MIN_CLUSTERS clusters on either side there
    are no bounds. Raises ``ValueError`` for features of two widths.
    """
    if pictures.features.shape[1] != reference.features.shape[1]:
        raise ValueError(f"features {pictures.features.shape} against {reference.features.shape}: of two widths")
    inside = np.zeros((1 + reference.count, len(pictures)), bool)  # in a ball of the reference
    counts = np.zeros((1 + reference.count, len(pictures)), np.float32)  # in how many
    reached = np.zeros((1 + pictures.count, len(reference)), bool)  # in a ball of a picture
    holders = np.zeros((1 + pictures.count, len(reference)), bool)  # whose ball holds a picture of that group
    nearest = np.full(len(reference), np.inf, np.float32)
    ones = np.ones(len(reference), np.float32)
    for rows, squares in _blocks(pictures.features, reference.features):
        for group in range(1 + reference.count):
            inside[group, rows] = (squares <= reference.radii[SHARE_K][group]).any(1)
            counts[group, rows] = (squares <= reference.radii[COUNT_K][group]).astype(np.float32) @ ones
        for group in range(1 + pictures.count):
            reached[group] |= (squares <= pictures.radii[SHARE_K][group, rows, None]).any(0)
        held = squares <= reference.radii[COUNT_K][0]
        for group in np.unique(pictures.groups[rows]):
            holders[group] |= held[pictures.groups[rows] == group].any(0)
        np.minimum(nearest, squares.min(0), out=nearest)
    covered = nearest <= reference.radii[COUNT_K]  # (1 + groups, n)
    holding = holders.sum(0)
    by_picture, by_image = _leave_out(pictures), _leave_out(reference)
    found = {
        "precision": (by_picture(inside[0]), inside[1:].mean(1)),
        "density": (by_picture(counts[0] / COUNT_K), counts[1:].mean(1) / COUNT_K),
        "recall": (reached[1:].mean(1), by_image(reached[0])),
        "coverage": (
            np.array([np.mean(holding > one) for one in holders[1:]]),
            np.array([np.mean(one[reference.groups != group]) for group, one in enumerate(covered[1:], 1)]),
        ),
    }
    values = {"precision": inside[0], "density": counts[0] / COUNT_K, "recall": reached[0], "coverage": covered[0]}
    owners = {name: pictures if name in ("precision", "density") else reference for name in values}
    clusters = min(len(set(one.clusters)) for one in (pictures, reference))
    return {
        name: _interval(values[name], owners[name].clusters, without, clusters, exact=name != "density")
        for name, without in found.items()
    }


def _interval(
    values: np.ndarray, clusters: Sequence[str], without: tuple[np.ndarray, np.ndarray], n: int, exact: bool
) -> Interval:
    """Return the mean of the values; ``exact``: of a share, whose bounds lie in [0, 1]."""
    interval = jackknife(float(values.mean(dtype=np.float64)), without, n)
    if interval.low is None:
        return interval
    if not exact:
        return Interval(interval.value, max(interval.low, 0.0), interval.high, n)
    share = intervals.proportion(values.astype(float), np.ones(len(values)), clusters)
    return Interval(interval.value, max(min(interval.low, share.low), 0), min(max(interval.high, share.high), 1), n)


def _leave_out(balls: Balls):
    """Return what takes a value of each image (n,) to their means without each group (groups,)."""
    return lambda values: np.array(
        [values[balls.groups != group].mean(dtype=np.float64) for group in range(1, 1 + balls.count)]
    )


def _radii(features: np.ndarray, groups: np.ndarray, count: int) -> dict[int, np.ndarray]:
    """Return :attr:`Balls.radii`."""
    n = len(features)
    radii = {k: np.full((1 + count, n), -np.inf, np.float32) for k in (SHARE_K, COUNT_K)}
    listed = min(n - 1, COUNT_K + LISTED)
    for rows, squares in _blocks(features, features):
        squares[np.arange(len(squares)), np.arange(n)[rows]] = np.inf  # of all neighbours an image is no one of its own
        near = np.argpartition(squares, listed - 1, axis=1)[:, :listed]
        distances = np.take_along_axis(squares, near, axis=1)
        order = np.argsort(distances, axis=1)
        distances, owners = np.take_along_axis(distances, order, axis=1), groups[np.take_along_axis(near, order, 1)]
        for k, found in radii.items():
            found[0, rows] = distances[:, k - 1]
            for group in range(1, 1 + count):
                ranks = np.cumsum(owners != group, axis=1)
                chosen = distances[np.arange(len(ranks)), (ranks >= k).argmax(1)]
                for place in np.flatnonzero(ranks[:, -1] < k):  # a group of many near ones
                    others = np.where(groups == group, np.inf, squares[place])
                    chosen[place] = np.partition(others, k - 1)[
                        k - 1
                    ]  # inf, a ball of everything, where too few are left
                found[group, rows] = np.where(groups[rows] == group, -np.inf, chosen)
    return radii


def _blocks(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield places of some rows of ``first`` and their squared distances to all of ``second``, float32 (rows, m).

    Counted from the mean of the second set, or what all features share would take their last digits.
    """
    origin = second.mean(0, dtype=np.float64).astype(np.float32)
    second = second - origin
    lengths = np.einsum("md,md->m", second, second)
    size = max(1, _CHUNK // len(second))
    for start in range(0, len(first), size):
        own = first[start : start + size] - origin
        squares = own @ second.T
        squares *= -2
        squares += np.einsum("nd,nd->n", own, own)[:, None]
        squares += lengths
        yield slice(start, start + len(own)), squares.clip(0, out=squares)
