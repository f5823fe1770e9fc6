"""What drawing an image costs, and how far from the exact solution and from the true image each way of drawing ends.

    python -m tests.benchmarks.sampling CHECKPOINT --output sampling [--samples 24] [--only cost|error]

Cost: forwards, floating-point operations and process time of an image, one thread, for the checkpoint's model and for
NanoDiT 384 / 12 / 6 at 256 px with random weights, as multiples of Euler with 35 steps and dual guidance.
Error: distance to Heun with 200 steps, the same guidance and the same noise (discretisation), and to the true holdout
image whose conditions are given, against the number of forwards. Writes cost.csv, error.csv and error.png.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evaluate.statistics import intervals
from evaluate.subject import Batch, read_batches, select_holdout, to_float
from nanodit.console import say
from prep.dataset.reader import Dataset
from tests.benchmarks.curves import Curve, Panel, draw_panels
from train.checkpoint.open import load_model
from train.method.flow import FlowConfig
from train.method.sampling import Grid, Method, Sampling, sample, trajectory_keep_ids
from train.model.conditions import Conditions, collate
from train.model.config import ModelConfig
from train.model.modalities import Features
from train.model.network import NanoDiT, build_model
from train.model.tread import TreadConfig

ALWAYS, INTERVAL, MIDDLE = (0.0, 1.0), (0.0, 0.9), (0.25, 0.9)
CFG = {"guidance": 2.0}
# what the pose adds and what text adds has one scale, so that only subsets that the quickstart trains are needed:
# nothing, text+pose, all. Two scales that differ cost three forwards, as any dual guidance does elsewhere
DUAL = {"scales": {"pose": 2.0, "text": 2.0, "dino": 1.5}}
EQUAL = {"scales": {"pose": 2.0, "text": 2.0, "dino": 2.0}}
SELF = {"self_guidance": 3.0}
# what errors are measured of: name -> guidance
GUIDANCES: Mapping[str, dict[str, Any]] = {
    "none": {},
    "CFG, t <= .9": {**CFG, "interval": INTERVAL},
    "dual, all t": {**DUAL, "interval": ALWAYS},
    "dual, t <= .9": {**DUAL, "interval": INTERVAL},
    "dual, .25 to .9": {**DUAL, "interval": MIDDLE},
    "self, all t": {**SELF, "interval": ALWAYS},
    "self, t <= .9": {**SELF, "interval": INTERVAL},
}
# what draws, on which grid, in how many steps
SAMPLERS: Mapping[tuple[Method, Grid], tuple[int, ...]] = {
    ("euler", "uniform"): (5, 10, 20, 35),
    ("heun", "uniform"): (3, 6, 10, 18),
    ("heun", "cosine"): (3, 6, 10, 18),
    ("dpm++2m", "uniform"): (5, 8, 10, 12, 20),
    ("dpm++2m", "cosine"): (5, 8, 10, 12, 20),
}
BASELINE = "Euler 35, dual, all t"
FINE: dict[str, Any] = {"method": "dpm++2m", "grid": "cosine"}
COSTS: Mapping[str, Sampling] = {
    BASELINE: Sampling("euler", 35, **DUAL, interval=ALWAYS),
    "Euler 35, dual with equal scales, all t": Sampling("euler", 35, **EQUAL, interval=ALWAYS),
    "Euler 35, self-guidance, all t": Sampling("euler", 35, **SELF, interval=ALWAYS),
    "Euler 35, no guidance": Sampling("euler", 35),
    "Heun 10, dual, t <= .9": Sampling("heun", 10, **DUAL, interval=INTERVAL),
    "2M 12, dual, t <= .9": Sampling(steps=12, **FINE, **DUAL, interval=INTERVAL),
    "2M 10, dual, .25 to .9": Sampling(steps=10, **FINE, **DUAL, interval=MIDDLE),
    "2M 8, dual, t <= .9": Sampling(steps=8, **FINE, **DUAL, interval=INTERVAL),
    "2M 10, dual with equal scales, t <= .9": Sampling(steps=10, **FINE, **EQUAL, interval=INTERVAL),
    "2M 12, self-guidance, t <= .9": Sampling(steps=12, **FINE, **SELF, interval=INTERVAL),
    "2M 12, no guidance": Sampling(steps=12, **FINE),
}


@dataclass(frozen=True)
class Task:
    """Images to draw: a model, its flow and routing, and a batch's conditions, noise and routed tokens."""

    model: NanoDiT
    flow: FlowConfig
    conditions: Conditions
    noise: Tensor
    keep_ids: Tensor | None

    def draw(self, sampling: Sampling, name: str = "") -> Tensor:
        """Draw the images, saying every 5 s how far it is."""
        said, done = time.monotonic(), 0

        def tell(t: float, z: Tensor) -> None:
            nonlocal said, done
            done += 1
            if time.monotonic() - said > 5:
                said = time.monotonic()
                say(f"{name}: step {done} of {sampling.steps}")

        arguments = {"flow": self.flow, "sampling": sampling, "keep_ids": self.keep_ids, "on_step": tell}
        return sample(self.model, self.conditions, self.noise, **arguments)

    def select(self, count: int) -> Task:
        """Return the first ``count`` images."""
        keep_ids = None if self.keep_ids is None else self.keep_ids[:count]
        conditions = self.conditions.select(slice(0, count))
        return replace(self, conditions=conditions, noise=self.noise[:count], keep_ids=keep_ids)


