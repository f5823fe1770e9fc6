"""What a run would take, before it starts: which layers of how many shards, why, where, how long and how many GB.

Sizes and rates are those measured in the dataset where there are any, else built-in estimates, which are labelled so.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nanodit.console import data_size, duration
from nanodit.errors import ResourceError
from nanodit.storage import Storage, open_storage
from prep.captions.cache import CACHED_BY, FOLDER, CaptionCache
from prep.config import PrepConfig
from prep.dataset.buckets import Bucket
from prep.dataset.layers import FULL_SIDE, LAYERS, SHORT_SHARE, SHORT_TOKENS, T5_TOKENS
from prep.dataset.layout import Unit
from prep.dataset.versions import DATASET, REQUESTS
from prep.passes.placement import Pass
from prep.passes.plan import Plan

DEMO_RATE = 20.0
DEVICES = {"cpu": "CPU", "cuda": "GPU", "captions": "caption slot"}
TAR = re.compile(r"bucket_(\d+x\d+)/shard-(\d+)\.\w+\.tar")
# what differs between the recipes of two text units that have the same long captions
SHORT_CHANGES = ("short", "short_prompt", "checks.short_min_words", "checks.short_max_words")
BLOCK = 512  # of a tar: a header for every member, and its data rounded up


@dataclass(frozen=True)
class CostLine:
    """What one layer takes: ``seconds`` of waiting, ``gb`` to be written; ``measured`` says which of the two are."""

    layer: str
    shards: int
    samples: int
    why: str
    device: str
    actors: int
    seconds: float
    gb: float
    measured: frozenset[str]


def estimate(plan: Plan, passes: Sequence[Pass], storage: Storage | str | Path) -> list[CostLine]:
    """One line per layer with something missing, in the order of the passes."""
    storage = open_storage(storage)
    rates = measured_rates(storage)
    sizes = measured_sizes(plan)
    lines = []
    for step in passes:
        for layer in step.layers:
            units = [unit for unit in plan.missing if unit.layer == layer]
            if not units:
                continue
            counts = {unit: len(plan.shards[unit.bucket, unit.shard]) for unit in units}
            samples = sum(counts.values())
            rate = rates.get((layer, step.device)) or estimated_rate(plan.config, layer, step)
            asked, why = samples, reasons(plan, layer)
            workers = min(step.actors, len(units))
            if step.device == "captions":  # images, not shards, are handed out
                asked -= sum(len(plan.recipes[unit].get("captions", ())) for unit in units)
                short = short_share(plan.config, layer)
                cached = cached_captions(plan, storage, units)
                asked -= cached / (1 + short)  # of a cached long caption the short one may be asked for all the same
                workers, why = step.actors, f"{why}; {cached} captions are cached" if cached else why
            elif layer == "t5":  # the features of the long captions are taken from the unit
                short = short_share(plan.config, layer)
                asked -= sum(counts[unit] for unit in units if only_short_is_new(plan, unit)) / (1 + short)
            known = {"seconds"} if (layer, step.device) in rates else set()
            known |= {"gb"} if layer in sizes else set()
            written = sum(
                count * (sizes.get(layer) or sample_bytes(plan.config, layer, unit.bucket))
                for unit, count in counts.items()
            )
            lines.append(
                CostLine(
                    layer,
                    len(units),
                    samples,
                    why,
                    step.device,
                    step.actors,
                    asked / rate / max(1, workers),
                    written / 1e9,
                    frozenset(known),
                )
            )
    return lines


def table(lines: Sequence[CostLine], free_gb: float | None = None) -> list[str]:
    """Write the lines as text with their totals; ``free_gb`` is what is free at the output (None: nobody knows)."""
    if not lines:
        return ["nothing to compute: every layer of every shard is current"]
    rows = [("layer", "shards", "samples", "on", "time", "size", "why")]
    for line in lines:
        where = DEVICES[line.device]
        time = duration(line.seconds) + _label("seconds" in line.measured)
        size = data_size(1e9 * line.gb) + _label("gb" in line.measured)
        rows.append((line.layer, str(line.shards), str(line.samples), f"{line.actors} x {where}", time, size, line.why))
    guessed = _label(all("seconds" in line.measured for line in lines))
    total = duration(sum(line.seconds for line in lines)) + guessed
    size = data_size(1e9 * sum(line.gb for line in lines)) + _label(all("gb" in line.measured for line in lines))
    room = "" if free_gb is None else f"{data_size(1e9 * free_gb)} free at the output"
    rows.append(("total", "", "", "", total, size, room))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def pass_times(lines: Sequence[CostLine], passes: Sequence[Pass]) -> list[str]:
    """Say of each pass on what it runs and how long it takes, layer by layer; no line where there is only one pass."""
    by_layer = {line.layer: line for line in lines}
    found = []
    for step in passes:
        if parts := [by_layer[layer] for layer in step.layers if layer in by_layer]:
            times = {line.layer: line.seconds for line in parts}
            guessed = _label(all("seconds" in line.measured for line in parts))
            found.append(f"{_times(times)}{guessed} on {_workers(step)}")
    return [f"pass {number} of {len(found)}: {text}" for number, text in enumerate(found, 1)] if len(found) > 1 else []


def foreseen_times(config: PrepConfig, passes: Sequence[Pass], samples: int) -> list[str]:
    """Say of each pass on what it runs and how long so many samples take, by the built-in rates."""
    return [
        f"{_times({layer: samples / estimated_rate(config, layer, step) / step.actors for layer in step.layers})} on "
        f"{_workers(step)}"
        for step in passes
    ]


def _times(seconds: Mapping[str, float]) -> str:
    parts = " + ".join(f"{layer} {duration(taken)}" for layer, taken in seconds.items())
    return parts if len(seconds) == 1 else f"{parts} = {duration(sum(seconds.values()))}"


def _workers(step: Pass) -> str:
    return f"{step.actors} x {DEVICES[step.device]}"


def _label(measured: bool) -> str:
    return "" if measured else " (estimate)"


def reasons(plan: Plan, layer: str) -> str:
    """Why the units of a layer are computed, the most frequent reason first."""
    counts = Counter(reason for unit, reason in plan.missing.items() if unit.layer == layer)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{reason} ({count})" for reason, count in counts.most_common())


def cached_captions(plan: Plan, storage: Storage, units: Sequence[Unit]) -> int:
    """How many samples of some text units have been captioned already, by the model and with the options of now."""
    recipe = next((plan.recipes[unit] for unit in units if "digest" in plan.recipes[unit]), None)
    if recipe is None:
        return 0
    cache = CaptionCache(storage, {name: recipe[name] for name in CACHED_BY})
    there = set(storage.names(f"{FOLDER}/"))
    open_ = [
        key
        for unit in units
        for key in plan.shards[unit.bucket, unit.shard]
        if key not in plan.recipes[unit].get("captions", ())
    ]
    return sum(cache.name(key) in there for key in open_)


def measured_rates(storage: Storage) -> dict[tuple[str, str], float]:
    """Return samples a second and worker by (layer, device), as the runs of this dataset logged them."""
    samples: dict[tuple[str, str], int] = defaultdict(int)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for name in storage.names("runs/"):
        if not name.endswith("/log.jsonl"):
            continue
        for text in storage.read(name).decode(errors="replace").splitlines():
            try:
                event = json.loads(text)
            except ValueError:
                continue  # the last line of a killed run
            for unit in event.get("units", ()) if event.get("event") == "shard" else ():
                key = unit["layer"], unit.get("device", "cpu")
                samples[key] += unit["samples"]
                seconds[key] += unit["seconds"]
    return {key: samples[key] / seconds[key] for key in samples if samples[key] and seconds[key] > 0}


def measured_sizes(plan: Plan) -> dict[str, float]:
    """Bytes a sample by layer, from the units that are current."""
    written: dict[str, int] = defaultdict(int)
    samples: dict[str, int] = defaultdict(int)
    for unit, part in plan.parts.items():
        written[unit.layer] += part.tar_bytes
        samples[unit.layer] += part.table.num_rows
    return {layer: written[layer] / samples[layer] for layer in written if samples[layer]}


def estimated_rate(config: PrepConfig, layer: str, step: Pass) -> float:
    """Return samples a second of one worker; on a GPU of its fraction of a card, as far as its CPUs prepare so many."""
    record = LAYERS[layer]
    rate = record.rates[step.device]
    rate /= record.work(config) * _views(config, layer)
    if step.device == "captions" or record.encoder:
        rate /= 1 + short_share(config, layer)
    if not record.encoder:
        return rate
    if config.encoders == "demo":
        return DEMO_RATE
    if step.device != "cuda":
        return rate
    beside = record.encoder.beside_ms * _views(config, layer) * (config.base / FULL_SIDE) ** 2 / 1000
    return min(rate * step.gpus, step.cpus / beside) if beside else rate * step.gpus


def _views(config: PrepConfig, layer: str) -> int:
    """How many samples one is to an encoder: the mirrored crop is another."""
    return 2 if config.flips and LAYERS[layer].encoder and LAYERS[layer].flip else 1


def short_share(config: PrepConfig, layer: str) -> float:
    """Return how much of a long caption's work a short one is, to a caption server or to T5; 0 where there is none."""
    return {"text": SHORT_SHARE, "t5": SHORT_TOKENS / T5_TOKENS}.get(layer, 0.0) if config.captions.short else 0.0


