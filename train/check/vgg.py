"""VGG-16 weights where torch.hub looks for them, made from a seed: the real code path without a download."""

from __future__ import annotations

from pathlib import Path

import torch

from train.method.perceptual import VGG_WEIGHTS


def write_random_vgg(home: Path) -> Path:
    """Write a seeded random VGG-16 below ``home``, to be used as TORCH_HOME; what it measures means nothing."""
    import torchvision  # which a machine without the loss may lack

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = torchvision.models.vgg16(weights=None).features.state_dict(prefix="features.")
    # the classifier, which LPIPS drops: zeros that take no room
    sizes = {"0": (4096, 25088), "3": (4096, 4096), "6": (1000, 4096)}
    for layer, (rows, columns) in sizes.items():
        features[f"classifier.{layer}.weight"] = torch.zeros(1).expand(rows, columns)
        features[f"classifier.{layer}.bias"] = torch.zeros(1).expand(rows)
    path = home / "hub" / "checkpoints" / VGG_WEIGHTS
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(features, path)
    return path
