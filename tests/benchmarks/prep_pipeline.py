"""What preparation costs besides the models.

    python -m tests.benchmarks.prep_pipeline [overhead bytes rate captions scaling reads]

- overhead: CPU time per 1024-pixel image of the px layer (decode, crop, WebP, tar, part); decodes of each source
- bytes: per sample and layer at production shapes, lossless and as JPEG q95
- rate: images/s of a pass under Ray against the same work in a plain loop
- captions: images/s of a whole run against what its caption servers could answer at best
- scaling: a sleep-bound stage on 1, 2 and 4 Ray nodes of one CPU each
- reads: what training reads of a sample, a layer at a time and a member at a time, from files and from an S3 server

Pictures are mosaics of 256-pixel patches of the photographs in scikit-image's package, at their own resolution: denser
than most photographs of 1024 pixels.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from nanodit.storage import open_storage
from prep.config import PrepConfig
from prep.dataset.codecs import npy_bytes
from prep.dataset.layout import TAR_BLOCK
from prep.dataset.quantise import quantise
from prep.dataset.reader import Dataset
from prep.images import sources
from prep.passes.layers import LayerWorker
from prep.passes.plan import make_plan
from tests.local_cluster import LocalCluster
from tests.prep.caption_server import CaptionServer
from tests.prep.object_store import s3_server
from tests.prep.passes.test_plan import write_images
from tests.prep.prepared import prepare as prepare_here

PROJECT = Path(__file__).parents[2]
PATCH = 256
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
)
TOKENS, PATCHES, WIDTH = 220, 1024, 1024  # of a long caption in T5, and of DINOv3 at half of 1024 pixels


def photographs(count: int, side: int = 1024) -> list[Image.Image]:
    """Mosaics of ``side`` pixels, seeded."""
    folder = Path(skimage.data.__file__).parent
    pictures = [np.asarray(Image.open(folder / name).convert("RGB")) for name in PHOTOGRAPHS]
    random = np.random.default_rng(0)
    mosaics = []
    for _ in range(count):
        canvas = np.empty((side, side, 3), np.uint8)
        for top in range(0, side, PATCH):
            for left in range(0, side, PATCH):
                picture = pictures[random.integers(len(pictures))]
                y, x = (random.integers(size - PATCH + 1) for size in picture.shape[:2])
                canvas[top : top + PATCH, left : left + PATCH] = picture[y : y + PATCH, x : x + PATCH]
        mosaics.append(Image.fromarray(canvas))
    return mosaics


def px_config(folder: Path, **changes) -> PrepConfig:
    fields = {"base": 1024, "layers": ["dino"], "encoders": "demo", "shard_size": 16} | changes
    return PrepConfig(source=str(folder / "source"), output=str(folder / "out"), **fields)


def write_sources(folder: Path, count: int) -> None:
    (folder / "source").mkdir()
    for number, picture in enumerate(photographs(count)):
        picture.save(folder / "source" / f"{number:04d}.jpg", quality=95, subsampling=0)
        (folder / "source" / f"{number:04d}.txt").write_text(f"Picture {number}, " + "a mosaic of photographs. " * 20)


def overhead(count: int = 48) -> None:
    """CPU time of the px layer per image, by image format."""
    print("| pixels | CPU ms per image, median of shards | decodes per source | bytes per image |\n|---|---|---|---|")
    decode = sources.decode
    for form in ("webp", "jpeg"):
        with tempfile.TemporaryDirectory() as name:
            folder, decodes = Path(name), []
            write_sources(folder, count)
            config = px_config(folder, image={"format": form})
            sources.decode = lambda *arguments: decodes.append(1) or decode(*arguments)  # noqa: B023 - used at once
            times = []
            for task in make_plan(config).tasks(("px",)):
                start = time.process_time()
                LayerWorker(config).run(task)
                times.append((time.process_time() - start) / len(task.sources) * 1e3)
            size = sum(path.stat().st_size for path in folder.glob("out/bucket_*/*.px.tar")) / count
            sources.decode = decode
            print(f"| {form} | {statistics.median(times):.0f} | {len(decodes) / count:g} | {size / 1e6:.2f} MB |")


def bytes_per_sample(count: int = 16) -> None:
    """Bytes of one sample in every layer, tar headers and padding included."""

    def member(data: bytes | int) -> int:
        size = data if isinstance(data, int) else len(data)
        return TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK

    random = np.random.default_rng(0)
    patches, scale = quantise(random.standard_normal((PATCHES, WIDTH), np.float32))
    layers = {
        "text": member(1200) + member(400),
        "t5": member(npy_bytes(np.zeros((TOKENS, WIDTH), np.float16))),
        "dino": member(npy_bytes(np.zeros(WIDTH, np.float32))) + member(npy_bytes(patches)) + member(npy_bytes(scale)),
        "pose": member(npy_bytes(np.zeros((133, 3), np.float32))) + member(200),
    }
    pixels = {}
    for form in ("webp", "jpeg"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_sources(folder, count)
            config = px_config(folder, image={"format": form})
            for task in make_plan(config).tasks(("px",)):
                LayerWorker(config).run(task)
            pixels[form] = sum(path.stat().st_size for path in folder.glob("out/bucket_*/*.px.tar")) // count
    print("| px | " + " | ".join(layers) + " | sum |\n|" + "---|" * (len(layers) + 2))
    for form, size in pixels.items():
        total = size + sum(layers.values())
        print(f"| {form} {size / 1e6:.2f} MB | " + " | ".join(f"{n / 1e6:.3f}" for n in layers.values()), end="")
        print(f" | {total / 1e6:.2f} MB |")


def span(root: Path, samples: int) -> float:
    """Samples per second between a third and nine tenths of the commits: all actors are up, and none has run dry."""
    times = sorted(path.stat().st_mtime for path in root.glob("parts/*.px.parquet"))
    first, last = len(times) // 3, len(times) * 9 // 10
    return samples * (last - first) / len(times) / (times[last] - times[first])


def prepare(config: PrepConfig, environment: dict[str, str]) -> None:
    fields = ("source", "output", "base", "encoders", "shard_size")
    overrides = [f"{name}={getattr(config, name)}" for name in fields] + [f"workers={config.workers or 'null'}"]
    command = [sys.executable, "-m", "prep", "run", *overrides, f"layers=[{','.join(config.layers)}]"]
    subprocess.run(command, cwd=PROJECT, env=os.environ | environment, stdout=subprocess.DEVNULL, check=True)


def rate(count: int = 96, pairs: int = 3) -> None:
    """The px and dino layers of 1024-pixel images by one worker: in a plain loop, and as a pass of ``prep run``."""
    ratios = []
    print("| plain loop, images/s | prep run, images/s | ratio |\n|---|---|---|")
    for _ in range(pairs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_sources(folder, count)
            plain, run = px_config(folder, shard_size=8), px_config(folder, shard_size=8, workers=1)
            worker = LayerWorker(plain)
            for task in make_plan(plain).tasks(plain.active_layers):
                worker.run(task)
            first = span(Path(plain.output), count)
            run = run.model_copy(update={"output": str(folder / "run")})
            prepare(run, {})
            second = span(Path(run.output), count)
            ratios.append(second / first)
            print(f"| {first:.1f} | {second:.1f} | {second / first:.2f} |", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


def captions(count: int = 360, hosts: int = 3, slots: int = 2, seconds: float = 0.5) -> None:
    """A run with demo encoders at 64 pixels whose captions come from hosts that take their time, the slowest stage."""
    ideal = hosts * slots / seconds
    servers = [CaptionServer(slots=slots, seconds=seconds) for _ in range(hosts)]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        urls = [stack.enter_context(server).url for server in servers]
        folder = Path(name)
        write_images(folder / "source", count, size=(72, 72))
        hosts_text = ", ".join(f"{{url: '{url}', slots: {slots}}}" for url in urls)
        overrides = [f"source={folder}/source", f"output={folder}/out", "base=64", "encoders=demo", "shard_size=16"]
        overrides += ["captions.backend=ollama", "captions.overwrite=true", f"captions.hosts=[{hosts_text}]"]
        start = time.monotonic()
        command = [sys.executable, "-m", "prep", "run", *overrides]
        output = subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True).stdout
        whole = time.monotonic() - start
    stage = float(re.search(r"^text: \d+ samples x layers in .*\(([\d.e+]+)/s\)", output, re.MULTILINE)[1])
    print("| ideal of the hosts, images/s | caption pass | ratio | whole run | ratio |\n|---|---|---|---|---|")
    print(f"| {ideal:.1f} | {stage:.1f} | {stage / ideal:.2f} | {count / whole:.1f} | {count / whole / ideal:.2f} |")


def scaling(count: int = 320) -> None:
    """A stage that sleeps a tenth of a second per image, on clusters of different size."""
    delay = {"NANODIT_FAULT": "px.decode@*:delay", "OMP_NUM_THREADS": "1"}
    print("| nodes | images/s | efficiency |\n|---|---|---|")
    single = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "source", count, size=(72, 72))
        for nodes in (1, 2, 4):
            config = px_config(folder, base=64, shard_size=4, layers=["text"])  # a millisecond per image
            config = config.model_copy(update={"output": str(folder / f"out-{nodes}")})
            with LocalCluster(nodes=nodes, environment=delay) as cluster:
                prepare(config, cluster.environment)
            found = span(Path(config.output), count)
            single = single or found
            print(f"| {nodes} | {found:.1f} | {found / single / nodes:.2f} |", flush=True)


def reads(count: int = 48, pairs: int = 10) -> None:
    """Samples of 256 pixels as training loads them, nothing cached: reads, and the pace as median ratio of pairs."""
    from train.data.samples import TrainingSet

    def load(dataset: Dataset) -> tuple[float, float]:
        """Samples per second, and ranged reads per sample."""
        asked, kind = [], type(dataset.storage)
        ranged = kind.read_range
        kind.read_range = lambda *arguments: asked.append(1) or ranged(*arguments)
        training = TrainingSet(dataset, cache_gb=0)
        start, loaded = time.perf_counter(), 0
        for rows in training.rows.values():
            for row in rows:
                training.load([row])
                loaded += 1
        seconds = time.perf_counter() - start
        kind.read_range = ranged
        return loaded / seconds, len(asked) / loaded

    print("| place | by member: reads, samples/s | by layer: reads, samples/s | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name, s3_server("bucket"):
        folder, store = Path(name), open_storage("s3://bucket/dataset")
        write_sources(folder, count)
        prepare_here(px_config(folder, base=256, layers=["dino", "pose", "text"]))
        for path in (path for path in (folder / "out").rglob("*") if path.is_file()):
            store.write(path.relative_to(folder / "out").as_posix(), path.read_bytes())
        for place in (folder / "out", store):
            together, found = Dataset.together, []
            for number in range(pairs):
                measured = {}
                for at_once in ((False, True), (True, False))[number % 2]:
                    Dataset.together = together if at_once else lambda dataset: dataset
                    measured[at_once] = load(Dataset(place))
                Dataset.together = together
                found.append((*measured[False], *measured[True]))
            slow, many, fast, few = (statistics.median(column) for column in zip(*found))
            ratio = statistics.median(one[2] / one[0] for one in found)
            kind = "files" if place != store else "S3 server (moto)"
            print(f"| {kind} | {many:.2f}, {slow:.0f} | {few:.2f}, {fast:.0f} | {ratio:.2f} |", flush=True)


BENCHMARKS = {
    "overhead": overhead,
    "bytes": bytes_per_sample,
    "rate": rate,
    "captions": captions,
    "scaling": scaling,
    "reads": reads,
}

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # torch is imported later
    for chosen in sys.argv[1:] or BENCHMARKS:
        print(f"\n## {chosen}\n")
        BENCHMARKS[chosen]()
