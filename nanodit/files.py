"""Atomic writes, hashes and canonical JSON: the small promises every file of the project is built on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from nanodit.errors import DataError


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write ``data`` so that ``path`` holds either its old content or all of the new one, whatever is killed when.

    Text is written as UTF-8. A temporary name in the same folder, fsync, ``os.replace``, fsync of the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable (a no-op where folders cannot be opened)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders; there os.replace is all there is
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_bytes(data: bytes | memoryview) -> str:
    """Return the SHA-256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raises :class:`DataError` for one that cannot be read or is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise DataError(f"{path}: not valid JSON: {error}") from None


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and a final newline: equal values, equal bytes. NaN and infinity: ValueError."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
