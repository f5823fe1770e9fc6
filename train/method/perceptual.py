"""The perceptual loss: LPIPS-VGG between the predicted image and the true one, at times where there is one to see.

VGG costs as much as a small transformer: so only every n-th micro-step pays for it, at n times the weight, and each
image shows a crop or an average of itself. The network is frozen; gradients flow through it to the prediction.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nanodit.config import Config
from nanodit.errors import ConfigError, DataError
from nanodit.files import sha256_file
from train.method.flow import shift

VGG_WEIGHTS = "vgg16-397923af.pth"  # torchvision's name; the hash begins with what stands after the dash
VGG_URL = f"https://download.pytorch.org/models/{VGG_WEIGHTS}"

MIN_SIDE = 16  # VGG halves an image four times


class PerceptualConfig(Config):
    """Whether, how strongly and on what LPIPS is a loss, and DINOv2 (:mod:`train.method.dino_loss`) beside it.

    Source: PixelGen's pixel-space recipe (weights .1 and .01).
    """

    every: int = Field(default=0, ge=0)  # micro-steps, with so many times the weight; 0: never
    weight: float = Field(default=0.1, gt=0)
    dino_weight: float = Field(default=0.0, ge=0)  # of DINOv2's patches; published: .01; 0: not loaded
    t_max: float = Field(default=0.7, gt=0, le=1)  # of 256 px; mapped through the resolution shift
    view: Literal["crop", "pool"] = "crop"
    size: int = Field(default=512, ge=MIN_SIDE)  # pixels

    @model_validator(mode="after")
    def _check_terms(self) -> PerceptualConfig:
        if self.dino_weight and not self.every:
            raise ValueError("dino_weight is of no effect while `every` is 0, which turns the perceptual loss off")
        return self


@dataclass(frozen=True)
class View:
    """What of a micro-batch's image the loss sees: a crop's first row and column, (0, 0) for a pooled image."""

    image: int
    top: int
    left: int


def draw_views(
    config: PerceptualConfig,
    turn: int,
    t: Sequence[float],
    s: float,
    size: tuple[int, int],
    generator_of: Callable[[int], np.random.Generator],
) -> list[View]:
    """Say which images of a micro-batch the loss sees, and where it cuts their crops.

    ``turn`` is the number of the optimiser step plus that of the micro-batch in it: each place in a step has its turn
    once in n steps, however many micro-batches a step has, so that none is seen more often than others. ``t`` holds the
    images' times, ``s`` is their resolution shift, ``size`` their (height, width), ``generator_of`` names the generator
    of the i-th one. Known before the batch is on a device, so that nothing waits for one.
    """
    if config.every == 0 or (turn + 1) % config.every:
        return []
    gate = shift(config.t_max, s)
    seen = [i for i, time in enumerate(t) if time <= gate]
    if config.view == "pool":
        return [View(i, 0, 0) for i in seen]
    room = [max(0, side - config.size) for side in size]
    return [View(i, *generator_of(i).integers(0, room, endpoint=True).tolist()) for i in seen]


class PerceptualLoss:
    """LPIPS v0.1 with VGG-16 (Zhang et al., arXiv 1801.03924): frozen, its gradients flow to the predicted image.

    Raises :class:`ConfigError` where the backbone's weights are not in torch.hub's cache. ``sha256`` names them,
    ``published`` tells whether they are torchvision's, without which the loss means nothing.
    """

    def __init__(self, config: PerceptualConfig, device: torch.device) -> None:
        self.config = config
        # the mean over n micro-steps, of which one is computed, is that of computing each
        self.weight = config.weight * config.every
        path = vgg_path()
        if not path.is_file():
            raise ConfigError(
                f"perceptual.every {config.every}: the loss needs VGG-16's weights, which are not at {path}. Download "
                f"them with `curl -L -o {path} --create-dirs {VGG_URL}` (528 MB), or set perceptual.every to 0"
            )
        self.sha256 = sha256_file(path)
        self.published = self.sha256.startswith(Path(VGG_WEIGHTS).stem.rsplit("-", 1)[1])
        self.network = load_lpips(path).to(device)

    def __call__(self, x_hat: Tensor, x: Tensor, views: Sequence[View]) -> Tensor:
        """Return LPIPS of each view, (len(views),), for predicted and true images (B, 3, H, W) in [-1, 1]."""
        return self.network(show(x_hat, views, self.config), show(x, views, self.config)).flatten()


def show(images: Tensor, views: Sequence[View], config: PerceptualConfig) -> Tensor:
    """Return the crops of images (B, 3, H, W), or the images averaged to an area of ``size`` squared."""
    size = config.size
    if config.view == "crop":
        return torch.stack([images[v.image, :, v.top : v.top + size, v.left : v.left + size] for v in views])
    return pool(torch.stack([images[v.image] for v in views]), size)


def pool(images: Tensor, size: int) -> Tensor:
    """Average images (B, 3, H, W) down to an area of ``size`` squared at their aspect ratio; smaller ones stay."""
    height, width = images.shape[2:]
    factor = size / (height * width) ** 0.5
    return images if factor >= 1 else F.adaptive_avg_pool2d(images, (round(height * factor), round(width * factor)))


def check_views(config: PerceptualConfig, sizes: Iterable[tuple[int, int]]) -> None:
    """Raise :class:`ConfigError` where too little is shown of an image of one of the ``sizes``, (width, height)."""
    for width, height in sizes:
        image = torch.empty(1, 3, height, width, device="meta")
        shown = pool(image, config.size) if config.view == "pool" else image[..., : config.size, : config.size]
        if min(shown.shape[2:]) < MIN_SIDE:
            raise ConfigError(
                f"perceptual.size {config.size}: of images of {width}x{height} VGG would see "
                f"{shown.shape[3]}x{shown.shape[2]} pixels, and needs {MIN_SIDE} each way. Raise it, choose the other "
                "perceptual.view or a larger scale in train.phases, or set perceptual.every to 0"
            )


def lpips_values(total: float, images: int, of: int) -> dict[str, float]:
    """Say what LPIPS was on average, unweighted, where it was computed at all, and of which share of the images."""
    mean = {"train/lpips_loss": total / images} if images else {}
    return {**mean, "train/lpips_share": images / of}


def vgg_path() -> Path:
    """Where torch.hub keeps VGG-16's weights (the file may be absent)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG_WEIGHTS


def load_lpips(backbone: Path | None) -> nn.Module:
    """Build the lpips package's network from its own calibration and the backbone's file; nothing is downloaded.

    Without ``backbone`` its parameters stay on the meta device. Raises :class:`DataError` for the file of another
    network.
    """
    import lpips  # pulls in torchvision: seconds that a run without the loss does not spend

    # on the meta device: initialising VGG's classifier, which LPIPS drops, takes a second of random numbers
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # torchvision's old argument names
        network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    network.requires_grad_(False)
    if backbone is None:
        return network
    vgg = torch.load(backbone, map_location="cpu", weights_only=True, mmap=True)
    state = torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
    for name in network.net.state_dict():  # sliceN.INDEX.weight, where INDEX is VGG's own
        tensor = vgg.get(f"features.{name.partition('.')[2]}")
        if tensor is None:
            raise DataError(f"{backbone}: not VGG-16's weights; delete the file and download it from {VGG_URL}")
        state[f"net.{name}"] = tensor.clone()
    for index, layer in enumerate(network.lins):  # the package registers these twice
        state.update({f"lins.{index}.{name}": state[f"lin{index}.{name}"] for name in layer.state_dict()})
    state.update(network.scaling_layer.state_dict(prefix="scaling_layer."))
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()
