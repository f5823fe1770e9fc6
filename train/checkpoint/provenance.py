"""What a run says of its origin: code, packages, machine and data."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nanodit.errors import DataError
from nanodit.files import canonical_json, read_json, write_atomic
from train.hardware import can_compile, cpu_bf16

_PACKAGES = ("torch", "numpy", "safetensors", "transformers", "pillow", "pyarrow")


def environment(device: torch.device) -> dict[str, Any]:
    """Return what bit-equality depends on beside config and data; no host names, no paths, no variables."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bf16": cpu_bf16(),  # whose bits differ
        "can_compile": can_compile(device.type),  # decides "auto" compilation
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def write_provenance(
    run_folder: Path,
    device: torch.device,
    dataset: Mapping[str, Any],
    step: int,
    parent: Mapping[str, Any] | None = None,
) -> None:
    """Write provenance.json: code, packages, kind of machine and data of this start, and the steps of all starts.

    ``parent`` is the checkpoint whose weights the run began with, as its state says.
    """
    path = run_folder / "provenance.json"
    try:
        starts = [*read_json(path)["started_at_steps"]] if path.exists() else []
    except (DataError, KeyError, TypeError):  # a damaged one, of which nothing else is used
        starts = []
    record = {
        "schema": 1,
        "git": git_state(Path(__file__).parent),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "environment": environment(device),
        "dataset": dict(dataset),
        "started_at_steps": [*starts, step],
        **({"parent": dict(parent)} if parent else {}),
    }
    write_atomic(path, canonical_json(record))


def git_state(folder: Path) -> dict[str, Any]:
    """Return the commit and whether anything differs from it; "unknown" where git cannot say or does not track us."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", ".")  # fails in the repository of whoever installed the package
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": "unknown"}


def dataset_summary(info: dict[str, Any]) -> dict[str, Any]:
    """Return what of dataset.json rebuilds the model and names the data."""
    named = {name: info[name] for name in ("fingerprint", "base", "encoders", "layers")}
    return named | {name: info[name] for name in ("counts",) if name in info}
