"""Distances between sets against torchmetrics and against their formulas; intervals against simulation."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from evaluate.metrics import distances
from evaluate.metrics.distances import Distance, as_points, cmmd, frechet, kid, nearest, spread
from evaluate.statistics.intervals import Interval, more_samples


class Features(torch.nn.Module):
    """Takes features for images, so that the reference computes nothing but the distance."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features):
        return features


def two_sets(n, width, shift=0.5, seed=0):
    """Correlated features with a mean of their own, and a second set that differs in mean and covariance."""
    random = np.random.default_rng(seed)
    mixture = random.normal(size=(width, width)) / np.sqrt(width)
    first = random.normal(size=(n, width)) @ mixture + 1
    second = random.normal(size=(n, width)) @ (mixture + 0.3 * np.eye(width)) + 1 + shift
    return first, second


@pytest.mark.parametrize("width", [4, 48])
@pytest.mark.filterwarnings("ignore:Metric:UserWarning")  # that it keeps all features
def test_kid_equals_torchmetrics(width):
    first, second = two_sets(100, width)
    reference = KernelInceptionDistance(Features(width), subsets=1, subset_size=100).set_dtype(torch.float64)
    reference.update(torch.from_numpy(second), real=True)
    reference.update(torch.from_numpy(first), real=False)
    assert kid(first, second).value == pytest.approx(float(reference.compute()[0]), rel=1e-6)


@pytest.mark.parametrize("measure", [kid, cmmd])
def test_kernel_distances_take_all_of_a_larger_reference(measure):
    """Unbiased at any size, as the formula has it, and less noisy; the jackknife leaves out pictures of either set."""
    many = [two_sets(400, 8, seed=seed) for seed in range(60)]
    at = {m: [measure(first[:40], second[:m]) for first, second in many] for m in (40, 400)}
    few, all_of_it = (np.array([one.value for one in at[m]]) for m in (40, 400))
    assert all_of_it.std() < 0.9 * few.std()
    assert abs(all_of_it.mean() - few.mean()) < 3 * few.std() / np.sqrt(len(few))
    first, second = many[0]
    own = measure(first[:40], second)
    assert own.without[0][3] == pytest.approx(measure(np.delete(first[:40], 3, 0), second).value)
    assert own.without[1][7] == pytest.approx(measure(first[:40], np.delete(second, 7, 0)).value)
    with pytest.raises(ValueError, match="not comparable"):
        own.above(measure(first[:40], second[:40]))


def test_cmmd_is_the_distance_of_means_and_blind_to_modes():
    """What its documentation says: two modes on one axis and two on another have one mean; KID tells them apart."""
    signs = np.tile([[1.0], [-1.0]], (100, 1))
    mean, first, second = np.eye(3)
    one, other = (distances.unit(mean + signs * axis) for axis in (first, second))
    assert abs(cmmd(one, other).value) < 0.15
    assert kid(one, other).value > 0.05
    moved = distances.unit(one + 0.3 * second)
    assert cmmd(one, moved).value == pytest.approx(10 * np.sum((one.mean(0) - moved.mean(0)) ** 2), abs=0.15)


@pytest.mark.parametrize("width", [4, 48])
def test_the_frechet_distance_equals_torchmetrics(width):
    first, second = two_sets(100, width)
    reference = FrechetInceptionDistance(Features(width)).set_dtype(torch.float64)
    reference.update(torch.from_numpy(second), real=True)
    reference.update(torch.from_numpy(first), real=False)
    assert frechet(first, second).value == pytest.approx(float(reference.compute()), rel=1e-6)


def test_the_frechet_distance_is_exact_where_covariances_are_singular():
    """Features on a line: the distance of the two normal distributions along it, and what differs in between."""
    values = np.random.default_rng(0).normal(size=(2, 64))
    direction = np.array([0.6, 0.8, 0])
    first, second = values[0][:, None] * direction, 3 * values[1][:, None] * direction + [0, 0, 2]
    gap = (values[0].mean() - 3 * values[1].mean()) ** 2 + 4
    expected = gap + (values[0].std(ddof=1) - 3 * values[1].std(ddof=1)) ** 2
    assert frechet(first, second).value == pytest.approx(expected, rel=1e-9)
    assert frechet(first, first).value == pytest.approx(0, abs=1e-9)


