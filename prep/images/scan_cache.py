"""A cache of what a scan found in files, so that scanning a folder again costs one ``stat`` per unchanged file.

It can be deleted at any time: whatever is missing in it is read again, and the px layer checks the hash of every file
that it decodes. It lies below ``runs/`` of the dataset, the place for what belongs to one machine and one moment.
"""

from __future__ import annotations

import json
import os
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanodit.errors import NanoditError
from nanodit.lock import LOCK
from nanodit.storage import Storage
from prep.dataset.layout import parquet_bytes, read_parquet
from prep.images.scan import COUNTED, THREADS, Read

NAME = "runs/scan.parquet"
# A file may change twice within one tick of its file system's clock (two seconds on FAT): a younger one is read again.
SETTLED = 2.0  # seconds
SAVED_EVERY = 60.0  # seconds, while files are read
BEGUN = ("manifest.parquet", "dataset.json", LOCK)  # a place without any of them is nobody's dataset
STAMP = ("size", "mtime_ns", "ctime_ns")  # ctime too: `cp -p` keeps the time of the original, and sizes may be equal
SCHEMA = pa.schema({"name": pa.string(), **dict.fromkeys(STAMP, pa.int64()), "value": pa.string()})

MANY = 10_000  # files that are worth a pass on the nodes

Stamp = tuple[int, int, int]
ReadAhead = Callable[[Sequence[str]], Iterable[tuple[str, dict[str, Any]]]]


