"""The machines of a run: Ray's nodes with their CPUs, cards and memory, or this machine alone."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prep.captions.own_server import has_program


@dataclass(frozen=True)
class Node:
    """One Ray node: ``gpus`` cards with ``vram_gb`` GB in all (0: not registered), ``memory_gb`` of main memory.

    ``driver`` is true where the driver runs, unless told otherwise the head. Several nodes may share an ``address``.
    ``ollama``: the program is there, as far as is known.
    """

    id: str
    address: str
    hostname: str
    cpus: float
    gpus: float = 0.0
    vram_gb: float = 0.0
    memory_gb: float = 0.0
    driver: bool = False
    ollama: bool = True

    def __str__(self) -> str:
        cards = f", {self.gpus:g} GPU with {self.vram_gb:g} GB" if self.vram_gb else f", {self.gpus:g} GPU"
        return f"{self.hostname or self.address} ({self.cpus:g} CPUs{cards if self.gpus else ''})"


def nodes_from_ray(nodes: Iterable[Mapping[str, Any]], driver: str | None = None) -> list[Node]:
    """Return the living nodes of ``ray.nodes()`` by address; ``driver`` is the driver's node id, if not the head's."""
    found = []
    for node in nodes:
        if not (node.get("Alive") or node.get("alive")):
            continue
        resources = node.get("Resources") or {}
        here = node["NodeID"] == driver if driver else "node:__internal_head__" in resources
        found.append(
            Node(
                node["NodeID"],
                node.get("NodeManagerAddress", ""),
                node.get("NodeManagerHostname", ""),
                float(resources.get("CPU", 0)),
                float(resources.get("GPU", 0)),
                float(resources.get("vram_gb", 0)),
                float(resources.get("memory", 0)) / 1e9,
                here,
            )
        )
    return sorted(found, key=lambda node: (node.address, node.id))


def local_gpus() -> list[int]:
    """Whole GB of each card that this process may use, as Ray demands them; empty without NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES", ""):
        command.append(f"--id={visible}")
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return [int(line) // 1024 for line in lines]  # nvidia-smi counts MiB; less is safe
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def local_node() -> Node:
    """Return this machine as the only node, which is what a private Ray has."""
    gpus = local_gpus()
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cpus = float(os.cpu_count() or 1)
    cards = float(len(gpus)), float(sum(gpus))
    return Node("", "127.0.0.1", socket.gethostname(), cpus, *cards, memory_gb, driver=True, ollama=has_program())


def ray_options(
    cpus: float, gpus: float, vram_gb: float, memory_gb: float, on: Sequence[str] = (), off: Sequence[str] = ()
) -> dict[str, Any]:
    """Return demands in the names of Ray's options; with ``on`` these nodes alone can meet them, none of ``off`` can.

    What is 0 of GPU memory, in GB, and of main memory is not demanded.
    """
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
    if vram_gb:
        options["resources"] = {"vram_gb": vram_gb}
    if memory_gb:
        options["memory"] = int(memory_gb * 1e9)
    if on or off:
        options["label_selector"] = {"ray.io/node-id": f"in({', '.join(on)})" if on else f"!in({', '.join(off)})"}
    return options
