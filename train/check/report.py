"""What a part of the check found: one line of JSON for each, which the parent shows and keeps."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from nanodit.place import PROJECT

Status = Literal["PASS", "FAIL", "NOTE"]


@dataclass(frozen=True)
class Setting:
    """Where and how large a part runs: the device, and ``tiny`` networks for a rehearsal.

    All parts share the ``folder``; after its ``seconds`` a part leaves out what is still to come.
    """

    device: torch.device
    tiny: bool
    folder: Path
    seconds: float
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.started + self.seconds - time.monotonic()

    @property
    def on_gpu(self) -> bool:
        """Whether there is anything of CUDA to ask."""
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Constant:
    """A number of the code that a measurement can prove wrong: its name, and the file and line it stands at."""

    name: str
    place: str

    def __str__(self) -> str:
        return f"{self.name} ({self.place})"


def constant(module: ModuleType, name: str) -> Constant:
    """Find a constant where it stands; of ``T5.encoder.weights_gb`` the line of ``T5``. ValueError where it is gone."""
    file = Path(str(module.__file__))
    first = re.escape(name.partition(".")[0])
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if re.match(rf"(class |def )?{first}\b\s*[:=(]", text):
            return Constant(name, f"{file.relative_to(PROJECT)}:{number}")
    raise ValueError(f"{file} has no constant {name}")


class Report:
    """Writes what a part found to stdout as it finds it, so that a killed part still told what it knew."""

    def __init__(self, part: str) -> None:
        self.part, self.started = part, time.monotonic()
        self.lines: list[dict[str, Any]] = []

    def note(self, name: str, value: str, **more: Any) -> None:
        """Say something that is neither right nor wrong; ``more`` goes into the line of JSON."""
        self._write("NOTE", name, value, **more)

    def check(self, right: bool, name: str, value: str, expected: str) -> None:
        """Say what was found, and whether it is as ``expected``."""
        self._write("PASS" if right else "FAIL", name, value, expected)

    def estimate(
        self,
        name: str,
        estimate: float,
        measured: float,
        unit: str,
        constants: Constant | tuple[Constant, ...],
        *,
        low: float,
        high: float,
    ) -> None:
        """Compare an estimate of the code with a measurement: a FAIL where measured / estimate leaves [low, high].

        ``constants`` are what makes the estimate, and so what is to be changed.
        """
        ratio = measured / estimate
        places = [str(one) for one in (constants if isinstance(constants, tuple) else (constants,))]
        judged = {"estimate": estimate, "measured": measured, "unit": unit, "ratio": ratio, "constants": places}
        value, expected = f"{measured:.4g} {unit}", f"{estimate:.4g} {unit} x {low:g} to {high:g}"
        self._write("PASS" if low <= ratio <= high else "FAIL", name, value, expected, **judged)

    def _write(self, status: Status, name: str, value: str, expected: str = "", **more: Any) -> None:
        now = time.monotonic()
        line = {"part": self.part, "status": status, "name": name, "value": value, "expected": expected, **more}
        line["seconds"], self.started = round(now - self.started, 2), now
        self.lines.append(line)
        print(json.dumps(line), flush=True, file=sys.stdout)


def shown(line: dict[str, Any]) -> str:
    """Write a line for people."""
    expected = f" (expected {line['expected']})" if line["expected"] else ""
    return f"{line['status']}  {line['part']}: {line['name']}: {line['value']}{expected}  {line['seconds']:.1f}s"


def verdicts(lines: list[dict[str, Any]]) -> list[str]:
    """Return the table of estimates: what the code says, what was measured, and where the constants of it stand."""
    rows = [("what", "estimate", "measured", "ratio", "", "constants to change")]
    for line in lines:
        if "ratio" in line:
            numbers = (f"{line['estimate']:.4g}", f"{line['measured']:.4g} {line['unit']}", f"{line['ratio']:.2f}")
            rows.append((f"{line['part']}: {line['name']}", *numbers, line["status"], ", ".join(line["constants"])))
    if len(rows) == 1:
        return ["no estimate was measured"]
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of equally many cells as lines whose columns stand below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
