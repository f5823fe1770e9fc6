"""DINOv3 image features: one pass gives the CLS vector and the grid of patch vectors.

torch and transformers are imported by what computes: a plan asks for the fingerprint alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nanodit.errors import DataError
from prep.dataset.codecs import npy_bytes
from prep.dataset.layers import dino_grid
from prep.dataset.quantise import quantise, worst_cosine
from prep.encoders.halving import Halving
from prep.encoders.weights import (
    architecture,
    cannot_load,
    compute_dtype,
    model_identity,
    open_model,
    quiet_transformers,
)

CODE_VERSION = 1
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def fingerprint(
    model: str | Path, revision: str | None = None, sha256: Mapping[str, str] | None = None, input_scale: float = 0.5
) -> dict[str, str | int | float]:
    """Everything that determines the features, without loading the weights; the device is not part of it.

    The architecture follows from the model's files.
    """
    identity = model_identity(model, revision, sha256)
    return {"encoder": "dino", "code": CODE_VERSION, "input_scale": input_scale, **identity}


class DINOv3Encoder:
    """A DINOv3 vision transformer: RGB images of one size in, final-norm CLS and patch features out.

    CLS and patches come from the same forward pass at the same resolution. Computed in float32 on the CPU and in
    bfloat16 on a GPU. The last bits depend on the shape of the batch, so callers that promise equal bytes must form
    equal batches. A batch that does not fit into a GPU is halved, as ``memory`` remembers.

    ``sha256`` maps the files of a hub model to the hashes that they must have. Raises :class:`ConfigError` when the
    model cannot be had or loaded.
    """

    # classes of transformers by the model_type of their config
    MODELS: ClassVar[dict[str, str]] = {"dinov3_vit": "DINOv3ViTModel"}

    def __init__(
        self,
        model: str | Path,
        revision: str | None = None,
        sha256: Mapping[str, str] | None = None,
        device: str = "cpu",
        input_scale: float = 0.5,
    ) -> None:
        import torch
        import transformers

        folder, self._source = open_model(model, revision, sha256)
        self.input_scale = input_scale
        self.device = torch.device(device)
        self.dtype = compute_dtype(self.device)
        self.memory = Halving("DINO", device)
        options = {"dtype": self.dtype, "local_files_only": True, "use_safetensors": True}
        try:
            kind = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).model_type
            if kind not in self.MODELS:
                raise ValueError(f"it is a {kind}, but this encoder takes {' or '.join(self.MODELS)}")
            with quiet_transformers():
                network = getattr(transformers, self.MODELS[kind])
                self.model = network.from_pretrained(folder, **options).to(self.device).eval()
        except (OSError, ValueError) as error:
            raise cannot_load("DINO encoder", model, error) from error
        self._mean = torch.tensor(IMAGENET_MEAN, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=self.device).view(1, 3, 1, 1)

    @property
    def width(self) -> int:
        """Channels per token."""
        return self.model.config.hidden_size

    @property
    def patch_size(self) -> int:
        """Pixels per side of a patch, as the network sees it."""
        return self.model.config.patch_size

    @property
    def registers(self) -> int:
        """Register tokens between CLS and the patches."""
        return getattr(self.model.config, "num_register_tokens", 0)

    def fingerprint(self) -> dict[str, str | int | float]:
        """See :func:`fingerprint`."""
        return fingerprint(*self._source, self.input_scale)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches (rows, columns) for an image of ``height`` x ``width`` pixels; at least eight a side."""
        return dino_grid(height, width, self.input_scale)

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode ``images``, (B, H, W, 3) uint8 RGB: CLS (B, D) and patches (B, h, w, D), both float32.

        Raises :class:`ResourceError` when the GPU cannot hold one image.
        """
        cls, patches = zip(*self.memory.run(self._encode, images))
        return np.concatenate(cls), np.concatenate(patches)

    def samples(self, images: np.ndarray, flips: bool = False) -> Iterator[tuple[dict[str, bytes], dict[str, Any]]]:
        """Yield the members and index columns of each of ``images``; with ``flips`` also those of the mirrored ones."""
        views = [zip(*self.encode(images))]
        if flips:  # what the network sees in a mirrored image is not what it saw, mirrored
            views.append(zip(*self.encode(images[:, :, ::-1])))
        for (cls, grid), *mirrored in zip(*views):
            members, cosine = dino_members(cls, grid)
            for other in mirrored:
                more, other_cosine = dino_members(*other, suffix="_flip")
                members, cosine = members | more, min(cosine, other_cosine)
            yield members, {"dino_h": grid.shape[0], "dino_w": grid.shape[1], "dino_cosine": cosine}

    def _encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch
        import torch.nn.functional as F

        batch, height, width, _ = images.shape
        rows, columns = self.grid(height, width)
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        if self.device.type == "cuda":  # from pinned memory the copy runs beside what the GPU still does
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        size = (rows * self.patch_size, columns * self.patch_size)
        with torch.inference_mode():
            pixels = pixels.permute(0, 3, 1, 2).float() / 255
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
            pixels = ((pixels - self._mean) / self._std).to(self.dtype)
            tokens_bnd = self.model(pixel_values=pixels).last_hidden_state.float().cpu()
        if not torch.isfinite(tokens_bnd).all():  # int8 cannot say so, and a class token that says it spoils cosines
            raise DataError("DINO gave features that are not finite; check the model's weights and its data type")
        # [CLS, registers, patches]: the registers hold nothing about a place and must not become patches.
        patches_bnd = tokens_bnd[:, 1 + self.registers :]
        return tokens_bnd[:, 0].numpy(), patches_bnd.reshape(batch, rows, columns, -1).numpy()


def dino_members(cls: np.ndarray, grid: np.ndarray, suffix: str = "") -> tuple[dict[str, bytes], float]:
    """Return a class token (W,) and patches (h, w, W) as members, and the worst patch's cosine after quantising."""
    features = grid.reshape(-1, grid.shape[-1])
    quantised, scale = quantise(features)
    arrays = {f"cls{suffix}.npy": cls, f"dino{suffix}.npy": quantised, f"dino{suffix}_scale.npy": scale}
    members = {name: npy_bytes(array) for name, array in arrays.items()}
    return members, round(worst_cosine(features, quantised, scale), 6)


def build(model: str | Path, revision: str | None = None, **arguments: Any) -> DINOv3Encoder:
    """Load a DINOv3, or a DINOv2 in its place where the model's own config says that it is one."""
    from prep.encoders.dinov2 import DINOv2Encoder

    older = architecture(model, revision) in DINOv2Encoder.MODELS
    return (DINOv2Encoder if older else DINOv3Encoder)(model, revision, **arguments)
