"""The passes on Ray Data: shards with missing layers go to pools of actors that compute and commit them.

The only module of ``prep`` that imports Ray. One row of the data set is one shard: rows carry names and recipes, never
pixels; actors read and write the shared output folder. On a machine without GPU there is one pass, in which an actor
carries a shard through all its missing layers: models are loaded once per actor, and no pool waits for another. With
GPUs there are two, pixels and captions on CPUs first, then the encoders with one actor per GPU.

``from_items`` needs no reading tasks, so pools may take every CPU (a pool that shares CPUs with readers can stall).
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.console import say
from prep.encoders import ENCODER_LAYERS
from prep.errors import ConfigError, DataError, NanoditError, ResourceError, resource_error
from prep.layers import LayerWorker, ShardTask
from prep.settings import PrepConfig

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")  # said aloud, so that a later cluster on this machine is no surprise

import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

MAX_DEATHS = 3  # of actors, per pass; Ray's own default restarts an actor that dies for ever
NAMED = 5
ERRORS = {error.exit_code: error for error in (NanoditError, ConfigError, DataError, ResourceError)}


@dataclass(frozen=True)
class Pass:
    """Some layers computed by one pool of ``actors``, each with one CPU and, for "cuda", one GPU."""

    layers: tuple[str, ...]
    device: str
    actors: int


@contextmanager
def ray_session() -> Iterator[None]:
    """Use the Ray that is running in this process, else join ``RAY_ADDRESS``, else start one for this run alone."""
    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}
    if address := os.environ.get("RAY_ADDRESS"):
        say(f"joining Ray at {address}")
        ray.init(**quiet)
    else:
        say("starting Ray on this machine")
        ray.init(address="local", include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def plan_passes(config: PrepConfig) -> list[Pass]:
    """The passes for the resources of the running Ray; ``workers`` limits the actors of each."""
    resources = ray.cluster_resources()
    limit = config.workers or int(resources.get("CPU", 1))
    gpus = int(resources.get("GPU", 0))
    layers = config.active_layers
    if not gpus:
        return [Pass(layers, "cpu", limit)]
    features = tuple(layer for layer in layers if layer in ENCODER_LAYERS)
    return [
        Pass(tuple(layer for layer in layers if layer not in features), "cpu", limit),
        Pass(features, "cuda", min(gpus, limit)),
    ]


def run_pass(config: PrepConfig, step: Pass, tasks: list[ShardTask]) -> Iterator[list[dict[str, Any]]]:
    """Compute and commit the tasks; yields what each shard took as it is finished (see ``LayerWorker.run``).

    When an actor dies (killed, out of memory), the shards that are not finished start again without what they have
    committed. Raises ResourceError when that happens too often, else the error of the first shard that could not be
    computed; what was committed stays.
    """
    waiting = {(task.bucket, task.shard): task for task in tasks}
    for _ in range(MAX_DEATHS):
        try:
            for row in _results(config, step, list(waiting.values())):
                if row["error"]:
                    raise ERRORS.get(row["exit_code"], NanoditError)(row["error"])
                del waiting[row["bucket"], row["shard"]]
                yield json.loads(row["done"])
            return
        except ray.exceptions.RayActorError:
            say(f"a worker process died; {len(waiting)} shards are not finished and start again")
    names = ", ".join(f"bucket_{bucket}/shard-{shard:06d}" for bucket, shard in list(waiting)[:NAMED])
    raise ResourceError(
        f"{MAX_DEATHS} worker processes died, with {len(waiting)} shards not finished ({names}, ...). The usual cause "
        "is memory: lower workers or the batch sizes and run again; finished shards are kept"
    )


def _results(config: PrepConfig, step: Pass, tasks: list[ShardTask]) -> Iterator[dict[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors come to us as exceptions
    shards = ray.data.from_items([{"task": task.to_json()} for task in tasks], override_num_blocks=len(tasks))
    with warnings.catch_warnings():
        # max_restarts has no named parameter yet; without it a shard that kills its actor would be retried for ever
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = shards.map_batches(
            actor_class(config, step.device),
            batch_size=1,
            # two tasks in flight: one at work and one waiting, so that no actor hoards shards at the end
            compute=ray.data.ActorPoolStrategy(size=min(step.actors, len(tasks)), max_tasks_in_flight_per_actor=2),
            num_cpus=1,
            num_gpus=1 if step.device == "cuda" else 0,
            max_restarts=0,
        )
    return results.iter_rows()


def actor_class(config: PrepConfig, device: str) -> type:
    """The class that Ray Data runs in its actors; the config travels with it."""
    # actors may have another working directory
    paths = {name: str(Path(getattr(config, name)).absolute()) for name in ("source", "output")}
    config = config.model_copy(update=paths)

    class LayerActor:
        def __init__(self) -> None:
            # before torch is imported: pools use all cores, and equal bytes need equal numbers of threads
            os.environ["OMP_NUM_THREADS"] = "1"
            self.worker = LayerWorker(config, device)

        def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
            task = ShardTask.from_json(str(batch["task"][0]))
            done, error, exit_code = [], "", 0
            try:
                done = self.worker.run(task)
            except Exception as failure:
                known = failure if isinstance(failure, NanoditError) else resource_error(failure)
                if known is None:  # not for the user: a defect, which ends the job
                    raise
                error, exit_code = str(known), known.exit_code
            answer = {"bucket": task.bucket, "shard": task.shard, "done": json.dumps(done)}
            return {name: [value] for name, value in (answer | {"error": error, "exit_code": exit_code}).items()}

    return LayerActor
