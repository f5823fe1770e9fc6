"""The judge of likeness is none of the encoders that the model knows, and sees the same in every batch."""

from copy import copy

import numpy as np
import pytest

from evaluate.metrics import training_features as features
from evaluate.metrics.likeness import cosine, demo_judge, open_judge, pixel_features
from evaluate.metrics.training_features import load_train_features
from nanodit.errors import ConfigError
from prep.encoders.demo import build_demo_encoders, demo_folder
from prep.encoders.dinov3 import DINOv3Encoder


@pytest.fixture(scope="module")
def judge(figures):
    found, reason = open_judge(None, figures, "cpu")
    assert reason is None
    return found


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of one's own."""
    monkeypatch.setenv("NANODIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pixels_of(figures, count):
    rows = [row for row in figures.rows("holdout") if row["bucket"] == figures.rows("holdout")[0]["bucket"]]
    return np.stack([figures.pixels(row) for row in rows[:count]])


def test_the_demo_judge_is_another_network_than_the_demo_condition(figures, judge):
    condition = DINOv3Encoder(build_demo_encoders(demo_folder()).dino, input_scale=1.0)
    pixels = pixels_of(figures, 2)
    assert not np.allclose(judge.features(pixels), condition.encode(pixels)[0], atol=0.1)
    assert judge.encoder.fingerprint()["content"] != condition.fingerprint()["content"]
    assert "not a quality claim" in judge.label


def test_its_folder_is_built_once_with_equal_bytes(cache, judge):
    folder = demo_judge()
    assert demo_judge() == folder
    assert DINOv3Encoder(folder, input_scale=1.0).fingerprint() == judge.encoder.fingerprint()


def test_it_orders_pictures_by_likeness(figures, judge):
    pixels = pixels_of(figures, 3)
    noisy = np.clip(pixels + np.random.default_rng(0).normal(0, 60, pixels.shape), 0, 255).astype(np.uint8)
    a, b, other = (judge.features(images) for images in (pixels, noisy, np.roll(pixels, 1, axis=0)))
    assert cosine(a, a) == pytest.approx(1, abs=1e-6)
    assert (cosine(a, b) < 1).all()
    assert (cosine(a, other) < 1).all()


def test_photographs_are_judged_by_the_other_dino_or_not_at_all(figures, cache, monkeypatch):  # fault E04
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: None)
    photographs = copy(figures)
    for recorded, wanted in (("facebook/dinov3-vitl16", "dinov2"), ("facebook/dinov2-large", "dinov3")):
        layers = {**figures.info["layers"], "dino": {"encoder": {"model": recorded}}}
        photographs.info = {**figures.info, "encoders": "production", "layers": layers}
        found, reason = open_judge(None, photographs, "cpu")
        assert found is None
        assert wanted in reason
        assert "hf download" in reason
    with pytest.raises(ConfigError, match="no/where"):
        open_judge("no/where", photographs, "cpu")


def test_the_condition_itself_is_no_judge(figures):
    condition = DINOv3Encoder(build_demo_encoders(demo_folder()).dino, input_scale=1.0)
    known = copy(figures)
    known.info = {**figures.info, "layers": {**figures.info["layers"], "dino": {"encoder": condition.fingerprint()}}}
    with pytest.raises(ConfigError, match="conditioned on"):
        open_judge(str(build_demo_encoders(demo_folder()).dino), known, "cpu")


def test_pixel_features_are_exact_means_over_areas():
    image = np.zeros((1, 24, 40, 3), np.uint8)
    image[0, :12, :, 0] = 255
    image[0, :, 20:, 1] = 51
    grid = pixel_features(image).reshape(16, 16, 3)
    assert np.allclose(grid[:8, :, 0], 1)
    assert np.allclose(grid[8:, :, 0], 0)
    assert np.allclose(grid[:, 8:, 1], 0.2)
    noise = np.random.default_rng(1).integers(0, 256, (2, 56, 80, 3), dtype=np.uint8)
    assert np.allclose(pixel_features(noise).reshape(2, -1, 3).mean(1), noise.mean((1, 2)) / 255, atol=1e-6)
    assert np.allclose(pixel_features(noise, 1).ravel(), (noise.mean((1, 2)) / 255).ravel(), atol=1e-6)


def test_features_of_training_images_are_computed_once(figures, judge, cache, monkeypatch):
    first = load_train_features(figures, judge, 20)
    monkeypatch.setattr(features, "_compute", lambda *arguments: pytest.fail("computed again"))
    again = load_train_features(figures, judge, 20)
    assert first.keys == again.keys == tuple(sorted(row["key"] for row in figures.rows("train"))[:20])
    assert np.array_equal(first.feature, again.feature)
    assert np.array_equal(first.feature_pixels, again.feature_pixels)
    row = next(row for row in figures.rows("train") if row["key"] == first.keys[3])
    assert np.allclose(first.feature[3], judge.features(np.stack([figures.pixels(row)]))[0], atol=1e-4)
    assert np.allclose(first.feature_pixels[3], pixel_features(figures.pixels(row)[None])[0])


def test_a_damaged_cache_is_computed_again(figures, judge, cache):
    first = load_train_features(figures, judge, 5)
    (path,) = (cache / "features").iterdir()
    path.write_bytes(path.read_bytes()[:50])
    assert np.array_equal(load_train_features(figures, judge, 5).feature, first.feature)


def test_without_a_judge_there_are_mean_colours(figures, cache):
    found = load_train_features(figures, None, 5)
    assert found.feature is None
    assert found.feature_pixels.shape == (5, 16 * 16 * 3)
