"""The record of a trial, ``trial.json``, its statuses, and the names of a sweep's files. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanodit.errors import ConfigError, DataError
from nanodit.files import canonical_json, write_atomic

RECORD, PLAN, CONFIG = "trial.json", "sweep.json", "sweep.yaml"
SCHEMA = 1
RUNNING, FINISHED, FAILED, STOPPED = "running", "finished", "failed", "stopped"
ENDED = (FINISHED, FAILED, STOPPED)
FINAL_CODES = (ConfigError.exit_code, DataError.exit_code)  # what raises these would do so again: NaN is a DataError


def read_record(trial: Path) -> dict[str, Any]:
    """Return the content of trial.json; empty before the trial began. Raises :class:`DataError` for a damaged file."""
    try:
        return json.loads((trial / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise DataError(f"{trial / RECORD}: not JSON; delete the file to run the trial again") from None


def write_record(trial: Path, record: dict[str, Any]) -> None:
    """Write trial.json as a whole or not at all."""
    write_atomic(trial / RECORD, canonical_json({"schema": SCHEMA, **record}))
