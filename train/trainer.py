"""The training loop: micro-batches, optimiser steps, and everything that must survive a kill.

All randomness comes from counter-based generators named by (seed, purpose, step, image), never from a global state. So
the weights are a function of config, data and seed, however often the run was interrupted (bit-equal on a CPU), and
what looks on (logging, pictures, validation) cannot change them.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prep.config import dump_config
from prep.console import Progress, say
from prep.errors import ConfigError, DataError, Interrupted
from prep.faults import fault
from train.batch_plan import scale_of
from train.checkpoint import Checkpoint, load_weights, save_checkpoint
from train.compiling import FORESEEN_STEPS, allow_graphs, coming_shapes, describe, possible_shapes
from train.conditioning import condition_shares
from train.config import TrainConfig
from train.data import TrainingSet, bucket_size, check_patch_size, prefetch, stalls_are_said
from train.dino_loss import DinoLoss
from train.ema import EMA, PowerAverages, ema_decay
from train.flip import check_flips
from train.flow import flow_loss, interpolate, to_x, velocity
from train.hardware import autocast, autocast_dtype, can_compile, peak_flops
from train.health import clip_gradients, gradient_norms, report_non_finite
from train.initial import Parent, init_weights
from train.looks import finite, look
from train.mfu import DinoFlops, FlopCounter, HeadFlops, LpipsFlops, ModelFlops
from train.microbatch import Accumulated, MicroBatch, MicroBatches
from train.model import Features, NanoDiT, build_model
from train.optim import build_optimizer
from train.perceptual import PerceptualLoss, check_views, lpips_values, vgg_path
from train.posthoc import continue_snapshots, save_snapshot
from train.repa import RepaHead, alignment_loss, alignment_values, check_alignment, counted_share
from train.resume import course_of
from train.runfolder import StopRequest
from train.schedule import Course, learning_rate
from train.tracking import Rates, Tracker, environment, gpu_memory, memory_shown
from train.tread import MIN_TOKENS
from train.visual import VisualDebug

# (averaged model, step, folder for files) -> values by TensorBoard tag
Validate = Callable[[NanoDiT, int, Path], Mapping[str, float]]


class Trainer:
    """One run: the state that checkpoints hold (model, EMA, optimiser, step) and the loop that advances it."""

    def __init__(
        self, config: TrainConfig, dataset: Any, device: torch.device, validate: Validate | None = None
    ) -> None:
        self.config, self.device, self.validate = config, device, validate
        self.step = 0  # completed optimiser steps
        self.parent: dict[str, Any] | None = None  # of whose weights it began with
        self._saved, self._saved_at = 0, time.monotonic()  # the step of the last checkpoint, and when it was written
        features = Features.from_dataset(dataset.info)
        if not features.modalities:
            raise DataError(
                f"{dataset.root}: has no conditions to train on; run prep on it with at least one of text, dino and "
                "pose in `layers`"
            )
        check_flips(dataset, config.data.flip)
        self.data = TrainingSet(dataset, config.data.cache_gb)
        check_patch_size(self.data.sizes, config.model.patch_size)
        self.table = config.conditioning.resolve(features.modalities)
        self.batches = MicroBatches(config, self.data, self.table)
        self.visual = VisualDebug(config, dataset, self.table)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model: NanoDiT = build_model(config.model, features, config.tread)
            if config.repa.enabled:
                check_alignment(features.dino_width, self.table)
                self.model.repa_head = RepaHead(
                    config.repa, config.model.depth, config.model.hidden_size, features.dino_width
                )
            self.model.to(device)
        self.model.checkpoint_every = config.train.checkpoint_every
        self.perceptual = self.dino = None
        if config.perceptual.every:
            check_views(config.perceptual, self.batches.plan.sizes)
            self.perceptual = PerceptualLoss(config.perceptual, device)
            self.dino = DinoLoss(config.perceptual, device) if config.perceptual.dino_weight else None
        compiles = config.train.compile is True or (config.train.compile == "auto" and can_compile(device.type))
        if compiles:
            # on a CPU one graph for all shapes: buckets and dropped conditions make dozens, at seconds each
            self.compile_blocks(dynamic=device.type == "cpu")
        elif config.train.compile == "auto":
            say("compile: no C++ compiler with Python's headers (or no Triton) here, so the blocks run uncompiled")
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.ema = EMA(self.model, self._ema_decay)
        self.power = PowerAverages(self.model, config.ema)
        self._take_course(Course((config.train.steps,)))
        self.autocast_dtype = autocast_dtype(config.train.precision, device)
        self.images_per_step = config.train.batch_size * config.train.grad_accumulation_steps
        self.peak_flops = peak_flops(device, self.autocast_dtype)
        self.flops = self._flop_counter() if self.peak_flops else None

    def compile_blocks(self, *, dynamic: bool) -> None:
        """Compile the model's blocks, with room for a graph of each shape of the run unless one serves all shapes."""
        if not dynamic:
            steps, modalities = min(FORESEEN_STEPS, self.config.train.steps), self.model.features.modalities
            possible = len(possible_shapes(self.batches, modalities))
            allow_graphs(possible)
            say(describe(len(coming_shapes(self.batches, modalities, steps)), steps, possible))
        self.model.compile_blocks(dynamic=dynamic)

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from ``checkpoint``; raises :class:`DataError` where its tensors do not fit."""
        if self.perceptual and checkpoint.state.get("perceptual") not in (None, self.perceptual.sha256):
            raise DataError(f"{checkpoint.path}: was trained with other weights than {vgg_path()}; put those back")
        if self.dino and checkpoint.state.get("perceptual_dino") not in (None, self.dino.sha256):
            raise DataError(
                f"{checkpoint.path}: was trained with other weights than those of DINOv2 in {self.dino.folder}; put "
                "those back"
            )
        load_weights(self.model, checkpoint.model, checkpoint.path / "model.safetensors")
        try:
            self.ema.load(checkpoint.ema)
            self.power.load(checkpoint.power)
            self.optimizer.load_tensors(checkpoint.optimizer)
        except ValueError as error:
            raise DataError(f"{checkpoint.path}: {error}; it is the checkpoint of another model") from None
        self.step = self._saved = checkpoint.state["step"]
        self.parent = checkpoint.state.get("parent")
        self._take_course(course_of(checkpoint.state, self.config))
        continue_snapshots(self.config.run_folder, self.step, checkpoint.path.parent.parent)

    def begin_with(self, parent: Parent) -> None:
        """Begin with the weights of another run; raises :class:`ConfigError` where they do not fit."""
        for line in init_weights(self.model, parent, self.config, self.data.info["layers"]):
            say(line)
        self.ema = EMA(self.model, self._ema_decay)
        self.parent, self._saved = parent.record, -1  # to be saved at once: to continue takes no parent

    def run(self, stop_at: float = math.inf) -> None:
        """Train up to ``train.steps``, saving on the way and at the end.

        From ``stop_at`` (time.monotonic()) on it stops as after a signal, but not before a step is done. Raises
        :class:`Interrupted` then and after SIGTERM or SIGINT, with the last completed step saved, and
        :class:`NonFiniteError`.
        """
        if self.config.validation.every_steps and self.validate is None:
            raise ConfigError("validation.every_steps: nothing was handed in that validates; set it to 0")
        with StopRequest() as stop:
            self._run(stop, stop_at)

    def _run(self, stop: StopRequest, stop_at: float) -> None:
        config, steps = self.config, self.config.train.steps
        self._announce()
        numbers = self.batches.numbers(self.step)
        batches = prefetch(self._make_batch, numbers, config.data.prefetch, give_up=lambda: stop.requested)
        tracker = Tracker(config.run_folder, self.step)
        progress = Progress("train", steps, "steps", done=self.step)
        rates = Rates(self.peak_flops)
        continue_snapshots(config.run_folder, self.step)
        watching = stalls_are_said(self.data)
        with contextlib.closing(batches), contextlib.closing(tracker), watching, progress:
            tracker.text(self.step, "config", dump_config(config))
            self._save_rest(tracker)
            self._saved_at = time.monotonic()
            while self.step < steps:
                started = time.perf_counter()
                with self._nothing_lost(tracker):
                    accumulated = self.accumulate(batches, stop)
                if accumulated is None:
                    self._save_rest(tracker)
                    raise Interrupted(f"stopped at step {self.step}; the same command continues")
                values = self.update(accumulated)
                seconds = time.perf_counter() - started
                rates.add(self.images_per_step, seconds, self.flops.take() if self.flops else 0)
                fault("train.step")

                if self.step % config.log_every == 0 or self.step == steps:
                    values |= rates.take() | gpu_memory(self.device)
                    tracker.log(self.step, values)
                progress.update(self.step, loss=f"{values['train/loss']:.4f}", **rates.shown(), **memory_shown(values))
                if self.step in self.snapshot_steps:
                    save_snapshot(config.run_folder, self.step, self.power)
                minutes = (time.monotonic() - self._saved_at) / 60
                if (
                    self._due(config.checkpoint.every_steps)
                    or minutes >= (config.checkpoint.every_minutes or math.inf)
                    or self.step == steps
                ):
                    self._save_rest(tracker)
                with self._nothing_lost(tracker):
                    self._look_on(tracker, progress, stop)
                if time.monotonic() >= stop_at:
                    stop.requested = True

    def micro_step(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Add the batch's share to the gradients; never waits for the device, on which the results stay.

        Returns each image's flow loss, squared velocity and REPA loss, (B,), and LPIPS and DINOv2's distance of each
        image that they were computed of. The REPA loss of an image that does not count is 0.
        """
        flow, losses, velocities, alignments, lpips, dino = self.config.flow, [], [], [], [], []
        repa_weight = self.config.repa.weight_at(self.step, self.course.totals[0])
        self.model.train()
        for part in batch.parts:
            x, noise, t = batch.x[part.images], batch.noise[part.images], batch.t[part.images]
            keep_ids = None if batch.keep_ids is None else batch.keep_ids[part.images]
            z = interpolate(x, noise, t)
            with autocast(self.device, self.autocast_dtype):
                output = self.model(z, t, part.conditions, keep_ids, project=part.teacher is not None)
            self._note_flops("model", len(x), z, t, part.conditions, keep_ids)
            if part.teacher is None:
                alignment = torch.zeros_like(t)
            else:
                output, projected = output
                alignment = alignment_loss(projected, part.teacher, part.conditions.keeps("patches"), keep_ids)
                self._note_flops("repa", len(x), projected)
            x_hat = to_x(output, z, t, flow.prediction)
            loss = flow_loss(x_hat, x, t, flow.t_min)
            total = (loss + repa_weight * alignment).sum()
            if part.views:
                with autocast(self.device, self.autocast_dtype):
                    distances = self.perceptual(x_hat, x, part.views).float()
                total = total + self.perceptual.weight * distances.sum()
                lpips.append(distances.detach())
                self._note_flops("lpips", len(part.views), x_hat, x)
            if part.views and self.dino:
                with autocast(self.device, self.autocast_dtype):
                    distances = self.dino(x_hat, x, part.views)
                total = total + self.dino.weight * distances.sum()
                dino.append(distances.detach())
                self._note_flops("dino", len(part.views), x_hat, x)
            # a sum over images divided by the images of the step: each image weighs the same
            (total / self.images_per_step).backward()
            losses.append(loss.detach())
            alignments.append(alignment.detach())
            velocities.append(velocity(x_hat.detach(), z, t, flow.t_min).square().flatten(1).mean(1))
        losses = torch.cat(losses)
        views = (torch.cat(distances) if distances else losses[:0] for distances in (lpips, dino))
        return losses, *map(torch.cat, (velocities, alignments)), *views

    def _make_batch(self, index: int) -> MicroBatch:
        batch = self.batches.make(index)
        return batch.pinned() if self.device.type == "cuda" else batch

    def accumulate(self, batches: Iterator[MicroBatch], stop: StopRequest) -> Accumulated | None:
        """Take the micro-batches of one optimiser step; None if asked to stop before they were all taken.

        What was accumulated by then is discarded: it is part of no state, and the next start computes it again.
        """
        parts, tokens, routed, flipped = [], 0.0, 0, 0
        for _ in self.batches.plan.numbers(self.step):
            if stop.requested:
                return None
            batch = next(batches, None)
            if batch is None:
                return None
            batch = batch.to(self.device)
            parts.append((batch.keys, batch.subsets, batch.t, *self.micro_step(batch)))
            model = self.config.model
            tokens += batch.active_tokens(model.patch_size, len(self.model.route) / model.depth)
            routed += 0 if batch.keep_ids is None else len(batch.keys)
            flipped += batch.flipped
        keys, subsets, *tensors = zip(*parts)
        return Accumulated([*chain(*keys)], [*chain(*subsets)], *map(torch.cat, tensors), tokens, routed, flipped)

    def update(self, accumulated: Accumulated) -> dict[str, float]:
        """Apply one optimiser step and return what to log; :class:`NonFiniteError` comes before anything is changed."""
        config = self.config.train
        norms, total_norm = gradient_norms(self.model)
        means = accumulated.losses.mean(), accumulated.velocities.mean(), accumulated.alignments.mean()
        # the only wait for the device in a step
        sums = accumulated.lpips.sum(), accumulated.dino.sum()
        measured = torch.stack((*means, *sums, total_norm, *norms.values())).tolist()
        flow, velocity_square, repa, lpips, dino, total, *group_norms = measured
        repa_weight = self.config.repa.weight_at(self.step, self.course.totals[0])
        loss = flow + repa_weight * repa
        if self.perceptual:
            loss += self.perceptual.weight * lpips / len(accumulated.keys)
        if self.dino:
            loss += self.dino.weight * dino / len(accumulated.keys)
        by_group = dict(zip(norms, group_norms))
        if not (np.isfinite(loss) and np.isfinite(total)):
            raise report_non_finite(self.config.run_folder, self.step + 1, accumulated, by_group)
        clip_gradients(self.model, total_norm, config.grad_clip)
        shape = config.schedule, config.decay_share
        rate = learning_rate(*self.course.within(self.step), config.lr, config.lr_min, config.warmup, *shape)
        self.optimizer.set_lr(rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = self.ema.update(self.model, self.step)
        self.power.update(self.model, self.step)
        return {
            "train/loss": loss,
            "train/flow_loss": flow,
            **alignment_values(repa, repa_weight, accumulated.subsets),
            **(lpips_values(lpips, len(accumulated.lpips), len(accumulated.keys)) if self.perceptual else {}),
            **({"train/dino_loss": dino / len(accumulated.dino)} if len(accumulated.dino) else {}),
            "train/grad_norm": total,
            "train/velocity_norm": velocity_square**0.5,
            "train/learning_rate": rate,
            "train/ema_decay": decay,
            **condition_shares(accumulated.subsets, self.table),
            **{f"grad_norm/{group}": norm for group, norm in by_group.items()},
            **({"train/scale": scale_of(config.phases, self.step - 1)} if config.phases else {}),
            **({"train/flip_share": accumulated.flipped / len(accumulated.keys)} if self.config.data.flip else {}),
            **({"train/routed": accumulated.routed / len(accumulated.keys)} if self.model.route else {}),
            "sys/active_tokens": accumulated.tokens,
        }

    def ema_model(self) -> NanoDiT:
        """Return the averaged model as a copy that shares no memory with the one in training."""
        model = copy.deepcopy(self.model)
        model.repa_head = None
        self.ema.copy_to(model)
        return model.eval()

    def _look_on(self, tracker: Tracker, progress: Progress, stop: StopRequest) -> None:
        """Draw and validate, where it is time for that; after saving, because it may take long."""
        config, step = self.config, self.step
        if self._due(config.visual_debug.every_steps):
            draw = lambda: self.visual.draw(self.ema_model(), step, config.run_folder)  # noqa: E731
            grid = look("visual_debug", step, config.run_folder, stop, draw)
            if grid is not None:
                tracker.image(step, "visual_debug", grid)
                tracker.text(step, "visual_debug/captions", "\n".join(self.visual.captions))
                progress.update(step, image=self.visual.folder(config.run_folder, step) / "grid.png")
        if self._due(config.validation.every_steps):
            folder = config.run_folder / "validation_outputs" / f"step-{step:06d}"
            validate = lambda: finite(self.validate(self.ema_model(), step, folder))  # noqa: E731
            values = look("validation", step, config.run_folder, stop, validate)
            if values:
                tracker.log(step, values)

    def _save_rest(self, tracker: Tracker) -> None:
        """Save the last completed step, unless the last checkpoint is of it."""
        if self._saved < self.step:
            tracker.sync()  # a checkpoint promises the records up to its step
            self.save()
            self._saved, self._saved_at = self.step, time.monotonic()

    @contextlib.contextmanager
    def _nothing_lost(self, tracker: Tracker) -> Iterator[None]:
        """Where something in this context, which touches no weight, fails, save the steps before it."""
        try:
            yield
        except Exception:
            with contextlib.suppress(Exception):  # the first failure is the one to report
                self._save_rest(tracker)
            raise

    def save(self) -> Path:
        """Write a checkpoint of the last completed step."""
        tensors = {
            "model": self.model.state_dict(),
            "ema": self.ema.state,
            "optimizer": self.optimizer.tensors(),
        }
        if power := self.power.tensors():
            tensors["power"] = power
        kept = self.config.checkpoint.keep_last, self.config.checkpoint.keep_every
        return save_checkpoint(self.config.run_folder, self.step, tensors, self.state(), *kept)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint says beside its tensors."""
        return {
            "slots": self.step * self.batches.plan.slots,  # the position in the data
            "rng": "counter-based: every draw is named by (seed, purpose, step, image); there is no other state",
            "totals": list(self.course.totals),  # train.steps, and what it was before it grew
            "parent": self.parent,
            "config": self.config.model_dump(mode="json"),
            "dataset": dataset_summary(self.data.info),
            "environment": environment(self.device),
            "perceptual": self.perceptual.sha256 if self.perceptual else None,
            "perceptual_dino": self.dino.sha256 if self.dino else None,
        }

    def _note_flops(self, name: str, images: int, *arguments: Any) -> None:
        if self.flops:
            self.flops.note(name, images, *arguments)

    def _flop_counter(self) -> FlopCounter:
        counts = {"model": ModelFlops(self.config.model, self.model.features, self.model.route)}
        if self.perceptual:
            counts["lpips"] = LpipsFlops(self.config.perceptual)
        if self.dino:
            counts["dino"] = DinoFlops(self.config.perceptual, self.dino.network)
        if self.model.repa_head is not None:
            counts["repa"] = HeadFlops(self.model.repa_head)
        return FlopCounter(counts)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _ema_decay(self, step: int) -> float:
        return ema_decay(step, self.course.part(step - 1)[1], self.config.train.ema_decay)

    def _take_course(self, course: Course) -> None:
        self.course = self.batches.course = course
        self.snapshot_steps = course.snapshot_steps(self.config.ema.snapshots)

    def _announce(self) -> None:
        config, sizes, plan = self.config, self.data.sizes, self.batches.plan
        epochs = config.train.steps * plan.images / sum(sizes.values())
        say(
            f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.2f} M parameters on {self.device}, "
            f"{sum(sizes.values())} training samples in {len(sizes)} buckets, {epochs:.1f} epochs, "
            f"{plan.order.unseen(config.train.steps * plan.slots)} samples never shown"
        )
        if len(self.course.totals) > 1:
            first, last = self.course.totals[-2:]
            say(
                f"continuing a run of {first} steps to {last}: on the steps after {first} the learning rate is warmed "
                f"up again to {config.train.lr:g}, and goes down to {config.train.lr_min:g}"
            )
        if self.perceptual and not self.perceptual.published:
            say(f"perceptual: {vgg_path()} are not the published weights, so this loss means nothing")
        if self.dino and self.dino.is_condition(self.data.info["layers"]):
            say(
                "perceptual: the dataset's DINO features are of the DINOv2 that the loss compares with, so images that "
                "keep them are told what it measures"
            )
        for line in plan.describe(config.train.steps):
            say(line)
        if config.repa.enabled:
            share, last = counted_share(self.table), config.repa.until * config.train.steps
            say(
                f"repa: weight {config.repa.weight:g} on the {share:.0%} of the images whose patches are dropped, so "
                f"{config.repa.weight * share:.3f} an image, falling to 0 at step {last:.0f}"
            )
        say(self.optimizer.describe())
        if self.model.route:
            warn_of_few_tokens([f"{width}x{height}" for width, height in plan.sizes], config.model.patch_size)


def warn_of_few_tokens(buckets: Iterable[str], patch_size: int) -> None:
    """Say which buckets have fewer tokens than routing is good for."""
    tokens = {bucket: math.prod(side // patch_size for side in bucket_size(bucket)) for bucket in buckets}
    # the other buckets of a base have up to a tenth fewer than the square
    few = [f"{bucket} ({count})" for bucket, count in tokens.items() if count < 0.9 * MIN_TOKENS]
    if few:
        say(
            f"warning: tread: routing costs quality below {MIN_TOKENS} tokens an image; buckets with fewer: "
            f"{', '.join(few)}. Lower model.patch_size, or set tread.enabled to false"
        )


def dataset_summary(info: dict[str, Any]) -> dict[str, Any]:
    """Return what of dataset.json rebuilds the model and names the data."""
    named = {name: info[name] for name in ("fingerprint", "base", "encoders", "layers")}
    return named | {name: info[name] for name in ("counts",) if name in info}
