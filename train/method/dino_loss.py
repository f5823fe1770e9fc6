"""The perceptual loss's second term: the cosine distance of DINOv2's patches between predicted and true image.

LPIPS compares textures, this what is where. The network is frozen; gradients flow through it to the prediction. It is
DINOv2 and not the DINOv3 of the conditions, so that the loss asks for more than what the network was told.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from nanodit.errors import ConfigError, DataError
from nanodit.files import sha256_file
from prep.encoders.hub import CONFIG, WEIGHTS, digest
from prep.encoders.weights import folder_hash, quiet_transformers
from train.method.perceptual import PerceptualConfig, ViewLoss

MODEL = "facebook/dinov2-base"  # ViT-B/14, 86 M parameters; what PixelGen's loss uses
REVISION = "f9e44c814b77203eaa57a6bdbbd535f21ede1415"
SIDE = 518  # pixels that it was trained on last, 37 patches; a view of 512 is shown at just this size
DOWNLOAD = f"hf download {MODEL} {CONFIG} {WEIGHTS} --revision {REVISION}"


class PatchFeatures(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to DINOv2's final-norm patch features (B, n, width).

    An image is resized to the nearest whole number of patches a side, at least one, and normalised as DINOv2's training
    did (ImageNet mean and deviation): it sees what the loss looks at, at no other scale.
    """

    def __init__(self, network: nn.Module) -> None:
        from prep.encoders.dinov3 import IMAGENET_MEAN, IMAGENET_STD

        super().__init__()
        self.network = network
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        patch = self.network.config.patch_size
        size = tuple(max(1, round(side / patch)) * patch for side in images.shape[2:])
        if images.shape[2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        pixels = ((images + 1) / 2 - self.mean) / self.std
        return self.network(pixel_values=pixels).last_hidden_state[:, 1:]  # less CLS; this one has no registers


class DinoLoss(ViewLoss):
    """The mean over an image's patches of 1 - cosine of DINOv2's features: frozen, gradients flow to the prediction.

    Source: PixelGen's pixel-space recipe (weight .01), as for LPIPS. Raises :class:`ConfigError` where the weights are
    not in the hub's cache, :class:`DataError` where they do not load. ``sha256`` names them.
    """

    name, hash_key = "dino", "perceptual_dino"

    def __init__(self, config: PerceptualConfig, device: torch.device) -> None:
        self.config = config
        if device.type == "meta":
            self.network = load_features(None).to(device)
            return
        folder = dino_folder()
        if folder is None:
            from huggingface_hub import constants

            raise ConfigError(
                f"perceptual.dino_weight {config.dino_weight:g}: the loss needs the weights of {MODEL} at commit "
                f"{REVISION[:7]}, which are not in the hub's cache, {constants.HF_HUB_CACHE}. Download them with "
                f"`{DOWNLOAD}` (346 MB), or set perceptual.dino_weight to 0"
            )
        self.folder, self.origin = folder, f"those of DINOv2 in {folder}"
        self.sha256 = digest({name: sha256_file(folder / name) for name in (CONFIG, WEIGHTS)})
        self.network = load_features(folder).to(device)

    @staticmethod
    def distance(network: nn.Module, shown: Iterable[Tensor]) -> Tensor:
        return patch_distance(*map(network, shown))

    def on_meta(self) -> nn.Module:
        return copy.deepcopy(self.network).to("meta")

    def weight(self, step: int, steps: int) -> float:
        return self.config.dino_weight * self.config.every  # as LPIPS, computed in one of n micro-steps

    def announce(self, steps: int, layers: Mapping[str, Any]) -> list[str]:
        if not self.is_condition(layers):
            return []
        return [
            "perceptual: the dataset's DINO features are of the DINOv2 that the loss compares with, so images that "
            "keep them are told what it measures"
        ]

    def is_condition(self, layers: Mapping[str, Any]) -> bool:
        """Say whether a dataset's DINO features, by the ``layers`` of its dataset.json, are this network's too."""
        encoder = layers.get("dino", {}).get("encoder", {})
        content = encoder.get("content")  # of a folder, which may hold the same files
        return encoder.get("model") == MODEL or (content is not None and content == folder_hash(self.folder))


def patch_distance(a_bnc: Tensor, b_bnc: Tensor) -> Tensor:
    """Return each image's mean over patches of 1 - cosine, float32 (b,), in [0, 2]."""
    return (1 - F.cosine_similarity(a_bnc.float(), b_bnc.float(), dim=2)).mean(1)


def dino_folder() -> Path | None:
    """Where the hub's cache holds the weights, None where it does not; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(MODEL, name, revision=REVISION) for name in (CONFIG, WEIGHTS)]
    return Path(found[0]).parent if all(isinstance(path, str) for path in found) else None


def load_features(folder: Path | None) -> PatchFeatures:
    """Build the frozen network from a folder made by save_pretrained, in float32; nothing is downloaded.

    Without ``folder`` it is the published architecture with its parameters on the meta device. Raises
    :class:`DataError` for the files of another network.
    """
    from transformers import Dinov2Config, Dinov2Model  # seconds that a run without the loss does not spend

    if folder is None:
        with torch.device("meta"):
            return PatchFeatures(Dinov2Model(Dinov2Config(image_size=SIDE))).requires_grad_(False).eval()
    options = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
    try:
        with quiet_transformers():
            network, loaded = Dinov2Model.from_pretrained(folder, output_loading_info=True, **options)
        if loaded["missing_keys"] or loaded["mismatched_keys"]:
            raise ValueError(f"{len(loaded['missing_keys'])} tensors are missing")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder}: not DINOv2's weights ({reason}). Delete the folder and run `{DOWNLOAD}`") from error
    return PatchFeatures(network).requires_grad_(False).eval()
