"""Finding the sample that crashes, hangs or overfills a worker, without blaming any other.

A supervisor lets a child process (``prep/passes/worker.py``) do the work and is told the keys of every batch before it
begins. When the child dies, takes too long, finds no memory or raises what nobody foresaw, the samples of that batch
are suspects: each is computed alone, twice, and one that fails both times is rejected; then the unit is computed again
without it. The batches of the others are formed as if it had never been there, so the bytes are those of any other run
on the same sources.

Nothing else counts against a sample: when the supervisor, its node or the driver is killed, the child goes with it and
the unit starts again.
"""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from nanodit.errors import ConfigError, DataError, NanoditError, ResourceError
from nanodit.place import child_command, child_environment
from prep.config import PrepConfig
from prep.passes.layers import Job, ShardTask

FAILS = "fails_worker"  # the reason for a sample at which a worker raises what nobody foresaw
PROBES = 2  # a sample is guilty when it ends a worker alone so many times
MAX_UNEXPLAINED = 3  # deaths of one unit's workers for which no sample is guilty
MAX_FAILING = 3  # samples of one unit that raise what nobody foresaw; more are a defect of the program, not of samples
ERRORS = {error.exit_code: error for error in (NanoditError, ConfigError, DataError, ResourceError)}


@dataclass(frozen=True)
class Death:
    """How a child ended, as the reason and detail of a reject, and the keys that it was working on.

    ``said`` is what it printed last or its traceback; no part of a reject, as it may differ between machines.
    """

    reason: str
    detail: str
    keys: tuple[str, ...]
    said: str = ""


class Supervisor:
    """Computes shard tasks like :class:`prep.passes.layers.LayerWorker`, in a child process that may end in any way.

    ``memory_limit`` bounds the child's memory in bytes (0: not at all; CUDA needs that), ``threads`` prepare batches
    beside the device. Close it at the end.
    """

    def __init__(self, config: PrepConfig, device: str = "cpu", memory_limit: int = 0, threads: int = 0) -> None:
        self.config, self.device, self.memory_limit, self.threads = config, device, memory_limit, threads
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None

    def run(self, task: ShardTask) -> list[dict[str, Any]]:
        """Compute and commit the layers of the task; returns what each took, and the deaths of workers on the way.

        Raises what the worker raised, and ResourceError when workers die although no single sample is guilty.
        """
        return [self._unit(task, layer) for layer in task.recipes]

    def close(self) -> None:
        """End the child."""
        if self._process:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._errors.close()
            self._process = self._connection = None

    def _unit(self, task: ShardTask, layer: str) -> dict[str, Any]:
        guilty: dict[str, tuple[str, str]] = {}
        deaths: list[str] = []
        unexplained = 0
        while True:
            outcome = self._compute(Job(task, layer, guilty))
            if isinstance(outcome, dict):
                return outcome | ({"deaths": deaths} if deaths else {})
            deaths.append(f"{outcome.reason}: {outcome.detail}")
            if outcome.reason == FAILS and not outcome.keys:
                raise RuntimeError(f"a worker failed:\n{outcome.said}")
            found = {key: guilt for key in outcome.keys if (guilt := self._probe(task, layer, key))}
            guilty |= found
            if sum(reason == FAILS for reason, _ in guilty.values()) > MAX_FAILING:
                raise RuntimeError(f"a worker fails on sample after sample:\n{outcome.said}")
            unexplained += not found
            if unexplained == MAX_UNEXPLAINED:
                raise self._unexplained(task, layer, outcome)

    def _unexplained(self, task: ShardTask, layer: str, death: Death) -> ResourceError:
        where = f"{MAX_UNEXPLAINED} workers died computing bucket_{task.bucket}/shard-{task.shard:06d}.{layer}.tar"
        said = f" It said: {death.said}." if death.said else ""
        if not death.keys:
            return ResourceError(
                f"{where}, before or after they worked on samples ({death.detail}).{said} If nothing else explains "
                "it, the cause is memory: lower workers and run again; finished shards are kept"
            )
        return ResourceError(
            f"{where} ({death.detail}), and no single sample is the cause.{said} The usual cause is memory: lower "
            "workers or the batch sizes and run again; finished shards are kept"
        )

    def _probe(self, task: ShardTask, layer: str, key: str) -> tuple[str, str] | None:
        """Why a sample is guilty; None for an innocent one."""
        for _ in range(PROBES):
            outcome = self._compute(Job(task, layer, only=key))
            # a death before the sample was begun, while a model was loaded say, proves nothing
            if isinstance(outcome, dict) or key not in outcome.keys:
                return None
        return outcome.reason, outcome.detail

    def _compute(self, job: Job) -> dict[str, Any] | Death:
        """Let the child compute; what it took, or how it died. Raises the errors that it reports."""
        keys: list[str] = []
        try:
            self._start()
            request = {"task": job.task.to_json(), "layer": job.layer, "guilty": job.guilty, "only": job.only}
            self._connection.send_bytes(json.dumps(request).encode())
            while True:
                # loading a model, waiting for storage and committing take what they take; samples do not
                limit = self.config.sample_timeout * len(keys) or None
                if not self._connection.poll(limit):
                    self.close()
                    detail = f"{job.layer}: not finished after {self.config.sample_timeout:g} seconds per sample"
                    return Death("hangs_worker", detail, tuple(keys))
                message = json.loads(self._connection.recv_bytes())
                if "keys" in message:
                    keys = message["keys"]
                elif "done" in message:
                    return message["done"]
                elif "memory" in message:
                    self.close()  # what is left in it is unknown
                    detail = f"{job.layer}: needs more memory than a worker may use"
                    return Death("out_of_memory", detail, tuple(keys))
                elif "error" in message:
                    raise ERRORS.get(message["exit_code"], NanoditError)(message["error"])
                else:
                    detail = f"{job.layer}: {message['detail']}"
                    return Death(FAILS, detail, tuple(keys), message["defect"])
        except (EOFError, ConnectionError):
            code, said = self._process.wait(), self._last_words()
            self.close()
            detail = f"{job.layer}: the worker process ended with {_ending(code)}"
            return Death("crashes_worker", detail, tuple(keys), said)

    def _last_words(self) -> str:
        """Return the last line that the child wrote to its standard error."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def _start(self) -> None:
        if self._process:
            return
        self._connection, theirs = Pipe()
        # before torch is imported: pools use all cores, and equal bytes need equal numbers of threads
        environment = child_environment(OMP_NUM_THREADS="1")
        command = [*child_command("prep.passes.worker"), str(theirs.fileno())]
        # a session of its own, so that Ctrl-C in a terminal reaches the driver alone
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )
        theirs.close()
        setup = {"config": self.config.model_dump_json(), "device": self.device, "memory_limit": self.memory_limit}
        setup["threads"] = self.threads
        self._connection.send_bytes(json.dumps(setup).encode())


def _ending(code: int) -> str:
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
