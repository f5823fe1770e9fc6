"""DINOv2 in DINOv3's place: same grid, same interface, features of transformers, chosen by the model's own config."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, DINOv3ViTImageProcessor
from transformers import Dinov2WithRegistersConfig as RegistersConfig
from transformers import Dinov2WithRegistersModel as RegistersModel

from nanodit.errors import ConfigError
from prep.config import PrepConfig
from prep.encoders.demo import build_dino
from prep.encoders.dinov2 import DINOv2Encoder
from prep.encoders.dinov3 import DINOv3Encoder
from prep.encoders.registry import build_encoder, encoder_fingerprint

# as facebook/dinov2-large but for the width: trained at 518 pixels, so that 37 x 37 positions are interpolated
TINY = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14, "image_size": 518
}  # fmt: skip


@pytest.fixture(params=["dinov2", "dinov2_with_registers"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    plain = request.param == "dinov2"
    model = Dinov2Model(Dinov2Config(**TINY)) if plain else RegistersModel(RegistersConfig(**TINY))
    model.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def test_the_grid_is_that_of_dinov3(folder: Path, tmp_path: Path) -> None:
    build_dino(tmp_path / "dinov3")
    for scale in (0.5, 1.0):
        newer, older = DINOv3Encoder(tmp_path / "dinov3", input_scale=scale), DINOv2Encoder(folder, input_scale=scale)
        for height, width in ((1024, 1024), (832, 1216), (1344, 704), (48, 88)):
            assert older.grid(height, width) == newer.grid(height, width)
    assert older.patch_size == 14
    assert older.registers == (4 if "registers" in folder.name else 0)
    images = np.zeros((2, 144, 160, 3), np.uint8)
    cls, patches = older.encode(images)
    assert cls.shape == (2, 32)
    assert patches.shape == (2, *newer.encode(images)[1].shape[1:3], 32) == (2, 9, 10, 32)
    assert cls.dtype == patches.dtype == np.float32


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 9), (5, 3), (8, 9)])
def test_trap_01_a_marked_block_shows_in_the_patch_of_its_place(folder: Path, row: int, column: int) -> None:
    encoder = DINOv2Encoder(folder, input_scale=1.0)
    plain = np.full((1, 144, 160, 3), 128, np.uint8)
    marked = plain.copy()
    marked[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = (255, 0, 0)
    change = np.linalg.norm(encoder.encode(marked)[1] - encoder.encode(plain)[1], axis=-1)[0]
    # trap 1: registers are no patches, and 14-pixel patches on 16-pixel cells do not drift apart
    assert np.unravel_index(change.argmax(), change.shape) == (row, column)


def test_features_are_those_of_transformers(folder: Path) -> None:
    """The processor of transformers, its model, and [CLS, registers, patches]."""
    encoder = DINOv2Encoder(folder, input_scale=1.0)
    images = np.random.default_rng(0).integers(0, 256, (2, 144, 160, 3), dtype=np.uint8)
    # DINOv2's own processor (BitImageProcessor) rounds what it has resized to 8 bits; its mean and deviation are these
    processor = DINOv3ViTImageProcessor(size={"height": 9 * 14, "width": 10 * 14})
    pixels = processor(torch.from_numpy(images).permute(0, 3, 1, 2), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        tokens = encoder.model(pixel_values=pixels).last_hidden_state.numpy()
    cls, patches = encoder.encode(images)
    np.testing.assert_allclose(cls, tokens[:, 0], atol=2e-5)
    np.testing.assert_allclose(patches.reshape(2, 90, 32), tokens[:, 1 + encoder.registers :], atol=2e-5)


def test_the_models_own_config_chooses_the_encoder(folder: Path, tmp_path: Path) -> None:
    def settings(model: Path) -> PrepConfig:
        return PrepConfig(source="photos", output="dataset", dino={"model": str(model)})

    older = build_encoder(settings(folder), "dino", "cpu")
    assert type(older) is DINOv2Encoder
    assert older.fingerprint() == encoder_fingerprint(settings(folder), "dino")
    build_dino(tmp_path / "dinov3")
    newer = build_encoder(settings(tmp_path / "dinov3"), "dino", "cpu")
    assert type(newer) is DINOv3Encoder
    assert newer.fingerprint() != older.fingerprint()
    with pytest.raises(ConfigError, match="it is a dinov2"):
        DINOv3Encoder(folder)
    with pytest.raises(ConfigError, match="cannot load the model"):
        build_encoder(settings(tmp_path), "dino", "cpu")


@pytest.mark.slow
def test_full_width_vit_large_14(tmp_path: Path) -> None:
    """ViT-L/14 at random weights: a production bucket gives (1024,) and DINOv3's 22 x 42 patches of 1024.

    With 3 of its 24 blocks: all have the same shapes.
    """
    large = {"hidden_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 16, "patch_size": 14}
    RegistersModel._from_config(RegistersConfig(image_size=518, **large), dtype=torch.bfloat16).save_pretrained(
        tmp_path
    )
    encoder = DINOv2Encoder(tmp_path, input_scale=0.5)
    cls, patches = encoder.encode(np.zeros((1, 704, 1344, 3), np.uint8))
    assert cls.shape == (1, 1024)
    assert patches.shape == (1, 22, 42, 1024)
    assert np.isfinite(patches).all()
