"""Sweeps of seconds: the tiny dataset and network, measured by the held-out loss alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.train.tiny import write_config
from train.sweep.config import Sweep, load_sweep

SWEEP = """\
base: base.yaml
output: {output}
overrides: {{checkpoint.every_steps: 3, train.batch_size: 2, tread.start: 0, tread.end: 0}}
evaluate: evaluate.yaml
factors: {{tread: [tread], optimizer: [optimizer, train.lr]}}
arms:
  A: {{overrides: {{optimizer.type: adamw}}}}
  B: {{on: A, factor: tread, overrides: {{tread.enabled: true}}}}
seeds: [0]
budget: {{steps: 12}}
primary: {{metric: heldout_loss, margin: 0.02}}
retries: 1
resources: {{gpu: 0, cpu: 1}}
"""
EVALUATE = """\
tests: [heldout_loss]
samples: 4
heldout_loss: {bins: 2, conditions: [all, text], gap: []}
baseline_images: 8
"""


def write_sweep(folder: Path, dataset: Path, **changes: Any) -> Path:
    """Write a sweep of two arms and one seed, and the files that it needs; ``changes`` replace top-level keys."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder / "base.yaml", dataset, folder / "unused")
    (folder / "evaluate.yaml").write_text(EVALUATE, encoding="utf-8")
    lines = SWEEP.format(output=json.dumps(str(folder / "sweep"))).splitlines()
    for key, value in changes.items():
        lines = _without(lines, key)
        lines.append(f"{key}: {json.dumps(value)}")
    file = folder / "sweep.yaml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _without(lines: list[str], key: str) -> list[str]:
    """The lines less a top-level key and what is indented below it."""
    kept, inside = [], False
    for line in lines:
        inside = line.startswith(f"{key}:") or (inside and line.startswith(" "))
        if not inside:
            kept.append(line)
    return kept


def tiny_sweep(folder: Path, dataset: Path, **changes: Any) -> Sweep:
    """That sweep, resolved."""
    return load_sweep(write_sweep(folder, dataset, **changes))
