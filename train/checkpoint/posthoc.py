"""Averages of the weights that are chosen after training, from snapshots of two power averages.

``RUN/ema_snapshots/step-000500.safetensors`` holds the averages of :class:`train.method.ema.PowerAverages` after that
step, ``step-000500.json`` its hash, written last: without it the file counts for nothing. ``checkpoint.keep_last``
never removes them.

An average is described by its profile, the weight of each step's parameters in it. The coefficients with which stored
profiles add up to a wished one are those with which the stored averages add up to the wished average. Source: Karras et
al., arXiv 2312.02696, section 3.2 and appendix C. Two things differ here: profiles are those of the discrete steps,
where the paper integrates continuous ones, and the coefficients sum to 1, because without EDM2's normalised weights a
sum of .99 would shrink the network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from nanodit.console import say
from nanodit.errors import ConfigError, DataError
from nanodit.files import canonical_json, read_json, sha256_bytes, sha256_file, sync_folder, write_atomic
from train.checkpoint.tensorfile import Tensors, sync_file, write_tensors
from train.method.ema import UNIFORM, PowerAverages, gamma_of, split_averages

SCHEMA = 1
FIT_LIMIT = 0.05  # of the wished profile's norm


# The fit


@dataclass(frozen=True)
class Fit:
    """Coefficients of the stored averages, float64 (K,), summing to 1; and how far the sum is from the wished profile,
    as a share of that profile's norm."""

    coefficients: np.ndarray
    error: float


def power_profile(sigma_rel: float, step: int, length: int) -> np.ndarray:
    """Return the weights, float64 (length,), of the steps 1 .. length in the power average after ``step``.

    The updates' product telescopes: step s weighs ``(s/step)^(gamma+1) - ((s-1)/step)^(gamma+1)``, none after ``step``.
    """
    edges = np.minimum(np.arange(length + 1) / step, 1.0) ** (gamma_of(sigma_rel) + 1)
    return np.diff(edges)


def fit_profile(stored_kt: np.ndarray, wished_t: np.ndarray) -> Fit:
    """Return the least-squares fit of a profile by stored ones, among the sums of weight 1; all float64.

    The wished profile may be any, e.g. that of a fixed decay; one that is stored comes back exactly.
    """
    # on the differences to the nearest profile every choice sums to 1, and of an exact one nothing is left to fit
    nearest = int(np.argmin(np.linalg.norm(stored_kt - wished_t, axis=1)))
    differences = np.delete(stored_kt - stored_kt[nearest], nearest, axis=0)
    missing = wished_t - stored_kt[nearest]
    others = np.linalg.lstsq(differences.T, missing, rcond=None)[0]
    error = np.linalg.norm(missing - others @ differences) / np.linalg.norm(wished_t)
    return Fit(np.insert(others, nearest, 1 - others.sum()), float(error))


def reachable(stored: Iterable[tuple[int, float]], step: int) -> tuple[float, float]:
    """Return the narrowest and widest sigma_rel at ``step`` that ``stored`` (step, sigma_rel) fit within the limit."""
    stored = list(stored)
    stored_kt = _profiles(stored, step)
    grid = sorted({width for _, width in stored} | set(np.geomspace(0.01, 0.99 * UNIFORM, 50)))
    within = [width for width in grid if fit_profile(stored_kt, power_profile(width, step, step)).error <= FIT_LIMIT]
    return within[0], within[-1]


def _profiles(stored: Iterable[tuple[int, float]], length: int) -> np.ndarray:
    return np.stack([power_profile(width, at, length) for at, width in stored])


# The snapshots


def save_snapshot(run_folder: Path, step: int, averages: PowerAverages) -> Path:
    """Store the averages after ``step``, durably; raises :class:`ResourceError` where the disk does not take them."""
    folder = _folder(run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:06d}.safetensors"
    temporary = folder / f".{target.name}.tmp"
    write_tensors(temporary, averages.tensors())
    sync_file(temporary)
    record = {
        "schema": SCHEMA, "step": step, "sigma_rel": list(averages.averages),
        "bytes": temporary.stat().st_size, "sha256": sha256_file(temporary),
    }  # fmt: skip
    target.with_suffix(".json").unlink(missing_ok=True)
    temporary.replace(target)
    sync_folder(folder)
    write_atomic(target.with_suffix(".json"), canonical_json(record))
    return target


def list_snapshots(run_folder: Path) -> dict[int, Path]:
    """Return {step: file} of a run's complete snapshots, in the order of the steps."""
    records = [path for path in _folder(run_folder).glob("step-*.json") if path.stem[5:].isdigit()]
    return {int(path.stem[5:]): path.with_suffix(".safetensors") for path in sorted(records)}


