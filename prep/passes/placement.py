"""Which layers are computed together, on which devices, by how many actors: pure functions over the cluster's nodes.

A pass is one pool of equal actors. Ray places an actor wherever its demands are met and waits without a word when they
are met nowhere, so every demand is checked here against the nodes that exist. Each actor asks for the GPU memory that
its layers need (the custom resource ``vram_gb``, a node's sum over its cards) and for a fraction of a card, chosen so
that no card is overbooked. Ray cannot tell the cards of one node apart: with several per host, start one Ray node for
each (``cluster.yaml`` does), and ``vram_gb`` is exact. Where nodes register none, an actor takes a whole card.

A caption model on the same card is in nobody's way: passes never run beside the captions, and a server that can unload
its model is asked to before a pass on its card (``prep/passes/captions.py``). Other servers keep their memory always.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanodit.errors import ResourceError
from prep.captions.servers import SERVERS
from prep.config import PrepConfig
from prep.dataset.layers import ENCODER_LAYERS
from prep.encoders.registry import encoder_of
from prep.passes.caption_placement import book_captions, caption_seats
from prep.passes.crops import CACHE_BYTES
from prep.passes.nodes import Node, ray_options

DEMO_VRAM_GB = 0.2
DEMO_WORKER_GB = 1.6  # of main memory: an actor and its worker with all demo encoders (docs/measurements.md)
CONTEXT_GB = 0.5  # what CUDA takes for every process
PROCESS_GB = 1.0  # Python, torch and Ray in main memory
TABLE_BATCH = 16  # of ``Encoder.activations_gb``

ACTOR_CPUS = 4  # of a GPU's actor at most, for what is beside the GPU; a node that joins later must have them too
JOINS = 4  # a pool may grow to so many times its size when nodes join


@dataclass(frozen=True)
class Pass:
    """Some layers computed by one pool of ``actors``.

    ``device`` is "cpu", "cuda", or "captions": asked from servers, ``actors`` at a time (``caption_placement.py`` says
    where the actors that ask are). Each actor takes ``cpus``, ``gpus`` (a fraction of a card), ``vram_gb`` and
    ``memory_gb`` (0: not demanded) of a node that is not ``excluded``. ``max_actors`` is what the pool may grow to when
    nodes join.
    """

    layers: tuple[str, ...]
    device: str
    actors: int
    cpus: float = 1.0
    gpus: float = 0.0
    vram_gb: float = 0.0
    max_actors: int = 0
    memory_gb: float = 0.0
    excluded: tuple[str, ...] = ()

    @property
    def threads(self) -> int:
        """Threads of an actor that prepare batches beside its GPU: one per CPU, and one that waits for the GPU."""
        return int(max(1.0, self.cpus)) + 1 if self.device == "cuda" else 0

    def demands(self) -> dict[str, Any]:
        """Return what one actor demands, in the names of Ray's options."""
        return ray_options(self.cpus, self.gpus, self.vram_gb, self.memory_gb, off=self.excluded)


