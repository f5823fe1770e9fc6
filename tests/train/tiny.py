"""A synthetic dataset in the published format and a run of seconds on it: every layer, four buckets of unequal size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from nanodit.config import load_config
from nanodit.files import canonical_json, sha256_bytes, write_atomic
from prep.captions.mirror import flip_caption
from prep.dataset.codecs import npy_bytes, webp_bytes
from prep.dataset.layers import LAYERS
from prep.dataset.layout import Unit, parquet_bytes, read_part
from prep.dataset.quantise import quantise
from prep.dataset.writer import LayerWriter
from train.config import TrainConfig

TEXT_WIDTH, DINO_WIDTH = 24, 16
TEXT_ENCODER = {"encoder": "t5", "content": "synthetic"}
# WIDTHxHEIGHT -> (training samples, holdout samples); the last two hold less than a micro-batch of 4
BUCKETS = {"64x64": (13, 3), "80x56": (9, 2), "56x80": (3, 1), "88x48": (1, 0)}
GRID = {"64x64": (8, 8), "80x56": (8, 10), "56x80": (10, 8), "88x48": (8, 11)}  # patches (h, w)


def write_dataset(
    root: Path,
    seed: int = 0,
    layers: tuple[str, ...] = tuple(LAYERS),
    text_of_one: float | None = None,
    flips: bool = True,
) -> Path:
    """Write a dataset of random colours and features, with other ones of the mirrored images where ``flips``.

    ``seed`` changes every sample; ``text_of_one`` (NaN, say) replaces the text features of one training sample. Of four
    samples one has a caption that cannot be flipped, and one a caption that is its own mirror image.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for bucket, (train, holdout) in BUCKETS.items():
        width, height = map(int, bucket.split("x"))
        keys = sorted(sha256_bytes(f"{seed}/{bucket}/{i}".encode())[:32] for i in range(train + holdout))
        splits = dict(zip(keys, ["train"] * train + ["holdout"] * holdout))
        samples = {key: _sample(rng, width, height, *GRID[bucket]) for key in keys}
        if flips:
            for number, sample in enumerate(samples.values()):
                _add_flips(sample, number % 4, np.random.default_rng([seed, width, number]))
        if text_of_one is not None and bucket == "88x48":  # which has one sample, so every micro-batch of it
            members, _ = samples[keys[0]]["t5"]
            members["t5.npy"] = npy_bytes(np.full((5, TEXT_WIDTH), text_of_one, np.float16))
            samples[keys[0]]["t5"][1]["t5_tokens"] = 5
        equal = {"shard": 0, "duplicate_group": None}
        merged = {
            key: {"key": key, "source": f"{key[:8]}.png", "bucket": bucket, "split": splits[key], **equal}
            for key in keys
        }
        for layer in layers:
            unit = Unit(bucket, 0, layer)
            recipe = {"made": "synthetic"} | _flip(layer, flips)
            with LayerWriter(root, unit, recipe, facts={}) as writer:
                for key in keys:
                    members, columns = samples[key][layer]
                    writer.add(key, members, **columns)
                writer.commit()
            for row in read_part(root, unit).table.to_pylist():
                merged[row["key"]].update(row)
        rows += merged.values()
    rows.sort(key=lambda row: row["key"])
    index = parquet_bytes(pa.Table.from_pylist(rows))
    write_atomic(root / "index.parquet", index)
    described = {
        "px": {}, "text": {}, "t5": {"width": TEXT_WIDTH, "max_tokens": 512, "encoder": TEXT_ENCODER},
        "dino": {"width": DINO_WIDTH}, "pose": {},
    }  # fmt: skip
    info = {
        "schema": 1, "fingerprint": sha256_bytes(index), "base": 64, "encoders": "demo",
        "layers": {layer: described[layer] | _flip(layer, flips) for layer in layers},
        **({"flips": True} if flips else {}),
        "hashes": {"index.parquet": sha256_bytes(index)},
    }  # fmt: skip
    write_atomic(root / "dataset.json", canonical_json(info))
    return root


def _sample(rng: np.random.Generator, width: int, height: int, h: int, w: int) -> dict[str, tuple[dict, dict]]:
    colour = rng.integers(0, 256, 3)
    pixels = np.clip(colour + rng.integers(-20, 20, (height, width, 3)), 0, 255).astype(np.uint8)
    tokens = rng.standard_normal((int(rng.integers(5, 40)), TEXT_WIDTH)).astype(np.float16)
    patches, scale = quantise(rng.standard_normal((h * w, DINO_WIDTH)).astype(np.float32))
    cls = rng.standard_normal(DINO_WIDTH).astype(np.float32)
    pose = np.concatenate([rng.uniform(-1, 1, (133, 2)), rng.uniform(0, 1, (133, 1))], 1).astype(np.float32)
    caption = f"A square of colour {colour.tolist()}."
    return {
        "px": ({"webp": webp_bytes(pixels)}, {"phash": "0", "sharpness": 0.0, "thumbnail": b""}),
        "text": ({"txt": caption.encode(), "json": b"{}"}, {"caption": caption}),
        "t5": ({"t5.npy": npy_bytes(tokens)}, {"t5_tokens": len(tokens), "t5_truncated": False}),
        "dino": (
            {"cls.npy": npy_bytes(cls), "dino.npy": npy_bytes(patches), "dino_scale.npy": npy_bytes(scale)},
            {"dino_h": h, "dino_w": w, "dino_cosine": 1.0},
        ),
        "pose": ({"pose.npy": npy_bytes(pose), "json": json.dumps({"persons": 1}).encode()}, {"persons": 1}),
    }


def _flip(layer: str, flips: bool) -> dict[str, int]:
    """What recipe and dataset.json say of a layer with flips."""
    return {"flip": 1} if flips and LAYERS[layer].flip else {}


def _add_flips(sample: dict[str, tuple[dict, dict]], kind: int, rng: np.random.Generator) -> None:
    """Add what belongs to the mirrored image, random as the rest; ``kind`` 0: not to be flipped, 1: symmetric."""
    (text, about), (t5, t5_about), (dino, dino_about) = (sample[layer] for layer in ("text", "t5", "dino"))
    about["caption"] += {0: " Somebody left it.", 1: ""}.get(kind, " It is on the left.")
    about["caption_flip"] = flip_caption(about["caption"])
    text |= {"txt": about["caption"].encode(), "flip.txt": (about["caption_flip"] or "").encode()}
    tokens = rng.standard_normal((0 if kind < 2 else int(rng.integers(5, 40)), TEXT_WIDTH)).astype(np.float16)
    t5["t5_flip.npy"] = npy_bytes(tokens)
    t5_about["t5_flip_tokens"] = len(tokens)
    grid = dino_about["dino_h"] * dino_about["dino_w"]
    patches, scale = quantise(rng.standard_normal((grid, DINO_WIDTH)).astype(np.float32))
    cls = rng.standard_normal(DINO_WIDTH).astype(np.float32)
    arrays = {"cls_flip.npy": cls, "dino_flip.npy": patches, "dino_flip_scale.npy": scale}
    dino |= {name: npy_bytes(array) for name, array in arrays.items()}


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
