"""The caption stage on Ray Data: one row is an item of a few samples, one actor asks the servers of one seat.

Here a death costs little: Ray starts the actor again where it was, the others go on, and the items that it had come
again in the next round (``prep/passes/caption_stage.py``). So what an actor has to say, errors too, comes as events in
rows, each handed on when it is there; what it raises, Ray drops.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nanodit.console import waiting
from nanodit.errors import ResourceError
from prep.captions.base import ENVIRONMENT
from prep.captions.own_server import digest_here, has_program
from prep.captions.prompts import Prompts
from prep.config import PrepConfig
from prep.passes.caption_placement import Seat, caption_seats
from prep.passes.caption_stage import ITEM
from prep.passes.caption_worker import CaptionItem, CaptionWorker
from prep.passes.nodes import Node
from prep.passes.placement import JOINS
from prep.passes.ray_passes import (  # Ray too: what it finds in the environment must be there before
    LOST,
    NodeAffinitySchedulingStrategy,
    RayDeprecationWarning,
    cluster_nodes,
    on_every_node,
    quiet_data,
    ray,
    ray_session,
    with_absolute_places,
)

RAYLET_INTERVAL = 0.2  # seconds between an actor's looks at its raylet


def with_ollama(nodes: Sequence[Node]) -> list[Node]:
    """Return those of some nodes that answer, or are busy, with whether they have Ollama."""
    have = on_every_node(has_program)
    return [replace(node, ollama=have[node.id] is not False) for node in nodes if node.id in have]


def seats_now(config: PrepConfig) -> tuple[list[Seat], Seat | None]:
    """Return :func:`caption_seats` on the nodes that there are now."""
    nodes = cluster_nodes()
    return caption_seats(config, with_ollama(nodes) if config.captions.own_servers else nodes, [])


def digest_on_a_node(config: PrepConfig) -> str:
    """Return the digest of the caption model on a node that is going to write captions, which pulls it if it has to.

    Raises as ``digest_here``, and as ``caption_seats``.
    """
    captions = config.captions
    if not os.environ.get("RAY_ADDRESS"):
        return digest_here(captions.model, captions.timeout)
    with ray_session():
        seat = seats_now(config)[0][0]
        remote = ray.remote(num_cpus=0, max_retries=0)(digest_here)
        strategy = NodeAffinitySchedulingStrategy(seat.on[0], soft=False)
        with waiting(f"looking for {captions.model}, and pulling it where it is not there"):
            try:
                return ray.get(remote.options(scheduling_strategy=strategy).remote(captions.model, captions.timeout))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except LOST as error:
                raise ResourceError(f"a node died over {captions.model}. Run the same command again") from error


def ask_all(
    config: PrepConfig, recipe: Mapping[str, Any], prompts: Prompts, items: Sequence[CaptionItem]
) -> Iterator[dict[str, Any]]:
    """Let actors on all seats that there are now caption items; yields their events until no more come.

    Of items that an actor had when it died, some are missing.
    """
    seats, joining = seats_now(config)
    seats = seats[: len(items)]
    free = deque(seats)
    # so that all slots are busy while an item comes to its end, and another one waits
    calls = 1 + math.ceil(2 * max(seat.slots for seat in seats) / ITEM)
    most = len(seats) * JOINS if joining and os.environ.get("RAY_ADDRESS") else len(seats)
    quiet_data()
    rows = ray.data.from_items([{"item": item.to_json()} for item in items], override_num_blocks=len(items))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # max_restarts has no named parameter yet
        results = rows.map_batches(
            actor_class(config, recipe, prompts),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=len(seats), max_size=max(len(seats), min(most, len(items))),
                max_tasks_in_flight_per_actor=2 * calls, max_concurrent_calls_per_actor=calls,
                enable_true_multi_threading=True,
            ),
            ray_remote_args_fn=lambda: (free.popleft() if free else joining or seats[0]).demands(),
            max_restarts=-1, max_task_retries=0, num_cpus=seats[0].cpus, num_gpus=seats[0].gpus,
        )  # fmt: skip
    results.context.max_errored_blocks = len(items)  # those of dead actors
    results.context.max_consecutive_actor_init_deaths = len(seats)  # on nodes that have died since they were listed
    results.context.target_max_block_size = 1  # a row is handed on when it is there
    try:
        for batch in results.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            for event in batch["event"]:
                yield json.loads(event)
    except LOST:
        return


def end_with_raylet(raylet: int) -> None:
    """End this process as soon as its raylet has: Ray lets a call end first, while others do its items again."""
    while os.getppid() == raylet:
        time.sleep(RAYLET_INTERVAL)
    os._exit(1)


def actor_class(config: PrepConfig, recipe: Mapping[str, Any], prompts: Prompts) -> type:
    """Return the class that Ray Data runs in its actors; config, recipe and prompts travel with it.

    With the servers of the config also their addresses, and what the driver's environment says of keys and proxies.
    """
    config, environment = with_absolute_places(config), {}
    captions = config.captions
    if not captions.own_servers:
        config = config.model_copy(update={"captions": captions.model_copy(update={"hosts": list(captions.servers)})})
        names = [*ENVIRONMENT, *map(str.lower, ENVIRONMENT), captions.api_key_variable]
        environment = {name: os.environ[name] for name in names if name and name in os.environ}

    class CaptionActor:
        def __init__(self) -> None:
            threading.Thread(target=end_with_raylet, args=(os.getppid(),), daemon=True).start()
            os.environ.update(environment)
            context = ray.get_runtime_context()
            cards = context.get_accelerator_ids().get("GPU", [])
            if captions.own_servers and not cards:
                os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # cards that Ray was not told of are somebody else's
            self.worker = CaptionWorker(config, recipe, prompts, "-".join([context.get_node_id(), *cards]))

        def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
            for event in self.worker.caption(CaptionItem.from_json(str(batch["item"][0]))):
                yield {"event": [json.dumps(event)]}

        def __del__(self) -> None:
            if hasattr(self, "worker"):  # its making may have failed
                self.worker.close()

    return CaptionActor
