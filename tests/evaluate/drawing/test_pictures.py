"""A picture is asked for by name and drawn once, from what it was to be given and nothing else."""

import numpy as np
import pytest
import torch

from evaluate.drawing.pictures import Picture, batches, compose, once
from evaluate.subject import read_batch
from nanodit.rng import noise
from train.data.samples import load_conditions
from train.model.mirror import flip_pose

ALL = frozenset({"text", "cls", "patches", "pose"})


@pytest.fixture
def rows(figures):
    return {row["key"]: row for row in figures.rows()}


@pytest.fixture
def bucket(figures):
    """Three holdout samples of one bucket."""
    members = {}
    for row in figures.rows("holdout"):
        members.setdefault(row["bucket"], []).append(row)
    return next(own for own in members.values() if len(own) >= 3)[:3]


def test_a_picture_of_everything_is_given_what_the_sample_stores(figures, rows, bucket):
    batch = compose(figures, rows, [Picture(row["key"], "all", ALL) for row in bucket], None)
    stored = load_conditions(figures, bucket)
    for name in ("keep", "text", "text_mask", "cls", "patches", "pose"):
        assert torch.equal(getattr(batch.conditions, name), getattr(stored.keeping(ALL), name)), name
    assert np.array_equal(batch.pixels, read_batch(figures, tuple(bucket)).pixels)
    assert batch.noise(3)[1].numpy().tobytes() == noise(bucket[1]["key"], 3, batch.height, batch.width).tobytes()


def test_donors_text_and_mirror_replace_one_condition_each(figures, rows, bucket):
    a, b, c = (row["key"] for row in bucket)
    own = np.full((5, 8), 2.0, np.float16)
    pictures = [
        Picture(a, "x", ALL, donors={"cls": b, "patches": c}),
        Picture(b, "x", ALL, text="a blue hat"),
        Picture(c, "x", ALL, mirrored_pose=True),
    ]
    batch = compose(figures, rows, pictures, lambda text: own if text == "a blue hat" else None)
    given = batch.conditions
    assert np.array_equal(given.cls[0], figures.cls(rows[b]))
    assert np.array_equal(given.patches[0], figures.patches(rows[c]))
    assert np.array_equal(given.text[0, :12], figures.t5(rows[a]))
    assert np.array_equal(given.text[1, :5], own)
    assert given.text_mask[1].sum() == 5
    assert np.array_equal(given.pose[1], figures.pose(rows[b]))
    assert np.array_equal(given.pose[2], flip_pose(figures.pose(rows[c])))
    assert [row["key"] for row in batch.rows] == [a, b, c]  # noise and truth stay the sample's own


def test_what_is_not_kept_is_not_given(figures, rows, bucket):
    batch = compose(figures, rows, [Picture(row["key"], "text", frozenset({"text"})) for row in bucket], None)
    assert batch.conditions.cls is batch.conditions.patches is batch.conditions.pose is None
    nothing = compose(figures, rows, [Picture(bucket[0]["key"], "nothing", frozenset())], None)
    assert not nothing.conditions.keep.any()


def test_real_images_that_nobody_looks_at_are_not_read(figures, rows, bucket, monkeypatch):
    pictures = [Picture(row["key"], "text", frozenset({"text"})) for row in bucket]
    whole = compose(figures, rows, pictures, None)
    monkeypatch.setattr(figures, "pixels", lambda row: pytest.fail("read"))
    batch = compose(figures, rows, pictures, None, real=False)
    assert (batch.pixels.shape, batch.pixels.any()) == (whole.pixels.shape, False)
    assert np.array_equal(batch.noise(0), whole.noise(0))
    assert np.array_equal(batch.conditions.text, whole.conditions.text)


def test_a_donor_of_patches_must_be_of_the_bucket(figures, rows, bucket):
    size = figures.pixels(bucket[0]).shape
    other = next(row for row in figures.rows("holdout") if figures.pixels(row).shape != size)
    pictures = [
        Picture(bucket[0]["key"], "x", ALL),
        Picture(bucket[1]["key"], "x", ALL, donors={"patches": other["key"]}),
    ]
    with pytest.raises(ValueError, match="another bucket"):
        compose(figures, rows, pictures, None)


def test_a_picture_that_two_tests_want_is_drawn_once():
    a, b = Picture("a", "all", ALL), Picture("b", "all", ALL)
    assert once([b, a, Picture("a", "all", ALL)]) == [a, b]
    with pytest.raises(ValueError, match="two different pictures"):
        once([a, Picture("a", "all", frozenset())])


def test_batches_never_mix_buckets_conditions_or_seeds():
    pictures = [
        Picture(f"{index:02d}", label, ALL, seed=seed) for index in range(9) for label in "xy" for seed in (0, 1)
    ]
    buckets = {f"{index:02d}": "64x64" if index % 2 else "56x80" for index in range(9)}
    found = list(batches(pictures, buckets, 3))
    assert sorted(picture.name for batch in found for picture in batch.pictures) == sorted(p.name for p in pictures)
    assert len({batch.name for batch in found}) == len(found) == 2 * 2 * (2 + 2)
    for batch in found:
        assert len(batch.pictures) <= 3
        assert {(p.condition, p.seed, buckets[p.key]) for p in batch.pictures} == {
            (batch.condition, batch.seed, batch.bucket)
        }


def test_names_of_batches_are_names_of_files():
    labels = ("swap/both", "swap_both", "text@1.5", "edit/opposite/0", "a b")
    found = [next(batches([Picture("a", label, ALL)], {"a": "64x64"}, 1)).name for label in labels]
    assert len(set(found)) == len(labels)
    assert not any("/" in name for name in found)


@pytest.mark.parametrize("wrong", [{"donors": {"dino": "b"}}, {"donors": {"text": "b"}, "text": "c"}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match="picture x"):
        Picture("a", "x", ALL, **wrong)
