"""Sources that are gone, replaced, out of reach, or back.

A sample whose file is gone stays in the dataset as long as its pixels need not be made again. What cannot be read, or
lies in a folder that cannot be listed, is not gone. One that was refused because its file had changed or gone is tried
again when the file is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanodit.errors import ResourceError
from nanodit.storage import Storage
from prep.captions.sidecar import SidecarCaptions
from prep.config import PrepConfig
from prep.dataset.holdout import NEEDED, parts_of
from prep.dataset.layout import Part, Unit, read_parquet
from prep.images.filters import DECISIONS
from prep.images.formats import is_image_name
from prep.images.scan import UNREADABLE_FOLDER, Reject, Scan
from prep.images.scan_cache import ScanCache
from prep.images.sources import UNREADABLE, BadImage, Source, read_header

INDEX = "index.parquet"
# reasons for which a sample is tried again without being asked
PASSING = ("changed_during_run", "source_gone", UNREADABLE)
OUT_OF_REACH = (UNREADABLE, UNREADABLE_FOLDER)  # reasons after which nobody knows what is there
NAMED = 3  # folders that a message lists

Rows = list[Mapping[str, Any]]  # of the manifest


@dataclass(frozen=True)
class Missing:
    """Rows of the manifest whose key was not found.

    Those whose file is ``gone``, those whose file cannot be read now or lies below a folder that cannot be listed
    (``away``), and the number of those whose file has another content (``replaced``).
    """

    gone: Rows
    away: Rows
    replaced: int


def compare_sources(manifest: pa.Table, found: Scan) -> Missing:
    """Tell what became of the samples of the manifest that were not found.

    One whose file was moved or renamed is not among them: its key is found. Nor is one that a filter refuses.
    """
    keys = pa.array([source.key for source in found.sources], pa.string())
    missing = manifest.filter(pc.invert(pc.is_in(manifest["key"], value_set=keys))).to_pylist()
    if not missing:
        return Missing([], [], 0)
    closed = {reject.source for reject in found.rejects if reject.reason in OUT_OF_REACH}
    names = {source.name for source in found.sources} | {reject.source for reject in found.rejects} - closed
    absent = [row for row in missing if row["source"] not in names]
    away = [row for row in absent if closed and not closed.isdisjoint(_path_to(row["source"]))]
    known = {row["key"] for row in away}
    return Missing([row for row in absent if row["key"] not in known], away, len(missing) - len(absent))


def unusual_names(manifest: pa.Table) -> frozenset[str]:
    """Return the sources without the suffix of an image; they were taken when content alone decided, and are still."""
    return frozenset(name for name in manifest["source"].to_pylist() if not is_image_name(name))


def _path_to(name: str) -> Iterable[str]:
    """Yield a name and those of the folders above it."""
    while name:
        yield name
        name = name.rpartition("/")[0]


def unlisted_folders(rejects: Iterable[Reject]) -> list[str]:
    """Return the folders that could not be listed, with the reason of each."""
    return [f"{item.source} ({item.detail.split(':')[0]})" for item in rejects if item.reason == UNREADABLE_FOLDER]


def unlisted_remark(rejects: Iterable[Reject]) -> list[str]:
    """Say in one line which folders could not be listed; no line when all could."""
    folders = unlisted_folders(rejects)
    return [f"warning: folders that cannot be listed: {_first(folders)}. Images in them are missing"] if folders else []


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def refuse_to_prune(rejects: Iterable[Reject], source: str) -> None:
    """Raise ResourceError where a folder cannot be listed: what seems to be gone may have been moved there."""
    if folders := unlisted_folders(rejects):
        raise ResourceError(
            f"--prune drops the samples whose source is gone, and nobody can tell which: {source} holds folders that "
            f"cannot be listed: {_first(folders)}. Nothing was dropped. Check the disk, the network and the "
            "permissions (chmod, chown), or move these folders out of the source, and run again"
        )


def worth_keeping(storage: Storage, rows: Iterable[Mapping[str, Any]]) -> list[Source]:
    """Return the gone sources of which something was made: published samples, members of shards with committed pixels.

    All of such a shard stay members, because without one of them the pixels of the others would have to be made again.
    """
    rows = list(rows)
    published = published_keys(storage) if rows else set()
    places = {(row["bucket"], row["shard"]) for row in rows}
    committed = {place for place in places if storage.exists(Unit(*place, "px").part)}
    return [
        Source(*(row[name] for name in ("source", "key", "size_bytes", "width", "height")), gone=True)
        for row in rows
        if row["key"] in published or (row["bucket"], row["shard"]) in committed
    ]


def whole_for_good(
    shards: Mapping[tuple[str, int], Sequence[str]],
    sources: Mapping[str, Source],
    large: set[str],
    read_parts: Callable[[list[Unit]], Mapping[Unit, Part]],
) -> set[str]:
    """Return the members of shards with images of ``large`` whose pixels were made without reducing, and stay so.

    Those are shards with a source that is gone: to make their pixels again would lose that sample.
    """
    places = [place for place, keys in shards.items() if any(sources[key].gone for key in keys)]
    units = [Unit(*place, "px") for place in places if not large.isdisjoint(shards[place])]
    whole = [unit for unit, part in read_parts(units).items() if "reduced" not in part.recipe]
    return {key for unit in whole for key in shards[unit.bucket, unit.shard]}


def published_keys(storage: Storage) -> set[str]:
    """Return the keys of the published index; empty where there is none, or a damaged one. Raises ResourceError."""
    table = _published(storage, ["key"])
    return set(table["key"].to_pylist()) if table else set()


def published_sides(storage: Storage) -> tuple[dict[str, str], dict[str, str]]:
    """Return the side of the split of each key of the published index, and the part of those of the holdout.

    Otherwise as :func:`published_keys`.
    """
    table = _published(storage, NEEDED)
    return (dict(zip(table["key"].to_pylist(), table["split"].to_pylist())), parts_of(table)) if table else ({}, {})


def _published(storage: Storage, columns: Sequence[str]) -> pa.Table | None:
    data = storage.read_if_there(INDEX)
    try:
        there = pq.read_schema(pa.BufferReader(data)).names if data else ()
        return read_parquet(data, columns=[name for name in columns if name in there]) if data else None
    except (OSError, ValueError, pa.ArrowException):
        return None


def committed_caption_hashes(parts: Mapping[Unit, Part]) -> dict[str, str]:
    """Return the fingerprint of every committed caption that came with its image, by key."""
    captions: dict[str, str] = {}
    for unit, part in parts.items():
        if unit.layer == "text" and "captions" in part.recipe:
            known = part.recipe["captions"]
            captions |= {key: known[key] for key in part.table["key"].to_pylist() if key in known}
    return captions


def source_remarks(
    gone: Sequence[Source],
    away: Sequence[Source],
    replaced: int,
    prune: bool,
    shards: Mapping[tuple[str, int], Sequence[str]],
    missing: Iterable[Unit],
) -> list[str]:
    """Say which sources are gone, out of reach or replaced, in lines; ``missing`` are the units to compute."""
    lines = []
    if away:
        lines.append(f"warning: {len(away)} prepared sources cannot be read now: their samples stay")
    if replaced:
        lines.append(f"{replaced} sources have new content: their samples are replaced")
    if gone and prune:
        lines.append(f"{len(gone)} sources are gone: their samples are dropped")
    if gone and not prune:
        lines.append(f"{len(gone)} sources are gone; --prune drops their samples")
    keys = {source.key for source in [*away, *(() if prune else gone)]}
    lost = keys.intersection(key for unit in missing if unit.layer == "px" for key in shards[unit.bucket, unit.shard])
    if lost:
        lines.append(
            f"warning: {len(lost)} of them will be lost (source_gone), because the pixels of their shards have to "
            "be made again. Put the files back to keep them"
        )
    return lines


def is_as_planned(source: Source, caption: str | None, config: PrepConfig, cache: ScanCache) -> bool:
    """Whether a file that was refused because it had changed is what the plan takes it for, by reading it again."""
    folder = Path(config.source)
    sidecars = SidecarCaptions(folder, config.captions.origins)
    try:
        good = read_header(folder, source.name, config.image.max_pixels).key == source.key
        good = good and caption in (None, sidecars.fingerprint(source.name))
    except BadImage:
        good = False
    if not good:
        cache.forget(source.name)
        for name in sidecars.paths(source.name):
            cache.forget(name)
    return good


def units_to_make_again(
    config: PrepConfig,
    current: Mapping[Unit, Part],
    sources: Mapping[str, Source],
    is_back: Callable[[Source], bool],
    retry_rejects: bool,
) -> dict[Unit, str]:
    """Units that have the right recipe and must be made again all the same, each with its reason.

    These are units that refused a sample for a reason that has passed (its file was gone, or changed during the run,
    and ``is_back``), with ``retry_rejects`` all that refused a sample which nobody decided to refuse, and units whose
    upstream has got more samples since, by being made again.
    """
    again = {}
    for unit, part in current.items():
        refused = [item for item in part.rejects if item.key in sources and not sources[item.key].gone]
        if retry_rejects and any(item.reason not in DECISIONS for item in refused):
            again[unit] = "what it refused is tried again"
        elif any(item.reason in PASSING and is_back(sources[item.key]) for item in refused):
            again[unit] = "a source that had changed, or could not be read, is back"
    return units_behind(config, current) | again


def units_behind(config: PrepConfig, current: Mapping[Unit, Part]) -> dict[Unit, str]:
    """Units that say nothing about some samples of the layer they are made from, each with its reason."""
    behind = {}
    for unit, part in current.items():
        upstream = current.get(Unit(unit.bucket, unit.shard, config.upstream(unit.layer)))
        if upstream is None or part.table["key"].equals(upstream.table["key"]):
            continue
        known = {*part.table["key"].to_pylist(), *(item.key for item in part.rejects)}
        if not known.issuperset(upstream.table["key"].to_pylist()):
            behind[unit] = f"the {upstream.unit.layer} layer has other samples now"
    return behind
