"""Versions of a dataset: what a published one consists of stays readable until it is dropped.

A version is the fingerprint of its dataset.json. Before a file that a published version names is replaced or deleted,
it is kept: tars as ``kept/SHA256.tar``, tables as ``kept/SHA256.parquet``, dataset.json as ``kept/FINGERPRINT.json``,
and which tar has which hash as ``kept/FINGERPRINT.tars.json``. In a folder these are hard links, so they take room only
when the file of that name has been replaced. Of a version that is kept, ``kept/FINGERPRINT.json`` is written last and
deleted first. What no such file names belongs to nobody: :func:`collect_garbage`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from nanodit.faults import fault
from nanodit.files import canonical_json, sha256_bytes
from nanodit.storage import Storage
from prep.dataset.layers import LAYERS
from prep.dataset.layout import Part, Unit, read_parquet

DATASET, INDEX = "dataset.json", "index.parquet"
FOLDER = "kept/"
HASH = re.compile(r"[0-9a-f]{64}")  # fingerprints, too; nothing else becomes the name of a file
DESCRIPTION = re.compile(r"kept/([0-9a-f]{64})\.json")
REQUESTS = 16  # to an object store at a time


def kept_tar(sha256: str) -> str:
    """Return where the tar with this hash is kept."""
    return f"{FOLDER}{sha256}.tar"


def kept_table(sha256: str) -> str:
    """Return where the Parquet file with this hash is kept."""
    return f"{FOLDER}{sha256}.parquet"


def kept_description(fingerprint: str) -> str:
    """Return where the dataset.json of a version is kept: the version is readable as long as this file is there."""
    return f"{FOLDER}{fingerprint}.json"


def kept_tars(fingerprint: str) -> str:
    """Return where the names and hashes of a version's tars are kept."""
    return f"{FOLDER}{fingerprint}.tars.json"


def is_kept(storage: Storage, fingerprint: Any) -> bool:
    """Return whether an earlier version can still be read."""
    return is_hash(fingerprint) and storage.exists(kept_description(fingerprint))


def is_hash(value: Any) -> bool:
    """Return whether a value of a file that anybody may have written is a SHA-256, and so may name a file."""
    return isinstance(value, str) and HASH.fullmatch(value) is not None


def published(storage: Storage) -> dict[str, Any] | None:
    """Return the newest dataset.json; None where there is none, or one that cannot be kept."""
    return _description(storage.read_if_there(DATASET))


def _description(data: bytes | None) -> dict[str, Any] | None:
    try:
        info = json.loads(data) if data else None
    except ValueError:
        return None
    if not isinstance(info, dict) or not is_hash(info.get("fingerprint")) or not isinstance(info.get("layers"), dict):
        return None
    hashes = info.get("hashes")
    return info if isinstance(hashes, dict) and is_hash(hashes.get(INDEX)) else None


def keep_version(storage: Storage, known: Mapping[Unit, Part] | None = None) -> None:
    """Keep what the published version consists of but for its tars, and note their hashes; before anything changes.

    ``known`` are committed parts that were read already. Nothing happens where nothing was published, or the version is
    kept. For the holder of the dataset's lock. Raises OSError and ResourceError where nothing can be written.
    """
    description = storage.read_if_there(DATASET)
    info = _description(description)
    if info is None or is_kept(storage, info["fingerprint"]):
        return
    tables = {name: storage.read_if_there(name) for name, sha256 in info["hashes"].items() if is_hash(sha256)}
    tables = {name: data for name, data in tables.items() if data and sha256_bytes(data) == info["hashes"][name]}
    if INDEX not in tables:  # a publication of before there were versions was killed: that index is lost
        return
    for name, data in tables.items():
        storage.write(kept_table(info["hashes"][name]), data)
    units = [unit for unit in units_of(tables[INDEX], info) if unit not in (known or {})]
    with ThreadPoolExecutor(max_workers=REQUESTS) as pool:
        found = dict(zip(units, pool.map(lambda unit: tar_hash(storage, unit), units)))
    found |= {unit: part.tar_sha256 for unit, part in (known or {}).items()}
    tars = {unit.tar: found[unit] for unit in units_of(tables[INDEX], info) if found[unit]}
    storage.write(kept_tars(info["fingerprint"]), canonical_json(tars))
    fault("versions.before_description")
    storage.write(kept_description(info["fingerprint"]), description)


