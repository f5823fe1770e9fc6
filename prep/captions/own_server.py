"""An ``ollama serve`` of one's own, on a free port of loopback, that ends with the process that started it.

It sees the cards that its owner sees (``CUDA_VISIBLE_DEVICES``) and keeps its models where Ollama does on this machine
(``OLLAMA_MODELS``, else ``~/.ollama/models``). One process at a time pulls into such a store.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nanodit.console import data_size, say
from nanodit.errors import ConfigError, ResourceError
from nanodit.files import no_link, sha256_bytes
from nanodit.place import child_command, child_environment
from nanodit.posix import fcntl
from prep.captions.servers import OllamaServer
from prep.captions.watchdog import GRACE

PROGRAM = "ollama"
INSTALL = "install it from https://ollama.com/download, or name servers that run in captions.hosts"
PORTS = 5  # that are tried: another program may take one between the look and the start
START_TIMEOUT = 60.0  # seconds until it answers; it looks for cards first
TICK = 0.05
LOG_BYTES = 1 << 20  # of what it writes
PULL_INTERVAL = 10.0  # seconds between two lines about a download


class OwnServer:
    """Starts and ends the server; ``slots`` is how many questions it answers at a time."""

    def __init__(self, slots: int) -> None:
        self.slots, self.url = slots, ""
        self._lifeline: int | None = None
        self._ended = threading.Event()
        self._ended.set()

    @property
    def name(self) -> str:
        """Return what it is called in messages."""
        cards = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return f"Ollama on {socket.gethostname()}{f' (card {cards})' if cards not in ('', '-1') else ''}"

    @property
    def ended(self) -> bool:
        """Whether no process of it is left."""
        return self._ended.is_set()

    def start(self) -> str:
        """Start it and return its URL. Raises ConfigError without the program, ResourceError where it does not run."""
        self.close()
        program = shutil.which(PROGRAM)
        if program is None:
            raise ConfigError(f"{socket.gethostname()} has no program {PROGRAM}: {INSTALL}")
        for _ in range(PORTS):
            port = free_port()
            self._launch(program, port)
            if self._answers(port):
                self.url = f"http://127.0.0.1:{port}"
                return self.url
            said = self.last_words()
            self.close()
            if "address already in use" not in said:
                break
        raise ResourceError(
            f"{program} serve does not run on {socket.gethostname()}. It said: {said or 'nothing'}. Try it by hand"
        )

    def close(self) -> None:
        """End it with everything that it has started, and return when that is gone."""
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            os.close(lifeline)
            self._ended.wait(2 * GRACE)

    def last_words(self) -> str:
        """Return the last line that it wrote."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def forget_words(self) -> None:
        """Keep what it writes from filling a disk: all of it but the end is of interest to nobody."""
        if os.fstat(self._log.fileno()).st_size > LOG_BYTES:
            self._log.truncate(0)

    def _launch(self, program: str, port: int) -> None:
        theirs, self._lifeline = os.pipe()
        self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - read when it has ended
        environment = child_environment(OLLAMA_HOST=f"127.0.0.1:{port}", OLLAMA_NUM_PARALLEL=str(self.slots))
        command = [*child_command("prep.captions.watchdog"), str(theirs), program, "serve"]
        process = subprocess.Popen(
            command, pass_fds=[theirs], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=self._log, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self._ended = threading.Event()
        threading.Thread(target=_wait_for_end, args=(process, self._ended), daemon=True).start()

    def _answers(self, port: int) -> bool:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and not self.ended:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TICK * 20)
            try:
                connection.request("GET", "/api/version")
                if connection.getresponse().status == http.client.OK:
                    # not another program's, of which ours finds the port taken
                    return not self._ended.wait(4 * TICK)
            except (OSError, http.client.HTTPException):
                time.sleep(TICK)
            finally:
                connection.close()
        return False


def _wait_for_end(process: subprocess.Popen[bytes], ended: threading.Event) -> None:
    """Wait until the watchdog closes its output; ``process`` itself ends when the watchdog has begun."""
    with process:
        process.stdout.read()
    ended.set()


def free_port() -> int:
    """Return a port of loopback on which nobody listens now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


async def pull_model(url: str, model: str, tell: Callable[[str], None]) -> None:
    """Let a server download a model into its store, saying now and then how far it is. Raises ConfigError."""
    import httpx
    import ollama

    host, told = socket.gethostname(), time.monotonic()
    tell(f"{host} pulls {model}")
    client = ollama.AsyncClient(url, timeout=None, trust_env=False)
    try:
        async for part in await client.pull(model, stream=True):
            if part.total and part.completed and time.monotonic() - told > PULL_INTERVAL:
                told = time.monotonic()
                tell(f"{host} pulls {model}: {data_size(part.completed)} of {data_size(part.total)}")
    except (ollama.ResponseError, httpx.HTTPError, ConnectionError) as error:
        reason = getattr(error, "error", "") or str(error) or type(error).__name__
        raise ConfigError(
            f"{host} cannot pull {model}: {reason}. Correct captions.model, or copy the model into Ollama's store there"
        ) from error
    finally:
        await client.close()


@contextmanager
def store_lock() -> Iterator[None]:
    """Wait until no other process of ours pulls into this machine's store, and keep others from it meanwhile."""
    store = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")
    try:
        store.mkdir(parents=True, exist_ok=True)
        file = open(store / ".nanodit.lock", "a", opener=no_link)  # noqa: SIM115 - closed below
    except OSError:  # somebody else's, which is only read
        name = f"nanodit-{os.getuid()}-{sha256_bytes(os.fsencode(store))[:12]}.lock"
        file = open(Path(tempfile.gettempdir()) / name, "a", opener=no_link)  # noqa: SIM115
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


async def find_model(url: str, model: str, seconds: float, tell: Callable[[str], None]) -> str:
    """Return the digest of a model on a server of one's own, which pulls it where its store lacks it.

    Raises ConfigError where it cannot be had, HostFault or SampleFault where the server does not answer.
    """
    server = OllamaServer(url, model, seconds, None)
    try:
        with suppress(ConfigError):  # which says what it has instead
            return await server.digest()
        with ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, store_lock())
            with suppress(ConfigError):  # another process has pulled it meanwhile
                return await server.digest()
            await pull_model(url, model, tell)
        return await server.digest()
    finally:
        await server.close()


def has_program() -> bool:
    """Return whether this machine has Ollama; for a process of Ray on another one."""
    return shutil.which(PROGRAM) is not None


def digest_here(model: str, seconds: float) -> str:
    """Return the digest of a model by a server that is started for the question; errors as :func:`find_model`."""
    server = OwnServer(slots=1)
    try:
        return asyncio.run(find_model(server.start(), model, seconds, say))
    finally:
        server.close()
