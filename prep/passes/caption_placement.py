"""Where captions are written: on which nodes the servers of the config run, and where a run may start its own.

One actor asks all servers that others started; it is where the driver is, which knows their names, keys and proxies.
With ``captions.hosts=auto`` there is one actor with a server of its own for each card that holds the model; a model
that is larger takes all cards of a Ray node. Only where no card does, CPUs write captions.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from nanodit.errors import ConfigError, ResourceError
from prep.captions.base import is_loopback
from prep.captions.own_server import INSTALL
from prep.captions.servers import SERVERS
from prep.config import PrepConfig
from prep.passes.nodes import Node, ray_options

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "")


@dataclass(frozen=True)
class Seat:
    """What one actor of the caption stage takes of a node, and how many questions it asks at a time.

    It is one of the nodes ``on``, or none of ``off``; ``gpus`` are whole cards.
    """

    slots: int
    cpus: float = 0.0
    gpus: float = 0.0
    vram_gb: float = 0.0
    memory_gb: float = 0.0
    on: tuple[str, ...] = ()
    off: tuple[str, ...] = ()

    def demands(self) -> dict[str, Any]:
        """Return what the actor demands, in the names of Ray's options."""
        return ray_options(self.cpus, self.gpus, self.vram_gb, self.memory_gb, self.on, self.off)


def caption_seats(config: PrepConfig, nodes: Sequence[Node], remarks: list[str]) -> tuple[list[Seat], Seat | None]:
    """Return a seat for every actor of the caption stage, and what one demands of a node that joins later, if it can.

    Raises ConfigError where no node has Ollama, ResourceError where none has room for the model.
    """
    captions = config.captions
    if not captions.own_servers:
        here = tuple(node.id for node in nodes if node.driver and node.id)
        return [Seat(sum(server.slots for server in captions.servers), on=here)], None
    able = [node for node in nodes if node.ollama]
    if not able:
        there = ", ".join(sorted({node.hostname or node.address for node in nodes}))
        raise ConfigError(f"captions.hosts is auto, but no machine has Ollama ({there}). {INSTALL.capitalize()}")
    remarks += [f"{node} writes no captions: it has no Ollama" for node in nodes if node.gpus and not node.ollama]
    seats = [] if config.placement.device == "cpu" else _card_seats(config, able, remarks)
    if not seats:
        seats = _cpu_seats(config, able, remarks)
    seats = seats[: config.workers]
    one = min(seats, key=lambda seat: (seat.gpus, seat.cpus))
    joining = Seat(
        captions.slots, one.cpus, min(1.0, one.gpus), one.vram_gb, one.memory_gb, off=tuple(node.id for node in nodes)
    )
    return seats, joining


def _card_seats(config: PrepConfig, nodes: Sequence[Node], remarks: list[str]) -> list[Seat]:
    need, slots, seats = captions_vram(config), config.captions.slots, []
    for node in nodes:
        cards = int(node.gpus) if node.cpus else 0
        each = node.vram_gb / cards if cards and node.vram_gb else math.inf
        share = min(1.0, math.floor(100 * node.cpus / max(1, cards)) / 100)
        if cards and each >= need:
            seats += [Seat(slots, share, 1.0, need if node.vram_gb else 0.0, on=(node.id,))] * cards
        elif cards and node.vram_gb >= need:
            seats.append(Seat(slots, share, float(cards), node.vram_gb, on=(node.id,)))
        elif cards:
            remarks.append(
                f"{node} writes no captions on its GPU: {config.captions.model} takes {need:g} GB "
                "(placement.vram_gb.captions=GB changes that)"
            )
    return seats


def _cpu_seats(config: PrepConfig, nodes: Sequence[Node], remarks: list[str]) -> list[Seat]:
    need, model = captions_vram(config), config.captions.model
    if config.placement.device == "cuda":
        raise ResourceError(
            f"placement.device is cuda, but {model} takes {need:g} GB of GPU memory and no card offers it. Set a "
            "smaller captions.model, placement.vram_gb.captions=GB, or placement.device=auto"
        )
    able = [node for node in nodes if node.cpus >= 1 and (not node.memory_gb or node.memory_gb >= need)]
    if not able:
        most = max(node.memory_gb for node in nodes)
        raise ResourceError(
            f"{model} takes {need:g} GB, which no card has, and no more than {most:.3g} GB of main memory are on a "
            "node with a CPU. Set a smaller captions.model, or placement.vram_gb.captions=GB if the estimate is wrong"
        )
    remarks.append(f"no card for {model}, which takes {need:g} GB: captions are written on CPUs, in minutes each")
    return [
        Seat(config.captions.slots, float(int(node.cpus)), memory_gb=need if node.memory_gb else 0.0, on=(node.id,))
        for node in able
    ]


def book_captions(config: PrepConfig, nodes: Sequence[Node], cards: dict[str, list[float]], remarks: list[str]) -> None:
    """Take the memory of the caption model from the cards of every node that serves captions.

    Ollama loads a model onto the card with the most room, and spreads one that fits no card over all of them.
    """
    need = captions_vram(config)
    for address in sorted({node.address for node in nodes if node.id in cards and need}):
        here = [node for node in nodes if node.address == address]
        if not caption_hosts(config, here):
            continue
        places = [(name, index) for name in cards for index in range(len(cards[name])) if name in {n.id for n in here}]
        places.sort(key=lambda place: -cards[place[0]][place[1]])
        left = need
        for name, index in places:
            if not math.isinf(cards[name][index]):
                taken = min(left, cards[name][index])
                cards[name][index], left = cards[name][index] - taken, left - taken
        remarks.append(
            f"{here[0].hostname or address} serves captions: {need:g} GB of its GPU memory are kept for "
            f"{config.captions.model} (placement.vram_gb.captions=GB changes that)"
        )


def captions_vram(config: PrepConfig) -> float:
    """Return the GB that the caption model takes on each of its hosts: as configured, else as its server says.

    0 for sidecars, which no model writes.
    """
    if "text" not in config.active_layers or not config.captions.generated:
        return 0.0
    if "captions" in config.placement.vram_gb:
        return config.placement.vram_gb["captions"]
    return SERVERS[config.captions.backend].vram_gb(config.captions.model)


def caption_hosts(config: PrepConfig, nodes: Sequence[Node]) -> list[str]:
    """Return the URLs of the caption hosts that are on some of these nodes; none for sidecars."""
    if "text" not in config.active_layers:
        return []
    urls = [host.url for host in config.captions.servers]
    return [url for url in urls if any(serves(url, node) for node in nodes)]


def serves(url: str, node: Node, resolve: Callable[[str], Collection[str]] | None = None) -> bool:
    """Whether a caption host's URL leads to a node; names that are neither its address nor its name are looked up."""
    host = (urlsplit(url if "//" in url else f"//{url}").hostname or "").lower()
    if host in LOCAL_NAMES:  # the captions are asked for where the driver is
        return node.driver
    if host in (node.address, node.hostname.lower(), node.hostname.lower().partition(".")[0]):
        return True
    found = (resolve or addresses)(host)
    return node.address in found or (is_loopback(node.address) and any(map(is_of_this_machine, found)))


def is_of_this_machine(address: str) -> bool:
    """Whether an address is one of this machine's: nobody can bind a socket to another one."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def addresses(host: str) -> set[str]:
    """Return the addresses of a host name; none where it is unknown."""
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return set()
