"""The training loop: micro-batches, optimiser steps, and everything that must survive a kill.

All randomness comes from counter-based generators named by (seed, purpose, step, image), never from a global state. So
the weights are a function of config, data and seed, however often the run was interrupted (bit-equal on a CPU), and
observers (logging, pictures, validation) cannot change them.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanodit.config import dump_config
from nanodit.console import Progress, say
from nanodit.errors import ConfigError, DataError, Interrupted
from nanodit.faults import fault
from train.checkpoint.checkpoint import Checkpoint, load_weights, save_checkpoint, set_aside_after
from train.checkpoint.initial import Parent, init_weights
from train.checkpoint.posthoc import continue_snapshots, save_snapshot
from train.checkpoint.provenance import dataset_summary, environment
from train.checkpoint.resume import course_of, goes_on_with_fast_bf16
from train.checkpoint.run_folder import StopRequest
from train.config import TrainConfig
from train.data.batch_plan import scale_of
from train.data.flip import check_flips
from train.data.noise import noise_record
from train.data.prefetch import prefetch, thread_count, watch_for_stalls
from train.data.samples import TrainingSet, check_patch_size
from train.data.short import check_short
from train.hardware import autocast, autocast_dtype, has_fast_bf16, peak_flops
from train.loop.compiling import compile_if_asked
from train.loop.health import clip_gradients, gradient_norms, report_non_finite
from train.loop.microbatch import Accumulated, Group, MicroBatch, MicroBatches
from train.loop.observers import finite, keep_warning, observe
from train.loop.saving import Saver
from train.loop.sending import Sender
from train.loop.splitting import Splitter, remedy
from train.loop.tracking import (
    VALIDATED,
    DataWait,
    Rates,
    Tracker,
    WaitingAdvice,
    gpu_memory,
    memory_shown,
    quiet_event_writer,
)
from train.loop.visual import VisualDebug
from train.method.dropout import condition_shares
from train.method.ema import EMA, PowerAverages, ema_decay
from train.method.flow import flow_loss, interpolate, to_x, velocity
from train.method.loss import Prediction, Setup
from train.method.optim import build_optimizer
from train.method.schedule import Course, learning_rate
from train.model.modalities import Features
from train.model.network import NanoDiT, build_model

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
        self.earlier: list[dict[str, Any]] = []  # the versions of the dataset that steps before were trained on
        self.saver = Saver(config.checkpoint, self.save)
        features = Features.from_dataset(dataset.info)
        if not features.modalities:
            raise DataError(
                f"{dataset.root}: has no conditions to train on. Run nanodit prep run on it with at least one of "
                "text, dino and pose in `layers`"
            )
        check_flips(dataset, config.data.flip)
        check_short(dataset, "data.short_captions", config.data.short_captions > 0)
        self.data = TrainingSet(dataset, config.data.cache_gb)
        check_patch_size(self.data.sizes, config.model.patch_size)
        self.table = config.conditioning.resolve(features.modalities)
        self.batches = MicroBatches(config, self.data, self.table)
        self._take_noise(noise_record(config.data.noise, device))
        self.visual = VisualDebug(config, dataset, self.table)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model: NanoDiT = build_model(config.model, features, config.tread)
            setup = Setup(self.model, self.table, self.batches.plan.sizes, device)
            losses = [loss for section in config.losses if section.on for loss in section.build(setup)]
            self.model.to(device)
        self.losses = {loss.name: loss for loss in losses}
        self.batches.losses = losses
        self.splitter = Splitter(self.model.parameters(), losses, device)
        self.sender, self.waits = Sender(device), DataWait(device)
        self.model.checkpoint_every = config.train.checkpoint_every
        compile_if_asked(self.model, config.train.compile, device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.ema = EMA(self.model, self._ema_decay)
        self.power = PowerAverages(self.model, config.ema)
        self._take_course(Course((config.train.steps,)))
        self._take_fast_bf16(has_fast_bf16())
        self.images_per_step = config.train.batch_size * config.train.grad_accumulation_steps
        self.peak_flops = peak_flops(device, self.autocast_dtype)
        self.flops = None
        if self.peak_flops:
            from train.loop.flops import flop_counter  # torch's counter imports Triton

            self.flops = flop_counter(self.model, losses)

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from ``checkpoint``; raises :class:`DataError` where its tensors do not fit."""
        for loss in self.losses.values():
            loss.check(checkpoint.state, checkpoint.path)
        load_weights(self.model, checkpoint.model, checkpoint.path / "model.safetensors")
        try:
            self.ema.load(checkpoint.ema)
            self.power.load(checkpoint.power)
            self.optimizer.load_tensors(checkpoint.optimizer)
        except ValueError as error:
            raise DataError(f"{checkpoint.path}: {error}; it is the checkpoint of another model") from None
        self.step = self.saver.saved = checkpoint.state["step"]
        self.parent = checkpoint.state.get("parent")
        before, self.earlier = checkpoint.state["dataset"]["fingerprint"], checkpoint.state.get("earlier_datasets", [])
        if before != self.data.fingerprint:
            self.earlier = [*self.earlier, {"fingerprint": before, "until_step": self.step}]
        self._take_course(course_of(checkpoint.state, self.config))
        self._take_noise(noise_record(self.config.data.noise, self.device, checkpoint.state))
        self._take_fast_bf16(goes_on_with_fast_bf16(checkpoint.state))
        set_aside_after(self.config.run_folder, self.step)
        continue_snapshots(self.config.run_folder, self.step, checkpoint.path.parent.parent)

    def begin_with(self, parent: Parent) -> None:
        """Begin with the weights of another run; raises :class:`ConfigError` where they do not fit."""
        for line in init_weights(self.model, parent, self.config, self.data.info["layers"]):
            say(line)
        self.ema = EMA(self.model, self._ema_decay)
        self.parent, self.saver.saved = parent.record, -1  # to be saved at once: to continue takes no parent

    def run(self, stop_at: float = math.inf) -> None:
        """Train up to ``train.steps``, saving on the way and at the end.

        From ``stop_at`` (time.monotonic()) on it stops as after a signal, but not before a step is done. Raises
        :class:`Interrupted` then and after SIGTERM or SIGINT, with the last completed step saved, and
        :class:`train.loop.health.NonFiniteError`.
        """
        if self.config.validation.every_steps and self.validate is None:
            raise ConfigError("validation.every_steps: this trainer was given nothing that validates; set it to 0")
        with quiet_event_writer(), StopRequest() as stop:
            self._run(stop, stop_at)

    def _run(self, stop: StopRequest, stop_at: float) -> None:
        config, steps, saver = self.config, self.config.train.steps, self.saver
        numbers = self.batches.numbers(self.step)
        ahead = config.data.prefetch, thread_count(config.data.workers)
        batches = prefetch(self._make_batch, numbers, *ahead, give_up=lambda: stop.requested)
        tracker = Tracker(config.run_folder, self.step)
        progress = Progress("train", steps, "steps", done=self.step)
        rates, advice = Rates(self.peak_flops), WaitingAdvice(*ahead)
        continue_snapshots(config.run_folder, self.step)
        watching = watch_for_stalls(self.data)
        self.splitter.active = True
        with contextlib.closing(batches), contextlib.closing(tracker), watching, progress:
            tracker.text(self.step, "config", dump_config(config))
            saver.save_rest(self.step, tracker)
            saver.saved_at = time.monotonic()
            if self.step:  # what a signal or a kill gave up after the checkpoint
                self._observe(tracker, progress, stop)
            while self.step < steps:
                started = time.perf_counter()
                with saver.nothing_lost(self.step, tracker):
                    accumulated = self.accumulate(batches, stop)
                if accumulated is None:
                    saver.save_rest(self.step, tracker)
                    raise Interrupted(f"stopped at step {self.step}; the same command continues")
                values = self.update(accumulated)
                seconds = time.perf_counter() - started
                rates.add(self.images_per_step, seconds, self.flops.take() if self.flops else 0, self.waits.take())
                fault("train.step", config.run_folder.name)
                if self.step % config.log_every == 0 or self.step == steps:
                    values |= rates.take() | gpu_memory(self.device)
                    tracker.log(self.step, values)
                    advice.consider(values.get("sys/data_wait"))
                progress.update(self.step, loss=f"{values['train/loss']:.4f}", **rates.shown(), **memory_shown(values))
                if self.step in self.snapshot_steps:
                    save_snapshot(config.run_folder, self.step, self.power)
                if saver.is_due(self.step) or self.step == steps:
                    saver.save_rest(self.step, tracker)
                if time.monotonic() >= stop_at and self.step < steps:
                    stop.requested = True
                with saver.nothing_lost(self.step, tracker):
                    self._observe(tracker, progress, stop)

    def micro_step(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Add the batch's share to the gradients; never waits for the device, on which the results stay.

        Returns each image's flow loss and squared velocity, (B,), as ``flow`` and ``velocity``, and by name the values
        of every other loss, of all images or of those that it was computed of. What does not fit into a GPU's memory is
        computed in parts (:mod:`train.loop.splitting`).
        """
        self.model.train()
        size, compute = (batch.x.shape[3], batch.x.shape[2]), partial(self._group_step, batch)
        found = [values for group in batch.groups for values in self.splitter.run(compute, group, size)]
        nothing = found[0]["flow"][:0]
        names = "flow", "velocity", *self.losses
        return {name: torch.cat([one[name] for one in found if name in one] or [nothing]) for name in names}

    def _group_step(
        self, batch: MicroBatch, group: Group, parameters: Sequence[nn.Parameter] | None
    ) -> dict[str, Tensor]:
        """Add a group's share to the gradients of ``parameters``, of all for None; returns what micro_step does."""
        x, noise, t = batch.x[group.images], batch.noise[group.images], batch.t[group.images]
        keep_ids = None if batch.keep_ids is None else batch.keep_ids[group.images]
        z = interpolate(x, noise, t)
        project = any(loss.projects and loss.needs in group.prepared for loss in self.losses.values())
        precision = partial(autocast, self.device, self.autocast_dtype)
        with precision():
            output = self.model(z, t, group.conditions, keep_ids, project=project)
        noted: list[tuple[Any, ...]] = [("model", len(x), z, t, group.conditions, keep_ids)]
        output, projected = output if project else (output, None)
        x_hat = to_x(output, z, t, self.config.flow.prediction)
        loss = flow_loss(x_hat, x, t, self.config.flow.t_min)
        seen = x_hat, x, t, group.conditions, keep_ids, projected, group.prepared
        prediction = Prediction(*seen, autocast=precision, note=lambda *call: noted.append(call))
        others = {name: other.values(prediction) for name, other in self.losses.items()}
        terms = {name: values for name, values in others.items() if values is not None}
        weights = {name: self.losses[name].weight(self.step, self.course.totals[0]) for name in terms}
        # the order of these sums is part of the result: image by image, then what some images have
        every = (weights[name] * values for name, values in terms.items() if self.losses[name].every_image)
        total = sum(every, loss).sum()
        some = (weights[name] * values.sum() for name, values in terms.items() if not self.losses[name].every_image)
        # a sum over images divided by the images of the step: each image weighs the same
        share = sum(some, total) / self.images_per_step
        if parameters is None:
            share.backward()
        elif parameters:
            share.backward(inputs=parameters)
        for call in noted:  # of what did not fit nothing counts
            self._note_flops(*call)
        moved = velocity(x_hat.detach(), z, t).square().flatten(1).mean(1)
        return {"flow": loss.detach(), "velocity": moved, **{name: values.detach() for name, values in terms.items()}}

    def _make_batch(self, index: int) -> MicroBatch:
        return self.batches.pack(index, self.sender.buffer())

    def accumulate(self, batches: Iterator[MicroBatch], stop: StopRequest) -> Accumulated | None:
        """Take the micro-batches of one optimiser step; None if asked to stop before they were all taken.

        What was accumulated by then is discarded: it is part of no state, and the next start computes it again.
        """
        taken, tokens, routed, flipped, short = [], 0.0, 0, 0, 0
        for _ in self.batches.plan.numbers(self.step):
            if stop.requested:
                return None
            with self.waits():
                batch = next(batches, None)
            if batch is None:
                return None
            with self.sender.sent(batch) as sent:
                taken.append((sent.keys, sent.subsets, sent.t, self.micro_step(sent)))
                model = self.config.model
                tokens += sent.active_tokens(model.patch_size, len(self.model.route) / model.depth)
            routed += 0 if batch.keep_ids is None else len(batch.keys)
            flipped += batch.flipped
            short += batch.short
        self._say_split()
        keys, subsets, t, values = zip(*taken)
        joined = {name: torch.cat([one[name] for one in values]) for name in values[0]}
        return Accumulated([*chain(*keys)], [*chain(*subsets)], torch.cat(t), joined, tokens, routed, flipped, short)

    def update(self, accumulated: Accumulated) -> dict[str, float]:
        """Apply one optimiser step and return what to log; :class:`NonFiniteError` comes before anything is changed."""
        config, data = self.config.train, self.config.data
        norms, total_norm = gradient_norms(self.model)
        values = accumulated.values
        some = {name for name, other in self.losses.items() if not other.every_image}  # of whose images a mean is none
        sums = [column.sum() if name in some else column.mean() for name, column in values.items()]
        # the only wait for the device in a step
        flow, velocity_square, *rest = torch.stack((*sums, total_norm, *norms.values())).tolist()
        measured, (total, *group_norms) = dict(zip(self.losses, rest)), rest[len(self.losses) :]
        loss, logged = flow, {}
        for name, other in self.losses.items():
            weight = other.weight(self.step, self.course.totals[0])
            loss += weight * measured[name] / (len(accumulated.keys) if name in some else 1)
            logged |= other.logged(measured[name], len(values[name]), weight, accumulated.subsets)
        by_group = dict(zip(norms, group_norms))
        if not (np.isfinite(loss) and np.isfinite(total)):
            losses = self.losses.values()
            raise report_non_finite(self.config.run_folder, self.step + 1, accumulated, losses, by_group)
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
            **logged,
            "train/grad_norm": total,
            "train/velocity_norm": velocity_square**0.5,
            "train/learning_rate": rate,
            "train/ema_decay": decay,
            **condition_shares(accumulated.subsets, self.table),
            **{f"grad_norm/{group}": norm for group, norm in by_group.items()},
            **({"train/scale": scale_of(config.phases, self.step - 1)} if config.phases else {}),
            **({"train/flip_share": accumulated.flipped / len(accumulated.keys)} if data.flip else {}),
            **({"train/short_share": accumulated.short / len(accumulated.keys)} if data.short_captions else {}),
            **({"train/routed": accumulated.routed / len(accumulated.keys)} if self.model.route else {}),
            "sys/active_tokens": accumulated.tokens,
        }

    def ema_model(self) -> NanoDiT:
        """Return the averaged model as a copy that shares no memory with the one in training."""
        model = copy.deepcopy(self.model)
        model.repa_head = None
        self.ema.copy_to(model)
        return model.eval()

    def _observe(self, tracker: Tracker, progress: Progress, stop: StopRequest) -> None:
        """Draw and validate, where it is time for that and not done; after saving, because it may take long."""
        config, step = self.config, self.step
        picture = self.visual.folder(config.run_folder, step) / "grid.png"
        if self._due(config.visual_debug.every_steps) and not picture.exists():
            draw = lambda: self.visual.draw(self.ema_model(), step, config.run_folder)  # noqa: E731
            with progress.aside("drawing pictures"):
                grid = observe("visual_debug", step, config.run_folder, stop, draw)
            if grid is not None:
                tracker.image(step, "visual_debug", grid)
                tracker.text(step, "visual_debug/captions", "\n".join(self.visual.captions))
                progress.update(step, image=picture)
        folder = config.run_folder / "validation_outputs" / f"step-{step:06d}"
        if self._due(config.validation.every_steps) and not (folder / VALIDATED).exists():
            validate = lambda: finite(self.validate(self.ema_model(), step, folder))  # noqa: E731
            with progress.aside("validating"):
                values = observe("validation", step, config.run_folder, stop, validate)
            if values:
                tracker.log(step, values)

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
            "noise": self.noise,
            "fast_bf16": self.fast_bf16,  # on a CPU it decides what Muon computes in, and "auto" precision
            "totals": list(self.course.totals),  # train.steps, and what it was before it grew
            "parent": self.parent,
            "config": self.config.model_dump(mode="json"),
            "dataset": dataset_summary(self.data.info),
            "earlier_datasets": self.earlier,
            "environment": environment(self.device),
            **{name: None for section in self.config.losses for name in section.hashes},
            **{name: value for loss in self.losses.values() for name, value in loss.state().items()},
        }

    def _say_split(self) -> None:
        if (note := self.splitter.take_note()) is not None:
            largest = max(map(self.batches.plan.tokens, self.batches.plan.sizes))
            reason = f"{note}. {remedy(self.config, self.splitter.limit, largest)}"
            say(f"warning: step {self.step + 1}: {reason}")
            keep_warning(self.config.run_folder, self.step + 1, "memory", reason)

    def _note_flops(self, name: str, images: int, *arguments: Any) -> None:
        if self.flops:
            self.flops.note(name, images, *arguments)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.train.steps)

    def _ema_decay(self, step: int) -> float:
        return ema_decay(step, self.course.part(step - 1)[1], self.config.train.ema_decay, self.config.train.ema_warmup)

    def _take_noise(self, record: dict[str, Any]) -> None:
        self.noise, self.batches.noise = record, record["kind"]

    def _take_fast_bf16(self, fast: bool) -> None:
        self.fast_bf16 = fast
        self.autocast_dtype = autocast_dtype(self.config.train.precision, self.device, fast)
        self.optimizer.use_fast_bf16(fast)

    def _take_course(self, course: Course) -> None:
        self.course = self.batches.course = course
        self.snapshot_steps = course.snapshot_steps(self.config.ema.snapshots)
