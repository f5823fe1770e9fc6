"""A dataset prepared in this process: what ``prep run`` does, without the seconds that starting Ray takes."""

from __future__ import annotations

from prep.config import PrepConfig
from prep.passes.layers import LayerWorker
from prep.passes.plan import Plan, make_plan, write_manifest
from prep.passes.publish import publish
from prep.run import current_parts


def prepare(config: PrepConfig) -> Plan:
    """Compute what is missing and publish; returns the plan, whose ``missing`` says what was computed and why."""
    plan = make_plan(config)
    write_manifest(plan)
    worker = LayerWorker(config)
    for task in plan.tasks(config.active_layers):
        worker.run(task)
    publish(plan, current_parts(plan), "runs/0001/rejects.parquet")
    return plan
