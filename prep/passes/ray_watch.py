"""Saying so when Ray itself has died: its raylet on this machine, or its GCS.

A driver that has lost either is ended by Ray sooner or later, with exit code 1 and without a word, from a thread in C++
that no ``except`` reaches: at the next touch of the object store, or after a minute in vain for the GCS. So a thread
here keeps a connection to each, which the system closes when they die, and ends the process first.
"""

from __future__ import annotations

import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from nanodit.errors import Interrupted, ResourceError, end_process

LOOK = 0.5  # seconds between two tries to connect
TRY = 5.0  # seconds for one of them
TOGETHER = 0.3  # seconds within which a signal reaches all processes that it was sent to
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
def ended_with_ray(find: Callable[[], RayPlace | None], again: str, less: str) -> Iterator[Callable[[], None]]:
    """While this is open, end the process with exit code 4 and a sentence as soon as Ray's raylet or GCS has died.

    With 75 instead where SIGTERM or SIGINT came before: who stops a job, a service or a group of processes sends that
    to Ray's, too. ``find`` says where they are, None while they are being started; ``again`` says how the command goes
    on, ``less`` what may help where they die again. Yields what is to be called when they have been started: from then
    on one that does not answer is one that has died.
    """
    started, (over, its_end) = threading.Event(), socket.socketpair()
    with _signals() as stopped:

        def watch() -> None:
            while (place := find()) is None:
                if _readable([its_end], LOOK):
                    return
            if sentence := _death(place, started, its_end):
                if stopped():
                    end_process(Interrupted(f"stopped by a signal. {again}"))
                end_process(ResourceError(f"{sentence} {again}. Where that repeats itself, {less}"))

        thread = threading.Thread(target=watch, daemon=True, name="ray-watch")
        thread.start()
        try:
            yield started.set
        finally:
            over.close()
            thread.join()
            its_end.close()


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Yield whether SIGTERM or SIGINT has come, even where the main thread has had no time for its handler yet."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came, into = socket.socketpair()
    for one in (came, into):
        one.setblocking(False)
    before = signal.set_wakeup_fd(into.fileno(), warn_on_full_buffer=False)
    if before != -1:  # somebody else's
        signal.set_wakeup_fd(before)
    try:
        yield lambda: bool(_readable([came], TOGETHER) and {signal.SIGTERM, signal.SIGINT} & set(came.recv(4096)))
    finally:
        if before == -1:
            signal.set_wakeup_fd(-1)
        came.close()
        into.close()


def _death(place: RayPlace, started: threading.Event, over: socket.socket) -> str:
    """Wait until one of the two has died, and say which; empty when ``over`` is closed before."""
    whose = "this command's own Ray" if place.own else f"Ray at {place.gcs}"
    why = "killed from outside, or by the system for lack of memory"
    away: float | None = None  # since when the GCS does not answer
    with ExitStack() as connections:
        raylet, gcs = _Peer(lambda: _raylet(place), connections), _Peer(lambda: _gcs(place), connections)
        while True:
            if not raylet.answers() and (raylet.seen or started.is_set()) and raylet.gone:
                return f"the raylet of {whose} on this machine has ended, {why}; {place.logs}/raylet.out may say more."
            away = None if gcs.answers() else away or time.monotonic()
            if place.own:
                died = away and gcs.gone and (gcs.seen or started.is_set())
            else:
                died = away and gcs.seen and time.monotonic() - away > GCS_AWAY
            if died:
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

    def __init__(self, connect: Callable[[], socket.socket], connections: ExitStack) -> None:
        self.connect, self.connections = connect, connections
        self.socket: socket.socket | None = None
        self.seen = False  # it has answered at least once
        self.gone = False  # nobody listens there, as opposed to somebody who cannot be reached

    def answers(self) -> bool:
        """Return whether it is connected, after trying to be."""
        if self.socket is None:
            try:
                self.socket = self.connections.enter_context(self.connect())
            except OSError as error:
                self.gone = isinstance(error, (ConnectionRefusedError, FileNotFoundError))
                return False
            self.seen = True
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


def _raylet(place: RayPlace) -> socket.socket:
    one = socket.socket(socket.AF_UNIX)
    try:
        one.settimeout(TRY)
        one.connect(place.raylet)
    except OSError:
        one.close()
        raise
    return one


def _gcs(place: RayPlace) -> socket.socket:
    host, _, port = place.gcs.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), TRY)


def _readable(sockets: list[socket.socket], seconds: float) -> list[socket.socket]:
    poll = select.poll()  # select() takes no descriptor above 1023
    for one in sockets:
        poll.register(one, select.POLLIN)
    ready = {descriptor for descriptor, _ in poll.poll(seconds * 1000)}
    return [one for one in sockets if one.fileno() in ready]
