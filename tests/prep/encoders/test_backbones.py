"""LPIPS's networks: the files that torchvision publishes, where torch.hub looks, and the command that brings them."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import AlexNet_Weights, VGG16_Weights

from prep.encoders.backbones import ALEXNET, VGG16


@pytest.mark.parametrize(("backbone", "weights"), [(ALEXNET, AlexNet_Weights), (VGG16, VGG16_Weights)])
def test_the_files_are_those_of_torchvision(backbone, weights):
    published = weights.IMAGENET1K_V1
    assert backbone.url == published.url
    assert backbone.megabytes == round(published.meta["_file_size"])


@pytest.mark.parametrize("home", ["torch", "", None])
def test_they_are_looked_for_where_torch_hub_keeps_them(monkeypatch, tmp_path, home):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if home is None:
        monkeypatch.delenv("TORCH_HOME", raising=False)
    else:
        monkeypatch.setenv("TORCH_HOME", home and str(tmp_path / home))
    assert Path(torch.hub.get_dir(), "checkpoints", ALEXNET.file) == ALEXNET.path


@pytest.mark.parametrize("backbone", [ALEXNET, VGG16])
def test_the_command_of_the_remedy_brings_the_file(backbone, tmp_path, monkeypatch):
    """As it stands in the text, from a folder in place of the internet; that other bytes are refused is seen first."""
    (tmp_path / "there").mkdir()
    torch.save({}, tmp_path / "there" / backbone.file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    command = backbone.remedy.partition("run: ")[2].partition(" (")[0]
    assert command == f"{backbone.command}"
    python, *rest = shlex.split(command.replace("https://download.pytorch.org/models", f"file://{tmp_path / 'there'}"))
    assert python == "python"
    refused = subprocess.run([sys.executable, *rest], capture_output=True, text=True)
    assert "invalid hash value" in refused.stderr
    assert not backbone.path.exists()
    unchecked = [one.replace("check_hash=True", "check_hash=False") for one in rest]
    subprocess.run([sys.executable, *unchecked], check=True, capture_output=True)
    assert backbone.path.is_file()
