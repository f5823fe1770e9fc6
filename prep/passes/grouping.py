"""``split.group_by``: which samples a person wants on one side of the split, besides near duplicates.

Pictures of one person, place or shoot tell of each other, whatever they look like. A group is named by the folder, a
part of the file's name, a column of a table, or by when and with which camera it was taken.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath

from nanodit.console import say
from nanodit.errors import ConfigError
from nanodit.files import sha256_file
from prep.config import PrepConfig, SplitConfig
from prep.images.sources import Source, read_taken

THREADS = 8
FILE_NAME = "file_name"


def name_groups(config: PrepConfig, names: Mapping[str, str]) -> dict[str, str] | None:
    """Map keys to the name of their group, those that have one; None without ``split.group_by``.

    ``names`` maps keys to the file's name below the source. Says how many have no date. Raises
    ConfigError for a table that cannot be used, and where not a single image has a group.
    """
    rule = config.split
    if rule.group_by is None:
        return None
    if rule.group_by == "date":
        groups = _by_date(Path(config.source), names, timedelta(minutes=rule.minutes or 0))
    else:
        name_of = _namer(rule)
        groups = {key: group for key, name in names.items() if (group := name_of(name))}
    if not groups and names:
        lacks = "an EXIF date" if rule.group_by == "date" else "a group"
        raise ConfigError(
            f"split.group_by is {rule.group_by}, but none of {len(names)} images has {lacks}, not even "
            f"{next(iter(names.values()))}. Change split, or leave group_by null"
        )
    if rule.group_by == "date":
        for line in _lone(rule, names, groups):
            say(f"warning: {line}")
    return groups


def group_remarks(config: PrepConfig, sources: Mapping[str, Source]) -> list[str]:
    """Return what :func:`name_groups` cannot group, before anything is computed; not of dates, which take all files.

    A published sample stays on its side, so a wrong pattern has to show before.
    """
    if config.split.group_by in (None, "date"):
        return []
    names = {key: source.name for key, source in sources.items()}
    return _lone(config.split, names, name_groups(config, names) or {})


def _lone(rule: SplitConfig, names: Mapping[str, str], groups: Mapping[str, str]) -> list[str]:
    lone = [name for key, name in names.items() if key not in groups]
    if not lone:
        return []
    lacks = "date (or their file is gone)" if rule.group_by == "date" else "group"
    return [
        f"split.group_by is {rule.group_by}: {len(lone)} of {len(names)} images have no {lacks} and are split one by "
        f"one, the first is {min(lone)}"
    ]


def table_hash(config: PrepConfig) -> str | None:
    """Return the SHA-256 of ``split.csv``; None where groups are not in a table."""
    return sha256_file(Path(config.split.csv)) if config.split.csv else None


def check_table(config: PrepConfig) -> None:
    """Raise ConfigError where ``split.csv`` cannot be used."""
    if config.split.csv:
        _read_table(config.split)


def join_named(
    groups: Mapping[str, str], named: Mapping[str, str], published: Mapping[str, str]
) -> tuple[dict[str, str], int]:
    """Return the groups with those of equal names joined, and of how many names not all could be.

    Nothing joined holds published samples of both sides. Where a name has some, all that is new is joined with the side
    that its own samples are published on (train, if none is), but copies of the other side's samples stay with those;
    and where its own are published on both, nothing is joined: no new sample is refused for that.
    """
    members = defaultdict(list)
    for key in sorted(named):
        if key in groups:
            members[named[key]].append(key)
    sides: dict[str, set[str]] = defaultdict(set)
    for key, group in groups.items():
        if key in published:
            sides[group].add(published[key])
    torn = 0
    parent = {group: group for group in groups.values()}

    def root(group: str) -> str:
        while parent[group] != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    for keys in members.values():
        roots = sorted({root(groups[key]) for key in keys})
        if len(set().union(*(sides[one] for one in roots))) == 2:
            torn += len(roots) > 1
            own = {published[key] for key in keys if key in published} or {"train"}
            roots = [one for one in roots if len(own) == 1 and sides[one] <= own]
        for other in roots[1:]:
            parent[other] = roots[0]
            sides[roots[0]] |= sides[other]
    return {key: root(group) for key, group in groups.items()}, torn


def _namer(rule: SplitConfig) -> Callable[[str], str | None]:
    if rule.group_by == "folder":
        return lambda name: str(PurePosixPath(name).parent) if "/" in name else None
    if rule.group_by == "csv":
        return _read_table(rule).get
    pattern = re.compile(rule.pattern or "")

    def part(name: str) -> str | None:
        found = pattern.search(name)
        return (found[1] if pattern.groups else found[0]) if found else None

    return part


def _read_table(rule: SplitConfig) -> dict[str, str]:
    """Return the value of ``split.column`` by file name."""
    column, where = rule.column or "", f"split.csv {rule.csv}"
    try:
        with open(rule.csv or "", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if lacking := [name for name in (FILE_NAME, column) if name not in (reader.fieldnames or ())]:
                raise ConfigError(
                    f"{where} has no column {' and no column '.join(lacking)}; it has "
                    f"{', '.join(reader.fieldnames or ['nothing'])}"
                )
            found: dict[str, str] = {}
            for number, row in enumerate(reader, 2):
                name, value = row[FILE_NAME] or "", (row[column] or "").strip()
                if found.setdefault(name, value) != value:
                    now, before = value or "nothing", found[name] or "nothing"
                    raise ConfigError(f"{where}, row {number}: {name} is of {now}, but before of {before}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{where} cannot be read: {error}. Give a CSV with file_name and {column}") from error
    return {name: value for name, value in found.items() if value}


def _by_date(folder: Path, names: Mapping[str, str], gap: timedelta) -> dict[str, str]:
    """Name groups of one camera in which each image was taken at most ``gap`` after the one before."""
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        taken = dict(zip(names, pool.map(lambda name: read_taken(folder, name), names.values())))
    cameras: dict[str, list[tuple[datetime, str]]] = defaultdict(list)
    for key, found in taken.items():
        if found:
            cameras[found[0]].append((found[1], key))
    groups = {}
    for camera, shots in cameras.items():
        last, name = datetime.min, ""
        for when, key in sorted(shots):
            if not name or when - last > gap:
                name = f"{camera} {when:%Y-%m-%d %H:%M:%S}"
            last, groups[key] = when, name
    return groups
