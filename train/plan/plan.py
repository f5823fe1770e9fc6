"""``nanodit train plan``: what a run will need, before anything runs.

Measured is what is called so; everything else is counted (parameters, tokens, FLOPs, bytes), or an estimate from what
is counted, and labelled. A run that cannot fit ends the verb with exit code 4 and what would help, the best first.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from nanodit.config import load_config_with_origins
from nanodit.console import duration, say, waiting
from nanodit.errors import PROBLEM_BREAK, ConfigError, ResourceError, gpu_is_full
from prep.dataset.reader import Dataset
from train.config import TrainConfig
from train.data.batch_plan import BatchPlan, scaled_size
from train.hardware import GPUS
from train.loop.trainer import Trainer
from train.method.sampling import NO_GUIDANCE, SELF_GUIDANCE, Guidance
from train.plan.cost import (
    CARDS,
    Disk,
    PhaseCost,
    disk_of,
    disk_remedies,
    disk_text,
    gb,
    parameters_by_part,
    phase_costs,
    range_on,
    read_rate,
)
from train.plan.feed import Feed, measure_feed
from train.plan.measure import Measured, measure
from train.plan.memory import CONTEXT, FRAGMENTATION, Memory, estimate_memory, meta_trainer
from train.plan.rehearsal import Shapes, StandIn, cache_bytes, open_dataset, sample_sizes
from train.plan.remedies import NOTHING, Room, room_of, shortage
from train.plan.work import FAST, SLOW

MANY_TOKENS = 16_384  # 1024 x 1024 in patches of 8
UNITS = {"GB": 1e9, "GiB": 1 << 30, "MB": 1e6, "MiB": 1 << 20}


@dataclass(frozen=True)
class Estimate:
    """All that ``plan`` found out; ``limit`` is the bytes of the GPU that the run is for, None where none is named.

    Of the GPU that is there it is what other programs leave free; they hold ``held`` bytes.
    """

    config: list[tuple[str, Any, str]]  # key, value, what set it
    dataset: str
    samples: dict[str, Any]
    parameters: Mapping[str, int]
    batches: list[dict[str, Any]]
    notes: list[str]
    phases: list[PhaseCost]
    memory: Memory
    limit: int | None
    measured: Measured | None
    disk: Disk
    reading: dict[str, Any]
    problems: list[str]
    feed: Feed | None = None  # None: not measured
    held: int = 0

    def span(self, card: str) -> tuple[float, float]:
        """Return the least and the most that a card of ``GPUS`` is expected to compute for the run, in seconds."""
        return range_on(GPUS[card], self.phases)

    def seconds(self, card: str) -> float:
        """Return the middle of that range."""
        return sum(self.span(card)) / 2

    def expected(self, card: str) -> float:
        """Return the run's time on a card in this machine: that of the slower of card and loader."""
        return max(self.seconds(card), self.feed_seconds)

    @property
    def feed_seconds(self) -> float:
        """What this machine takes to make all micro-batches; 0 where that was not measured."""
        images = self.samples["images_per_step"] * self.phases[-1].last_step
        return images / self.feed.rate if self.feed else 0.0

    @property
    def measured_seconds(self) -> float | None:
        """The run's time on this machine, from what was measured."""
        if self.measured is None:
            return None
        steps = self.phases[-1].last_step
        flops = sum((p.last_step - p.first_step + 1) * sum(p.flops.values()) for p in self.phases)
        return flops / self.measured.flop_rate + steps * self.measured.update_seconds

    @property
    def peak(self) -> int:
        """Bytes of the GPU: measured where it was, else estimated."""
        return self.measured.peak if self.measured and self.measured.what == "GPU" else self.memory.peak

    def as_json(self) -> str:
        """Return the whole as one JSON document, bytes and seconds as numbers."""
        found = {name: value for name, value in asdict(self).items() if name != "config"}
        found["config"] = [{"key": key, "value": value, "origin": origin} for key, value, origin in self.config]
        found["memory"] |= {"phases": self.memory.phases, "assumed": self.memory.assumed, "peak": self.memory.peak}
        found["seconds"] = {card: self.expected(card) for card in CARDS} | {"measured": self.measured_seconds}
        found["seconds"] |= {"loader": self.feed_seconds}
        found["seconds_range"] = {card: self.span(card) for card in CARDS}  # of the card alone
        found["disk"] |= {"needed": self.disk.needed}
        return json.dumps(found, indent=1)


