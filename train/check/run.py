"""``nanodit train gpu-check``: what only a GPU can confirm, in parts that cannot take each other down.

Each part is a process with a limit of its own, which prints what it finds as it finds it. The last thing said is a
table of the estimates that the code makes: what was measured in their place, and which constants to change; and before
it what the measured times come to on other cards.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from nanodit.allocator import VARIABLES
from nanodit.console import say
from nanodit.errors import ConfigError, DataError
from nanodit.files import write_atomic
from nanodit.place import PACKAGES, child_command, child_environment
from train.check.report import Report, Setting, shown, verdicts
from train.check.scaling import scaled
from train.hardware import pick_device

MINUTES = 10.0  # that the parts are shared out for
OTHERS = 30.0  # of these seconds, for each part that a command hands in
GRACE = 1.5  # times its seconds, after which a part that does not end is ended
LEAST = 60.0  # seconds that any part has: to import torch on a busy machine alone takes ten


@dataclass(frozen=True)
class Part:
    """A part: ``module:function`` of this folder, its seconds of ten minutes, and what its process is given."""

    name: str
    function: str
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


PARTS = (
    Part("card", "card:check", 15),
    Part("parity", "parity:check", 40),
    Part("syncs", "syncs:check", 20),
    Part("resume", "resume:check", 45),
    Part("memory", "memory:check", 85, {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}),
    Part("expandable", "memory:check_expandable", 30, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
    Part("speed", "speed:check", 125),
    Part("shortage", "shortage:check", 45),
    Part("splitting", "splitting:check", 10),
    Part("encoders", "encoders:check", 70),
    Part("sampling", "sampling:check", 45),
    Part("shapes", "shapes:check", 40),
)
Check = Callable[[Setting, Report], None]


def gpu_check(
    device: str, *, tiny: bool, minutes: float, only: Sequence[str], file: Path | None, more: Mapping[str, Check]
) -> None:
    """Run the parts, all or ``only`` some; write their lines to ``file`` and a summary beside it.

    ``more`` are parts of others, by name, that the command hands in. Raises :class:`ConfigError` for an unknown part
    and where there is no GPU, and :class:`DataError` at the end where anything failed.
    """
    parts = [*PARTS, *(Part(name, "", OTHERS) for name in more)]
    if unknown := sorted({*only} - {part.name for part in parts}):
        raise ConfigError(f"--only {unknown[0]}: there are {', '.join(part.name for part in parts)}")
    if not minutes > 0:
        raise ConfigError(f"--minutes {minutes:g}: must be more than 0")
    pick_device(device)
    options = ["--device", device, *(["--tiny"] if tiny else [])]
    lines: list[dict[str, Any]] = []
    started = time.monotonic()
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nanodit-check-") as folder, open(file or os.devnull, "w") as kept:
        for part in parts:
            if not only or part.name in only:
                seconds = part.seconds * minutes / MINUTES
                lines += _in_process(part, [*options, "--folder", folder, "--seconds", str(seconds)], seconds, kept)
    failed = [line for line in lines if line["status"] == "FAIL"]
    for line in [*scaled(lines), "", *verdicts(lines)]:
        say(line)
    if file:
        write_atomic(file.with_suffix(".md"), summary(lines))
        say(f"wrote {file} and {file.with_suffix('.md')}")
    counts = ", ".join(f"{sum(line['status'] == s for line in lines)} {s}" for s in ("PASS", "FAIL", "NOTE"))
    say(f"gpu-check: {counts} in {time.monotonic() - started:.0f} s")
    if failed:
        names = ", ".join(f"{line['part']}: {line['name']}" for line in failed)
        raise DataError(f"gpu-check: {len(failed)} of {len(lines)} failed: {names}")


def run_part(name: str, setting: Setting, more: Mapping[str, Check]) -> None:
    """Run one part in this process, its lines going to stdout; whatever it raises is a line, too."""
    report = Report(name)
    try:
        if name in more:
            more[name](setting, report)
        else:
            module, _, function = next(part for part in PARTS if part.name == name).function.partition(":")
            getattr(import_module(f"train.check.{module}"), function)(setting, report)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("nanodit", *PACKAGES):
            raise
        report.note("left out", f"{error.name} is not installed")
    except Exception as error:
        traceback.print_exc()
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        report.check(False, "the part itself", f"{type(error).__name__}: {text}", "an end without an error")


def summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return all lines, the table of estimates and that of other cards as Markdown."""
    columns = ("status", "part", "name", "value", "expected")
    rows = [f"| {' | '.join(str(line[column]).replace('|', '/') for column in columns)} |" for line in lines]
    head = ["| | part | what | found | expected |", "|---|---|---|---|---|"]
    tables = [*verdicts([*lines]), "", *scaled(lines)]
    return "\n".join(["# nanodit train gpu-check", "", "```", *tables, "```", "", *head, *rows, ""])


def environment_of(part: Part) -> dict[str, str]:
    """Return the environment of a part's process: where it says how memory is taken, no older name says otherwise."""
    given = child_environment()
    if part.environment.keys() & {*VARIABLES}:
        given = {name: value for name, value in given.items() if name not in VARIABLES}
    return {**given, **part.environment}


def _in_process(part: Part, options: Sequence[str], seconds: float, kept: TextIO) -> list[dict[str, Any]]:
    """Run a part in a process of its own, show and keep its lines; that one had to be ended is a line, too."""
    limit = max(LEAST, GRACE * seconds)
    command = [*child_command("train"), "gpu-check", "--part", part.name, *options]
    process = subprocess.Popen(
        command, env=environment_of(part), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(limit, end)
    timer.start()
    lines: list[dict[str, Any]] = []
    started = time.monotonic()
    try:
        for text in process.stdout:
            if text.startswith('{"part"'):
                _keep(json.loads(text), lines, kept)
            else:
                sys.stderr.write(text)  # what the code under test says
        code = process.wait()
    finally:
        timer.cancel()
        _kill(process)
    if late.is_set() or code:
        what = f"ended after its limit of {limit:.0f} s" if late.is_set() else f"exit code {code}"
        line = {
            "part": part.name,
            "status": "FAIL",
            "name": "the part itself",
            "value": what,
            "expected": "exit code 0",
        }
        _keep({**line, "seconds": round(time.monotonic() - started, 2)}, lines, kept)
    return lines


def _keep(line: dict[str, Any], lines: list[dict[str, Any]], kept: TextIO) -> None:
    lines.append(line)
    say(shown(line))
    kept.write(json.dumps(line) + "\n")
    kept.flush()
    if kept.name != os.devnull:
        os.fsync(kept.fileno())


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
