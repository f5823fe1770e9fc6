"""Drawing at full size in three precisions: seconds an image, memory, and how far the pictures are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from nanodit.rng import generator
from train.check.made_up import data_of, preset, small_run, trainer_of
from train.check.report import Report, Setting
from train.check.timing import seconds_of
from train.hardware import Precision
from train.loop.trainer import Trainer
from train.method.sampling import DRAWING, sample, to_uint8

BATCHES = (1, 8)
EVALUATION_BATCH = 32  # images that `nanodit evaluate run` may draw at once
PSNR = {"tf32": 30.0, "bf16": 15.0}  # dB at least, of the fp32 picture of the same noise; of random weights
ALIKE = {"PSNR": 40.0, "SSIM": 0.98}  # of what the device and the CPU draw, at least
Judge = Callable[[np.ndarray, np.ndarray], np.ndarray]


def check(setting: Setting, report: Report) -> None:
    """Draw the same pictures in fp32, TF32 and bf16."""
    config = preset(setting, "production", report, perceptual__every=0, repa__enabled="false")
    data = data_of(setting, config, "production")
    trainer = trainer_of(config, data, setting.device)
    drawn: dict[str, Tensor] = {}
    for precision in get_args(Precision):
        for batch in BATCHES if not setting.tiny else (2,):
            call = lambda: drawn.update({precision: _draw(trainer, batch, precision)})  # noqa: B023, E731
            call()
            seconds = seconds_of(call, setting.device)
            report.note(f"{precision}, {batch} at once", f"{seconds / batch:.3g} s an image")
        if precision != "fp32":
            found = psnr(drawn[precision], drawn["fp32"])
            report.check(
                found >= PSNR[precision], f"{precision} to fp32", f"{found:.1f} dB", f">= {PSNR[precision]:g} dB"
            )
    if setting.on_gpu and setting.left > 10:
        torch.cuda.reset_peak_memory_stats(setting.device)
        seconds = seconds_of(lambda: _draw(trainer, EVALUATION_BATCH, "bf16", steps=2), setting.device)
        peak = torch.cuda.max_memory_allocated(setting.device) / 1e9
        report.note(f"{EVALUATION_BATCH} at once", f"{peak:.3g} GB at the peak, {seconds / 2:.3g} s a step")


def judged(setting: Setting, report: Report, judges: Mapping[str, Judge]) -> None:
    """Draw the same pictures on the device and on the CPU with a small network; ``judges`` compare the pixels."""
    config, data = small_run(setting, perceptual__every=0, repa__enabled="false")
    ours, theirs = (
        to_uint8(_draw(trainer_of(config, data, device), 4)) for device in (setting.device, torch.device("cpu"))
    )
    for name, judge in judges.items():
        worst = float(judge(ours, theirs).min())
        report.check(worst >= ALIKE[name], f"{name} of the device's pictures", f"{worst:.4g}", f">= {ALIKE[name]:g}")


def psnr(image: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio of images in [-1, 1] in dB; -inf where anything is not finite."""
    error = float((image.double() - reference.double()).square().mean())
    if not math.isfinite(error):
        return -math.inf
    return 10 * math.log10(4 / error) if error else math.inf


def _draw(trainer: Trainer, count: int, precision: Precision = "fp32", steps: int = DRAWING.steps) -> Tensor:
    """Draw images of the first bucket from its rows' conditions, and wait for them."""
    bucket = next(iter(trainer.data.rows))
    rows = [trainer.data.rows[bucket][i % len(trainer.data.rows[bucket])] for i in range(count)]
    width, height = map(int, bucket.split("x"))
    noise = [generator("check", "sample", i).standard_normal((3, height, width), np.float32) for i in range(count)]
    sampling = replace(DRAWING, steps=steps, precision=precision)
    conditions = trainer.data.conditions(rows)
    return sample(
        trainer.model, conditions, torch.from_numpy(np.stack(noise)), flow=trainer.config.flow, sampling=sampling
    ).cpu()
