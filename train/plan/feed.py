"""Made-up samples of a run's size, of which it is measured how fast micro-batches are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from nanodit.files import canonical_json, sha256_bytes, write_atomic
from prep.config import PrepConfig
from prep.dataset.codecs import encode_pixels, npy_bytes
from prep.dataset.layers import LAYERS
from prep.dataset.layout import Unit, parquet_bytes, read_part
from prep.dataset.members import Array, Json, Picture
from prep.dataset.reader import Dataset
from prep.dataset.writer import LayerWriter
from train.data.samples import bucket_size
from train.plan.rehearsal import StandIn

GRAIN = 1.3  # standard deviation of made-up pixels: a lossless WebP is then as large as a photograph's (``PX_MB``)
DRAWN = 2  # made-up pictures and features that differ; the other samples repeat them


def write_made_up(prep: PrepConfig, folder: Path, samples: int) -> Dataset:
    """Write a dataset as ``prep`` would, of so many made-up samples of one bucket, all for training."""
    rng = np.random.default_rng(0)
    plain = prep.model_copy(update={"flips": False})
    stand_in = StandIn(plain)
    base = stand_in.rows("train")[1]  # the first has the longest caption, the others usual ones
    keys = [f"{i:032x}" for i in range(samples)]
    rows = {key: {**base, "key": key, "shard": 0, "duplicate_group": None} for key in keys}
    info = {**stand_in.info, "schema": 1, "layers": {}}
    for name in plain.active_layers:
        layer, facts = LAYERS[name], dict(stand_in.info["layers"].get(name, {}))
        recipe = {"made": "up"} | ({"format": plain.image.format} if layer.formats else {})
        columns = {column: base.get(column, _plain(kind)) for column, kind in layer.columns_of(recipe).items()}
        drawn = [
            {member.name: _bytes(member, base, facts, rng) for member in layer.members_of(recipe)} for _ in range(DRAWN)
        ]
        unit = Unit(base["bucket"], 0, name)
        with LayerWriter(folder, unit, recipe, facts=facts) as writer:
            for i, key in enumerate(keys):
                writer.add(key, drawn[i % DRAWN], **columns)
            writer.commit()
        for row in read_part(folder, unit).table.to_pylist():
            rows[row["key"]].update(row)
        info["layers"][name] = facts | {key: value for key, value in recipe.items() if key == "format"}
    index = parquet_bytes(pa.Table.from_pylist([*rows.values()]))
    write_atomic(folder / "index.parquet", index)
    named = {"fingerprint": sha256_bytes(index), "hashes": {"index.parquet": sha256_bytes(index)}}
    write_atomic(folder / "dataset.json", canonical_json(info | named))
    return Dataset(folder)


def _plain(kind: pa.DataType) -> Any:
    return {pa.string(): "made up", pa.binary(): b"", pa.bool_(): False}.get(kind, 1)


def _bytes(member: Any, row: dict[str, Any], facts: dict[str, Any], rng: np.random.Generator) -> bytes:
    """Return a member as large as a real one."""
    if isinstance(member.kind, Picture):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(bucket_size(row["bucket"]), Image.Resampling.BICUBIC))
        grained = smooth + rng.normal(0, GRAIN, smooth.shape)
        return encode_pixels(grained.clip(0, 255).astype(np.uint8), member.name)
    if isinstance(member.kind, Array):
        shape = member.kind.shape(row, facts)
        if np.dtype(member.kind.dtype).kind == "i":
            return npy_bytes(rng.integers(-127, 128, shape).astype(member.kind.dtype))
        return npy_bytes(rng.uniform(0, 1, shape).astype(member.kind.dtype))
    return b'{"persons": 1}' if isinstance(member.kind, Json) else b"made up"
