"""What the tests of the caption pass share: crops that are committed without Ray or encoders, and the tasks on them."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nanodit.files import sha256_bytes
from prep.captions.prompts import Prompts
from prep.config import PrepConfig
from prep.dataset.codecs import encode_pixels
from prep.dataset.layers import LAYERS
from prep.dataset.layout import Part, Unit, members_of, read_part
from prep.dataset.writer import LayerWriter
from prep.images.sources import Source
from prep.passes.caption_stage import caption_units
from prep.passes.caption_worker import CaptionItem, CaptionWorker
from prep.passes.captions import caption_recipe
from prep.passes.layers import ShardTask

FAST = {"cool_down": 0.05, "patience": 2.0, "timeout": 5.0, "min_words": 30, "max_words": 200, "image_side": 64}


def caption_config(tmp_path: Path, hosts: list[Any], **captions: Any) -> PrepConfig:
    """A config of 64-pixel crops that are captioned by ``hosts``."""
    (tmp_path / "source").mkdir(exist_ok=True)
    section = {"backend": "ollama", "hosts": hosts} | FAST | captions
    return PrepConfig.model_validate(
        {"source": str(tmp_path / "source"), "output": str(tmp_path / "out"), "base": 64, "encoders": "demo",
         "layers": ["text"], "captions": section}
    )  # fmt: skip


def commit_crops(
    config: PrepConfig, shards: int, size: int, seed: int = 0, image_format: str = "webp"
) -> list[ShardTask]:
    """Commit the px units of some shards of random pixels; returns them as tasks without recipes."""
    (member,) = members_of("px", {"format": image_format})
    tasks = []
    for shard in range(shards):
        random = np.random.default_rng([seed, shard])
        pixels = [random.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(size)]
        crops = {sha256_bytes(crop.tobytes())[:32]: crop for crop in pixels}
        recipe = {"layer": "px", "shard": shard} | ({} if member == "webp" else {"format": image_format})
        with LayerWriter(config.output, Unit("64x64", shard, "px"), recipe, {}) as writer:
            for key in sorted(crops):
                writer.add(
                    key,
                    {member: encode_pixels(crops[key], member)},
                    phash="0" * 16,
                    sharpness=1.0,
                    thumbnail=b"thumbnail",
                )
            writer.commit()
        sources = tuple(Source(f"{key}.png", key, 1, 64, 64) for key in sorted(crops))
        tasks.append(ShardTask("64x64", shard, sources, {}))
    return tasks


def with_recipes(config: PrepConfig, tasks: list[ShardTask]) -> list[ShardTask]:
    """The tasks with the text recipes that a plan would give them."""
    recipe = caption_recipe(config)
    found = []
    for task in tasks:
        upstream = read_part(config.output, Unit(task.bucket, task.shard, "px"))
        switches = LAYERS["text"].switches(config.flips, config.captions.short)
        recipes = {"text": {"layer": "text", "code": 1, "upstream": upstream.fingerprint, **recipe, **switches}}
        found.append(ShardTask(task.bucket, task.shard, task.sources, recipes))
    return found


def ask_here(
    config: PrepConfig, recipe: Mapping[str, Any], prompts: Prompts, items: Sequence[CaptionItem]
) -> Iterator[dict[str, Any]]:
    """What the actors of ``prep/passes/ray_captions.py`` do, by one worker in this process."""
    worker, events = CaptionWorker(config, recipe, prompts), queue.SimpleQueue()

    def caption(item: CaptionItem) -> None:
        for event in worker.caption(item):
            events.put(event)

    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(caption, item) for item in items]
        try:
            while not events.empty() or not all(one.done() for one in work):
                with contextlib.suppress(queue.Empty):
                    yield events.get(timeout=0.02)
        finally:
            for one in work:
                one.cancel()
            worker.close()


def captioning(
    config: PrepConfig, tasks: list[ShardTask], advance: Callable[[dict[str, Any]], None] = lambda counts: None
) -> Iterator[list[dict[str, Any]]]:
    """Caption tasks with recipes in this process."""
    slots = sum(host.slots for host in config.captions.servers) or config.captions.slots
    return caption_units(config, tasks, slots, advance, ask_here)


def run_captions(config: PrepConfig, tasks: list[ShardTask]) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Caption the tasks; returns what was yielded and all counts."""
    counts: list[dict[str, Any]] = []
    return list(captioning(config, with_recipes(config, tasks), counts.append)), counts


def text_parts(config: PrepConfig, tasks: list[ShardTask]) -> list[Part]:
    """The committed text units of the tasks."""
    parts = [read_part(config.output, Unit(task.bucket, task.shard, "text")) for task in tasks]
    assert None not in parts
    return parts


def captions_of(config: PrepConfig, tasks: list[ShardTask]) -> dict[str, str]:
    """Every caption that was committed, by key."""
    tables = [part.table for part in text_parts(config, tasks)]
    return {
        key: text for table in tables for key, text in zip(*(table[name].to_pylist() for name in ("key", "caption")))
    }


def rejects_of(config: PrepConfig, tasks: list[ShardTask]) -> dict[str, str]:
    """The reason of every image that was rejected, by key."""
    return {reject.key: reject.reason for part in text_parts(config, tasks) for reject in part.rejects}


def unit_bytes(config: PrepConfig) -> dict[str, bytes]:
    """The text tars and parts, byte for byte."""
    files = [path for path in Path(config.output).rglob("*.text.*") if path.is_file()]
    return {path.name: path.read_bytes() for path in files}
