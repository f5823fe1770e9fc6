"""How long planning and splitting take with many samples: everything of `prep run` that is not computing a layer.

    python tests/benchmarks/plan_speed.py [SAMPLES] [FOLDER]

Writes SAMPLES (70,000) tiny pictures with captions to FOLDER (a temporary one), commits parts without pixels for them,
and prints the seconds of a first plan (every file is read), a second one (nothing is), and of the near duplicates by
perceptual hash and by class tokens (1,024 numbers each).
"""

from __future__ import annotations

import io
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from prep.config import PrepConfig
from prep.dataset.layout import part_schema, read_part
from prep.dataset.writer import LayerWriter
from prep.images import cosine, duplicates, scan_cache
from prep.passes.plan import Plan, make_plan, write_manifest

WIDTH = 1024


def write_sources(folder: Path, count: int) -> None:
    """Pictures that differ behind their end, which no decoder minds; captions beside them."""
    folder.mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    for number in range(count):
        (folder / f"{number:06d}.png").write_bytes(buffer.getvalue() + number.to_bytes(8, "big"))
        (folder / f"{number:06d}.txt").write_text(f"Picture {number}.")


def commit(plan: Plan) -> None:
    """Every unit of the plan with one row per sample and an empty tar."""
    values: dict[pa.DataType, Any] = {
        pa.string(): "0" * 64,
        pa.binary(): bytes(768),
        pa.float64(): 1.0,
        pa.bool_(): False,
    }
    os.fsync = lambda descriptor: None  # nobody needs these files after a crash
    for unit, recipe in plan.recipes.items():
        schema = part_schema(unit.layer, recipe)
        row = {field.name: values.get(field.type, 1) for field in schema}
        with LayerWriter(plan.config.output, unit, recipe, {}) as writer:
            writer._rows = [row | {"key": key} for key in plan.shards[unit.bucket, unit.shard]]
            writer.commit()
        assert read_part(plan.config.output, unit) is not None


def timed(label: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{label:<40}{time.perf_counter() - start:>8.1f} s {memory:>6.1f} GB at most so far", flush=True)
    return result


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 70_000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        root = Path(folder)
        config = PrepConfig(source=str(root / "source"), output=str(root / "out"), base=64, encoders="demo")
        timed(f"write {count} pictures", lambda: write_sources(root / "source", count))
        scan_cache.SETTLED = -3600.0  # these files are younger than what is remembered
        plan = timed("first plan", lambda: make_plan(config))
        timed("manifest", lambda: write_manifest(plan))
        timed(f"commit {len(plan.recipes)} units", lambda: commit(plan))
        again = timed("second plan, everything is current", lambda: make_plan(config))
        assert not again.missing, again.explain()
    generator = np.random.default_rng(0)
    hashes = [f"{number:016x}" for number in generator.integers(0, 1 << 63, count).tolist()]
    thumbnails = [generator.bytes(768) for _ in range(count)]
    timed("near duplicates by hash", lambda: list(duplicates.near_pairs(hashes, thumbnails)))
    spectrum = np.sqrt(1 / np.arange(1, WIDTH + 1, dtype=np.float32))  # features are never equally wide everywhere
    tokens = generator.standard_normal((count, WIDTH), dtype=np.float32) * spectrum
    tokens[-100:] = tokens[:100] + 0.1 * generator.standard_normal((100, WIDTH), dtype=np.float32) * spectrum
    groups, unit = cosine.Components(count), cosine.unit_rows(tokens)
    compare = partial(cosine.connect_near, groups, lambda rows: unit[rows], 0.98, np.arange(count))
    timed("near duplicates by class tokens", compare)
    assert len(np.unique(groups.labels())) == count - 100


if __name__ == "__main__":
    main()
