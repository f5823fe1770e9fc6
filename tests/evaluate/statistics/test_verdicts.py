"""Verdicts over training seeds say what they may: coverage, false positives, Holm, margins, power, effects."""

import numpy as np
import pytest
from scipy import stats

from evaluate.statistics.verdicts import (
    MIN_SEEDS,
    Comparison,
    factorial_effects,
    half_width,
    holm,
    judge_comparisons,
    more_seeds,
    paired,
    welch,
)

ROUNDS = 2500


def arm(values, first=0):
    return {first + index: float(value) for index, value in enumerate(values)}


def compare(differences) -> Comparison:
    return paired(arm(differences), arm([0.0] * len(differences)))


def verdict(differences, mode="min", margin=None):
    return judge_comparisons({"B": compare(differences)}, mode, margin)["B"]


def draws(random, kind, seeds):
    """Two arms (2, seeds) whose true difference is .2: seeds share an effect; the noise is of the kind."""
    noise = {
        "normal": lambda: 0.3 * random.normal(size=(2, seeds)),
        "uniform": lambda: random.uniform(-0.5, 0.5, size=(2, seeds)),
        "skewed": lambda: 0.3 * random.gamma(4, 0.5, size=(2, seeds)),
    }[kind]()
    return random.normal(size=seeds) + noise + [[0.2], [0.0]]


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("kind", ["normal", "uniform", "skewed"])
def test_ninety_five_percent_of_paired_intervals_cover_the_truth(kind, seeds):
    random = np.random.default_rng(seeds)
    covered = 0
    for _ in range(ROUNDS):
        interval = paired(*map(arm, draws(random, kind, seeds))).interval
        covered += interval.low <= 0.2 <= interval.high
    assert 0.93 <= covered / ROUNDS <= 0.97


@pytest.mark.parametrize(("counts", "spreads"), [((3, 3), (1, 1)), ((3, 5), (1, 1)), ((5, 5), (1, 2))])
def test_ninety_five_percent_of_intervals_between_other_seeds_cover_the_truth(counts, spreads):
    random = np.random.default_rng(sum(counts))
    covered = 0
    for _ in range(ROUNDS):
        a, b = (random.normal(scale=spread, size=count) for count, spread in zip(counts, spreads))
        interval = welch(a, b).interval
        covered += interval.low <= 0 <= interval.high
    assert 0.93 <= covered / ROUNDS <= 0.97


def test_trap_23_three_seeds_without_a_difference_seldom_make_a_claim():
    """Four arms that are the baseline again: any claim in at most 5 % of sweeps; a bootstrap claims far more often."""
    random = np.random.default_rng(1)
    claimed = bootstrapped = 0
    resamples = np.array(np.meshgrid(*[range(3)] * 3)).reshape(3, -1).T  # all 27 of three seeds
    for _ in range(ROUNDS):
        arms = random.normal(size=(5, 1, 3)) * 0.3 + random.normal(size=3)
        found = judge_comparisons(
            {name: paired(arm(arms[name][0]), arm(arms[0][0])) for name in range(1, 5)}, "min", None
        )
        claimed += any(one.word in ("better", "worse") for one in found.values())
        means = (arms[1][0] - arms[0][0])[resamples].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        bootstrapped += not low <= 0 <= high
    assert claimed / ROUNDS <= 0.055
    assert 0.2 < bootstrapped / ROUNDS < 0.35  # the 29 % that the page speaks of


def test_intervals_and_p_are_those_of_scipy():
    random = np.random.default_rng(2)
    for n in (2, 3, 7):
        a, b = random.normal(size=n), random.normal(size=n)
        ours, theirs = paired(arm(a), arm(b)), stats.ttest_rel(a, b)
        assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
        assert (ours.interval.low, ours.interval.high) == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-9)
        other = random.normal(scale=3, size=n + 2)
        ours, theirs = welch(a, other), stats.ttest_ind(a, other, equal_var=False)
        assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
        assert (ours.interval.low, ours.interval.high) == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-9)


def test_arms_are_paired_by_seed_and_over_common_seeds_alone():
    compared = paired({2: 5.0, 0: 1.0, 1: 2.0, 9: 100.0}, {0: 0.5, 1: 1.5, 2: 4.5, 7: -50.0})
    assert compared.differences == {0: 0.5, 1: 0.5, 2: 0.5}
    assert compared.interval.n == 3
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert welch([1.0], []) is None


def test_holm_is_holms():
    # worked by hand: sorted .005 * 4, .011 * 3, .02 * 2, .04 * 1 -> .02, .033, .04, .04
    adjusted, factors = holm([0.011, 0.02, 0.04, 0.005])
    assert adjusted == pytest.approx([0.033, 0.04, 0.04, 0.02])
    assert factors == [3, 2, 1, 4]
    assert holm([0.02, 0.03, 0.9])[0] == pytest.approx([0.06, 0.06, 0.9])  # never below that of a smaller p
    assert holm([0.4, 0.5]) == ([0.8, 0.8], [2, 1])
    assert holm([]) == ([], [])


