"""Intervals cover what they claim, resample images and not judgements, and never move."""

import numpy as np
import pytest
from scipy import stats

from evaluate.records import Metric
from evaluate.statistics import intervals
from evaluate.statistics.intervals import Interval


def simulate(kind, images, seeds, random):
    """Values (images * seeds,) whose seeds share an image effect, with the true mean."""
    if kind == "normal":
        return random.normal(size=(images, 1)) + 0.5 * random.normal(size=(images, seeds)), 0.0
    if kind == "skewed":
        return random.gamma(4, size=(images, 1)) + 0.1 * random.normal(size=(images, seeds)), 4.0
    return (random.random((images, seeds)) < random.beta(4, 2, size=(images, 1))).astype(float), 4 / 6


@pytest.mark.parametrize("kind", ["normal", "skewed", "proportion"])
def test_ninety_five_percent_intervals_cover_ninety_five_percent(kind, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    random = np.random.default_rng(3)
    images, seeds, rounds = 64, 3, 1500
    names = np.repeat([f"{index:03d}" for index in range(images)], seeds)
    covered = 0
    for _ in range(rounds):
        values, truth = simulate(kind, images, seeds, random)
        pooled = intervals.proportion if kind == "proportion" else intervals.ratio
        interval = pooled(values.ravel(), np.ones(values.size), names)
        covered += interval.low <= truth <= interval.high
    assert 0.93 <= covered / rounds <= 0.97


def test_resampling_single_judgements_would_be_too_narrow():
    random = np.random.default_rng(0)
    values = np.repeat(random.normal(size=50), 4)  # four judgements per image that always agree
    names = np.repeat([str(index) for index in range(50)], 4)
    by_image = intervals.mean(values, names)
    by_judgement = intervals.mean(values, [str(index) for index in range(200)])
    assert by_image.n == 50
    assert (by_image.high - by_image.low) > 1.7 * (by_judgement.high - by_judgement.low)


def test_the_interval_depends_on_nothing_but_the_numbers():
    random = np.random.default_rng(1)
    values = random.normal(size=120)
    names = np.array([f"{index // 2:03d}" for index in range(120)])
    order = random.permutation(120)
    assert intervals.mean(values, names) == intervals.mean(values[order], names[order])


def test_normal_means_match_the_textbook():
    values = np.random.default_rng(2).normal(size=400)
    interval = intervals.mean(values, [str(index) for index in range(400)])
    half = 1.966 * values.std(ddof=1) / np.sqrt(400)  # Student's t, 399 degrees of freedom
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_ratios_pool_and_skip_images_with_nothing_to_count():
    hits, joints = [10, 0, 5] * 10, [10, 0, 10] * 10
    interval = intervals.ratio(hits, joints, [str(index) for index in range(30)])
    assert interval.value == pytest.approx(0.75)
    assert interval.n == 20
    with pytest.raises(ValueError, match="nothing to average"):
        intervals.ratio([0, 0], [0, 0], ["a", "b"])


def test_a_perfect_score_is_not_certain():
    perfect = intervals.proportion(np.ones(64), np.ones(64), [str(index) for index in range(64)])
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert perfect.low == pytest.approx(0.025 ** (1 / 64))  # Clopper-Pearson for 64 of 64: .944
    none = intervals.proportion(np.zeros(64), np.ones(64), [str(index) for index in range(64)])
    assert (none.low, none.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 64)))


def exact(successes, trials):
    """The bounds of Clopper and Pearson, of scipy."""
    found = stats.binomtest(successes, trials).proportion_ci(method="exact")
    return found.low, found.high


@pytest.mark.parametrize("n", [8, 25, 64])
def test_one_judgement_an_image_is_clopper_and_pearsons(n):
    names = [str(index) for index in range(n)]
    for right in range(n + 1):
        interval = intervals.proportion([1] * right + [0] * (n - right), [1] * n, names)
        assert (interval.low, interval.high) == pytest.approx(exact(right, n), abs=1e-9)


def test_judgements_that_always_agree_count_once():
    names = np.repeat([str(index) for index in range(40)], 16)
    right = np.repeat([1] * 38 + [0] * 2, 16)
    interval = intervals.proportion(right, np.ones(640), names)
    assert (interval.low, interval.high) == pytest.approx(exact(38, 40), abs=1e-9)


def test_more_right_never_misses_a_bar_that_fewer_right_meet():
    """256 of 256 had [.944, 1] where 252 of 256 had [.969, .996]."""
    names = np.repeat([f"{index:02d}" for index in range(64)], 4)
    lows = []
    for wrong in range(9):  # one in each of as many images
        right = np.ones(256)
        right[: 4 * wrong : 4] = 0
        lows.append(intervals.proportion(right, np.ones(256), names).low)
    assert lows[4] < 0.95
    assert lows[0] == max(lows)


