"""LPIPS's networks where torch.hub looks for them, made from a seed: the real code path without a download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from prep.encoders.backbones import ALEXNET, VGG16, Backbone

# the classifiers, which LPIPS drops
CLASSIFIERS = {
    ALEXNET: {"1": (4096, 9216), "4": (4096, 4096), "6": (1000, 4096)},
    VGG16: {"0": (4096, 25088), "3": (4096, 4096), "6": (1000, 4096)},
}


def write_random_vgg(home: Path) -> Path:
    """Write a seeded random VGG-16 below ``home``, to be used as TORCH_HOME; what it measures means nothing."""
    import torchvision  # which a machine without the loss may lack

    return _write(VGG16, torchvision.models.vgg16, home)


def write_random_alexnet(home: Path) -> Path:
    """Write a seeded random AlexNet in the same way."""
    import torchvision

    return _write(ALEXNET, torchvision.models.alexnet, home)


def _write(backbone: Backbone, build: Callable[..., torch.nn.Module], home: Path) -> Path:
    with torch.device("meta"):  # drawing the classifier, which is not kept, takes a second
        features = build(weights=None).features
    weights = features.to_empty(device="cpu").state_dict(prefix="features.")
    drawn = torch.Generator().manual_seed(0)
    for tensor in weights.values():
        if tensor.ndim == 1:
            tensor.zero_()
        else:  # so that the scale of what comes in stays, as torchvision has it for VGG
            torch.nn.init.kaiming_normal_(tensor, mode="fan_out", nonlinearity="relu", generator=drawn)
    for layer, (rows, columns) in CLASSIFIERS[backbone].items():  # zeros that take no room
        weights[f"classifier.{layer}.weight"] = torch.zeros(1).expand(rows, columns)
        weights[f"classifier.{layer}.bias"] = torch.zeros(1).expand(rows)
    path = home / "hub" / "checkpoints" / backbone.file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)
    return path