def test_verdicts_follow_the_interval_the_margin_and_the_direction():
    clear = [-0.10, -0.11, -0.105]
    assert verdict(clear).word == "better"
    assert verdict(clear, "max").word == "worse"
    assert verdict([-value for value in clear]).word == "worse"
    small = [0.001, -0.001, 0.0005]
    assert verdict(small, margin=0.02).word == "equivalent"
    assert verdict(small, margin=0.001).word == "inconclusive"
    assert verdict(small).word == "inconclusive"  # without a margin nothing is equivalent
    real = verdict([-0.010, -0.011, -0.0105], margin=0.02)
    assert real.word == "equivalent"
    assert "smaller than the margin" in real.note
    assert verdict([-0.3, 0.1, -0.2], margin=0.02).word == "inconclusive"


def test_one_seed_is_no_verdict_and_two_are_too_few():
    single = verdict([-5.0], margin=1.0)
    assert single.word == "single run: no verdict"
    assert single.more is None
    two = verdict([-5.0, -5.0001], margin=1.0)
    assert two.word == "inconclusive"
    assert two.more >= MIN_SEEDS - 2
    assert judge_comparisons({"B": None}, "min", 0.1)["B"].word == "no verdict"


def test_a_claim_has_to_survive_the_other_arms():
    borderline = compare([-0.10, -0.12, -0.15])  # p = .014 alone
    noise = {name: compare([0.3, -0.2, 0.1]) for name in "CDE"}
    assert judge_comparisons({"B": borderline}, "min", None)["B"].word == "better"
    corrected = judge_comparisons({"B": borderline, **noise}, "min", None)["B"]
    assert corrected.word == "inconclusive"
    assert corrected.adjusted == pytest.approx(4 * borderline.p)
    assert "Holm" in corrected.note
    assert corrected.more >= 1
    assert corrected.toward == "different"


def test_more_seeds_are_the_fewest_at_which_the_interval_settles_it():
    one = compare([-0.3, 0.1, -0.2, -0.1])
    more, toward = more_seeds(one, None)
    assert toward == "different"
    half = [
        stats.t.ppf(0.975, n - 1) * one.spreads[0] / np.sqrt(n)
        for n in (one.interval.n + more, one.interval.n + more - 1)
    ]
    assert half[0] < abs(one.interval.value) <= half[1]
    wide = compare([0.02, -0.03, 0.012, -0.001])
    more, toward = more_seeds(wide, 0.02)
    assert toward == "equivalent"
    sizes = wide.interval.n + more - np.arange(2)
    assert list(abs(wide.interval.value) + half_width(wide.spreads, sizes) <= 0.02) == [True, False]
    assert more_seeds(compare([1.0, -1.0, 1e-9]), None) == (None, None)
    assert more_seeds(compare([1.0]), 0.1) == (None, None)


def test_the_number_of_seeds_is_not_far_from_the_power_it_promises():
    """At that number of seeds about half of all samples exclude zero."""
    random = np.random.default_rng(4)
    one = compare([-0.3, 0.1, -0.2, -0.1])
    n = one.interval.n + more_seeds(one, None)[0]
    found = 0
    for _ in range(ROUNDS):
        interval = compare(random.normal(one.interval.value, one.spreads[0], size=n)).interval
        found += not interval.low <= 0 <= interval.high
    assert 0.4 < found / ROUNDS < 0.65


def test_factorial_effects_are_those_of_least_squares():
    """Against a regression with columns of -1 and 1, whose coefficients are half the effects."""
    random = np.random.default_rng(5)
    factors = ("muon", "repa", "tread")
    cells, rows, responses = {}, [], []
    for code in range(8):
        on = frozenset(name for bit, name in enumerate(factors) if code >> bit & 1)
        cells[on] = arm(random.normal(size=3))
        signs = {name: 1 if name in on else -1 for name in factors}
        for value in cells[on].values():
            rows.append([1, *(np.prod([signs[n] for n in names]) for names in subsets(factors))])
            responses.append(value)
    expected = 2 * np.linalg.lstsq(np.array(rows, float), np.array(responses), rcond=None)[0][1:]
    found = factorial_effects(cells, factors)
    assert [effect.factors for effect in found] == subsets(factors)
    assert [effect.comparison.interval.value for effect in found] == pytest.approx(expected)
    assert all(effect.comparison.interval.n == 3 for effect in found)


def subsets(factors):
    return [
        *((name,) for name in factors),
        *((a, b) for index, a in enumerate(factors) for b in factors[index + 1 :]),
        tuple(factors),
    ]


def test_a_known_interaction_is_found_and_an_incomplete_factorial_has_none():
    cells = {
        frozenset(): arm([1.0, 2.0, 3.0]),
        frozenset("a"): arm([0.5, 1.5, 2.5]),
        frozenset("b"): arm([0.9, 1.9, 2.9]),
        frozenset("ab"): arm([0.0, 1.0, 2.0]),
    }
    a, b, both = factorial_effects(cells, "ab")
    assert a.comparison.interval.value == pytest.approx((-0.5 - 0.9) / 2)
    assert b.comparison.interval.value == pytest.approx((-0.1 - 0.5) / 2)
    assert both.comparison.interval.value == pytest.approx((-0.9 + 0.5) / 2)
    assert both.comparison.spreads[0] == pytest.approx(0, abs=1e-12)  # what the seeds share is gone
    del cells[frozenset("ab")]
    assert factorial_effects(cells, "ab") is None