def plan(
    file: Path,
    overrides: Sequence[str] = (),
    *,
    memory: str | None = None,
    measured: bool = False,
    base: int | None = None,
    as_json: bool = False,
) -> None:
    """Print what a run needs; raises :class:`ResourceError` with ranked remedies where it cannot fit."""
    # of JSON's output nothing else may be part: what is said on the way goes to stderr
    aside = redirect_stdout(sys.stderr) if as_json else nullcontext()
    with aside, waiting("plan: counting and measuring", at_once=False):
        report = look_ahead(file, overrides, memory=memory, measured=measured, base=base, fed=True)
    if as_json:
        print(report.as_json(), flush=True)
    else:
        for line in lines(report):
            say(line)
    if report.problems:
        raise ResourceError(PROBLEM_BREAK.join(report.problems))
    if not as_json:
        say(f"plan: wrote nothing; the run fits {f'in {gb(report.limit)} and ' if report.limit else ''}on the disk")


def look_ahead(
    file: Path,
    overrides: Sequence[str] = (),
    *,
    memory: str | None,
    measured: bool = False,
    base: int | None = None,
    fed: bool = False,
) -> Estimate:
    """Find out what a run needs, and what is wrong with it.

    ``memory`` ("24GB") is the GPU to plan for; without it, it is what is free of the one that is there, on which the
    run is then measured; ``fed`` measures how fast micro-batches are made, too. Raises :class:`ConfigError`, or
    :class:`DataError` for a damaged dataset.
    """
    config, origins = load_config_with_origins(TrainConfig, file, overrides)
    room = None if memory is None else Room(parse_size(memory))
    on_gpu = torch.cuda.is_available() and config.train.device != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    if room is None and on_gpu:
        room, measured = room_of(device), True
    limit = room and room.limit
    dataset, what = open_dataset(config, file, base)
    trainer = meta_trainer(config, dataset)  # which refuses a dataset without training samples
    shapes = Shapes.of(dataset.info, dataset.rows("train"))
    estimate = estimate_memory(trainer, shapes)
    problems, found = [], None
    if measured:
        try:
            found = measure(config, dataset, shapes, device)
        except Exception as error:
            if not gpu_is_full(error):
                raise
            problems.append(shortage(config, dataset, shapes, estimate, room))
    disk = disk_of(trainer)
    report = Estimate(
        config=[(key, value_of(config, key), origin) for key, origin in origins.items()],
        dataset=what,
        samples=_samples(trainer, dataset),
        parameters=parameters_by_part(trainer),
        batches=_batches(trainer.batches.plan),
        notes=_notes(trainer, dataset),
        phases=phase_costs(trainer, shapes),
        memory=estimate,
        limit=limit,
        held=room.held if room else 0,
        measured=found,
        disk=disk,
        reading=_reading(config, dataset),
        problems=problems,
        feed=measure_feed(config, dataset) if fed else None,
    )
    if not problems and limit is not None and report.peak > limit:
        problems.append(shortage(config, dataset, shapes, estimate, room))
    if disk.needed > disk.free:
        problems.append(PROBLEM_BREAK.join([f"{config.output}: {disk_text(disk)}", *disk_remedies(config, disk)]))
    return replace(report, problems=problems)


def parse_size(text: str) -> int:
    """Read "24GB", "8192 MiB" or "24" (GB) as bytes; :class:`ConfigError` otherwise."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", text.strip())
    unit = {name.lower(): size for name, size in UNITS.items()}.get((match.group(2) or "GB").lower()) if match else None
    if unit is None:
        raise ConfigError(f"--memory {text!r}: must be a number and one of {', '.join(UNITS)}, such as 24GB")
    return int(float(match.group(1)) * unit)


def value_of(config: TrainConfig, key: str) -> Any:
    """Return a config's value by its dotted key, as JSON has it."""
    value: Any = config.model_dump(mode="json")
    for name in key.split("."):
        value = value[name]
    return value


# What was found


def _samples(trainer: Trainer, dataset: Any) -> dict[str, Any]:
    config, micro = trainer.config, trainer.batches.plan
    if isinstance(dataset, StandIn):
        return {"kept": None, "held_out": None, "dropped": None, "unseen": None, "images_per_step": micro.images}
    kept = sum(micro.order.sizes.values())
    return {
        "kept": kept,
        "held_out": len(dataset) - kept,
        "dropped": _rejected(dataset),
        "unseen": micro.order.unseen(config.train.steps * micro.slots),
        "images_per_step": micro.images,
        "epochs": config.train.steps * micro.images / kept,
    }


def _rejected(dataset: Dataset) -> int | None:
    counts = dataset.info.get("counts", {})
    return counts.get("rejects")


