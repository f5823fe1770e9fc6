"""How fast micro-batches are made, on a run's own samples or on made-up ones of its size."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from prep.dataset.reader import Dataset
from train.config import TrainConfig
from train.data.buffers import Buffer
from train.data.prefetch import thread_count
from train.plan.made_up import write_made_up
from train.plan.memory import meta_trainer
from train.plan.rehearsal import StandIn, cache_bytes, changed

SECONDS = 1.0  # for which micro-batches are made
SAMPLES = 4  # that are made up for it
DRAWN = 2  # of them differ; the others repeat these


@dataclass(frozen=True)
class Feed:
    """Images a second that one thread makes here, measured, and the threads that the run would have here."""

    of_one: float
    threads: int
    samples: str

    @property
    def rate(self) -> float:
        """Images a second of all threads, as if each had a processor of its own."""
        return self.of_one * self.threads


def measure_feed(config: TrainConfig, dataset: Dataset | StandIn) -> Feed:
    """Make the first micro-batches of a run, for a second or so; a dataset that does not exist yet is made up.

    Where all samples fit in memory it is the second time that counts.
    """
    what = "of the dataset"
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(dataset, StandIn):
            dataset, what = made_up_like(dataset, Path(folder), SAMPLES), "made up"
            # as few as made-up samples are, they would all be in memory
            config = changed(config, {"data.cache_gb": 0.0})
        trainer = meta_trainer(config, dataset)
        kept = cache_bytes(dataset, config.data) <= config.data.cache_gb * 1e9
        numbers, buffer, images, started = trainer.batches.numbers(0), Buffer(), 0, time.perf_counter()
        taken = []
        while not taken or time.perf_counter() - started < SECONDS:
            taken.append(next(numbers))
            images += len(trainer.batches.pack(taken[-1], buffer.reset()).keys)
        if kept:
            started = time.perf_counter()
            for number in taken:
                trainer.batches.pack(number, buffer.reset())
        seconds = time.perf_counter() - started
    threads = thread_count(config.data.workers) if config.data.prefetch else 1
    return Feed(images / seconds, threads, f"{images} images {what}{', in memory' if kept else ''}")


def made_up_like(stand_in: StandIn, folder: Path, samples: int) -> Dataset:
    """Write so many samples of one bucket as a dataset that does not exist yet will have them, all for training."""
    bucket = stand_in.rows("train")[0]["bucket"]
    # a run may ask for either
    prep = stand_in.prep.model_copy(
        update={"flips": True, "captions": stand_in.prep.captions.model_copy(update={"short": True})}
    )
    return write_made_up(prep, folder, {bucket: (samples, 0)}, drawn=DRAWN)
