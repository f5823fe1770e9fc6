"""What each technique of the recipe does to the held-out loss: at equal steps and at equal time, three training seeds.

    python -m tests.benchmarks.recipe --output recipe [--seeds 0 1 2] [--workers 2]

Draws the quickstart's figures (64 px), prepares them with flips, times the arms in turns (alone on the machine), trains
every arm with every seed, one thread each, and prints the table. What is finished is kept in the output folder, so
the same command goes on after a kill. An arm differs from its baseline by the overrides in GROUPS and nothing else.

The verdicts are paired Student-t intervals over training seeds, 95 % each and not corrected for the number of arms: of
twenty arms that do nothing one is expected to come out better or worse. The A/A arm is the baseline with other seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluate.drawing.arms import DrawingArm, SamplerConfig, draw
from evaluate.drawing.baselines import TrainingImages, load_training_images
from evaluate.metrics.pixels import psnr
from evaluate.statistics import intervals
from evaluate.subject import Subject, dataset_modalities, select_holdout
from evaluate.suite import heldout_loss
from nanodit.config import load_config
from nanodit.console import say
from nanodit.files import write_atomic
from prep.dataset.reader import Dataset
from train.check.backbones import write_random_vgg
from train.checkpoint.open import load_model
from train.checkpoint.run_folder import StopRequest
from train.config import TrainConfig
from train.loop.trainer import Trainer
from train.model.conditions import parse_subset

ROOT = Path(__file__).parents[2]
COMMON = (
    "model.hidden_size=128", "model.num_heads=2", "train.compile=false", "train.threads=1", "train.device=cpu",
    "train.schedule=cosine", "train.lr=3e-3", "flow.t_min=0.05", "data.prefetch=0", "log_every=10",
    "checkpoint.every_steps=1000000", "visual_debug.every_steps=0",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """A baseline and the arms that are compared with it; ``arms`` maps a name to overrides of the baseline."""

    steps: int
    baseline: str
    overrides: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]


GROUPS = (
    Group(
        steps=200,
        baseline="Muon",
        overrides=(),
        arms={
            "A/A: other seeds": (),
            "AdamW, same rate (3e-3)": ("optimizer.type=adamw",),
            "AdamW, rate 1e-3": ("optimizer.type=adamw", "train.lr=1e-3"),
            "wsd schedule": ("train.schedule=wsd",),
            "EMA, fixed .99": ("train.ema_decay=0.99",),
            "EMA, fixed .9999 (seed)": ("train.ema_decay=0.9999",),
            "times: default (.8, .8), 10 % uniform": ("flow.logit_std=0.8", "flow.uniform_share=0.1"),
            "times: logit-normal (0, 1) (seed)": ("flow.logit_mean=0", "flow.logit_std=1"),
            "times: uniform": ("flow.uniform_share=1",),
            "dropout: seed": ("conditioning.preset=seed",),
            "dropout: default": ("conditioning.preset=default",),
            "flip .5": ("data.flip=0.5",),
            "REPA (demo DINO)": ("repa.enabled=true",),
            "LPIPS (random VGG)": ("perceptual.every=4", "perceptual.size=64"),
        },
    ),
    Group(
        steps=200,
        baseline="patch 2, dense",
        overrides=("model.patch_size=2", "train.batch_size=4"),
        arms={"patch 2, TREAD": ("tread.enabled=true",)},
    ),
)
# what the same runs of the first baseline hold beside the average that sampling takes by default
OTHER_WEIGHTS = {
    "EMA, none (last weights)": "model",
    "EMA, post-hoc .05": "posthoc:0.05",
    "EMA, post-hoc .10": "posthoc:0.1",
    "EMA, post-hoc .15": "posthoc:0.15",
}
SNAPSHOTS = "ema.snapshots=12"
NOT_QUALITY = ("REPA (demo DINO)", "LPIPS (random VGG)")
SAME_TIME = 0.05  # arms whose steps take as long as the baseline's, up to this share, are not trained a second time
MEASURES = {  # column of the table -> is more better
    "loss, all": False, "loss, text": False, "mse t >= .3, all": False, "mse t >= .3, text": False, "PSNR, all": True,
}  # fmt: skip
WARM_STEPS, TIMED_STEPS = 3, 16


@dataclass(frozen=True)
class Trial:
    """One training: an arm with a seed, for ``steps``."""

    arm: str
    seed: int
    steps: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Folder of the run."""
        plain = "".join(letter if letter.isalnum() else "-" for letter in self.arm)
        return f"{plain}-seed{self.seed}-steps{self.steps}"


