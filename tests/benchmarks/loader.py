"""What making micro-batches costs: reading, hashing, decoding, noise, collating, on made-up samples of a config's size.

    python -m tests.benchmarks.loader [--config FILE] [--images 48] [--jpeg] [--phase N] [--cached] [--json] [KEY=VALUE]

Writes samples as the config of `prep` beside FILE would, to a temporary folder, and makes micro-batches of them without
training: process time an image with one thread, and images a second with one and with two. Nothing stays in memory from
one micro-batch to the next, unless all of it does (--cached). With --json the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanodit.config import load_config
from nanodit.console import say
from prep.config import PrepConfig
from train.config import TrainConfig
from train.data.prefetch import prefetch
from train.loop.trainer import Trainer
from train.plan.feed import made_up_like
from train.plan.memory import meta_trainer
from train.plan.rehearsal import StandIn, changed, open_dataset

SAMPLES = 24


def measure(trainer: Trainer, numbers: Sequence[int], threads: int) -> tuple[float, float]:
    """Return images a second and process milliseconds an image of making some micro-batches, as a run does."""
    count, started, spent = 0, time.perf_counter(), time.process_time()
    for batch in prefetch(trainer._make_batch, numbers, 2, threads):
        count += len(batch.keys)
        trainer.sender.give_back(batch.buffer)
    return count / (time.perf_counter() - started), 1000 * (time.process_time() - spent) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/train/production.yaml"))
    parser.add_argument("--images", type=int, default=48, help="at least so many for each number of threads")
    parser.add_argument("--jpeg", action="store_true", help="the pixels are stored as JPEG")
    parser.add_argument("--phase", type=int, default=-1, metavar="N", help="of train.phases, from 0; -1: full size")
    parser.add_argument("--cached", action="store_true", help="all samples are in memory before it begins")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    config = load_config(TrainConfig, options.config, options.overrides)
    phases = config.train.phases
    step = 0 if options.phase == 0 else phases[options.phase - 1].until_step if phases else 0
    with tempfile.TemporaryDirectory() as folder:
        stand_in, _ = open_dataset(config, options.config, None)
        prep: PrepConfig = stand_in.prep
        if options.jpeg:
            prep = prep.model_copy(update={"image": prep.image.model_copy(update={"format": "jpeg"})})
        dataset = made_up_like(StandIn(prep), Path(folder), SAMPLES)
        run = changed(config, {"data.cache_gb": 64.0 if options.cached else 0.0, "train.compile": False})
        trainer = meta_trainer(run, dataset)
        if options.cached:
            for rows in trainer.data.rows.values():
                for row in rows:
                    trainer.data.load([row])
        numbers, made = [], 0
        for number in trainer.batches.numbers(step):
            numbers.append(number)
            cuts = trainer.batches.plan.of_step(number // trainer.batches.plan.stride)
            made += len(cuts[number % trainer.batches.plan.stride].images)
            if made >= options.images:
                break
        measure(trainer, numbers[:2], 1)  # what is imported and allocated once
        found: dict[str, Any] = {"config": options.config.stem, "pixels": prep.image.format, "cached": options.cached}
        found |= {"phase": options.phase, "noise": run.data.noise if hasattr(run.data, "noise") else "host"}
        found |= {"images": made, "cpu_ms_per_image": 0.0, "threads": {}}
        for threads in (1, 2):
            rate, spent = measure(trainer, numbers, threads)
            found["threads"][str(threads)] = {"images_per_s": round(rate, 2), "cpu_ms_per_image": round(spent, 2)}
            say(f"{threads} thread{'s' * (threads > 1)}: {rate:.1f} images/s, {spent:.2f} ms of the CPU an image")
        found["cpu_ms_per_image"] = found["threads"]["1"]["cpu_ms_per_image"]
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
