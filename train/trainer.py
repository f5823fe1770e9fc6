"""The training loop: micro-batches, optimiser steps, and everything that must survive a kill.

All randomness comes from counter-based generators named by (seed, purpose, step, image), never from a global state. So
the weights are a function of config, data and seed, however often the run was interrupted (bit-equal on a CPU), and
what looks on (logging, pictures, validation) cannot change them.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prep.console import Progress, say
from prep.errors import DataError, Interrupted
from prep.faults import fault
from prep.files import canonical_json, write_atomic
from train.checkpoint import Checkpoint, load_weights, save_checkpoint
from train.conditioning import Conditions, Subset, deal, subset_name
from train.config import TrainConfig
from train.data import Order, TrainingSet, bucket_size, prefetch
from train.ema import EMA
from train.flow import flow_loss, interpolate, timesteps, to_x, velocity
from train.hardware import autocast_dtype, can_compile
from train.model import Features, NanoDiT, build_model
from train.noise import generator
from train.optim import build_optimizer, learning_rate
from train.runfolder import StopRequest
from train.tracking import Rates, Tracker, environment
from train.visual import VisualDebug

MIN_GROUP = 8  # images of one condition subset that are worth a forward of their own


@dataclass(frozen=True)
class Part:
    """Some images of a micro-batch that go through the network together."""

    images: slice
    conditions: Conditions


@dataclass(frozen=True)
class MicroBatch:
    """Everything that one micro-step needs: pixels and noise (B, 3, H, W), t (B,), and conditions after dropout."""

    keys: list[str]
    subsets: list[Subset]
    x: Tensor
    noise: Tensor
    t: Tensor
    parts: list[Part]

    def to(self, device: torch.device) -> MicroBatch:
        """Move every tensor."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("x", "noise", "t")}
        return replace(self, **moved, parts=[Part(p.images, p.conditions.to(device)) for p in self.parts])


class NonFiniteError(DataError):
    """A loss or gradient that is not a number; raised before the optimiser or the EMA was touched."""