def main() -> None:
    """Do what is not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for data, runs and results (2 GB)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="trainings at the same time, one thread each")
    parser.add_argument("--only", choices=("data", "time", "train", "table"), help="stop after one of the stages")
    parser.add_argument("--csv", type=Path, help="also write the table there")
    options = parser.parse_args()
    os.environ["TORCH_HOME"] = str((options.output / "torch-home").resolve())
    torch.set_num_threads(1)
    stages = {"data": prepare, "time": time_arms, "train": train_all, "table": table}
    for name, stage in stages.items():
        if options.only in (None, name):
            stage(options)


def prepare(options: argparse.Namespace) -> None:
    """Draw the figures and prepare them with flips; both know what is finished already."""
    write_random_vgg(Path(os.environ["TORCH_HOME"]))
    figures, dataset = options.output / "figures", options.output / "dataset"
    flags = ("--count", "2500", "--size", "96", "--seed", "1", "--short-captions")
    prep = (sys.executable, "-m", "prep")
    if not dataset.exists():
        subprocess.run((*prep, "figures", str(figures), *flags), check=True, cwd=ROOT)
    config = str(ROOT / "configs/prep/quickstart.yaml")
    where = (f"source={figures.resolve()}", f"output={dataset.resolve()}")
    subprocess.run((*prep, "run", "--config", config, *where, "flips=true"), check=True, cwd=ROOT)


def time_arms(options: argparse.Namespace) -> None:
    """Measure how long a step of every arm takes as a multiple of its baseline's: step by step in turns."""
    path = options.output / "paces.json"
    if path.exists():
        return
    paces: dict[str, float] = {}
    for group in GROUPS:
        arms = {group.baseline: (), **group.arms}
        clocks = [_step_times(_config(options, group, Trial(arm, 0, group.steps, own))) for arm, own in arms.items()]
        order, taken = np.random.default_rng(0), np.zeros((WARM_STEPS + TIMED_STEPS, len(arms)))
        for number, times in enumerate(taken):
            for arm in order.permutation(len(arms)):  # what an arm leaves in the caches meets another one each time
                times[arm] = next(clocks[arm])
            say(f"{group.baseline} and its arms: step {number + 1} of {len(taken)}")
        means = taken[WARM_STEPS:].mean(0)
        paces.update(zip(arms, (means / means[0]).tolist()))
    write_atomic(path, json.dumps(paces, indent=1))


def _step_times(config: TrainConfig) -> Iterator[float]:
    """Take training steps for ever; gives the seconds of CPU time of each."""
    config.run_folder.mkdir(parents=True, exist_ok=True)
    trainer, stop = Trainer(config, Dataset(config.dataset), torch.device("cpu")), StopRequest()
    while True:
        started = time.process_time()
        batches = map(trainer.batches.make, trainer.batches.plan.numbers(trainer.step))
        trainer.update(trainer.accumulate(batches, stop))
        yield time.process_time() - started


def trials(options: argparse.Namespace) -> list[Trial]:
    """All trainings: every arm at its group's steps, and those of another pace at the baseline's time."""
    paces = json.loads((options.output / "paces.json").read_text())
    found = []
    for group in GROUPS:
        snapshots = (SNAPSHOTS,) if group is GROUPS[0] else ()
        for arm, own in {group.baseline: snapshots, **group.arms}.items():
            for seed in options.seeds:
                actual = seed + 100 if arm.startswith("A/A") else seed
                lengths = {group.steps, equal_time_steps(paces[arm], group, arm)}
                found += [Trial(arm, actual, steps, own) for steps in sorted(lengths)]
    return found


