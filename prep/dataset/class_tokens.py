"""Reading the DINO class tokens of many samples: each tar is opened once, and nothing else in it is read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanodit.console import Progress
from nanodit.errors import DataError
from nanodit.storage import Storage
from prep.dataset.codecs import load_npy
from prep.dataset.layout import Unit, checked
from prep.dataset.versions import REQUESTS

PLACE = ("bucket", "shard", "key", *(f"dino/cls.npy/{name}" for name in ("offset", "length", "sha256")))
AHEAD = 4 * REQUESTS  # shards that are read before they are asked for


def reading_order(index: pa.Table) -> np.ndarray:
    """Return the rows of an index as their class tokens lie in the tars, int64 (N,)."""
    by = [(name, "ascending") for name in PLACE[:3]]
    return pc.sort_indices(index, sort_keys=by).to_numpy().astype(np.int64)


def class_tokens(storage: Storage, index: pa.Table, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the class tokens of some rows of an index, float32 (n, width), shard by shard while the rows stay in one.

    Each is checked by its hash. Raises DataError naming the tar and the sample.
    """
    if not len(rows):
        return
    places = index.select(PLACE).take(rows)
    shards = [places[name].to_numpy(zero_copy_only=False) for name in ("bucket", "shard")]
    ends = np.flatnonzero((shards[0][1:] != shards[0][:-1]) | (shards[1][1:] != shards[1][:-1])) + 1
    read = partial(_tokens, storage)
    with Progress("class tokens", len(rows)) as progress, ThreadPoolExecutor(max_workers=REQUESTS) as pool:
        waiting = []
        for start, end in pairwise([0, *ends.tolist(), len(rows)]):
            waiting.append(pool.submit(read, places.slice(start, end - start)))
            if len(waiting) > AHEAD:
                yield _next(waiting, progress)
        while waiting:
            yield _next(waiting, progress)


def _next(waiting: list, progress: Progress) -> np.ndarray:
    tokens = waiting.pop(0).result()
    progress.advance(len(tokens))
    return tokens


def _tokens(storage: Storage, places: pa.Table) -> np.ndarray:
    """Return the class tokens of some samples of one shard."""
    buckets, shards, keys, offsets, lengths, hashes = (places[name].to_pylist() for name in PLACE)
    unit = Unit(buckets[0], shards[0], "dino")
    try:
        members = storage.read_ranges(unit.tar, list(zip(offsets, lengths)))
    except OSError as error:
        where = f"{unit.tar}, sample {keys[0]}, member cls.npy"
        raise DataError(f"{where}: {error.strerror}. Run nanodit prep run again to restore the shard.") from error
    for key, data, length, sha256 in zip(keys, members, lengths, hashes):
        checked(data, unit, key, "cls.npy", length, sha256)
    first = _array(unit, keys[0], members[0])
    header = members[0][: len(members[0]) - first.nbytes]
    if first.dtype == np.float32 and all(len(data) == len(members[0]) and data.startswith(header) for data in members):
        return np.frombuffer(b"".join(members), np.uint8).reshape(len(members), -1)[:, len(header) :].view("<f4")
    return np.stack([_array(unit, key, data, first.shape) for key, data in zip(keys, members)])


def _array(unit: Unit, key: str, data: bytes, shape: tuple[int, ...] | None = None) -> np.ndarray:
    try:
        array = load_npy(data)
        if shape not in (None, array.shape):
            raise ValueError(f"is {array.shape}, and others {shape}")
    except ValueError as error:
        raise DataError(f"{unit.tar}, sample {key}, member cls.npy: {error}. Run nanodit prep verify.") from error
    return array
