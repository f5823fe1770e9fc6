"""From committed units to a published dataset: index, rejects, truth and dataset.json.

Everything here is a pure function of the plan, its parts and the index that was published before (a key never changes
its split). Files that would not change are left alone; dataset.json comes last and names the others by hash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanodit.console import Progress
from nanodit.errors import DataError
from nanodit.faults import fault
from nanodit.files import canonical_json, sha256_bytes
from nanodit.storage import Storage, open_storage
from prep.config import PrepConfig
from prep.dataset import holdout
from prep.dataset.buckets import Bucket, buckets_for, centre_crop, crop_boxes
from prep.dataset.layers import LAYERS
from prep.dataset.layout import (
    SCHEMA_VERSION,
    Part,
    Unit,
    fingerprint_of,
    member_columns,
    parquet_bytes,
    part_schema,
    read_parquet,
    read_part,
)
from prep.dataset.versions import keep_version
from prep.encoders.demo import known_words
from prep.encoders.registry import model_name
from prep.images import altered, duplicates
from prep.images.compared import compared_tokens
from prep.images.filters import CHOICES
from prep.images.scan import DUPLICATE, HIDDEN, LINKED_FOLDER, TRUTH_NAME, Reject
from prep.passes import last_publication
from prep.passes.advice import CROP_COLUMNS, count_values, warn
from prep.passes.grouping import name_groups
from prep.passes.plan import MANIFEST, NAMED, REQUESTS, Plan
from prep.passes.split import SPLIT_RULES, add_split, cls_cosine, published_split, split_rules

INDEX, REJECTS, DATASET = "index.parquet", "rejects.parquet", "dataset.json"
ONE_ARRAY = 1 << 31  # bytes of text that Arrow can hold in one array
BLOCK = 1024  # parts that are read at a time
LINKS_SPLITS, EXCLUDED = "links_splits", "excluded"
NO_DAMAGE = frozenset({HIDDEN, LINKED_FOLDER, DUPLICATE, LINKS_SPLITS, EXCLUDED, *CHOICES})  # reasons, see `is_damage`
HIDDEN_COLUMNS = ("thumbnail",)  # of the parts; needed to find near duplicates, not to read the dataset
REJECT_SCHEMA = pa.schema(dict.fromkeys(("source", "stage", "reason", "detail"), pa.string()))


@dataclass(frozen=True)
class Published:
    """What a dataset holds now; ``changed`` names the files that had to be written, ``fingerprint`` the version."""

    counts: dict[str, int]
    reasons: Counter[str]
    warnings: list[str]
    changed: list[str]
    fingerprint: str


def publish(plan: Plan, parts: Mapping[Unit, Part], report: str) -> Published:
    """Write the index and what belongs to it from ``parts``, the committed units of the plan.

    Nothing is joined where the last publication was made from the same. Raises DataError, and publishes nothing but
    ``report``, when nothing was accepted or too much was refused (`gate`).
    """
    storage = open_storage(plan.config.output)
    manifest = last_publication.file_hash(storage, MANIFEST)
    inputs = last_publication.inputs_hash(plan, parts, manifest, Path(plan.config.source) / TRUTH_NAME)
    last = last_publication.recall(storage, inputs)
    if last and (TRUTH_NAME in last["files"] or not storage.exists(TRUTH_NAME)):
        return Published(last["counts"], Counter(last["reasons"]), last["warnings"], [], last["fingerprint"])
    table, rejects = collect(plan, parts)
    gate(plan.config, rejects, plan.seen, report)
    truth = map_truth(plan, table["key"])
    info = describe(plan, parts, table, len(rejects))
    warnings = warn(table, info["buckets"])
    table = table.drop_columns(list(HIDDEN_COLUMNS)).replace_schema_metadata({SPLIT_RULES: split_rules(plan.config)})
    files = {INDEX: parquet_bytes(table), REJECTS: parquet_bytes(reject_table(rejects))}
    if truth is not None:
        files[TRUTH_NAME] = parquet_bytes(truth)
    info["hashes"] = {name: sha256_bytes(data) for name, data in files.items()}
    info["hashes"][MANIFEST] = manifest
    info["fingerprint"] = fingerprint_of(info)
    files[DATASET] = canonical_json(info).encode()
    if storage.read_if_there(DATASET) != files[DATASET]:
        keep_version(storage, parts)
    if truth is None:
        storage.delete(TRUTH_NAME)
    changed = [name for name, data in files.items() if _write_if_changed(storage, name, data)]
    reasons = Counter(reject.reason for reject in rejects)
    outcome = {"counts": info["counts"], "reasons": reasons, "warnings": warnings, "fingerprint": info["fingerprint"]}
    last_publication.remember(storage, inputs, parts, outcome)
    return Published(info["counts"], reasons, warnings, changed, info["fingerprint"])


def _write_if_changed(storage: Storage, name: str, data: bytes) -> bool:
    if storage.exists(name) and storage.read(name) == data:
        return False
    storage.write(name, data)
    fault(f"publish.after_{Path(name).stem}")
    return True


def collect(plan: Plan, parts: Mapping[Unit, Part]) -> tuple[pa.Table, list[Reject]]:
    """Return the index (with the columns that stay in the parts) and everything that was refused."""
    rejects = list(plan.rejects)
    for unit, part in parts.items():
        rejects += [Reject(plan.sources[item.key].name, unit.layer, item.reason, item.detail) for item in part.rejects]
    storage, table = open_storage(plan.config.output), join_layers(plan, parts)
    if plan.excluded:
        out = pc.is_in(table["key"], value_set=pa.array(sorted(plan.excluded), pa.string()))
        detail = "taken out with nanodit prep exclude"
        rejects += [Reject(name, "publish", EXCLUDED, detail) for name in table.filter(out)["source"].to_pylist()]
        table = table.filter(pc.invert(out))
    published = published_split(storage, plan.config)
    named = name_groups(plan.config, dict(zip(table["key"].to_pylist(), table["source"].to_pylist())))
    if len(table) and (cosine := cls_cosine(plan.config)) < duplicates.OFF:
        with compared_tokens(storage, table, cosine, write=True) as alike:
            table, linking = add_split(plan.config, table, published, alike, named)
    else:
        table, linking = add_split(plan.config, table, published, named=named)
    detail = "its near duplicates are published in train and in holdout"
    rejects += [Reject(plan.sources[key].name, "split", LINKS_SPLITS, detail) for key in linking]
    told = pa.array([reject.source for reject in rejects], pa.string())
    members = pa.array((plan.sources[key].name for keys in plan.shards.values() for key in keys), pa.string())
    silent = pc.invert(pc.or_(pc.is_in(members, value_set=told), pc.is_in(members, value_set=table["source"])))
    if lost := members.filter(silent).to_pylist():
        raise DataError(
            f"nothing was published: {len(lost)} samples are neither complete nor refused, for example "
            f"{', '.join(lost[:NAMED])}. Run: nanodit prep verify --repair, then nanodit prep run"
        )
    return table, rejects


def is_damage(reject: Reject, config: PrepConfig) -> bool:
    """Tell whether a refused source says that something is wrong with the folder or the machine.

    Not so are hidden files (a Mac leaves one beside every picture), second copies, what the filters are set to leave
    out, and images without a caption where ``captions.on_missing`` is to leave them out.
    """
    return reject.reason not in NO_DAMAGE and (reject.stage != "text" or config.captions.generated)


def gate(config: PrepConfig, rejects: list[Reject], seen: int, report: str | None) -> None:
    """Raise DataError when nothing was accepted or more than ``max_reject_rate`` of the sources was refused.

    A source counts once, however many layers refused it. What is no damage does not count (:func:`is_damage`), unless
    there is nothing else. The refused sources are then written to ``report``, a file of the output, because no table of
    them will be published; None writes nothing.
    """
    refused = rejects
    rejects = [reject for reject in refused if is_damage(reject, config)]
    seen -= len({reject.source for reject in refused} - {reject.source for reject in rejects})
    if not seen:
        rejects, seen = refused, len(refused)
    count = len({reject.source for reject in rejects})
    if not (count >= seen or count > config.max_reject_rate * seen):
        return
    counts = ", ".join(f"{times} {name}" for name, times in Counter(reject.reason for reject in rejects).most_common())
    examples = "; ".join(f"{reject.source}: {reject.detail}" for reject in rejects[:NAMED])
    numbers = f"{count} of {seen} sources were rejected ({counts}), for example {examples}"
    if report is not None:
        storage = open_storage(config.output)
        storage.write(report, parquet_bytes(reject_table(refused)))
        numbers += f". All are in {storage.where(report)}"
    if count >= seen:
        raise DataError(f"nothing was accepted, so nothing was published: {numbers}")
    raise DataError(
        f"nothing was published: {numbers}. The share is above max_reject_rate {config.max_reject_rate}; "
        "repair the sources or raise max_reject_rate"
    )


def reject_table(rejects: list[Reject]) -> pa.Table:
    """Refused sources as a table, sorted by source and stage."""
    rows = sorted(rejects, key=lambda reject: (reject.source, reject.stage))
    columns = [pa.array([getattr(row, name) for row in rows], pa.string()) for name in REJECT_SCHEMA.names]
    return pa.Table.from_arrays(columns, schema=REJECT_SCHEMA)


def join_layers(plan: Plan, parts: Mapping[Unit, Part]) -> pa.Table:
    """One row for every sample that is complete in every layer, sorted by key: its place, its crop, what layers say."""
    units = {layer: [unit for unit in parts if unit.layer == layer] for layer in plan.config.active_layers}
    samples, complete = plan.table(), True
    for members in units.values():
        keys = pa.chunked_array([parts[unit].table["key"].combine_chunks() for unit in members], pa.string())
        complete = pc.and_(complete, pc.is_in(samples["key"], value_set=keys))
    described = describe_samples(samples.filter(complete))
    # what people look at comes first, where the bytes are last
    columns: dict[str, pa.Array] = {}
    located: dict[str, pa.Array] = {}
    with Progress("index", sum(map(len, units.values())), "units") as progress:
        for layer, members in units.items():
            recipe = parts[members[-1]].recipe
            told, places = [*LAYERS[layer].columns_of(recipe)], [*member_columns(layer, recipe)]
            read = read_columns(plan, parts, members, ["key", *told, *places], progress)
            rows = pc.index_in(described["key"], value_set=read.pop("key")).combine_chunks()
            columns |= {name: _take(read.pop(name), rows) for name in told}
            fingerprints = pa.array([parts[unit].fingerprint for unit in members], pa.string())
            unit_of = np.repeat(np.arange(len(members)), [len(parts[unit].table) for unit in members])
            located[f"{layer}/fingerprint"] = fingerprints.take(pa.array(unit_of).take(rows))
            located |= {name: _take(read.pop(name), rows) for name in places}
    for name, column in (columns | located).items():
        described = described.append_column(name, column)
    return described


def read_columns(
    plan: Plan, parts: Mapping[Unit, Part], units: Sequence[Unit], names: Sequence[str], progress: Progress
) -> dict[str, pa.ChunkedArray]:
    """Read some columns of committed parts, by name. Raises DataError for a part that has changed since the plan."""
    storage = open_storage(plan.config.output)
    chunks: dict[str, list[pa.Array]] = {name: [] for name in names}

    def read(unit: Unit) -> pa.Table:
        part = read_part(storage, unit, names, parts[unit].sha256)
        if part is None or part.sha256 != parts[unit].sha256:
            raise DataError(f"{storage.where(unit.part)} has changed since the run began. Run nanodit prep run again")
        return part.table

    with ThreadPoolExecutor(max_workers=REQUESTS) as pool:
        for start in range(0, len(units), BLOCK):
            for table in pool.map(read, units[start : start + BLOCK]):
                for name in names:
                    chunks[name] += table[name].chunks
            progress.advance(len(units[start : start + BLOCK]))
    schema = part_schema(units[0].layer, parts[units[-1]].recipe)
    return {name: pa.chunked_array(chunks.pop(name), type=schema.field(name).type) for name in names}


def _take(column: pa.ChunkedArray, rows: pa.Array) -> pa.Array | pa.ChunkedArray:
    """Return some rows, as one array where it can be: how a column lies in chunks decides the bytes of its file."""
    large = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}.get(column.type)
    if large is None or column.nbytes < ONE_ARRAY:
        return column.combine_chunks().take(rows)
    taken = column.cast(large).combine_chunks().take(rows)
    most = max(1, len(taken) * ONE_ARRAY // (2 * taken.nbytes))
    pieces = [taken.slice(start, most).cast(column.type) for start in range(0, len(taken), most)]
    return pa.chunked_array(pieces, column.type)


def describe_samples(samples: pa.Table) -> pa.Table:
    """Return the columns of the index that follow from the sources alone."""
    width, height = (samples[name].to_numpy().astype(np.float64) for name in ("width", "height"))
    buckets = samples["bucket"].combine_chunks().dictionary_encode()
    parsed = [Bucket.parse(name) for name in buckets.dictionary.to_pylist()]
    sides = np.array([(bucket.width, bucket.height) for bucket in parsed], np.float64).reshape(-1, 2)
    table = samples.select(["key", "source", "bucket", "shard", "width", "height"])
    for name, values in zip(CROP_COLUMNS, crop_boxes(width, height, *sides[buckets.indices.to_numpy()].T)):
        table = table.append_column(name, pa.array(values))
    return table


def map_truth(plan: Plan, published: pa.ChunkedArray) -> pa.Table | None:
    """Map the truth table of built-in figures by key, joints and box, to pixels of the crop; None without one.

    A joint outside the crop is not visible (visibility 0), the box is clipped to the crop.
    """
    path = Path(plan.config.source) / TRUTH_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    keys = set(published.to_pylist())
    by_name = {source.name: source for key, source in plan.sources.items() if key in keys}
    places = {key: Bucket.parse(bucket) for (bucket, _), members in plan.shards.items() for key in members}
    table = read_parquet(data)
    rows = []
    for row in table.to_pylist():
        source = by_name.get(row.pop("file"))
        if source is None:
            continue
        bucket = places[source.key]
        crop = centre_crop(source.width, source.height, bucket)
        origin, limit = np.array([crop.left, crop.top]), np.array([bucket.width, bucket.height])
        joints = np.array(row["keypoints"], np.float64).reshape(-1, 3)
        joints[:, :2] = (joints[:, :2] - origin) * crop.scale
        joints[((joints[:, :2] < 0) | (joints[:, :2] > limit)).any(axis=1), 2] = 0
        corners = (np.array(row["box"], np.float64).reshape(2, 2) - origin) * crop.scale
        row |= {"keypoints": joints.ravel().astype(np.float32), "width": bucket.width, "height": bucket.height}
        row |= {"key": source.key, "box": np.clip(corners, 0, limit).ravel().astype(np.float32)}
        rows.append(row)
    fields = [pa.field("key", pa.string()), *(field for field in table.schema if field.name != "file")]
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["key"]), schema=pa.schema(fields))


def describe(plan: Plan, parts: Mapping[Unit, Part], table: pa.Table, rejects: int) -> dict[str, Any]:
    """Return the content of dataset.json but for hashes and fingerprint; no path, time or host in it."""
    config = plan.config
    shards = Counter(bucket for bucket, _ in plan.shards)
    samples, sides = count_values(table["bucket"]), count_values(table["split"])
    layers = {}
    for layer in config.active_layers:
        units = [unit for unit in parts if unit.layer == layer]
        # shards whose captions all came with the images say nothing of the model that wrote others
        units.sort(key=lambda unit: parts[unit].recipe.get("backend") == "sidecar")
        recipe = {
            name: value
            for name, value in parts[units[0]].recipe.items()
            if name in ("code", "format", "flip", "short", "encoder", "backend")
        }
        described = {"fingerprint": fingerprint_of(recipe), **recipe, **parts[units[0]].facts}
        if "encoder" in recipe:
            described["model"] = model_name(config, layer, recipe["encoder"])
        if layer == "t5" and config.t5.words is not None:
            described["words"] = known_words(config.t5.words)  # by which the T5 is built again, to draw from a text
        layers[layer] = described
    return {
        "schema": SCHEMA_VERSION,
        "base": config.base,
        "encoders": config.encoders,
        "buckets": {
            str(bucket): {"samples": samples[str(bucket)], "shards": shards[str(bucket)]}
            for bucket in buckets_for(config.base)
            if shards[str(bucket)]
        },
        "counts": {
            "samples": len(table),
            "train": sides["train"],
            "holdout": sides["holdout"],
            "rejects": rejects,
        },
        "layers": layers,
        **({"flips": True} if config.flips else {}),
        "stages": {
            "source": {
                "image": config.image.model_dump(),
                "filters": config.filters.model_dump(),
                "captions": config.captions.recorded(),
            },
            "shards": {"shard_size": config.shard_size},
            "split": {
                "code": duplicates.CODE_VERSION,
                "seed": config.seed,
                "holdout": config.holdout,
                "holdout_min": config.holdout_min,
                "cls_cosine": cls_cosine(config),
                "altered": altered.CODE_VERSION,
                "altered_cosine": config.duplicates.altered_cosine,
                "parts": holdout.CODE_VERSION,
                **config.split.model_dump(exclude={"csv"}, exclude_none=True),  # a path is no part of a dataset
            },
        },
    }
