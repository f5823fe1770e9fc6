"""The memory that the presets take, phase by phase, against what :mod:`train.plan.memory` says of them.

On a CPU nothing allocates as a GPU does: there the tensors of a real micro-step are counted, which must be those of the
meta device.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import torch

import train.plan.memory as estimates
from train.check.made_up import known_data, preset, trainer_of
from train.check.report import Report, Setting, constant
from train.loop.microbatch import Accumulated, MicroBatch
from train.loop.trainer import Trainer
from train.plan.measure import draw_largest
from train.plan.memory import LikeGpu, LiveBytes, Memory, estimate_memory, meta_trainer
from train.plan.rehearsal import Shapes, full_batch, largest_batch

FAMILIES = ("production", "baseline", "figures-256", "production-p16")
SIZES = (24, 12, 8, 16)  # GB, those of most use first
DESKTOP = 1.0e9  # bytes of a card that a desktop and other programs hold
KINDS = 6  # of micro-batches beside the largest
SECONDS = 8.0  # that a preset may take
TENSORS, PEAK, CACHED = (0.9, 1.03), (0.75, 1.02), (0.9, 1.02)  # measured / estimate

# a process that has multiplied and attended, says what its tensors hold, and stays until its stdin is closed
ANOTHER = """
import sys, torch
x = torch.randn(1, 8, 512, 64, device="cuda", dtype=torch.bfloat16)
torch.nn.functional.scaled_dot_product_attention(x @ x.mT @ x, x, x).sum().item()
print(torch.cuda.memory_reserved(), flush=True)
sys.stdin.read()
"""


def check(setting: Setting, report: Report) -> None:
    """Take every preset through its phases within the card that it is named for."""
    names = [f"{family}-{size}gb" for size, family in product(SIZES, FAMILIES)] if setting.on_gpu else ["tiny"]
    _presets(setting, report, names)


def check_expandable(setting: Setting, report: Report) -> None:
    """Do that for a few presets, in a process whose allocator can grow what it has."""
    if not setting.on_gpu:
        report.note("expandable_segments", "only a GPU's allocator has them")
        return
    _presets(setting, report, [f"production-{size}gb" for size in SIZES])


def _presets(setting: Setting, report: Report, names: list[str]) -> None:
    for name in names:
        if setting.left < SECONDS:
            report.note(name, "left out for want of time: --only memory --minutes 10 measures all")
            continue
        size = int(name.rpartition("-")[2].removesuffix("gb")) * 1e9 if setting.on_gpu else None
        if size and size > torch.cuda.get_device_properties(setting.device).total_memory + DESKTOP:
            report.note(name, "left out: this card has less memory")
            continue
        try:
            with _card_of(size, setting.device):
                _preset(setting, report, name)
        except torch.OutOfMemoryError as error:
            report.check(False, name, f"out of memory: {str(error).splitlines()[0]}", "fits the card it is named for")
        gc.collect()
        if setting.on_gpu:
            torch.cuda.empty_cache()
    if setting.on_gpu:
        assumed, place = estimates.CONTEXT / 1e9, constant(estimates, "CONTEXT")
        report.estimate("context", assumed, _context(setting) / 1e9, "GB", place, low=0, high=1)


def _context(setting: Setting) -> int:
    """Return the bytes that CUDA takes for a process beside its tensors: what is free less while there is another."""
    before = torch.cuda.mem_get_info(setting.device)[0]
    command = [sys.executable, "-c", ANOTHER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        reserved = int(other.stdout.readline())
        free = torch.cuda.mem_get_info(setting.device)[0]
        other.stdin.close()
    return before - free - reserved


@contextmanager
def _card_of(size: float | None, device: torch.device) -> Iterator[None]:
    """Let this process have no more than a card of so many bytes leaves it."""
    if size is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (size - DESKTOP) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _preset(setting: Setting, report: Report, name: str) -> None:
    # on a CPU in fp32, with the same functions in place of kernels as on the meta device
    config = preset(setting, name, report, **({} if setting.on_gpu else {"train__precision": "fp32"}))
    known = known_data(setting, config, name)
    shapes = Shapes.of(known.info, known.rows("train"))
    memory = estimate_memory(meta_trainer(config, known), shapes)
    trainer = trainer_of(config, known, setting.device)
    if not setting.on_gpu:
        with LiveBytes() as live, LikeGpu(bf16=False):
            _micro_steps(trainer, shapes)
        _tensors(report, name, "micro-step", memory, live.peak + memory.standing)
        return
    torch.cuda.reset_peak_memory_stats(setting.device)
    last, values = _micro_steps(trainer, shapes)
    peaks = {"micro-step": torch.cuda.max_memory_allocated(setting.device)}
    tokens = last.active_tokens(config.model.patch_size, 0)
    done = Accumulated(last.keys, last.subsets, last.t, values, tokens)
    peaks["update"] = _peak(setting, lambda: trainer.update(done))
    if config.visual_debug.every_steps:
        peaks["drawing"] = _peak(setting, lambda: draw_largest(trainer, shapes, setting.device))
    peaks = {phase: measured + memory.sending for phase, measured in peaks.items()}  # as nothing is sent here
    for phase, measured in peaks.items():
        _tensors(report, name, phase, memory, measured)
    reserved, allocated = torch.cuda.max_memory_reserved(setting.device) + memory.sending, max(peaks.values())
    spare, places = allocated * (1 + estimates.FRAGMENTATION), constant(estimates, "FRAGMENTATION")
    report.estimate(f"{name}, reserved", spare / 1e9, reserved / 1e9, "GB", places, low=CACHED[0], high=CACHED[1])
    both = constant(estimates, "CONTEXT"), places
    whole = (reserved + estimates.CONTEXT) / 1e9
    report.estimate(f"{name}, peak", memory.peak / 1e9, whole, "GB", both, low=PEAK[0], high=PEAK[1])


def _micro_steps(trainer: Trainer, shapes: Shapes) -> tuple[MicroBatch, dict[str, torch.Tensor]]:
    """Take the largest micro-batch twice, then some of other shapes; return one and its values."""
    plan = trainer.batches.plan
    batch = largest_batch(trainer, shapes, trainer.device)
    for _ in range(2):
        trainer.micro_step(batch)
    values: dict[str, torch.Tensor] = {}
    for bucket, scale in [*product(plan.order.sizes, plan.scales)][:KINDS]:
        batch = full_batch(trainer, shapes, bucket, scale, plan.most_images(bucket, scale), trainer.device)
        values = trainer.micro_step(batch)
    return batch, values


def _peak(setting: Setting, function: Callable[[], object]) -> int:
    """Return the most bytes of tensors during a call."""
    torch.cuda.reset_peak_memory_stats(setting.device)
    function()
    return torch.cuda.max_memory_allocated(setting.device)


def _tensors(report: Report, name: str, phase: str, memory: Memory, measured: int) -> None:
    place = constant(estimates, "LikeGpu" if phase == "micro-step" else "estimate_memory")
    low, high = TENSORS
    report.estimate(f"{name}, {phase}", memory.phases[phase] / 1e9, measured / 1e9, "GB", place, low=low, high=high)
