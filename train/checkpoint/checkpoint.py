"""Checkpoints: whole or absent, hashed, never pickled.

``RUN/checkpoints/step-000500/`` holds model, ema and optimizer ``.safetensors`` (and power, the averages that
``ema.snapshots`` asks for), ``state.json`` and, written last, ``manifest.json`` with the size and hash of each. The
folder is filled under a temporary name and renamed, so that whatever is killed when, a folder named ``step-*`` is
complete; what a disk damages later, the hashes find.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nanodit.console import say
from nanodit.errors import ConfigError, DataError
from nanodit.faults import fault
from nanodit.files import canonical_json, read_json, sha256_file, sync_folder
from train.checkpoint.tensorfile import Tensors, read_tensors, sync_file, write_tensors

SCHEMA = 1
PARTS = ("model", "ema", "optimizer")
OPTIONAL_PARTS = ("power",)
_FILES = (*(f"{part}.safetensors" for part in PARTS), "state.json")
_OPTIONAL_FILES = tuple(f"{part}.safetensors" for part in OPTIONAL_PARTS)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory, on the CPU; ``state`` is its state.json."""

    path: Path
    model: Tensors
    ema: Tensors
    optimizer: Tensors
    power: Tensors
    state: dict[str, Any]


def checkpoints_folder(run_folder: Path) -> Path:
    """Return where a run keeps its checkpoints."""
    return run_folder / "checkpoints"


def save_checkpoint(
    run_folder: Path,
    step: int,
    tensors: Mapping[str, Tensors],
    state: dict[str, Any],
    keep_last: int | None = None,
    keep_every: int | None = None,
) -> Path:
    """Write ``checkpoints/step-NNNNNN`` atomically and durably; then :func:`prune` the others.

    ``tensors`` maps each of PARTS, and any of OPTIONAL_PARTS, to its named tensors; ``state`` must be JSON. Raises
    :class:`ResourceError` where the disk does not take a file; the checkpoints before it are as they were.
    """
    parent = checkpoints_folder(run_folder)
    target = parent / f"step-{step:06d}"
    temporary = parent / f".{target.name}.tmp"
    remove_leftovers(run_folder)
    temporary.mkdir(parents=True)
    try:
        _fill(temporary, step, tensors, state)
    except Exception:  # a full disk, say, which half a checkpoint would keep full
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fault("checkpoint.after_tmp")
    if target.exists():  # a damaged one that the run fell back from, or the same step once more
        target.rename(parent / f".{target.name}.old")
    fault("checkpoint.before_rename")
    temporary.rename(target)
    sync_folder(parent)
    fault("checkpoint.after_rename")
    remove_leftovers(run_folder)
    prune(run_folder, keep_last, keep_every)
    return target


def _fill(folder: Path, step: int, tensors: Mapping[str, Tensors], state: dict[str, Any]) -> None:
    """Write the files of a checkpoint durably, the manifest last."""
    parts = [*PARTS, *(part for part in OPTIONAL_PARTS if part in tensors)]
    for part in parts:
        write_tensors(folder / f"{part}.safetensors", tensors[part])
        fault(f"checkpoint.after_{part}")
    (folder / "state.json").write_text(canonical_json({"schema": SCHEMA, "step": step, **state}), encoding="utf-8")
    names = [*(f"{part}.safetensors" for part in parts), "state.json"]
    for name in names:
        sync_file(folder / name)
    fault("checkpoint.after_state")
    files = {name: {"sha256": sha256_file(folder / name), "bytes": os.path.getsize(folder / name)} for name in names}
    manifest = folder / "manifest.json"
    manifest.write_text(canonical_json({"schema": SCHEMA, "step": step, "files": files}), encoding="utf-8")
    sync_file(manifest)
    sync_folder(folder)


def prune(run_folder: Path, keep_last: int | None, keep_every: int | None) -> None:
    """Remove all checkpoints but the ``keep_last`` newest (None: keep all) and those of multiples of ``keep_every``."""
    for path in checkpoint_steps(run_folder)[keep_last:] if keep_last else ():
        step = int(path.name[5:])
        if not keep_every or step % keep_every or step == 0:  # 0: the beginning of a run from other weights
            hidden = path.rename(path.with_name(f".{path.name}.old"))  # whole or absent, also when killed here
            shutil.rmtree(hidden, ignore_errors=True)  # what a mounted volume keeps for another reader goes later


