"""A cache of what a scan found in files, so that scanning a folder again costs one ``stat`` per unchanged file.

It can be deleted at any time: whatever is missing in it is read again, and the px layer checks the hash of every file
that it decodes. It lies below ``runs/`` of the dataset, the place for what belongs to one machine and one moment.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from nanodit.errors import NanoditError
from nanodit.lock import LOCK
from nanodit.storage import Storage
from prep.dataset.layout import parquet_bytes, read_parquet

NAME = "runs/scan.parquet"
# A file may change twice within one tick of its file system's clock (two seconds on FAT): a younger one is read again.
SETTLED = 2.0  # seconds
BEGUN = ("manifest.parquet", "dataset.json", LOCK)  # a place without any of them is nobody's dataset
STAMP = ("size", "mtime_ns", "ctime_ns")  # ctime too: `cp -p` keeps the time of the original, and sizes may be equal
SCHEMA = pa.schema({"name": pa.string(), **dict.fromkeys(STAMP, pa.int64()), "value": pa.string()})

Stamp = tuple[int, int, int]


class ScanCache:
    """One plain value per file of ``folder``, to be used as a context manager, which writes them at the end.

    Nothing is written where no run has begun: a plan may name any place, also a wrong one.
    ``settings`` is everything besides the file that the values depend on: with others nothing is remembered. An
    interrupted scan keeps what it has seen. Safe for several threads.
    """

    def __init__(self, storage: Storage, folder: Path, settings: Mapping[str, Any]) -> None:
        self.storage, self.folder = storage, folder
        self._settings = json.dumps(dict(settings), sort_keys=True)
        self._start = time.time_ns()
        self._old = self._load()
        self._stored = dict(self._old)
        self._new: dict[str, tuple[Stamp, str]] = {}

    def _load(self) -> dict[str, tuple[Stamp, str]]:
        try:
            table = read_parquet(self.storage.read(NAME))
            if (table.schema.metadata or {}).get(b"settings") != self._settings.encode():
                return {}
            columns = [table[column].to_pylist() for column in SCHEMA.names]
        except (OSError, KeyError, pa.ArrowException):
            return {}
        return {name: (tuple(stamp), value) for name, *stamp, value in zip(*columns)}

    def look(self, name: str, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what ``read`` says of the file, from memory for an unchanged one. Raises what ``read`` raises."""
        try:
            stat = os.stat(self.folder / name)
        except OSError:
            return read()
        stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        known = self._old.get(name)
        if known is None or known[0] != stamp:
            known = stamp, json.dumps(read())
        if max(stamp[1:]) < self._start - SETTLED * 1e9:
            self._new[name] = known
        return json.loads(known[1])

    def forget(self, name: str) -> None:
        """Forget a file, which turned out to be another one than remembered, so that it is read again."""
        self._old.pop(name, None)
        self._new.pop(name, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entries = self._new if kind is None else self._old | self._new
        if entries == self._stored or not any(map(self.storage.exists, BEGUN)):
            return
        rows = [dict(zip(SCHEMA.names, (name, *stamp, value))) for name, (stamp, value) in sorted(entries.items())]
        schema = SCHEMA.with_metadata({"settings": self._settings})
        with suppress(OSError, NanoditError):  # a plan can be made where nothing can be written
            self.storage.write(NAME, parquet_bytes(pa.Table.from_pylist(rows, schema=schema)))
