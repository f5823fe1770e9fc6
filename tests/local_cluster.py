"""A Ray cluster of several raylets on this machine, in a process of its own: ``with LocalCluster(nodes=3) as cluster``.

The token is the cluster's own; ``cluster.environment`` lets a driver join it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Self


class LocalCluster:
    """``nodes`` raylets with ``cpus`` CPUs each; ``raylets`` are their process ids, the head's first.

    With ``vram_gb`` each has also a card of that size, which is none: Ray believes what it is told.
    """

    def __init__(self, nodes: int, cpus: int = 1, environment: dict[str, str] | None = None, vram_gb: int = 0) -> None:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"}
        patient = {"RAY_raylet_start_wait_time_s": "180"}  # where other tests have the processors
        # a raylet that was killed is missed five looks later; one that is slow to answer has ten seconds for each
        attentive = {"RAY_health_check_period_ms": "300"}
        self.environment = {**(environment or {}), **token, **patient, **attentive}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(nodes), str(cpus), str(vram_gb)],
            env=os.environ | self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started = self._answer()
        self.raylets: list[int] = started["raylets"]
        self.environment["RAY_ADDRESS"] = started["address"]

    def add_node(self) -> int:
        """Start one more raylet; its process id."""
        self._process.stdin.write("add\n")
        self._process.stdin.flush()
        self.raylets.append(self._answer()["raylet"])
        return self.raylets[-1]

    def _answer(self) -> dict:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the cluster's process ended with {self._process.wait()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)


def main(nodes: int, cpus: int, vram_gb: int) -> None:
    """Start the nodes and serve ``add`` until the input is closed."""
    from ray.cluster_utils import Cluster

    def raylet(node) -> subprocess.Popen:
        return node.all_processes["raylet"][0].process

    card = {"num_gpus": 1, "resources": {"vram_gb": vram_gb}} if vram_gb else {}
    each = {"num_cpus": cpus, **card}
    cluster = Cluster(initialize_head=True, head_node_args={**each, "include_dashboard": False})
    raylets = [raylet(cluster.head_node).pid] + [raylet(cluster.add_node(**each)).pid for _ in range(nodes - 1)]
    print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"raylet": raylet(cluster.add_node(**each)).pid}), flush=True)
    nodes = [*cluster.worker_nodes, cluster.head_node]
    for node in nodes:
        raylet(node).terminate()
    for node in nodes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            raylet(node).wait(5)  # it ends its agents and workers
        cluster.remove_node(node, allow_graceful=False)  # or each of the others is given a second


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(*map(int, sys.argv[1:]))
