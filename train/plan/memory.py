"""How much memory of a GPU a run takes, without a GPU: the trainer's own micro-step on the meta device.

There tensors have sizes and no content, so that what is alive at any moment, the backward pass and recomputed blocks
included, is counted and not derived. What a GPU does differently from the meta device is put in its place: matrices in
bfloat16 under autocast, attention and normalisation as one kernel each. What no tensor shows is assumed: see
``CONTEXT`` and ``FRAGMENTATION``. The counting is exact (tests/train/plan/test_memory.py); on a GPU the sums were never
measured.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_flop_count

from train.config import TrainConfig
from train.data.batch_plan import scaled_size
from train.data.buffers import GROWTH
from train.loop.flops import META, call_on_meta
from train.loop.sending import SLOTS
from train.loop.trainer import Trainer
from train.model.modalities import MODALITIES
from train.plan.rehearsal import Shapes, drawing_request, largest_batch

CONTEXT = 0.7e9  # bytes: CUDA's context, kernels, cuBLAS's and attention's workspaces; assumed
FRAGMENTATION = 0.06  # of the tensors: what the allocator rounds up and cannot use again; assumed
STATES = 4  # images that a sampler keeps beside the network's output: states and predictions


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that were made within it and are still alive: ``now`` and at the ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        keywords = keywords or {}
        given = {storage._cdata for storage in _storages((arguments, keywords))}
        result = call_on_meta(function, arguments, keywords)
        for storage in _storages(result):
            address, size = storage._cdata, storage.nbytes()
            if address not in given and address not in self._alive:  # else a view, or written in place
                self._alive.add(address)
                self.now += size
                weakref.finalize(storage, self._free, address, size)
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.now -= size


def _storages(values: Any) -> Iterable[torch.UntypedStorage]:
    return (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))


class _Attention(torch.autograd.Function):
    """The memory of a fused kernel: it keeps its input, its output and a number for each query and head.

    Source: the entries of ``_scaled_dot_product_flash_attention`` and ``_efficient_attention`` in torch's
    ``derivatives.yaml``; so does :mod:`torch.nn.attention.varlen`.
    """

    @staticmethod
    def forward(ctx: Any, mode: LikeGpu, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        b, h, n, _ = q.shape
        ctx.mode, ctx.flops = mode, sdpa_flop_count(q.shape, k.shape, v.shape)
        mode.attention += ctx.flops
        out = q.new_empty(b, n, h, v.shape[3]).transpose(1, 2)  # as the kernel lays it out
        bias = None if mask is None else mask.to(q.dtype)  # DINOv2 has none
        ctx.save_for_backward(q, k, v, bias, out, q.new_empty(b, h, n, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.mode.attention += 2 * ctx.flops  # scores that are computed again are not model FLOPs
        return None, *map(torch.empty_like, ctx.saved_tensors[:3]), None


class _RmsNorm(torch.autograd.Function):
    """The memory of ``_fused_rms_norm``: it keeps its input, the weight and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.weighted = weight is not None
        rows = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(x, rows, *([weight] if ctx.weighted else []))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, _, *weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight[0]) if weight else None