def only_short_is_new(plan: Plan, unit: Unit) -> bool:
    """Tell whether the T5 features of a unit are computed for nothing but short captions that were not there before."""
    text = plan.missing.get(Unit(unit.bucket, unit.shard, "text"), "")
    changed = {name for why in (text, plan.missing[unit]) for name in why.removeprefix("changed: ").split(", ")}
    return "short" in changed and changed <= {"text layer", *SHORT_CHANGES}


def sample_bytes(config: PrepConfig, layer: str, bucket: str) -> float:
    """Estimated bytes that one sample takes in the tar of a layer."""
    return _members(*LAYERS[layer].sizes(config, Bucket.parse(bucket)))


def _members(*sizes: float) -> float:
    return sum(BLOCK + BLOCK * math.ceil(size / BLOCK) for size in sizes)


def bytes_needed(plan: Plan) -> dict[str, float]:
    """Bytes by layer that computing what is missing adds to the output, less replaced tars that are not kept."""
    sizes, storage = measured_sizes(plan), open_storage(plan.config.output)
    replaced = storage.is_local and not storage.exists(DATASET)  # what was published stays for its readers
    needed: dict[str, float] = defaultdict(float)
    for unit in plan.missing:
        each = sizes.get(unit.layer) or sample_bytes(plan.config, unit.layer, unit.bucket)
        needed[unit.layer] += each * len(plan.shards[unit.bucket, unit.shard])
        if replaced:
            needed[unit.layer] -= storage.size(unit.tar) or 0
    return dict(needed)


