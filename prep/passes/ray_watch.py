"""Saying so when Ray itself has died: its raylet on this machine, or its GCS.

A driver that has lost either is ended by Ray sooner or later, with exit code 1 and without a word, from a thread in C++
that no ``except`` reaches: at the next touch of the object store, or after a minute in vain for the GCS. So a thread
here keeps a connection to each, which the system closes when they die, and ends the process first.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from nanodit.errors import ResourceError, end_process

LOOK = 0.5  # seconds between two tries to connect
TRY = 5.0  # seconds for one of them
# A cluster may keep its GCS elsewhere and start it again; Ray's drivers wait for it for 60 seconds
# (gcs_rpc_server_reconnect_timeout_s), and one that Ray started for this command alone does not come back
GCS_AWAY = 45.0


@dataclass(frozen=True)
class RayPlace:
    """Where Ray listens: the raylet's socket, the HOST:PORT of the GCS, and the folder of its logs."""

    raylet: str
    gcs: str
    logs: str
    own: bool  # started for this command alone


@contextmanager
def ended_with_ray(find: Callable[[], RayPlace | None], advice: str) -> Iterator[Callable[[], None]]:
    """While this is open, end the process with exit code 4 and a sentence as soon as Ray's raylet or GCS has died.

    ``find`` says where they are, None while they are being started; ``advice`` ends the sentence. Yields what is to be
    called when they have been started: from then on one that does not answer is one that has died.
    """
    started, (over, its_end) = threading.Event(), socket.socketpair()

    def watch() -> None:
        while (place := find()) is None:
            if _readable([its_end], LOOK):
                return
        if sentence := _death(place, started, its_end):
            end_process(ResourceError(f"{sentence} {advice}"))

    thread = threading.Thread(target=watch, daemon=True, name="ray-watch")
    thread.start()
    try:
        yield started.set
    finally:
        over.close()
        thread.join()
        its_end.close()


def _death(place: RayPlace, started: threading.Event, over: socket.socket) -> str:
    """Wait until one of the two has died, and say which; empty when ``over`` is closed before."""
    whose = "this command's own Ray" if place.own else f"Ray at {place.gcs}"
    why = "killed from outside, or by the system for lack of memory"
    host, _, port = place.gcs.rpartition(":")
    away: float | None = None  # since when the GCS does not answer
    with ExitStack() as connections:
        raylet = _Peer(socket.AF_UNIX, place.raylet, connections)
        gcs = _Peer(socket.AF_INET6 if ":" in host else socket.AF_INET, (host.strip("[]"), int(port)), connections)
        while True:
            if not raylet.answers() and (raylet.seen or started.is_set()) and raylet.gone:
                return f"the raylet of {whose} on this machine has ended, {why}; {place.logs}/raylet.out may say more."
            away = None if gcs.answers() else away or time.monotonic()
            if away and (gcs.seen or started.is_set()) and (place.own or time.monotonic() - away > GCS_AWAY):
                where = f"; {place.logs}/gcs_server.out may say more" if place.own else ""
                return f"the GCS of {whose}, which knows its nodes and actors, has ended, {why}{where}."
            ready = _readable([over, *(peer.socket for peer in (raylet, gcs) if peer.socket)], LOOK)
            if over in ready:
                return ""
            for peer in (raylet, gcs):
                if peer.socket in ready:
                    peer.read()


class _Peer:
    """A connection to a process, on which nothing is said: the system closes it when that process ends."""

    def __init__(self, family: int, address: Any, connections: ExitStack) -> None:
        self.family, self.address, self.connections = family, address, connections
        self.socket: socket.socket | None = None
        self.seen = False  # it has answered at least once
        self.gone = False  # nobody listens there, as opposed to somebody who cannot be reached

    def answers(self) -> bool:
        """Return whether it is connected, after trying to be."""
        if self.socket is None:
            one = self.connections.enter_context(socket.socket(self.family))
            one.settimeout(TRY)
            try:
                one.connect(self.address)
            except OSError as error:
                one.close()
                self.gone = isinstance(error, (ConnectionRefusedError, FileNotFoundError))
                return False
            self.socket, self.seen = one, True
        return True

    def read(self) -> None:
        """Take what came; its end closes the connection, as does a server that minds a silent one."""
        try:
            if self.socket.recv(4096):
                return
        except OSError:
            pass
        self.socket.close()
        self.socket = None


def _readable(sockets: list[socket.socket], seconds: float) -> list[socket.socket]:
    return select.select(sockets, [], [], seconds)[0]