@pytest.mark.parametrize(("n", "share", "judged"), [(64, 0.95, 1), (64, 0.985, 4), (16, 0.95, 16), (8, 0.02, 4)])
def test_shares_near_nought_and_one_are_covered(n, share, judged):
    random = np.random.default_rng(6)
    names = np.repeat([f"{index:02d}" for index in range(n)], judged)
    covered = 0
    for _ in range(1000):
        right = random.random((n, judged)) < random.beta(9 * share, 9 * (1 - share), (n, 1))  # correlated by .1
        interval = intervals.proportion(right.ravel(), np.ones(right.size), names)
        covered += interval.low <= share <= interval.high
        assert interval.high > interval.low
    assert covered / 1000 >= 0.93


def test_fractions_spread_less_than_yes_and_no():
    values = np.random.default_rng(7).uniform(0.9, 1, 64)
    interval = intervals.proportion(values, np.ones(64), [str(index) for index in range(64)])
    half = 1.998 * values.std(ddof=1) / 8  # Student's t, 63 degrees of freedom
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.1)


def test_pairing_removes_what_the_arms_share():
    random = np.random.default_rng(4)
    shared = 5 * random.normal(size=80)
    first = shared + 0.5 + 0.1 * random.normal(size=80)
    names = [str(index) for index in range(80)]
    paired = intervals.paired_difference(first, shared, names)
    assert paired.low > 0.4
    assert paired.high < 0.6
    assert intervals.mean(first, names).high - intervals.mean(first, names).low > 1


def test_too_few_images_are_inconclusive():
    names = [str(index) for index in range(8)]
    for interval in (intervals.mean([1.0] * 7, names[:7]), intervals.proportion([1.0] * 7, [1] * 7, names[:7])):
        assert (interval.low, interval.high) == (None, None)
        assert interval.verdict(0.5) == "inconclusive"
        assert "below 8" in Metric.of("share", interval).reason
    assert intervals.proportion([1.0] * 8, [1] * 8, names).low is not None


def test_verdicts_need_the_whole_interval():
    assert Interval(0.8, 0.75, 0.85, 64).verdict(0.7) == "met"
    assert Interval(0.8, 0.69, 0.85, 64).verdict(0.7) == "inconclusive"
    assert Interval(0.6, 0.55, 0.65, 64).verdict(0.7) == "missed"
    assert Interval(0.4, 0.3, 0.45, 64).verdict(0.5, better="lower") == "met"
    assert Interval(0.6, 0.55, 0.65, 64).verdict(0.5, better="lower") == "missed"


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_difference_over_a_few_training_seeds_covers_what_it_claims(seeds):
    random = np.random.default_rng(seeds)
    shared = random.normal(size=(20_000, 1, seeds))  # what a seed does to both arms, which pairing takes away
    arms = 0.3 * random.normal(size=(20_000, 2, seeds)) + shared
    found = [intervals.paired_t(*pair) for pair in arms]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in found])
    assert 0.94 < covered < 0.96
    assert np.mean([interval.high - interval.low for interval in found]) < 4 * 0.3 * 4.31 / np.sqrt(seeds)


def test_the_interval_over_seeds_is_students():
    interval = intervals.paired_t([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])
    half = 4.302653 * np.std([1, 2, 4], ddof=1) / np.sqrt(3)  # the t quantile of two degrees of freedom
    assert interval.value == pytest.approx(7 / 3)
    assert (interval.low, interval.high) == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-6)
    assert intervals.paired_t([1.0], [0.5]) == Interval(0.5, None, None, 1)


def test_the_difference_of_two_sets_of_images_covers_the_truth(monkeypatch):
    """Sets of unlike spread and size; pairing nothing."""
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    random = np.random.default_rng(5)
    names = ([f"a{index}" for index in range(64)], [f"b{index}" for index in range(48)])
    covered = 0
    for _ in range(300):
        a, b = random.normal(1, 1, 64), random.normal(0, 2, 48)
        interval = intervals.difference(a, names[0], b, names[1])
        covered += interval.low <= 1 <= interval.high
    assert interval.n == 48
    assert 0.92 <= covered / 300 <= 0.98


def test_a_difference_of_few_images_has_no_bounds():
    interval = intervals.difference([1.0] * 20, [str(i) for i in range(20)], [0.5] * 5, [str(i) for i in range(5)])
    assert (interval.value, interval.low, interval.n) == (0.5, None, 5)


def test_a_quotient_counts_images_whose_denominator_is_negative():
    keys = [f"{index:02d}" for index in range(20)]
    denominators = [2.0] * 19 + [-1.0]
    interval = intervals.quotient([1.0] * 20, denominators, keys)
    assert interval.value == pytest.approx(20 / 37)
    assert interval.n == 20
    assert interval.low < interval.value < interval.high


@pytest.mark.parametrize("other", [0.3, 0.1 + 0.2, 0.3 + 1e-12])
def test_fractions_that_differ_by_rounding_are_equal(other):
    """As a variance, rounding error would stand for 1e30 judgements, whose bounds are NaN or change places."""
    names = [f"{index:02d}" for index in range(10)]
    interval = intervals.proportion([0.3] * 5 + [other] * 5, [1] * 10, names)
    three_of_ten = intervals.proportion([1] * 3 + [0] * 7, [1] * 10, names)
    assert (interval.low, interval.high) == pytest.approx((three_of_ten.low, three_of_ten.high))
