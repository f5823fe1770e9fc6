"""A card without room: what a run says and how it ends, what is left of it, and batches that halve."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from nanodit.errors import run_command
from nanodit.place import child_command, child_environment
from prep.encoders.halving import Halving
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
ITEMS, FIT = 8, 3  # of a batch that is halved


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
    """Run out of memory in step 3: the checkpoint of step 2 stands, and the same process can go on."""
    output = setting.folder / "shortage"
    config, data = small_run(setting, perceptual__every=0, train__grad_accumulation_steps=8, output=output)
    trainer = trainer_of(config, data, setting.device)

    def step() -> None:
        batches = map(trainer.batches.make, trainer.batches.plan.numbers(trainer.step))
        trainer.update(trainer.accumulate(batches, StopRequest()))

    step()
    step()
    trainer.save()
    before = _reserved(setting)
    usual = trainer.model.forward
    _fail_in(trainer, 2)
    try:
        step()
        said = "nothing"
    except torch.OutOfMemoryError as error:
        said = type(error).__name__
    report.check(said == "OutOfMemoryError", "in step 3", said, "OutOfMemoryError")
    latest = find_latest(config.run_folder)
    found = latest.name if latest and verify(latest) else "none"
    report.check(found == "step-000002", "checkpoint", found, "step-000002, every hash right")
    trainer.model.forward = usual  # type: ignore[method-assign]
    trainer.optimizer.zero_grad()
    after = _reserved(setting)
    if setting.on_gpu:
        report.check(
            after <= BACK * before, "reserved again", f"{after / 1e9:.3g} GB", f"<= {BACK * before / 1e9:.3g} GB"
        )
    step()
    report.check(trainer.step == 3, "step 3 again", f"{trainer.step} steps", "3 steps")


def _reserved(setting: Setting) -> int:
    gc.collect()
    if not setting.on_gpu:
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(setting.device)


def _halving(setting: Setting, report: Report) -> None:
    """Halve a batch of which a few items fit: by the allocator's own limit on a GPU."""
    device, each = setting.device, 1 << (30 if setting.on_gpu else 10)
    if setting.on_gpu:
        room = torch.cuda.memory_reserved(device) + (FIT + 0.5) * each
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
    halving = Halving("check", device.type)

    def compute(items: np.ndarray) -> np.ndarray:
        fits = setting.on_gpu or len(items) <= FIT
        ask_for(len(items) * each if fits else TOO_MUCH, device)
        return torch.from_numpy(items).to(device).sqrt().cpu().numpy()

    items = np.arange(ITEMS, dtype=np.float32)
    found = np.concatenate(list(halving.run(compute, items)))
    if setting.on_gpu:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    report.check(halving.limit == 2, "halving", f"batches of {halving.limit} of {ITEMS}", "2, of which 3 fit")
    alike = bool(np.allclose(found, np.sqrt(items)))
    report.check(alike, "results of halves", "those of the whole" if alike else "others", "those of the whole")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
