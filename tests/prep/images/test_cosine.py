"""Class tokens that are alike: exactly the pairs above the threshold, whichever way and in whichever order."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.images import cosine
from prep.images.cosine import Components, connect_near, count_pairs, regroup, unit_rows


def near_labels(vectors: np.ndarray, threshold: float) -> np.ndarray:
    """The groups of some vectors, all new, named after their first member."""
    groups, unit = Components(len(vectors)), unit_rows(vectors)
    connect_near(groups, lambda rows: unit[rows], threshold, np.arange(len(vectors)))
    return groups.labels()


def as_sets(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in labels}


def grouped_plainly(vectors: np.ndarray, threshold: float) -> set[frozenset[int]]:
    """The same by the definition: all pairs, and sets that are merged until nothing changes."""
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)
    sets = [{int(index), int(other)} for index, other in np.argwhere(unit @ unit.T > threshold)]
    sets += [{index} for index in range(len(vectors))]
    merged: list[set[int]] = []
    for one in sets:
        touching = [other for other in merged if other & one]
        merged = [other for other in merged if not other & one] + [one.union(*touching)]
    return {frozenset(one) for one in merged}


def features(seed: int, width: int, count: int = 60) -> np.ndarray:
    """Clusters of many radii, wide in some directions and narrow in others, around a mean of any length."""
    generator = np.random.default_rng(seed)
    spectrum = np.linspace(3, 0.1, width)
    centres = generator.standard_normal((12, width)) * spectrum
    noise = generator.uniform(0, 0.5, (count, 1)) * generator.standard_normal((count, width)) * spectrum
    mean = generator.uniform(0, 8) * generator.standard_normal(width)
    return (centres[generator.integers(0, 12, count)] + noise + mean).astype(np.float32)


def chains(seed: int, width: int, count: int = 60) -> np.ndarray:
    """Points of a circle: rows that only others between them connect."""
    angles = np.random.default_rng(seed).uniform(0, 2 * np.pi, count)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.pad(circle, ((0, 0), (0, width - 2))).astype(np.float32)


@pytest.fixture(scope="module", params=["as they are", "projected", "projected, in small tiles", "never all at once"])
def way(request) -> Iterator[str]:
    """How pairs are found."""
    monkeypatch = pytest.MonkeyPatch()
    if request.param != "as they are":
        monkeypatch.setattr(cosine, "FEW", 0)
        monkeypatch.setattr(cosine, "PRODUCT", 100.0)  # so that directions are worth it here
    if "tiles" in request.param:
        monkeypatch.setattr(cosine, "TILE", 7)
        monkeypatch.setattr(cosine, "CHUNK", 20)
        monkeypatch.setattr(cosine, "MEASURED", 3)
    if "never" in request.param:
        monkeypatch.setattr(cosine, "DENSE", 0)
    yield request.param
    monkeypatch.undo()


@pytest.mark.parametrize("width", [8, 96, 200])
@settings(deadline=None)  # a busy machine proves nothing
@given(seed=st.integers(0, 1000), threshold=st.sampled_from([0.9, 0.95, 0.98, 0.995]))
def test_rows_are_connected_exactly_by_the_pairs_above_the_threshold(way, width, seed, threshold):
    vectors = features(seed, width)
    assert as_sets(near_labels(vectors, threshold)) == grouped_plainly(vectors, threshold)


def test_the_ways_are_those_that_are_meant(way):
    found = cosine._find_directions(lambda rows: unit_rows(features(0, 200))[rows], 0.98, np.arange(60), np.arange(0))
    assert (found.basis is None) == (way == "as they are")


@settings(deadline=None)  # a busy machine proves nothing
@given(kind=st.sampled_from([features, chains]), seed=st.integers(0, 1000), data=st.data())
def test_adding_and_removing_rows_gives_what_comparing_all_gives(way, kind, seed, data):
    """Several rounds; in each some rows are gone, others are new, and only these are compared."""
    vectors, threshold = kind(seed, 40), data.draw(st.sampled_from([0.9, 0.98, 0.995]))
    unit = unit_rows(vectors)
    rows, labels = np.empty(0, np.int64), np.empty(0, np.int64)
    for _ in range(3):
        now = np.array(data.draw(st.lists(st.integers(0, 59), min_size=2, unique=True)))
        stays = np.isin(rows, now)
        lost_groups = labels[~stays]
        known = dict(zip(rows[stays].tolist(), labels[stays].tolist()))
        before = np.array([known.get(row, -1) for row in now.tolist()])
        lost = (before >= 0) & np.isin(before, lost_groups)
        compared: list[int] = []
        groups = regroup(before, lost, lambda some, now=now: unit[now[some]], threshold, compared.append)
        new, old = np.flatnonzero(before < 0), np.flatnonzero(before >= 0)
        connect_near(groups, lambda some, now=now: unit[now[some]], threshold, new, old, compared.append)
        rows, labels = now, groups.labels()
        assert as_sets(labels) == as_sets(near_labels(vectors[now], threshold))
        assert sum(compared) == count_pairs(int(lost.sum()), 0) + count_pairs(len(new), len(old))


def test_a_row_in_the_middle_of_a_chain_holds_it_together():
    angles = np.arange(3) * 0.19  # cos .19 is .982, cos .38 is .929
    unit = unit_rows(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    assert near_labels(unit, 0.98).tolist() == [0, 0, 0]
    groups = regroup(np.array([0, 0]), np.array([True, True]), lambda rows: unit[[0, 2]][rows], 0.98)
    assert groups.labels().tolist() == [0, 1]


def test_many_equal_rows_are_one_group_and_zeros_are_like_nothing(way):
    vectors = np.ones((400, 128), np.float32)
    assert len(as_sets(near_labels(vectors, 0.98))) == 1
    assert len(as_sets(near_labels(np.zeros((3, 128), np.float32), 0.98))) == 3


@pytest.mark.parametrize("width", [8, 384, 1024, 4096])
def test_a_row_alone_has_the_numbers_that_it_has_among_others(width):
    """Or groups would depend on which rows are compared at once."""
    vectors = features(0, width)
    unit = unit_rows(vectors)
    products = (unit[:-1].astype(np.float64) * unit[1:]).sum(axis=1)
    for row in range(len(vectors) - 1):
        pair = unit_rows(vectors[row : row + 1]), unit_rows(vectors[[row + 1, 0]])[:1]
        assert (pair[0].astype(np.float64) * pair[1]).sum(axis=1)[0] == products[row]


@settings(deadline=None)  # a busy machine proves nothing
@given(st.integers(1, 30), st.data())
def test_components_are_named_after_their_smallest_member(count, data):
    items = st.lists(st.integers(0, count - 1), min_size=10, max_size=10)
    left, right = (np.array(data.draw(items)) for _ in range(2))
    groups = Components(count)
    groups.connect(left[:5], right[:5])
    groups.connect(left[5:], right[5:])
    expected = np.arange(count)
    for _ in range(count):
        for a, b in zip(left, right):
            expected[a] = expected[b] = min(expected[a], expected[b])
    assert groups.labels().tolist() == expected.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("width", [8, 200])
def test_a_row_that_is_no_number_hides_no_pair(width, bad):
    vectors = features(3, width)
    wanted = as_sets(near_labels(vectors, 0.95))
    assert len(wanted) < len(vectors)
    spoilt = np.insert(vectors, 30, 1, axis=0)
    spoilt[30, 2] = bad
    labels = near_labels(spoilt, 0.95)
    assert (labels == labels[30]).sum() == 1
    assert as_sets(np.delete(labels, 30)) == wanted
