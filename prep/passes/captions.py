"""The caption pass: crops go to the caption hosts one by one, and every shard whose samples are through is committed.

It runs in the driver, not in Ray: hosts do the work, here is only waiting. The samples of all shards form one stream,
so that no slot idles where a shard ends; each answer is kept in the cache (``prep/captions/cache.py``) before anything
else happens with it, so that whatever is killed, nobody is asked twice.
"""

from __future__ import annotations

import asyncio
import io
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from nanodit.console import say
from nanodit.errors import DataError
from nanodit.files import sha256_bytes
from nanodit.storage import Storage, open_storage
from prep.captions import quality
from prep.captions.base import UNKNOWN
from prep.captions.cache import CaptionCache
from prep.captions.config import CaptionConfig
from prep.captions.hosts import HostPool, agreed_digest, list_faults, unload_models
from prep.captions.prompts import PEOPLE, SHIPPED, prompt_text
from prep.captions.quality import Accepted, Answer, Ask, CaptionRules, Flaw, next_step, next_steps
from prep.captions.servers import SERVERS
from prep.captions.sidecar import BadCaption, Caption, text_sample
from prep.config import PrepConfig
from prep.dataset.codecs import decode_pixels
from prep.dataset.layout import Part, Unit, fingerprint_of, members_of, read_part, read_range
from prep.dataset.writer import LayerWriter
from prep.passes.layers import ShardTask
from prep.passes.placement import Node, caption_hosts
from prep.passes.sidecars import came_with_images

PROMPT = SHIPPED[PEOPLE]
JPEG_QUALITY = 90
DECODERS = 4  # threads that read crops and write the cache
LOOKAHEAD = 16  # crops that are ready when a slot gets free, besides one per slot
OPEN_SHARDS = 32  # whose captions are held in memory until their last one arrives


def caption_recipe(config: PrepConfig) -> dict[str, Any]:
    """Everything that generated captions are made from, besides the images.

    ``backend``, ``model``, ``digest`` (asked from the hosts unless the config pins it), ``prompt`` (SHA-256 of its
    text), ``options`` (of the questions) and ``checks``. Raises ConfigError when a host lacks the model or two differ,
    ResourceError when no host answers.
    """
    captions = config.captions
    digest = captions.digest or asyncio.run(agreed_digest(captions))
    if digest == UNKNOWN:
        say(f"warning: the caption hosts do not say which weights {captions.model} has; recorded as unknown")
    return {
        "backend": captions.backend,
        "model": captions.model,
        "digest": digest,
        "prompt": sha256_bytes(read_prompt(captions).encode()),
        "options": question(captions),
        "checks": {
            "code": quality.CODE_VERSION,
            "min_words": captions.min_words,
            "max_words": captions.max_words,
            "reask_temperature": captions.reask_temperature,
        },
    }


def question(captions: CaptionConfig) -> dict[str, Any]:
    """Return the options of a first question, with the size of the picture that goes with it."""
    options = captions.options.asked() | {"image_side": captions.image_side}
    ignored = SERVERS[captions.backend].ignored_options
    return {name: value for name, value in options.items() if name not in ignored}


def read_prompt(captions: CaptionConfig) -> str:
    """Return the text of the prompt; errors as those of :func:`prep.captions.prompts.prompt_text`."""
    return prompt_text(captions.prompt)


def free_cards(config: PrepConfig, nodes: Sequence[Node]) -> bool:
    """Let caption servers unload their model from cards that passes are going to use; whether all of them have.

    Servers that cannot, and those elsewhere, are left alone. Of one that does not do it a line tells the user.
    """
    machines = {node.address for node in nodes if node.gpus}  # where the driver may be a node of its own
    urls = caption_hosts(config, [node for node in nodes if node.address in machines])
    if not urls or not SERVERS[config.captions.backend].unloads:
        return True
    faults = asyncio.run(unload_models(config.captions, urls))
    if faults:
        say(f"warning: {config.captions.model} may still be on a GPU that is needed now: {list_faults(faults.items())}")
    return not faults


def caption_units(
    config: PrepConfig, tasks: list[ShardTask], advance: Callable[[dict[str, Any]], None]
) -> Iterator[list[dict[str, Any]]]:
    """Caption the shards of the tasks and commit their text units; yields for each what ``LayerWorker.run`` returns.

    ``advance`` is called after every sample with the counts so far: ``samples`` that are through, ``captioned``
    by a host now, ``cached`` and ``rejected``, and ``hosts`` that answer as "2 of 3". Seconds are those that hosts
    spent on the shard. Raises ResourceError when all hosts are down for longer than ``captions.patience``, ConfigError
    when a host cannot do the work; what was captioned until then is kept, also when the caller stops.
    """
    events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    caption_pass = CaptionPass(config, tasks, events)
    # the loop has a thread of its own, so that Ctrl-C reaches the caller between two events and not inside a callback
    thread = threading.Thread(target=caption_pass.run, name="captions", daemon=True)
    thread.start()
    try:
        while True:
            kind, content = events.get()
            if kind == "end":
                if content is not None:
                    raise content
                return
            if kind == "counts":
                advance(content)
            else:
                yield content
    finally:
        caption_pass.stop()
        thread.join()


