"""``prep run``: plan, compute what is missing, publish; one at a time per output folder."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanodit.config import dump_config
from nanodit.console import Progress, duration, say, waiting
from nanodit.errors import DataError, Interrupted
from nanodit.files import no_link
from nanodit.lock import locked
from nanodit.storage import LocalFolder, Storage, open_storage
from prep.captions.cache import forget_rejects
from prep.config import PrepConfig
from prep.dataset.layout import Part, Unit, read_part, same_recipe
from prep.dataset.versions import collect_garbage, keep_unit
from prep.encoders.hub import Pin
from prep.encoders.pins import other_networks, pin_config, read_pins, resolve_models, unknown_models, write_pins
from prep.images.scan import Reject
from prep.passes import cost
from prep.passes.nodes import Node, local_node
from prep.passes.placement import Pass, plan_passes
from prep.passes.plan import UNTIL_THE_RUN, Plan, check_folders, make_plan, remaining, write_manifest
from prep.passes.preflight import preflight
from prep.passes.publish import Published, gate, publish

PART_FILE = re.compile(r"parts/bucket_(?P<bucket>\d+x\d+)-shard-(?P<shard>\d+)\.(?P<layer>\w+)\.parquet")
TAR_FILE = re.compile(r"bucket_(?P<bucket>\d+x\d+)/shard-(?P<shard>\d+)\.(?P<layer>\w+)\.tar")
CARD_SECONDS = 3.0  # in which the last workers of a pass, or servers, end, and CUDA gives back their memory
UPLOAD_INTERVAL = 30.0  # seconds between two versions of a log in an object store


class RunFolder:
    """``runs/NNNN/`` of a dataset: the resolved config and a log with times and host, which no other file may hold.

    ``name`` is its path below the dataset, ``rejects`` that of the table of a run which publishes none.
    """

    def __init__(self, storage: Storage, config: PrepConfig) -> None:
        numbers = (name.split("/")[1] for name in storage.names("runs/"))
        last = max((int(number) for number in numbers if number.isdigit()), default=0)
        self.storage, self.name = storage, f"runs/{last + 1:04d}"
        self.rejects = f"{self.name}/rejects.parquet"
        self._lines: list[str] = []
        self._uploaded = 0.0
        storage.write(f"{self.name}/config.yaml", dump_config(config))
        self.log("start", host=socket.gethostname(), pid=os.getpid())

    def log(self, event: str, **fields: Any) -> None:
        """Append one event to ``log.jsonl``."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n"
        name = f"{self.name}/log.jsonl"
        if isinstance(self.storage, LocalFolder):
            with open(self.storage.root / name, "a", encoding="utf-8", opener=no_link) as file:
                file.write(line)
            return
        self._lines.append(line)  # nothing can be appended to an object: it is written whole, but not for every shard
        if event != "shard" or time.monotonic() - self._uploaded > UPLOAD_INTERVAL:
            self.storage.write(name, "".join(self._lines))
            self._uploaded = time.monotonic()


def print_plan(config: PrepConfig, prune: bool = False, retry_rejects: bool = False) -> None:
    """Print what ``prep run`` would compute and why, where, how long and how many GB.

    Nothing is written but what the scan saw, in a dataset that exists, so that the run need not read the sources again.
    Raises ResourceError for what could never fit, and DataError where the run would stop at once.
    """
    config = pin_config(config, read_pins(config.output))
    plan = make_plan(config, prune=prune, retry_rejects=retry_rejects)
    gate(config, plan.rejects + plan.expected, plan.seen, report=None)
    for line in [*plan.explain(), *cost.kept_line(plan), *other_networks(config)]:
        say(line)
    if plan.missing:
        passes, remarks = plan_passes(config, known_nodes(), {unit.layer for unit in plan.missing})
        storage = open_storage(config.output)
        free = cost.free_bytes(storage)
        lines = cost.estimate(plan, passes, storage)
        table = cost.table(lines, free if free is None else free / 1e9)
        for line in [*remarks, *table, *cost.pass_times(lines, passes)]:
            say(line)
        cost.check_room(plan)


