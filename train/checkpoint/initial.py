"""``train run --init-from``: a new run that begins with the weights of another, on other data or at another size.

Only weights are taken: the average (EMA), which is what people draw with and publish, becomes model and average alike;
optimiser, step, schedule and data order start anew. The run saves them as its step 0 and records whose they are, so
that it is continued like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nanodit.errors import PROBLEM_BREAK, ConfigError
from train.checkpoint.checkpoint import checkpoint_steps, resolve_checkpoint
from train.checkpoint.open import load_model
from train.checkpoint.tensorfile import Tensors
from train.config import TrainConfig
from train.model.modalities import MODALITIES, Features
from train.model.network import TRAINING_ONLY

WEIGHTS = "ema"
# what the weights' shapes and meaning depend on; the rest of the config is the new run's own
MUST_AGREE = (
    "model.hidden_size", "model.depth", "model.num_heads", "model.patch_size", "model.bottleneck",
    "model.context_joints", "flow.prediction",
)  # fmt: skip


@dataclass(frozen=True)
class Parent:
    """The checkpoint whose weights a run begins with; ``record`` is what the run's state says about it."""

    path: Path
    tensors: Tensors
    config: TrainConfig
    features: Features
    layers: Mapping[str, Any]
    record: dict[str, Any]


def load_parent(path: Path) -> Parent:
    """Read a step folder, or a run folder's newest; raises as :func:`train.checkpoint.open.load_model` does."""
    step_folder = resolve_checkpoint(path)
    model, config, state = load_model(step_folder, WEIGHTS)
    record = {
        "weights": WEIGHTS,
        "sha256": _weights_hash(step_folder),
        "step": state["step"],
        "dataset": state["dataset"]["fingerprint"],
        "parent": state.get("parent"),  # which may have begun the same way
    }
    layers = state["dataset"]["layers"]
    return Parent(step_folder, model.state_dict(), config, model.features, layers, record)


def check_same_parent(path: Path, state: Mapping[str, Any], run_folder: Path) -> None:
    """Raise :class:`ConfigError` unless the run with this ``state`` began with weights of ``path``."""
    parent = state.get("parent")
    if parent is None:
        raise ConfigError(f"{run_folder} holds a run that began without --init-from; choose another `output`")
    folders = [path] if (path / "manifest.json").is_file() else checkpoint_steps(path)
    if not any(_weights_hash(folder) == parent["sha256"] for folder in folders):
        raise ConfigError(
            f"{run_folder} began with the weights of another checkpoint (step {parent['step']}, SHA-256 "
            f"{parent['sha256'][:12]}), not with those of {path}. Leave out --init-from to continue it, or choose "
            "another `output` to begin a new run"
        )


def init_weights(model: nn.Module, parent: Parent, config: TrainConfig, layers: Mapping[str, Any]) -> list[str]:
    """Copy the parent's weights into ``model``, where both have them, and return lines that say what is different.

    ``layers`` are those of the new dataset. Conditions that the parent did not have keep their fresh weights, those
    that the new data lacks are left out. Raises :class:`ConfigError` naming every key and layer that does not fit.
    """
    features: Features = model.features
    shared = [name for name in parent.features.modalities if name in features.modalities]
    problems = [
        f"{key}: {then!r} there, {now!r} here"
        for key in MUST_AGREE
        if (then := _value(parent.config, key)) != (now := _value(config, key))
        and (key != "model.context_joints" or "pose" in shared)
    ]
    if parent.config.model.output_conv and not config.model.output_conv:
        problems.append("model.output_conv: true there, false here")
    for layer in dict.fromkeys(MODALITIES[name].layer for name in shared):
        then, now = (info[layer].get("width") for info in (parent.layers, layers))
        if then != now:
            problems.append(f"{layer} features: {then} wide there, {now} here")
    if problems:
        raise ConfigError(
            f"--init-from {parent.path}: its weights belong to another network:{PROBLEM_BREAK}"
            + PROBLEM_BREAK.join(problems)
            + f"{PROBLEM_BREAK}Set these keys to their values there, and prepare the dataset with the same encoders"
        )
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(TRAINING_ONLY)}
    model.load_state_dict({name: parent.tensors.get(name, value) for name, value in own.items()}, strict=False)

    lines = [f"beginning with the EMA weights of {parent.path}"]
    if fresh := [name for name in features.modalities if name not in parent.features.modalities]:
        lines.append(f"  not trained there, so begun afresh: {', '.join(fresh)}")
    if config.model.output_conv and not parent.config.model.output_conv:
        lines.append("  not trained there, so begun afresh: the output convolution, which changes nothing at first")
    if left := [name for name in parent.features.modalities if name not in features.modalities]:
        lines.append(f"  trained there, but not in this dataset, so left out: {', '.join(left)}")
    for layer in dict.fromkeys(MODALITIES[name].layer for name in shared):
        if parent.layers[layer].get("encoder") != layers[layer].get("encoder"):
            lost = "features come from another encoder here; what was learned from them is lost"
            lines.append(f"  warning: {layer} {lost}")
    if parent.features.base != features.base:
        lines.append(f"  trained at base {parent.features.base}, now {features.base} pixels")
    return lines


def _value(config: TrainConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _weights_hash(step_folder: Path) -> str | None:
    """Return the SHA-256 of a checkpoint's average, as its manifest says."""
    try:
        manifest = json.loads((step_folder / "manifest.json").read_text(encoding="utf-8"))
        return manifest["files"][f"{WEIGHTS}.safetensors"]["sha256"]
    except (OSError, ValueError, LookupError, TypeError):  # one that is missing or damaged is not the one
        return None
