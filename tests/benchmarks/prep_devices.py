"""Preparation on real cards, without one: where passes go, what the CPU does beside a GPU, and that both overlap.

    python -m tests.benchmarks.prep_devices [placements stages beside]

- placements: passes of the full-size encoders on one machine with a card of 8 to 24 GB, with and without a caption
  server on the same card, and how long 10,000 images take by the built-in rates
- stages: CPU milliseconds of a 1024-pixel image in each stage of preparation
- beside: images/s of the DINO and pose layers on a stand-in for a GPU, which sleeps, by the threads beside it
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanodit.console import duration
from prep.config import PrepConfig
from prep.dataset.buckets import Bucket, crop_to_bucket
from prep.dataset.codecs import decode_pixels, npy_bytes, webp_bytes
from prep.dataset.layout import Unit
from prep.dataset.writer import LayerWriter
from prep.encoders import dwpose
from prep.encoders.dinov3 import dino_members
from prep.images.duplicates import perceptual_hash, thumbnail
from prep.images.filters import sharpness
from prep.passes.cost import estimated_rate
from prep.passes.layers import LayerWorker
from prep.passes.nodes import Node
from prep.passes.placement import plan_passes
from prep.passes.plan import make_plan
from tests.benchmarks.prep_pipeline import photographs, px_config, write_sources

IMAGES = 10_000
CPUS, MEMORY_GB = 8, 32
REPEATS = 9
DEVICE_MS = 20.0  # of the stand-in, per image and layer: a card that computes 50 images a second in each


def placements() -> None:
    """One machine with 8 CPUs, 32 GB of memory and one card."""
    print(f"| card | captions | passes, and the time of {IMAGES:,} images |\n|---|---|---|")
    for gb in (8, 12, 16, 24):
        for where, captions in (
            ("sidecars", {}),
            ("gemma3:27b elsewhere", {"backend": "ollama", "hosts": ["http://192.0.2.1:11434"]}),
            ("gemma3:27b on this card", {"backend": "ollama", "hosts": ["http://127.0.0.1:11434"]}),
        ):
            config = PrepConfig(source="photos", output="dataset", captions=captions)
            node = Node("id", "127.0.0.1", "here", CPUS, 1, gb, MEMORY_GB, driver=True)
            told = []
            for step in plan_passes(config, [node])[0]:
                seconds = sum(IMAGES / estimated_rate(config, layer, step) / step.actors for layer in step.layers)
                device = {"cpu": "CPU", "cuda": "GPU", "captions": "caption slot"}[step.device]
                told.append(f"{'+'.join(step.layers)} on {step.actors} x {device} {duration(seconds)}")
            print(f"| {gb} GB | {where} | {'; '.join(told)} |")


def cpu_ms(function: Callable[[], object]) -> float:
    """CPU time of a call in milliseconds, the median."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        function()
        times.append((time.process_time() - start) * 1e3)
    return statistics.median(times)


def stages() -> None:
    """Of one 1024-pixel mosaic of photographs, and of DINO features and joints of full size."""
    (picture,) = photographs(1)
    pixels, bucket = np.asarray(picture), Bucket(1024, 1024)
    small = np.asarray(picture.resize((64, 64)))
    webp, random = webp_bytes(pixels), np.random.default_rng(0)
    prediction = np.zeros((8400, 85), np.float32)
    prediction[:50, 4:6] = random.random((50, 2))
    simcc = [random.random((1, 133, bins), np.float32) for bins in (576, 768)]
    centre, size = np.array([512.3, 500.7]), np.array([288.0, 384.0]) * 2
    grid = random.standard_normal((32, 32, 1024), np.float32)
    members = dino_members(grid[0, 0], grid)[0]
    rows = {
        "px: crop": lambda: crop_to_bucket(picture, bucket),
        "px: hash, sharpness, thumbnail": lambda: (perceptual_hash(pixels), sharpness(pixels), thumbnail(pixels)),
        "px: WebP": lambda: webp_bytes(pixels),
        "dino, pose: decode the crop": lambda: decode_pixels(webp),
        "dino: quantise, members": lambda: dino_members(grid[0, 0], grid),
        "dino: tar, hashes": lambda: _write(members),
        "pose: letterbox": lambda: dwpose.letterbox(pixels[None]),
        "pose: letterbox of 64 pixels": lambda: dwpose.letterbox(small[None]),
        "pose: boxes": lambda: dwpose.person_boxes(prediction, 0.625),
        "pose: cut out the person": lambda: dwpose.crop(pixels, centre, size),
        "pose: joints, members": lambda: npy_bytes(dwpose.normalise(dwpose.decode_simcc(*simcc)[0], 1024, 1024)),
    }
    try:
        from prep.passes.crops import decode_freely

        rows["dino, pose: decode the crop, beside a GPU"] = lambda: decode_freely(webp)
    except ImportError:  # this benchmark on older code
        pass
    print("| stage | CPU ms |\n|---|---|")
    for name, function in rows.items():
        function()
        print(f"| {name} | {cpu_ms(function):.2f} |", flush=True)


