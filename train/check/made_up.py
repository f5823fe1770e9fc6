"""What the check trains on and with: a dataset of the real format and sizes without a single real image, and configs.

The pixels take the bytes of photographs (``prep.dataset.layers.PX_MB``) and so the time to decode them; a dataset is
written once, below the folder that all parts of a check share.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

import nanodit
from nanodit.config import load_config
from nanodit.files import canonical_json, sha256_bytes, write_atomic
from nanodit.keypoints import JOINTS
from nanodit.rng import generator
from prep.config import PrepConfig
from prep.dataset.buckets import Bucket, buckets_for
from prep.dataset.codecs import npy_bytes, webp_bytes
from prep.dataset.layers import LAYERS, T5_TOKENS, dino_grid, option
from prep.dataset.layout import Unit, parquet_bytes, read_part
from prep.dataset.quantise import quantise
from prep.dataset.reader import Dataset
from prep.dataset.writer import LayerWriter
from train.check.backbones import write_random_vgg
from train.check.report import Report, Setting
from train.config import TrainConfig
from train.loop.trainer import Trainer
from train.plan.rehearsal import StandIn, open_dataset

PRESETS = Path(nanodit.__file__).parent / "configs/train"
OPTIONAL = ("lpips", "torchvision")  # what the perceptual loss needs, and a bare machine may lack
IMAGES = 8  # of a bucket
NOISE = 0.75  # grey levels: a lossless WebP then has 2.7 bits a value, as photographs do (test_check.py)
TINY_TOKENS = 40
TINY_BASE = 64

TINY = (
    "model.hidden_size=32", "model.depth=4", "model.num_heads=2", "model.patch_size=8", "model.bottleneck=16",
    "tread.enabled=true", "repa.enabled=true", "perceptual.every=2", "perceptual.size=24", "train.steps=100",
    "train.batch_size=1", "train.grad_accumulation_steps=24", "train.token_budget=512", "visual_debug.count=2",
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
        _write(prep, root)
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


def _write(prep: PrepConfig, root: Path) -> None:
    rows: list[dict[str, Any]] = []
    for bucket in buckets_for(prep.base):
        pictures = [_sample(prep, bucket, number) for number in range(2)]
        keys = sorted(sha256_bytes(f"{bucket}/{number}".encode())[:32] for number in range(IMAGES))
        found = {
            key: {
                "key": key, "source": f"{key}.png", "bucket": str(bucket), "split": "train", "shard": 0,
                "duplicate_group": None,
            }
            for key in keys
        }  # fmt: skip
        for layer in LAYERS:
            unit = Unit(str(bucket), 0, layer)
            recipe = {"format": "webp"} if layer == "px" else {}
            with LayerWriter(root, unit, recipe, facts={}) as writer:
                for number, key in enumerate(keys):
                    members, columns = pictures[number % 2][layer]
                    writer.add(key, members, **columns)
                writer.commit()
            for row in read_part(root, unit).table.to_pylist():
                found[row["key"]].update(row)
        rows += found.values()
    rows.sort(key=lambda row: row["key"])
    index = parquet_bytes(pa.Table.from_pylist(rows))
    write_atomic(root / "index.parquet", index)
    described: dict[str, dict[str, Any]] = {layer: {} for layer in LAYERS}
    for layer in ("t5", "dino"):
        described[layer]["width"] = LAYERS[layer].encoder.width[prep.encoders]
    described["t5"]["max_tokens"] = prep.t5.max_tokens
    info = {
        "schema": 1, "fingerprint": sha256_bytes(index), "base": prep.base, "encoders": prep.encoders,
        "layers": described, "hashes": {"index.parquet": sha256_bytes(index)},
    }  # fmt: skip
    write_atomic(root / "dataset.json", canonical_json(info))


def _sample(prep: PrepConfig, bucket: Bucket, number: int) -> dict[str, tuple[dict[str, bytes], dict[str, Any]]]:
    """Return the members and columns of each layer of a made-up image."""
    rng = generator("check", str(bucket), number)
    width, height = bucket.width, bucket.height
    slopes = np.linspace(40, 200, width)[None, :, None] + np.linspace(-30, 30, height)[:, None, None]
    noise = rng.standard_normal((height, width, 3), np.float32) * NOISE
    pixels = np.clip(slopes + noise + rng.integers(-20, 20, 3), 0, 255).astype(np.uint8)
    tokens = (TINY_TOKENS if prep.encoders == "demo" else T5_TOKENS) + 30 * number
    text = rng.standard_normal((tokens, LAYERS["t5"].encoder.width[prep.encoders]), np.float32).astype(np.float16)
    h, w = dino_grid(height, width, option(prep, "dino", "input_scale"))
    features = LAYERS["dino"].encoder.width[prep.encoders]
    patches, scale = quantise(rng.standard_normal((h * w, features), np.float32))
    arrays = {"cls.npy": rng.standard_normal(features, np.float32), "dino.npy": patches, "dino_scale.npy": scale}
    joints = np.concatenate([rng.uniform(-1, 1, (JOINTS, 2)), rng.uniform(0, 1, (JOINTS, 1))], 1).astype(np.float32)
    caption = f"A slope and noise, number {number}."
    return {
        "px": ({"webp": webp_bytes(pixels)}, {"phash": "0", "sharpness": 0.0, "thumbnail": b""}),
        "text": ({"txt": caption.encode(), "json": b"{}"}, {"caption": caption}),
        "t5": ({"t5.npy": npy_bytes(text)}, {"t5_tokens": tokens, "t5_truncated": False}),
        "dino": (
            {name: npy_bytes(array) for name, array in arrays.items()},
            {"dino_h": h, "dino_w": w, "dino_cosine": 1.0},
        ),
        "pose": ({"pose.npy": npy_bytes(joints), "json": b'{"persons": 1}'}, {"persons": 1}),
    }
