"""Fixtures of the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.tiny import write_dataset


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic dataset with all layers; read it, never write."""
    return write_dataset(tmp_path_factory.mktemp("tiny") / "dataset")


@pytest.fixture(scope="session")
def random_dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub with a tiny random DINOv2 in the published one's place."""
    from tests.dinov2 import write_random_dinov2

    cache = tmp_path_factory.mktemp("hub")
    write_random_dinov2(cache)
    return cache


@pytest.fixture
def dinov2_home(random_dinov2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let huggingface_hub look there, in this process and in those that it starts."""
    monkeypatch.setenv("HF_HUB_CACHE", str(random_dinov2))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(random_dinov2))  # read once, when imported
    return random_dinov2
