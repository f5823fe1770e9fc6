"""A pool of caption hosts: whichever has a free slot answers a question, and those that fail are left alone a while.

There is no queue per host: a question waits for the next free slot anywhere, so that unequal hosts are busy to the end.
A host that fails cools down, twice as long each time; then it is asked which weights it serves and gets one single
question, and all its slots again when that is answered. All of it runs in one event loop.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nanodit.console import duration, say
from nanodit.errors import ConfigError, ResourceError
from prep.captions.base import CaptionServer, HostFault, HostTimeout, HostUnreachable, SampleFault
from prep.captions.config import CaptionConfig, CaptionHost
from prep.captions.quality import Answer
from prep.captions.servers import SERVERS

LONGEST_COOL_DOWN = 120.0  # seconds
TICK = 0.1  # seconds between looks at hosts whose cool-down may be over
SAMPLE_FAULTS, SAMPLE_TIMEOUTS = 2, 3  # so often a server may fail on one image before that is the image's fault


@dataclass
class HostState:
    """One server and its state; times are those of the monotonic clock."""

    server: CaptionServer
    slots: int
    active: int = 0
    admitted: bool = False  # it has said, since it last failed, that it serves the right weights
    failures: int = 0  # in a row
    failed_at: float = 0.0
    resume_at: float = 0.0
    down_since: float | None = None
    fault: str = ""
    pace: float = 0.0  # seconds per answer, as lately observed

    @property
    def url(self) -> str:
        """Return the URL as the config gives it."""
        return self.server.url

    def free(self, now: float) -> bool:
        """Tell whether another question may be sent: one at a time to a host that has yet to prove itself."""
        proven = self.admitted and not self.failures
        return now >= self.resume_at and self.active < (self.slots if proven else 1)


class HostPool:
    """The hosts of a config, all of which must serve the weights of ``digest``.

    Use as an async context manager; :meth:`watch` must run beside the questions.
    """

    def __init__(self, config: CaptionConfig, digest: str) -> None:
        self.config, self.digest = config, digest
        self.hosts = [HostState(open_server(host, config), host.slots) for host in config.servers]
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> HostPool:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.gather(*(host.server.close() for host in self.hosts))

    @property
    def slots(self) -> int:
        """Return how many questions all hosts together answer at a time."""
        return sum(host.slots for host in self.hosts)

    @property
    def up(self) -> int:
        """Return how many hosts are not known to be down."""
        return sum(host.down_since is None for host in self.hosts)

    async def ask(self, jpeg: bytes, prompt: str, options: Mapping[str, Any]) -> tuple[Answer, float]:
        """Return the answer of some host, and the seconds that hosts spent on it.

        After ``SAMPLE_FAULTS`` or ``SAMPLE_TIMEOUTS`` on this image the answer says that the image failed. This waits
        as long as it takes: :meth:`watch` ends the wait when no host is left. Raises ConfigError.
        """
        faults = timeouts = 0
        alive, spent = False, 0.0
        last: HostState | None = None
        while True:
            last = host = await self._take(avoid=last)
            start = time.monotonic()
            try:
                alive = await self._admit(host) or not host.failures
                answer = await host.server.caption(jpeg, prompt, options)
            except SampleFault as fault:
                faults += 1
                self._failed(host, start, HostFault(f"failed (HTTP 500): {fault}".rstrip(": ")), patient=True)
                if faults == SAMPLE_FAULTS:
                    return Answer("", "failed", options), spent + time.monotonic() - start
            except HostFault as fault:
                # what times out on a host that was failing already says nothing about the image
                timeouts += isinstance(fault, HostTimeout) and alive
                self._failed(host, start, fault)
                if timeouts == SAMPLE_TIMEOUTS:
                    return Answer("", "timeout", options), spent + time.monotonic() - start
            else:
                self._answered(host, start)
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
                    f"{list_faults((host.url, host.fault) for host in self.hosts)}. The captions made so far are kept: "
                    "repair the hosts and run the same command again"
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

    async def _admit(self, host: HostState) -> bool:
        """Make sure that a host serves the right weights, when it is first used and whenever it comes back.

        Return whether it was asked just now. Raises ConfigError for other weights, HostFault as the server does.
        """
        if host.admitted:
            return False
        try:
            digest = await host.server.digest()
        except HostTimeout as fault:  # not about the image
            raise HostFault(str(fault)) from fault
        if digest != self.digest:
            raise unequal_weights({host.url: digest}, self.digest)
        host.admitted = True
        await self._wake()
        return True

    def _answered(self, host: HostState, start: float) -> None:
        seconds = time.monotonic() - start
        host.pace = 0.7 * host.pace + 0.3 * seconds if host.pace else seconds
        if start < host.failed_at:  # it was under way when the host failed: not a sign that it is back
            return
        if host.down_since is not None:
            say(f"caption host {host.url} answers again")
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
            say(f"caption host {host.url} {fault}; trying it again in {duration(host.resume_at - now)}")


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
    return "; ".join(f"{url} {fault}" for url, fault in faults)


def unequal_weights(digests: Mapping[str, str], wanted: str | None) -> ConfigError:
    """Return the error for hosts that serve other weights under the same name."""
    found = ", ".join(f"{url} has {digest}" for url, digest in digests.items())
    rest = f", but the captions are made with {wanted}" if wanted else ""
    return ConfigError(
        f"the caption hosts do not all serve the same model: {found}{rest}. Pull the same version on all of them, "
        "or take one out of captions.hosts"
    )
