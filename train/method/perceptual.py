"""The perceptual loss: LPIPS-VGG between the predicted image and the true one, at times where there is one to see.

VGG costs as much as a small transformer: so only every n-th micro-step pays for it, at n times the weight, and each
image shows a crop or an average of itself. The network is frozen; gradients flow through it to the prediction.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nanodit.errors import ConfigError, DataError
from nanodit.files import sha256_file
from nanodit.rng import generator
from prep.encoders.backbones import VGG16
from train.method.flow import shift, timesteps
from train.method.loss import Drawn, Loss, LossConfig, Prediction, Setup, Stretch
from train.model.conditions import Subset

MIN_SIDE = 16  # VGG halves an image four times


class PerceptualConfig(LossConfig):
    """Whether, how strongly and on what LPIPS is a loss, and DINOv2 (:mod:`train.method.dino_loss`) beside it.

    Source: PixelGen's pixel-space recipe (weights .1 and .01).
    """

    title: ClassVar[str] = "perceptual loss (LPIPS-VGG)"
    hashes: ClassVar[tuple[str, ...]] = ("perceptual", "perceptual_dino")

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

    @property
    def on(self) -> bool:
        return self.every > 0

    def build(self, setup: Setup) -> list[Loss]:
        """Load the frozen networks; raises :class:`ConfigError` where their weights are not there."""
        from train.method.dino_loss import DinoLoss  # which shows what this module cuts out

        check_views(self, setup.sizes)
        losses: list[Loss] = [PerceptualLoss(self, setup.device)]
        return [*losses, DinoLoss(self, setup.device)] if self.dino_weight else losses


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


class ViewLoss(Loss):
    """A distance between what a frozen network makes of views of the predicted and of the true image."""

    every_image, needs = False, "views"
    config: PerceptualConfig
    network: nn.Module
    sha256: str | None = None  # of the network's weights; None on the meta device, where nobody has to have them
    hash_key: str  # of them in a checkpoint's state
    origin: str  # of them, in words

    def __call__(self, x_hat: Tensor, x: Tensor, views: Sequence[View]) -> Tensor:
        """Return the distance of each view, (len(views),), for predicted and true images (B, 3, H, W) in [-1, 1]."""
        return self.distance(self.network, (show(images, views, self.config) for images in (x_hat, x)))

    @staticmethod
    def distance(network: nn.Module, shown: Iterable[Tensor]) -> Tensor:
        """Return the network's distance between two batches of images that are shown to it, (b,)."""
        raise NotImplementedError

    def values(self, prediction: Prediction) -> Tensor | None:
        views, images = prediction.prepared.get("views"), (prediction.x_hat, prediction.x)
        if not views:
            return None
        with prediction.autocast():
            distances = self(*images, views).float()
        prediction.note(self.name, len(views), *images)
        return distances

    def prepare(self, drawn: Drawn) -> list[View] | None:
        crop_of = partial(drawn.generator_of, "crop")
        return draw_views(self.config, drawn.turn, drawn.t, drawn.shift, drawn.size, crop_of) or None

    def part(self, prepared: list[View], start: int, stop: int) -> list[View] | None:
        shown = [view for view in prepared if start <= view.image < stop]
        return [View(view.image - start, view.top, view.left) for view in shown] or None

    def largest(self, images: int, size: tuple[int, int], device: torch.device) -> list[View]:
        return [View(i, 0, 0) for i in range(images)]

    def one_image(self) -> Callable[..., Tensor]:
        network, config, views = self.on_meta(), self.config, [View(0, 0, 0)]
        return lambda *images: self.distance(network, (show(image, views, config) for image in images))

    def on_meta(self) -> nn.Module:
        """Return the network with its parameters on the meta device."""
        raise NotImplementedError

    def expected_flops(self, stretch: Stretch, count: Callable[..., Any]) -> Any:
        width, height = stretch.size
        image, s = torch.empty(1, 3, height, width, device="meta"), stretch.flow.shift_of(height, width)
        drawn = timesteps(stretch.flow, generator(0, "plan"), np.full(4096, s))
        early = float((drawn <= shift(self.config.t_max, s)).mean())
        # on a prediction, to which gradients flow
        return count(self.name, image.clone().requires_grad_(), image) * early / self.config.every

    def state(self) -> dict[str, Any]:
        return {self.hash_key: self.sha256}

    def check(self, state: Mapping[str, Any], path: Path) -> None:
        if state.get(self.hash_key) not in (None, self.sha256):
            raise DataError(f"{path}: was trained with other weights than {self.origin}; put those back")


class PerceptualLoss(ViewLoss):
    """LPIPS v0.1 with VGG-16 (Zhang et al., arXiv 1801.03924): frozen, its gradients flow to the predicted image.

    Raises :class:`ConfigError` where the backbone's weights are not in torch.hub's cache. ``sha256`` names them,
    ``published`` tells whether they are torchvision's, without which the loss means nothing.
    """

    name, hash_key = "lpips", "perceptual"

    def __init__(self, config: PerceptualConfig, device: torch.device) -> None:
        self.config, path = config, VGG16.path
        self.origin, self.published = str(path), True
        if device.type == "meta":
            self.network = load_lpips(None).to(device)
            return
        if not path.is_file():
            raise ConfigError(
                f"perceptual.every {config.every}: the loss needs VGG-16's weights, which are not at {path}. Get them: "
                f"{VGG16.remedy}. Or set perceptual.every to 0"
            )
        self.sha256 = sha256_file(path)
        self.published = self.sha256.startswith(VGG16.digits)
        self.network = load_lpips(path).to(device)

    @staticmethod
    def distance(network: nn.Module, shown: Iterable[Tensor]) -> Tensor:
        return network(*shown).flatten()

    def on_meta(self) -> nn.Module:
        return load_lpips(None).to("meta")

    def weight(self, step: int, steps: int) -> float:
        # the mean over n micro-steps, of which one is computed, is that of computing each
        return self.config.weight * self.config.every

    def logged(self, measured: float, images: int, weight: float, subsets: Sequence[Subset]) -> dict[str, float]:
        return lpips_values(measured, images, len(subsets))

    def announce(self, steps: int, layers: Mapping[str, Any]) -> list[str]:
        if self.published:
            return []
        return [f"perceptual: {self.origin} are not the published weights, so this loss means nothing"]

    def missing(self) -> list[str]:
        if VGG16.path.is_file():
            return []
        return [f"perceptual: VGG-16's weights are not at {VGG16.path}; {VGG16.remedy}"]


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
            raise DataError(f"{backbone}: not VGG-16's weights; delete the file; {VGG16.remedy}")
        state[f"net.{name}"] = tensor.clone()
    for index, layer in enumerate(network.lins):  # the package registers these twice
        state.update({f"lins.{index}.{name}": state[f"lin{index}.{name}"] for name in layer.state_dict()})
    state.update(network.scaling_layer.state_dict(prefix="scaling_layer."))
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()