class Trainer:
    """One run: the state that checkpoints hold (model, EMA, optimiser, step) and the loop that advances it."""

    def __init__(self, config: TrainConfig, dataset: Any, device: torch.device) -> None:
        self.config, self.device = config, device
        self.step = 0  # completed optimiser steps
        self.data = TrainingSet(dataset, config.data.cache_gb)
        self.order = Order(self.data.sizes, config.train.batch_size, config.seed)
        self.table = config.conditioning.resolve(Features.from_dataset(dataset.info).modalities)
        self.visual = VisualDebug(config, dataset, self.table)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model: NanoDiT = build_model(config.model, Features.from_dataset(dataset.info)).to(device)
        self.model.gradient_checkpointing = config.train.gradient_checkpointing
        compiles = config.train.compile is True or (config.train.compile == "auto" and can_compile(device.type))
        if compiles:
            # on a CPU one graph for all shapes: buckets and dropped conditions make dozens, at seconds each
            self.model.compile_blocks(dynamic=device.type == "cpu")
        elif config.train.compile == "auto":
            say("compile: no C++ compiler with Python's headers (or no Triton) here, so the blocks run uncompiled")
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.ema = EMA(self.model, config.train.steps, config.train.ema_decay)
        self.autocast_dtype = autocast_dtype(config.train.precision, device)
        self.images_per_step = config.train.batch_size * config.train.grad_accumulation_steps

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from ``checkpoint``; raises :class:`DataError` where its tensors do not fit."""
        load_weights(self.model, checkpoint.model, checkpoint.path / "model.safetensors")
        try:
            self.ema.load(checkpoint.ema)
            self.optimizer.load_tensors(checkpoint.optimizer)
        except ValueError as error:
            raise DataError(f"{checkpoint.path}: {error}; it is the checkpoint of another model") from None
        self.step = checkpoint.state["step"]

    def run(self) -> None:
        """Train up to ``train.steps``, saving on the way and at the end.

        Raises :class:`Interrupted` after SIGTERM or SIGINT, with the last completed step saved, and
        :class:`NonFiniteError`.
        """
        config, accumulation = self.config, self.config.train.grad_accumulation_steps
        self._announce()
        batches = prefetch(self.make_micro_batch, self.step * accumulation, config.data.prefetch)
        tracker = Tracker(config.run_folder, self.step)
        progress = Progress("train", config.train.steps, "steps", done=self.step)
        rates = Rates()
        saved = self.step
        with contextlib.closing(batches), contextlib.closing(tracker), progress, StopRequest() as stop:
            while self.step < config.train.steps:
                started = time.perf_counter()
                step_batches: list[MicroBatch] = []
                losses: list[Tensor] = []
                sums = torch.zeros(2, device=self.device)
                for _ in range(accumulation):
                    if stop.requested:  # the running accumulation is discarded: it is not part of any state
                        if saved < self.step:
                            tracker.sync()
                            self.save()
                        raise Interrupted(f"stopped at step {self.step}, saved; the same command continues")
                    batch = next(batches).to(self.device)
                    batch_losses, velocities = self.micro_step(batch)
                    sums += torch.stack((batch_losses.sum(), velocities.sum()))
                    step_batches.append(batch)
                    losses.append(batch_losses)

                norms, total_norm = gradient_norms(self.model)
                # the only wait for the device in a step, and it comes before anything is changed
                loss, velocity_square, total, *group_norms = torch.stack(
                    (*(sums / self.images_per_step), total_norm, *norms.values())
                ).tolist()
                if not (np.isfinite(loss) and np.isfinite(total)):
                    raise self._report_non_finite(step_batches, losses, dict(zip(norms, group_norms)))
                clip_gradients(self.model, total_norm, config.train.grad_clip)
                schedule = config.train
                rate = learning_rate(self.step, schedule.lr, schedule.lr_min, schedule.warmup, schedule.steps)
                self.optimizer.set_lr(rate)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.step += 1
                decay = self.ema.update(self.model, self.step)
                rates.add(self.images_per_step, time.perf_counter() - started)
                fault("train.step")

                if self.step % config.log_every == 0 or self.step == config.train.steps:
                    values = {
                        "train/loss": loss,
                        "train/flow_loss": loss,
                        "train/grad_norm": total,
                        "train/velocity_norm": velocity_square**0.5,
                        "train/learning_rate": rate,
                        "train/ema_decay": decay,
                        **condition_shares(step_batches, self.table),
                        **{f"grad_norm/{group}": norm for group, norm in zip(norms, group_norms)},
                        "sys/active_tokens": sum(image_tokens(b, config.model.patch_size) for b in step_batches),
                        **rates.take(),
                        **memory(self.device),
                    }
                    tracker.log(self.step, values)
                progress.update(self.step, loss=f"{loss:.4f}", **rates.shown())
                if self._due(config.visual_debug.every_steps):
                    self.draw(tracker)
                if self._due(config.checkpoint.every_steps) or self.step == config.train.steps:
                    tracker.sync()
                    self.save()
                    saved = self.step

    def make_micro_batch(self, index: int) -> MicroBatch:
        """Return micro-batch ``index`` of the run: a pure function of config and data; another thread calls ahead."""
        config = self.config
        accumulation, size = config.train.grad_accumulation_steps, config.train.batch_size
        step, position = divmod(index, accumulation)
        mine = slice(position * size, (position + 1) * size)  # of the images of the step
        slot = self.order[index]
        rows = self.data.select(slot)
        x, conditions = self.data.load(rows)

        # drawn for the whole step, so that strata and shares span it; this micro-batch takes its part
        buckets = [self.order[step * accumulation + other].bucket for other in range(accumulation)]
        shifts = np.repeat([config.flow.shift_of(h, w) for w, h in map(bucket_size, buckets)], size)
        t = timesteps(config.flow, generator(config.seed, "timesteps", step), shifts)[mine]
        subsets = deal_subsets(self.table, accumulation, size, generator(config.seed, "conditions", step))[mine]
        images = range(mine.start, mine.stop)
        noise = np.stack(
            [generator(config.seed, "noise", step, i).standard_normal(x.shape[1:], np.float32) for i in images]
        )
        parts = [Part(part, conditions.select(part).keeping(subsets[part])) for part in split(subsets)]
        return MicroBatch([r["key"] for r in rows], subsets, x, torch.from_numpy(noise), torch.from_numpy(t), parts)

    def micro_step(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Add the batch's share to the gradients; returns each image's loss and squared velocity, (B,), on the device.

        Never waits for the device.
        """
        flow, losses, velocities = self.config.flow, [], []
        self.model.train()
        for part in batch.parts:
            x, noise, t = batch.x[part.images], batch.noise[part.images], batch.t[part.images]
            z = interpolate(x, noise, t)
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                output = self.model(z, t, part.conditions)
            x_hat = to_x(output, z, t, flow.prediction)
            loss = flow_loss(x_hat, x, t, flow.t_min)
            # a sum over images divided by the images of the step: each image weighs the same
            (loss.sum() / self.images_per_step).backward()
            losses.append(loss.detach())
            velocities.append(velocity(x_hat.detach(), z, t, flow.t_min).square().flatten(1).mean(1))
        return torch.cat(losses), torch.cat(velocities)

    def ema_model(self) -> NanoDiT:
        """Return the averaged model as a copy that shares no memory with the one in training."""
        model = copy.deepcopy(self.model)
        self.ema.copy_to(model)
        return model.eval()

    def draw(self, tracker: Tracker) -> None:
        """Write the visual debug grid of this step."""
        grid = self.visual.draw(self.ema_model(), self.step, self.config.run_folder)
        if grid is not None:
            tracker.image(self.step, "visual_debug", grid)

    def save(self) -> Path:
        """Write a checkpoint of the last completed step."""
        tensors = {
            "model": self.model.state_dict(),
            "ema": self.ema.state,
            "optimizer": self.optimizer.tensors(),
        }
        return save_checkpoint(
            self.config.run_folder, self.step, tensors, self.state(), self.config.checkpoint.keep_last
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint says beside its tensors."""
        return {
            "micro_batches": self.step * self.config.train.grad_accumulation_steps,  # the position in the data
            "rng": "counter-based: every draw is named by (seed, purpose, step, image); there is no other state",
            "config": self.config.model_dump(mode="json"),
            "dataset": dataset_summary(self.data.info),
            "environment": environment(self.device),
        }

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _announce(self) -> None:
        config, sizes = self.config, self.data.sizes
        planned = config.train.steps * config.train.grad_accumulation_steps
        epochs = planned * config.train.batch_size / sum(sizes.values())
        say(
            f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.2f} M parameters on {self.device}, "
            f"{sum(sizes.values())} training samples in {len(sizes)} buckets, {epochs:.1f} epochs, "
            f"{self.order.unseen(planned)} samples never shown"
        )
        small = [f"{bucket} ({size})" for bucket, size in sizes.items() if size < config.train.batch_size]
        if small:
            say(f"buckets smaller than a micro-batch, which they fill over several epochs: {', '.join(small)}")

    def _report_non_finite(
        self, batches: Sequence[MicroBatch], losses: Sequence[Tensor], norms: dict[str, float]
    ) -> NonFiniteError:
        path = self.config.run_folder / f"non-finite-step-{self.step + 1:06d}.json"
        images = [
            {"key": key, "t": t, "loss": repr(loss), "conditions": subset_name(subset)}
            for batch, batch_losses in zip(batches, losses)
            for key, t, loss, subset in zip(batch.keys, batch.t.tolist(), batch_losses.tolist(), batch.subsets)
        ]
        record = {"step": self.step + 1, "images": images, "grad_norms": {k: repr(norm) for k, norm in norms.items()}}
        write_atomic(path, canonical_json(record))
        bad = [image["key"] for image in images if image["loss"] in ("nan", "inf")]
        which = f"the loss of {len(bad)} images, {bad[0]} first" if bad else "the gradient's norm"
        return NonFiniteError(
            f"step {self.step + 1}: {which}, is not finite. Optimiser and EMA were not touched; samples, t and norms "
            f"are in {path}. Look at these samples, or lower train.lr; the last checkpoint is intact"
        )


def deal_subsets(table: dict[Subset, float], micro_batches: int, size: int, rng: np.random.Generator) -> list[Subset]:
    """Deal a step's images their condition subsets, equal ones side by side in few micro-batches.

    The micro-batches are permuted, so that a subset does not depend on the bucket; t is drawn independently.
    """
    dealt = sorted(deal(table, micro_batches * size, rng), key=list(table).index)
    order = rng.permutation(micro_batches)
    return [subset for chunk in order for subset in dealt[chunk * size : (chunk + 1) * size]]


def split(subsets: Sequence[Subset]) -> list[slice]:
    """Cut a micro-batch into parts: a run of at least MIN_GROUP equal subsets is one, what lies between is mixed."""
    cuts = [0, *(i for i in range(1, len(subsets)) if subsets[i] != subsets[i - 1]), len(subsets)]
    parts: list[slice] = []
    mixed = False
    for start, stop in pairwise(cuts):
        small = stop - start < MIN_GROUP
        if small and mixed:
            parts[-1] = slice(parts[-1].start, stop)
        else:
            parts.append(slice(start, stop))
        mixed = small
    return parts


def gradient_norms(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradient norms of each layer group (``blocks.NN`` or another part) and of all, on the device."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            head, _, rest = name.partition(".")
            group = f"blocks.{int(rest.split('.')[0]):02d}" if head == "blocks" else head
            groups.setdefault(group, []).append(parameter.grad)
    norms = {group: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g))) for group, g in groups.items()}
    return norms, torch.linalg.vector_norm(torch.stack(list(norms.values())))


def clip_gradients(model: nn.Module, total_norm: Tensor, limit: float) -> None:
    """Scale all gradients by one factor so that their joint norm is at most ``limit``."""
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, total_norm, foreach=True)


def condition_shares(batches: Sequence[MicroBatch], table: dict[Subset, float]) -> dict[str, float]:
    """Return each subset's share of the step's images."""
    counts = Counter(subset for batch in batches for subset in batch.subsets)
    total = sum(counts.values())
    return {f"train/condition_share/{subset_name(subset)}": counts[subset] / total for subset in table}


def image_tokens(batch: MicroBatch, patch_size: int) -> int:
    """Count the image tokens that go through the blocks."""
    images, _, height, width = batch.x.shape
    return images * (height // patch_size) * (width // patch_size)


def memory(device: torch.device) -> dict[str, float]:
    """Return the GPU memory in 1e9 bytes: the peak so far, and what is allocated and reserved now."""
    if device.type != "cuda":
        return {}
    return {
        "memory/peak_vram_gb": torch.cuda.max_memory_allocated(device) / 1e9,
        "memory/vram_allocated_gb": torch.cuda.memory_allocated(device) / 1e9,
        "memory/vram_reserved_gb": torch.cuda.memory_reserved(device) / 1e9,
    }


def dataset_summary(info: dict[str, Any]) -> dict[str, Any]:
    """Return what of dataset.json rebuilds the model and names the data."""
    return {name: info[name] for name in ("fingerprint", "base", "encoders", "layers")}
