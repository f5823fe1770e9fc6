"""``prep verify``: proof that a dataset is whole, or a list of what is not.

Everything is read once and compared with what was committed: tars and their members, index parts, the index, the files
that dataset.json names. Near-duplicate groups are computed again from the stored hashes and thumbnails and from the
class tokens, because a leak between train and holdout is the one damage that makes every later number wrong without any
sign. Of the class tokens, what a run has written down (``prep/images/compared.py``) is believed where it is of the very
bytes that were checked here; ``full`` compares all of them anew.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanodit.console import Progress, say
from nanodit.errors import DataError
from nanodit.files import sha256_bytes
from nanodit.lock import locked
from nanodit.storage import Storage, open_storage
from prep.dataset import versions
from prep.dataset.checks import check_index, check_info
from prep.dataset.layers import LAYERS
from prep.dataset.layout import DAMAGED, Part, Unit, fingerprint_of, member_columns, read_parquet
from prep.images import altered, duplicates
from prep.images.compared import compared_tokens
from prep.passes.split import find_links, sort_links
from prep.verify.kept import check_kept
from prep.verify.units import READERS, CheckedUnit, Finding, check_unit

PUBLISHED = ("index.parquet", "rejects.parquet", "manifest.parquet")
PART_NAME = re.compile(r"parts/bucket_(?P<bucket>\d+x\d+)-shard-(?P<shard>\d{6,})\.(?P<layer>\w+)\.parquet")
TAR_NAME = re.compile(r"bucket_(?P<bucket>\d+x\d+)/shard-(?P<shard>\d{6,})\.(?P<layer>\w+)\.tar")
TEMPORARY = re.compile(r"(.*/)?\.[^/]+\.tmp-[0-9a-f-]+")


@dataclass
class Inventory:
    """The content of a dataset's folder: units by their index parts, and what belongs to none."""

    units: list[Unit]
    orphans: list[Finding] = field(default_factory=list)


def verify(dataset: Path | str | Storage, repair: bool = False, full: bool = False) -> None:
    """Check everything, print one line per finding and a last line as proof.

    ``repair`` removes the commit records of damaged units, so that the next ``prep run`` computes exactly those again,
    and what killed writers left. ``full`` compares all class tokens, whatever runs found before. Raises DataError (exit
    code 3) unless nothing was found.
    """
    storage = open_storage(dataset)
    if not storage.exists("dataset.json") and not storage.exists("index.parquet"):  # of a finished one either is left
        where = storage.where("dataset.json")
        raise DataError(f"{where} does not exist: {storage} is not a finished dataset. Run: nanodit prep run")
    with locked(storage) if repair else nullcontext():
        inventory = take_inventory(storage)
        findings = list(inventory.orphans)
        checked = check_units(storage, inventory.units)
        findings += [finding for item in checked for finding in item.findings]
        samples, published = check_published(storage, checked, full)
        findings += published
        findings += check_kept(storage, {item.unit.tar: item.part.tar_sha256 for item in checked if item.part})
        for finding in findings:
            say(str(finding))
        counts = Counter(finding.kind for finding in findings)
        size = sum(item.part.tar_bytes for item in checked if item.part)
        older = f", {counts['older']} of an older version" if counts["older"] else ""
        say(
            f"{samples} samples, {len(checked)} units, {size} bytes: "
            f"{counts['damaged']} damaged, {counts['leak']} leaks, {counts['orphan']} orphans{older}"
        )
        if findings:
            raise DataError(f"{storage}: {advise(storage, findings, repair)}")


def advise(storage: Storage, findings: list[Finding], repair: bool) -> str:
    """Return what to do about the findings; with ``repair``, do it as far as possible."""
    older = {finding.unit for finding in findings if finding.kind == "older"}
    units = {finding.unit for finding in findings if finding.unit} - older
    kept = [finding for finding in findings if finding.file.startswith(versions.FOLDER)]
    others = [finding for finding in findings if not finding.unit and finding not in kept]
    advice = []
    newest = versions.published(storage)
    if newest and versions.is_kept(storage, newest["fingerprint"]):  # a run that ends takes that away
        advice.append(
            "a prep run is at work, or did not come to its end: what it has changed is found here, and readers of the "
            "present version find in kept/ what it was. Wait for it, or run nanodit prep run again"
        )
    if older:
        advice.append(f"{len(older)} units were made by an older version. nanodit prep run upgrades them")
    if units and not repair:
        advice.append(f"{len(units)} units are damaged. Run: nanodit prep verify --repair, then nanodit prep run")
    if repair:
        for unit in sorted(units):
            storage.delete(unit.part)
        storage.remove_temporary_files()
        if units:
            advice.append(
                f"the commit records of {len(units)} units were removed; nanodit prep run computes these units again"
            )
    if any(finding.kind == "leak" for finding in findings):
        advice.append(
            "samples in holdout have near duplicates in train: no result on this holdout counts. Delete index.parquet "
            "and run nanodit prep run to draw the split again, then train again"
        )
    if any(finding.kind == "damaged" for finding in others):
        advice.append(
            "published files are damaged. Run nanodit prep run to write them again; where it cannot read "
            "index.parquet, restore that file, or delete it and accept another split"
        )
    if kept:
        advice.append(
            "what is kept of earlier versions is damaged. Whoever reads those versions is going to stop; drop them: "
            f"nanodit prep versions {storage} --drop FINGERPRINT"
        )
    if any(finding.kind == "orphan" for finding in others):
        advice.append("files that belong to no unit can be deleted; nanodit prep run removes those of killed runs")
    return ". ".join(advice)


