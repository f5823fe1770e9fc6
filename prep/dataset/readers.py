"""Who reads a dataset: advisory records in ``readers/``, for whoever wants to drop a version.

A record says host, process, run, version and when its writer was last seen. Nothing depends on it: where a reader may
not write, there is none, and one of a killed reader stays until its version is dropped.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nanodit.errors import NanoditError
from nanodit.files import canonical_json
from nanodit.storage import Storage
from prep.dataset.reader import Dataset

FOLDER = "readers/"
BEAT = 60.0  # seconds between two signs of life
SILENT = 3 * BEAT  # seconds without one after which a reader is taken for gone
LEAVE = 5.0  # seconds that storage which hangs may take at the end


@dataclass(frozen=True)
class Reader:
    """A process that reads a version: ``seen`` is when it said so last, in seconds of Unix time by its own clock."""

    host: str
    pid: int
    run: str
    version: str
    seen: float

    def state(self, now: float) -> str:
        """Say whether it lives, as far as that can be known from here."""
        if self.host == socket.gethostname() and not Path(f"/proc/{self.pid}").exists() and Path("/proc/self").exists():
            return "gone"
        return "lives" if now - self.seen < SILENT else "silent"


@contextmanager
def reading(dataset: Dataset, run: Path | str) -> Iterator[None]:
    """While this is open, a record says that a run reads the dataset's version; a thread writes it, nobody waits."""
    host, over = socket.gethostname(), threading.Event()
    name = f"{FOLDER}{re.sub(r'[^A-Za-z0-9.-]', '_', host)}-{os.getpid()}-{dataset.fingerprint[:8]}.json"

    def record() -> None:
        with suppress(OSError, NanoditError):  # a read-only dataset, or one whose place went away
            while True:
                reader = Reader(host, os.getpid(), str(Path(run).absolute()), dataset.fingerprint, time.time())
                dataset.storage.write(name, canonical_json(asdict(reader)))
                if over.wait(BEAT):
                    break
        with suppress(OSError, NanoditError):
            dataset.storage.delete(name)

    thread = threading.Thread(target=record, daemon=True, name="reader")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LEAVE)


def read_readers(storage: Storage) -> dict[str, Reader]:
    """Return all records by the name of their file; what is none is left out."""
    readers = {}
    for name in storage.names(FOLDER):
        with suppress(ValueError, TypeError, KeyError, OverflowError, OSError, NanoditError):
            fields = json.loads(storage.read(name))
            kinds = {"host": str, "pid": int, "run": str, "version": str, "seen": float}
            reader = Reader(**{field: kind(fields[field]) for field, kind in kinds.items()})
            if math.isfinite(reader.seen):
                readers[name] = reader
    return readers
