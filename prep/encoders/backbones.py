"""The two networks of LPIPS, for the metric and for the loss: files that nothing downloads, and how to get them.

LPIPS's own calibration comes with the package ``lpips``; the ImageNet network under it does not. It is read from
torch.hub's cache, ``$TORCH_HOME/hub/checkpoints``, where torchvision's own downloads go.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CACHE = "$TORCH_HOME/hub/checkpoints"  # as texts name it that must not say whose machine they were written on
USUAL = "~/.cache/torch"  # where TORCH_HOME is not set


@dataclass(frozen=True)
class Backbone:
    """One network: torchvision's file, and what it is for. The digits in its name are the head of its SHA-256."""

    network: str
    file: str
    megabytes: int
    purpose: str

    @property
    def url(self) -> str:
        """Where torchvision takes the file from."""
        return f"https://download.pytorch.org/models/{self.file}"

    @property
    def path(self) -> Path:
        """Where the file is looked for (it may be absent)."""
        return checkpoints() / self.file

    @property
    def digits(self) -> str:
        """The beginning of the SHA-256 of the published file."""
        return Path(self.file).stem.rpartition("-")[2]

    @property
    def command(self) -> str:
        """The shell command that downloads the file into the cache of the machine it runs on, and checks its hash."""
        get = f'get("{self.url}", check_hash=True)'
        return f"python -c 'from torch.hub import load_state_dict_from_url as get; {get}'"

    @property
    def remedy(self) -> str:
        """How to get the file, with internet and without."""
        return (
            f"on a machine with internet run: {self.command} ({self.megabytes} MB); to one without, copy {self.file} "
            f"from there into {CACHE} ({USUAL} where TORCH_HOME is not set)"
        )


ALEXNET = Backbone("AlexNet", "alexnet-owt-7be5be79.pth", 233, "the metric LPIPS of `nanodit evaluate`")
VGG16 = Backbone("VGG-16", "vgg16-397923af.pth", 528, "the loss LPIPS of `nanodit train` (perceptual.every)")


def checkpoints() -> Path:
    """Return torch.hub's folder of weights, as torch.hub finds it, without importing torch."""
    home = os.getenv("TORCH_HOME", os.path.join(os.getenv("XDG_CACHE_HOME", "~/.cache"), "torch"))
    return Path(os.path.expanduser(home), "hub", "checkpoints")
