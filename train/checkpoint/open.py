"""Opening a model for drawing and evaluation, from a checkpoint of a run or an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nanodit.errors import ConfigError, DataError
from nanodit.files import read_json
from train.checkpoint.checkpoint import load_weights, resolve_checkpoint, verify
from train.checkpoint.exported import build_as, is_exported, load_exported
from train.checkpoint.posthoc import parse_weights, reconstruct
from train.checkpoint.state import checked_state
from train.checkpoint.tensorfile import read_tensors
from train.config import TrainConfig
from train.model.network import TRAINING_ONLY, NanoDiT


def weights_file(step_folder: Path, weights: str) -> Path:
    """Return the file of a checkpoint that ``weights`` (``ema``, ``model``, ``posthoc:SIGMA_REL``) are read from."""
    return step_folder / f"{'power' if parse_weights(weights) else weights}.safetensors"


def load_model(path: Path, weights: str = "ema") -> tuple[NanoDiT, TrainConfig, dict[str, Any]]:
    """Build the model of a checkpoint exactly as training did: (model, config, state.json), for drawing and evaluation.

    ``path`` is a step folder, a run folder (its newest valid checkpoint), or what ``train export`` wrote; ``weights``
    is ``ema``, ``model`` or ``posthoc:SIGMA_REL``, an average that the run's snapshots are put together to. The model
    is on the CPU, in eval mode, and needs no dataset. Raises :class:`DataError` for damaged files or tensors that do
    not fit, and :class:`ConfigError` for an average that cannot be made.
    """
    if is_exported(Path(path)):
        return load_exported(Path(path), weights)
    sigma_rel = parse_weights(weights)
    step_folder = resolve_checkpoint(Path(path))
    names = verify(step_folder)
    state = checked_state(read_json(step_folder / "state.json"), step_folder)
    try:
        config = TrainConfig.model_validate(state["config"])
    except ValidationError as error:
        raise DataError(f"{step_folder}/state.json: its config does not fit this version: {error}") from None
    source = weights_file(step_folder, weights)
    if source.name not in names:
        raise ConfigError(f"{step_folder}: was trained without `ema.snapshots`, so there is no {weights}; use ema")
    tensors = read_tensors(source)
    model = build_as(tensors, config, state["dataset"], source)
    if sigma_rel:
        tensors = reconstruct(step_folder.parent.parent, state["step"], tensors, sigma_rel)
    load_weights(model, {name: value for name, value in tensors.items() if not name.startswith(TRAINING_ONLY)}, source)
    return model.eval(), config, state
