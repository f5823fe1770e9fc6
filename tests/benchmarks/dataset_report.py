"""Seconds and megabytes of the report about a large dataset, made of noise with the real writers.

    python tests/benchmarks/dataset_report.py [SAMPLES [BASE]]

Plans, parts, index and pixels are the real ones; features are random bytes of the right shapes, so no encoder runs. The
bounds are those of the specification for 10,000 samples: 30 s and 15 MB.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from nanodit.config import dump_config
from nanodit.files import canonical_json, write_atomic
from prep.config import PrepConfig
from prep.dataset.codecs import npy_bytes
from prep.dataset.layout import Unit, read_part
from prep.dataset.writer import LayerWriter
from prep.passes.layers import LayerWorker
from prep.passes.plan import make_plan, write_manifest
from prep.passes.publish import publish
from prep.report.report import write_report
from prep.run import current_parts

SECONDS, MEGABYTES = 30, 15
ASPECTS = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16), (2, 1), (1, 2))
WORDS = (
    "person",
    "wall",
    "light",
    "shirt",
    "left",
    "right",
    "hand",
    "green",
    "stands",
    "holds",
    "in",
    "front",
    "of",
    "the",
)


def write_sources(folder: Path, count: int, base: int) -> None:
    """Random pictures of all shapes with captions of up to 200 words; some are copies, some have no caption."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        width, height = ASPECTS[number % len(ASPECTS)]
        side = base * 1.1 / (width * height) ** 0.5
        size = (round(width * side), round(height * side))
        scales = [generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8) for cells in (4, 96)]
        coarse, fine = (Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC) for colours in scales)
        image = Image.blend(coarse, fine, 0.25)
        path = folder / f"image-{number:06d}.png"
        image.save(path, compress_level=1)
        if number % 100 == 1:
            image.save(path.with_name(f"again-{number:06d}.jpg"), quality=80)
            path.with_name(f"again-{number:06d}.txt").write_text("A copy.")
        if number % 50:
            words = generator.choice(WORDS, generator.integers(20, 200))
            path.with_suffix(".txt").write_text(" ".join(words))


def pretend(root: Path, unit: Unit, recipe: dict, keys: list[str]) -> None:
    """Commit a feature layer of random numbers."""
    generator = np.random.default_rng(unit.shard)
    facts = {"t5": {"width": 8, "max_tokens": 512}, "dino": {"width": 8}, "pose": {}}[unit.layer]
    with LayerWriter(root, unit, recipe, facts) as writer:
        for key in keys:
            if unit.layer == "t5":
                tokens = int(generator.integers(20, 513))
                members = {"t5.npy": npy_bytes(np.zeros((tokens, 8), np.float16))}
                writer.add(key, members, t5_tokens=tokens, t5_truncated=tokens == 512)
            elif unit.layer == "dino":
                shapes = {"cls.npy": (8,), "dino.npy": (64, 8), "dino_scale.npy": (64, 1)}
                arrays = {name: npy_bytes(np.zeros(shape)) for name, shape in shapes.items()}
                writer.add(key, arrays, dino_h=8, dino_w=8, dino_cosine=0.9999)
            else:
                persons = int(generator.choice([0, 1, 1, 1, 1, 2]))
                joints = generator.uniform(-1, 1, (133, 3)).astype(np.float32) * bool(persons)
                people = {"persons": persons, "boxes": [[5.0, 5.0, 40.0, 40.0, 0.9]] * persons}
                members = {"pose.npy": npy_bytes(joints), "json": canonical_json(people).encode()}
                writer.add(key, members, persons=persons)
        writer.commit()


def write_dataset(root: Path, count: int, base: int) -> Path:
    """A published dataset below ``root``."""
    write_sources(root / "source", count, base)
    config = PrepConfig(
        source=str(root / "source"), output=str(root / "dataset"), base=base, encoders="demo",
        captions={"on_missing": "reject"},
    )  # fmt: skip
    plan = make_plan(config)
    write_manifest(plan)
    worker, output = LayerWorker(config), root / "dataset"
    for task in plan.tasks(("px", "text")):
        worker.run(task)
    for unit, recipe in plan.recipes.items():
        if unit.layer not in ("px", "text"):
            upstream = Unit(unit.bucket, unit.shard, config.upstream(unit.layer))
            pretend(output, unit, recipe, read_part(output, upstream).table["key"].to_pylist())
    write_atomic(output / "runs" / "0001" / "config.yaml", dump_config(config))
    publish(plan, current_parts(plan), "rejects")
    return output


def main() -> None:
    count, base = ([int(text) for text in sys.argv[1:]] + [10_000, 64][len(sys.argv) - 1 :])[:2]
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), count, base)
        start = time.perf_counter()
        page = write_report(dataset)
        seconds = time.perf_counter() - start
        megabytes = page.stat().st_size / 1e6
        print(f"{count} samples of base {base}: {seconds:.1f} s, {megabytes:.2f} MB")
    if seconds > SECONDS or megabytes > MEGABYTES:
        sys.exit(f"the report may take {SECONDS} s and {MEGABYTES} MB")


if __name__ == "__main__":
    main()
