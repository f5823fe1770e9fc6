"""What a run may continue from: the right checkpoint, the same config, the same data, the same arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch

from nanodit.errors import ConfigError, DataError
from nanodit.files import read_json
from prep.dataset.reader import Dataset
from train.checkpoint.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    find_latest,
    load_checkpoint,
    remove_leftovers,
    resolve_checkpoint,
)
from train.checkpoint.state import checked_state
from train.config import TrainConfig
from train.data.noise import noise_record
from train.hardware import has_fast_bf16
from train.method.ema import ema_decay
from train.method.schedule import Course, learning_rate, snapshot_steps

# Places, the pace of saving and looking, and memory: nothing here changes a weight. All other keys must be the
# checkpoint's.
SAFE_TO_CHANGE = (
    "dataset", "output", "log_every", "data.cache_gb", "data.prefetch", "data.workers", "checkpoint", "visual_debug",
    "validation", "train.gradient_checkpointing",
)  # fmt: skip


def choose_checkpoint(run_folder: Path, resume: str) -> Checkpoint | None:
    """Return what ``--resume`` means for a run folder: None to start from the beginning.

    ``auto`` continues from the newest valid checkpoint if there is any; ``never`` refuses a folder that holds a run;
    else a path to a checkpoint or another run. The caller holds the run's lock. Raises :class:`ConfigError`.
    """
    remove_leftovers(run_folder)
    if resume == "auto":
        latest = find_latest(run_folder)
        return None if latest is None else _load(latest)
    steps = checkpoint_steps(run_folder)
    if resume == "never":
        if steps or (run_folder / "metrics.jsonl").exists():
            raise ConfigError(
                f"{run_folder} already holds a run; choose another `output`, or leave out `--resume never` to continue"
            )
        return None
    checkpoint = _load(resolve_checkpoint(Path(resume)))
    later = [path.name for path in steps if int(path.name[5:]) > checkpoint.state["step"]]
    if later:
        raise ConfigError(
            f"{run_folder} has checkpoints after step {checkpoint.state['step']} ({later[-1]} to {later[0]}); "
            "leave out --resume to continue from the newest, or choose another `output` for the branch"
        )
    return checkpoint


def _load(path: Path) -> Checkpoint:
    checkpoint = load_checkpoint(path)
    checked_state(checkpoint.state, path)
    return checkpoint


def check_same_run(
    checkpoint: Checkpoint,
    config: TrainConfig,
    fingerprint: str,
    environment: dict[str, Any],
    *,
    allowed_changes: Sequence[str] = (),
    allow_environment_change: bool = False,
) -> None:
    """Refuse to continue where the result would not be the run's: :class:`DataError` for other data, else ConfigError.

    ``allowed_changes`` names dotted keys or sections of the config that may differ all the same.
    """
    state, name = checkpoint.state, checkpoint.path
    if state["dataset"]["fingerprint"] != fingerprint:
        raise DataError(
            f"{config.dataset}: the dataset's fingerprint is {fingerprint}, but {name} was trained on "
            f"{state['dataset']['fingerprint']}, which is no version that is kept there: it was dropped, or this is "
            "another dataset. Train on that one, or choose another `output` (--init-from takes the weights)"
        )
    noise_record(config.data.noise, torch.device("cpu"), state)  # refuses another, whatever is allowed
    safe = (*SAFE_TO_CHANGE, "data.noise", *allowed_changes, *(["train.steps"] if _may_grow(state, config) else []))
    saved = _with_defaults(state["config"], TrainConfig(dataset="", output="").model_dump(mode="json"))
    changes = [
        f"{key}: {before!r} -> {after!r}"
        for key, before, after in differences(saved, config.model_dump(mode="json"))
        if not any(key == other or key.startswith(other + ".") for other in safe)
    ]
    if changes:
        more_steps = any(change.startswith("train.steps: ") for change in changes)
        raise ConfigError(
            f"{name} was trained with another config:\n         "
            + "\n         ".join(changes)
            + "\n       Set these back, choose another `output`, or name them in --allow-change"
            + ("\n       train.steps may be raised only at a run's end, or before wsd decays" if more_steps else "")
        )
    saved = _with_cpu_bf16(state.get("environment", {}), environment["cpu_bf16"])
    changes = [f"{key}: {before!r} -> {after!r}" for key, before, after in differences(saved, environment)]
    if changes and not allow_environment_change:
        raise ConfigError(
            f"{name} was computed in another environment ({'; '.join(changes)}), so the result would not be bit-equal. "
            "Restore it (train.threads sets the number of threads), or pass --allow-environment-change"
        )


def goes_on_with_fast_bf16(state: Mapping[str, Any]) -> bool:
    """Return whether a run that continues from a ``state`` takes this CPU's bfloat16 for fast, where it is on a CPU.

    That is what it began with, so that it goes on in the types that it has computed in: a CPU whose instructions only a
    later version knows of does not change them. On a CPU without any it cannot.
    """
    earlier = state.get("environment", {}).get("fast_bf16", False)  # where versions before wrote it
    before = state.get("fast_bf16", earlier)
    return before and has_fast_bf16()


def began_on(run_folder: Path, checkpoint: Checkpoint | None) -> str | None:
    """Return the version of the dataset that a run began on, also before its first checkpoint; None for a new run."""
    if checkpoint is not None:
        return checkpoint.state["dataset"]["fingerprint"]
    path = run_folder / "provenance.json"
    try:
        return read_json(path)["dataset"]["fingerprint"] if path.exists() else None
    except (DataError, KeyError, TypeError):  # of a start that trained nothing
        return None


def changed_versions(before: Dataset, after: Dataset) -> str:
    """Say what differs between two versions of a dataset.

    Raises :class:`DataError` where the newer one holds out images that the older one trained on.
    """
    old, new = before.rows(), after.rows()
    trained, held_out = before.rows("train").column("key"), after.rows("holdout").column("key")
    if leaks := sorted(held_out.filter(pc.is_in(held_out, trained)).to_pylist()):
        raise DataError(
            f"{after.root}: {len(leaks)} images that the run was trained on are in the holdout of the newest version, "
            f"for example {leaks[0]}. Continue on the version it began with, or begin a new run"
        )
    place = pc.index_in(old.column("key"), new.column("key"))  # of each old one among the new
    kept = len(place) - place.null_count
    said = [f"{len(new) - kept} images added", f"{len(old) - kept} gone"]
    if all("text" in one.info["layers"] for one in (before, after)):
        was, now = (rows.column("text/txt/sha256") for rows in (old, new))  # of captions: a tenth of their bytes
        changed = pc.not_equal(was.filter(place.is_valid()), now.take(place.drop_null()))
        said.append(f"{pc.sum(changed).as_py() or 0} captions changed")
    layers = before.info["layers"].keys() | after.info["layers"].keys()
    if other := sorted(name for name in layers if before.info["layers"].get(name) != after.info["layers"].get(name)):
        said.append(f"made otherwise: {', '.join(other)}")
    return f"version {before.fingerprint} -> {after.fingerprint}: {', '.join(said)}"


def course_of(state: Mapping[str, Any], config: TrainConfig) -> Course:
    """Return the lengths of a run that continues from a checkpoint's ``state`` to ``config.train.steps``.

    At its end a run is given a further part. Before that its length is replaced, which :func:`check_same_run` allows
    where no step so far would have been another.
    """
    totals, steps = _totals(state), config.train.steps
    if steps == totals[-1]:
        return Course(totals)
    ended = state["step"] >= totals[-1] and steps > totals[-1]
    return Course((*(totals if ended else totals[:-1]), steps))


def _may_grow(state: Mapping[str, Any], config: TrainConfig) -> bool:
    """Whether ``train.steps`` may be more than the checkpoint's: at its end, or where no step depended on it so far."""
    before, after, step = state["config"]["train"]["steps"], config.train.steps, state["step"]
    if not isinstance(before, int) or after <= before:
        return False
    first = (0, *_totals(state))[-2]  # steps before the part that is to grow

    def of_length(total: int) -> list[Any]:
        train, length = config.train, total - first
        shape = train.lr, train.lr_min, train.warmup, train.schedule, train.decay_share
        dense_from = length - round(config.tread.dense_tail * length) if config.tread.enabled else step
        return [
            [learning_rate(done, length, *shape) for done in range(step - first)],
            [ema_decay(done + 1, total, train.ema_decay, train.ema_warmup) for done in range(first, step)],
            sorted(at for at in snapshot_steps(total, config.ema.snapshots) if at <= step),
            min(dense_from, step - first),
            [] if first else [config.repa.weight_at(done, total) for done in range(step)],
        ]

    return step >= before or of_length(before) == of_length(after)


def _totals(state: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(state.get("totals", [state["config"]["train"]["steps"]]))


def _with_cpu_bf16(environment: Mapping[str, Any], here: str) -> dict[str, Any]:
    """Return an environment in today's words: before it named instructions it said whether there is AMX.

    One without was computed in float32, for which other instructions make no difference, or with ``here``'s.
    """
    saved = dict(environment)
    amx = saved.pop("fast_bf16", False)
    return {"cpu_bf16": "amx" if amx else "none" if here == "amx" else here, **saved}


def _with_defaults(saved: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Add the keys that came after a checkpoint, whose defaults are how it was trained."""
    both = {**defaults, **saved}
    nested = [key for key in saved if isinstance(saved[key], dict) and isinstance(defaults.get(key), dict)]
    return {**both, **{key: _with_defaults(saved[key], defaults[key]) for key in nested}}


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List (dotted key, value before, value after) where two nested dicts differ; a missing key is None."""
    found = []
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((prefix + key, old, new))
    return found