def equal_time_steps(pace: float, group: Group, arm: str) -> int:
    """Steps that take as long as the baseline's; the same number where the pace is the same."""
    return group.steps if abs(pace - 1) <= SAME_TIME or arm.startswith("A/A") else round(group.steps / pace)


def train_all(options: argparse.Namespace) -> None:
    """Train and measure what has no result yet, several at a time, each in its own process."""
    todo = [(options, trial) for trial in trials(options) if not _result(options, trial).exists()]
    todo.sort(key=lambda item: item[1].seed)  # whole seeds first: an interrupted table is a table
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers, maxtasksperchild=1) as pool:
        for number, name in enumerate(pool.imap_unordered(_train, todo, chunksize=1), 1):
            say(f"{number} of {len(todo)}: {name}")


def _train(item: tuple[argparse.Namespace, Trial]) -> str:
    options, trial = item
    torch.set_num_threads(1)
    group = next(group for group in GROUPS if trial.arm in (group.baseline, *group.arms))
    config = _config(options, group, trial)
    config.run_folder.mkdir(parents=True, exist_ok=True)
    with open(config.run_folder / "log.txt", "w") as log, contextlib.redirect_stdout(log):
        before = time.process_time()
        Trainer(config, Dataset(config.dataset), torch.device("cpu")).run()
        spent = time.process_time() - before
        results = {trial.arm: measure(config, "ema")}
        if trial.arm == GROUPS[0].baseline:
            results |= {name: measure(config, weights) for name, weights in OTHER_WEIGHTS.items()}
    record = {"trial": vars(trial), "cpu_seconds": spent, "results": results}
    write_atomic(_result(options, trial), json.dumps(record, indent=1))
    return f"{trial.name} in {spent:.0f} s of CPU time"


def measure(config: TrainConfig, weights: str) -> dict[str, float | None]:
    """Held-out loss on the grid, its error from t = .3 on, and PSNR of pictures drawn from all conditions."""
    model, _, _ = load_model(config.run_folder, weights)
    data = Dataset(config.dataset)
    table = config.conditioning.resolve(dataset_modalities(data))
    subject = Subject(model, config.flow, table, data, select_holdout(data, 64, part="dev"), "dev")
    grid = heldout_loss.HeldoutLossConfig(bins=10, times_per_bin=1)
    subsets = {name: parse_subset(name) for name in ("all", "text")}
    rows = heldout_loss.measure(subject, list(subsets.values()), _training_images(config.dataset), grid)
    found: dict[str, float | None] = {}
    for name in subsets:
        own = [row for row in rows if row["condition"] == name]
        found[f"loss, {name}"] = float(np.mean([row["loss"] for row in own]))
        noisy = [row["mse"] for row in own if row["bin"] / grid.bins >= heldout_loss.NOISY_FROM - 1e-9]
        found[f"mse t >= .3, {name}"] = float(np.mean(noisy))
    decibels = []
    for batch in subject.batches():
        arm = DrawingArm("all", parse_subset("all"), 1.0)
        pictures, _ = draw(subject, batch, arm, 0, SamplerConfig(method="heun", steps=8))
        decibels.append(psnr(pictures, batch.pixels))
    found["PSNR, all"] = float(np.concatenate(decibels).mean())
    return found


@cache
def _training_images(dataset: str) -> TrainingImages:
    data = Dataset(dataset)
    return load_training_images(data, {row["bucket"] for row in data.rows("holdout")}, 64)