def _batches(micro: BatchPlan) -> list[dict[str, Any]]:
    found = []
    for scale in micro.scales:
        for bucket, samples in micro.order.sizes.items():
            width, height = size = scaled_size(bucket, scale)
            row = {"scale": scale, "bucket": bucket, "image": f"{width}x{height}", "samples": samples}
            found.append(row | {"tokens": micro.tokens(size), "images": micro.most_images(bucket, scale)})
    return found


def _notes(trainer: Trainer, dataset: Any) -> list[str]:
    config, micro = trainer.config, trainer.batches.plan
    notes = [] if isinstance(dataset, StandIn) else micro.describe(config.train.steps)
    sizes = [scaled_size(bucket, scale) for scale in micro.scales for bucket in micro.order.sizes]
    tokens, size = max((micro.tokens(size), size) for size in sizes)
    if tokens > MANY_TOKENS:
        pixels, common = math.prod(size), math.gcd(*(side for one in sizes for side in one))
        own = config.model.patch_size
        larger = (patch for patch in range(own, common + 1, own) if common % patch == 0)  # those that divide every side
        patch = next((patch for patch in larger if pixels // patch**2 <= MANY_TOKENS), None)
        notes.append(
            f"{tokens:,} tokens for an image of {size[0]}x{size[1]}: attention takes time with their square"
            + (f"; model.patch_size={patch} makes them {pixels // patch**2:,}" if patch else "")
        )
    if config.visual_debug.every_steps:
        guidance = Guidance.of(config.visual_debug.guidance)
        possible = config.tread.enabled and guidance.self_scale == 1
        notes.append(
            f"pictures are drawn with {'no guidance' if guidance == NO_GUIDANCE else f'guidance {guidance}'}"
            + (f"; visual_debug.guidance={{self: {SELF_GUIDANCE:g}}} guides by the routed network" if possible else "")
        )
    if config.checkpoint.every_minutes and config.checkpoint.keep_last is None:
        notes.append("checkpoint.every_minutes without keep_last: writes more checkpoints than are counted here")
    return [*notes, *(line for loss in trainer.losses.values() for line in loss.missing())]


def _reading(config: TrainConfig, dataset: Any) -> dict[str, Any]:
    """Bytes of a sample by layer, those of all, stored and decoded, and how fast the disk is."""
    sizes = sample_sizes(dataset)
    found: dict[str, Any] = {"sample": sizes, "all": None, "disk_rate": None, "cache": config.data.cache_gb * 1e9}
    found["decoded"] = None
    if not isinstance(dataset, StandIn):
        found["all"] = sum(sizes.values()) * len(dataset.rows("train"))
        found["decoded"] = cache_bytes(dataset, config.data)
        if isinstance(dataset.root, Path):
            found["disk_rate"] = read_rate(sorted(dataset.root.glob("bucket_*/*.tar"), key=lambda f: -f.stat().st_size))
    return found


# In words


def lines(report: Estimate) -> list[str]:
    """Return the report as text."""
    return [
        *_table(
            [("config", "", "set by"), *((key, json.dumps(value), origin) for key, value, origin in report.config)]
        ),
        "",
        *_data_lines(report),
        "",
        *_memory_lines(report),
        "",
        *_time_lines(report),
        "",
        *_disk_lines(report),
    ]


def _data_lines(report: Estimate) -> list[str]:
    samples = report.samples
    parts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in report.parameters.items() if "EMA" not in name)
    total = sum(count for name, count in report.parameters.items() if "EMA" not in name)
    images = f"{samples['images_per_step']} images a step"
    known = f"{images}; kept, dropped and unseen samples are known once the dataset exists"
    if samples["kept"] is not None:
        dropped = "" if samples["dropped"] is None else f", {samples['dropped']} sources dropped by prep"
        known = (
            f"{samples['kept']} samples kept for training, {samples['held_out']} held out{dropped}, "
            f"{samples['unseen']} never shown in {samples['epochs']:.1f} epochs of {images}"
        )
    rows = [("bucket", "image", "samples", "tokens", "images in a micro-batch")]
    for row in report.batches:
        values = row["bucket"], row["image"], row["samples"], row["tokens"], row["images"]
        rows.append(tuple(map(str, values)))
    table = [f"parameters {total / 1e6:.1f} M: {parts}", "", f"data: {report.dataset}", known, *report.notes]
    return [*table, *_table(rows)]


def _memory_lines(report: Estimate) -> list[str]:
    memory = report.memory
    steady = f"weights {gb(memory.weights)}, optimiser {gb(memory.optimizer)}, averages {gb(memory.averages)}"
    steady += f", perceptual networks {gb(memory.frozen)}" if memory.frozen else ""
    steady += f", micro-batches on their way {gb(memory.sending)}"
    phases = ", ".join(f"{name} {gb(size)}" for name, size in memory.phases.items())
    found = [
        f"memory of a GPU (estimate): {gb(memory.peak)}",
        f"  always: {steady}",
        f"  micro-step: gradients {gb(memory.gradients)}, activations {gb(memory.activations)} ({memory.largest})",
        f"  peaks: {phases}; and {gb(memory.assumed)} assumed for CUDA ({gb(CONTEXT)}) and fragmentation "
        f"({FRAGMENTATION:.0%})",
    ]
    if measured := report.measured:
        found.append(f"memory of the {measured.what} (measured, {measured.batch}): {gb(measured.peak)}")
    if report.limit is None:
        fitting = [size for size in (8, 12, 16, 24, 32, 48, 80) if memory.peak <= size * 1e9]
        found.append(f"  for a GPU of {fitting[0]} GB or more" if fitting else "  more than a GPU of 80 GB has")
    else:
        held = f", which other programs leave free: they hold {gb(report.held)}" if report.held >= NOTHING else ""
        found.append(f"  {gb(report.peak)} of {gb(report.limit)}{held}")
    return found


def _time_lines(report: Estimate) -> list[str]:
    rows = [("steps", "scale", "TFLOP a step", "of it", "computed twice")]
    for phase in report.phases:
        of = ", ".join(f"{name} {flops / 1e12:.3g}" for name, flops in phase.flops.items())
        steps = f"{phase.first_step} to {phase.last_step}"
        total = f"{sum(phase.flops.values()) / 1e12:.3g}"
        rows.append((steps, f"{phase.scale:g}", total, of, f"{phase.recomputed / 1e12:.3g}"))
    steps = report.phases[-1].last_step
    found = _table(rows)
    seconds = report.measured_seconds
    if seconds is not None:
        found.append(
            f"time here (measured: {report.measured.samples}, with their data): "
            f"{1000 * seconds / steps:.0f} ms a step, {duration(seconds)} in all, "
            f"if begun now until {datetime.now() + timedelta(seconds=seconds):%a %d %b %H:%M}; "
            f"a checkpoint takes {report.measured.save_seconds:.1f} s"
        )
    shares = ", ".join(
        f"{name} {slow:.0%} to {fast:.0%}" for name, slow, fast in zip(("matrix products", "attention"), SLOW, FAST)
    )
    memory = f"all else {SLOW.bandwidth:.0%} to {FAST.bandwidth:.0%} of its bandwidth"
    found.append(f"time (estimate: {shares} of the card's bfloat16 peak, {memory}, assumed):")
    feed, images = report.feed, report.samples["images_per_step"] * steps
    if feed:
        found.append(
            f"  loader here (measured, {feed.samples}): {feed.of_one:.0f} images/s a thread, {feed.rate:.0f} with "
            f"data.workers={feed.threads}; the slower of card and loader decides"
        )
    for card in CARDS:
        seconds = report.expected(card)
        least, most = (max(one, report.feed_seconds) for one in report.span(card))
        waits = f", waiting for the loader ({images / report.seconds(card):.0f} images/s without)"
        each = _range(f"{least / steps:.2f}", f"{most / steps:.2f}")
        rate = _range(f"{images / most:.0f}", f"{images / least:.0f}")
        whole = _range(duration(least), duration(most))
        line = f"  {card}: {each} s a step, {rate} images/s, {duration(seconds)} in all"
        line += f" ({whole})" if " to " in whole else ""
        found.append(line + (waits if seconds > report.seconds(card) else ""))
    return found


def _range(least: str, most: str) -> str:
    return least if least == most else f"{least} to {most}"


def _disk_lines(report: Estimate) -> list[str]:
    reading, steps = report.reading, report.phases[-1].last_step
    sample = sum(reading["sample"].values())
    layers = ", ".join(f"{layer} {gb(size)}" for layer, size in reading["sample"].items())
    fastest = max(CARDS, key=GPUS.get)
    seconds = report.measured_seconds or report.expected(fastest)
    where = "here" if report.measured_seconds else f"on the {fastest}"
    rate = sample * report.samples["images_per_step"] * steps / seconds
    read = f"reading: {gb(sample)} a sample ({layers}), {gb(rate)}/s {where}"
    if reading["all"] is not None:
        cached = min(1.0, reading["cache"] / max(reading["decoded"], 1))
        read += f" in the first epoch; {cached:.0%} of {gb(reading['all'])}, {gb(reading['decoded'])} decoded, then "
        read += "stays in memory (data.cache_gb)"
    read += "" if reading["disk_rate"] is None else f"; the disk delivers {gb(reading['disk_rate'])}/s (measured)"
    return [f"disk: {disk_text(report.disk)}", read]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