class LikeGpu(TorchFunctionMode):
    """Makes the meta device take the memory that a GPU would; ``bf16``: under autocast to bfloat16.

    ``attention`` adds up the FLOPs of the kernels that it puts in the place of attention.

    The functions are those of NanoDiT and VGG among autocast's lists (torch's ``autocast_mode.h``).
    """

    LOWER = frozenset({F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__})
    FLOAT32 = frozenset(
        {F.layer_norm, F.cosine_similarity, torch.pow, Tensor.pow, Tensor.__pow__, torch.sum, Tensor.sum}
    )

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self.bf16, self.attention = bf16, 0
        self._before: list[tuple[bool, torch.dtype]] = []

    def __enter__(self) -> LikeGpu:
        """Begin; matrices that several layers read are then cast once for all, as on a GPU."""
        self._before.append((torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")))
        if self.bf16:
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End."""
        enabled, dtype = self._before.pop()
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)
        super().__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        keywords = keywords or {}
        if function is Tensor.backward:
            with self:  # torch leaves a mode for its functions, but blocks are computed again in this one
                engine, one = torch.autograd.Variable._execution_engine, torch.ones_like(arguments[0])
                return engine.run_backward(
                    arguments, (one,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if function is F.rms_norm:
            x, _, *weight = arguments
            return _RmsNorm.apply(*self._to(torch.float32, [x, *(weight or [None])]))
        if function is F.scaled_dot_product_attention:
            q, k, v = self._to(torch.bfloat16, arguments)
            return _Attention.apply(self, q, k, v, keywords["attn_mask"])
        if function in self.LOWER:
            arguments = self._to(torch.bfloat16, arguments)
        elif function in self.FLOAT32:
            arguments = self._to(torch.float32, arguments)
        return function(*arguments, **keywords)

    def _to(self, dtype: torch.dtype, arguments: Iterable[Any]) -> list[Any]:
        if not self.bf16:
            return list(arguments)
        return [
            argument.to(dtype) if isinstance(argument, Tensor) and argument.is_floating_point() else argument
            for argument in arguments
        ]


@dataclass(frozen=True)
class Memory:
    """Bytes of a run on a GPU: what is always there, and the most that each phase adds; an estimate."""

    weights: int
    optimizer: int
    averages: int  # EMA and power averages
    frozen: int  # networks of losses
    sending: int  # the slots in which micro-batches arrive, as they are stored
    gradients: int
    activations: int  # the most that lives in a micro-step beside gradients, its images and conditions included
    update: int  # the most that Muon's step needs beside gradients
    drawing: int  # the averaged copy, and the most that lives while it draws
    largest: str  # what the micro-batch with the most activations is

    @property
    def standing(self) -> int:
        """Bytes that are there all the time."""
        return self.weights + self.optimizer + self.averages + self.frozen + self.sending

    @property
    def phases(self) -> dict[str, int]:
        """The peak of each phase of a run, without what is assumed."""
        return {
            "micro-step": self.standing + self.gradients + self.activations,
            "update": self.standing + self.gradients + self.update,
            "drawing": self.standing + self.drawing,
        }

    @property
    def assumed(self) -> int:
        """Bytes that no tensor shows."""
        return round(CONTEXT + FRAGMENTATION * max(self.phases.values()))

    @property
    def peak(self) -> int:
        """What the card must have."""
        return max(self.phases.values()) + self.assumed


def estimate_memory(trainer: Trainer, shapes: Shapes) -> Memory:
    """Return what the run of a trainer of :func:`meta_trainer` takes on a GPU; a second or two, no data is read."""
    config, model = trainer.config, trainer.model
    with LiveBytes() as live, LikeGpu(config.train.precision != "fp32"):
        batch = largest_batch(trainer, shapes, META)
        for _ in range(2):  # the gradients of the first are there in the second
            trainer.micro_step(batch)
    activations = live.peak - tensor_bytes(p.grad for p in model.parameters() if p.grad is not None)
    trainer.optimizer.zero_grad()
    update = 0
    if trainer.optimizer.muon:
        for parameter in trainer.optimizer.muon.parameters.values():
            parameter.grad = torch.empty_like(parameter)
        with LiveBytes() as live:
            trainer.optimizer.muon.step()
        trainer.optimizer.zero_grad()
        update = live.peak
    drawing = 0
    if config.visual_debug.every_steps:
        with LiveBytes() as live, LikeGpu(config.visual_debug.precision == "bf16"), torch.no_grad():
            conditions, noise = drawing_request(trainer, shapes, META)
            given = frozenset(trainer.model.features.modalities)
            arms = [conditions.only(kept) for kept in config.visual_debug.sampling(given).chain(given)]
            height, width = noise.shape[2:]
            average = trainer.ema_model()
            contexts = [average.encode_context(arm, height, width, cache=True) for arm in arms]
            for context in contexts:
                average(noise, noise[:, 0, 0, 0], context)
        drawing = live.peak + STATES * tensor_bytes([noise])
    frozen = [loss.network for loss in trainer.losses.values() if loss.network is not None]
    return Memory(
        weights=tensor_bytes(model.parameters()),
        optimizer=tensor_bytes(trainer.optimizer.tensors().values()),
        averages=tensor_bytes([*trainer.ema.state.values(), *trainer.power.tensors().values()]),
        frozen=tensor_bytes(parameter for network in frozen for parameter in network.parameters()),
        sending=sending_bytes(trainer, shapes),
        gradients=tensor_bytes(model.parameters()),
        activations=activations,
        update=update,
        drawing=drawing,
        largest=f"{len(batch.keys)} images of {batch.x.shape[3]}x{batch.x.shape[2]}",
    )


def sending_bytes(trainer: Trainer, shapes: Shapes) -> int:
    """Return what the slots of a GPU take into which micro-batches are copied (:mod:`train.loop.sending`).

    They grow to what the largest micro-batch takes as it is stored, with the longest captions.
    """
    plan, most = trainer.batches.plan, 0
    for bucket, scale in product(plan.order.sizes, plan.scales):
        size, row = scaled_size(bucket, scale), shapes.rows[bucket]
        noise = 16 if trainer.noise["kind"] == "device" else 12 * math.prod(size)  # a key, or float32 for each value
        features = shapes.features.widths.items()
        stored = sum(MODALITIES[name].stored_bytes(row, width, shapes.longest_text) for name, width in features)
        image = 3 * math.prod(size) + noise + stored + 8 * plan.tokens(size)  # which tokens are kept, at most all
        most = max(most, plan.most_images(bucket, scale) * image)
    return round(SLOTS * GROWTH * most)


def meta_trainer(config: TrainConfig, dataset: Any) -> Trainer:
    """Return the run's trainer with everything on the meta device; its blocks are not compiled.

    ``dataset`` is the run's, or a :class:`train.plan.rehearsal.StandIn`.
    """
    train = config.train.model_copy(update={"compile": False})
    with META:
        trainer = Trainer(config.model_copy(update={"train": train}), dataset, META)
    trainer.config = config
    return trainer


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors that share no memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
