"""One ``prep run`` at a time per dataset: a lock that goes with its process, however that ends.

A folder has ``flock``, which the system releases. An object store has nothing alike: there the lock is an object that
its owner rewrites every few seconds, and a newcomer watches it for longer than that. The owner is alive if the object
changes - no clocks of two machines are compared.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanodit.console import Progress, repeating, say
from nanodit.errors import ConfigError, ResourceError
from nanodit.files import no_link
from nanodit.posix import fcntl
from nanodit.storage import LocalFolder, ObjectStore, Storage, open_storage

LOCK = "runs/.lock"
BEAT = 10.0  # seconds between two signs of life of the owner
WATCH = 35.0  # seconds without one after which the owner is taken for dead: three beats, and time for a slow store


class Lock:
    """A held lock."""

    def check(self) -> None:
        """Raise ConfigError when somebody else has taken the lock meanwhile; to be called before publishing."""


@contextmanager
def locked(place: str | Path | Storage) -> Iterator[Lock]:
    """Hold the dataset's lock. Raises ConfigError when somebody has it, ResourceError when nothing can be written."""
    storage = open_storage(place)
    with _folder_lock(storage) if isinstance(storage, LocalFolder) else _object_lock(storage) as lock:
        yield lock


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _refusal(storage: Storage, owner: str) -> ConfigError:
    return ConfigError(f"{storage} is being written by another prep run ({owner or 'unknown'}). Wait for it to end")


@contextmanager
def _folder_lock(storage: LocalFolder) -> Iterator[Lock]:
    path = storage.root / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8", opener=no_link)  # noqa: SIM115 - closed below
    except OSError as error:
        raise ResourceError(f"output {storage} cannot be written: {error.strerror}. Choose another output") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise _refusal(storage, file.read().strip()) from None
        file.truncate(0)
        file.write(f"{_me()}\n")
        file.flush()
        yield Lock()


class ObjectLock(Lock):
    """The lock of an object store: ``runs/.lock`` holds its owner, a token of this lock, and a counter that beats."""

    def __init__(self, storage: ObjectStore) -> None:
        self.storage, self.token, self.beats = storage, uuid.uuid4().hex, 0
        self.taken_by = ""

    def acquire(self) -> None:
        """Create the object, or take it over from an owner that no longer changes it."""
        while not self.storage.create(LOCK, self._content()):
            seen = self._look()
            if seen and self._is_alive(seen):
                raise _refusal(self.storage, _owner(seen))
            if seen and self._look() == seen:  # still the dead one's, not that of a third run that was faster
                say(f"taking over the lock of {_owner(seen)}, which showed no sign of life for {WATCH:.0f} s")
                self.storage.delete(LOCK)

    def release(self) -> None:
        """Remove the object, if it is still ours."""
        if not self._stolen():
            self.storage.delete(LOCK)

    def check(self) -> None:
        if self._stolen():
            raise ConfigError(
                f"{self.storage} was taken over by another prep run ({self.taken_by}) while this one showed no sign of "
                "life. Wait for it to end; everything that was committed is kept"
            )

    def _content(self) -> bytes:
        return json.dumps({"owner": _me(), "token": self.token, "beat": self.beats}).encode()

    def _look(self) -> bytes:
        try:
            return self.storage.read(LOCK)
        except FileNotFoundError:
            return b""

    def _is_alive(self, seen: bytes) -> bool:
        """Return whether the lock changes, rather than goes or stands still, while it is watched."""
        say(f"{self.storage} is locked by {_owner(seen)}: watching for {WATCH:.0f} s to see whether it is alive")
        start = time.monotonic()
        with Progress("lock", round(WATCH), "seconds") as progress:
            while (passed := time.monotonic() - start) < WATCH:
                time.sleep(min(1.0, WATCH / 10))
                progress.update(round(passed))
                if now := self._look():
                    if now != seen:
                        return True
                else:
                    return False
        return False

    def _stolen(self) -> bool:
        if not self.taken_by:
            content = self._look()
            if content and _field(content, "token") != self.token:
                self.taken_by = _owner(content)
        return bool(self.taken_by)

    def beat(self) -> None:
        """Show a sign of life, as long as nobody else has taken the lock."""
        if self.taken_by:  # which was said
            return
        try:
            if self._stolen():
                say(f"warning: {self.taken_by} has taken over the lock of {self.storage}; this run will not publish")
                return
            self.beats += 1
            self.storage.write(LOCK, self._content())
        except (OSError, ResourceError) as error:  # the next beat may get through
            say(f"warning: the lock could not be renewed: {error}")


@contextmanager
def _object_lock(storage: Storage) -> Iterator[Lock]:
    assert isinstance(storage, ObjectStore)
    lock = ObjectLock(storage)
    lock.acquire()
    try:
        with repeating(lock.beat, BEAT, "lock"):
            yield lock
    finally:
        lock.release()


def _field(content: bytes, name: str) -> str:
    try:
        return str(json.loads(content)[name])
    except (ValueError, KeyError, TypeError):  # not ours; it still is a lock
        return ""


def _owner(content: bytes) -> str:
    return _field(content, "owner") or "unknown"