def set_aside_after(run_folder: Path, step: int) -> None:
    """Take the checkpoints after ``step``, from which the run falls back as they are damaged, out of the way.

    Else they would count as the newest, and retention would remove a good one for them. They are deleted as leftovers.
    """
    for path in checkpoint_steps(run_folder):
        if int(path.name[5:]) > step:
            aside = path.with_name(f".{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def remove_leftovers(run_folder: Path) -> None:
    """Delete what a kill left half-written; only the holder of the run's lock may call it."""
    for leftover in checkpoints_folder(run_folder).glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # NFS keeps a file that is still read; the next call tries again
    for leftover in run_folder.glob(".*.tmp-*"):  # of nanodit.files.write_atomic
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)  # a folder: of an export


def find_latest(run_folder: Path) -> Path | None:
    """Return the newest checkpoint whose files have the sizes and hashes of its manifest; None where there is none.

    A damaged one is named in a printed warning and passed over. Raises :class:`DataError` where all are damaged.
    """
    steps = checkpoint_steps(run_folder)
    for path in steps:
        try:
            verify(path)
        except (DataError, OSError) as error:  # OSError: the disk cannot read it
            say(f"warning: {error}; trying the checkpoint before it")
        else:
            return path
    if steps:
        raise DataError(
            f"{checkpoints_folder(run_folder)}: all {len(steps)} checkpoints are damaged; "
            "restore one from a copy, or start again with another `output`"
        )
    return None


def checkpoint_steps(run_folder: Path) -> list[Path]:
    """Return the step folders of a run, newest first, damaged or not."""
    found = [path for path in checkpoints_folder(run_folder).glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def verify(path: Path) -> list[str]:
    """Compare every file of a checkpoint with its manifest and return their names.

    Raises :class:`DataError` naming the first that differs.
    """
    manifest = read_json(path / "manifest.json")
    files = manifest.get("files") if isinstance(manifest, dict) else None
    whole = isinstance(files, dict) and set(files) - set(_OPTIONAL_FILES) == set(_FILES)
    whole = whole and all(isinstance(one, dict) and {"bytes", "sha256"} <= set(one) for one in files.values())
    if not whole or manifest.get("schema") != SCHEMA:
        raise DataError(f"{path}/manifest.json: not the manifest of a checkpoint of schema {SCHEMA}")
    for name, expected in files.items():
        try:
            size = os.path.getsize(path / name)
        except OSError as error:
            raise DataError(f"{path / name}: {error.strerror}") from None
        if size != expected["bytes"]:
            raise DataError(f"{path / name}: {size} bytes, but the manifest says {expected['bytes']}")
        if sha256_file(path / name) != expected["sha256"]:
            raise DataError(f"{path / name}: its SHA-256 differs from the manifest's; the file is damaged")
    return list(files)


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify and read one step folder; raises :class:`DataError` before any tensor is used."""
    names = verify(path)
    parts = {f"{part}.safetensors": part for part in (*PARTS, *OPTIONAL_PARTS)}
    tensors = {part: read_tensors(path / name) if name in names else {} for name, part in parts.items()}
    return Checkpoint(path=path, state=read_json(path / "state.json"), **tensors)


def resolve_checkpoint(path: Path) -> Path:
    """Return the step folder meant by ``path``: itself, or the newest valid one of a run folder.

    Absolute, so that the run folder is two above it wherever a command was started. Raises :class:`ConfigError` for
    anything else; a file, such as a pickled ``.pt``, is refused without being opened.
    """
    path = Path(os.path.abspath(path))
    if path.is_file():
        raise ConfigError(
            f"{path}: a checkpoint is a folder of .safetensors and .json files; a single file, such as a pickle (.pt, "
            ".pth, .ckpt), is never loaded, because reading one can run any code"
        )
    if (path / "manifest.json").is_file():
        return path
    latest = find_latest(path.parent if path.name == "checkpoints" else path)
    if latest is None:
        raise ConfigError(
            f"{path}: neither a checkpoint (step-NNNNNN with a manifest.json) nor a run folder that has one"
        )
    return latest


def load_weights(module: nn.Module, tensors: Tensors, source: Path) -> None:
    """Copy every one of ``tensors`` into ``module``; :class:`DataError` names what is missing, extra or mis-shaped."""
    expected = module.state_dict()
    problems = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} is not in the model" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the model's {tuple(expected[name].shape)}"
        for name in expected.keys() & tensors.keys()
        if tensors[name].shape != expected[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(f"{source}: does not fit the model: {'; '.join(sorted(problems)[:3])}{more}")
    module.load_state_dict(tensors)
