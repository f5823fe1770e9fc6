"""Precision, recall, density and coverage against their formulas, image by image, and at the ends of their scales."""

import tracemalloc

import numpy as np
import pytest

from evaluate.metrics import manifolds
from evaluate.metrics.manifolds import COUNT_K, GROUPS, NEEDED, SHARE_K, Balls, fidelity

NAMES = ("precision", "recall", "density", "coverage")


def alone(count):
    return [f"{index:04d}" for index in range(count)]


def measured(pictures, reference):
    """Return the values of sets whose images are each a cluster of its own."""
    found = fidelity(*(Balls.of(own, alone(len(own))) for own in (pictures, reference)))
    return {name: found[name].value for name in NAMES}


def by_formula(pictures, reference):
    """Return the four values as the papers write them, one image after the other."""
    pictures, reference = (np.asarray(own, np.float64) for own in (pictures, reference))

    def radius(points, place, k):
        return np.sort(np.linalg.norm(np.delete(points, place, 0) - points[place], axis=1))[k - 1]

    def holding(point, points, k):
        return sum(np.linalg.norm(point - own) <= radius(points, place, k) for place, own in enumerate(points))

    near = [
        any(np.linalg.norm(picture - own) <= radius(reference, place, COUNT_K) for picture in pictures)
        for place, own in enumerate(reference)
    ]
    return {
        "precision": np.mean([holding(one, reference, SHARE_K) > 0 for one in pictures]),
        "recall": np.mean([holding(one, pictures, SHARE_K) > 0 for one in reference]),
        "density": np.mean([holding(one, reference, COUNT_K) for one in pictures]) / COUNT_K,
        "coverage": np.mean(near),
    }


def two_sets(n, m, width=6, narrower=0.7, seed=0):
    random = np.random.default_rng(seed)
    return narrower * random.normal(size=(n, width)) + 3.4, random.normal(size=(m, width)) + 3


@pytest.mark.parametrize(("n", "m"), [(40, 40), (25, 60), (60, 25), (NEEDED, NEEDED)])
@pytest.mark.parametrize("chunk", [2**21, 64])  # all at once, and a row or two at a time
def test_values_are_those_of_the_formulas(n, m, chunk, monkeypatch):
    monkeypatch.setattr(manifolds, "_CHUNK", chunk)
    pictures, reference = two_sets(n, m)
    assert measured(pictures, reference) == pytest.approx(by_formula(pictures, reference), abs=1e-6)


def test_what_is_left_out_is_as_if_it_had_never_been_there(monkeypatch):
    """The jackknife's values are the formulas' without each group of clusters, from either set."""
    seen = {}
    monkeypatch.setattr(manifolds, "_interval", lambda values, clusters, without, n, exact: without)
    monkeypatch.setattr(manifolds, "GROUPS", 5)
    monkeypatch.setattr(manifolds, "LISTED", 0)  # so that the next neighbours have to be looked for again
    pictures, reference = two_sets(30, 40)
    balls = [Balls.of(own, [f"{index // 3:02d}" for index in range(len(own))]) for own in (pictures, reference)]
    seen = fidelity(*balls)
    assert [balls[0].count, balls[1].count] == [5, 5]
    for group in range(1, 6):
        own, others = (one.features[one.groups != group] for one in balls)
        for side, expected in enumerate((by_formula(own, reference), by_formula(pictures, others))):
            found = {name: seen[name][side][group - 1] for name in NAMES}
            assert found == pytest.approx(expected, abs=1e-6), (group, side)


def test_a_cluster_is_left_out_as_one():
    clusters = [f"{index // 5:02d}" for index in range(200)]
    balls = Balls.of(two_sets(200, 8)[0], clusters)
    assert balls.count == GROUPS
    assert all(len(set(balls.groups[start : start + 5])) == 1 for start in range(0, 200, 5))
    assert fidelity(balls, balls)["recall"].n == 40


def test_intervals_hold_the_value_that_other_sets_have_on_average():
    """They are too long, never too short; docs/measurements.md has those that would hold the balls still."""
    many = [two_sets(60, 60, narrower=1, seed=seed) for seed in range(60)]
    found = [fidelity(*(Balls.of(own, alone(60)) for own in sets)) for sets in many]
    for name in NAMES:
        mean = np.mean([one[name].value for one in found])
        assert np.mean([one[name].low <= mean <= one[name].high for one in found]) >= 0.93, name
        assert all(0 <= one[name].low <= one[name].value <= one[name].high for one in found)
        assert name == "density" or max(one[name].high for one in found) <= 1
        assert np.mean([one[name].high - one[name].low for one in found]) < 8 * np.std(
            [one[name].value for one in found]
        )


def test_the_reference_itself_is_at_the_top():
    _, reference = two_sets(1, 50)
    found = measured(reference, reference)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert found["density"] >= 1  # each image lies in its own ball, and in those of about COUNT_K others
    interval = fidelity(*[Balls.of(reference, alone(50))] * 2)["precision"]
    assert (interval.low, interval.high) == pytest.approx((0.025 ** (1 / 50), 1))  # nothing varies: the exact one


def test_far_pictures_are_at_the_bottom():
    pictures, reference = two_sets(30, 50)
    assert set(measured(pictures + 1000, reference).values()) == {0}


def test_constant_features_are_no_division_by_zero():
    _, reference = two_sets(1, 50)
    constant = np.full((20, 6), reference[7])
    found = measured(constant, reference)
    assert found["precision"] == 1  # one image that is there
    assert found["recall"] <= 1 / 50
    assert found["coverage"] < 0.5
    apart = measured(np.full((20, 6), 99.0), reference)
    assert set(apart.values()) == {0}
    same = measured(constant, np.full((30, 6), reference[7]))  # balls of radius 0, and all centres in one place
    assert same == {"precision": 1, "recall": 1, "density": 30 / COUNT_K, "coverage": 1}


def test_a_common_offset_takes_no_digits():
    """Features of a network share most of their length: distances are counted from their mean."""
    pictures, reference = two_sets(40, 40)
    assert measured(pictures + 300, reference + 300) == pytest.approx(by_formula(pictures, reference), abs=0.03)


@pytest.mark.parametrize("count", [0, 1, 2, NEEDED - 1])
def test_too_few_images_are_refused(count):
    with pytest.raises(ValueError, match=f"of {NEEDED} images and more"):
        Balls.of(np.zeros((count, 4)), alone(count))


def test_two_widths_are_refused():
    one, other = (Balls.of(np.eye(8)[:, :width], alone(8)) for width in (4, 5))
    with pytest.raises(ValueError, match="two widths"):
        fidelity(one, other)


def test_few_clusters_have_no_bounds():
    pictures, reference = two_sets(30, 30)
    few = fidelity(Balls.of(pictures, [str(index % 7) for index in range(30)]), Balls.of(reference, alone(30)))
    for interval in few.values():
        assert (interval.low, interval.high, interval.n) == (None, None, 7)


def test_no_table_of_all_pairs_is_held():
    """6000 x 6000 distances are 144 MB in float32."""
    pictures, reference = (np.float32(one) for one in two_sets(6000, 6000, width=2))
    tracemalloc.start()
    try:
        fidelity(Balls.of(pictures, alone(6000)), Balls.of(reference, alone(6000)))
        assert tracemalloc.get_traced_memory()[1] < 72e6
    finally:
        tracemalloc.stop()
