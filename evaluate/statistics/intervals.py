"""Intervals that respect how the numbers were made: images are resampled, never single judgements.

All seeds, attributes and joints of one image rise and fall together, so one image is one cluster. Pure functions of
their inputs and a fixed seed: the same numbers give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy import special

LEVEL = 0.95
RESAMPLES = 4000
MIN_CLUSTERS = 10  # fewer images than this carry no interval worth printing
_CHUNK = 2**22  # numbers held at once while resampling


@dataclass(frozen=True)
class Interval:
    """A value, its 95 % interval and the number of images behind it; bounds of None mean "inconclusive"."""

    value: float
    low: float | None
    high: float | None
    n: int

    def verdict(self, needed: float, better: str = "higher") -> str:
        """Return ``met`` or ``missed`` where the whole interval agrees, otherwise ``inconclusive``."""
        if self.low is None or self.high is None:
            return "inconclusive"
        low, high = (self.low, self.high) if better == "higher" else (-self.high, -self.low)
        bar = needed if better == "higher" else -needed
        return "met" if low >= bar else "missed" if high < bar else "inconclusive"


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], clusters: int, *, seed: int = 0) -> Interval:
    """Return the interval of any statistic that can be computed from how often each image was drawn.

    ``statistic`` maps weights float64 (R, C), the number of times each of ``clusters`` images was drawn in each of R
    resamples, to values (R,). Percentile bootstrap with the small-sample correction of Hesterberg (2015, "What
    teachers should know about the bootstrap", section 3.2): the tail is Phi(t * sqrt(n / (n - 1))) of Student's t,
    which widens the plain percentile interval where it is known to be too short.
    """
    if clusters < 1:
        raise ValueError("an interval needs at least one image")
    value = float(statistic(np.ones((1, clusters)))[0])
    if clusters < MIN_CLUSTERS:
        return Interval(value, None, None, clusters)
    random = np.random.Generator(np.random.Philox(seed))
    values = []
    remaining = RESAMPLES
    while remaining:
        rows = min(remaining, max(1, _CHUNK // clusters))
        drawn = random.integers(0, clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters)
        values.append(statistic(weights.astype(np.float64)))
        remaining -= rows
    tail = _tail(clusters)
    low, high = np.quantile(np.concatenate(values), [tail, 1 - tail])
    return Interval(value, float(low), float(high), clusters)


def mean(values: Sequence[float], clusters: Sequence[str]) -> Interval:
    """Return the mean of ``values`` with an interval over ``clusters`` (the image key of every value).

    Images with more values weigh more, as in the plain mean. ``n`` is the number of images.
    """
    return ratio(values, np.ones(len(values)), clusters)


def ratio(numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[str]) -> Interval:
    """Return the pooled ``sum(numerators) / sum(denominators)`` with an interval over images.

    Raises ``ValueError`` when the denominators sum to zero. Images whose denominators are all zero carry nothing and
    are not counted in ``n``.
    """
    top, bottom = _per_cluster(numerators, clusters), _per_cluster(denominators, clusters)
    counted = bottom > 0
    top, bottom = top[counted], bottom[counted]
    if not bottom.size:
        raise ValueError("nothing to average")
    return bootstrap(lambda weights: (weights @ top) / (weights @ bottom), len(top))


def quotient(numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[str]) -> Interval:
    """Return a pooled quotient as :func:`ratio` does, for denominators of either sign.

    Every image counts, and the denominators' sum must not be near zero.
    """
    top, bottom = _per_cluster(numerators, clusters), _per_cluster(denominators, clusters)
    with np.errstate(divide="ignore", invalid="ignore"):
        return bootstrap(lambda weights: (weights @ top) / (weights @ bottom), len(top))


def quantile(values: Sequence[float], share: float) -> Interval:
    """Return a quantile of one value for each image, with an interval over images."""
    values = np.sort(np.asarray(values, np.float64))
    return bootstrap(lambda weights: weighted_quantile(values, weights, share), len(values))


def weighted_quantile(values: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    """Return the smallest of ``values`` (n,) at which ``weights`` (R, n), cumulated, reach ``share`` of their sum."""
    order = np.argsort(values, kind="stable")
    cumulated = weights[:, order].cumsum(1)
    return values[order][(cumulated < share * cumulated[:, -1:]).sum(1)]


def difference(
    values: Sequence[float], clusters: Sequence[str], others: Sequence[float], other_clusters: Sequence[str]
) -> Interval:
    """Return the mean of ``values`` less the mean of ``others`` over different images.

    ``n`` is the smaller number of images.

    Both sides are resampled, each from its own images.
    """
    sides = [
        (_per_cluster(v, c), _per_cluster(np.ones(len(v)), c))
        for v, c in ((values, clusters), (others, other_clusters))
    ]
    n = min(len(sums) for sums, _ in sides)

    def resampled(seed: int, sums: np.ndarray, counts: np.ndarray) -> tuple[float, np.ndarray | None]:
        drawn: list[np.ndarray] = []

        def mean_of(weights: np.ndarray) -> np.ndarray:
            drawn.append((weights @ sums) / (weights @ counts))
            return drawn[-1]

        value = bootstrap(mean_of, len(sums), seed=seed).value
        return value, np.concatenate(drawn[1:]) if len(sums) >= MIN_CLUSTERS else None

    (a, own), (b, other) = (resampled(seed, *side) for seed, side in enumerate(sides))
    if own is None or other is None:
        return Interval(a - b, None, None, n)
    low, high = np.quantile(own - other, [_tail(n), 1 - _tail(n)])
    return Interval(a - b, float(low), float(high), n)


def proportion(successes: Sequence[float], trials: Sequence[float], clusters: Sequence[str]) -> Interval:
    """Return a pooled share of successes, clustered by image.

    As :func:`ratio`, except where every image is all right or all wrong in the same way: resampling would then print
    an interval of width zero, so the open side is the exact binomial bound ``1 - (tail)^(1/n)`` over images.
    """
    interval = ratio(successes, trials, clusters)
    if interval.low is None or interval.value not in (0.0, 1.0):
        return interval
    width = 1 - ((1 - LEVEL) / 2) ** (1 / interval.n)
    low, high = (0.0, width) if interval.value == 0 else (1 - width, 1.0)
    return Interval(interval.value, low, high, interval.n)


def paired_difference(values: Sequence[float], others: Sequence[float], clusters: Sequence[str]) -> Interval:
    """Return the mean of ``values - others``, pair by pair, with an interval over images."""
    return mean(np.asarray(values, np.float64) - np.asarray(others, np.float64), clusters)


def paired_t(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the mean of ``values - others``, one pair for each training seed, with Student's t interval.

    With a handful of seeds a percentile bootstrap is far too short (of three it excludes zero in about 29 % of the
    cases without a difference), so arms are compared by this. ``n`` is the number of seeds; one has no bounds.
    """
    differences = np.asarray(values, np.float64) - np.asarray(others, np.float64)
    value, n = float(differences.mean()), len(differences)
    if n < 2:
        return Interval(value, None, None, n)
    half = special.stdtrit(n - 1, (1 + LEVEL) / 2) * differences.std(ddof=1) / np.sqrt(n)
    return Interval(value, float(value - half), float(value + half), n)


def _per_cluster(values: Sequence[float], clusters: Sequence[str]) -> np.ndarray:
    """Return the sum of values per cluster, clusters in sorted order (so that the order of rows changes nothing)."""
    values = np.asarray(values, np.float64)
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values for {len(clusters)} cluster names")
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    order = np.lexsort((values, index))  # sums are then equal to the last bit, too
    return np.bincount(index[order], weights=values[order], minlength=len(names))


def _tail(clusters: int) -> float:
    """Return the corrected percentile for n clusters: Phi(sqrt(n / (n - 1)) * t quantile), .025 in the limit."""
    freedom = clusters - 1
    z = NormalDist().inv_cdf((1 - LEVEL) / 2)
    # Student's t from the normal quantile: Abramowitz & Stegun 26.7.5, off by less than 1e-3 from 9 degrees of freedom
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return NormalDist().cdf(t * np.sqrt(clusters / freedom))


def more_samples(interval: Interval) -> int | None:
    """Return about how many more images would keep an interval clear of zero, were its value the truth.

    None where it is clear already. The width falls as 1 / sqrt(n). A value of zero, or an interval without bounds, has
    no answer either.
    """
    if interval.low is None or interval.value == 0 or interval.low > 0 or interval.high < 0:
        return None
    half = (interval.high - interval.low) / 2
    return max(1, math.ceil(interval.n * (half / interval.value) ** 2) - interval.n)
