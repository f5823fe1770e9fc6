"""What a run says of itself before its first step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nanodit.console import say
from train.data.samples import bucket_size
from train.hardware import cpu_bf16, has_fast_bf16
from train.loop.trainer import Trainer
from train.model.tread import MIN_TOKENS


def announce(trainer: Trainer) -> None:
    """Say what is about to be trained, on what, and what of it may surprise."""
    config, sizes, plan = trainer.config, trainer.data.sizes, trainer.batches.plan
    epochs = config.train.steps * plan.images / sum(sizes.values())
    say(
        f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.2f} M parameters on {trainer.device}, "
        f"{sum(sizes.values())} training samples in {len(sizes)} buckets, {epochs:.1f} epochs, "
        f"{plan.order.unseen(config.train.steps * plan.slots)} samples never shown"
    )
    if len(trainer.course.totals) > 1:
        first, last = trainer.course.totals[-2:]
        say(
            f"continuing a run of {first} steps to {last}: after step {first} the learning rate is warmed up again to "
            f"{config.train.lr:g}, then goes down to {config.train.lr_min:g}"
        )
    for line in plan.describe(config.train.steps):
        say(line)
    for loss in trainer.losses.values():
        for line in loss.announce(trainer.course.totals[0], trainer.data.info["layers"]):
            say(line)
    say(trainer.optimizer.describe())
    if trainer.device.type == "cpu" and has_fast_bf16() and not trainer.fast_bf16:
        say(f"this CPU is fast at bfloat16 ({cpu_bf16()}), but the run began without and goes on as it was")
    if trainer.model.route:
        _warn_of_few_tokens([f"{width}x{height}" for width, height in plan.sizes], config.model.patch_size)


def _warn_of_few_tokens(buckets: Iterable[str], patch_size: int) -> None:
    """Say which buckets have fewer tokens than routing is good for."""
    tokens = {bucket: math.prod(side // patch_size for side in bucket_size(bucket)) for bucket in buckets}
    # the other buckets of a base have up to a tenth fewer than the square
    few = [f"{bucket} ({count})" for bucket, count in tokens.items() if count < 0.9 * MIN_TOKENS]
    if few:
        say(
            f"warning: tread: routing costs quality below {MIN_TOKENS} tokens an image; buckets with fewer: "
            f"{', '.join(few)}. Lower model.patch_size, or set tread.enabled to false"
        )