# --- units ------------------------------------------------------------------------------------------------------------


def take_inventory(storage: Storage) -> Inventory:
    """List the units that have an index part, and every file in the folders of units that belongs to none."""
    parts, tars, other = {}, {}, []
    for name in [*storage.names("parts/"), *storage.names("bucket_"), *storage.names(".")]:
        match = PART_NAME.fullmatch(name) or TAR_NAME.fullmatch(name)
        unit = Unit(match["bucket"], int(match["shard"]), match["layer"]) if match else None
        if unit and unit.layer in LAYERS and name in (unit.part, unit.tar):
            (parts if name == unit.part else tars)[unit] = name
        elif TEMPORARY.fullmatch(name):
            other.append(Finding("orphan", name, "was left behind by a killed writer"))
        elif "/" in name:  # hidden files of the system's beside the dataset's own are nobody's business
            other.append(Finding("orphan", name, "is not a file of a dataset"))
    other += [Finding("orphan", tars[unit], "has no index part") for unit in sorted(tars.keys() - parts.keys())]
    return Inventory(sorted(parts), other)


def check_units(storage: Storage, units: list[Unit]) -> list[CheckedUnit]:
    """Check every unit; the readers wait for disks or the network, and hashing needs no interpreter."""
    checked = []
    with (
        Progress("verify", len(units), "units") as progress,
        ThreadPoolExecutor(max_workers=min(READERS, os.cpu_count() or 1)) as pool,
    ):
        read = damaged = 0
        for item in pool.map(lambda unit: check_unit(storage, unit), units):
            checked.append(item)
            read += item.part.tar_bytes if item.part else 0
            damaged += bool(item.findings)
            progress.advance(GB=f"{read / 1e9:.2f}", damaged=damaged)
    return checked


# --- what was published -----------------------------------------------------------------------------------------------


def check_published(storage: Storage, checked: list[CheckedUnit], full: bool = False) -> tuple[int, list[Finding]]:
    """Return the number of samples, and what is wrong with dataset.json and the files that it names."""
    findings: list[Finding] = []

    def bad(file: str, problem: str, key: str = "") -> None:
        findings.append(Finding("damaged", file, problem, key))

    try:
        info = json.loads(storage.read("dataset.json"))
        check_info(info, "dataset.json")
    except (OSError, ValueError, RecursionError, DataError) as error:
        bad("dataset.json", f"cannot be used ({error})")
        return 0, findings
    described = {name: value for name, value in info.items() if name != "fingerprint"}
    if fingerprint_of(described) != info["fingerprint"]:
        bad("dataset.json", "its fingerprint does not match its content")
    tables: dict[str, pa.Table] = {}
    for name in sorted({*PUBLISHED, *info["hashes"]}):
        try:
            data = storage.read(name)
            if sha256_bytes(data) != info["hashes"].get(name):
                bad(name, "is not the file that dataset.json names (SHA-256 differs)")
            tables[name] = read_parquet(data)
        except DAMAGED as error:
            bad(name, f"cannot be read ({error})")
    index = tables.get("index.parquet")
    if index is None:
        return 0, findings
    try:
        check_index([(field.name, field.type) for field in index.schema], index, info, "index.parquet")
        findings += compare_index(index, info, checked, tables)
        findings += check_counts(index, info, tables)
        findings += find_leaks(storage, index, info, checked, full)
    except DataError as error:
        bad("index.parquet", str(error))
    except DAMAGED as error:  # whoever wrote them, not we
        bad("dataset.json", f"it or a file that it names is not of the expected form ({type(error).__name__}: {error})")
    return len(index), findings


