"""A walk over the shapes that a long run sees: whether the allocator's memory creeps up until it is spent."""

from __future__ import annotations

from itertools import product

import torch

from nanodit.rng import generator
from train.check.made_up import known_data, preset, trainer_of
from train.check.memory import DESKTOP
from train.check.report import Report, Setting
from train.model.conditions import TEXT_MULTIPLE
from train.plan.rehearsal import Shapes, full_batch

WALK, TINY_WALK = 300, 12  # (shape, context length) pairs
SETTLED = 1 / 3  # of the walk, after which nothing should grow any more
CREEP = 1.05  # reserved at the end / reserved then
CARD = 24e9


def check(setting: Setting, report: Report) -> None:
    """Take micro-batches of all buckets, numbers of images, context lengths and routings through the network."""
    config = preset(setting, "production-24gb", report)
    known = known_data(setting, config, "production-24gb")
    shapes = Shapes.of(known.info, known.rows("train"))
    device = setting.device
    if setting.on_gpu:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (CARD - DESKTOP) / total), device)
    trainer = trainer_of(config, known, device)
    plan, rng = trainer.batches.plan, generator("check", "walk")
    kinds = [*product(plan.order.sizes, plan.scales)]
    walk = TINY_WALK if setting.tiny else WALK
    reserved: list[int] = []
    seen = set()
    for number in range(walk):
        if setting.left < 1:
            report.note("stopped", f"for want of time, after {number} of {walk}")
            break
        bucket, scale = kinds[int(rng.integers(len(kinds)))]
        images = int(rng.integers(1, plan.most_images(bucket, scale), endpoint=True))
        text = TEXT_MULTIPLE * int(rng.integers(1, shapes.longest_text // TEXT_MULTIPLE, endpoint=True))
        shorter = Shapes(text, shapes.mean_text, shapes.rows, shapes.features)
        batch = full_batch(trainer, shorter, bucket, scale, images, device)
        seen.add((bucket, scale, images, text))
        trainer.micro_step(batch)
        if setting.on_gpu:
            reserved.append(torch.cuda.memory_reserved(device))
    report.note("walked", f"{len(seen)} different of {walk}")
    finite = all(bool(torch.isfinite(p.grad).all()) for p in trainer.model.parameters() if p.grad is not None)
    report.check(finite, "gradients", "finite" if finite else "not finite", "finite")
    if setting.on_gpu:
        creep = reserved[-1] / reserved[int(len(reserved) * SETTLED)]
        end = f"{reserved[-1] / 1e9:.2f} GB, {creep:.3f} times that after a third"
        report.check(creep <= CREEP, "reserved at the end", end, f"<= {CREEP:g} times")
        retries = torch.cuda.memory_stats(device)["num_alloc_retries"]
        report.check(retries == 0, "retries of the allocator", str(retries), "0")
