"""DINOv2 weights where the hub's cache has them, tiny and made from a seed: the real code path without a download."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Dinov2Config, Dinov2Model

from train.method.dino_loss import MODEL, REVISION


def write_random_dinov2(cache: Path) -> Path:
    """Write a seeded tiny DINOv2 below ``cache``, to be used as HF_HUB_CACHE; what it measures means nothing."""
    folder = cache / f"models--{MODEL.replace('/', '--')}" / "snapshots" / REVISION
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 42}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Dinov2Model(Dinov2Config(**sizes))
        for parameter in network.parameters():  # as initialised, the attention is all but uniform
            if parameter.ndim > 1:
                parameter.data.mul_(5)
    network.save_pretrained(folder)
    return folder