def compare_index(
    index: pa.Table, info: dict[str, Any], checked: list[CheckedUnit], tables: dict[str, pa.Table]
) -> list[Finding]:
    """Return where the index differs from the index parts and the manifest that it was made from."""
    findings = []
    layers = [layer for layer in LAYERS if layer in info["layers"]]
    keys = index["key"].to_pylist()
    if keys != sorted(set(keys)):
        return [Finding("damaged", "index.parquet", "keys are not sorted and unique")]
    unreadable = {item.unit for item in checked if not item.part}
    complete: set[str] | None = None
    for layer in layers:
        parts = [item.part for item in checked if item.part and item.unit.layer == layer]
        rows = _with_place(parts)
        present = set(rows["key"].to_pylist()) if rows is not None else set()
        complete = present if complete is None else complete & present
        known = pc.is_in(index["key"], pa.array(sorted(present), pa.string()))
        lost = Counter(zip(*(index.filter(pc.invert(known))[name].to_pylist() for name in ("bucket", "shard"))))
        for place, count in lost.items():
            if Unit(*place, layer) not in unreadable:
                problem = f"{count} samples of bucket_{place[0]}/shard-{place[1]:06d} are in no committed {layer} unit"
                findings.append(Finding("damaged", "index.parquet", problem))
        if rows is None:
            continue
        ours = index.filter(known)
        theirs = rows.filter(pc.is_in(rows["key"], index["key"])).sort_by("key")
        if len(theirs) != len(ours):
            findings.append(Finding("damaged", "parts", f"some samples are in two {layer} units"))
            continue
        described = info["layers"][layer]
        names = [*LAYERS[layer].columns_of(described), *member_columns(layer, described)]
        for name in ["bucket", "shard", f"{layer}/fingerprint", *names]:
            if name not in ours.column_names or name not in theirs.column_names:
                if name != "thumbnail":  # stays in the parts
                    findings.append(Finding("damaged", "index.parquet", f"has no column {name}"))
                continue
            for key in _different(ours, theirs, name):
                findings.append(Finding("damaged", "index.parquet", f"{name} differs from the {layer} unit", key))
    findings += _compare_manifest(index, complete or set(), tables)
    return findings


def _with_place(parts: Iterable[Part]) -> pa.Table | None:
    """Return the rows of some units of one layer, with bucket, shard and fingerprint."""
    tables = []
    for part in parts:
        unit, table = part.unit, part.table.replace_schema_metadata(None)
        columns = {"bucket": unit.bucket, "shard": unit.shard, f"{unit.layer}/fingerprint": part.fingerprint}
        for name, value in columns.items():
            table = table.append_column(
                name, pa.array([value] * len(table)).cast(pa.int32() if name == "shard" else "string")
            )
        tables.append(table)
    return pa.concat_tables(tables) if tables else None


def _different(ours: pa.Table, theirs: pa.Table, name: str) -> list[str]:
    """Return the first few keys at which a column of two tables of equal keys differs."""
    if ours[name].equals(theirs[name]):
        return []
    pairs = zip(ours["key"].to_pylist(), ours[name].to_pylist(), theirs[name].to_pylist())
    return [key for key, mine, other in pairs if mine != other][:3]


def _compare_manifest(index: pa.Table, complete: set[str], tables: dict[str, pa.Table]) -> list[Finding]:
    """Return samples whose place is not the planned one, and planned ones that are neither in the index nor refused."""
    findings = []
    if "manifest.parquet" not in tables or "rejects.parquet" not in tables:
        return findings
    planned = {row["key"]: row for row in tables["manifest.parquet"].to_pylist()}
    indexed = set()
    for row in index.select(["key", "bucket", "shard"]).to_pylist():
        indexed.add(row["key"])
        plan = planned.get(row["key"], {})
        if (plan.get("bucket"), plan.get("shard")) != (row["bucket"], row["shard"]):
            findings.append(Finding("damaged", "index.parquet", "is not where manifest.parquet places it", row["key"]))
    refused = set(tables["rejects.parquet"]["source"].to_pylist())
    for key in sorted(planned.keys() - indexed):
        if planned[key]["source"] not in refused:
            problem = (
                "is complete in every layer, but missing here" if key in complete else "is neither here nor refused"
            )
            findings.append(Finding("damaged", "index.parquet", problem, key))
    return findings


