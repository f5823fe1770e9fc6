"""Fixtures of the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.tiny import write_dataset
from train.perceptual import VGG_WEIGHTS


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic dataset with all layers; read it, never write."""
    return write_dataset(tmp_path_factory.mktemp("tiny") / "dataset")


@pytest.fixture(scope="session")
def random_vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TORCH_HOME with a seeded random VGG-16: the real code path, for correctness; the values mean nothing."""
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = torchvision.models.vgg16(weights=None).features.state_dict(prefix="features.")
    # the classifier, which LPIPS drops: zeros that take no room
    sizes = {"0": (4096, 25088), "3": (4096, 4096), "6": (1000, 4096)}
    for layer, (rows, columns) in sizes.items():
        features[f"classifier.{layer}.weight"] = torch.zeros(1).expand(rows, columns)
        features[f"classifier.{layer}.bias"] = torch.zeros(1).expand(rows)
    home = tmp_path_factory.mktemp("torch-home")
    path = home / "hub" / "checkpoints" / VGG_WEIGHTS
    path.parent.mkdir(parents=True)
    torch.save(features, path)
    return home


@pytest.fixture
def vgg_home(random_vgg: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let torch.hub look there."""
    monkeypatch.setenv("TORCH_HOME", str(random_vgg))
    return random_vgg
