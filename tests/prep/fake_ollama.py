"""A program named ``ollama`` that an actor starts as it would the real one: :func:`install` puts it into a folder.

``ollama serve`` listens at ``OLLAMA_HOST``, keeps models below ``OLLAMA_MODELS``, answers ``OLLAMA_NUM_PARALLEL``
questions at a time, and forks a runner when the first one comes, which holds the model, ignores SIGTERM and outlives a
server that is killed, as llama.cpp's does. ``ollama pull MODEL`` lets it download; two at a time spoil a store. Its
captions are those of ``tests/prep/caption_server.py``, the same everywhere: those of real cards may differ in words.

``FAKE_OLLAMA`` is a folder that gets ``PID.jsonl`` of every server, one object per request, and one before each
question about a picture (``asked``). In it ``seconds`` and ``pull`` say how long a caption and a download take,
``faults`` (``{"N": FAULT}`` as JSON) what goes wrong with the Nth question to each server, ``busy`` how many starts
find their port taken. No question is answered while a file ``hold`` lies there.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

PROJECT = Path(__file__).parents[2]


def install(folder: Path) -> Path:
    """Write the program into a folder, which belongs on PATH, and return it."""
    program = folder / "ollama"
    program.write_text(
        f"#!{sys.executable} -P\nimport sys\nsys.path.insert(0, {str(PROJECT)!r})\n"
        "from tests.prep.fake_ollama import main\nmain()\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def processes(program: Path) -> list[int]:
    """Return the ids of the living servers and runners of a program that was installed."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z" and os.fsencode(program) in words[:3]:
            found.append(int(path.name))
    return found


def wait_for_none(program: Path, seconds: float = 15.0) -> list[int]:
    """Return what is left of a program after some seconds at most."""
    end = time.monotonic() + seconds
    while (left := processes(program)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def requests(folder: Path) -> list[dict[str, Any]]:
    """Return what all servers logged, with their ``pid``."""
    return [
        json.loads(line) | {"pid": int(path.stem)}
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def manifest(model: str) -> Path:
    """Return the file of a model in this machine's store."""
    store = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")
    name, _, tag = model.partition(":")
    return store / "manifests" / "registry.ollama.ai" / "library" / name / (tag or "latest")


def main() -> None:
    """Do what ``ollama serve`` or ``ollama pull MODEL`` does."""
    address = os.environ["OLLAMA_HOST"]
    if sys.argv[1] == "pull":
        body = json.dumps({"model": sys.argv[2]}).encode()
        with urlopen(Request(f"http://{address}/api/pull", body, {"Content-Type": "application/json"})) as reply:
            sys.exit("error" in reply.read().decode())
    from tests.prep.caption_server import CaptionServer, Handler

    control = Path(os.environ["FAKE_OLLAMA"])

    class FakeHandler(Handler):
        def do_GET(self) -> None:
            if self.path != "/api/tags":
                return super().do_GET()
            store = manifest("x").parents[1]
            models = [
                {
                    "name": f"{path.parent.name}:{path.name}",
                    "model": f"{path.parent.name}:{path.name}",
                    "digest": hashlib.sha256(path.read_bytes()).hexdigest(),
                    "size": 1,
                }
                for path in store.glob("*/*")
            ]
            return self._send(self._entry(), 200, {"models": models})

        def do_POST(self) -> None:
            if self.path == "/api/show":
                self.rfile.read(int(self.headers["Content-Length"]))
                return self._send(self._entry(), 200, {"capabilities": ["completion", "vision"]})
            if self.path == "/api/pull":
                return self._pull(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"])
            if not manifest(server.model).exists():
                self.rfile.read(int(self.headers["Content-Length"]))
                return self._send(self._entry(), 404, {"error": f"model '{server.model}' not found"})
            return super().do_POST()

        def _pull(self, model: str) -> None:
            path, entry = manifest(model), self._entry(pulled=model)
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [{"status": "pulling manifest"}]
            try:
                descriptor = os.open(path.with_name(".partial"), os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                lines = [{"error": "digest mismatch, file must be downloaded again"}]
            else:
                time.sleep(float(setting("pull", "0.1")))
                path.write_text(json.dumps({"model": model, "layers": []}))
                os.close(descriptor)
                os.remove(path.with_name(".partial"))
                lines += [{"status": "pulling", "total": 4, "completed": 4}, {"status": "success"}]
            self._send(entry, 200, "\n".join(map(json.dumps, lines)) + "\n")

    class FakeOllama(CaptionServer):
        runner = 0

        def handler_class(self) -> type[Handler]:
            return FakeHandler

        def next_fault(self, image: str) -> str | None:
            self.note({"event": "asked", "image": image})
            with self._lock:
                if not self.runner:
                    self.runner = start_runner()
            while (control / "hold").exists():
                time.sleep(0.01)
            return super().next_fault(image)

        @property
        def loaded(self) -> bool:
            return bool(self.runner)

        @loaded.setter
        def loaded(self, value: bool) -> None:
            if not value and self.__dict__.get("runner"):
                os.kill(self.runner, signal.SIGKILL)
                self.runner = 0

    def setting(name: str, default: str) -> str:
        path = control / name
        return path.read_text() if path.exists() else default

    if (starts := int(setting("busy", "0"))) > 0:
        (control / "busy").write_text(str(starts - 1))
        sys.exit(f"Error: listen tcp {address}: bind: address already in use")
    slots, log = int(os.environ.get("OLLAMA_NUM_PARALLEL", "1")), str(control / f"{os.getpid()}.jsonl")
    try:
        server = FakeOllama(
            int(address.rpartition(":")[2]), seconds=float(setting("seconds", "0")), slots=slots, log_file=log
        )
    except OSError:
        sys.exit(f"Error: listen tcp {address}: bind: address already in use")
    server.as_process = True
    server.faults = {int(number): fault for number, fault in json.loads(setting("faults", "{}")).items()}
    server.note({"event": "serve", "cuda": os.environ.get("CUDA_VISIBLE_DEVICES"), "image": None})
    threading.Event().wait()


def start_runner() -> int:
    """Fork what holds the model; its id."""
    child = os.fork()
    if child:
        return child
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.closerange(3, 256)  # of the server
        while True:
            time.sleep(3600)
    finally:
        os._exit(1)
