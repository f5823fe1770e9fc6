"""What the tests of ``prep`` share."""

import os
from pathlib import Path

import pytest

from tests.prep.fake_ollama import install


@pytest.fixture
def program(tmp_path, monkeypatch) -> Path:
    """A program named ``ollama`` on PATH, with a store and a log of its own."""
    for name in ("bin", "log", "models"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("FAKE_OLLAMA", str(tmp_path / "log"))
    return install(tmp_path / "bin")