def test_cmmd_equals_its_formula():
    """Equation 4 of the paper by hand, and the biased form that its published code computes."""
    first, second = two_sets(30, 12)
    x, y = (features / np.linalg.norm(features, axis=1, keepdims=True) for features in (first, second))

    def kernel(a, b):
        return np.array([[np.exp(-np.sum((p - q) ** 2) / (2 * 10**2)) for q in b] for p in a])

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    unbiased = (xx.sum() - 30 + yy.sum() - 30) / (30 * 29) - 2 * xy.mean()
    assert cmmd(first, second).value == pytest.approx(1000 * unbiased, rel=1e-9)
    biased = xx.mean() + yy.mean() - 2 * xy.mean()
    offset = (2 - (xx.sum() + yy.sum() - 60) / (30 * 29)) / 30  # what x = x adds
    assert cmmd(first, second).value == pytest.approx(1000 * (biased - offset), rel=1e-9)
    assert cmmd(5 * first, second).value == pytest.approx(cmmd(first, second).value)  # of unit length


@pytest.mark.parametrize("measure", [kid, cmmd])
def test_leaving_pictures_out_is_computing_it_without_them(measure):
    first, second = two_sets(12, 5)
    x, y = (distances.unit(features) if measure is cmmd else features for features in (first, second))
    kernel = {
        kid: lambda a, b: (a @ b.T / 5 + 1) ** 3,
        cmmd: lambda a, b: 1000 * np.exp((a @ b.T - 1) / 100),
    }[measure]

    def mmd(x, y):
        n, m = len(x), len(y)
        xx, yy = kernel(x, x), kernel(y, y)
        within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
        return within - 2 * kernel(x, y).mean()

    whole = measure(first, second)
    assert whole.without[0] == pytest.approx([mmd(np.delete(x, i, 0), y) for i in range(12)], rel=1e-8)
    assert whole.without[1] == pytest.approx([mmd(x, np.delete(y, i, 0)) for i in range(12)], rel=1e-8)


@pytest.mark.parametrize("measure", [kid, cmmd])
def test_unbiased_distances_may_be_negative_and_are_zero_on_average(measure):
    values = [measure(*two_halves(40, 6, seed)).value for seed in range(300)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)


def two_halves(n, width, seed, shift=0.0, scale=1.0):
    """Two sets of one distribution, away from zero; the first one moved and stretched."""
    random = np.random.default_rng([seed, n])
    first, second = random.normal(size=(2, n, width))
    place = 3 * np.eye(width)[1]
    return first * scale + place + shift * np.eye(width)[0], second + place


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.3, 1.2), (1.5, 1.2)])
@pytest.mark.parametrize("measure", [kid, cmmd, frechet])
def test_intervals_cover_what_they_claim(measure, shift, scale):
    """At least 95 % (with the error of 150 rounds), and not by being endless; near equal sets they are too long."""
    found = [measure(*two_halves(64, 8, seed, shift, scale)) for seed in range(150)]
    truth = np.mean([one.value for one in found])
    intervals = [one.interval() for one in found]
    assert np.mean([one.low <= truth <= one.high for one in intervals]) >= 0.92
    half = np.mean([one.high - one.low for one in intervals]) / 2
    assert half < (2 if shift < 1 else 1.5) * 1.96 * np.std([one.value for one in found])


def test_pairing_with_the_floor_takes_away_what_both_share():
    """Drawn pictures that are nearly the real ones: nothing but what they differ in is left."""
    random = np.random.default_rng(5)
    real, train = random.normal(size=(2, 200, 8)) + 1
    drawn = real + 0.02 * random.normal(size=real.shape)
    model, floor = kid(drawn, train), kid(real, train)
    above = model.above(floor)
    assert above.value == pytest.approx(model.value - floor.value)
    assert above.high - above.low < 0.2 * (model.interval().high - model.interval().low)
    assert floor.above(floor) == Interval(0, 0, 0, 200)


