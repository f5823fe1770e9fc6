"""Intervals that respect how the numbers were made: clusters of images are resampled, never single judgements.

All seeds, attributes and joints of one image rise and fall together, and so do near duplicates: a cluster is a group of
these, which is one image where it has no duplicate. Pure functions of their inputs and a fixed seed: the same numbers
give the same interval. ``python -m tests.simulations.intervals`` measures what they cover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

LEVEL = 0.95
RESAMPLES = 4000
MIN_CLUSTERS = 8  # with fewer, the spread between clusters is too uncertain for an interval that keeps its promise
_CHUNK = 2**22  # numbers held at once while resampling
_ROUNDING = 1e-9  # of p (1 - p): a variance below is rounding error


@dataclass(frozen=True)
class Interval:
    """A value, its 95 % interval and the number of clusters behind it; bounds of None mean "inconclusive"."""

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
    top, bottom = _counted(numerators, denominators, clusters)
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
    """Return a pooled share of successes with its exact interval for clusters; never of width zero.

    Korn & Graubard (1998, "Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data", Survey Methodology 24): the bounds of Clopper & Pearson at the effective number of judgements,
    ``p (1 - p) / variance between clusters``, shortened by the ratio of t quantiles. Where few clusters hold what is
    rare, that variance is all but unknown: its degrees of freedom are counted over these clusters, and the effective
    number is never less than the clusters are worth if all judgements in each agree (Kish 1965: sum^2 / sum of
    squares), nor more than the judgements, unless these are fractions, as OKS is, which spread less than yes and no
    and are covered as skewed means are: too seldom with few clusters.
    With one judgement a cluster it is Clopper & Pearson's. Clusters without a trial are not counted in ``n``. Raises
    ``ValueError`` when there is no trial.
    """
    top, bottom = _counted(successes, trials, clusters)
    n, judged = len(top), float(bottom.sum())
    value = float(top.sum() / judged)
    if n < MIN_CLUSTERS:
        return Interval(value, None, None, n)
    effective = least = judged**2 / float(bottom @ bottom)
    rare = min(np.count_nonzero(top), np.count_nonzero(top < bottom))
    if rare > 1:
        variance = n / (n - 1) * float(np.sum((top - value * bottom) ** 2)) / judged**2
        shorter = (_t_quantile(judged - 1) / _t_quantile(rare - 1)) ** 2
        most = value * (1 - value)
        effective = most / variance * shorter if variance > _ROUNDING * most else judged
        whole = bool(np.all(top == np.rint(top)))
        effective = min(max(effective, least), judged if whole else math.inf)
    tail, right = (1 - LEVEL) / 2, value * effective
    low = special.betaincinv(right, effective - right + 1, tail) if value > 0 else 0.0
    high = special.betaincinv(right + 1, effective - right, 1 - tail) if value < 1 else 1.0
    return Interval(value, float(low), float(high), n)


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


def _counted(
    numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of both per cluster, of the clusters that have anything in the denominator."""
    top, bottom = _per_cluster(numerators, clusters), _per_cluster(denominators, clusters)
    counted = bottom > 0
    if not counted.any():
        raise ValueError("nothing to average")
    return top[counted], bottom[counted]


def _t_quantile(freedom: float) -> float:
    return float(special.stdtrit(freedom, (1 + LEVEL) / 2))


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
    return float(special.ndtr(-_t_quantile(clusters - 1) * math.sqrt(clusters / (clusters - 1))))


def more_samples(interval: Interval) -> int | None:
    """Return about how many more images would keep an interval clear of zero, were its value the truth.

    None where it is clear already. The width falls as 1 / sqrt(n). A value of zero, or an interval without bounds, has
    no answer either.
    """
    if interval.low is None or interval.value == 0 or interval.low > 0 or interval.high < 0:
        return None
    half = (interval.high - interval.low) / 2
    return max(1, math.ceil(interval.n * (half / interval.value) ** 2) - interval.n)
