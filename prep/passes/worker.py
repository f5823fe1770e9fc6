"""``python -m prep.passes.worker``: the child process in which a supervisor lets its work be done.

It may crash, hang or run out of memory without taking anything with it. Messages are JSON texts over a socket whose
number is the only argument: the first one from the supervisor holds the config and the device, every further one a
job; the answers are ``{"keys": [...]}`` before each batch, then ``{"done": {...}}`` or what went wrong.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from nanodit.errors import NanoditError, resource_error
from prep.config import PrepConfig
from prep.passes.layers import Job, LayerWorker, ShardTask

ORPHANED = 1.0  # seconds between looks at who the parent is
GRACE = 30.0  # seconds after which the system ends a batch that the supervisor should have ended


def main() -> None:
    """Serve jobs until the supervisor closes the connection or dies."""
    connection = Connection(int(sys.argv[1]))

    def send(message: dict[str, Any]) -> None:
        connection.send_bytes(json.dumps(message).encode())

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        setup = json.loads(connection.recv_bytes())
        if limit := setup["memory_limit"]:
            # the data segment and private mappings (Linux 4.7, man 2 getrlimit); files that are mapped do not count
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        config = PrepConfig.model_validate_json(setup["config"])

        def watch(keys: list[str]) -> None:
            set_alarm(config.sample_timeout * len(keys))
            send({"keys": keys})

        worker = LayerWorker(config, setup["device"], watch, setup["threads"])
        while True:
            request = json.loads(connection.recv_bytes())
            guilty = {key: tuple(guilt) for key, guilt in request["guilty"].items()}
            job = Job(ShardTask.from_json(request["task"]), request["layer"], guilty, request["only"])
            send(answer(worker, job))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the supervisor has gone


def set_alarm(seconds: float) -> None:
    """Let the system end this process some time after the supervisor should have; 0 seconds: not at all.

    Where the supervisor was killed and this process is stuck in C with the interpreter's lock, nothing else can.
    """
    signal.alarm(math.ceil(seconds + GRACE) if seconds else 0)


def answer(worker: LayerWorker, job: Job) -> dict[str, Any]:
    """Return the outcome of a job as a message."""
    try:
        return {"done": worker.compute(job)}
    except Exception as error:
        if no_memory(error):
            return {"memory": str(error)}
        known = error if isinstance(error, NanoditError) else resource_error(error)
        if known is None:
            return {"defect": traceback.format_exc(), "detail": f"{type(error).__name__}: {error}"}
        return {"error": str(known), "exit_code": known.exit_code}


def no_memory(error: Exception) -> bool:
    """Whether main memory could not be had: Python, torch on the CPU and onnxruntime each say so in their own way."""
    return isinstance(error, MemoryError) or any(
        phrase in str(error) for phrase in ("can't allocate memory", "Failed to allocate memory", "bad allocation")
    )


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ORPHANED)
    os._exit(1)


if __name__ == "__main__":
    main()
