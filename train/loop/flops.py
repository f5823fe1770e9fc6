"""The floating-point operations of training: counted once per shape on the meta device, where nothing is computed.

A multiply-add is two; a forward pass and its backward pass count together. Context tokens count; tokens that routing or
a dropped condition leaves out do not. What activation checkpointing computes again counts once, as in model FLOPs
utilisation (Chowdhery et al., arXiv 2204.02311, appendix B); neither the optimiser nor elementwise arithmetic counts.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from train.config import TrainConfig
from train.method.dino_loss import DinoLoss, PatchFeatures, patch_distance
from train.method.perceptual import PerceptualConfig, PerceptualLoss, View, load_lpips, show
from train.method.repa import RepaHead
from train.model.conditions import Conditions
from train.model.config import ModelConfig
from train.model.modalities import Features
from train.model.network import NanoDiT

META = torch.device("meta")
Argument = Tensor | Conditions | None


def count_flops(function: Callable[..., Tensor], *arguments: Argument) -> int:
    """Return the FLOPs of a call and its backward pass; arguments and parameters are on the meta device.

    There attention is two matrix products and their gradients: other devices' kernels, of which some compute the scores
    again in the backward pass, are not counted for that.
    """
    with FlopCounterMode(display=False) as counter:
        function(*arguments).sum().backward()
    return counter.get_total_flops()


class ModelFlops:
    """The FLOPs of NanoDiT, from three small ones: the dense blocks of a large one are alike, and the routed ones."""

    def __init__(self, config: ModelConfig, features: Features, route: range) -> None:
        self.depth, self.routed = config.depth, len(route)
        with META:
            one, two = (config.model_copy(update={"depth": depth}) for depth in (1, 2))
            self.one, self.two = NanoDiT(one, features), NanoDiT(two, features)
            self.one_of_each = NanoDiT(two, features, range(1, 2))

    def __call__(self, z: Tensor, t: Tensor, conditions: Conditions, keep_ids: Tensor | None = None) -> int:
        one, two = (count_flops(model, z, t, conditions) for model in (self.one, self.two))
        dense = one + (self.depth - 1) * (two - one)
        if keep_ids is None:
            return dense
        return dense + self.routed * (count_flops(self.one_of_each, z, t, conditions, keep_ids) - two)


class LpipsFlops:
    """The FLOPs of LPIPS for one view of an image (1, 3, H, W), and of its gradient to the prediction."""

    def __init__(self, config: PerceptualConfig) -> None:
        self.config, self.network = config, load_lpips(None).to(META)

    def __call__(self, x_hat: Tensor, x: Tensor) -> int:
        views = [View(0, 0, 0)]
        return count_flops(self.network, show(x_hat, views, self.config), show(x, views, self.config))


class DinoFlops:
    """The FLOPs of DINOv2's patch distance for one view of an image (1, 3, H, W), and of its gradient."""

    def __init__(self, config: PerceptualConfig, network: PatchFeatures) -> None:
        self.config, self.network = config, copy.deepcopy(network).to(META)

    def __call__(self, x_hat: Tensor, x: Tensor) -> int:
        def distance(*images: Tensor) -> Tensor:
            return patch_distance(*map(self.network, images))

        views = [View(0, 0, 0)]
        return count_flops(distance, show(x_hat, views, self.config), show(x, views, self.config))


class HeadFlops:
    """The FLOPs of the REPA head, from its output (1, n, c)."""

    def __init__(self, head: RepaHead) -> None:
        self.head = copy.deepcopy(head).to(META)
        self.width = head.mlp[0].in_features

    def __call__(self, projected: Tensor) -> int:
        state = torch.empty(1, projected.shape[1], self.width, device=META, requires_grad=True)
        return count_flops(self.head, state)


class FlopCounter:
    """Adds up what was executed; ``counts`` tells by name what one image of a call's arguments costs."""

    def __init__(self, counts: Mapping[str, Callable[..., int]]) -> None:
        self._counts = counts
        self._noted: Counter[Any] = Counter()  # images by the shape of a call
        self._calls: dict[Any, tuple[str, list[Argument]]] = {}  # an example of each shape, of one image
        self._flops: dict[Any, int] = {}  # of one image: all that is counted grows with the images of a batch

    def note(self, name: str, images: int, *arguments: Argument) -> None:
        """Remember a forward and backward pass of ``images`` images; cheap, and never waits for a device."""
        shape = (name, *map(_shape, arguments))
        if shape not in self._calls:
            self._calls[shape] = name, [_on_meta(argument) for argument in arguments]
        self._noted[shape] += images

    def take(self) -> int:
        """Return the FLOPs of what was noted since the last call; a shape not seen before costs some milliseconds."""
        for shape in self._noted.keys() - self._flops.keys():
            name, arguments = self._calls[shape]
            self._flops[shape] = self._counts[name](*arguments)
        total = sum(self._flops[shape] * images for shape, images in self._noted.items())
        self._noted.clear()
        return total


def flop_counter(
    model: NanoDiT, config: TrainConfig, perceptual: PerceptualLoss | None, dino: DinoLoss | None
) -> FlopCounter:
    """Return the counter of everything that a run computes forwards and backwards."""
    counts = {"model": ModelFlops(config.model, model.features, model.route)}
    if perceptual:
        counts["lpips"] = LpipsFlops(config.perceptual)
    if dino:
        counts["dino"] = DinoFlops(config.perceptual, dino.network)
    if model.repa_head is not None:
        counts["repa"] = HeadFlops(model.repa_head)
    return FlopCounter(counts)


def _shape(argument: Argument) -> Any:
    if isinstance(argument, Conditions):
        return tuple((name, tensor.shape[1:]) for name, tensor in argument.tensors.items())
    return None if argument is None else argument.shape[1:]


def _on_meta(argument: Argument) -> Argument:
    if isinstance(argument, Conditions):
        return argument.map(_on_meta)
    if argument is None:
        return None
    size = (1, *argument.shape[1:])
    return torch.empty(size, dtype=argument.dtype, device=META, requires_grad=argument.requires_grad)