@dataclass(frozen=True)
class Offer:
    """What a node with GPUs has left: ``free`` GB on its tightest card (infinite where no memory is registered).

    ``guarded``: Ray's own count of ``vram_gb`` keeps the card from being overbooked, whatever the fraction.
    """

    node: Node
    free: float
    guarded: bool

    def holds(self, need: float) -> int:
        """How many processes of ``need`` GB its tightest card can hold; one where nobody knows."""
        return 1 if math.isinf(self.free) else int((self.free + 1e-6) // need)


def vram_need(config: PrepConfig, layers: Collection[str]) -> float:
    """GB of GPU memory that one process with the encoders of some layers takes, rounded up to a tenth."""
    return math.ceil((CONTEXT_GB + sum(_encoder_gb(config, layer) for layer in layers)) * 10 - 1e-6) / 10


def memory_need(config: PrepConfig, layers: Collection[str]) -> float:
    """GB of main memory that one process takes which runs some layers on the CPU; 0 where it is not worth counting."""
    encoders = [layer for layer in layers if layer in ENCODER_LAYERS]
    if not encoders:
        return 0.0
    if config.encoders == "demo":
        return DEMO_WORKER_GB
    crops = CACHE_BYTES / 1e9 if sum(config.upstream(layer) == "px" for layer in encoders) > 1 else 0.0
    total = PROCESS_GB + crops + sum(encoder_of(layer).on_cpu * _encoder_gb(config, layer) for layer in encoders)
    return math.ceil(total * 10) / 10


def _encoder_gb(config: PrepConfig, layer: str) -> float:
    if layer in config.placement.vram_gb:
        return config.placement.vram_gb[layer]
    if config.encoders == "demo":
        return DEMO_VRAM_GB
    encoder = encoder_of(layer)
    share = getattr(config, layer).batch_size / TABLE_BATCH * encoder.growth(config)
    return encoder.weights_gb + share * encoder.activations_gb


def plan_passes(
    config: PrepConfig, nodes: Sequence[Node], layers: Collection[str] | None = None, loaded: bool = False
) -> tuple[list[Pass], list[str]]:
    """Return the passes in order, and remarks for the user.

    ``layers`` are those with something missing (None: all). All encoders that are ready share one actor where every
    card that can hold one of them can hold them all; otherwise each has a pass on every card that fits. What fits no
    card runs on CPUs, which a remark says. ``loaded``: a caption server keeps its model on the card, although it was
    asked to unload it. Raises ResourceError, with what is there and what to do, where
    ``placement.device: cuda`` or a cluster without CPUs can never be satisfied.
    """
    wanted = [layer for layer in config.active_layers if layers is None or layer in layers]
    remarks: list[str] = []
    offers = gpu_offers(config, nodes, remarks, loaded)
    devices = {layer: _device(config, layer, offers, nodes, remarks) for layer in wanted}
    steps = []
    for group, device in in_order(config, devices):
        if device == "captions":
            slots = sum(seat.slots for seat in caption_seats(config, nodes, remarks)[0])
            steps.append(Pass(group, device, actors=slots, cpus=0, max_actors=slots))
        elif device == "cpu":
            steps.append(_cpu_pass(config, group, nodes, remarks))
        else:
            for together in _fused(config, group, offers):
                steps.append(_gpu_pass(config, together, offers, nodes, remarks))
    return steps, list(dict.fromkeys(remarks))


def in_order(config: PrepConfig, devices: Mapping[str, str]) -> list[tuple[tuple[str, ...], str]]:
    """Group layers of equal device so that each comes after what it is made from; CPUs first, captions last."""
    waiting, groups = list(devices), []
    while waiting:
        for device in ("cpu", "cuda", "captions"):
            group: list[str] = []
            for _ in waiting:  # one by one, because a layer may follow its upstream within the same actor
                undone = [layer for layer in waiting if layer not in group]
                group += [
                    layer for layer in undone if devices[layer] == device and config.upstream(layer) not in undone
                ][:1]
            if group:
                groups.append((tuple(group), device))
                waiting = [layer for layer in waiting if layer not in group]
                break
    return groups


def _device(config: PrepConfig, layer: str, offers: Sequence[Offer], nodes: Sequence[Node], remarks: list[str]) -> str:
    if layer == "text" and config.captions.generated:
        return "captions"
    if layer not in ENCODER_LAYERS or config.placement.device == "cpu":
        return "cpu"
    need = vram_need(config, [layer])
    if any(offer.holds(need) for offer in offers):
        return "cuda"
    there = ", ".join(map(str, nodes)) or "no node"
    if config.placement.device == "cuda":
        raise ResourceError(
            f"placement.device is cuda, but {layer} needs {need:g} GB of GPU memory and no node offers it; "
            f"there: {there}{_left(offers)}. Lower {layer}.batch_size, add a larger GPU, or set placement.device=auto"
        )
    if not offers:
        remarks.append("no GPU: all encoders run on CPUs")
    else:
        remarks.append(f"{layer} needs {need:g} GB of GPU memory and fits no GPU{_left(offers)}: it runs on CPUs")
    return "cpu"


def _left(offers: Sequence[Offer]) -> str:
    free = ", ".join(f"{offer.free:g} GB on {offer.node.hostname or offer.node.address}" for offer in offers)
    return f" (free: {free})" if free else ""


def _fused(config: PrepConfig, group: tuple[str, ...], offers: Sequence[Offer]) -> list[tuple[str, ...]]:
    """All layers of a group together if that leaves no card idle which could hold one of them, else one by one."""
    for offer in offers:
        holds_one = any(offer.holds(vram_need(config, [layer])) for layer in group)
        if holds_one and not offer.holds(vram_need(config, group)):
            return [(layer,) for layer in group]
    return [group]


def _gpu_pass(
    config: PrepConfig, layers: tuple[str, ...], offers: Sequence[Offer], nodes: Sequence[Node], remarks: list[str]
) -> Pass:
    need = vram_need(config, layers)
    usable = [offer for offer in offers if offer.holds(need)]
    # a second process keeps a large card busy while the first one reads and writes
    most = max(offer.holds(need) for offer in usable)
    per_card = min([config.placement.actors_per_gpu, most, *(o.holds(need) for o in usable if not o.guarded)])
    vram_gb = need if all(offer.node.vram_gb for offer in usable) else 0.0
    slots = {
        offer.node: int(offer.node.gpus) * (min(per_card, offer.holds(need)) if vram_gb else per_card)
        for offer in usable
    }
    # a host with fewer CPUs than places for actors shares them
    share = min([float(ACTOR_CPUS), *(node.cpus / count for node, count in slots.items())])
    cpus = float(math.floor(share)) if share >= 1 else math.floor(share * 100) / 100
    actors = sum(slots.values())
    limit = config.workers or actors * JOINS
    used = {offer.node.id for offer in usable}
    excluded = tuple(node.id for node in nodes if node.gpus and node.id not in used)
    for offer in offers:
        if offer.node.id in excluded:
            cards = ". Start one Ray node per GPU there, as cluster.yaml does" if offer.node.gpus > 1 else ""
            remarks.append(
                f"{offer.node} is not used for {'+'.join(layers)}: {need:g} GB do not fit{_left([offer])}{cards}"
            )
    # rounded down to Ray's precision: upwards, the last actor of a card would wait for ever
    fraction = math.floor(10_000 / per_card) / 10_000
    return Pass(layers, "cuda", min(actors, limit), cpus, fraction, vram_gb, limit, excluded=excluded)


def _cpu_pass(config: PrepConfig, layers: tuple[str, ...], nodes: Sequence[Node], remarks: list[str]) -> Pass:
    need = memory_need(config, layers)
    by_cpus = sum(int(node.cpus) for node in nodes)
    if not by_cpus:
        there = ", ".join(map(str, nodes)) or "no node"
        raise ResourceError(
            f"{'+'.join(layers)} needs CPUs and no node offers one; there: {there}. Start Ray with --num-cpus of at "
            "least 1 on one machine"
        )
    actors = sum(min(int(node.cpus), int(node.memory_gb / need)) if need else int(node.cpus) for node in nodes)
    if not actors:
        most = max(node.memory_gb for node in nodes)
        remarks.append(
            f"one worker with {'+'.join(layers)} on a CPU takes about {need:g} GB of memory and no node offers more "
            f"than {most:.3g}: only one is started. Lower the batch sizes if it runs out"
        )
        return Pass(layers, "cpu", 1, max_actors=1)
    if actors < by_cpus:
        remarks.append(f"{actors} workers on {by_cpus} CPUs: each with {'+'.join(layers)} takes {need:g} GB of memory")
    limit = config.workers or actors * JOINS
    return Pass(layers, "cpu", min(actors, limit), max_actors=limit, memory_gb=need)


def gpu_offers(config: PrepConfig, nodes: Sequence[Node], remarks: list[str], loaded: bool = False) -> list[Offer]:
    """Return what is free on the GPUs of every node after what the caption servers there keep."""
    if config.placement.device == "cpu":
        return []
    cards: dict[str, list[float]] = {}
    for node in nodes:
        if node.gpus >= 1 and not node.cpus:
            remarks.append(f"{node} is not used: its GPUs need a CPU. Start its Ray with --num-cpus of at least 1")
        elif node.gpus >= 1:
            each = node.vram_gb / int(node.gpus) if node.vram_gb else math.inf
            cards[node.id] = [each] * int(node.gpus)
            if not node.vram_gb:
                remarks.append(
                    f"{node} registers no vram_gb: one worker per GPU, and nothing checks whether it fits. Start its "
                    "Ray with --resources='{\"vram_gb\": GB}'"
                )
    before = {name: list(free) for name, free in cards.items()}
    if loaded or not (config.captions.generated and SERVERS[config.captions.backend].unloads):
        book_captions(config, nodes, cards, remarks)
    return [
        Offer(
            node,
            min(cards[node.id]),
            node.vram_gb > 0 and len(cards[node.id]) == 1 and cards[node.id] == before[node.id],
        )
        for node in nodes
        if node.id in cards
    ]