def read_snapshot(file: Path) -> dict[float, Tensors]:
    """Read one snapshot as {sigma_rel: tensors}; raises :class:`DataError` where it is not what was written."""
    record = _read_record(file.with_suffix(".json"))
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; {_remedy(file)}") from None
    if len(data) != record["bytes"] or sha256_bytes(data) != record["sha256"]:
        raise DataError(f"{file}: its size or SHA-256 differs from {file.stem}.json; {_remedy(file)}")
    try:
        return split_averages(load_tensors(data))
    except SafetensorError as error:
        raise DataError(f"{file}: cannot be read as safetensors: {error}; {_remedy(file)}") from None


def continue_snapshots(run_folder: Path, step: int, source: Path | None = None) -> None:
    """Keep what a run that continues after ``step`` may build on, and nothing later, which it will write again.

    ``source`` is the run folder of the checkpoint; where that is another run's, its snapshots are copied.
    """
    folder = _folder(run_folder)
    for path in (*folder.glob("step-*"), *folder.glob(".step-*")):
        digits = path.stem[5:]
        stale = digits.isdigit() and int(digits) > step
        if stale or path.name.startswith(".") or not path.with_suffix(".json").exists():
            path.unlink(missing_ok=True)
    if source is None or source.resolve() == run_folder.resolve():
        return
    for at, file in list_snapshots(source).items():
        if at <= step and at not in list_snapshots(run_folder):
            read_snapshot(file)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / file.name, file.read_bytes())
            write_atomic(folder / f"{file.stem}.json", file.with_suffix(".json").read_bytes())


# From the one to the other


def parse_weights(text: str) -> float | None:
    """Return SIGMA_REL of ``posthoc:SIGMA_REL``, None for ``ema`` and ``model``; :class:`ConfigError` otherwise."""
    if text in ("ema", "model"):
        return None
    kind, _, number = text.partition(":")
    try:
        width = float(number) if kind == "posthoc" else math.nan
    except ValueError:
        width = math.nan
    if not 0 < width < UNIFORM:
        raise ConfigError(
            f"weights {text!r}: must be ema, model, or posthoc:SIGMA_REL with a width between 0 and {UNIFORM:.3f}, "
            "such as posthoc:0.08"
        )
    return width


def reconstruct(run_folder: Path, step: int, own: Tensors, sigma_rel: float) -> Tensors:
    """Return the power average of width ``sigma_rel`` after ``step``, float32, and print how well it could be fitted.

    It is made of the run's snapshots before ``step`` and of ``own``, the averages in the checkpoint of that step.
    Raises :class:`ConfigError` where the fit's error is above the limit, :class:`DataError` for a damaged snapshot.
    """
    files = {at: file for at, file in list_snapshots(run_folder).items() if at < step}
    widths = {at: _read_record(file.with_suffix(".json"))["sigma_rel"] for at, file in files.items()}
    last = split_averages(own)
    widths[step] = list(last)
    stored = [(at, width) for at in sorted(widths) for width in widths[at]]
    fit = fit_profile(_profiles(stored, step), power_profile(sigma_rel, step, step))
    made_of = f"{len(stored)} stored averages of {len(widths)} steps up to step {step}"
    if fit.error > FIT_LIMIT:
        low, high = reachable(stored, step)
        raise ConfigError(
            f"{run_folder}: sigma_rel {sigma_rel:g} cannot be made from {made_of}: the fit's error is {fit.error:.1%}, "
            f"above {FIT_LIMIT:.0%}. Choose one between {low:.3f} and {high:.3f}, or train with more `ema.snapshots`"
        )
    say(f"post-hoc average of sigma_rel {sigma_rel:g}: fit error {fit.error:.2%} from {made_of}")
    coefficients = dict(zip(stored, fit.coefficients))
    total: Tensors = {}
    for at in sorted(widths):
        averages = last if at == step else read_snapshot(files[at])
        if set(averages) != set(widths[at]):
            raise DataError(f"{files[at]}: holds sigma_rel {sorted(averages)}, not {sorted(widths[at])}")
        for width, tensors in averages.items():
            for name, value in tensors.items():
                zero = torch.zeros(value.shape, dtype=torch.float64)
                total.setdefault(name, zero).add_(value.double(), alpha=coefficients[at, width])
    return {name: value.float() for name, value in total.items()}


def _folder(run_folder: Path) -> Path:
    return run_folder / "ema_snapshots"


def _remedy(file: Path) -> str:
    return f"restore it from a copy, or delete {file.stem}.json and .safetensors to do without it"


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path)
    except DataError as error:
        raise DataError(f"{error}; {_remedy(path)}") from None
    known = isinstance(record, dict) and record.get("schema") == SCHEMA
    widths = record.get("sigma_rel") if known else None
    whole = isinstance(widths, list) and all(type(width) is float and 0 < width < UNIFORM for width in widths)
    if not whole or not {"bytes", "sha256"} <= set(record):
        raise DataError(f"{path}: not the record of a snapshot of schema {SCHEMA}; {_remedy(path)}")
    return record
