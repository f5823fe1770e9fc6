"""A pool of caption hosts: whichever has a free slot answers a question, and those that fail are left alone a while.

There is no queue per host: a question waits for the next free slot anywhere, so that unequal hosts are busy to the end.
A host that fails cools down, twice as long each time; then it is asked which weights it serves and gets one single
question, and all its slots again when that is answered. All of it runs in one event loop.

An image is to blame only where a host fails on it, answers another question, and fails on it again. Where no other
image's question came between, that is the control question: a token about a plain picture.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image

from nanodit.console import duration, say
from nanodit.errors import ConfigError, ResourceError
from prep.captions.base import CaptionServer, HostFault, HostTimeout, HostUnreachable, RequestRefused, SampleFault
from prep.captions.config import CaptionConfig, CaptionHost
from prep.captions.quality import Answer, Turn
from prep.captions.servers import SERVERS

LONGEST_COOL_DOWN = 120.0  # seconds
TICK = 0.1  # seconds between looks at hosts whose cool-down may be over
SAMPLE_FAULTS, SAMPLE_TIMEOUTS = 2, 3  # so often servers may fail on one image before that is the image's fault
CONTROL_SIDE = 224  # pixels of the picture of a control question; some models refuse smaller ones
ADDRESS = re.compile(r"\S*(?:\d+\.\d+\.\d+\.\d+|:\d{2,5}\b)\S*")  # in a server's words, which a dataset keeps


@dataclass
class HostState:
    """One server and its state; times are those of the monotonic clock."""

    server: CaptionServer
    slots: int
    name: str  # in messages
    active: int = 0
    admitted: bool = False  # it has said, since it last failed, that it serves the right weights
    failures: int = 0  # in a row
    failed_at: float = 0.0
    resume_at: float = 0.0
    down_since: float | None = None
    fault: str = ""
    pace: float = 0.0  # seconds per answer, as lately observed
    proven_at: float = 0.0  # when it was asked what it answered last

    def free(self, now: float) -> bool:
        """Tell whether another question may be sent: one at a time to a host that has yet to prove itself."""
        proven = self.admitted and not self.failures
        return now >= self.resume_at and self.active < (self.slots if proven else 1)


class HostPool:
    """Caption hosts, all of which must serve the weights of ``digest``; by default those of the config.

    ``tell`` gets lines for the user. Use as an async context manager; :meth:`watch` must run beside the questions.
    """

    def __init__(
        self,
        config: CaptionConfig,
        digest: str,
        hosts: Sequence[CaptionHost] | None = None,
        tell: Callable[[str], None] = say,
    ) -> None:
        self.config, self.digest, self._tell = config, digest, tell
        self.hosts = [
            HostState(open_server(host, config), host.slots, f"caption host {host.url}")
            for host in (config.servers if hosts is None else hosts)
        ]
        self._changed = asyncio.Condition()
        self._left: list[CaptionServer] = []

    async def __aenter__(self) -> HostPool:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.gather(*(server.close() for server in [*self._left, *(host.server for host in self.hosts)]))

    def move(self, host: HostState, url: str) -> None:
        """Ask a host at another URL from now on."""
        self._left.append(host.server)  # which somebody may be waiting for
        host.server = open_server(CaptionHost(url=url, slots=host.slots), self.config)
        host.admitted, host.resume_at = False, 0.0

    @property
    def up(self) -> int:
        """Return how many hosts are not known to be down."""
        return sum(host.down_since is None for host in self.hosts)

    async def ask(
        self, jpeg: bytes, prompt: str, options: Mapping[str, Any], before: Turn | None = None
    ) -> tuple[Answer, float]:
        """Return the answer of some host, and the seconds that hosts spent on it; ``before`` as servers have it.

        After ``SAMPLE_FAULTS`` or ``SAMPLE_TIMEOUTS`` for which the image is to blame its ``end`` says so, and its text
        is what the server said. This waits as long as it takes: :meth:`watch` ends the wait when no host is left.
        Raises ConfigError.
        """
        faults = timeouts = 0
        failed_at, spent = 0.0, 0.0
        last: HostState | None = None
        while True:
            last = host = await self._take(avoid=last)
            start = asked_at = time.monotonic()
            try:
                await self._admit(host)
                if failed_at and host.proven_at < failed_at:
                    await self._prove(host, prompt, options)
                asked_at = time.monotonic()
                answer = await self._caption(host, jpeg, prompt, options, before)
            except (SampleFault, RequestRefused, HostTimeout) as fault:
                late, said = isinstance(fault, HostTimeout), getattr(fault, "said", str(fault))
                faults, timeouts, failed_at = faults + (not late), timeouts + late, time.monotonic()
                self._failed(host, asked_at, fault if late else HostFault(f"failed ({said})"), patient=not late)
                if faults == SAMPLE_FAULTS or timeouts == SAMPLE_TIMEOUTS:
                    words = ADDRESS.sub("...", said)
                    return Answer(words, "timeout" if late else "failed", options), spent + failed_at - start
            except HostFault as fault:
                self._failed(host, asked_at, fault)
            else:
                self._answered(host, asked_at)
                return answer, spent + time.monotonic() - start
            finally:
                spent += time.monotonic() - start
                host.active -= 1
                await self._wake()

    async def watch(self) -> None:
        """Wake whoever waits for a cool-down to end. Raises ResourceError when all hosts were down for too long."""
        while True:
            await asyncio.sleep(TICK)
            await self._wake()
            since = [host.down_since for host in self.hosts]
            if None in since or any(host.active for host in self.hosts):
                continue
            if time.monotonic() - max(since) > self.config.patience:
                raise ResourceError(
                    f"no caption host has answered for {duration(self.config.patience)} (captions.patience): "
                    f"{list_faults((host.name, host.fault) for host in self.hosts)}. The captions made so far are "
                    "kept: repair the hosts and run the same command again"
                )

    async def _take(self, avoid: HostState | None) -> HostState:
        """Wait for a free slot; of several hosts the fastest, and the one to avoid only if there is no other."""
        async with self._changed:
            while True:
                now = time.monotonic()
                free = [host for host in self.hosts if host.free(now)]
                others = [host for host in free if host is not avoid]
                # the one to avoid may answer when all others are down
                if others or (free and all(host is avoid or host.down_since is not None for host in self.hosts)):
                    host = min(others or free, key=lambda host: host.pace)
                    host.active += 1
                    return host
                await self._changed.wait()

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _admit(self, host: HostState) -> None:
        """Make sure that a host serves the right weights, when it is first used and whenever it comes back.

        Raises ConfigError for other weights, HostFault as the server does.
        """
        if host.admitted:
            return
        try:
            digest = await host.server.digest()
        except RequestRefused as refusal:  # neither of these is about the image
            raise ConfigError(str(refusal)) from refusal
        except (HostTimeout, SampleFault) as fault:
            raise HostFault(str(fault)) from fault
        if digest != self.digest:
            raise unequal_weights({host.name: digest}, self.digest)
        host.admitted = True
        await self._wake()

    async def _caption(
        self, host: HostState, jpeg: bytes, prompt: str, options: Mapping[str, Any], before: Turn | None
    ) -> Answer:
        """Ask about one picture; a refusal of a host that has yet to answer anything may be one of every picture."""
        try:
            return await host.server.caption(jpeg, prompt, options, before)
        except RequestRefused:
            if not host.proven_at:
                await self._prove(host, prompt, options)
            raise

    async def _prove(self, host: HostState, prompt: str, options: Mapping[str, Any]) -> None:
        """Ask the control question. Raises HostFault where a host fails on it, ConfigError where it refuses it."""
        start = time.monotonic()
        try:
            await host.server.caption(control_picture(), prompt, {**options, "num_predict": 1})
        except RequestRefused as refusal:
            raise ConfigError(str(refusal)) from refusal  # of any picture
        except (SampleFault, HostTimeout) as fault:
            raise HostFault(f"fails on any picture ({fault})") from fault
        self._is_well(host, start)

    def _answered(self, host: HostState, start: float) -> None:
        seconds = time.monotonic() - start
        host.pace = 0.7 * host.pace + 0.3 * seconds if host.pace else seconds
        self._is_well(host, start)

    def _is_well(self, host: HostState, start: float) -> None:
        host.proven_at = max(host.proven_at, start)
        if start < host.failed_at:  # it was under way when the host failed: not a sign that it is back
            return
        if host.down_since is not None:
            self._tell(f"{host.name} answers again")
        host.failures, host.down_since = 0, None

    def _failed(self, host: HostState, start: float, fault: HostFault, patient: bool = False) -> None:
        """Let a host cool down; a ``patient`` failure only does so when it comes again and again."""
        now = time.monotonic()
        if start < host.failed_at:  # likewise
            return
        host.failures += 1
        host.failed_at, host.fault = now, str(fault)
        if patient and host.failures <= SAMPLE_FAULTS:
            return
        pause = min(self.config.cool_down * 2 ** (host.failures - 1), LONGEST_COOL_DOWN)
        host.resume_at = now + max(pause, fault.wait)
        host.admitted = False
        if host.down_since is None:
            host.down_since = now
            self._tell(f"{host.name} {fault}; trying it again in {duration(host.resume_at - now)}")


@cache
def control_picture() -> bytes:
    """Return a plain picture as JPEG, which any server that is well can answer a question about."""
    buffer = io.BytesIO()
    Image.new("RGB", (CONTROL_SIDE, CONTROL_SIDE), (128, 128, 128)).save(buffer, "JPEG")
    return buffer.getvalue()


def open_server(host: CaptionHost, config: CaptionConfig) -> CaptionServer:
    """Return the server of a host, for use in one event loop. Raises ConfigError where its key is not set."""
    return SERVERS[config.backend](host.url, config.model, config.timeout, api_key(config))


def api_key(config: CaptionConfig) -> str | None:
    """Return the key that the config names, read from the environment; None when it names none."""
    if config.api_key_variable is None:
        return None
    key = os.environ.get(config.api_key_variable)
    if not key:
        raise ConfigError(
            f"captions.api_key_variable names {config.api_key_variable}, which is not set in the environment. Set it, "
            "or write null if the hosts need no key"
        )
    return key


async def agreed_digest(config: CaptionConfig) -> str:
    """Return the digest on which all hosts that answer agree.

    Raises ConfigError when two differ or one lacks the model, ResourceError when none answers.
    """
    servers = [open_server(host, config) for host in config.servers]
    try:
        answers = await asyncio.gather(*(server.digest() for server in servers), return_exceptions=True)
    finally:
        await asyncio.gather(*(server.close() for server in servers))
    digests, silent = {}, {}
    for server, answer in zip(servers, answers):
        if isinstance(answer, HostFault | SampleFault):
            silent[server.url] = str(answer)
        elif isinstance(answer, BaseException):
            raise answer
        else:
            digests[server.url] = answer
    if not digests:
        raise ResourceError(
            f"no caption host answers: {list_faults(silent.items())}. Start them, correct captions.hosts, or set "
            "captions.digest to plan without them"
        )
    if len(set(digests.values())) > 1:
        raise unequal_weights(digests, None)
    for url, fault in silent.items():
        say(f"warning: caption host {url} {fault}; the others do its work until it answers")
    return next(iter(digests.values()))


async def unload_models(config: CaptionConfig, urls: Collection[str]) -> dict[str, str]:
    """Let the hosts of some URLs take the model off their GPUs; returns what is wrong with those that did not.

    Where nobody listens, no model is loaded.
    """
    servers = [open_server(host, config) for host in config.servers if host.url in urls]
    try:
        answers = await asyncio.gather(*(server.unload() for server in servers), return_exceptions=True)
    finally:
        await asyncio.gather(*(server.close() for server in servers))
    faults: dict[str, str] = {}
    for server, answer in zip(servers, answers):
        if isinstance(answer, HostFault | SampleFault | ConfigError):
            if not isinstance(answer, HostUnreachable):
                faults[server.url] = str(answer)
        elif answer is not None:
            raise answer
    return faults


def list_faults(faults: Iterable[tuple[str, str]]) -> str:
    """Return hosts and what is wrong with each, for a message."""
    return "; ".join(f"{host} {fault}" for host, fault in faults)


def unequal_weights(digests: Mapping[str, str], wanted: str | None) -> ConfigError:
    """Return the error for hosts that serve other weights under the same name."""
    found = ", ".join(f"{host} has {digest}" for host, digest in digests.items())
    rest = f", but the captions are made with {wanted}" if wanted else ""
    return ConfigError(
        f"the caption hosts do not all serve the same model: {found}{rest}. Pull the same version on all of them, "
        "or take one out of captions.hosts"
    )
