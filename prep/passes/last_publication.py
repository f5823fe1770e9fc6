"""What the last publication was made from: a run that finds all of it unchanged need not publish again.

A publication is a pure function of its inputs, so their hash says whether it would give the same files once more. The
record can be deleted at any time; it lies below ``runs/``, the place for what no reader needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nanodit import __version__
from nanodit.files import canonical_json, sha256_bytes, sha256_file
from nanodit.storage import Storage
from prep.dataset.layout import Part, Unit
from prep.passes.grouping import table_hash

NAME = "runs/published.json"
DATASET = "dataset.json"


def known_parts(storage: Storage) -> dict[str, str]:
    """Return the hash of every part of the last publication by its name: those were read whole, and are not damaged."""
    parts = _record(storage).get("parts")
    return parts if isinstance(parts, dict) else {}


def inputs_hash(plan: Any, parts: Mapping[Unit, Part], manifest: str, truth: Path) -> str:
    """Return the SHA-256 of everything that a publication is made from.

    ``manifest`` is the hash of the plan's manifest, which names every source and its shard, ``truth`` the table beside
    built-in figures, if there is one. The code of this package counts too.
    """
    code = [sha256_file(file) for file in sorted(Path(__file__).parents[1].rglob("*.py"))]
    inputs = {
        "versions": [__version__, pa.__version__, np.__version__],
        "code": code,
        "config": plan.config.model_dump(mode="json", exclude={"source", "output"}),  # the places are not published
        "manifest": manifest,
        "truth": sha256_file(truth) if truth.exists() else None,
        "groups": table_hash(plan.config),
        "seen": plan.seen,
        "excluded": sorted(plan.excluded),
        "rejects": [[reject.source, reject.stage, reject.reason, reject.detail] for reject in plan.rejects],
        "parts": sorted((unit.part, part.sha256) for unit, part in parts.items()),
    }
    return sha256_bytes(json.dumps(inputs, sort_keys=True).encode())


def recall(storage: Storage, inputs: str) -> dict[str, Any] | None:
    """Return what :func:`remember` was told of these inputs; None where it was of others, or a file is another now."""
    record = _record(storage)
    if record.get("inputs") != inputs:
        return None
    try:
        if file_hash(storage, DATASET) != record["dataset"]:
            return None
        hashes = json.loads(storage.read(DATASET))["hashes"]
        outcome = record["outcome"] | {"files": sorted(hashes)}
    except (KeyError, TypeError, ValueError):  # a record of another version, or damaged
        return None
    return outcome if all(file_hash(storage, name) == sha256 for name, sha256 in hashes.items()) else None


def remember(storage: Storage, inputs: str, parts: Mapping[Unit, Part], outcome: Mapping[str, Any]) -> None:
    """Record what was just published; ``outcome`` are plain values for :func:`recall`."""
    record = {"inputs": inputs, "dataset": file_hash(storage, DATASET), "outcome": dict(outcome)}
    record["parts"] = {unit.part: part.sha256 for unit, part in parts.items()}
    storage.write(NAME, canonical_json(record))


def file_hash(storage: Storage, name: str) -> str | None:
    """Return the SHA-256 of a file of a dataset, which is not held in memory in a folder; None where there is none."""
    if not storage.exists(name):
        return None
    return sha256_file(storage.where(name)) if storage.is_local else sha256_bytes(storage.read(name))


def _record(storage: Storage) -> dict[str, Any]:
    try:
        record = json.loads(storage.read_if_there(NAME) or b"{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
