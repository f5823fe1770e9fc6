"""What a network computes and moves for an image, by kind, and how long a GPU takes for that.

Matrix products, attention and everything else are counted on the meta device, from what the network does there, and
each kind takes the time of what bounds it: FLOPs over a share of the GPU's peak, or bytes over a share of its
bandwidth (Williams et al., "Roofline", CACM 52(4), 2009). The shares are a range, since no card confirmed them. Left
out is what does not grow with the images: weights that are read, their gradients, the optimiser, and the launches of
kernels, which a fast card waits for where micro-batches are small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from train.hardware import Gpu
from train.loop.flops import Argument, call_on_meta
from train.model.conditions import Conditions
from train.plan.memory import LikeGpu

aten = torch.ops.aten
PRODUCTS = {
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten._convolution, aten.convolution_backward,
}  # fmt: skip
ALLOCATES = {aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided}


class Work(NamedTuple):
    """FLOPs and bytes by kind; a sum or a multiple of some is computed with numpy arrays (4,) of the same order."""

    matrix: float  # FLOPs of matrix products and convolutions
    moved: float  # bytes that these read and write
    attention: float  # FLOPs of attention
    elementwise: float  # bytes that all else reads and writes, fused kernels included

    @property
    def flops(self) -> float:
        """All FLOPs that are counted (:mod:`train.loop.flops`)."""
        return self.matrix + self.attention


class Rates(NamedTuple):
    """The share of a GPU's peak that matrix products and attention reach, and of its bandwidth that all else does."""

    matrix: float
    attention: float
    bandwidth: float


# Assumed. Matrix products of a width below a thousand fall short of the peak on the cards that have most of it, and
# come close to it on small ones. Attention without a mask has reached 73 % forwards and 63 % backwards of an A100's
# peak (FlashAttention-2, arXiv 2307.08691) and 35 % of an H100's (FlashAttention-3, arXiv 2407.08608); kernels that
# take a mask reach less. Copies reach about nine tenths of the bandwidth on a data sheet, short kernels less.
SLOW = Rates(matrix=0.50, attention=0.20, bandwidth=0.70)
FAST = Rates(matrix=0.90, attention=0.60, bandwidth=0.92)

DATA_SHEET = Rates(1.0, 1.0, 1.0)


def kinds_on(gpu: Gpu, work: Work, rates: Rates = DATA_SHEET) -> dict[str, float]:
    """Return the seconds of each kind of work on a GPU; with the default the least that its data sheet allows."""
    flops, size = gpu.tflops * 1e12, gpu.bandwidth * 1e9 * rates.bandwidth
    return {
        "matrix products": max(work.matrix / (rates.matrix * flops), work.moved / size),
        "attention": work.attention / (rates.attention * flops),
        "elementwise": work.elementwise / size,
    }


def seconds_on(gpu: Gpu, work: Work) -> tuple[float, float]:
    """Return the least and the most seconds that a GPU is expected to take."""
    fast, slow = (sum(kinds_on(gpu, work, rates).values()) for rates in (FAST, SLOW))
    return fast, slow


def count_work(function: Callable[..., Tensor], *arguments: Argument) -> np.ndarray:
    """Return the :class:`Work` of a call and its backward pass as an array (4,), under autocast to bfloat16.

    Arguments and parameters are on the meta device; FLOPs are those of :func:`train.loop.flops.count_flops`.
    """
    given = [tensor for one in arguments for tensor in _tensors(one)]
    with _Traffic(given) as traffic, LikeGpu(bf16=True) as gpu:
        function(*arguments).sum().backward()
    attention = traffic.attention + gpu.attention
    return np.array([traffic.matrix, traffic.moved, attention, traffic.elementwise], np.float64)


def _tensors(argument: Argument) -> list[Tensor]:
    if isinstance(argument, Conditions):
        return [*argument.tensors.values()]
    return [] if argument is None else [argument]


class _Traffic(TorchDispatchMode):
    """Adds up what operators on the meta device would read and write, as far as it grows with the images.

    What comes neither from the ``given`` tensors nor from an operator is a weight, and so is what is made of weights
    alone. A product in which no weight takes part is the gradient of one. What is only allocated stands for the kernel
    in whose place :class:`LikeGpu` did so, which reads about as much as it writes.
    """

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.matrix = self.moved = self.attention = self.elementwise = 0.0
        # whether it belongs to the images, by the address of a storage, which stays alive as long as that is in use
        self._known = {tensor.untyped_storage()._cdata: (True, tensor.untyped_storage()) for tensor in given}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        keywords = keywords or {}
        read = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
        result = call_on_meta(function, arguments, keywords)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        packet = function.overloadpacket
        of_images = [self._of_images(tensor) for tensor in read]
        product = packet in PRODUCTS
        gradient = product and all(of_images)
        before = {tensor.untyped_storage()._cdata for tensor in read}
        fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in before]
        for tensor in fresh:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = (not read or any(of_images)) and not gradient, storage
        if made and not fresh and not function._schema.is_mutable:
            return result  # a view
        size = sum(_bytes(tensor) for tensor, own in zip(read, of_images) if own)
        size += sum(_bytes(tensor) for tensor in (fresh or made) if self._of_images(tensor))
        if product:
            self.matrix += flop_registry[packet](*arguments, **keywords, out_val=result)
            self.moved += size
            return result
        if formula := flop_registry.get(packet):
            self.attention += formula(*arguments, **keywords, out_val=result)
        if packet in ALLOCATES:
            self.elementwise += 2 * sum(map(_bytes, fresh))
        else:
            self.elementwise += size
        return result

    def _of_images(self, tensor: Tensor) -> bool:
        return self._known.get(tensor.untyped_storage()._cdata, (False, None))[0]


def _bytes(tensor: Tensor) -> int:
    """Return what a tensor takes, a repeated one once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
