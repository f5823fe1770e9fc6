"""A run with every option of the trainer on: what is exact alone must be exact together.

A new config key goes into one of the two tables; tests/train/loop/test_everything.py says when one is missing.
"""

from __future__ import annotations

from typing import Any

EVERYTHING: dict[str, Any] = {
    "seed": 3,
    "model.hidden_size": 32, "model.depth": 4, "model.num_heads": 2, "model.patch_size": 4, "model.bottleneck": 16,
    "model.context_patches": 16, "model.context_joints": 23, "model.output_conv": "true",
    "conditioning.preset": "seed",
    "flow.prediction": "v", "flow.logit_mean": 0.6, "flow.logit_std": 0.9, "flow.uniform_share": 0.2, "flow.shift": 1.5,
    "flow.t_min": 0.1,
    "tread.enabled": "true", "tread.start": 2, "tread.end": -1, "tread.keep": 0.25, "tread.dense_tail": 0.3,
    "tread.tail_routed": 0.5,
    "repa.enabled": "true", "repa.weight": 1.0, "repa.schedule": "constant", "repa.until": 0.6,
    "repa.block_index": 3, "repa.width": 24,
    "perceptual.every": 2, "perceptual.weight": 0.3, "perceptual.t_max": 0.9, "perceptual.view": "pool",
    "perceptual.size": 40, "perceptual.dino_weight": 0.2,
    "optimizer.betas": "[0.8, 0.9]", "optimizer.eps": 1e-6, "optimizer.weight_decay": 0.01,
    "optimizer.muon_momentum": 0.9, "optimizer.muon_nesterov": "false", "optimizer.muon_ns_steps": 4,
    "optimizer.muon_adjust_lr": "original", "optimizer.muon_lr_factor": 0.5,
    "train.steps": 12, "train.batch_size": 2, "train.grad_accumulation_steps": 4, "train.token_budget": 800,
    "train.phases": "[{until_step: 7, scale: 0.5}]",
    "train.lr": 3e-3, "train.lr_min": 1e-4, "train.warmup": 3, "train.schedule": "wsd",
    "train.decay_share": 0.5, "train.grad_clip": 0.5, "train.precision": "bf16",
    "train.gradient_checkpointing": 3, "train.threads": 1, "train.device": "cpu",
    "ema.snapshots": 8, "ema.sigma_rel": "[0.06, 0.2]",
    "data.flip": 0.4, "data.short_captions": 0.3, "data.cache_gb": 2e-4,
    "data.prefetch": 3, "data.workers": 2, "data.noise": "device",
    "checkpoint.every_steps": 3, "checkpoint.every_minutes": 60.0,
    "checkpoint.keep_last": 3, "checkpoint.keep_every": 4,
    "validation.every_steps": 4, "validation.samples": 3, "validation.conditions": "[text]",
    "validation.tests": "[reconstruction]", "validation.seed": 1, "validation.evaluate_overrides": "{sampler.steps: 2}",
    "visual_debug.every_steps": 5, "visual_debug.count": 2, "visual_debug.steps": 1, "visual_debug.guidance": 1.5,
    "visual_debug.method": "euler", "visual_debug.precision": "bf16",
}  # fmt: skip
NOT_IN_IT = {
    "dataset": "the test's own",
    "output": "the test's own",
    "log_every": "1, so that every step is compared",
    "model.in_channels": "has one value",
    "conditioning.table": "the other way to say conditioning.preset",
    "optimizer.type": "muon, which has AdamW in it",
    "train.ema_decay": "null, the warm-up, whose decay depends on the step",
    "train.ema_warmup": "belongs to a fixed train.ema_decay",
    "train.compile": "has a test of its own, where a compiler is found",
}


def everything(**other: Any) -> list[str]:
    """Return the overrides that turn everything on; ``other`` replaces some, ``__`` for the dot."""
    values = {**EVERYTHING, **{key.replace("__", "."): value for key, value in other.items()}}
    return [f"{key}={value}" for key, value in values.items()]
