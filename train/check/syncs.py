"""Where the host waits for the device: nowhere in a micro-step, and once in the update of a step."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nanodit.place import PROJECT
from train.check.made_up import small_run, trainer_of
from train.check.parity import kinds
from train.check.report import Report, Setting
from train.check.waits import NoSync
from train.checkpoint.run_folder import StopRequest
from train.loop.health import gradient_norms
from train.loop.trainer import Trainer

WAITS_OF_AN_UPDATE = 1  # for the numbers that it logs


def check(setting: Setting, report: Report) -> None:
    """Run micro-steps of every kind where a wait is an error; on a CPU on the meta device, which has none to read."""
    trainer = trainer_of(*small_run(setting, report), setting.device)
    batches = kinds(trainer)
    if not setting.on_gpu:
        _to_meta(trainer)
    on_device = [batch.to(trainer.device) for batch in batches]
    if setting.on_gpu:
        trainer.micro_step(on_device[0])  # libraries begin to work, and may wait for that
    found = ""
    for batch in on_device:
        found = found or _waits(lambda batch=batch: trainer.micro_step(batch), setting)
    report.check(not found, "micro-steps", found or f"{len(batches)} kinds, no wait", "no wait")
    if found:
        return
    found = _waits(lambda: gradient_norms(trainer.model), setting)
    report.check(not found, "norms of gradients", found or "no wait", "no wait")
    if setting.on_gpu:
        count = _count(trainer)
        report.check(count <= WAITS_OF_AN_UPDATE, "update", f"{count} waits", f"<= {WAITS_OF_AN_UPDATE}")


def _to_meta(trainer: Trainer) -> None:
    networks: list[nn.Module | None] = [trainer.model, *(loss.network for loss in trainer.losses.values())]
    for network in networks:
        if network is not None:
            network.to("meta")
    trainer.device = torch.device("meta")


def _waits(function: Callable[[], object], setting: Setting) -> str:
    """Return what made the host wait, and where; empty for nothing."""
    try:
        if not setting.on_gpu:
            with NoSync():
                function()
            return ""
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    except (RuntimeError, NotImplementedError) as error:
        frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        own = [(file.relative_to(PROJECT), line) for file, line in frames if file.is_relative_to(PROJECT)]
        file, line = ([place for place in own if "check" not in place[0].parts] or own)[-1]
        return f"{file}:{line}: {str(error).splitlines()[0]}"
    return ""


def _count(trainer: Trainer) -> int:
    """Count the waits of an update."""
    accumulated = trainer.accumulate(map(trainer.batches.make, trainer.batches.plan.numbers(0)), StopRequest())
    torch.cuda.synchronize(trainer.device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.update(accumulated)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in caught)
