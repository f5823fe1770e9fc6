"""DINOv3 features and their int8 form: token layout, resolution, accuracy, and the full-size architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel

from nanodit.errors import ConfigError, DataError
from prep.dataset.quantise import dequantise, quantise, worst_cosine
from prep.encoders.demo import build_dino
from prep.encoders.dinov3 import IMAGENET_MEAN, IMAGENET_STD, DINOv3Encoder, fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dino") / "dino"
    build_dino(path)
    return path


def grey(height: int, width: int, count: int = 1) -> np.ndarray:
    return np.full((count, height, width, 3), 128, np.uint8)


@pytest.mark.parametrize("registers", [0, 4, 7])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 3), (5, 9), (8, 0)])
def test_trap_01_a_marked_block_shows_in_its_own_patch(tmp_path: Path, registers: int, row: int, column: int) -> None:
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_register_tokens=registers
    )
    DINOv3ViTModel(config).save_pretrained(tmp_path)
    encoder = DINOv3Encoder(tmp_path, input_scale=1.0)
    plain = grey(144, 160)
    marked = plain.copy()
    marked[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = (255, 0, 0)
    assert encoder.registers == registers
    assert encoder.grid(144, 160) == (9, 10)
    change = np.linalg.norm(encoder.encode(marked)[1] - encoder.encode(plain)[1], axis=-1)[0]
    assert change.shape == (9, 10)
    # trap 1: with the registers counted as patches the peak would be `registers` cells further on
    assert np.unravel_index(change.argmax(), change.shape) == (row, column)
    assert change[row, column] > 3 * np.partition(change.ravel(), -2)[-2]


def test_trap_01_tokens_are_cls_registers_patches(folder: Path) -> None:
    encoder = DINOv3Encoder(folder, input_scale=1.0)
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 160, 3), dtype=np.uint8)
    cls, patches = encoder.encode(images)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    with torch.inference_mode():
        tokens = encoder.model(pixel_values=pixels).last_hidden_state.numpy()
    assert encoder.registers == 4
    assert tokens.shape == (2, 1 + 4 + 8 * 10, encoder.width)
    np.testing.assert_allclose(cls, tokens[:, 0], atol=1e-5)
    np.testing.assert_allclose(patches[:, 0, 0], tokens[:, 5], atol=1e-5)
    np.testing.assert_allclose(patches[:, 7, 9], tokens[:, -1], atol=1e-5)
    assert cls.dtype == patches.dtype == np.float32


def test_trap_02_cls_and_patches_share_one_pass_at_one_recorded_resolution(folder: Path) -> None:
    encoder = DINOv3Encoder(folder, input_scale=0.5)
    shapes = []
    hook = encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["pixel_values"].shape)), with_kwargs=True
    )
    encoder.encode(grey(320, 512))
    hook.remove()
    assert shapes == [(1, 3, 160, 256)]  # trap 2: one pass, and no second resolution
    assert encoder.fingerprint()["input_scale"] == 0.5
    assert fingerprint(folder, input_scale=0.5) != fingerprint(folder, input_scale=1.0)


def test_preprocessing_is_the_processors(folder: Path) -> None:
    encoder = DINOv3Encoder(folder, input_scale=0.5)
    image = np.random.default_rng(1).integers(0, 256, (1, 320, 512, 3), dtype=np.uint8)
    processor = DINOv3ViTImageProcessor(size={"height": 160, "width": 256})
    expected = processor(torch.from_numpy(image).permute(0, 3, 1, 2), return_tensors="pt")["pixel_values"]
    seen = []
    hook = encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    encoder.encode(image)
    hook.remove()
    torch.testing.assert_close(seen[0], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("scale", "height", "width", "expected"),
    [
        (0.5, 1024, 1024, (32, 32)),
        (0.5, 832, 1216, (26, 38)),
        (0.5, 704, 1344, (22, 42)),
        (1.0, 832, 1216, (52, 76)),
        (1.0, 64, 64, (8, 8)),
        (1.0, 48, 88, (8, 8)),
        (2.0, 56, 80, (8, 10)),
        (1.0, 136, 152, (9, 10)),  # 8.5 and 9.5 both round up
    ],
)
def test_grid(folder: Path, scale: float, height: int, width: int, expected: tuple[int, int]) -> None:
    encoder = DINOv3Encoder(folder, input_scale=scale)
    assert encoder.grid(height, width) == expected
    cls, patches = encoder.encode(grey(height, width)) if height < 500 else (None, None)
    if cls is not None:
        assert patches.shape == (1, *expected, encoder.width)


@pytest.mark.parametrize("width", [64, 96, 100, 1024])
def test_quantise_keeps_directions_even_with_outlier_channels(width: int) -> None:
    generator = np.random.default_rng(width)
    features = generator.standard_normal((50, width)).astype(np.float32)
    features[:, 3] *= 40
    features[:, width // 2] *= 15
    q, scale = quantise(features)
    assert q.dtype == np.int8
    assert scale.dtype == np.float16
    assert q.shape == features.shape
    assert scale.shape == (50, -(-width // 64))
    back = dequantise(q, scale)
    assert back.dtype == np.float32
    cosine = F.cosine_similarity(torch.from_numpy(back), torch.from_numpy(features)).min()
    assert worst_cosine(features, q, scale) == pytest.approx(float(cosine), abs=1e-6)
    assert cosine > (0.9995 if width >= 1024 else 0.995)
    # at most half a step off, up to the rounding of the scale itself
    step = np.repeat(scale.astype(np.float32), 64, axis=1)[:, :width]
    assert (np.abs(back - features) <= 0.5 * step + 0.07 * step).all()


def test_quantise_plain_features_to_four_nines() -> None:
    features = np.random.default_rng(0).standard_normal((200, 1024)).astype(np.float32)
    cosine = F.cosine_similarity(torch.from_numpy(dequantise(*quantise(features))), torch.from_numpy(features))
    assert cosine.min() > 0.9999


def test_worst_cosine_is_that_of_the_worst_token() -> None:
    features = np.random.default_rng(1).standard_normal((5, 128)).astype(np.float32)
    features[4] = 0  # no direction to lose
    q, scale = quantise(features)
    assert worst_cosine(features, q, scale) > 0.9999
    q[2] = -q[2]
    assert worst_cosine(features, q, scale) < -0.9999
    assert worst_cosine(features[4:], q[4:], scale[4:]) == 1.0


def test_demo_features_survive_int8(folder: Path, record_property: Callable[[str, object], None]) -> None:
    encoder = DINOv3Encoder(folder, input_scale=1.0)
    images = np.random.default_rng(0).integers(0, 256, (4, 128, 160, 3), dtype=np.uint8)
    features = encoder.encode(images)[1].reshape(-1, encoder.width)
    worst = worst_cosine(features, *quantise(features))
    record_property("int8_worst_cosine", worst)
    assert worst > 0.9999


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    encoder = DINOv3Encoder(folder, input_scale=1.0)
    with torch.no_grad():
        encoder.model.norm.weight[3] = value
    with pytest.raises(DataError, match="not finite; check the model's weights"):
        encoder.encode(grey(32, 32))


def test_quantise_zeros_and_one_sided_extremes() -> None:
    features = np.zeros((2, 130), np.float32)
    features[1, 70], features[1, 129] = -5.0, 1e-9  # the last group is too small for float16 and becomes zero
    q, scale = quantise(features)
    assert (q[0] == 0).all()
    assert (scale[0] == 0).all()
    assert q[1, 70] == -127
    back = dequantise(q, scale)
    assert np.isfinite(back).all()
    assert back[1, 70] == pytest.approx(-5.0, rel=1e-3)
    assert back[1, 129] == 0


def test_a_model_that_does_not_load_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a folder"):
        DINOv3Encoder(tmp_path / "missing")
    with pytest.raises(ConfigError, match="save_pretrained"):
        DINOv3Encoder(tmp_path)
