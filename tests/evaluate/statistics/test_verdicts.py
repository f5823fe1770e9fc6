"""Verdicts over training seeds say what they may: coverage, false positives, Holm, margins, power, effects."""

import numpy as np
import pytest
from scipy import stats

from evaluate.statistics.looks import SPARED, Looks, level, spent
from evaluate.statistics.verdicts import (
    ALPHA,
    MIN_SEEDS,
    Comparison,
    factorial_effects,
    holm,
    judge_comparisons,
    needed_seeds,
    paired,
    rank_failures,
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
    assert single.seeds is None
    two = verdict([-5.0, -5.0001], margin=1.0)
    assert two.word == "inconclusive"
    assert two.seeds[0] >= MIN_SEEDS
    assert judge_comparisons({"B": None}, "min", 0.1)["B"].word == "no verdict"


def test_a_claim_has_to_survive_the_other_arms():
    borderline = compare([-0.10, -0.12, -0.15])  # p = .014 alone
    noise = {name: compare([0.3, -0.2, 0.1]) for name in "CDE"}
    assert judge_comparisons({"B": borderline}, "min", None)["B"].word == "better"
    corrected = judge_comparisons({"B": borderline, **noise}, "min", None)["B"]
    assert corrected.word == "inconclusive"
    assert corrected.adjusted == pytest.approx(4 * borderline.p)
    assert "Holm" in corrected.note
    assert corrected.seeds[0] >= MIN_SEEDS
    assert corrected.toward == "different"


def test_arms_that_differ_by_the_margin_are_seldom_all_called_equivalent():
    """Seven arms whose true difference is the margin: uncorrected, one was called equivalent in 14 % of sweeps."""
    random = np.random.default_rng(3)
    false = alone = 0
    for _ in range(1000):
        found = {name: paired(arm(random.normal(0.02, 0.01, 5)), arm(np.zeros(5))) for name in range(7)}
        false += any(one.word == "equivalent" for one in judge_comparisons(found, "min", 0.02).values())
        alone += any(one.interval.low >= -0.02 and one.interval.high <= 0.02 for one in found.values())
    assert alone / 1000 > 0.12
    assert false / 1000 <= 0.035  # two and a half in a hundred, for all of them


def test_seeds_settle_it_with_the_probability_they_promise():
    """At the number for a difference that is the truth (no doubt), four samples in five exclude zero."""
    random = np.random.default_rng(4)
    one = compare([-0.3, 0.1, -0.2, -0.1])
    (least, most) = needed_seeds(one, None, doubt=0.0)
    assert least == most
    found = 0
    for _ in range(ROUNDS):
        interval = compare(random.normal(one.interval.value, one.spreads[0], size=least)).interval
        found += not interval.low <= 0 <= interval.high
    assert 0.77 < found / ROUNDS < 0.87
    (low, high) = needed_seeds(one, None)  # one standard error more or less
    assert low < least < high
    assert needed_seeds(compare([0.3, -0.31, 0.1]), None)[1] is None  # less than one standard error from zero
    assert needed_seeds(compare([1.0, -1.0, 1e-9]), None, doubt=0.0) is None
    assert needed_seeds(compare([1.0]), 0.1) is None


def test_seeds_make_equivalent_what_is_within_the_margin_as_often():
    random = np.random.default_rng(5)
    one = compare([0.02, -0.03, 0.012, -0.001])
    (n, _) = needed_seeds(one, 0.02, doubt=0.0)
    found = 0
    for _ in range(ROUNDS):
        interval = compare(random.normal(one.interval.value, one.spreads[0], size=n)).interval
        found += interval.low >= -0.02 and interval.high <= 0.02
    assert 0.75 < found / ROUNDS < 0.9


def test_nothing_inside_the_margin_would_settle_as_different():
    """Nearer to its margin than to zero, which more seeds tell it from first."""
    inside = verdict([-0.018, -0.008, -0.025], margin=0.02)
    assert (inside.word, inside.toward) == ("inconclusive", "equivalent")
    assert verdict([-0.028, -0.008, -0.045], margin=0.02).toward == "different"
    within = {"B": compare([-0.011, -0.012, -0.0115]), **{name: compare([0.03, -0.02, 0.01]) for name in "CDEFGHIJ"}}
    assert within["B"].outside(0.0129) <= ALPHA
    assert judge_comparisons(within, "min", None)["B"].word == "better"
    assert judge_comparisons(within, "min", 0.0129)["B"].word == "inconclusive"  # and not better, either


def test_levels_are_those_of_published_tables():
    """O'Brien & Fleming's spending, two-sided .05, at looks of equal distance: z of Reboussin et al. 2000."""
    for looks, expected in {
        2: (2.963, 1.969),
        3: (3.710, 2.511, 1.993),
        5: (4.877, 3.357, 2.680, 2.290, 2.031),
    }.items():
        shares = tuple((index + 1) / looks for index in range(looks))
        found = [-stats.norm.ppf(level(shares[: index + 1], 0.05) / 2) for index in range(looks)]
        assert found == pytest.approx(expected, abs=0.003)
    assert spent(1.0, 0.05) == pytest.approx(0.05)


def test_one_look_at_all_that_was_declared_costs_nothing():
    for looks in (Looks(), Looks((3,)), Looks((6,), 6)):
        assert looks.adjust(0.03) == pytest.approx(0.03, rel=1e-3)
        assert not looks.exploratory
    early = Looks((3,), 6)
    assert early.adjust(spent(0.4, 0.05)) == pytest.approx(0.05)
    assert early.adjust(0.03) > 0.05
    grown, stepwise = Looks((3, 6), 6), Looks((3, 4, 5, 6), 6)
    assert grown.adjust(level((0.4, 0.6, 0.8, 1.0), 0.05)) == pytest.approx(0.05 * SPARED, rel=1e-3)
    assert grown.adjust(0.03) == stepwise.adjust(0.03)  # which of them were looked at may depend on what they showed
    assert [grown.adjust(p) for p in (0.0, 1.0)] == [pytest.approx(0, abs=1e-5), 1.0]
    assert 0.03 < Looks((3, 200), 200).adjust(0.03) < 0.1


def test_a_small_difference_is_called_real_only_after_all_corrections():
    """Six of twelve seeds: the interval alone excludes zero, as one in twenty does, which says nothing after looks."""
    one = compare([0.0029, 0.0012, 0.0049, 0.0058, 0.0009, 0.0041])
    assert one.interval.low > 0
    found = judge_comparisons({"B": one}, "min", 0.5, Looks((3, 6), 12))["B"]
    assert (found.word, found.note) == ("equivalent", "")
    assert found.adjusted > ALPHA
    assert "smaller than the margin" in judge_comparisons({"B": one}, "min", 0.5)["B"].note


def test_a_sweep_that_grew_without_a_maximum_has_no_verdict():
    clear = {"B": compare([-0.10, -0.11, -0.105, -0.1])}
    assert judge_comparisons(clear, "min", None)["B"].word == "better"
    grown = judge_comparisons(clear, "min", None, Looks((3, 4)))["B"]
    assert grown.word == "exploratory: no verdict"
    assert "3, then 4" in grown.note
    assert judge_comparisons(clear, "min", None, Looks((3, 4), 4))["B"].word == "better"


@pytest.mark.parametrize("most", [6, 12])
def test_following_the_number_of_seeds_does_not_double_the_false_verdicts(most):
    random = np.random.default_rng(most)
    paid = unpaid = 0
    for _ in range(500):
        differences = random.normal(size=most)
        paid += follow(differences, most, True)
        unpaid += follow(differences, most, False)
    assert paid / 500 <= 0.075  # of 500; the simulation has the exact share
    assert unpaid / 500 > 0.085


def follow(differences, most, pays):
    """Add the seeds that are said to be needed until there is a verdict; whether there was one, which is false."""
    looks = [3]
    while True:
        one = {"B": compare(differences[: looks[-1]])}
        found = judge_comparisons(one, "min", None, Looks(tuple(looks), most) if pays else Looks())["B"]
        if found.word in ("better", "worse"):
            return True
        if looks[-1] == most:
            return False
        looks.append(min(most, max(looks[-1] + 1, found.seeds[0] if found.seeds else most)))


def test_failures_are_the_worst_ranks():
    """Against scipy's exact signed ranks, with a number worse than all in place of each failure."""
    random = np.random.default_rng(6)
    values, others = arm(random.normal(size=7)), arm(random.normal(size=7))
    failed = [1, 3, 4, 6]
    left = {seed: value for seed, value in values.items() if seed not in failed}
    found = rank_failures(left, others, failed, [], "min")
    whole = [values[seed] - others[seed] if seed in left else 100 + seed for seed in values]
    assert found.worse >= 4
    assert found.better + found.worse == 7
    assert found.p == pytest.approx(stats.wilcoxon(whole, method="exact").pvalue, abs=0.05)  # ties among failures
    assert rank_failures(left, others, failed, [], "max").worse >= 4
    assert rank_failures({}, {}, [1, 2], [1, 2], "min").p == 1.0  # equal
    assert rank_failures({1: 0.0}, {2: 0.0}, [], [], "min") is None
    many = rank_failures(arm(random.normal(1, 1, 40)), arm(random.normal(0, 1, 40)), [], [], "max")
    assert many.p < 0.01


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
