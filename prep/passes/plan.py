"""The plan of a run: which sample is in which shard, what every unit is made from, and which units are missing and why.

Nothing is computed here. A unit is current when its index part carries the recipe that the config, the sources and the
code ask for now; a recipe names its upstream's fingerprint, so a change reaches exactly what depends on it.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pillow_heif
import pyarrow as pa
import pyarrow.compute as pc

from nanodit.console import Progress, waiting
from nanodit.errors import ConfigError, DataError, ResourceError
from nanodit.files import sha256_bytes
from nanodit.storage import Storage, open_storage
from prep.captions.written import read_written
from prep.config import PrepConfig
from prep.dataset.excluded import read_excluded
from prep.dataset.layers import ENCODER_LAYERS, LAYERS, SOURCE
from prep.dataset.layout import Part, Unit, fingerprint_of, parquet_bytes, read_parquet, read_part, same_recipe
from prep.dataset.versions import keep_version
from prep.encoders.registry import encoder_fingerprint
from prep.images.filters import crop_remarks, filter_recipe
from prep.images.scan import Reject, scan
from prep.images.scan_cache import ReadAhead, ScanCache
from prep.images.sources import Source
from prep.passes.fitting import judge_sizes
from prep.passes.grouping import check_table, group_remarks
from prep.passes.last_publication import known_parts
from prep.passes.layers import ShardTask
from prep.passes.missing_sources import (
    committed_caption_hashes,
    compare_sources,
    is_as_planned,
    refuse_to_prune,
    source_remarks,
    units_behind,
    units_to_make_again,
    unlisted_remark,
    unusual_names,
    whole_for_good,
    worth_keeping,
)
from prep.passes.sidecars import has_caption, read_captions, text_recipe

REDUCED = 1  # raised when reduced decoding gives other pixels
SCAN_VERSION = 6  # raised when the same sources give other rows

UNTIL_THE_RUN = "unknown until the run"  # a digest that only a server tells which a run starts
MANIFEST = "manifest.parquet"
MANIFEST_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "source": pa.string(),
        "size_bytes": pa.int64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "bucket": pa.string(),
        "shard": pa.int32(),
    }
)
PX_PART = re.compile(r"parts/bucket_(\d+x\d+)-shard-(\d{6,})\.px\.parquet")
NAMED = 5  # how many examples an error lists
REQUESTS = 16  # to an object store at a time; each waits for the network


@dataclass(frozen=True)
class Plan:
    """What a run has to do.

    ``sources`` maps keys to usable sources, ``shards`` maps (bucket, number) to the sorted keys of its members,
    ``rejects`` has what was refused so far, ``expected`` what the text layer is going to refuse (its units record it),
    ``seen`` counts the files looked at. ``recipes`` says what every unit must be made from, ``parts`` holds the units
    that are current and ``missing`` the reason for every one that is not. ``again`` lists those of the missing whose
    committed part has the right recipe; it stays until the new one is committed. What is missing when the missing units
    are computed, because a layer that they are made from has got other samples, says :func:`remaining`. ``notes`` are
    lines for the user. ``excluded`` has the keys that publishing leaves out.
    """

    config: PrepConfig
    sources: dict[str, Source]
    shards: dict[tuple[str, int], list[str]]
    rejects: list[Reject]
    expected: list[Reject]
    seen: int
    recipes: dict[Unit, dict[str, Any]]
    parts: dict[Unit, Part]
    missing: dict[Unit, str]
    again: list[Unit]
    notes: list[str]
    excluded: frozenset[str] = frozenset()

    def table(self) -> pa.Table:
        """Return the samples, sorted by key, with their place; the columns are those of ``MANIFEST_SCHEMA``."""
        sizes = [len(keys) for keys in self.shards.values()]
        keys = [key for members in self.shards.values() for key in members]
        samples = [self.sources[key] for key in keys]
        columns = [
            keys,
            [source.name for source in samples],
            [source.size_bytes for source in samples],
            [source.width for source in samples],
            [source.height for source in samples],
            np.repeat(np.array([bucket for bucket, _ in self.shards], object), sizes),
            np.repeat(np.array([shard for _, shard in self.shards], np.int32), sizes),
        ]
        arrays = [pa.array(values, field.type) for field, values in zip(MANIFEST_SCHEMA, columns)]
        table = pa.Table.from_arrays(arrays, schema=MANIFEST_SCHEMA)
        return table.take(pc.sort_indices(table["key"]))

    def tasks(self, layers: tuple[str, ...]) -> list[ShardTask]:
        """Group the missing units of some layers by shard; those with most to do first, so that all end together."""
        wanted: dict[tuple[str, int], dict[str, Any]] = defaultdict(dict)
        again: dict[tuple[str, int], list[str]] = defaultdict(list)
        for unit in self.missing:  # in the order of the data flow within a shard
            if unit.layer in layers:
                wanted[unit.bucket, unit.shard][unit.layer] = self.recipes[unit]
        for unit in self.again:
            again[unit.bucket, unit.shard].append(unit.layer)
        tasks = []
        for place, recipes in wanted.items():
            members = tuple(self.sources[key] for key in self.shards[place])
            layers_again = tuple(layer for layer in recipes if layer in again[place])
            tasks.append(ShardTask(*place, members, recipes, layers_again))
        return sorted(tasks, key=lambda task: (-len(task.sources) * len(task.recipes), task.bucket, task.shard))

    def explain(self) -> list[str]:
        """Yield the notes, then one line per layer and reason: how many shards are computed, and why."""
        lines = []
        for layer in self.config.active_layers:
            reasons = Counter(reason for unit, reason in self.missing.items() if unit.layer == layer)
            for reason, count in sorted(reasons.items()):
                lines.append(f"{layer}: {count} of {len(self.shards)} shards: {reason}")
        return self.notes + (lines or ["nothing to compute: every layer of every shard is current"])


def make_plan(
    config: PrepConfig, prune: bool = False, retry_rejects: bool = False, ahead: ReadAhead | None = None
) -> Plan:
    """Look at the sources and at what is committed. Raises DataError for an empty folder and for missing captions.

    Samples whose source is gone stay, unless ``prune``; those whose source cannot be read stay in any case, and
    ``prune`` raises ResourceError where a folder cannot be listed. ``retry_rejects`` makes the units again that refused
    something. ``ahead`` reads new sources where they are many (:meth:`prep.images.scan_cache.ScanCache.look_all`).
    """
    check_folders(config)
    check_table(config)
    folder, root = Path(config.source), open_storage(config.output)
    manifest = read_manifest(root)
    with ScanCache(root, folder, scan_settings(config)) as cache:
        look_all, captioned = partial(cache.look_all, ahead=ahead), partial(has_caption, config)
        found = scan(folder, config.image.max_pixels, look_all, captioned, unusual_names(manifest))
        if not found.sources and not found.rejects:
            others = f" ({found.others})" if found.others else ""
            raise DataError(f"source {folder} holds no images{others}. Set source=FOLDER to where the images are")
        missing = compare_sources(manifest, found)
        if prune and len(manifest):
            refuse_to_prune(found.rejects, config.source)
        gone, away = worth_keeping(root, missing.gone), worth_keeping(root, missing.away)
        kept = away if prune else [*gone, *away]
        fitting = judge_sizes(config, chain(found.sources, kept))
        sources, buckets = fitting.sources, fitting.buckets
        rejects = found.rejects + fitting.rejects
        shards = assign_shards(buckets, earlier_places(root, manifest, buckets), config.shard_size)
        del manifest
        buckets.clear()  # a hundred MB each of a million samples
        texts = [Unit(*place, "text") for place in shards if "text" in config.active_layers]

        def committed_captions(keys: set[str]) -> dict[str, str]:
            units = [unit for unit in texts if not keys.isdisjoint(shards[unit.bucket, unit.shard])]
            return committed_caption_hashes(read_parts(root, units))

        written = read_written(root) if config.captions.generated else {}
        captions, expected, kept_captions = read_captions(config, sources, committed_captions, cache.look_all, written)
        parts = read_parts(root, texts) if config.captions.generated else {}
        complete = sources.keys() <= captions.keys()
        generated, silent = ({}, []) if complete else generated_captions(config, parts)
        if generated and captions:
            silent.append(
                f"{len(captions)} of {len(sources)} images came with a caption; {config.captions.backend} writes the "
                "others (captions.overwrite=true: all of them)"
            )
        large = fitting.large - whole_for_good(shards, sources, fitting.large, partial(read_parts, root))
        recipes = make_recipes(config, shards, captions, generated, large)
        parts = read_parts(root, recipes, recipes)
        reasons = outdated(config, root, recipes, parts)
        current = {unit: part for unit, part in parts.items() if unit not in reasons}

        def is_back(source: Source) -> bool:
            return not source.gone and is_as_planned(source, captions.get(source.key), config, cache)

        again = units_to_make_again(config, current, sources, is_back, retry_rejects)
    reasons = {unit: why for unit in recipes if (why := reasons.get(unit) or again.get(unit))}  # in order
    current = {unit: part for unit, part in parts.items() if unit not in reasons}
    refused = {reject.source for reject in found.rejects}
    seen = len(found.sources) + len(found.rejects) + sum(source.name not in refused for source in kept)
    notes = silent + [found.others] * bool(found.others) + count_rejects(rejects + expected, seen)
    notes += unlisted_remark(rejects) + kept_captions + group_remarks(config, sources)
    notes += [f"warning: {line}" for line in crop_remarks(fitting.cropped)]
    notes += source_remarks(gone, away, missing.replaced, prune, shards, reasons)
    excluded = read_excluded(root).keys & sources.keys()
    if excluded:
        notes.append(f"{len(excluded)} of {len(sources)} samples are excluded (nanodit prep exclude {root} lists them)")
    return Plan(
        config, sources, shards, rejects, expected, seen, recipes, current, reasons, list(again), notes, excluded
    )


def scan_settings(config: PrepConfig) -> dict[str, Any]:
    """Return what the facts of a source depend on besides its bytes."""
    decoders = {"pillow": PIL.__version__, "heif": pillow_heif.libheif_version()}
    return {"code": SCAN_VERSION, **decoders, "max_pixels": config.image.max_pixels}


def remaining(plan: Plan) -> Plan:
    """Return the plan after its missing units were computed: what has to be computed all the same.

    Those are units whose upstream has got other samples, by being made again. The sources are not looked at again.
    """
    root = open_storage(plan.config.output)
    parts = plan.parts | read_parts(root, list(plan.missing))
    reasons = outdated(plan.config, root, plan.recipes, parts)
    current = {unit: part for unit, part in parts.items() if unit not in reasons}
    again = units_behind(plan.config, current)
    reasons = {unit: why for unit in plan.recipes if (why := reasons.get(unit) or again.get(unit))}
    current = {unit: part for unit, part in current.items() if unit not in again}
    return replace(plan, parts=current, missing=reasons, again=list(again), notes=[])


def count_rejects(rejects: Sequence[Reject], seen: int) -> list[str]:
    """Say in one line what is refused before anything is computed; no line when nothing is."""
    counts = ", ".join(f"{count} {name}" for name, count in Counter(reject.reason for reject in rejects).most_common())
    return [f"refused before anything is computed: {len(rejects)} of {seen} sources ({counts})"] if rejects else []


def check_folders(config: PrepConfig) -> None:
    """Refuse, before anything is written, a missing source and an output that would become its own input."""
    source, storage = Path(config.source).resolve(), open_storage(config.output)
    if not source.is_dir():
        raise ConfigError(f"source {config.source} is not a folder. Set source=FOLDER to where the images are")
    if not storage.is_local:
        return
    output = Path(config.output).resolve()
    if output.is_relative_to(source) or source.is_relative_to(output):
        raise ConfigError(f"source {source} and output {output} must not lie inside each other. Choose another output")


def read_parts(
    root: Path | str | Storage, units: Collection[Unit], recipes: Mapping[Unit, dict[str, Any]] | None = None
) -> dict[Unit, Part]:
    """Read the committed parts of some units; their tables have the keys alone.

    Those that have the recipe which is theirs in ``recipes`` share it: recipes name every caption.
    """
    storage, parts = open_storage(root), {}
    known = known_parts(storage) if units else {}

    def read(unit: Unit) -> Part | None:
        part = read_part(storage, unit, ["key"], known.get(unit.part))
        wanted = (recipes or {}).get(unit)
        return replace(part, recipe=wanted) if part and wanted and same_recipe(part.recipe, wanted) else part

    before = pa.table([])
    with Progress("check", len(units), "units") as progress, ThreadPoolExecutor(max_workers=REQUESTS) as pool:
        for unit, part in zip(units, pool.map(read, units)):
            if part is not None:
                if part.table.equals(before):  # the layers of a shard share one table
                    part = replace(part, table=before)
                before, parts[unit] = part.table, part
            progress.advance()
    return parts


def earlier_places(storage: Storage, manifest: pa.Table, buckets: Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """Return the (bucket, shard) of every key of an earlier plan.

    Where that plan has other buckets, it is of another base; when that was given up before it was published, the units
    of the base before are still there and know their members.
    """
    names = manifest["bucket"].combine_chunks().dictionary_encode()
    codes = np.asarray(names.indices).astype(np.int64) << 32 | manifest["shard"].to_numpy()
    codes, rows = np.unique(codes, return_inverse=True)  # one tuple for all samples of a shard
    known = [(names.dictionary[code >> 32].as_py(), code & 0xFFFFFFFF) for code in codes.tolist()]
    places = dict(zip(manifest["key"].to_pylist(), map(known.__getitem__, rows.tolist())))
    moved = {key for key, (bucket, _) in places.items() if buckets.get(key, bucket) != bucket}
    wanted = {buckets[key] for key in moved}
    for name in storage.names("parts/") if moved else ():
        match = PX_PART.fullmatch(name)
        unit = Unit(match[1], int(match[2]), "px") if match and match[1] in wanted else None
        part = read_part(storage, unit, ["key"]) if unit else None
        if part is not None:
            keys = {*part.table["key"].to_pylist(), *(reject.key for reject in part.rejects)}
            places |= {key: (match[1], int(match[2])) for key in keys & moved if buckets[key] == match[1]}
    return places


def assign_shards(
    buckets: Mapping[str, str], previous: Mapping[str, tuple[str, int]], shard_size: int
) -> dict[tuple[str, int], list[str]]:
    """Place samples in shards of their bucket, from (bucket, key) alone.

    ``buckets`` maps keys to bucket names, ``previous`` maps keys to the (bucket, shard) of an earlier run: those stay,
    and new samples fill new shards in key order, so that old shards are untouched. Shards and members come sorted.
    """
    shards: dict[tuple[str, int], list[str]] = defaultdict(list)
    following: dict[str, int] = defaultdict(int)
    for bucket, shard in previous.values():
        following[bucket] = max(following[bucket], shard + 1)
    new: dict[str, list[str]] = defaultdict(list)
    for key in sorted(buckets):
        place = previous.get(key)
        if place and place[0] == buckets[key]:
            shards[place].append(key)
        else:
            new[buckets[key]].append(key)
    for bucket, keys in new.items():
        for position, key in enumerate(keys):
            shards[bucket, following[bucket] + position // shard_size].append(key)
    return dict(sorted(shards.items()))


def generated_captions(config: PrepConfig, parts: Mapping[Unit, Part]) -> tuple[dict[str, Any], list[str]]:
    """Return the recipe of generated captions, and a note when no host answers; empty for sidecars.

    The hosts know which weights the model's name stands for. Where they are down, it is taken to be the weights of the
    captions that are there, so that a finished dataset needs no host. Raises ResourceError where nobody knows; but
    where a run starts the hosts, it is unknown until then.
    """
    if "text" not in config.active_layers or not config.captions.generated:
        return {}, []
    from prep.passes.captions import caption_recipe  # asks the caption hosts

    try:
        return caption_recipe(config), []
    except ResourceError as error:
        name = config.captions.backend, config.captions.model
        recipes = [part.recipe for unit, part in parts.items() if unit.layer == "text"]
        known = {recipe["digest"] for recipe in recipes if (recipe["backend"], recipe.get("model")) == name}
        if len(known) != 1 and not config.captions.own_servers:
            raise
        digest = known.pop() if len(known) == 1 else UNTIL_THE_RUN
        captions = config.captions.model_copy(update={"digest": digest})
        recipe = caption_recipe(config.model_copy(update={"captions": captions}))
        if digest == UNTIL_THE_RUN:
            return recipe, [str(error)]
        return recipe, [f"{error}. Planning with the weights that made the existing captions"]


def make_recipes(
    config: PrepConfig,
    shards: Mapping[tuple[str, int], list[str]],
    captions: Mapping[str, str],
    generated: Mapping[str, Any],
    large: Collection[str] = (),
) -> dict[Unit, dict[str, Any]]:
    """Everything each unit is made from, shard by shard in the order of the data flow.

    ``large`` are the keys of images that are reduced while they are decoded, if they are JPEGs.
    """
    with waiting("loading the code of the encoders", at_once=False):  # folders of models are hashed, demo ones built
        encoded = [layer for layer in config.active_layers if layer in ENCODER_LAYERS]
        encoders = {layer: encoder_fingerprint(config, layer) for layer in encoded}
    recipes: dict[Unit, dict[str, Any]] = {}
    for (bucket, shard), keys in shards.items():
        for layer in config.active_layers:
            recipe: dict[str, Any] = {"layer": layer, "code": LAYERS[layer].code}
            recipe |= filter_recipe(layer, config.filters)
            if config.upstream(layer) == SOURCE:
                recipe |= {"bucket": bucket, "members": sha256_bytes(" ".join(keys).encode())}
                if config.image.format != "webp":  # which recipes need not name, as it was always so
                    recipe["format"] = config.image.format
                if not large.isdisjoint(keys):  # nor this: pixels of other shards are as before
                    recipe["reduced"] = REDUCED
            else:
                recipe["upstream"] = fingerprint_of(recipes[Unit(bucket, shard, config.upstream(layer))])
            if layer == "text":
                recipe |= text_recipe(keys, captions, generated)
            recipe |= LAYERS[layer].switches(config.flips, config.captions.short)
            if layer in encoders:
                recipe["encoder"] = encoders[layer]
            recipes[Unit(bucket, shard, layer)] = recipe
    return recipes


def outdated(
    config: PrepConfig, storage: Storage, recipes: Mapping[Unit, dict[str, Any]], parts: Mapping[Unit, Part]
) -> dict[Unit, str]:
    """Return the units without a part of their recipe, each with its reason."""
    found = {}
    for unit, recipe in recipes.items():
        if why := reason(storage, unit, recipe, parts.get(unit), config.upstream(unit.layer)):
            found[unit] = why
    return found


def reason(storage: Storage, unit: Unit, recipe: dict[str, Any], part: Part | None, upstream: str) -> str:
    """Why a unit has to be computed; empty when it is current. ``upstream`` names the layer that it is made from."""
    if part is None:
        return "its tar or index part is damaged" if storage.exists(unit.part) else "not computed yet"
    if same_recipe(part.recipe, recipe):
        return ""
    old, new = _flat(part.recipe), _flat(recipe)
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if any(name.startswith("captions.") for name in changed):
        changed = [name for name in changed if not name.startswith("captions.")] + ["captions"]
    if "upstream" in changed:
        changed[changed.index("upstream")] = f"{upstream} layer"
    return f"changed: {', '.join(changed)}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: json.dumps(value)}
    return flat


def read_manifest(root: Path | str | Storage) -> pa.Table:
    """Read the samples of an earlier plan, with the columns of ``MANIFEST_SCHEMA``; none before the first."""
    storage = open_storage(root)
    data = storage.read_if_there(MANIFEST)
    if data is None:
        return MANIFEST_SCHEMA.empty_table()
    try:
        return read_parquet(data, schema=MANIFEST_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        path = storage.where(MANIFEST)
        raise DataError(f"{path} is damaged ({error}). Restore it, or delete {storage} and prepare it again") from error


def write_manifest(plan: Plan) -> None:
    """Fix the membership of the shards, before the first unit is computed; the published version is kept before."""
    data = parquet_bytes(plan.table())
    storage = open_storage(plan.config.output)
    changed = storage.read_if_there(MANIFEST) != data
    if changed or plan.missing:
        keep_version(storage, plan.parts)
    if changed:
        storage.write(MANIFEST, data)
