"""Verdicts on two arms from a few training seeds: better, worse, equivalent, or nothing yet.

A training seed is the unit: everything that a seed decides (initial weights, order of the data, noise, times) is shared
by the arms that are compared, so arms are paired by seed and Student's t interval is taken over the differences. Images
are resampled only within one seed, to describe it; a percentile bootstrap over three seeds excludes zero in about 29 %
of the cases without a difference. Pure functions of their inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from evaluate.statistics.intervals import LEVEL, Interval, paired_t

ALPHA = 1 - LEVEL
MIN_SEEDS = 3  # fewer carry no verdict (trap 23), whatever their interval says
MOST_SEEDS = 1000  # beyond which a number of seeds is no advice

Word = Literal["better", "worse", "equivalent", "inconclusive", "single run: no verdict", "no verdict"]


@dataclass(frozen=True)
class Comparison:
    """The mean of one arm less that of another, with its 95 % interval over training seeds.

    ``interval.n`` is the number of pairs, or of seeds in the smaller arm where these are not paired. ``spreads`` are
    the standard deviations behind the interval: of the differences, or of both arms. ``p`` is two-sided, None for a
    single seed. ``differences`` holds what every seed said, empty where seeds are not paired.
    """

    interval: Interval
    spreads: tuple[float, ...]
    p: float | None
    paired: bool
    differences: Mapping[int, float]


@dataclass(frozen=True)
class Verdict:
    """The conclusion from a comparison, after Holm's correction over the arms that were judged together.

    ``adjusted`` is the corrected p-value. Where the verdict is open, about ``more`` more seeds would settle it, were
    the mean and the spread so far the truth, and it would then be ``toward`` different or equivalent; None where no
    number up to MOST_SEEDS would.
    """

    word: Word
    adjusted: float | None = None
    more: int | None = None
    toward: Literal["different", "equivalent"] | None = None
    note: str = ""


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Comparison | None:
    """Compare two arms (training seed -> value) over the seeds that both have; None where there are none.

    One-sample t test of the differences (Student 1908); one seed has neither bounds nor p.
    """
    differences = {seed: values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())}
    if not differences:
        return None
    seeds = list(differences)
    interval = paired_t([values[seed] for seed in seeds], [others[seed] for seed in seeds])
    if len(seeds) < 2:
        return Comparison(interval, (), None, True, differences)
    spread = float(np.std(list(differences.values()), ddof=1))
    p = _two_sided(interval.value, spread / math.sqrt(len(seeds)), len(seeds) - 1)
    return Comparison(interval, (spread,), p, True, differences)


def welch(values: Sequence[float], others: Sequence[float]) -> Comparison | None:
    """Compare two arms whose seeds are different ones, as an A/A arm's are; None where either has no value.

    Welch's t with the degrees of freedom of Satterthwaite (Welch 1947, "The generalization of Student's problem",
    Biometrika 34), so that the arms need not spread alike.
    """
    if not len(values) or not len(others):
        return None
    value, n = float(np.mean(values) - np.mean(others)), min(len(values), len(others))
    if n < 2:
        return Comparison(Interval(value, None, None, n), (), None, False, {})
    spreads = tuple(float(np.std(side, ddof=1)) for side in (values, others))
    error, freedom = _welch_error(spreads, (len(values), len(others)))
    half = float(special.stdtrit(freedom, 1 - ALPHA / 2)) * error if error else 0.0
    interval = Interval(value, value - half, value + half, n)
    return Comparison(interval, spreads, _two_sided(value, error, freedom), False, {})


def holm(p_values: Sequence[float]) -> tuple[list[float], list[int]]:
    """Adjust p-values, in the order given; also returns the factor that each was held against the level with.

    Rejecting where the adjusted value is at most the level keeps the chance of any false rejection at that level,
    whatever the dependence (Holm 1979, "A simple sequentially rejective multiple test procedure").
    """
    order = sorted(range(len(p_values)), key=lambda index: (p_values[index], index))
    adjusted, factors, largest = [0.0] * len(order), [1] * len(order), 0.0
    for rank, index in enumerate(order):
        factors[index] = len(order) - rank
        largest = max(largest, min(1.0, factors[index] * p_values[index]))
        adjusted[index] = largest
    return adjusted, factors


def judge_comparisons(
    comparisons: Mapping[Hashable, Comparison | None], mode: Literal["min", "max"], margin: float | None
) -> dict[Hashable, Verdict]:
    """Judge each comparison, corrected over all of them.

    ``equivalent``: the 95 % interval lies within +-``margin``, also where it excludes zero: a difference that small was
    declared to make none (two one-sided tests at 2.5 % each, half of what Schuirmann 1987 asks for, and therefore not
    corrected). ``better`` or ``worse``: Holm's p is at most .05. Otherwise, and below MIN_SEEDS, ``inconclusive``; one
    seed is a single run without any verdict.
    """
    judged = [name for name, one in comparisons.items() if one is not None and one.interval.n >= MIN_SEEDS]
    adjusted, factors = holm([comparisons[name].p for name in judged])
    corrected = dict(zip(judged, zip(adjusted, factors)))
    return {name: _verdict(one, mode, margin, *corrected.get(name, (None, 1))) for name, one in comparisons.items()}


def _verdict(one: Comparison | None, mode: str, margin: float | None, adjusted: float | None, factor: int) -> Verdict:
    if one is None:
        return Verdict("no verdict", note="no finished seed in common")
    interval = one.interval
    if interval.n < 2:
        return Verdict("single run: no verdict")
    more, toward = more_seeds(one, margin, ALPHA / factor)
    if interval.n < MIN_SEEDS:
        return Verdict("inconclusive", None, max(more or 0, MIN_SEEDS - interval.n), toward, "two seeds are too few")
    if margin and -margin <= interval.low and interval.high <= margin:
        real = interval.low > 0 or interval.high < 0
        return Verdict("equivalent", adjusted, note="there is a difference, smaller than the margin" if real else "")
    if margin == 0 == interval.low == interval.high:
        return Verdict("equivalent", adjusted, note="equal in every seed")
    if adjusted <= ALPHA:
        return Verdict("better" if (interval.value < 0) == (mode == "min") else "worse", adjusted)
    alone = "excludes zero alone, but not after Holm's correction" if interval.low > 0 or interval.high < 0 else ""
    return Verdict("inconclusive", adjusted, more, toward, alone)


def more_seeds(
    one: Comparison, margin: float | None, level: float = ALPHA
) -> tuple[int | None, Literal["different", "equivalent"] | None]:
    """Return about how many more seeds would settle a comparison, were its mean and spread the truth, and which way.

    The smallest number at which the half width of the interval, by the t distribution of that number, falls below the
    mean (at ``level``, which a correction makes smaller than .05), or puts the 95 % interval within +-``margin``. A
    further sample of that size would then do so about every second time: it is a least, not a promise.
    """
    if not one.spreads:
        return None, None
    seeds = np.arange(one.interval.n + 1, MOST_SEEDS + 1)
    size = abs(one.interval.value)
    found = []
    excluded = seeds[half_width(one.spreads, seeds, level) < size]
    if excluded.size:
        found.append((int(excluded[0]) - one.interval.n, "different"))
    within = seeds[size + half_width(one.spreads, seeds) <= margin] if margin else seeds[:0]
    if within.size:
        found.append((int(within[0]) - one.interval.n, "equivalent"))
    return min(found, default=(None, None), key=lambda pair: pair[0])


def half_width(spreads: Sequence[float], seeds: Sequence[int], level: float = ALPHA) -> np.ndarray:
    """Return half of the interval (n,) at numbers of ``seeds`` (n,) in each arm.

    ``spreads`` are one of paired differences, or two of Welch's test.
    """
    seeds = np.asarray(seeds)
    if len(spreads) == 1:
        error, freedom = spreads[0] / np.sqrt(seeds), seeds - 1
    else:
        pairs = [_welch_error(spreads, (count, count)) for count in seeds]
        error, freedom = (np.array(column) for column in zip(*pairs))
    return special.stdtrit(freedom, 1 - level / 2) * error


@dataclass(frozen=True)
class Effect:
    """The main effect of one factor, or the interaction of several, over the cells of a full factorial."""

    factors: tuple[str, ...]
    comparison: Comparison


def factorial_effects(
    cells: Mapping[frozenset[str], Mapping[int, float]], factors: Collection[str]
) -> list[Effect] | None:
    """Return all effects of a two-level full factorial: ``cells`` maps the factors on to (training seed -> value).

    The main effect is the mean of the cells with the factor less the mean of those without. The interaction of two is
    half the difference of the one's effect with and without the other, and so on for more: the contrast of signs
    divided by 2^(k-1) (Box, Hunter & Hunter 2005, "Statistics for Experimenters", sections 5.4-5.6). Each seed has one
    value of every effect, over which the t interval is taken. None where a cell is missing or no seed has all.
    """
    factors = sorted(factors)
    subsets = [frozenset(some) for k in range(len(factors) + 1) for some in itertools.combinations(factors, k)]
    if not factors or any(subset not in cells for subset in subsets):
        return None
    seeds = sorted(set.intersection(*(set(cells[subset]) for subset in subsets)))
    if not seeds:
        return None
    effects = []
    for effect in subsets[1:]:
        contrast = {
            seed: math.fsum((-1) ** len(effect - subset) * cells[subset][seed] for subset in subsets)
            / 2 ** (len(factors) - 1)
            for seed in seeds
        }
        effects.append(Effect(tuple(sorted(effect)), paired(contrast, dict.fromkeys(seeds, 0.0))))
    return effects


def _welch_error(spreads: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Return the standard error of a difference of means, and its degrees of freedom (Satterthwaite 1946)."""
    variances = [spread**2 / count for spread, count in zip(spreads, counts)]
    total = sum(variances)
    if not total:
        return 0.0, float(sum(counts) - 2)
    freedom = total**2 / sum(variance**2 / (count - 1) for variance, count in zip(variances, counts))
    return math.sqrt(total), freedom


def _two_sided(value: float, error: float, freedom: float) -> float:
    if not error:
        return 0.0 if value else 1.0
    return float(2 * special.stdtr(freedom, -abs(value) / error))