class ScanCache:
    """Plain values of the files of ``folder``, to be used as a context manager, which writes them at the end.

    Nothing is written where no run has begun: a plan may name any place, also a wrong one.
    ``settings`` is everything besides the file that the values depend on: with others nothing is remembered. A scan
    that is interrupted keeps what it has seen, one that is killed what it had seen a minute before.
    """

    def __init__(self, storage: Storage, folder: Path, settings: Mapping[str, Any]) -> None:
        self.storage, self.folder = storage, folder
        self._settings = json.dumps(dict(settings), sort_keys=True)
        self._start = time.time_ns()
        self._saved = time.monotonic()
        self._old = self._load()  # sorted by name
        self._stamps = np.stack([self._old[name].to_numpy() for name in STAMP], axis=1)
        self._seen = np.zeros(len(self._old), bool)  # rows that are still right
        self._forgotten = np.zeros(len(self._old), bool)
        self._new: dict[str, tuple[Stamp, str]] = {}
        self._ahead: dict[str, tuple[Stamp, str]] = {}  # what was read ahead and not yet asked for

    def _load(self) -> pa.Table:
        try:
            table = read_parquet(self.storage.read(NAME))
            if (table.schema.metadata or {}).get(b"settings") == self._settings.encode():
                return table.select(SCHEMA.names)
        except (OSError, ValueError, KeyError, pa.ArrowException):
            pass
        return SCHEMA.empty_table()

    def look_all(
        self, names: Sequence[str], read: Read, ahead: ReadAhead | None = None
    ) -> Iterator[dict[str, Any] | Exception | None]:
        """Yield for each file what ``read`` says of it, from memory for an unchanged one; None for one that is gone.

        ``read`` is called in threads. An exception that it returns is handed on and not remembered. Where ``MANY``
        files or more have to be read, ``ahead`` reads them before, on other machines say, and gives ``size_bytes`` of
        each with the rest; what it leaves out is read here.
        """
        chunks = [names[start : start + COUNTED] for start in range(0, len(names), COUNTED)]
        with ThreadPoolExecutor(max_workers=THREADS) as pool:
            stats = pool.map(self._stat, chunks)
            if ahead is not None:
                stats = list(stats)
                self._read_ahead(chunks, stats, ahead)
            for chunk, stamps in zip(chunks, stats):
                yield from self._look(chunk, stamps, read, pool)
                self._save_now_and_then()

    def _read_ahead(self, chunks: Sequence[Sequence[str]], stats: Sequence[np.ndarray], ahead: ReadAhead) -> None:
        unknown: dict[str, Stamp] = {}
        for names, stamps in zip(chunks, stats):
            _, current = self._current(names, stamps)
            for index in np.flatnonzero((stamps[:, 0] >= 0) & ~current).tolist():
                unknown[names[index]] = tuple(stamps[index].tolist())
        if len(unknown) < MANY:
            return
        for name, value in ahead(list(unknown)):
            if value["size_bytes"] == unknown[name][0]:  # else a node has another folder there, or an older one
                self._ahead[name] = unknown[name], json.dumps(value)
                if self._is_settled(unknown[name]):
                    self._new[name] = self._ahead[name]
            self._save_now_and_then()

    def _save_now_and_then(self) -> None:
        if time.monotonic() - self._saved > SAVED_EVERY:
            self._save(~self._forgotten)

    def _is_settled(self, stamp: Stamp) -> bool:
        return max(stamp[1:]) < self._start - SETTLED * 1e9

    def _current(self, names: Sequence[str], stamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where in the old table each file is, and whether it is as it was there."""
        rows = self._rows(names)
        current = (stamps[:, 0] >= 0) & (rows >= 0)
        current[current] = (self._stamps[rows[current]] == stamps[current]).all(axis=1)
        return rows, current

    def _look(
        self, names: Sequence[str], stamps: np.ndarray, read: Read, pool: ThreadPoolExecutor
    ) -> Iterator[dict[str, Any] | Exception | None]:
        there, settled = stamps[:, 0] >= 0, stamps[:, 1:].max(axis=1) < self._start - SETTLED * 1e9
        rows, current = self._current(names, stamps)
        self._seen[rows[current & settled]] = True

        def note(index: int) -> dict[str, Any] | Exception | None:
            if not there[index]:
                return None
            stamp, text = self._ahead.pop(names[index], (None, ""))
            value = json.loads(text) if stamp == tuple(stamps[index].tolist()) else read(names[index])
            if settled[index] and not isinstance(value, Exception):
                self._new[names[index]] = tuple(stamps[index].tolist()), json.dumps(value)
            return value

        others = pool.map(note, np.flatnonzero(~current).tolist())
        known = iter(json.loads(f"[{','.join(self._values(rows[current]))}]"))
        yield from (next(known) if is_known else next(others) for is_known in current.tolist())

    def _values(self, rows: np.ndarray) -> list[str]:
        if not len(rows):
            return []
        first = int(rows.min())  # a slice, because taking rows of a column in chunks may copy all of it
        column = self._old["value"].slice(first, int(rows.max()) + 1 - first).combine_chunks()
        return column.take(pa.array(rows - first)).to_pylist()

    def _stat(self, names: Sequence[str]) -> np.ndarray:
        """Return the stamps of some files, int64 (N, 3), below 0 for those that are not there."""
        stamps: list[int] = []
        for name in names:
            try:
                stat = os.stat(f"{self.folder}/{name}")
                stamps += (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            except OSError:
                stamps += (-1, -1, -1)
        return np.array(stamps, np.int64).reshape(-1, len(STAMP))

    def _rows(self, names: Sequence[str]) -> np.ndarray:
        """Return where in the old table each file is, int64 (N,), -1 for those that are not in it."""
        if not len(names):
            return np.empty(0, np.int64)
        column = self._old["name"]
        # names come in about the order of the table, so that a small part of it is looked through
        first = bisect_left(range(len(column)), min(names), key=lambda row: column[row].as_py())
        end = bisect_right(range(len(column)), max(names), key=lambda row: column[row].as_py())
        found = pc.index_in(pa.array(names, pa.string()), value_set=column.slice(first, end - first))
        found = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        return np.where(found < 0, found, found + first)

    def forget(self, name: str) -> None:
        """Forget a file, which turned out to be another one than remembered, so that it is read again."""
        self._new.pop(name, None)
        (row,) = self._rows([name])
        if row >= 0:
            self._seen[row], self._forgotten[row] = False, True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keep = self._seen if kind is None else ~self._forgotten
        if self._new or not keep.all():
            self._save(keep)

    def _save(self, keep: np.ndarray) -> None:
        """Write what is new and those rows of the old table."""
        self._saved = time.monotonic()
        if not any(map(self.storage.exists, BEGUN)):
            return
        new = dict(self._new)  # threads may go on
        rows = self._rows(list(new))
        keep = keep.copy()
        keep[rows[rows >= 0]] = False
        kept = self._old.filter(pa.array(keep)).cast(SCHEMA)
        columns = [list(new), *zip(*(stamp for stamp, _ in new.values())), [value for _, value in new.values()]]
        tables = [kept, pa.table(columns, schema=SCHEMA)] if new else [kept]
        table = pa.concat_tables(tables).sort_by("name").replace_schema_metadata({"settings": self._settings})
        with suppress(OSError, NanoditError):  # a plan can be made where nothing can be written
            self.storage.write(NAME, parquet_bytes(table))
