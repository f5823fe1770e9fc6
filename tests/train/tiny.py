"""A made-up dataset in the published format and a run of seconds on it: every layer, four buckets of unequal size."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nanodit.config import load_config
from prep.config import PrepConfig
from prep.dataset.layers import LAYERS
from train.config import TrainConfig
from train.plan.made_up import write_made_up

TEXT_WIDTH, DINO_WIDTH = 24, 16
TEXT_ENCODER = {"encoder": "t5", "content": "made up"}
BASE = 64
# WIDTHxHEIGHT -> (training samples, holdout samples); the last two hold less than a micro-batch of 4
BUCKETS = {"64x64": (13, 3), "80x56": (9, 2), "56x80": (3, 1), "88x48": (1, 0)}


def write_dataset(
    root: Path,
    seed: int = 0,
    layers: tuple[str, ...] = tuple(LAYERS),
    text_of_one: float | None = None,
    flips: bool = True,
    short: bool = True,
    encoders: str = "demo",
) -> Path:
    """Write a dataset of random colours and features, with other ones of the mirrored images where ``flips``,
    and short captions where ``short``.

    ``seed`` changes every sample; ``text_of_one`` (NaN, say) replaces the text features of one training sample. Of four
    samples one has a caption that cannot be flipped, and one a caption that is its own mirror image. An evaluation of
    ``encoders`` "production" opens no judges, which are not on this machine; those of "demo" take seconds to import.
    """
    overrides = ["source=.", f"output={root}", f"base={BASE}", f"encoders={encoders}", "dino.input_scale=2"]
    overrides += [f"flips={flips}", f"captions.short={short}"]
    described = {
        "t5": {"width": TEXT_WIDTH, "max_tokens": 512, "encoder": TEXT_ENCODER}, "dino": {"width": DINO_WIDTH},
    }  # fmt: skip
    draws = {"px": _square}
    if text_of_one is not None:
        draws["t5.npy"] = lambda rng, shape, row: (
            np.full(shape, text_of_one)
            if row["bucket"] == "88x48"  # which has one sample, so every micro-batch of it
            else rng.standard_normal(shape)
        )
    write_made_up(
        load_config(PrepConfig, None, overrides), root, BUCKETS, seed=seed, draws=draws,
        layers={name: described.get(name, {}) for name in layers},
        tokens=lambda rng, number: int(rng.integers(5, 40)),
    )  # fmt: skip
    return root


def _square(rng: np.random.Generator, shape: tuple[int, ...], row: object) -> np.ndarray:
    return rng.integers(0, 256, 3) + rng.integers(-20, 20, shape)


CONFIG = """\
model: {hidden_size: 32, depth: 2, num_heads: 2, patch_size: 8, bottleneck: 16}
conditioning: {preset: quickstart}
train: {steps: 12, batch_size: 4, grad_accumulation_steps: 2, lr: 3e-3, device: cpu, precision: fp32}
checkpoint: {every_steps: 3}
visual_debug: {every_steps: 0, count: 4, steps: 2}
"""


def write_config(path: Path, dataset: Path, output: Path) -> Path:
    """Write the config of a run of 12 steps: 80,000 parameters, 8 images a step in two micro-batches."""
    path.write_text(f"dataset: {dataset}\noutput: {output}\n{CONFIG}", encoding="utf-8")
    return path


def tiny_config(dataset: Path, output: Path, *overrides: str) -> TrainConfig:
    """Return that config, loaded, with overrides."""
    output.parent.mkdir(parents=True, exist_ok=True)
    return load_config(TrainConfig, write_config(output.parent / "tiny.yaml", dataset, output), overrides)