def units_of(index: bytes, info: Mapping[str, Any]) -> list[Unit]:
    """Return the units that an index names, sorted."""
    table = read_parquet(index, columns=["bucket", "shard"]).group_by(["bucket", "shard"]).aggregate([])
    layers = [layer for layer in LAYERS if layer in info["layers"]]
    places = zip(table["bucket"].to_pylist(), table["shard"].to_pylist())
    return sorted(Unit(bucket, shard, layer) for bucket, shard in places for layer in layers)


def keep_unit(storage: Storage, unit: Unit, new: str | None = None) -> None:
    """Keep a unit's tar before it is replaced, by one with the hash ``new``, or deleted.

    Nothing happens where nothing was published yet. Raises OSError and ResourceError where nothing can be written.
    """
    if not storage.exists(DATASET):
        return
    sha256 = tar_hash(storage, unit)
    if sha256 in (None, new) or storage.exists(kept_tar(sha256)):
        return
    storage.link(unit.tar, kept_tar(sha256))
    fault("versions.kept_unit")


def tar_hash(storage: Storage, unit: Unit) -> str | None:
    """Return the hash of a unit's tar: as it was committed, else of its bytes; None where there is no tar."""
    size, data = storage.size(unit.tar), storage.read_if_there(unit.part)
    if size is None:
        return None
    try:
        metadata = read_parquet(data, columns=[]).schema.metadata if data else None
        record = json.loads((metadata or {}).get(b"nanodit", b"{}"))
        if record.get("tar_bytes") == size and is_hash(record.get("tar_sha256")):
            return record["tar_sha256"]
    except (OSError, ValueError, AttributeError, pa.ArrowException):  # a damaged part: the tar speaks for itself
        pass
    tar = storage.read_if_there(unit.tar)
    return None if tar is None else sha256_bytes(tar)


def tars_of(storage: Storage, fingerprint: str) -> dict[str, str] | None:
    """Return the hash of each tar of a kept version by its name below the dataset; None where none is kept."""
    data = storage.read_if_there(kept_tars(fingerprint)) if is_kept(storage, fingerprint) else None
    try:
        tars = json.loads(data) if data else None
    except ValueError:
        return None
    if not isinstance(tars, dict):
        return None
    return {name: sha256 for name, sha256 in tars.items() if is_hash(sha256)}


def kept_versions(storage: Storage, names: Collection[str] | None = None) -> dict[str, dict[str, Any] | None]:
    """Return the dataset.json of every kept version by fingerprint; None for one that is damaged.

    ``names`` are the files that there are, if they were listed already.
    """
    matches = filter(None, map(DESCRIPTION.fullmatch, storage.names(FOLDER) if names is None else names))
    return {match[1]: _description(storage.read_if_there(match[0])) for match in matches}


def files_of(storage: Storage, fingerprint: str, info: Mapping[str, Any]) -> set[str]:
    """Return the files of ``kept/`` that a version names; a tar that was not replaced yet need not be there."""
    tables = {kept_table(sha256) for sha256 in info["hashes"].values() if is_hash(sha256)}
    tars = {kept_tar(sha256) for sha256 in (tars_of(storage, fingerprint) or {}).values()}
    return tables | tars | {kept_description(fingerprint), kept_tars(fingerprint)}


def collect_garbage(storage: Storage, complete: bool = False) -> None:
    """Delete what is kept and no version names, for the holder of the dataset's lock; nothing where one is damaged.

    ``complete`` says that the newest version has all its units in place, so that nothing need be kept of it.
    """
    if complete and (info := published(storage)):
        storage.delete(kept_description(info["fingerprint"]))
    names = storage.names(FOLDER)
    versions = kept_versions(storage, names)
    if None in versions.values():
        return
    named = set().union(*(files_of(storage, fingerprint, info) for fingerprint, info in versions.items() if info))
    for name in names:
        if name not in named:
            storage.delete(name)