@dataclass
class Shard:
    """A shard that is being captioned: its crops, and the answers about each of them so far."""

    task: ShardTask
    crops: Part
    keys: list[str]  # those that came without a caption
    came: dict[str, Caption | BadCaption] = field(default_factory=dict)  # the others
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def unit(self) -> Unit:
        """What is going to be committed."""
        return Unit(self.task.bucket, self.task.shard, "text")

    @property
    def recipe(self) -> dict[str, Any]:
        """What the captions are made from."""
        return self.task.recipes["text"]


class CaptionPass:
    """Carries the samples of all shards through the hosts, in a thread of its own; says what happens in ``events``."""

    def __init__(self, config: PrepConfig, tasks: list[ShardTask], events: queue.SimpleQueue[tuple[str, Any]]) -> None:
        self.config, self.tasks, self.events = config, tasks, events
        self.storage: Storage = open_storage(config.output)
        self.prompt = read_prompt(config.captions)
        captions = config.captions
        self.rules = CaptionRules(
            captions.min_words, captions.max_words, question(captions), captions.reask_temperature, self.prompt
        )
        self.counts: dict[str, Any] = {"samples": 0, "captioned": 0, "cached": 0, "rejected": 0}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work: asyncio.Task[None] | None = None
        self._stopped = threading.Event()

    def run(self) -> None:
        """Do all of it; the last event is ("end", error or None)."""
        try:
            asyncio.run(self._main())
        except asyncio.CancelledError:
            self.events.put(("end", None))
        except BaseExceptionGroup as group:
            self.events.put(("end", _first(group)))
        except BaseException as error:  # raised again by who reads the events
            self.events.put(("end", error))
        else:
            self.events.put(("end", None))

    def stop(self) -> None:
        """Break off what is under way; answers that have arrived are kept."""
        self._stopped.set()
        if self._loop is not None and self._work is not None:
            with suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._work.cancel)

    async def _main(self) -> None:
        self._loop, self._work = asyncio.get_running_loop(), asyncio.current_task()
        if self._stopped.is_set() or not self.tasks:
            return
        recipes = [task.recipes["text"] for task in self.tasks]
        # of shards whose captions all came with the images nobody is asked
        recipe = next((recipe for recipe in recipes if "digest" in recipe), {})
        kept = {name: recipe.get(name) for name in ("backend", "model", "digest", "prompt", "options")}
        self.cache = CaptionCache(self.storage, kept)
        self.provenance = kept
        with ThreadPoolExecutor(DECODERS, thread_name_prefix="captions") as self._pool:
            async with HostPool(self.config.captions, kept["digest"]) as self._hosts:
                watch = asyncio.create_task(self._hosts.watch())
                stream = asyncio.create_task(self._stream())
                try:
                    await asyncio.wait({watch, stream}, return_when=asyncio.FIRST_COMPLETED)
                    if watch.done():
                        watch.result()
                    await stream
                finally:
                    for work in (watch, stream):
                        work.cancel()
                    await asyncio.gather(watch, stream, return_exceptions=True)

    async def _stream(self) -> None:
        """Start every sample as soon as there is room; shards are finished beside it."""
        room, opened = asyncio.Semaphore(2 * self._hosts.slots + LOOKAHEAD), asyncio.Semaphore(OPEN_SHARDS)
        async with asyncio.TaskGroup() as group:
            for task in self.tasks:
                await opened.acquire()
                shard = await self._offload(self._open, task)
                # those that have no crop, or a caption already, are through
                self.counts["samples"] += len(task.sources) - len(shard.keys if shard else ())
                if shard is None:
                    self._tell()
                    self._committed(task, 0, 0.0)
                    opened.release()
                    continue
                samples = []
                for key in shard.keys:
                    await room.acquire()
                    samples.append(group.create_task(self._sample(shard, key, room)))
                group.create_task(self._finish(shard, samples, opened))

    async def _sample(self, shard: Shard, key: str, room: asyncio.Semaphore) -> None:
        """Get the answers about one image until there is a caption, or the reason why there is none."""
        try:
            answers = shard.answers[key] = await self._offload(self.cache.read, key)
            count = len(answers)
            while isinstance(step := next_step(answers, self.rules), Ask):
                await self._ask(shard, key, step)
            self.counts["samples"] += 1
            self.counts["cached" if len(answers) == count else "captioned"] += 1
            self.counts["rejected"] += isinstance(step, Flaw)
            self._tell()
        finally:
            room.release()

    async def _ask(self, shard: Shard, key: str, step: Ask) -> None:
        """Ask a host one question about one image, and keep the answer before anything else is done with it."""
        jpeg = await self._offload(self._jpeg, shard, key)
        asked = {name: value for name, value in step.options.items() if name != "image_side"}
        answer, seconds = await self._hosts.ask(jpeg, self.prompt, asked)
        shard.seconds += seconds
        shard.answers[key].append(answer)
        # not to be broken off between the answer and the cache
        await asyncio.shield(self._offload(self.cache.write, key, list(shard.answers[key])))

    async def _finish(self, shard: Shard, samples: list[asyncio.Task[None]], opened: asyncio.Semaphore) -> None:
        """Wait for the samples, ask again about captions that two images share, and commit the unit."""
        await asyncio.gather(*samples)
        while asks := {key: step for key, step in self._next_steps(shard).items() if isinstance(step, Ask)}:
            await asyncio.gather(*(self._ask(shard, key, step) for key, step in asks.items()))
        refused = [key for key, step in self._next_steps(shard).items() if isinstance(step, Flaw)]
        alone = [next_step(shard.answers[key], self.rules) for key in refused]
        # those that are refused for having the caption of another image had not been counted
        self.counts["rejected"] += sum(isinstance(step, Accepted) for step in alone)
        self._tell()
        await self._offload(self._commit, shard)
        refused += [key for key, caption in shard.came.items() if isinstance(caption, BadCaption)]
        self._committed(shard.task, len(refused), shard.seconds)
        opened.release()

    def _next_steps(self, shard: Shard) -> dict[str, Accepted | Flaw | Ask]:
        return next_steps(shard.answers, self.rules)

    def _open(self, task: ShardTask) -> Shard | None:
        """Find the images to caption; None when the unit is committed already."""
        unit, recipe = Unit(task.bucket, task.shard, "text"), task.recipes["text"]
        part = read_part(self.storage, unit)
        if part is not None and part.fingerprint == fingerprint_of(recipe) and "text" not in task.again:
            return None
        crops = read_part(self.storage, Unit(task.bucket, task.shard, "px"))
        upstream = crops
        if crops is not None and crops.fingerprint != recipe["upstream"]:
            upstream = read_part(self.storage, Unit(task.bucket, task.shard, self.config.upstream("text")))
        if crops is None or upstream is None or upstream.fingerprint != recipe["upstream"]:
            raise DataError(
                f"{unit} cannot be captioned: what it is made from disappeared. Run nanodit prep run again to restore "
                "it"
            )
        keys = upstream.table["key"].to_pylist()
        came = dict(came_with_images(self.config, task, part, keys))
        return Shard(task, crops, [key for key in keys if key not in came], came)

    def _jpeg(self, shard: Shard, key: str) -> bytes:
        """Return the crop of one image as it is sent."""
        table, unit = shard.crops.table, shard.crops.unit
        (member,) = members_of("px", shard.crops.recipe)
        row = table["key"].to_pylist().index(key)
        place = (table[f"px/{member}/{name}"][row].as_py() for name in ("offset", "length", "sha256"))
        return picture_bytes(read_range(self.storage, unit, key, member, *place), self.config.captions.image_side)

    def _commit(self, shard: Shard) -> None:
        """Write the text unit, as ``LayerWorker.text`` does for sidecars."""
        with LayerWriter(self.storage, shard.unit, shard.recipe, facts={}) as writer:
            for key, step in sorted({**shard.came, **self._next_steps(shard)}.items()):
                if isinstance(step, Flaw | BadCaption):
                    writer.reject(key, step.reason, step.detail)
                    continue
                caption = step
                if isinstance(step, Accepted):
                    options = {**self.provenance["options"], **step.options}
                    caption = Caption(step.text, self.provenance | {"options": options})
                members, columns = text_sample(caption, shard.recipe)
                writer.add(key, members, **columns)
            writer.commit()

    def _committed(self, task: ShardTask, rejected: int, seconds: float) -> None:
        done = {"layer": "text", "device": "captions", "samples": len(task.sources), "rejected": rejected}
        self.events.put(("unit", [done | {"seconds": round(seconds, 3)}]))

    def _tell(self) -> None:
        hosts = f"{self._hosts.up} of {len(self._hosts.hosts)}"
        self.events.put(("counts", self.counts | {"hosts": hosts}))

    async def _offload(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run something that reads, writes or decodes in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


def picture_bytes(crop: bytes, side: int) -> bytes:
    """Write a crop as the JPEG that a model is shown, its longer side reduced to at most ``side`` pixels."""
    image = Image.fromarray(decode_pixels(crop))
    scale = side / max(image.size)
    if scale < 1:
        size = [max(1, round(length * scale)) for length in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error of a group of tasks, of which the others were cancelled for it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
