"""A card without room: what a run says and how it ends, what is left of it, and batches that halve."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from nanodit.errors import run_command
from nanodit.place import child_command, child_environment
from train.check.encoders import made_up_encoder
from train.check.made_up import known_data, preset, small_run, trainer_of
from train.check.report import Report, Setting
from train.checkpoint.checkpoint import find_latest, verify
from train.checkpoint.run_folder import StopRequest
from train.loop.trainer import Trainer
from train.plan.memory import estimate_memory, meta_trainer
from train.plan.rehearsal import Shapes, probe
from train.plan.remedies import explained

NAME = "production-24gb"
RESOURCE = 4  # the exit code of ResourceError
ROOM = 0.5  # of a micro-step's activations that the run of the first part is given
TOO_MUCH = 1 << 55  # bytes that no card has
BACK = 1.05  # reserved afterwards / before
FIT, MORE = 4, 8  # items of a batch of an encoder, of which the first fit and the second do not


def check(setting: Setting, report: Report) -> None:
    """Run out of memory at the start, in a step, and in a batch of an encoder."""
    _at_the_start(setting, report)
    _in_a_step(setting, report)
    _halving(setting, report)


def _at_the_start(setting: Setting, report: Report) -> None:
    command = [*child_command("train.check.shortage"), str(setting.folder), setting.device.type, str(setting.tiny)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    report.check(done.returncode == RESOURCE, "exit code", str(done.returncode), str(RESOURCE))
    said = done.stderr[done.stderr.rfind("error: ") :].strip()
    shown = " / ".join(line.strip() for line in said.splitlines()[:3])
    report.check("saves" in said, "what a run says", shown, "what would help, the best first")


def main(folder: str, device: str, tiny: str) -> int:
    """Begin a run that does not fit: on a GPU in too little memory, on a CPU with an error in its place."""
    setting = Setting(torch.device(device), tiny == "True", Path(folder), 60.0)
    config = preset(setting, NAME)
    known = known_data(setting, config, NAME)

    def begin() -> None:
        with explained(config, known, setting.device):
            trainer = trainer_of(config, known, setting.device)
            if setting.on_gpu:
                shapes = Shapes.of(known.info, known.rows("train"))
                memory = estimate_memory(meta_trainer(config, known), shapes)
                room = memory.standing + memory.gradients + ROOM * memory.activations
                total = torch.cuda.get_device_properties(setting.device).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), setting.device)
            else:
                _fail_in(trainer, 2)
            probe(trainer)

    return run_command(begin)


def _fail_in(trainer: Trainer, call: int) -> None:
    """Let a micro-step ask for memory that no device has, once."""
    usual, calls = trainer.model.forward, [0]

    def forward(*arguments: object, **keywords: object) -> object:
        calls[0] += 1
        if calls[0] == call:
            ask_for(TOO_MUCH, trainer.device)
        return usual(*arguments, **keywords)

    trainer.model.forward = forward  # type: ignore[method-assign]


def ask_for(size: int, device: torch.device) -> torch.Tensor:
    """Allocate so many bytes; a CPU, which has another error for it, raises that of a GPU."""
    if device.type != "cuda" and size >= TOO_MUCH:
        raise torch.OutOfMemoryError(f"{size} bytes were asked for")
    return torch.empty(size, dtype=torch.uint8, device=device)


def _in_a_step(setting: Setting, report: Report) -> None:
    """Run out of memory in step 3: the checkpoint of step 2 stands, the memory comes back, and the run can go on."""
    output = setting.folder / "shortage"
    config, data = small_run(setting, perceptual__every=0, train__grad_accumulation_steps=8, output=output)
    trainer = trainer_of(config, data, setting.device)

    def step() -> None:
        batches = map(trainer.batches.make, trainer.batches.plan.numbers(trainer.step))
        trainer.update(trainer.accumulate(batches, StopRequest()))

    step()
    step()
    trainer.save()
    before = _held(setting)
    usual = trainer.model.forward
    _fail_in(trainer, 2)
    try:
        step()
        said = "step 3 done"
    except torch.OutOfMemoryError as error:
        said = type(error).__name__
    expected = "step 3 done" if trainer.step == 3 else "OutOfMemoryError"
    report.check(said == expected, "in step 3", said, "the step done in smaller micro-batches, or OutOfMemoryError")
    latest = find_latest(config.run_folder)
    found = latest.name if latest and verify(latest) else "none"
    report.check(found == "step-000002", "checkpoint", found, "step-000002, every hash right")
    trainer.model.forward = usual  # type: ignore[method-assign]
    trainer.optimizer.zero_grad()
    after = _held(setting)
    what = "reserved again" if setting.on_gpu else "tensors again"
    report.check(after <= BACK * before, what, f"{after / 1e6:.4g} MB", f"<= {BACK * before / 1e6:.4g} MB")
    while trainer.step < 3:
        step()
    report.check(trainer.step == 3, "step 3 again", f"{trainer.step} steps", "3 steps")


def _held(setting: Setting) -> int:
    """Return the bytes that the allocator of a GPU holds once it gave back what it can; on a CPU those of tensors."""
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(setting.device)
    storages = {}
    for found in gc.get_objects():
        kind = type(found)  # isinstance wakes up lazy modules; the fake tensors of torch.compile hold nothing
        if issubclass(kind, torch.Tensor) and not issubclass(kind, FakeTensor) and found.device.type == "cpu":
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


def _halving(setting: Setting, report: Report) -> None:
    """Halve batches of T5 and DINO until they fit: the results are those of batches of that size."""
    if importlib.util.find_spec("transformers") is None:
        report.note("halving", "left out: transformers is not installed")
        return
    for layer in ("t5", "dino"):
        encoder, batch = made_up_encoder(setting, layer)
        alone = [_encoded(encoder, batch[start : start + FIT]) for start in range(0, len(batch), FIT)]
        with _room_for(setting, encoder, batch):
            whole = _encoded(encoder, batch)
        tried = f"batches of {encoder.memory.limit} of {len(batch)}"
        report.check(encoder.memory.limit == FIT, f"{layer}, halving", tried, f"{FIT}, of which {MORE} would not fit")
        alike = all(np.array_equal(one, other) for one, other in zip(whole, chain(*alone), strict=True))
        found = "those of small batches" if alike else "others"
        report.check(alike, f"{layer}, results of halves", found, f"to the bit those of batches of {FIT}")
        del encoder


def _encoded(encoder: Any, batch: Any) -> list[np.ndarray]:
    found = encoder.encode(batch)
    return [*found[1]] if isinstance(found, tuple) else [one.embedding for one in found]


@contextmanager
def _room_for(setting: Setting, encoder: Any, batch: Any) -> Iterator[None]:
    """Leave room for batches of ``FIT`` and not of ``MORE``: by the allocator's limit, halfway between what they take.

    A CPU has no such limit, so there the network refuses larger batches, with the error of a GPU.
    """
    if not setting.on_gpu:
        usual = encoder.model.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            given = next(value for value in (*arguments, *keywords.values()) if isinstance(value, torch.Tensor))
            if len(given) >= MORE:
                ask_for(TOO_MUCH, setting.device)
            return usual(*arguments, **keywords)

        encoder.model.forward = forward
        yield
        encoder.model.forward = usual
        return
    peaks = []
    for items in (FIT, MORE):
        _held(setting)
        torch.cuda.reset_peak_memory_stats(setting.device)
        encoder.encode(batch[:items])
        peaks.append(torch.cuda.max_memory_reserved(setting.device))
    _held(setting)
    total = torch.cuda.get_device_properties(setting.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, sum(peaks) / 2 / total), setting.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, setting.device)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