def kept_bytes(plan: Plan) -> int:
    """Bytes of published tars that a run replaces or prunes, and keeps for those who read the present version."""
    storage = open_storage(plan.config.output)
    if not storage.exists(DATASET):
        return 0
    there = set(storage.names("bucket_"))
    tars = {unit.tar for unit in plan.missing}
    tars |= {tar for tar in there if (match := TAR.fullmatch(tar)) and (match[1], int(match[2])) not in plan.shards}
    with ThreadPoolExecutor(max_workers=REQUESTS) as pool:
        return sum(size or 0 for size in pool.map(storage.size, tars & there))


def kept_line(plan: Plan) -> list[str]:
    """Say how much room what is kept takes; no line where nothing is."""
    if not (kept := kept_bytes(plan)):
        return []
    return [
        f"keeps {data_size(kept)} of the present version for those who read it; nanodit prep versions "
        f"{plan.config.output} --drop FINGERPRINT frees them later"
    ]


def free_bytes(storage: Storage) -> int | None:
    """Bytes that may still be written at a place; None for an object store, which does not say."""
    if not storage.is_local:
        return None
    folder = Path(storage.place).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def check_room(plan: Plan) -> None:
    """Raise ResourceError, with the numbers, when what is missing cannot fit at the output."""
    storage, needed = open_storage(plan.config.output), bytes_needed(plan)
    free, total = free_bytes(storage), sum(needed.values())
    if free is None or total <= free:
        return
    layers = ", ".join(f"{layer} {data_size(count)}" for layer, count in needed.items())
    raise ResourceError(
        f"output {storage} has {data_size(free)} free, and what is missing takes about {data_size(total)} "
        f"({layers}). Make room, choose another output, or write less: image.format=jpeg, a smaller base, fewer layers"
    )
