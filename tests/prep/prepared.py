"""A dataset prepared in this process: what ``prep run`` does, without the seconds that starting Ray takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from prep.config import PrepConfig
from prep.passes.layers import LayerWorker, ShardTask
from prep.passes.nodes import local_node
from prep.passes.placement import Pass
from prep.passes.plan import Plan, make_plan, write_manifest
from prep.passes.publish import publish
from prep.passes.supervisor import Supervisor
from prep.run import current_parts
from tests.prep.captioning import ask_here


def prepare(config: PrepConfig) -> Plan:
    """Compute what is missing and publish; returns the plan, whose ``missing`` says what was computed and why."""
    plan = make_plan(config)
    write_manifest(plan)
    worker = LayerWorker(config)
    for task in plan.tasks(config.active_layers):
        worker.run(task)
    publish(plan, current_parts(plan), "runs/0001/rejects.parquet")
    return plan


class LocalPipeline(ModuleType):
    """What ``prep/passes/ray_passes.py`` and ``ray_captions.py`` offer, on one worker of this process.

    ``before`` is called with the layers of every pass, before it begins; ``worker`` makes what computes one.
    """

    def __init__(self, worker: Callable[[PrepConfig], LayerWorker | Supervisor] = LayerWorker) -> None:
        super().__init__("prep.passes.ray_passes")
        self.before, self.worker = lambda layers: None, worker

    @contextmanager
    def ray_session(self) -> Iterator[None]:
        yield

    def cluster_nodes(self) -> list:
        return [local_node()]

    ask_all = staticmethod(ask_here)

    def on_every_node(self, function, *arguments, timeout=30.0) -> dict:
        return {"this": function(*arguments)}

    def run_pass(self, settings: PrepConfig, step: Pass, tasks: list[ShardTask]) -> Iterator[list[dict]]:
        self.before(step.layers)
        worker = self.worker(settings)
        for task in tasks:
            yield worker.run(ShardTask.from_json(task.to_json()))
        if isinstance(worker, Supervisor):
            worker.close()


def compute_here(
    monkeypatch: pytest.MonkeyPatch, worker: Callable[[PrepConfig], LayerWorker | Supervisor] = LayerWorker
) -> LocalPipeline:
    """Let ``prep run`` compute in this process, or with ``Supervisor`` in one child of it."""
    local = LocalPipeline(worker)
    for name in ("ray_passes", "ray_captions"):
        monkeypatch.setitem(sys.modules, f"prep.passes.{name}", local)
    return local