def test_differences_cover_what_they_claim():
    found = []
    for seed in range(200):
        random = np.random.default_rng([seed, 7])
        real, train = random.normal(size=(2, 48, 6)) + 1
        found.append(kid(real + 0.4 * random.normal(size=real.shape) + 0.2, train).above(kid(real, train)))
    truth = np.mean([one.value for one in found])
    assert 0.92 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.99


def test_nothing_is_compared_across_n():
    first, second = two_sets(64, 4)
    with pytest.raises(ValueError, match="one n and one width"):
        frechet(first, second[:32])
    with pytest.raises(ValueError, match="not comparable"):
        kid(first, second).above(kid(first[:32], second[:32]))
    with pytest.raises(ValueError, match="not comparable"):
        kid(first, second).above(cmmd(first, second))
    with pytest.raises(ValueError, match="not comparable"):
        Distance.mean([frechet(first, second), frechet(first[:32], second[:32])])


def test_the_frechet_distance_refuses_fewer_than_two_pictures_for_each_feature():
    first, second = two_sets(95, 48)
    with pytest.raises(ValueError, match="needs 96"):
        frechet(first, second)


def test_too_few_pictures_carry_no_interval():
    assert kid(*two_sets(7, 4)).interval().low is None
    assert kid(*two_sets(8, 4)).interval().low is not None
    with pytest.raises(ValueError, match="needs 3"):
        kid(*two_sets(2, 4))


def test_the_mean_over_noises_is_of_values_at_one_n():
    first, second = two_sets(40, 4)
    other = first + 0.1
    mean = Distance.mean([kid(first, second), kid(other, second)])
    assert mean.value == pytest.approx((kid(first, second).value + kid(other, second).value) / 2)
    assert mean.n == 40
    assert Distance.mean([kid(first, second)] * 3).interval().high == pytest.approx(kid(first, second).interval().high)


def test_memory_is_bounded_and_changes_nothing(monkeypatch):
    first, second = two_sets(50, 6)
    whole = kid(first, second), spread(first), nearest(first, second, 3)
    monkeypatch.setattr(distances, "_CHUNK", 200)  # four rows at a time
    parts = kid(first, second), spread(first), nearest(first, second, 3)
    assert parts[0].value == pytest.approx(whole[0].value, rel=1e-10)
    assert parts[0].without[1] == pytest.approx(whole[0].without[1], rel=1e-10)
    assert parts[1][1] == pytest.approx(whole[1][1])
    assert np.array_equal(parts[2][1], whole[2][1])


def test_spread_is_the_mean_over_pairs():
    points = np.random.default_rng(0).normal(size=(9, 3))
    pairs = [np.linalg.norm(a - b) for i, a in enumerate(points) for b in points[:i]]
    value, without = spread(points)
    assert value == pytest.approx(np.mean(pairs))
    assert without[4] == pytest.approx(spread(np.delete(points, 4, 0))[0])


def test_the_nearest_come_first():
    points = np.array([[0.0, 0], [3, 4], [0, 1], [9, 9]])
    found, indices = nearest(np.array([[0.0, 0], [3, 3]]), points, 3)
    assert indices.tolist() == [[0, 2, 1], [1, 2, 0]]
    assert found[0] == pytest.approx([0, 1, 5], abs=1e-7)


def test_points_have_a_scale_in_both_spaces():
    black, white = np.zeros(768), np.ones(768)
    assert np.linalg.norm(np.subtract(*as_points([black, white], "feature_pixels"))) == pytest.approx(1)
    opposite = as_points([[0.0, 2.0], [0.0, -7.0]], "feature")
    assert np.linalg.norm(opposite[0] - opposite[1]) == pytest.approx(2)


def test_how_many_more_samples_an_interval_asks_for():
    assert more_samples(Interval(1.0, -1.0, 3.0, 50)) == 150  # half as wide at four times n
    assert more_samples(Interval(-1.0, -3.0, 1.0, 50)) == 150
    assert more_samples(Interval(1.0, 0.5, 1.5, 50)) is None
    assert more_samples(Interval(1.0, None, None, 5)) is None
