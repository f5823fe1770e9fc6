"""The process in which a trial runs: started by its supervisor and ended with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanodit.errors import ResourceError
from nanodit.files import no_link
from nanodit.place import child_command, child_environment

SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
SHORTEST_SECRET = 6  # letters; a shorter value would be found everywhere
ORPHANED = 1.0  # seconds between looks at who the parent is
GRACE = 60.0  # seconds to save what was trained, and for a GPU to be given back
KEPT_LINES = 5


class TrialProcess:
    """``nanodit train sweep --trial NAME`` as a child, its output in ``log`` without any secrets.

    It ends itself, saving first, when the process that started it is gone.
    """

    def __init__(self, sweep_file: Path, name: str, log: Path, working_directory: Path, threads: int) -> None:
        environment = child_environment(OMP_NUM_THREADS=str(threads), PYTHONUNBUFFERED="1")
        self._lines: list[str] = []
        self._process = subprocess.Popen(
            [*child_command("train"), "sweep", "--config", str(sweep_file), "--trial", name, "--owned"],
            cwd=working_directory, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,  # Ctrl-C in a terminal reaches the driver alone
        )  # fmt: skip
        self._pump = threading.Thread(target=self._copy, args=(log, secrets(os.environ)), daemon=True)
        self._pump.start()

    def wait(self, seconds: float | None = None) -> int | None:
        """Return the exit code, or minus the ending signal's number; None if it still runs after ``seconds``."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._pump.join(GRACE)
        return code

    def end(self) -> None:
        """Ask it to save and end, and kill it where it does not."""
        if self._process.poll() is None:
            self._process.terminate()
            if self.wait(GRACE) is None:
                self._process.kill()
                self.wait()

    @property
    def last_words(self) -> str:
        """The last line that it printed."""
        return self._lines[-1] if self._lines else ""

    def _copy(self, log: Path, hidden: Sequence[str]) -> None:
        with open(log, "a", encoding="utf-8", opener=no_link) as file:
            for line in self._process.stdout:
                line = without(hidden, line)
                file.write(line)
                file.flush()
                if line.strip():
                    self._lines = [*self._lines, line.strip()][-KEPT_LINES:]


def end_with_parent() -> None:
    """Watch the process that started this one, and end as after SIGTERM, saving first, when it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHANED)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(75)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def ending(code: int) -> str:
    """Say how a process ended."""
    if code == -signal.SIGKILL:
        return "killed (SIGKILL), from outside or by the system for lack of memory"
    if code == -signal.SIGSEGV:
        return "segmentation fault (SIGSEGV)"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def secrets(environment: Mapping[str, str]) -> list[str]:
    """Return the values of the variables that hold credentials, judging by their names, the longest first."""
    found = (value for name, value in environment.items() if SECRET.search(name))
    return sorted((value for value in found if len(value) >= SHORTEST_SECRET), key=len, reverse=True)


def without(hidden: Sequence[str], text: str) -> str:
    """Replace secrets in ``text`` with asterisks."""
    for value in hidden:
        text = text.replace(value, "***")
    return text


def wait_for_gpu(visible: str, limit: float = GRACE) -> None:
    """Wait until no process computes on the GPUs ``visible``, named as in CUDA_VISIBLE_DEVICES.

    Raises :class:`ResourceError` that names those which still do after ``limit`` seconds.
    """
    deadline = time.monotonic() + limit
    while users := gpu_users(visible):
        if time.monotonic() > deadline:
            raise ResourceError(
                f"GPU {visible} is still in use after {limit:.0f} seconds, by {', '.join(users)}. End that, or ask for "
                "a fraction (resources.gpu=0.5), which makes no claims about time and memory"
            )
        time.sleep(1)


def gpu_users(visible: str) -> list[str]:
    """Return the processes on GPUs as ``process PID (NAME, MEMORY)``; none where nvidia-smi cannot tell."""
    command = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
    try:
        answer = subprocess.run([*command, "-i", visible], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    if answer.returncode:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    return [f"process {row[0]} ({', '.join(row[1:])})" for row in rows if row and row[0].isdecimal()]