def _config(options: argparse.Namespace, group: Group, trial: Trial) -> TrainConfig:
    run = options.output / "runs" / trial.name
    where = (f"dataset={options.output / 'dataset'}", f"output={run}", f"seed={trial.seed}")
    length = (f"train.steps={trial.steps}", f"train.warmup={max(1, trial.steps // 20)}")
    overrides = (*where, *length, *COMMON, *group.overrides, *trial.overrides)
    return load_config(TrainConfig, ROOT / "configs/train/quickstart.yaml", overrides)


def _result(options: argparse.Namespace, trial: Trial) -> Path:
    return options.output / "results" / f"{trial.name}.json"


def table(options: argparse.Namespace) -> None:
    """Print the comparison as Markdown, equal steps and then equal time, and the CPU time it took."""
    records = [json.loads(path.read_text()) for path in sorted((options.output / "results").glob("*.json"))]
    paces = json.loads((options.output / "paces.json").read_text())
    rows = []
    for group in GROUPS:
        others = list(OTHER_WEIGHTS) if group is GROUPS[0] else []
        for arm in (group.baseline, *group.arms, *others):
            pace = paces.get(arm, 1.0)
            lengths = dict.fromkeys((group.steps, equal_time_steps(pace, group, arm)))  # of equal steps, of equal time
            for basis, steps in zip(("steps", "time"), lengths):
                rows.append(_row(options.seeds, records, group, arm, steps, basis, pace))
    _print(rows)
    spent = sum(record["cpu_seconds"] for record in records)
    say(f"{len(records)} trainings, {spent / 3600:.2f} h of CPU time")
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _row(
    seeds: Sequence[int],
    records: Sequence[dict[str, Any]],
    group: Group,
    arm: str,
    steps: int,
    basis: str,
    pace: float,
) -> dict[str, Any]:
    """One line of the table: means over seeds, and the paired difference to the baseline with its verdict."""
    row: dict[str, Any] = {"arm": arm, "equal": basis, "steps": steps, "step time": round(pace, 3)}
    for measure, higher in MEASURES.items():
        own = _values(seeds, records, arm, steps, measure)
        base = _values(seeds, records, group.baseline, group.steps, measure)
        row[measure] = float(np.mean(own))
        difference = intervals.paired_t(own, base)
        row[f"{measure} difference"], row[f"{measure} low"], row[f"{measure} high"] = (
            difference.value, difference.low, difference.high,
        )  # fmt: skip
        row[f"{measure} verdict"] = "baseline" if arm == group.baseline else _verdict(difference, higher)
    return row


def _values(seeds: Sequence[int], records: Sequence[dict[str, Any]], arm: str, steps: int, measure: str) -> list[float]:
    trained = GROUPS[0].baseline if arm in OTHER_WEIGHTS else arm
    by_seed = {
        record["trial"]["seed"] % 100: record["results"][arm][measure]
        for record in records
        if record["trial"]["arm"] == trained and record["trial"]["steps"] == steps
    }
    return [by_seed[seed] for seed in seeds]


def _verdict(difference: intervals.Interval, higher: bool) -> str:
    if difference.low is None or difference.low <= 0 <= difference.high:
        return "inconclusive"
    return "better" if (difference.low > 0) == higher else "worse"


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    say("| arm | equal | steps | step time | " + " | ".join(MEASURES) + " |")
    say("|---|---|---|---|" + "---|" * len(MEASURES))
    for row in rows:
        note = " (correctness, not quality)" if row["arm"] in NOT_QUALITY else ""
        cells = [f"{row['arm']}{note}", row["equal"], str(row["steps"]), f"{row['step time']:.2f}"]
        for measure in MEASURES:
            mean, verdict = f"{row[measure]:.4g}", row[f"{measure} verdict"]
            half = (row[f"{measure} high"] - row[f"{measure} low"]) / 2 if row[f"{measure} low"] is not None else 0
            difference = f"{row[f'{measure} difference']:+.3g} ± {half:.2g}"
            cells.append(mean if verdict == "baseline" else f"{mean}; {difference}: {verdict}")
        say("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