def known_nodes() -> list[Node]:
    """Return the nodes of the cluster that ``RAY_ADDRESS`` names, else this machine; no Ray is started for it."""
    if not os.environ.get("RAY_ADDRESS"):
        return [local_node()]
    with waiting("loading Ray"):
        from prep.passes.ray_passes import cluster_nodes, ray_session

    with ray_session():
        return cluster_nodes()


def run(config: PrepConfig, prune: bool = False, retry_rejects: bool = False) -> None:
    """Make the dataset complete, computing only what is missing. Raises NanoditError; the same call continues.

    ``prune`` drops the samples whose source files are gone, ``retry_rejects`` tries those again that a layer refused.
    """
    check_folders(config)
    root = open_storage(config.output)
    with locked(root) as lock, interruptible():
        folder = RunFolder(root, config)
        start = time.monotonic()
        try:
            root.remove_temporary_files()
            work: dict[str, LayerWork] = defaultdict(LayerWork)
            plan = prepare(config, folder, prune, retry_rejects)
            if retry_rejects and config.captions.generated:  # or the answers that were refused would be read again
                forget_rejects(root, plan.again)
            rounds = 0
            while plan.missing:
                if rounds > len(config.active_layers):  # each round completes one layer more
                    reasons = "; ".join(plan.explain())
                    raise DataError(
                        f"{root}: still not complete after {rounds} rounds ({reasons}). Run nanodit prep run again"
                    )
                compute(plan, folder, work)
                plan, rounds = remaining(plan), rounds + 1
            root.remove_temporary_files()
            lock.check()
            with Progress("publish", len(plan.sources)) as progress:
                published = publish(plan, current_parts(plan), folder.rejects)
                progress.update(published.counts["samples"])
            remove_leftovers(root, plan)
        except KeyboardInterrupt:
            folder.log("interrupted")
            raise Interrupted(f"{root}: stopped, every finished shard is kept. The same command continues") from None
        except Exception as error:
            folder.log("failed", error=str(error))
            raise
        seconds = time.monotonic() - start
        outcome = {"counts": published.counts, "changed": published.changed, "fingerprint": published.fingerprint}
        folder.log("done", seconds=round(seconds, 1), **outcome)
    summarise(plan, published, work, seconds)


