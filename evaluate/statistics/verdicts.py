"""Verdicts on two arms from a few training seeds: better, worse, equivalent, or nothing yet.

A training seed is the unit: everything that a seed decides (initial weights, order of the data, noise, times) is shared
by the arms that are compared, so arms are paired by seed and Student's t interval is taken over the differences. Images
are resampled only within one seed, to describe it; a percentile bootstrap over three seeds excludes zero in about 29 %
of the cases without a difference. Pure functions of their inputs.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from evaluate.statistics.intervals import LEVEL, Interval, paired_t
from evaluate.statistics.looks import Looks

ALPHA = 1 - LEVEL
MIN_SEEDS = 3  # fewer carry no verdict (trap 23), whatever their interval says
MOST_SEEDS = 1000  # beyond which a number of seeds is no advice
POWER = 0.8  # of the numbers of seeds that are advised
EXACT_PAIRS = 16  # up to which all signs of the ranks are tried
ONE_LOOK = Looks()

Word = Literal[
    "better", "worse", "equivalent", "inconclusive", "exploratory: no verdict", "single run: no verdict", "no verdict"
]


@dataclass(frozen=True)
class Comparison:
    """The mean of one arm less that of another, with its 95 % interval over training seeds.

    ``interval.n`` is the number of pairs, or of seeds in the smaller arm where these are not paired. ``spreads`` are
    the standard deviations behind the interval: of the differences, or of both arms. ``p`` is two-sided, None for a
    single seed. ``differences`` holds what every seed said, empty where seeds are not paired. ``error`` is the standard
    error, with so many degrees of ``freedom``.
    """

    interval: Interval
    spreads: tuple[float, ...]
    p: float | None
    paired: bool
    differences: Mapping[int, float]
    error: float = 0.0
    freedom: float = 0.0

    def outside(self, margin: float) -> float:
        """Return the two-sided p-value against a difference beyond +-``margin``: at .05 the 95 % interval is within.

        Two one-sided tests, the larger p of them, twice (Schuirmann 1987).
        """
        room = margin - abs(self.interval.value)
        if not self.error:
            return 0.0 if room >= 0 else 1.0
        return min(1.0, float(2 * special.stdtr(self.freedom, -room / self.error)))


@dataclass(frozen=True)
class Verdict:
    """The conclusion from a comparison, after Holm's correction over the arms that were judged together.

    ``adjusted`` is the p-value of a difference, corrected over looks and arms. Where the verdict is open, between the
    two numbers of ``seeds`` in all would settle it ``toward`` different or equivalent with a probability of POWER, see
    :func:`needed_seeds`; None for the larger where no allowed number would, None for both where the smaller has none.
    """

    word: Word
    adjusted: float | None = None
    seeds: tuple[int, int | None] | None = None
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
    error, freedom = spread / math.sqrt(len(seeds)), len(seeds) - 1
    return Comparison(
        interval, (spread,), _two_sided(interval.value, error, freedom), True, differences, error, freedom
    )


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
    return Comparison(interval, spreads, _two_sided(value, error, freedom), False, {}, error, freedom)


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
    comparisons: Mapping[Hashable, Comparison | None],
    mode: Literal["min", "max"],
    margin: float | None,
    looks: Looks = ONE_LOOK,
) -> dict[Hashable, Verdict]:
    """Judge each comparison, corrected over the looks at its seeds and over all comparisons.

    ``equivalent``: the 95 % interval lies within +-``margin``, also where it excludes zero: a difference that small was
    declared to make none. ``better`` or ``worse``: the interval excludes zero and is not within the margin. For both
    the p-value after looks and after Holm's correction over the arms is at most .05. Otherwise, and below MIN_SEEDS,
    ``inconclusive``; one seed is a single run without any verdict, and a sweep that grew without a declared maximum of
    seeds is exploratory.
    """
    judged = [name for name, one in comparisons.items() if one is not None and one.interval.n >= MIN_SEEDS]
    different, factors = holm([looks.adjust(comparisons[name].p) for name in judged])
    alike, alike_factors = holm([looks.adjust(comparisons[name].outside(margin or 0.0)) for name in judged])
    corrected = dict(zip(judged, zip(zip(different, factors), zip(alike, alike_factors))))
    alone = ((None, 1), (None, 1))
    return {name: _verdict(one, mode, margin, looks, *corrected.get(name, alone)) for name, one in comparisons.items()}


def _verdict(
    one: Comparison | None,
    mode: str,
    margin: float | None,
    looks: Looks,
    different: tuple[float | None, int],
    alike: tuple[float | None, int],
) -> Verdict:
    if one is None:
        return Verdict("no verdict", note="no finished seed in common")
    interval, adjusted = one.interval, different[0]
    if interval.n < 2:
        return Verdict("single run: no verdict")
    if looks.exploratory:
        grown = ", then ".join(map(str, looks.seeds))
        return Verdict("exploratory: no verdict", note=f"seeds were added ({grown}), and no max_seeds was declared")
    toward = "equivalent" if margin and abs(interval.value) <= margin else "different"
    factor = (alike if toward == "equivalent" else different)[1]
    seeds = needed_seeds(one, margin, ALPHA / factor, looks)
    toward = toward if seeds else None
    if interval.n < MIN_SEEDS:
        return Verdict("inconclusive", None, seeds, toward, "two seeds are too few")
    real, within = interval.low > 0 or interval.high < 0, margin is not None and one.outside(margin) <= ALPHA
    if within and margin and alike[0] <= ALPHA:
        small = "there is a difference, smaller than the margin" if adjusted <= ALPHA else ""
        return Verdict("equivalent", adjusted, note=small)
    if margin == 0 == interval.low == interval.high:
        return Verdict("equivalent", adjusted, note="equal in every seed")
    if adjusted <= ALPHA and not within:
        return Verdict("better" if (interval.value < 0) == (mode == "min") else "worse", adjusted)
    after = "after Holm's correction" + (" and that for looks" if looks.most else "")
    note = f"within the margin alone, but not {after}" if within else f"excludes zero alone, but not {after}"
    return Verdict("inconclusive", adjusted, seeds, toward, note if real or within else "")


def needed_seeds(
    one: Comparison, margin: float | None, level: float = ALPHA, looks: Looks = ONE_LOOK, doubt: float = 1.0
) -> tuple[int, int | None] | None:
    """Return how many seeds in all would settle a comparison with a probability of POWER: the least, and the most.

    A difference inside the margin is settled where the interval at ``level`` is within it, one outside where that
    interval excludes zero. The least if the true difference is ``doubt`` standard errors farther on that way than the
    one seen, the most if it is as much less far: the spread is taken as it is. None for the most where no number up to
    the declared maximum (or MOST_SEEDS) would, and None where not even the least would. Numbers are those of new
    samples; with a declared maximum each is the next look.
    """
    if not one.spreads:
        return None
    first = MIN_SEEDS if looks.most is None else max(MIN_SEEDS, one.interval.n + 1, looks.seeds[-1] + 1)
    numbers = range(first, (looks.most or MOST_SEEDS) + 1)
    size, shift = abs(one.interval.value), doubt * one.error
    inside = bool(margin) and size <= margin

    def enough(count: int, true: float) -> bool:
        error, freedom = _error(one.spreads, count)
        half = special.stdtrit(freedom, 1 - looks.level_at(count, level) / 2) * error
        if not inside:
            return half + special.stdtrit(freedom, POWER) * error < true
        if not error or half >= margin:
            return half < margin
        far, near = ((edge - true) / error for edge in (margin - half, half - margin))
        return special.stdtr(freedom, far) - special.stdtr(freedom, near) >= POWER

    def fewest(true: float) -> int | None:
        place = bisect.bisect_left(numbers, True, key=lambda count: enough(count, true))
        return numbers[place] if place < len(numbers) else None

    least, most = (fewest(max(0.0, size + sign * shift)) for sign in ((-1, 1) if inside else (1, -1)))
    return None if least is None else (least, most)


def half_width(spreads: Sequence[float], seeds: Sequence[int], level: float = ALPHA) -> np.ndarray:
    """Return half of the interval (n,) at numbers of ``seeds`` (n,) in each arm.

    ``spreads`` are one of paired differences, or two of Welch's test.
    """
    error, freedom = np.array([_error(spreads, count) for count in seeds]).T
    return special.stdtrit(freedom, 1 - level / 2) * error


def _error(spreads: Sequence[float], count: int) -> tuple[float, float]:
    """Return the standard error and its degrees of freedom with so many seeds in each arm."""
    return (spreads[0] / math.sqrt(count), count - 1) if len(spreads) == 1 else _welch_error(spreads, (count, count))


@dataclass(frozen=True)
class RankTest:
    """Two arms over the seeds in which both ended, a failure being worse than any value: seeds better, worse, and p."""

    better: int
    worse: int
    p: float


def rank_failures(
    values: Mapping[int, float], others: Mapping[int, float], failed: Collection[int], others_failed: Collection[int],
    mode: Literal["min", "max"],
) -> RankTest | None:  # fmt: skip
    """Test the ranks of the paired differences, with failures worst; None where no seed ended in both arms.

    Wilcoxon's signed ranks (1945), two-sided, ties at their mean rank, seeds without a difference left out; exact up to
    EXACT_PAIRS, normal beyond. Two failures are no difference; one is the largest difference that there is.
    """
    sign = 1 if mode == "max" else -1
    good, other = (
        {**{seed: sign * value for seed, value in own.items()}, **dict.fromkeys(lost, -math.inf)}
        for own, lost in ((values, failed), (others, others_failed))
    )
    common = sorted(good.keys() & other.keys())
    gains = np.array([0.0 if good[seed] == other[seed] else good[seed] - other[seed] for seed in common])
    if not gains.size:
        return None
    moved = gains[gains != 0]
    sizes, place, count = np.unique(np.abs(moved), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place] if sizes.size else np.zeros(0)
    total = abs(float(np.sign(moved) @ ranks))
    if len(ranks) <= EXACT_PAIRS:
        signs = 1 - 2 * (np.arange(2 ** len(ranks))[:, None] >> np.arange(len(ranks)) & 1)
        p = float(np.mean(np.abs(signs @ ranks) >= total - 1e-9))
    else:
        p = _two_sided(total, float(np.linalg.norm(ranks)), math.inf)
    return RankTest(int((gains > 0).sum()), int((gains < 0).sum()), p)


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
    if math.isinf(freedom):
        return float(2 * special.ndtr(-abs(value) / error))
    return float(2 * special.stdtr(freedom, -abs(value) / error))
