"""DINOv3 image features: one pass gives the CLS vector and the grid of patch vectors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DINOv3ViTModel

from prep.weights import cannot_load, is_local, model_identity, quiet_transformers

CODE_VERSION = 1
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MIN_GRID = 8  # patches per side: fewer say too little about layout, so small images are enlarged


def fingerprint(
    model: str | Path, revision: str | None = None, input_scale: float = 0.5
) -> dict[str, str | int | float]:
    """Everything that determines the features, without loading the weights; the device is not part of it."""
    return {"encoder": "dinov3", "code": CODE_VERSION, "input_scale": input_scale, **model_identity(model, revision)}


class DINOv3Encoder:
    """A DINOv3 vision transformer: RGB images of one size in, final-norm CLS and patch features out.

    CLS and patches come from the same forward pass at the same resolution. Computed in float32 on the CPU and in
    bfloat16 on a GPU. The last bits depend on the shape of the batch, so callers that promise equal bytes must form
    equal batches.

    Raises :class:`ConfigError` when the model cannot be loaded.
    """

    def __init__(
        self, model: str | Path, revision: str | None = None, device: str = "cpu", input_scale: float = 0.5
    ) -> None:
        self._source = (model, revision)
        self.input_scale = input_scale
        self.device = torch.device(device)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        options = {"revision": revision, "local_files_only": is_local(model)}
        try:
            with quiet_transformers():
                self.model = DINOv3ViTModel.from_pretrained(model, dtype=self.dtype, **options).to(self.device).eval()
        except (OSError, ValueError) as error:
            raise cannot_load("DINOv3 encoder", model, error) from error
        self._mean = torch.tensor(IMAGENET_MEAN, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=self.device).view(1, 3, 1, 1)

    @property
    def width(self) -> int:
        """Channels per token."""
        return self.model.config.hidden_size

    @property
    def patch_size(self) -> int:
        """Input pixels per side of a patch."""
        return self.model.config.patch_size

    @property
    def registers(self) -> int:
        """Register tokens between CLS and the patches."""
        return self.model.config.num_register_tokens

    def fingerprint(self) -> dict[str, str | int | float]:
        """See :func:`fingerprint`."""
        return fingerprint(*self._source, self.input_scale)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches (rows, columns) for an image of ``height`` x ``width`` pixels; at least eight a side."""
        return tuple(
            max(MIN_GRID, math.floor(self.input_scale * side / self.patch_size + 0.5)) for side in (height, width)
        )

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode ``images``, (B, H, W, 3) uint8 RGB: CLS (B, D) and patches (B, h, w, D), both float32."""
        batch, height, width, _ = images.shape
        rows, columns = self.grid(height, width)
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2).float() / 255
        size = (rows * self.patch_size, columns * self.patch_size)
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        pixels = ((pixels - self._mean) / self._std).to(self.dtype)
        tokens_bnd = self.model(pixel_values=pixels).last_hidden_state.float().cpu()
        # [CLS, registers, patches]: the registers hold nothing about a place and must not become patches.
        patches_bnd = tokens_bnd[:, 1 + self.registers :]
        return tokens_bnd[:, 0].numpy().copy(), patches_bnd.reshape(batch, rows, columns, -1).numpy().copy()