def _write(members: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe = {"layer": "dino"}
        with LayerWriter(folder, Unit("1024x1024", 0, "dino"), recipe, {}) as writer:
            writer.add("key", members, dino_h=32, dino_w=32, dino_cosine=1.0)


def beside(count: int = 64, pairs: int = 2) -> None:
    """Real decoding, letterboxes, crops, quantising, tars; the networks' outputs are made up while a device sleeps."""

    def compute(config: PrepConfig, threads: int) -> float:
        """Images a second through both layers."""
        arguments = {"threads": threads} if threads else {}
        worker = LayerWorker(config, **arguments)
        grid = np.random.default_rng(0).standard_normal((1, 32, 32, 1024), np.float32)
        prediction, simcc = np.zeros((8400, 85), np.float32), [np.zeros((1, 133, bins)) for bins in (576, 768)]
        prediction[8000 + 20 * 7 + 7, :6] = (0.5, 0.5, 2.5, 2.8, 1.0, 1.0)  # one person

        def sleep(batch: np.ndarray, outputs: list[np.ndarray], ms: float) -> list[np.ndarray]:
            time.sleep(ms / 1e3 * len(batch))
            return [np.repeat(output, len(batch), axis=0) for output in outputs]

        tasks = make_plan(config).tasks(("dino", "pose"))
        from prep.passes.layers import Job

        for layer in ("dino", "pose"):
            encoder = worker._encoder(Job(tasks[0], layer))
            encoder.memory.__init__(layer, "cuda")
            if layer == "dino":
                encoder._encode = lambda images: tuple(sleep(images, [grid[:, 0, 0], grid], DEVICE_MS))
            else:
                encoder._detector.run = lambda images: sleep(images, [prediction[None]], DEVICE_MS * 0.9)
                encoder._pose.run = lambda images: sleep(images, simcc, DEVICE_MS * 0.1)
        start = time.monotonic()
        for task in tasks:
            worker.run(task)
        return count / (time.monotonic() - start)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sources(folder, count)
        config = px_config(
            folder, layers=["dino", "pose"], shard_size=count, dino={"batch_size": 8}, pose={"batch_size": 8}
        )
        for task in make_plan(config).tasks(("px",)):
            LayerWorker(config).run(task)
        print(f"a device of {DEVICE_MS:g} ms an image and layer could do {500 / DEVICE_MS:.1f} images/s through both")
        print("| threads | images/s, median of runs |\n|---|---|")
        for threads in (0, 2, 3):
            found = []
            for _ in range(pairs):
                for part in [*folder.glob("out/parts/*.dino.parquet"), *folder.glob("out/parts/*.pose.parquet")]:
                    part.unlink()
                found.append(compute(config, threads))
            print(f"| {threads} | {statistics.median(found):.1f} |", flush=True)


BENCHMARKS = {"placements": placements, "stages": stages, "beside": beside}

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # torch is imported later
    for chosen in sys.argv[1:] or BENCHMARKS:
        print(f"\n## {chosen}\n")
        BENCHMARKS[chosen]()
