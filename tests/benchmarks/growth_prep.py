"""How `prep plan`, `prep run` and the publication grow with the number of samples, where no layer is computed.

    python -m tests.benchmarks.growth_prep --rows 64000 256000 1000000 [--only plan,nothing,publish] [--folder DIR]

Prints seconds of the clock and of the processors, and peak GB, each in a process of its own: ``publish`` of a dataset
whose units are all committed (without class tokens), ``plan`` (`prep plan` with nothing new) and ``nothing`` (`prep
run` with nothing to do), both with the start of Python. What is made up: every picture and every sidecar is a hard
link to one of a few files, and what a scan would have found in them (keys, sizes, hashes) is written to the scan's
memory; parts have random hashes, thumbnails and offsets; tars are empty. Everything that is timed lists, stats, reads
and writes real files. A folder that is given is kept, and used again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from nanodit.lock import LOCK
from prep.config import PrepConfig
from prep.dataset.layout import SCHEMA_VERSION, Unit, part_schema
from prep.images.scan_cache import NAME, SCHEMA
from prep.passes import plan as planning
from prep.passes.plan import Plan, make_plan, write_manifest
from prep.passes.publish import publish
from prep.run import current_parts

PHASES = ("publish", "plan", "nothing")
PER_FOLDER = 10_000
PER_INODE = 30_000  # links to one file; ext4 allows 65,000
SIDES = ((96, 64), (64, 64), (64, 96), (72, 64), (64, 80))  # of the pictures, in turn
TAR_BYTES = 10_240
CAPTION = "Picture {} shows a person in a red jumper and blue trousers who stands in front of a grey wall."


def overrides(folder: Path) -> dict[str, str]:
    return {"source": str(folder / "source"), "output": str(folder / "out"), "base": "64", "encoders": "demo"}


def config(folder: Path) -> PrepConfig:
    return PrepConfig(**overrides(folder) | {"base": 64})


def make(folder: Path, rows: int) -> None:
    """Write the links, the scan's memory, the manifest and all units."""
    (folder / "out" / "runs").mkdir(parents=True)
    (folder / "out" / LOCK).write_text("")
    settings = config(folder)
    link_sources(folder, rows)
    write_memory(folder, rows, settings)
    plan = make_plan(settings)
    assert len(plan.sources) == rows
    write_manifest(plan)
    for number, unit in enumerate(plan.recipes):
        write_unit(folder / "out", plan, unit, number)


def name_of(number: int) -> str:
    return f"{number // PER_FOLDER:04d}/{number:07d}"


def link_sources(folder: Path, rows: int) -> None:
    originals = folder / "originals"
    originals.mkdir()
    for number in range(rows):
        if number % PER_INODE == 0:
            Image.new("RGB", (64, 64)).save(picture := originals / f"{number}.png")
            (text := originals / f"{number}.txt").write_text("Made up.")
        if number % PER_FOLDER == 0:
            (folder / "source" / name_of(number)).parent.mkdir(parents=True)
        path = f"{folder}/source/{name_of(number)}"
        os.link(picture, f"{path}.png")
        os.link(text, f"{path}.txt")


def write_memory(folder: Path, rows: int, settings: PrepConfig) -> None:
    """Write what a scan of the links would remember if each were a picture of its own."""
    time.sleep(2.5)  # younger files are not remembered
    found: list[tuple[str, tuple[int, int, int], str]] = []
    for number in range(rows):
        if number % PER_INODE == 0:
            stats = [os.stat(folder / "originals" / f"{number}.{suffix}") for suffix in ("png", "txt")]
            stamps = [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]
        digest = hashlib.sha256(b"%d" % number).hexdigest()
        width, height = SIDES[number % len(SIDES)]
        picture = {"key": digest[:32], "size_bytes": 100_000, "width": width, "height": height}
        found.append((f"{name_of(number)}.png", stamps[0], json.dumps(picture)))
        found.append((f"{name_of(number)}.txt", stamps[1], json.dumps({"fingerprint": digest})))
    names, stamps, values = zip(*sorted(found))
    schema = SCHEMA.with_metadata({"settings": json.dumps(planning.scan_settings(settings), sort_keys=True)})
    pq.write_table(pa.table([names, *zip(*stamps), values], schema=schema), folder / "out" / NAME, compression="zstd")


