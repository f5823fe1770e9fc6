"""Fixtures of the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.tiny import write_dataset


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic dataset with all layers; read it, never write."""
    return write_dataset(tmp_path_factory.mktemp("tiny") / "dataset")