def read_on_nodes(config: PrepConfig, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Hash sources and read their headers on the nodes; yields (name, what the scan remembers) as they are done."""
    with waiting("loading Ray"):
        from prep.passes.ray_passes import ray_session, read_sources

    with interruptible(), ray_session(), Progress("hash", len(names), "files") as progress:
        for found in read_sources(config.source, names, config.image.max_pixels):
            yield from found.items()
            progress.advance(len(found))


def prepare(config: PrepConfig, folder: RunFolder, prune: bool, retry_rejects: bool = False) -> Plan:
    """Make the plan of a run, pass its gate, record its models and fix which samples each shard holds.

    Models are not downloaded before the sources have passed the gate, nor when nothing is missing.
    """
    pins = read_pins(folder.storage)
    while True:
        plan = make_plan(pin_config(config, pins), prune, retry_rejects, ahead=partial(read_on_nodes, config))
        gate(config, plan.rejects + plan.expected, plan.seen, folder.rejects)
        if plan.missing and (unknown := unknown_models(config, pins)):
            from prep.doctor.models import check_downloads

            for line in check_downloads(config, unknown):
                say(line)
        resolved = resolve_models(config, pins) if plan.missing else pins
        if any(plan.recipes[unit].get("digest") == UNTIL_THE_RUN for unit in plan.missing):
            resolved = resolved | caption_pin(config)
        if resolved == pins:
            break
        write_pins(folder.storage, resolved)
        pins = resolved
    numbers = {"seen": plan.seen, "samples": len(plan.sources), "shards": len(plan.shards)}
    folder.log("plan", **numbers, why=plan.explain())
    for line in plan.notes:
        say(line)
    write_manifest(plan)
    return plan


def caption_pin(config: PrepConfig) -> dict[str, Pin]:
    """Return which weights the caption model has, by its name: one of the servers that a run starts knows it."""
    with waiting("loading Ray"):
        from prep.passes.ray_captions import digest_on_a_node

    digest = digest_on_a_node(config)
    say(f"{config.captions.model} is pinned to {digest}")
    return {config.captions.model: Pin(digest, {})}


@dataclass
class LayerWork:
    """The cost of computing a layer: samples, and seconds summed over the actors."""

    samples: int = 0
    seconds: float = 0.0


def compute(plan: Plan, folder: RunFolder, work: dict[str, LayerWork]) -> None:
    """Compute and commit the missing units, pass by pass, and add what each layer took to ``work``.

    Between two passes the rejects are counted again: captions of a day are not asked for when half of the pictures
    turned out to be unusable.
    """
    with waiting("loading Ray"):  # which takes seconds
        from prep.passes.ray_passes import cluster_nodes, on_every_node, ray_session, run_pass

    config = plan.config
    for line in other_networks(config):
        say(line)
    with interruptible(), ray_session():
        nodes = cluster_nodes()
        if config.captions.own_servers:
            from prep.passes.ray_captions import with_ollama

            nodes = with_ollama(nodes)
        passes, remarks = place(config, nodes, {unit.layer for unit in plan.missing})
        lines = cost.estimate(plan, passes, folder.storage)
        for line in [*remarks, *cost.table(lines), *cost.pass_times(lines, passes)]:
            say(line)
        preflight(config, plan, on_every_node)
        computed: list[str] = []
        on_cards = False  # whether the pass before was on cards, which CUDA gives back with the end of its processes
        while passes:
            step = passes.pop(0)
            tasks = plan.tasks(step.layers)
            if not tasks:
                continue
            layers = [layer for layer in step.layers if any(layer in task.recipes for task in tasks)]
            total = sum(len(task.sources) * len(task.recipes) for task in tasks)
            with Progress("+".join(layers), total, unit="samples x layers") as progress:
                asked, rejected = step.device == "captions", 0
                if on_cards and (asked or step.device == "cuda"):  # a server looks for room once, when it loads
                    time.sleep(CARD_SECONDS)
                    on_cards = False
                if asked:
                    from prep.passes.caption_stage import caption_units
                    from prep.passes.captions import free_all_cards
                    from prep.passes.ray_captions import ask_all

                    results = caption_units(
                        config, tasks, step.actors,
                        lambda counts: progress.update(counts.pop("samples"), **counts), ask_all,
                    )  # fmt: skip
                else:
                    results = run_pass(config, step, tasks)
                for units in results:
                    folder.log("shard", units=units)
                    for unit in units:
                        work[unit["layer"]].samples += unit["samples"]
                        work[unit["layer"]].seconds += unit["seconds"]
                        for death in unit.get("deaths", ()):
                            say(f"a worker died ({death}); the samples it was working on were tried one by one")
                        if note := unit.get("note"):  # of the encoder, about the memory of its GPU
                            say(note)
                    if not asked:  # the captions say for each sample when it is through
                        rejected += sum(unit["rejected"] for unit in units)
                        progress.advance(sum(unit["samples"] for unit in units), rejected=rejected)
            on_cards = step.device == "cuda" or (asked and config.captions.own_servers)
            if asked:
                nodes = cluster_nodes()
                loaded = not free_all_cards(config, nodes)
                if passes:  # which may use the cards of the caption servers now
                    layers = {layer for one in passes for layer in one.layers}
                    passes, remarks = plan_passes(config, nodes, layers, loaded)
                    for line in remarks:
                        say(line)
            if passes:
                computed += layers
                gate(config, known_rejects(plan, computed), plan.seen, folder.rejects)


def place(config: PrepConfig, nodes: list[Node], layers: Collection[str]) -> tuple[list[Pass], list[str]]:
    """Return :func:`plan_passes` for cards that the caption servers have been asked to leave, where that comes next."""
    passes, remarks = plan_passes(config, nodes, layers)
    beyond_cpus = [step.device for step in passes if step.device != "cpu"]
    if beyond_cpus[:1] == ["cuda"] and config.captions.generated:
        from prep.passes.captions import free_cards

        if not free_cards(config, nodes):
            return plan_passes(config, nodes, layers, loaded=True)
    return passes, remarks


def known_rejects(plan: Plan, computed: list[str]) -> list[Reject]:
    """Return everything that is known to be refused when some layers have been computed."""
    rejects = list(plan.rejects)
    for unit in plan.recipes:
        part = plan.parts.get(unit)
        if part is None and unit.layer in computed:
            part = read_part(plan.config.output, unit, ["key"])
        for item in part.rejects if part else ():
            rejects.append(Reject(plan.sources[item.key].name, unit.layer, item.reason, item.detail))
    return rejects


@contextmanager
def interruptible() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def current_parts(plan: Plan) -> dict[Unit, Part]:
    """Return every unit of the plan as committed, with the keys of its table alone.

    Raises DataError for one that is missing or of another recipe.
    """
    root, parts = open_storage(plan.config.output), {}
    for unit, recipe in plan.recipes.items():
        part = plan.parts.get(unit) or read_part(root, unit, ["key"])
        if part is None or not same_recipe(part.recipe, recipe):
            raise DataError(f"{root.where(unit.tar)} was not computed. Run nanodit prep run again")
        parts[unit] = part
    return parts


def remove_leftovers(storage: Storage, plan: Plan) -> None:
    """Delete the units of shards that the published index no longer knows, parts first, and tars without a part.

    Such a tar is of a run that was killed between the two. Other files are not ours. What an earlier version names is
    kept before, and what none names is not kept any longer.
    """
    kept, gone = set(), set()
    for part in storage.names("parts/"):
        if match := PART_FILE.fullmatch(part):
            unit = Unit(match["bucket"], int(match["shard"]), match["layer"])
            if (unit.bucket, unit.shard) in plan.shards:
                kept.add(unit.tar)
            else:
                keep_unit(storage, unit)
                gone.add(unit.tar)
                storage.delete(part)
    for tar in storage.names("bucket_"):
        if tar not in kept and (match := TAR_FILE.fullmatch(tar)):
            if tar not in gone:
                keep_unit(storage, Unit(match["bucket"], int(match["shard"]), match["layer"]))
            storage.delete(tar)
    storage.remove_empty_folders()
    collect_garbage(storage, complete=True)


def summarise(plan: Plan, published: Published, work: dict[str, LayerWork], seconds: float) -> None:
    """Print what was computed, what was refused, what to look at, and what was written."""
    for layer, done in work.items():
        rate = done.samples / max(done.seconds, 1e-9)
        say(
            f"  {layer:<5}{done.samples:>8} samples {done.seconds:>9.1f} actor seconds {rate:>8.1f} samples/s per actor"
        )
    if not work:
        say("nothing to compute: every layer of every shard is current")
    for reason, count in published.reasons.most_common():
        say(f"  rejected {count}: {reason}")
    for warning in published.warnings:
        say(f"warning: {warning}")
    counts, root = published.counts, plan.config.output
    what = ", ".join(published.changed) if published.changed else "nothing (already complete)"
    say(
        f"wrote {what} in {root}: {counts['samples']} samples ({counts['train']} train, {counts['holdout']} holdout) "
        f"in {len(plan.shards)} shards, {counts['rejects']} rejects, {duration(seconds)}"
    )
