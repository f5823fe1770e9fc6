"""What an actor of the caption stage does: it asks servers about the samples of an item, and keeps every answer.

No Ray here: a :class:`CaptionWorker` lives in an actor (``prep/passes/ray_passes.py``) or in a test. It writes nothing
but the cache, each answer before anything else happens with it, so that whatever is killed, nobody is asked twice. The
servers are those of the config, or one of its own. Faults of servers follow the rules of ``prep/captions/hosts.py`` and
never blame a sample that could not be helped.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Self

from nanodit.errors import DataError, NanoditError, resource_error
from nanodit.storage import open_storage
from prep.captions.cache import CACHED_BY, CaptionCache, short_cache
from prep.captions.config import CaptionHost
from prep.captions.hosts import HostPool
from prep.captions.own_server import OwnServer, find_model
from prep.captions.prompts import Prompts
from prep.captions.quality import UNANSWERED, Accepted, Answer, Ask, CaptionRules, Flaw, Turn, next_step
from prep.config import PrepConfig
from prep.dataset.layout import Part, Unit, members_of, read_part, read_range
from prep.passes.captions import picture_bytes, question

DECODERS = 4  # threads that read crops and write the cache
PARTS = 8  # shards whose places in their tars are remembered
LOOK = 1.0  # seconds between looks at the server of one's own


@dataclass(frozen=True)
class CaptionItem:
    """Some samples of one shard: names, never pixels.

    ``taken`` maps those whose caption another image of the shard has to that caption, normalised, and the other's key.
    """

    bucket: str
    shard: int
    keys: tuple[str, ...]
    taken: dict[str, dict[str, str]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Write the item as text; Ray carries it as a cell of a table."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the item that :meth:`to_json` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"keys": tuple(fields["keys"])})


class CaptionWorker:
    """Captions items; several at a time may be at work, each in a thread of its caller.

    ``recipe`` is that of the text units, ``prompts`` are the texts of the questions, ``name`` tells this worker from
    others.
    """

    def __init__(self, config: PrepConfig, recipe: Mapping[str, Any], prompts: Prompts, name: str = "") -> None:
        captions = config.captions
        self.config, self.recipe, self.prompts, self.name = config, recipe, prompts, name
        self.storage = open_storage(config.output)
        self.cache = CaptionCache(self.storage, {key: recipe[key] for key in CACHED_BY})
        self.rules, self.short_rules = rules_of(config, prompts)
        self._server = OwnServer(captions.slots) if captions.own_servers else None
        self._hosts: HostPool | None = None
        self._endings: list[asyncio.Future[None]] = []  # what ends only by an error, which is that of all items
        self._parts: OrderedDict[tuple[str, int], tuple[Part, dict[str, int]]] = OrderedDict()
        self._lock = threading.Lock()
        self._listening: list[queue.SimpleQueue[dict[str, Any] | None]] = []
        self._pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="captions")
        self._loop = asyncio.new_event_loop()
        self._opening = asyncio.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="captions", daemon=True)
        self._thread.start()

    def caption(self, item: CaptionItem) -> Iterator[dict[str, Any]]:
        """Caption the samples of an item; yields what happens, as plain values.

        ``kind`` is "sample" (``key``, its ``answers``, how many were ``asked`` for now, and the ``seconds`` that
        servers spent; with short captions also ``short_of``, the caption that they follow, and the ``short`` answers),
        "say" (a ``line`` for the user), and at last "done", "failed" (``error``, ``exit_code``) or
        "defect" (``trace``). Each has the ``worker``, and how many of its servers are ``up``, ``of`` how many.
        """
        events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._listening.append(events)
        work = asyncio.run_coroutine_threadsafe(self._caption(item, events), self._loop)
        work.add_done_callback(lambda _: events.put(None))
        try:
            while (event := events.get()) is not None:
                yield self._signed(event)
            yield self._signed(_ending(work.exception()))
        except CancelledError:  # closed meanwhile
            return
        finally:
            self._listening.remove(events)
            work.cancel()

    def close(self) -> None:
        """Break off what is under way, and end the server of one's own; answers that have arrived are kept."""
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._pool.shutdown()

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._hosts:
            await self._hosts.__aexit__()
        if self._server:
            await asyncio.to_thread(self._server.close)

    def _signed(self, event: dict[str, Any]) -> dict[str, Any]:
        up, of = (self._hosts.up, len(self._hosts.hosts)) if self._hosts else (0, 1)
        return event | {"worker": self.name, "up": up, "of": of}

    def _tell(self, line: str) -> None:
        """Say something to the user, through an item that is at work."""
        if self._listening:
            self._listening[0].put({"kind": "say", "line": line})

    async def _caption(self, item: CaptionItem, events: queue.SimpleQueue[dict[str, Any] | None]) -> None:
        async with self._opening:
            hosts = self._hosts = self._hosts or await self._open()
        samples = asyncio.create_task(self._samples(hosts, item, events))
        try:
            await asyncio.wait({samples, *self._endings}, return_when=asyncio.FIRST_COMPLETED)
            for ending in self._endings:
                if ending.done():
                    ending.result()
            try:
                await samples
            except BaseExceptionGroup as group:
                error = _first(group)
                if not self._broken.done():  # what ends one item ends all, before they ask for more
                    self._broken.set_exception(error)
                    self._broken.exception()  # which is seen to
                raise error from None
        finally:
            samples.cancel()
            await asyncio.gather(samples, return_exceptions=True)

    async def _samples(
        self, hosts: HostPool, item: CaptionItem, events: queue.SimpleQueue[dict[str, Any] | None]
    ) -> None:
        async with asyncio.TaskGroup() as group:
            for key in item.keys:
                group.create_task(self._sample(hosts, item, key, events))

    async def _open(self) -> HostPool:
        """Start the server of one's own, if there is to be one, and watch over the servers."""
        captions, digest = self.config.captions, self.recipe["digest"]
        self._broken = self._loop.create_future()
        self._endings.append(self._broken)
        if self._server is None:
            hosts = HostPool(captions, digest, tell=self._tell)
        else:
            url = await asyncio.to_thread(self._server.start)
            await find_model(url, captions.model, captions.timeout, self._tell)
            hosts = HostPool(captions, digest, [CaptionHost(url=url, slots=captions.slots)], self._tell)
            hosts.hosts[0].name = self._server.name
            self._endings.append(asyncio.create_task(self._keep_up(self._server, hosts)))
        self._endings.append(asyncio.create_task(hosts.watch()))
        return hosts

    async def _keep_up(self, server: OwnServer, hosts: HostPool) -> None:
        """Start the server of one's own again when it has ended; how often, says ``captions.patience``."""
        while True:
            await asyncio.sleep(LOOK)
            server.forget_words()
            if server.ended:
                self._tell(f"{hosts.hosts[0].name} ended and is started again. It said: {server.last_words()}")
                hosts.move(hosts.hosts[0], await asyncio.to_thread(server.start))

    async def _sample(
        self, hosts: HostPool, item: CaptionItem, key: str, events: queue.SimpleQueue[dict[str, Any] | None]
    ) -> None:
        """Get the answers about one image until there is a caption, or the reason why there is none."""
        told: dict[str, Any] = {"kind": "sample", "bucket": item.bucket, "shard": item.shard, "key": key}
        told |= {"asked": 0, "seconds": 0.0}
        judge = partial(next_step, rules=self.rules, taken=item.taken.get(key))
        answers = await self._converse(hosts, item, told, self.cache, judge, self.prompts.long)
        told["answers"] = [asdict(answer) for answer in answers]
        if self.prompts.short and isinstance(step := judge(answers), Accepted):
            cache = short_cache(self.cache, self.recipe["short_prompt"], step.text)
            judge, before = partial(next_step, rules=self.short_rules), Turn(self.prompts.long, step.text)
            answers = await self._converse(hosts, item, told, cache, judge, self.prompts.short, before)
            told |= {"short_of": step.text, "short": [asdict(answer) for answer in answers]}
        events.put(told)

    async def _converse(
        self, hosts: HostPool, item: CaptionItem, told: dict[str, Any], cache: CaptionCache,
        judge: Callable[[list[Answer]], Accepted | Flaw | Ask], prompt: str, before: Turn | None = None,
    ) -> list[Answer]:  # fmt: skip
        """Return the answers to a question, those that are in the cache and then as many as have to be asked for."""
        key = told["key"]
        answers = await self._offload(cache.read, key)
        while isinstance(step := judge(answers), Ask):
            jpeg = await self._offload(self._jpeg, item, key)
            options = {name: value for name, value in step.options.items() if name != "image_side"}
            answer, spent = await hosts.ask(jpeg, prompt, options, before)
            answers.append(answer)
            told["asked"] += 1
            told["seconds"] += spent
            if answer.end not in UNANSWERED:
                # not to be broken off between the answer and the cache
                await asyncio.shield(self._offload(cache.write, key, list(answers)))
        return answers

    def _jpeg(self, item: CaptionItem, key: str) -> bytes:
        """Return the crop of one image as it is sent."""
        unit = Unit(item.bucket, item.shard, "px")
        part, rows = self._crops(unit)
        (member,) = members_of("px", part.recipe)
        place = (part.table[f"px/{member}/{name}"][rows[key]].as_py() for name in ("offset", "length", "sha256"))
        return picture_bytes(read_range(self.storage, unit, key, member, *place), self.config.captions.image_side)

    def _crops(self, unit: Unit) -> tuple[Part, dict[str, int]]:
        """Return a committed px unit, and the rows of its samples by key."""
        found = self._parts.get(place := (unit.bucket, unit.shard))
        if found is None:
            part = read_part(self.storage, unit)
            if part is None:
                raise DataError(f"{unit} disappeared while it was captioned. Run nanodit prep run again to restore it")
            found = part, {key: row for row, key in enumerate(part.table["key"].to_pylist())}
            with self._lock:
                self._parts[place] = found
                while len(self._parts) > PARTS:
                    self._parts.popitem(last=False)
        return found

    async def _offload(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run something that reads, writes or decodes in a thread."""
        return await self._loop.run_in_executor(self._pool, function, *arguments)


def rules_of(config: PrepConfig, prompts: Prompts) -> tuple[CaptionRules, CaptionRules]:
    """Return which answers are captions, and what is asked; then the same of short captions."""
    captions = config.captions
    asked = question(captions), captions.reask_temperature
    return (
        CaptionRules(captions.min_words, captions.max_words, *asked, prompts.long),
        CaptionRules(captions.short_min_words, captions.short_max_words, *asked, prompts.short, short=True),
    )


def _first(error: BaseException) -> BaseException:
    """Return the first error of a group of tasks, of which the others were cancelled for it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _ending(error: BaseException | None) -> dict[str, Any]:
    """Return how an item ended, for who reads its events: Ray may drop what is raised."""
    if error is None:
        return {"kind": "done"}
    known = error if isinstance(error, NanoditError) else resource_error(error)
    if known is None:  # not for the user
        return {"kind": "defect", "trace": "".join(traceback.format_exception(error))}
    return {"kind": "failed", "error": str(known), "exit_code": known.exit_code}
