"""``prep versions``: which versions of a dataset can be read, what they take, who reads them; and dropping some."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanodit.console import data_size, duration, say
from nanodit.errors import PROBLEM_BREAK, ConfigError, DataError
from nanodit.lock import locked
from nanodit.storage import Storage, open_storage
from prep.dataset import readers, versions

AGE = re.compile(r"(\d+)d")
SHORT = 16  # digits of a fingerprint that are shown; any beginning of one that is not ambiguous names it
DAY = 86400


@dataclass(frozen=True)
class Version:
    """One version: when it was published (Unix time, where a run's log says so), and the bytes kept for it.

    ``alone`` are those that no other version needs, which dropping it frees. ``info`` is None where it is damaged.
    """

    fingerprint: str
    info: Mapping[str, Any] | None
    newest: bool
    time: float | None
    kept: int
    alone: int

    @property
    def name(self) -> str:
        """The fingerprint, as far as it is shown."""
        return self.fingerprint[:SHORT]


def show_versions(dataset: str, drop: str | None = None, older_than: str | None = None, yes: bool = False) -> None:
    """Print the versions of a dataset and their readers; drop one, by its fingerprint, or those that are old.

    ``older_than`` is a number of days, ``30d``: since the publication, as the logs of the runs say. Without ``yes`` the
    user is asked first. Raises ConfigError for a version that is not there, or that is the newest, and where nobody
    can be asked; DataError for what is no dataset.
    """
    storage = open_storage(dataset)
    found = list_versions(storage)
    if not found:
        raise DataError(f"{storage} holds no published version of a dataset. Run: nanodit prep run")
    for line in [*table(found), *reader_lines(storage, found)]:
        say(line)
    if drop is None and older_than is None:
        return
    chosen = [_named(found, drop)] if drop is not None else _older(found, _days(older_than))
    if not chosen:
        say("no version is to be dropped")
        return
    freed = sum(_bytes(storage, _only_of(storage, found, chosen)).values())
    names = ", ".join(version.name for version in chosen)
    say(f"to be dropped: {names}, {data_size(freed)}. Runs that read them end, and cannot be continued on them")
    if not yes and not _confirmed():
        raise ConfigError(f"{storage}: nothing was dropped. Add --yes to drop {names}")
    with locked(storage):
        for version in chosen:
            storage.delete(versions.kept_description(version.fingerprint))
        versions.collect_garbage(storage)
        for name, reader in readers.read_readers(storage).items():
            if reader.version in {version.fingerprint for version in chosen}:
                storage.delete(name)
    say(f"dropped {names} of {storage}")


def list_versions(storage: Storage) -> list[Version]:
    """Return the newest version and those that are kept, the newest first and then by their time."""
    newest = versions.published(storage)
    kept = versions.kept_versions(storage)
    times = published_times(storage)
    named = {name: versions.files_of(storage, name, info) for name, info in kept.items() if info}
    users = Counter(file for files in named.values() for file in files)
    sizes = _bytes(storage, set(users))
    found = []
    for name in dict.fromkeys([*([newest["fingerprint"]] if newest else []), *kept]):
        files = named.get(name, set())
        alone = sum(sizes.get(file, 0) for file in files if users[file] == 1)
        is_newest = newest is not None and name == newest["fingerprint"]
        info = newest if is_newest else kept[name]
        held = sum(sizes.get(file, 0) for file in files)
        found.append(Version(name, info, is_newest, times.get(name), held, alone))
    return sorted(found, key=lambda version: (not version.newest, -(version.time or 0), version.fingerprint))


def _bytes(storage: Storage, files: set[str]) -> dict[str, int]:
    """Return the room that files of ``kept/`` take; none where they share it with a file that is in use."""
    sizes = {}
    for name in files & set(storage.names(versions.FOLDER)):
        shared = storage.is_local and Path(storage.where(name)).stat().st_nlink > 1
        sizes[name] = 0 if shared else storage.size(name) or 0
    return sizes


def _only_of(storage: Storage, found: list[Version], chosen: list[Version]) -> set[str]:
    files: dict[bool, set[str]] = {True: set(), False: set()}
    for version in found:
        if version.info and versions.is_kept(storage, version.fingerprint):  # of the newest nothing need be
            files[version in chosen] |= versions.files_of(storage, version.fingerprint, version.info)
    return files[True] - files[False]


def published_times(storage: Storage) -> dict[str, float]:
    """Return when each version was published last, as the logs of the runs say."""
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for name in storage.names("runs/"):
        if not name.endswith("/log.jsonl"):
            continue
        for line in storage.read(name).decode("utf-8", "replace").splitlines():
            with suppress(ValueError, TypeError, KeyError, OverflowError, OSError):  # the last line of a killed run
                event = json.loads(line)
                if event["event"] == "done" and "fingerprint" in event:
                    datetime.fromtimestamp(event["time"], UTC)  # it is one
                    first.setdefault(event["fingerprint"], event["time"])  # of a run that was killed before it said so
                    if "dataset.json" in event["changed"]:
                        last[event["fingerprint"]] = event["time"]
    return first | last


def table(found: list[Version]) -> list[str]:
    """Write versions as lines."""
    rows = [("version", "published", "samples", "train", "kept", "dropping frees")]
    for version in found:
        counts = (version.info or {}).get("counts", {})
        when = "unknown" if version.time is None else f"{datetime.fromtimestamp(version.time, UTC):%Y-%m-%d %H:%M} UTC"
        held = ("the newest", "") if version.newest else (data_size(version.kept), data_size(version.alone))
        if version.info is None:
            held = ("damaged", "")
        rows.append((version.name, when, str(counts.get("samples", "?")), str(counts.get("train", "?")), *held))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def reader_lines(storage: Storage, found: list[Version]) -> list[str]:
    """Write who says to read which version."""
    now, known = time.time(), {version.fingerprint: version.name for version in found}
    lines = []
    for reader in readers.read_readers(storage).values():
        what = known.get(reader.version, f"{reader.version[:SHORT]}, which is not there")
        ago = duration(max(0.0, now - reader.seen))
        lines.append(
            f"reader {reader.run} (process {reader.pid} on {reader.host}): version {what}; {reader.state(now)}, last "
            f"seen {ago} ago"
        )
    return lines or ["no reader has left a record; one that may not write here leaves none"]


def _named(found: list[Version], text: str) -> Version:
    matches = [version for version in found if text and version.fingerprint.startswith(text.lower())]
    if len(matches) != 1:
        names = PROBLEM_BREAK.join(version.fingerprint for version in found)
        problem = "several versions begin so" if matches else "there is no such version"
        raise ConfigError(f"--drop {text}: {problem}. There are:{PROBLEM_BREAK}{names}")
    if matches[0].newest:
        raise ConfigError(f"--drop {text}: that is the newest version, which stays. Name an earlier one")
    return matches[0]


def _older(found: list[Version], days: int) -> list[Version]:
    before = time.time() - days * DAY
    return [version for version in found if not version.newest and version.time is not None and version.time < before]


def _days(text: str | None) -> int:
    match = AGE.fullmatch(text or "")
    if match is None:
        raise ConfigError(f"--older-than {text}: not a number of days, such as 30d")
    return int(match[1])


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        return False
    try:
        return input("drop? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        return False