def check_counts(index: pa.Table, info: dict[str, Any], tables: dict[str, pa.Table]) -> list[Finding]:
    """Return where the numbers of dataset.json are not those of the tables."""
    sides = Counter(index["split"].to_pylist())
    counts = {"samples": len(index), "train": sides["train"], "holdout": sides["holdout"]}
    if "rejects.parquet" in tables:
        counts["rejects"] = len(tables["rejects.parquet"])
    said = info.get("counts", {})
    return [
        Finding("damaged", "dataset.json", f"counts {said.get(name)} {name}, but there are {count}")
        for name, count in counts.items()
        if said.get(name) != count
    ]


# --- leaks ------------------------------------------------------------------------------------------------------------


def find_leaks(
    storage: Storage, index: pa.Table, info: dict[str, Any], checked: list[CheckedUnit], full: bool = False
) -> list[Finding]:
    """Return groups of near duplicates, computed again, on both sides, and where the index names other groups."""
    stored: dict[str, tuple[str, bytes]] = {}
    tokens: set[str] = set()
    for item in checked:
        tokens |= item.class_tokens
        if item.part and item.unit.layer == "px":
            columns = (item.part.table[name].to_pylist() for name in ("key", "phash", "thumbnail"))
            stored |= {key: (phash, thumbnail) for key, phash, thumbnail in zip(*columns)}
    sides = dict(zip(index["key"].to_pylist(), index["split"].to_pylist()))
    findings = [
        Finding("leak", "index.parquet", f"split is {side!r}, which is neither train nor holdout", key)
        for key, side in sides.items()
        if side not in ("train", "holdout")
    ]
    cosine = info.get("stages", {}).get("split", {}).get("cls_cosine", duplicates.OFF)
    keys = [key for key in sides if key in stored and (cosine >= duplicates.OFF or key in tokens)]
    alike = None
    if cosine < duplicates.OFF and keys:
        rows = _with_place(item.part for item in checked if item.part and item.unit.layer == "dino")
        rows = rows.take(pc.index_in(pa.array(keys, pa.string()), value_set=rows["key"].combine_chunks()))
        with compared_tokens(storage, rows, cosine, anew=full) as found:
            alike = found.labels
    twins = None
    try:
        hashes = [stored[key][0] for key in keys]
        thumbnails = duplicates.thumbnail_rows([stored[key][1] for key in keys])
        groups = duplicates.duplicate_groups(keys, hashes, thumbnails, alike)
        rules = info.get("stages", {}).get("split", {})
        if rules.get("altered") == altered.CODE_VERSION:
            held = np.flatnonzero([sides[key] == "holdout" for key in keys])
            threshold = float(rules.get("altered_cosine", altered.ALTERED))
            joined, twins = sort_links(find_links(keys, thumbnails, held, threshold), sides)
            groups = duplicates.join_groups(groups, joined)
    except (ValueError, TypeError) as error:
        return [*findings, Finding("damaged", "parts", f"hashes or thumbnails cannot be compared ({error})")]
    members = defaultdict(list)
    for key in keys:
        members[groups[key]].append(key)
    for name, group in members.items():
        held = [key for key in group if sides[key] == "holdout"]
        trained = [key for key in group if sides[key] == "train"]
        if held and trained:
            problem = f"is in holdout and near duplicates are in train: {', '.join(trained[:3])} (group {name})"
            findings.append(Finding("leak", "index.parquet", problem, held[0]))
    if twins is not None:
        findings += check_twins(index, twins, len(keys) == len(sides))
    if "duplicate_group" in index.column_names and len(keys) == len(sides):
        said = dict(zip(index["key"].to_pylist(), index["duplicate_group"].to_pylist()))
        wrong = [key for key in keys if said[key] != groups[key]]
        for key in wrong[:3]:
            problem = f"duplicate_group is {said[key]}, computed again it is {groups[key]}"
            findings.append(Finding("damaged", "index.parquet", problem, key))
    return findings


def check_twins(index: pa.Table, twins: dict[str, str], whole: bool) -> list[Finding]:
    """Return where ``altered_twin`` of the index is not what was found: one that it does not name is a leak.

    Unless all samples could be compared, which is ``whole``, those that it names may be right.
    """
    known = "altered_twin" in index.column_names
    said = dict(zip(index["key"].to_pylist(), index["altered_twin"].to_pylist())) if known else {}
    findings = []
    for key in sorted(key for key in said.keys() | twins.keys() if said.get(key) != twins.get(key)):
        if said.get(key) is None:
            problem = f"is in holdout, {twins[key]} in train is an altered form of it, and altered_twin does not say so"
            findings.append(Finding("leak", "index.parquet", problem, key))
        elif whole:
            problem = f"altered_twin is {said[key]}, computed again it is {twins.get(key, 'none')}"
            findings.append(Finding("damaged", "index.parquet", problem, key))
    return findings
