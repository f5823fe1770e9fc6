"""What a run says of itself before its first step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nanodit.console import say
from train.data.samples import bucket_size
from train.loop.trainer import Trainer
from train.method.perceptual import vgg_path
from train.method.repa import counted_share
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
            f"continuing a run of {first} steps to {last}: on the steps after {first} the learning rate is warmed "
            f"up again to {config.train.lr:g}, and goes down to {config.train.lr_min:g}"
        )
    if trainer.perceptual and not trainer.perceptual.published:
        say(f"perceptual: {vgg_path()} are not the published weights, so this loss means nothing")
    if trainer.dino and trainer.dino.is_condition(trainer.data.info["layers"]):
        say(
            "perceptual: the dataset's DINO features are of the DINOv2 that the loss compares with, so images that "
            "keep them are told what it measures"
        )
    for line in plan.describe(config.train.steps):
        say(line)
    if config.repa.enabled:
        share, last = counted_share(trainer.table), config.repa.until * trainer.course.totals[0]
        say(
            f"repa: weight {config.repa.weight:g} on the {share:.0%} of the images whose patches are dropped, so "
            f"{config.repa.weight * share:.3f} an image, falling to 0 at step {last:.0f}"
        )
    say(trainer.optimizer.describe())
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
