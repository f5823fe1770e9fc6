"""Near duplicates and the split: by content, groups on one side, and never changing once published."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prep.dedup import assign_splits, duplicate_groups, holdout_size, perceptual_hash, thumbnail
from prep.figures import draw_figure

KEYS = st.lists(st.text("0123456789abcdef", min_size=4, max_size=4), min_size=1, max_size=60, unique=True)


def photograph(seed: int, side: int = 256) -> np.ndarray:
    """Smooth random colours with some detail: neighbouring frequencies as in a photograph."""
    generator = np.random.default_rng(seed)
    layers = [
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).resize((side, side), 3)
        for size in (3, 6, 12, 24)
    ]
    weights = np.array([0.5, 0.25, 0.15, 0.1])
    return sum(w * np.asarray(layer, float) for w, layer in zip(weights, layers)).astype(np.uint8)


def groups_of(pictures: list[np.ndarray]) -> dict[str, str]:
    keys = [f"{number:04x}" for number in range(len(pictures))]
    return duplicate_groups(keys, [perceptual_hash(p) for p in pictures], [thumbnail(p) for p in pictures])


def edited(pixels: np.ndarray, edit: str) -> np.ndarray:
    image = Image.fromarray(pixels)
    if edit == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=50)
        return np.asarray(Image.open(buffer))
    if edit == "half the size":
        return np.asarray(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS))
    return np.clip(pixels.astype(int) + 1, 0, 255).astype(np.uint8)  # a little brighter


@pytest.mark.parametrize("edit", ["jpeg", "half the size", "brighter"])
def test_edited_copies_are_grouped_and_other_pictures_are_not(edit):
    originals = [photograph(seed) for seed in range(12)]
    groups = groups_of(originals + [edited(pixels, edit) for pixels in originals])
    assert [groups[f"{number:04x}"] for number in range(12, 24)] == [f"{number:04x}" for number in range(12)]
    assert len(set(groups.values())) == 12


def test_different_figures_on_one_background_are_not_duplicates():
    pictures = [np.asarray(draw_figure(1, index, 64).image.resize((64, 64))) for index in range(150)]
    assert len(set(groups_of(pictures).values())) == len(pictures)


def test_groups_are_transitive_and_named_after_their_smallest_key():
    base = photograph(0)
    chain = [np.clip(base.astype(int) + step, 0, 255).astype(np.uint8) for step in (0, 2, 4)]
    groups = duplicate_groups(["c", "b", "a"], [perceptual_hash(p) for p in chain], [thumbnail(p) for p in chain])
    assert groups == {"a": "a", "b": "a", "c": "a"}
    assert duplicate_groups([], [], []) == {}


def test_many_equal_pictures_are_one_group():
    assert len(set(groups_of([np.zeros((64, 64, 3), np.uint8)] * 300).values())) == 1


@pytest.mark.parametrize(
    ("count", "size"), [(1, 0), (4, 0), (5, 1), (100, 20), (320, 64), (2500, 64), (3200, 64), (10_000, 200)]
)
def test_the_size_of_the_holdout(count, size):
    assert holdout_size(count, 0.02, 64) == size


@given(KEYS, st.integers(0, 5))
def test_trap_10_the_split_follows_the_content_not_the_order(keys, seed):
    alone = {key: key for key in keys}
    split = assign_splits(alone, {}, seed, 0.02, 64).sides
    assert split == assign_splits(dict(reversed(alone.items())), {}, seed, 0.02, 64).sides  # trap 10
    assert sum(side == "holdout" for side in split.values()) == holdout_size(len(keys), 0.02, 64)


def test_trap_10_the_holdout_is_not_the_first_keys():
    keys = [f"{number:08x}" for number in range(1000)]
    split = assign_splits({key: key for key in keys}, {}, 0, 0.02, 64).sides
    held = [number for number, key in enumerate(keys) if split[key] == "holdout"]
    assert 350 < np.mean(held) < 650  # trap 10
    other = assign_splits({key: key for key in keys}, {}, 1, 0.02, 64).sides
    assert other != split


@given(KEYS, st.data())
def test_trap_10_groups_lie_on_one_side_and_published_keys_stay(keys, data):
    groups = {key: min([*keys[: 1 + index % 3], key]) for index, key in enumerate(keys)}
    first = assign_splits({key: groups[key] for key in keys[: len(keys) // 2]}, {}, 0, 0.1, 10).sides
    split = assign_splits(groups, first, 0, 0.1, 10)
    assert {key: split.sides[key] for key in first} == first
    assert set(split.sides) | set(split.linking) == set(keys)
    new_sides = {(groups[key], split.sides[key]) for key in keys if key in split.sides and key not in first}
    assert len({group for group, _ in new_sides}) == len(new_sides)  # trap 10
    old_sides = {(groups[key], side) for key, side in first.items()}
    for group, side in new_sides:
        assert {old for name, old in old_sides if name == group} <= {side}


def test_a_new_sample_that_would_link_both_sides_is_left_out():
    published = {"a": "train", "b": "holdout", "x": "train"}
    split = assign_splits({"a": "a", "b": "a", "new": "a", "x": "x", "y": "x"}, published, 0, 0.5, 0)
    assert split.linking == ["new"]
    assert split.sides == {**published, "y": "train"}
