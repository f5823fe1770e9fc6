"""Baselines know the training set or another holdout image, and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluate.drawing.baselines import TrainingImages, load_training_images, round_trip
from evaluate.metrics.pixels import psnr
from evaluate.subject import random_pairs
from nanodit.rng import generator


def row(key, bucket="64x64", group=None):
    return {"key": key, "bucket": bucket, "duplicate_group": group}


@given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=6), st.sampled_from(["64x64", "80x56"])), max_size=20))
def test_everybody_is_paired_with_somebody_else_of_the_same_bucket(items):
    rows = [row(key, bucket) for key, bucket in dict(items).items()]
    buckets = {one["key"]: one["bucket"] for one in rows}
    pairs = random_pairs(rows)
    for key, partner in pairs.items():
        assert partner != key
        assert buckets[partner] == buckets[key]
    sizes = list(buckets.values())
    assert set(pairs) == {key for key, bucket in buckets.items() if sizes.count(bucket) > 1}
    assert pairs == random_pairs(rows[::-1])


@given(st.lists(st.tuples(st.sampled_from(["64x64", "80x56"]), st.sampled_from("abc")), max_size=12))
def test_the_partner_is_the_next_one_on_the_ring_that_is_no_duplicate(items):
    rows = [row(f"{number:02d}", bucket, group) for number, (bucket, group) in enumerate(items)]
    expected = {}
    for bucket in {one["bucket"] for one in rows}:
        own = [one for one in rows if one["bucket"] == bucket]
        ring = [own[index] for index in generator("random pair", bucket).permutation(len(own))]
        for index, one in enumerate(ring):
            others = ring[index + 1 :] + ring[:index]
            foreign = [other for other in others if other["duplicate_group"] != one["duplicate_group"]]
            if others:
                expected[one["key"]] = (foreign or others)[0]["key"]
    assert random_pairs(rows) == expected


def test_partners_are_no_duplicates_where_that_is_possible():
    rows = [row("a", group="x"), row("b", group="x"), row("c", group="y")]
    groups = {one["key"]: one["duplicate_group"] for one in rows}
    assert all(groups[key] != groups[partner] for key, partner in random_pairs(rows).items())
    assert set(random_pairs(rows[:2])) == {"a", "b"}  # only duplicates: better than no baseline
    shoots = [row | {"split_group": group} for row, group in zip(rows, "xyxy")]
    of = {row["key"]: row["split_group"] for row in shoots}
    assert all(of[key] != of[partner] for key, partner in random_pairs(shoots).items())


def test_the_round_trip_is_close_but_not_exact(figures):
    images = np.stack([figures.pixels(r) for r in figures.rows() if r["bucket"] == "64x64"][:4])
    quality = psnr(round_trip(images), images)
    assert (quality > 35).all()
    assert np.isfinite(quality).all()


def test_mean_images_are_per_bucket_with_the_mean_colour_elsewhere():
    images = {"4x2": np.stack([np.full((2, 4, 3), 10, np.uint8), np.full((2, 4, 3), 31, np.uint8)])}
    training = TrainingImages(images, {"4x2": ["a", "b"]})
    assert np.array_equal(training.mean_image("4x2"), np.full((2, 4, 3), 20.5))
    assert np.array_equal(training.mean_image("2x6"), np.full((6, 2, 3), 20.5))
    with pytest.raises(ValueError, match="need training images"):
        TrainingImages({}, {})


def test_loading_training_images_shows_its_progress(figures, capsys):
    assert load_training_images(figures, {row["bucket"] for row in figures.rows()}, 40).count == 40
    assert "training images: 40 images" in capsys.readouterr().out


def test_the_affine_fit_is_the_least_squares_answer():
    """For x of variance s and mean m: a = (1 - t) s / ((1 - t)^2 s + t^2), b = m - a (1 - t) m."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, size=(60, 32, 32, 3), dtype=np.uint8)
    training = TrainingImages({"32x32": pixels}, {"32x32": [str(index) for index in range(60)]})
    x = pixels / 127.5 - 1
    variance, mean, t = x.var(), x.mean(), 0.6
    slope = (1 - t) * variance / ((1 - t) ** 2 * variance + t**2)
    a, b = training.affine(t - 1e-6, t + 1e-6)
    assert a == pytest.approx(slope, abs=0.01)
    assert b == pytest.approx(mean - slope * (1 - t) * mean, abs=0.01)
    assert training.affine(0.2, 0.3) == training.affine(0.2, 0.3)
