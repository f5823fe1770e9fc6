"""How fast micro-batches are made, on a run's own samples or on made-up ones of its size."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
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
from train.config import TrainConfig
from train.data.buffers import Buffer
from train.data.prefetch import thread_count
from train.data.samples import bucket_size
from train.plan.memory import meta_trainer
from train.plan.rehearsal import StandIn, cache_bytes, changed

GRAIN = 1.3  # standard deviation of made-up pixels: a lossless WebP is then as large as a photograph's (``PX_MB``)
SECONDS = 1.0  # for which micro-batches are made
SAMPLES = 4  # that are made up for it
DRAWN = 2  # made-up pictures and features that differ; the other samples repeat them


@dataclass(frozen=True)
class Feed:
    """Images a second that one thread makes here, measured, and the threads that the run would have here."""

    of_one: float
    threads: int
    samples: str

    @property
    def rate(self) -> float:
        """Images a second of all threads, as if each had a processor of its own."""
        return self.of_one * self.threads


def measure_feed(config: TrainConfig, dataset: Dataset | StandIn) -> Feed:
    """Make the first micro-batches of a run, for a second or so; a dataset that does not exist yet is made up.

    Where all samples fit in memory it is the second time that counts.
    """
    what = "of the dataset"
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(dataset, StandIn):
            dataset, what = write_made_up(dataset.prep, Path(folder), SAMPLES), "made up"
            # made-up samples have no mirror image, and as few as they are they would all be in memory
            config = changed(config, {"data.flip": 0.0, "data.cache_gb": 0.0})
        trainer = meta_trainer(config, dataset)
        kept = cache_bytes(dataset, config.data.flip > 0) <= config.data.cache_gb * 1e9
        numbers, buffer, images, started = trainer.batches.numbers(0), Buffer(), 0, time.perf_counter()
        taken = []
        while not taken or time.perf_counter() - started < SECONDS:
            taken.append(next(numbers))
            images += len(trainer.batches.pack(taken[-1], buffer.reset()).keys)
        if kept:
            started = time.perf_counter()
            for number in taken:
                trainer.batches.pack(number, buffer.reset())
        seconds = time.perf_counter() - started
    threads = thread_count(config.data.workers) if config.data.prefetch else 1
    return Feed(images / seconds, threads, f"{images} images {what}{', in memory' if kept else ''}")


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
