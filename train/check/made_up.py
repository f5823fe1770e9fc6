"""What the check trains on and with: a dataset of the real format and sizes without a single real image, and configs.

A dataset (:mod:`train.plan.made_up`) is written once, below the folder that all parts of a check share.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import nanodit
from nanodit.config import load_config
from nanodit.rng import generator
from prep.config import PrepConfig
from prep.dataset.buckets import buckets_for
from prep.dataset.layers import T5_TOKENS
from prep.dataset.reader import Dataset
from train.check.backbones import write_random_vgg
from train.check.report import Report, Setting
from train.config import TrainConfig
from train.loop.trainer import Trainer
from train.plan.made_up import write_made_up
from train.plan.rehearsal import StandIn, open_dataset

PRESETS = Path(nanodit.__file__).parent / "configs/train"
OPTIONAL = ("lpips", "torchvision")  # what the perceptual loss needs, and a bare machine may lack
IMAGES = 8  # of a bucket
TINY_TOKENS = 40
TINY_BASE = 64

TINY = (
    "model.hidden_size=32", "model.depth=4", "model.num_heads=2", "model.patch_size=8", "model.bottleneck=16",
    "tread.enabled=true", "repa.enabled=true", "perceptual.every=2", "perceptual.size=24", "train.steps=100",
    "train.batch_size=1", "train.grad_accumulation_steps=12", "train.token_budget=512", "visual_debug.count=2",
    "visual_debug.steps=2",
)  # fmt: skip


def known_data(setting: Setting, config: TrainConfig, name: str) -> Dataset | StandIn:
    """Return the preset's own dataset where it is there, else what is known of it without any content."""
    if setting.tiny:
        overrides = ["source=.", "output=none", f"base={TINY_BASE}", "encoders=demo"]
        return StandIn(load_config(PrepConfig, None, overrides))
    return open_dataset(config, PRESETS / f"{name}.yaml", None)[0]


def data_of(setting: Setting, config: TrainConfig, name: str) -> Dataset:
    """Return the preset's own dataset where it is there, else made-up data like it."""
    known = known_data(setting, config, name)
    return dataset(setting, known.prep) if isinstance(known, StandIn) else known


def dataset(setting: Setting, prep: PrepConfig) -> Dataset:
    """Return made-up data as a config of ``prep`` describes it, written if it is not there yet."""
    root = setting.folder / f"data-{prep.base}-{prep.encoders}"
    if not (root / "dataset.json").exists():  # which comes last, as everywhere
        counts = {str(bucket): (IMAGES, 0) for bucket in buckets_for(prep.base)}
        shortest = TINY_TOKENS if prep.encoders == "demo" else T5_TOKENS
        return write_made_up(prep, root, counts, drawn=2, tokens=lambda rng, number: shortest + 30 * number)
    return Dataset(root)


def small_run(setting: Setting, report: Report | None = None, **overrides: Any) -> tuple[TrainConfig, Dataset]:
    """Return the config of the tiny network on any device, and its data."""
    small = Setting(setting.device, True, setting.folder, setting.seconds, setting.started)
    config = preset(small, "tiny", report, **overrides)
    return config, data_of(small, config, "tiny")


def preset(setting: Setting, name: str, report: Report | None = None, **overrides: Any) -> TrainConfig:
    """Return the config of a preset, or the tiny one in its place; what no package is there for is off, and is said.

    ``overrides`` are dotted keys with ``__`` for the dot.
    """
    file, changes = (None, ["dataset=none", *TINY]) if setting.tiny else (PRESETS / f"{name}.yaml", [])
    changes += [f"output={setting.folder / 'run'}"]
    changes += [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    config = load_config(TrainConfig, file, changes)
    if config.perceptual.every:
        missing = [package for package in OPTIONAL if importlib.util.find_spec(package) is None]
        if missing:
            if report:
                report.note("perceptual loss", f"left out: {' and '.join(missing)} not installed")
            return config.model_copy(update={"perceptual": type(config.perceptual)()})
        home = setting.folder / "torch-home"
        os.environ["TORCH_HOME"] = str(home)
        if not (home / "written").exists():
            write_random_vgg(home)
            (home / "written").touch()
    return config


def trainer_of(config: TrainConfig, data: Any, device: torch.device) -> Trainer:
    """Return a run's trainer whose network computes something: the zeros that it begins with are made small numbers."""
    config.run_folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, data, device)
    awaken(trainer.model)
    return trainer


def awaken(model: nn.Module) -> None:
    """Give parameters that are all zero small values, the same on every device: else the output is zero, too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any():
                drawn = generator("check", name).standard_normal(tuple(parameter.shape), np.float32)
                inputs = (
                    parameter[0].numel() if parameter.ndim > 1 else 25
                )  # so that gates and outputs are of order 0.1
                parameter.copy_(torch.from_numpy(drawn) * 0.5 / inputs**0.5)
