"""Seconds and memory of what reads a dataset's index, by the number of its rows.

    python -m tests.benchmarks.growth [--rows 64000 256000 1000000] [--only start,leak,...] [--folder FOLDER] [--json]

Writes an index of that many made-up samples as `configs/prep/production.yaml` would, with dataset.json and without a
single tar, and measures each operation in a process of its own: seconds without Python's imports, and the most memory
that the process had, imports included. With --folder the indices stay there for the next time; with --json the last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanodit.config import load_config
from nanodit.console import say
from nanodit.files import canonical_json, sha256_file
from prep.config import PrepConfig
from prep.dataset.buckets import buckets_for
from prep.dataset.layers import LAYERS, dino_grid
from prep.dataset.layout import member_columns

ROWS = (64_000, 256_000, 1_000_000)
HELD_OUT = 0.02
SHARD = 128
WORDS = ("person", "wall", "light", "shirt", "left", "right", "hand", "green", "stands", "holds", "in", "front", "the")
HEX = np.frombuffer(b"0123456789abcdef", np.uint8)

# imports what it needs, and returns what is then timed
Measurement = Callable[[Path], Callable[[], Any]]


def open_dataset(folder: Path) -> Callable[[], Any]:
    """The index is opened: hash, columns, checks."""
    from prep.dataset.reader import Dataset

    return lambda: Dataset(folder)


def start(folder: Path) -> Callable[[], Any]:
    """All that `train run` does with rows before its first step, with the network on the meta device."""
    from evaluate.subject import select_holdout
    from prep.dataset.reader import Dataset
    from train.config import TrainConfig
    from train.plan.memory import meta_trainer
    from train.plan.rehearsal import Shapes

    config = load_config(
        TrainConfig, Path("configs/train/production.yaml"), [f"dataset={folder}", "perceptual.every=0"]
    )

    def begin() -> Any:
        dataset = Dataset(folder)
        select_holdout(dataset, 64)  # as the validation does
        trainer = meta_trainer(config, dataset)
        shapes = Shapes.of(dataset.info, dataset.rows("train"))  # of the largest micro-batch, which is tried first
        unseen = trainer.batches.plan.order.unseen(config.train.steps * trainer.batches.plan.slots)
        first = [[row["key"] for row in trainer.data.select(cut)] for cut in trainer.batches.plan.of_step(0)]
        return shapes, unseen, first

    return begin


def leak(folder: Path) -> Callable[[], Any]:
    """An evaluation chooses its samples: the index is opened, and all of it looked through for leaks."""
    from evaluate.subject import select_holdout
    from prep.dataset.reader import Dataset

    return lambda: select_holdout(Dataset(folder), 512)


def order(folder: Path) -> Callable[[], Any]:
    """One epoch of the order, in micro-batches of 32, with the key of every row; the dataset is open already."""
    from prep.dataset.reader import Dataset
    from train.data.order import Order
    from train.data.samples import TrainingSet

    data = TrainingSet(Dataset(folder), 0.0)

    def epoch() -> int:
        slots = Order(data.sizes, 32, 0)
        return sum(len([row["key"] for row in data.select(slots[i])]) for i in range(sum(data.sizes.values()) // 32))

    return epoch


def versions(folder: Path) -> Callable[[], Any]:
    """A run is continued on another version: what differs between the two."""
    from prep.dataset.reader import Dataset
    from train.checkpoint.resume import changed_versions

    dataset = Dataset(folder)
    return lambda: changed_versions(dataset, dataset)


MEASUREMENTS: dict[str, Measurement] = {
    "open": open_dataset,
    "start": start,
    "leak": leak,
    "order": order,
    "versions": versions,
}


def write_index(folder: Path, rows: int) -> None:
    """Write index.parquet and dataset.json of so many made-up samples; nothing where they are there."""
    if (folder / "dataset.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    prep = load_config(PrepConfig, Path("configs/prep/production.yaml"))
    rng, names = np.random.default_rng(0), [str(bucket) for bucket in buckets_for(prep.base)]
    layers = {name: _facts(prep, name) for name in prep.active_layers}
    number, bucket = np.arange(rows), rng.integers(0, len(names), rows)
    keys = pa.array(np.sort(_hex(rng, rows, 32).to_numpy(zero_copy_only=False)), pa.string())
    grids = np.array([dino_grid(one.height, one.width, 0.5) for one in buckets_for(prep.base)], np.int32)
    known: dict[str, Any] = {
        "key": keys,
        "source": pa.array([f"folder-{i // 1000:04d}/image-{i:07d}.jpg" for i in range(rows)]),
        "bucket": pa.array(names).take(pa.array(bucket)),
        "shard": pa.array((number // (SHARD * len(names))).astype(np.int32)),
        "split": pa.array(["train", "holdout"]).take(pa.array((rng.random(rows) < HELD_OUT).astype(np.int8))),
        "duplicate_group": keys,
        "width": pa.array(rng.integers(1024, 6000, rows).astype(np.int32)),
        "height": pa.array(rng.integers(1024, 6000, rows).astype(np.int32)),
        **{f"crop_{side}": pa.array(rng.uniform(0, 6000, rows)) for side in ("left", "top", "right", "bottom")},
        "phash": _hex(rng, rows, 16),
        "caption": _captions(rng, rows),
        "t5_tokens": pa.array(rng.integers(80, 400, rows).astype(np.int32)),
        "t5_truncated": pa.array(np.zeros(rows, bool)),
        "dino_h": pa.array(grids[bucket, 0]),
        "dino_w": pa.array(grids[bucket, 1]),
    }
    for column, kind in (pair for name in layers for pair in LAYERS[name].columns_of(layers[name]).items()):
        if column != "thumbnail" and column not in known:  # which stays in the parts
            known[column] = pa.array(rng.uniform(0, 9, rows).astype(kind.to_pandas_dtype()))
    for name, facts in layers.items():
        shard = rng.integers(0, 1 + rows // SHARD, rows)
        known[f"{name}/fingerprint"] = _hex(rng, 1 + rows // SHARD, 64).take(pa.array(shard))
        for column, kind in member_columns(name, facts).items():
            is_hash = kind == pa.string()
            known[column] = _hex(rng, rows, 64) if is_hash else pa.array(rng.integers(512, 1 << 24, rows))
    pq.write_table(pa.table(known), folder / "index.parquet", compression="zstd")
    digest = sha256_file(folder / "index.parquet")
    info = {"schema": 1, "base": prep.base, "encoders": prep.encoders, "layers": layers, "fingerprint": digest}
    (folder / "dataset.json").write_text(canonical_json({**info, "hashes": {"index.parquet": digest}}))


def _facts(prep: PrepConfig, name: str) -> dict[str, Any]:
    layer = LAYERS[name]
    facts = {"width": layer.encoder.width[prep.encoders]} if layer.encoder and layer.encoder.width else {}
    return facts | ({"format": prep.image.format} if layer.formats else {})


def _hex(rng: np.random.Generator, rows: int, digits: int) -> pa.Array:
    """Return random strings of so many hexadecimal digits."""
    text = HEX[rng.integers(0, 16, rows * digits, np.uint8)]
    places = np.arange(rows + 1, dtype=np.int32) * digits
    return pa.StringArray.from_buffers(rows, pa.py_buffer(places), pa.py_buffer(text))


def _captions(rng: np.random.Generator, rows: int) -> pa.ChunkedArray:
    """Return captions of about 200 words, 1,200 letters: pieces of a long text."""
    text = " ".join(rng.choice(WORDS, 1_000_000))
    starts = rng.integers(0, len(text) - 1400, rows).tolist()
    pieces = [starts[i : i + SHARD * SHARD] for i in range(0, rows, SHARD * SHARD)]
    return pa.chunked_array([[text[at : at + 1000 + at % 400] for at in piece] for piece in pieces])


def measure(name: str, folder: Path) -> dict[str, float]:
    """Run one measurement here: its seconds, and the GB that this process had at most."""
    timed = MEASUREMENTS[name](folder)
    before, started, worked = _gigabytes("VmHWM"), time.perf_counter(), time.process_time()
    kept = timed()  # what it returns counts
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
    del kept
    found = seconds | {"peak_gb": _gigabytes("VmHWM"), "before_gb": before}
    return {name: round(value, 3) for name, value in found.items()}


def _gigabytes(field: str) -> float:
    status = Path("/proc/self/status").read_text().split(f"{field}:")[1]
    return int(status.split()[0]) * 1024 / 1e9


def in_a_process(module: str, name: str, folder: Path) -> dict[str, float]:
    """Run one measurement of a module of benchmarks in a process of its own."""
    command = [sys.executable, "-m", module, "--measure", name, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def results(rows: int, folder: Path, names: list[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what each measurement found."""
    write_index(folder, rows)
    for name in names:
        yield name, in_a_process("tests.benchmarks.growth", name, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help=f"some of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--folder", type=Path, help="where the indices are kept; else in a temporary folder")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for rows in options.rows:
            folder = (options.folder or Path(temporary)) / str(rows)
            for name, numbers in results(rows, folder, options.only.split(",")):
                found.setdefault(name, {})[str(rows)] = numbers
                say(
                    f"{rows:>9,} rows  {name:<10} {numbers['seconds']:8.2f} s  {numbers['cpu_seconds']:8.2f} s of CPU  "
                    f"{numbers['peak_gb']:6.2f} GB, {numbers['before_gb']:.2f} GB before it"
                )
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
