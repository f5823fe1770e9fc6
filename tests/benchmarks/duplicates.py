"""What near duplicates by class tokens cost: all at once, a few new among many known, nothing new.

    python -m tests.benchmarks.duplicates [--rows 64000 256000 1000000] [--new 10000] [--width 1024] [--shared .5]
        [--all 64000] [--folder FOLDER]

Writes features of a falling spectrum to FOLDER (a temporary one), ``--shared`` of their squared length a mean that all
have, with near copies among the new ones. Prints seconds, those that cores worked, and GB (the process's largest
resident memory, its own 0.2 GB and what it maps of the features included) of `prep/images/compared.py`: of everything
that `prep run` does about class tokens but reading the new ones from their tars. All at once is measured for up to
``--all`` rows.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanodit.files import sha256_bytes
from nanodit.storage import open_storage
from prep.dataset.codecs import npy_bytes
from prep.images.compared import FOLDER, SCHEMA, Record, compared

BLOCK, COPIES, THRESHOLD = 4096, 100, 0.98
FILES = ("known.npy", "new.npy")


def features(rows: int, width: int, shared: float) -> Iterator[np.ndarray]:
    """Yield float32 (n, width); the last ``COPIES`` rows are near copies of the first."""
    generator = np.random.default_rng(0)
    spectrum = np.sqrt(1 / np.arange(1, width + 1, dtype=np.float32))
    spectrum *= np.sqrt((1 - shared) / np.sum(spectrum**2))
    mean = generator.standard_normal(width, dtype=np.float32)
    mean *= np.sqrt(shared) / np.linalg.norm(mean)
    first = None
    for start in range(0, rows, BLOCK):
        block = generator.standard_normal((min(BLOCK, rows - start), width), dtype=np.float32) * spectrum + mean
        first = block[:COPIES].copy() if first is None else first
        for row in range(max(start, rows - COPIES), start + len(block)):
            noise = 0.1 * generator.standard_normal(width, dtype=np.float32) * spectrum
            block[row - start] = first[row - rows + COPIES] + noise
        yield block


def write(folder: Path, rows: int, new: int, width: int, shared: float) -> None:
    """Write arrays of the features that are known and new, and a table of keys and hashes."""
    folder.mkdir()
    header = hashlib.sha256(npy_bytes(np.zeros(width, np.float32))[: -4 * width])
    hashes, start = [], 0
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / name, "wb")) for name in FILES]
        for file, count in zip(files, (rows - new, new)):
            shape = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
            np.lib.format.write_array_header_1_0(file, shape)
        for block in features(rows, width, shared):
            known = max(0, min(len(block), rows - new - start))
            files[0].write(block[:known])
            files[1].write(block[known:])
            for row in block:
                content = header.copy()
                content.update(row)
                hashes.append(content.hexdigest())
            start += len(block)
    keys = [sha256_bytes(str(row).encode())[:32] for row in range(rows)]
    pq.write_table(pa.table({"key": keys, "sha256": hashes}), folder / "rows.parquet")


def know(folder: Path, known: int) -> None:
    """Write down what a run would have that found no duplicates among the first rows."""
    (folder / "out" / FOLDER).mkdir(parents=True)
    name = f"{FOLDER}000001.npy"
    os.link(folder / FILES[0], folder / "out" / name)
    table = pq.read_table(folder / "rows.parquet").slice(0, known)
    for column in ("place", "group"):
        table = table.append_column(column, pa.array(np.arange(known)))
    Record(THRESHOLD, files=[(name, known)], table=table.cast(SCHEMA)).save(open_storage(folder / "out"))


def measure(folder: Path, groups: int, results: multiprocessing.Queue) -> None:
    """Compare what is not known; reports seconds, those of its cores, and the largest resident memory in GB."""
    known, new = (np.load(folder / name, mmap_mode="r") for name in FILES)
    table = pq.read_table(folder / "rows.parquet")
    keys, hashes = (table[name].combine_chunks() for name in ("key", "sha256"))

    def read(rows: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(rows), BLOCK):
            some = rows[start : start + BLOCK]
            yield np.concatenate([known[some[some < len(known)]], new[some[some >= len(known)] - len(known)]])

    start, started = time.perf_counter(), time.process_time()
    with compared(open_storage(folder / "out"), keys, hashes, read, THRESHOLD, write=True) as alike:
        seconds, cores = time.perf_counter() - start, time.process_time() - started
        found = len(np.unique(alike.labels))
    assert found == groups, f"{found} groups instead of {groups}"
    results.put((seconds, cores, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def in_a_process(work, *arguments) -> tuple[float, float, float]:
    """Run ``measure`` on its own, so that memory is its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=work, args=(*arguments, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)
    return results.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[64_000, 256_000, 1_000_000])
    parser.add_argument("--new", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--shared", type=float, default=0.5)
    parser.add_argument("--all", type=int, default=64_000)
    parser.add_argument("--folder")
    options = parser.parse_args()
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as place:
            folder = Path(place) / "data"
            write(folder, rows, options.new, options.width, options.shared)
            if rows <= options.all:
                print_case(rows, "all new", *in_a_process(measure, folder, rows - COPIES))
                shutil.rmtree(folder / "out")
            know(folder, rows - options.new)
            for case in (f"{options.new} new", "nothing new"):
                print_case(rows, case, *in_a_process(measure, folder, rows - COPIES))


def print_case(rows: int, case: str, seconds: float, cores: float, memory: float) -> None:
    """Print one line."""
    print(f"{rows:>9} rows, {case:<12}{seconds:>8.1f} s {cores:>8.1f} s of cores {memory:>6.2f} GB", flush=True)


if __name__ == "__main__":
    main()
