"""A loss beside the flow loss: the section of the config that builds it, and what a run asks of it.

The sections of :class:`train.config.TrainConfig` that are a :class:`LossConfig` are the table of losses. Trainer, count
of FLOPs and plan of memory read it in the order of its fields; none of them knows a loss by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from nanodit.config import Config
from train.method.flow import FlowConfig
from train.model.conditions import Conditions, Subset
from train.model.network import NanoDiT


class LossConfig(Config):
    """A section of the config that adds losses to a run where it is ``on``."""

    title: ClassVar[str]  # on a model's card
    hashes: ClassVar[tuple[str, ...]] = ()  # keys of a checkpoint's state that name frozen networks; null where off

    @property
    def on(self) -> bool:
        """Whether the run computes it at all."""
        raise NotImplementedError

    def build(self, setup: Setup) -> list[Loss]:
        """Return the losses; raises :class:`ConfigError` where the run has not what they need."""
        raise NotImplementedError


@dataclass(frozen=True)
class Setup:
    """The run that losses are built for: the network before it is on the ``device``, the table of dropped conditions,
    and every (width, height) in pixels that an image may have."""

    model: NanoDiT
    table: Mapping[Subset, float]
    sizes: Sequence[tuple[int, int]]
    device: torch.device


@dataclass(frozen=True)
class Drawn:
    """A group of images as the thread that makes micro-batches knows it, before anything is on the device.

    ``turn`` is the optimiser step (0-based, of ``steps``) plus the number of the micro-batch in it; ``size`` is
    (height, width) in pixels and ``shift`` its resolution shift. ``conditions`` are those before dropout, as they are
    stored (:meth:`train.model.conditions.Conditions.unpacked`), ``subsets`` what is kept of them. ``generator_of``
    returns the generator of a purpose and an image, counted from the first.
    """

    step: int
    steps: int
    turn: int
    size: tuple[int, int]
    shift: float
    t: Sequence[float]
    subsets: Sequence[Subset]
    conditions: Conditions
    generator_of: Callable[[str, int], np.random.Generator]


@dataclass(frozen=True)
class Later:
    """A tensor that is made on the device: ``make`` of some conditions, which travel there as they are stored."""

    conditions: Conditions
    make: Callable[[Conditions], Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> Later:
        """Apply ``function`` to every tensor of the conditions."""
        return Later(self.conditions.map(function), self.make)

    def made(self) -> Tensor:
        """Make it, on the device where the conditions lie."""
        return self.make(self.conditions.unpacked())


@dataclass(frozen=True)
class Prediction:
    """A group of images after the forward pass: predicted and true images (b, 3, H, W) in [-1, 1] and times (b,).

    ``projected`` is what the network's head made of its state, None where no loss asked for it; ``prepared`` holds what
    the losses prepared. A frozen network runs within ``autocast()``, and ``note(name, images, *arguments)`` counts its
    FLOPs by :meth:`Loss.one_image`.
    """

    x_hat: Tensor
    x: Tensor
    t: Tensor
    conditions: Conditions
    keep_ids: Tensor | None
    projected: Tensor | None
    prepared: Mapping[str, Any]
    autocast: Callable[[], AbstractContextManager]
    note: Callable[..., None]


@dataclass(frozen=True)
class Stretch:
    """The steps ``start`` to ``end`` (0-based, excluded) of ``steps``, with images of one (width, height) in pixels.

    ``tokens_after`` returns the image tokens after so many blocks, in the mean over routed and dense micro-batches.
    """

    start: int
    end: int
    steps: int
    size: tuple[int, int]
    flow: FlowConfig
    tokens_after: Callable[[int], float]


class Loss:
    """A loss; one that needs no preparation, network or checkpoint defines ``weight`` and ``values`` alone.

    ``name`` is that of its values and FLOPs. The values of a loss of ``every_image`` join the flow loss image by image;
    others are summed over the images that they were computed of. ``needs`` names what :meth:`prepare` makes, once for
    all losses that need it.
    """

    name: str
    every_image: bool = True
    needs: str = ""
    projects: bool = False  # where what it needs is there, the network returns what its head makes of the state
    network: nn.Module | None = None  # frozen

    def weight(self, step: int, steps: int) -> float:
        """Return its weight in optimiser step ``step`` (0-based) of ``steps``."""
        raise NotImplementedError

    def values(self, prediction: Prediction) -> Tensor | None:
        """Return its value for each image, (b,) or of those that it is computed of; None where of none.

        Never waits for the device.
        """
        raise NotImplementedError

    def logged(self, measured: float, images: int, weight: float, subsets: Sequence[Subset]) -> dict[str, float]:
        """Return what to log of a step of ``len(subsets)`` images, by tag.

        ``measured`` is the mean over a step's images for a loss of every image, else the sum over the ``images`` that
        it was computed of.
        """
        if self.every_image:
            return {f"train/{self.name}_loss": measured}
        return {f"train/{self.name}_loss": measured / images} if images else {}

    # What it needs of a micro-batch

    def prepare(self, drawn: Drawn) -> Any:
        """Return what it needs of a group of images, a tensor, one made :class:`Later` or anything on the host.

        None where nothing.
        """
        return None

    def part(self, prepared: Any, start: int, stop: int) -> Any:
        """Return what of that belongs to the images from ``start`` to ``stop`` of the group; None where nothing.

        Of a tensor, and of what else has something for each image, those places.
        """
        return prepared[start:stop]

    def largest(self, images: int, size: tuple[int, int], device: torch.device) -> Any:
        """Return the largest that :meth:`prepare` does for images of (width, height) pixels, without content."""
        return None

    # What it costs

    def one_image(self) -> Callable[..., Tensor] | None:
        """Return a function of what is noted, on the meta device, that computes what one image takes; None: nothing."""
        return None

    def expected_flops(self, stretch: Stretch, count: Callable[..., Any]) -> Any:
        """Return the FLOPs of an image in the mean; ``count(name, *arguments)`` returns those of :meth:`one_image`.

        They are sums and multiples of what ``count`` returns, which may also be an array of FLOPs and bytes.
        """
        return 0.0

    # What it says and leaves behind

    def announce(self, steps: int, layers: Mapping[str, Any]) -> list[str]:
        """Return what to say before the first of ``steps``; ``layers`` are those of dataset.json."""
        return []

    def missing(self) -> list[str]:
        """Return what a plan says of files that are not there yet."""
        return []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint's state keeps of it, of its config's ``hashes``."""
        return {}

    def check(self, state: Mapping[str, Any], path: Path) -> None:
        """Raise :class:`DataError` where the run of a checkpoint's ``state``, from ``path``, cannot be continued."""
