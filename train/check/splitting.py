"""A micro-batch that does not fit into the card's memory: parts of it lead to the weights of a run that had room."""

from __future__ import annotations

import copy
from typing import Any

import torch

from train.check.made_up import small_run, trainer_of
from train.check.report import Report, Setting
from train.check.shortage import TOO_MUCH, ask_for
from train.checkpoint.run_folder import StopRequest
from train.loop.trainer import Trainer

ROOM = 2  # images that go through the network at once
WEIGHTS = 1e-5  # difference of any weight after two steps of fp32, at most
STEPS = 2


def check(setting: Setting, report: Report) -> None:
    """Train two steps with room and without, the shortage once on the way forward and once in the backward pass."""
    config, data = small_run(setting, report, train__precision="fp32", output=setting.folder / "splitting")
    whole = trainer_of(config, data, setting.device)
    parameters = copy.deepcopy(whole.model.state_dict())
    _steps(whole)
    for where in ("forward", "backward"):
        split = trainer_of(config, data, setting.device)
        split.model.load_state_dict(parameters)
        split.splitter.active = True
        refused = _refuse(split, where)
        _steps(split)
        report.check(bool(refused), f"{where}: attempts that failed", str(len(refused)), "1 or more")
        ours, theirs = (trainer.model.state_dict() for trainer in (split, whole))
        gap, name = max((float((ours[name] - theirs[name]).abs().max()), name) for name in theirs)
        report.check(gap <= WEIGHTS, f"{where}: weights after {STEPS} steps", f"{gap:.1e} {name}", f"<= {WEIGHTS:g}")


def _steps(trainer: Trainer) -> None:
    for _ in range(STEPS):
        batches = map(trainer.batches.make, trainer.batches.plan.numbers(trainer.step))
        trainer.update(trainer.accumulate(batches, StopRequest()))


def _refuse(trainer: Trainer, where: str) -> list[int]:
    """Let the second block ask for memory that no device has where more than ROOM images come; returns how many did."""
    refused: list[int] = []

    def ask(images: int) -> None:
        refused.append(images)
        ask_for(TOO_MUCH, trainer.device)

    def look(block: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = arguments[0]
        if len(x) <= ROOM:
            return None
        if where == "forward":
            ask(len(x))
        x = x.clone()
        x.register_hook(lambda gradient: ask(len(gradient)))
        return (x, *arguments[1:])

    trainer.model.blocks[1].register_forward_pre_hook(look)
    return refused
