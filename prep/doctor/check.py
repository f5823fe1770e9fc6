"""The result of one check of ``prep doctor``, the exit code of several, and how they are shown."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich.console import Console
from rich.text import Text

from nanodit.errors import printable

SCHEMA = 1
STYLES = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}
SETUP, DATA, RESOURCE = 2, 3, 4  # the exit codes of nanodit/errors.py, for what is not set up, not there, or too little

NAME_WIDTH = 17
WIDTH = 116
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
SECRET_LENGTH = 6  # shorter values are switches such as "1" or "token"
USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")


@dataclass(frozen=True)
class Check:
    """One check: what was found, and one thing to do about it unless all is well.

    ``name`` and ``node`` are stable identifiers for scripts; ``node`` is "" for what concerns the whole run, else a
    machine or a server. ``code`` is the exit code of a FAIL.
    """

    name: str
    status: Literal["OK", "WARN", "FAIL"]
    found: str
    fix: str = ""
    node: str = ""
    code: int = 0


def ok(name: str, found: str) -> Check:
    """Return a check with nothing to do."""
    return Check(name, "OK", found)


def warn(name: str, found: str, fix: str) -> Check:
    """Return a check of something that a run survives, but slower, or with less than the user may expect."""
    return Check(name, "WARN", found, fix)


def fail(name: str, code: int, found: str, fix: str) -> Check:
    """Return a check of something that stops a run; ``code`` is SETUP, DATA or RESOURCE."""
    return Check(name, "FAIL", found, fix, code=code)


def exit_code(checks: Sequence[Check]) -> int:
    """Return 0 without a FAIL, else the lowest of 2 (something to set up), 3 (missing data or files) and 4 (resources).

    That is the order in which they are mended: a machine without its packages says little about its memory.
    """
    return min((check.code for check in checks if check.status == "FAIL"), default=0)


def without_secrets(check: Check) -> Check:
    """Blank out credentials that a server's answer, a URL or a path may have carried into a text."""
    secrets = [
        value for name, value in os.environ.items() if SECRET.search(name) and len(value.strip()) >= SECRET_LENGTH
    ]

    def blank(text: str) -> str:
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return USER_INFO.sub("***@", text)

    return replace(check, found=blank(check.found), fix=blank(check.fix), node=blank(check.node))


def to_json(checks: Sequence[Check]) -> str:
    """Return the checks for scripts: ``schema``, ``status`` (the worst), ``exit_code`` and ``checks``."""
    rows = [
        {
            "name": check.name,
            "node": check.node,
            "status": check.status,
            "found": check.found,
            "fix": check.fix,
        }
        for check in checks
    ]
    worst = max((check.status for check in checks), key=list(STYLES).index, default="OK")
    return json.dumps(
        {"schema": SCHEMA, "status": worst, "exit_code": exit_code(checks), "checks": rows},
        indent=1,
        ensure_ascii=False,
    )


def show(check: Check) -> None:
    """Print a check: status, name and what was found, then what to do; in colour on a terminal only."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    margin = " " * (2 + 6 + NAME_WIDTH)
    text = Text(f"  {check.status:<6}", STYLES[check.status])
    found = f"{check.node}: {check.found}" if check.node else check.found
    lines = _wrap(found, width, margin, margin)
    name = check.name.replace("_", " ")
    text.append(f"{name:<{NAME_WIDTH}}{lines.lstrip()}", "default")
    if check.fix:
        text.append(f"\n{_wrap(check.fix, width, f'{margin}-> ', f'{margin}   ')}", "cyan")
    console.print(text)


def summary(checks: Sequence[Check], seconds: float) -> str:
    """Return the last line: how many checks of each status, and how long it took."""
    counts = {status: sum(check.status == status for check in checks) for status in STYLES}
    parts = [f"{count} {status}" for status, count in counts.items() if count]
    code = exit_code(checks)
    verdict = f"prep run would fail (exit code {code})" if code else "prep run can start"
    return f"{', '.join(parts)} in {seconds:.1f} s: {verdict}"


def _wrap(text: str, width: int, first: str, rest: str) -> str:
    return textwrap.fill(
        printable(" ".join(text.split())), width, initial_indent=first, subsequent_indent=rest,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