def main() -> None:
    """Measure, print both tables as Markdown, and write them and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a run folder or a step folder")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tables and the picture")
    parser.add_argument("--dataset", help="default: the dataset of the run's config")
    parser.add_argument("--samples", type=int, default=24, help="holdout images of the errors")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each time; the median counts")
    parser.add_argument("--reference-steps", type=int, default=200)
    parser.add_argument("--only", choices=("cost", "error"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.only != "error":
        tasks = {"checkpoint": next(trained(options, 4)), "384 / 12 / 6, 256 px": untrained()}
        rows = [{"model": name, **row} for name, task in tasks.items() for row in costs(task, options.rounds, name)]
        report(options.output / "cost.csv", rows)
    if options.only != "cost":
        rows = errors(options)
        report(options.output / "error.csv", rows)
        picture(rows, options.output / "error.png")


def trained(options: argparse.Namespace, size: int) -> Iterator[Task]:
    """Read the checkpoint's model and its holdout in batches of at most ``size``."""
    for task, _ in _batches(options, size):
        yield task


def _batches(options: argparse.Namespace, size: int) -> Iterator[tuple[Task, Batch]]:
    model, config, _ = load_model(options.checkpoint)
    model.requires_grad_(False)
    dataset = Dataset(options.dataset or config.dataset)
    for batch in read_batches(dataset, select_holdout(dataset, options.samples, part="dev"), size):
        tokens = (batch.height // config.model.patch_size) * (batch.width // config.model.patch_size)
        keys = [(key, 0) for key in batch.keys]
        keep_ids = trajectory_keep_ids(config.tread, keys, tokens) if model.route else None
        yield Task(model, config.flow, batch.conditions, batch.noise(0), keep_ids), batch


def untrained() -> Task:
    """Build the baseline preset's network with random weights and features of production's sizes, for one image."""
    side, width, patch = 256, 1024, 16
    tread, rng = TreadConfig(enabled=True), np.random.default_rng(0)
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=384, depth=12, num_heads=6, patch_size=patch)
    model = build_model(config, Features(side, {"text": width, "cls": width, "patches": width, "pose": 3}), tread)
    features = {name: [rng.standard_normal(shape, np.float32)] for name, shape in {
        "text": (128, width), "cls": (width,), "patches": (16, 16, width), "pose": (133, 3),
    }.items()}  # fmt: skip
    keep_ids = trajectory_keep_ids(tread, [("a", 0)], (side // patch) ** 2)
    model.requires_grad_(False)
    return Task(model, FlowConfig(), collate(**features, count=1), torch.randn(1, 3, side, side), keep_ids)


def costs(task: Task, rounds: int, model: str) -> list[dict[str, Any]]:
    """Measure what an image costs with each of COSTS; the rounds are interleaved."""
    if not task.model.route:  # the same network with routing costs the same, whatever its weights
        twin = build_model(task.model.config, task.model.features, TreadConfig(enabled=True))
        twin.load_state_dict(task.model.state_dict(), strict=False)
        tokens = int(np.prod(task.noise.shape[2:])) // task.model.config.patch_size**2
        keys = [("cost", i) for i in range(len(task.noise))]
        twin.requires_grad_(False)
        task = replace(task, model=twin, keep_ids=trajectory_keep_ids(TreadConfig(enabled=True), keys, tokens))
    one = task.select(1)
    rows = {way: {"way": way, **count(one, sampling, f"{model}: {way}")} for way, sampling in COSTS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in COSTS}
    for number in range(rounds):
        for name, sampling in COSTS.items():
            started = time.process_time()
            task.draw(sampling, f"{model}, round {number + 1} of {rounds}: {name}")
            seconds[name].append((time.process_time() - started) / len(task.noise))
    base = rows[BASELINE]
    for name, row in rows.items():
        row["seconds"] = float(np.median(seconds[name]))
        row["of FLOPs"] = row["GFLOP"] / base["GFLOP"]
        row["of time"] = row["seconds"] / base["seconds"]
    return list(rows.values())


def count(task: Task, sampling: Sampling, name: str) -> dict[str, float]:
    """Count the forwards, dense and routed, and the floating-point operations of an image with its contexts."""
    with counted(task.model) as forwards, FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        task.draw(sampling, name)  # the fused attention of a CPU is unknown to torch's counter
    return {
        "dense": forwards["dense"], "routed": forwards["routed"],
        "GFLOP": flops.get_total_flops() / len(task.noise) / 1e9,
    }  # fmt: skip


@contextmanager
def counted(model: NanoDiT) -> Iterator[Counter[str]]:
    """Count the model's forwards within the context."""
    counts: Counter[str] = Counter()

    def note(module: NanoDiT, arguments: Sequence[Any]) -> None:
        counts["dense" if len(arguments) < 4 or arguments[3] is None else "routed"] += 1

    hook = model.register_forward_pre_hook(note)
    try:
        yield counts
    finally:
        hook.remove()


def errors(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure both errors of every guidance, sampler and number of steps on the holdout.

    ``discretisation`` is the root mean square over pixels and images in levels of 255; ``psnr`` the mean over images in
    dB with its interval, and ``gain`` the paired difference to BASELINE's pictures.
    """
    found: dict[tuple[str, str, str, int], dict[str, Any]] = {}
    ways = [(method, grid, steps) for (method, grid), counts in SAMPLERS.items() for steps in counts]
    for task, batch in _batches(options, 32):
        truth = to_float(batch.pixels)
        for name, guidance in GUIDANCES.items():
            if "self_guidance" in guidance and not task.model.route:
                continue
            place = f"{len(batch.rows)} images of {batch.bucket}, guidance {name}"
            exact = task.draw(Sampling("heun", options.reference_steps, **guidance), f"{place}, reference")
            for method, grid, steps in ways:
                sampling = Sampling(method, steps, **guidance, grid=grid)
                with counted(task.model) as forwards:
                    image = task.draw(sampling, f"{place}, {method} {grid} {steps}")
                passes = forwards["dense"] + forwards["routed"] / 2
                _note(found.setdefault((name, method, grid, steps), {"forwards": passes}), image, exact, truth, batch)
            _note(found.setdefault((name, "reference", "", 0), {"forwards": 0.0}), exact, exact, truth, batch)
    base = found["dual, all t", "euler", "uniform", 35]
    return [
        {
            "guidance": name, "sampler": method, "grid": grid, "steps": steps, "forwards": row["forwards"],
            "discretisation": 127.5 * float(np.sqrt(np.mean(row["squares"]))),
            **_interval("psnr", intervals.mean(row["psnr"], row["keys"])),
            **_interval("gain", intervals.paired_difference(row["psnr"], base["psnr"], row["keys"])),
        }
        for (name, method, grid, steps), row in found.items()
    ]  # fmt: skip


def _note(row: dict[str, Any], image: Tensor, exact: Tensor, truth: Tensor, batch: Batch) -> None:
    """Add each image's errors to a row."""
    mse = (image.clamp(-1, 1) - truth).square().flatten(1).mean(1)
    columns = {
        "squares": (image - exact).square().flatten(1).mean(1).tolist(),
        "psnr": (10 * torch.log10(4 / mse)).tolist(),
        "keys": batch.keys,
    }
    for column, values in columns.items():
        row.setdefault(column, []).extend(values)


def _interval(name: str, interval: intervals.Interval) -> dict[str, float]:
    return {name: interval.value, f"{name} low": interval.low, f"{name} high": interval.high}


def report(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as Markdown and write them as CSV."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    say(f"wrote {path}")


def picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw both errors against the forwards of an image: a colour for each guidance, a marker for each sampler."""
    guidances = list(dict.fromkeys(row["guidance"] for row in rows))
    panels = []
    for column, title in (("discretisation", "distance to the reference, levels of 255"), ("psnr", "holdout PSNR, dB")):
        curves = []
        for number, guidance in enumerate(guidances):
            for marker, way in enumerate(SAMPLERS):
                own = [row for row in rows if (row["guidance"], row["sampler"], row["grid"]) == (guidance, *way)]
                points = [(row["forwards"], row[column]) for row in own if row[column] > 0]
                curves.append(Curve(guidance, points, number, marker))
        panels.append(Panel(title, "forwards of an image", curves, log=column == "discretisation"))
    legend = [Curve(f"guidance: {guidance}", [], number, 0) for number, guidance in enumerate(guidances)]
    legend += [Curve(f"{method}, {grid} grid", [], 0, marker) for marker, (method, grid) in enumerate(SAMPLERS)]
    draw_panels(panels, legend, path)
    say(f"wrote {path}")


if __name__ == "__main__":
    main()
