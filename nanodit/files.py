"""Atomic writes, hashes and canonical JSON: the small promises every file of the project is built on."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanodit.errors import ConfigError, DataError


def temporary_beside(path: Path) -> Path:
    """Return a name in the folder of ``path`` that nobody can foresee, ``.NAME.tmp-RANDOM-PROCESS``, for its content.

    To be opened so that it must not exist ("x"): where others may write, too, a link of theirs could lie there.
    """
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}-{os.getpid()}")


def no_link(name: str, flags: int) -> int:
    """Open for :func:`open`, as its ``opener``, refusing a symbolic link, whose target is another's file."""
    return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


@contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Let an OSError, which names no file where writing or closing one failed, name ``path``."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def check_writable(path: Path | str, option: str = "--output", folder: bool = False) -> None:
    """Raise :class:`ConfigError` where nothing can be written at ``path``, before the work for it begins.

    ``folder`` says that a folder is to stand there, not a file. Nothing is created.
    """
    path = Path(path)
    if path.is_dir() and not folder:
        raise ConfigError(f"{option} {path}: is a folder; name a file")
    if path.exists() and folder and not path.is_dir():
        raise ConfigError(f"{option} {path}: is a file; name a folder")
    above = path if folder else path.parent
    while not os.path.lexists(above) and above != above.parent:  # the root may be a drive that is absent
        above = above.parent
    if not above.is_dir():
        raise ConfigError(f"{option} {path}: {above} is not a folder. Choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{option} {path}: {above} may not be written. Choose another place, or change its permissions"
        )


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write ``data`` so that ``path`` holds either its old content or all of the new one, whatever is killed when.

    Text is written as UTF-8. A temporary name in the same folder, fsync, ``os.replace``, fsync of the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    file = open(temporary, "xb")  # noqa: SIM115 - closed below; before the try: what lies there already is not ours
    try:
        with named(path), file:
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
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or JSON in JSON in JSON
        raise DataError(f"{path}: not valid JSON: {error}") from None


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and a final newline: equal values, equal bytes. NaN and infinity: ValueError."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