def write_unit(root: Path, plan: Plan, unit: Unit, number: int) -> None:
    """Write a part with one row per sample, and an empty tar."""
    keys, recipe = plan.shards[unit.bucket, unit.shard], plan.recipes[unit]
    schema, random = part_schema(unit.layer, recipe), np.random.default_rng(number)
    columns: list[Any] = []
    for field in schema:
        if field.name == "key":
            values = keys
        elif field.name == "caption":
            values = [CAPTION.format(key[:6]) for key in keys]
        elif field.type == pa.binary():
            values = [random.bytes(768) for _ in keys]
        elif field.type == pa.string():
            size = 8 if field.name == "phash" else 32
            values = [random.bytes(size).hex() for _ in keys]
        elif field.type == pa.bool_():
            values = [False] * len(keys)
        else:
            values = random.integers(1, 1000, len(keys)).astype(field.type.to_pandas_dtype())
        columns.append(pa.array(values, field.type))
    record = {"schema": SCHEMA_VERSION, "bucket": unit.bucket, "shard": unit.shard, "layer": unit.layer}
    record |= {"recipe": recipe, "facts": {}, "tar_bytes": TAR_BYTES, "tar_sha256": f"{number:064x}", "rejects": []}
    table = pa.table(columns, schema=schema.with_metadata({"nanodit": json.dumps(record, sort_keys=True)}))
    for path in (root / unit.part, root / unit.tar):
        path.parent.mkdir(exist_ok=True)
    pq.write_table(table, root / unit.part, compression="zstd")
    with open(root / unit.tar, "wb") as file:
        file.truncate(TAR_BYTES)


def publish_only(folder: Path) -> tuple[float, float]:
    """Publish, and return the seconds that it took beside planning, of the clock and of the processors."""
    plan = make_plan(config(folder))
    assert not plan.missing, plan.explain()
    parts, start, worked = current_parts(plan), time.perf_counter(), time.process_time()
    publish(plan, parts, "runs/0001/rejects.parquet")
    return time.perf_counter() - start, time.process_time() - worked


def measured(arguments: list[str]) -> tuple[float, float, float, str]:
    """Run a child; its seconds of the clock and of the processors, its peak GB and what it printed."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen([sys.executable, "-m", *arguments], stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read()
    if child.returncode:
        raise SystemExit(said)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6, said


def phase(name: str, folder: Path) -> tuple[float, float, float]:
    given = [f"{key}={value}" for key, value in overrides(folder).items()]
    if name == "publish":
        *_, memory, said = measured(["tests.benchmarks.growth_prep", "--child", "publish", "--folder", str(folder)])
        seconds, worked = map(float, said.split()[-2:])
        return seconds, worked, memory
    *numbers, said = measured(["prep", "plan" if name == "plan" else "run", *given])
    assert "nothing to compute" in said, said
    return tuple(numbers)


def grow(folder: Path, rows: int, phases: list[str]) -> None:
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        seconds, _, memory, _ = measured(
            ["tests.benchmarks.growth_prep", "--child", "make", "--rows", str(rows), "--folder", str(folder)]
        )
        (folder / "made").write_text("")
        print(f"made {rows} samples in {seconds:.0f} s, {memory:.1f} GB", flush=True)
    for name in phases:
        seconds, worked, memory = phase(name, folder)
        print(f"{rows:>9}  {name:<8}{seconds:>8.1f} s{worked:>8.1f} s of processors{memory:>7.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[64_000])
    parser.add_argument("--only", default=",".join(PHASES), help="some of %(default)s")
    parser.add_argument("--folder", type=Path, help="where the samples are made, and stay")
    parser.add_argument("--child", choices=["make", "publish"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "make":
        make(options.folder, options.rows[0])
    elif options.child == "publish":
        print(*publish_only(options.folder))
    else:
        chosen = options.only.split(",")
        phases = [name for name in PHASES if name in chosen]  # a folder that is kept may be published already
        for rows in options.rows:
            if options.folder:
                grow(options.folder / str(rows), rows, phases)
                continue
            with tempfile.TemporaryDirectory() as folder:
                grow(Path(folder, "made_up"), rows, phases)


if __name__ == "__main__":
    main()
