"""Exported models, the reading side: the names of an export's files, and the network that they describe.

:mod:`train.draw.export` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanodit.errors import ConfigError, DataError, first_line
from nanodit.files import read_json
from train.checkpoint.checkpoint import load_weights
from train.checkpoint.tensorfile import read_tensors
from train.config import TrainConfig
from train.model.modalities import Features
from train.model.network import NanoDiT, build_model

SCHEMA = 1
INDEX = "model_index.json"
COMPONENT = "transformer"  # the folder of the network, as diffusers calls it
CONFIG, WEIGHTS, LOADER = (f"{COMPONENT}/{name}" for name in (
    "config.json", "diffusion_pytorch_model.safetensors", "nanodit.py"
))  # fmt: skip
PREFIX = "network."  # of the names in the file: the network is a part of the class that diffusers loads
SECTIONS = ("model", "flow", "tread")  # of the training config, that drawing depends on


def build_as(tensors: Mapping[str, Tensor], config: TrainConfig, dataset: Mapping[str, Any], source: Path) -> NanoDiT:
    """Build the network that a description asks for, if it is no more than twice as large as the tensors of a file.

    So nothing is allocated for the sizes that a damaged or hostile description names; whether each tensor fits is said
    by :func:`train.checkpoint.checkpoint.load_weights`. Raises :class:`DataError`.
    """
    try:
        features = Features.from_dataset(dataset)
        if config.model.depth > len(tensors):
            raise ValueError(f"{config.model.depth:,} blocks")
        with torch.device("meta"):
            wanted = sum(value.numel() for value in build_model(config.model, features, config.tread).parameters())
        if wanted > 2 * sum(value.numel() for value in tensors.values()):
            raise ValueError(f"{wanted:,} numbers")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source}: its tensors are not those of the network that is described beside it: {first_line(error)}"
        ) from None
    return build_model(config.model, features, config.tread)


def build(described: Mapping[str, Any], where: str = "config.json") -> tuple[NanoDiT, TrainConfig, dict[str, Any]]:
    """Build the network that a ``config.json`` describes, its weights random: (model, config, state).

    The three are what :func:`train.checkpoint.open.load_model` returns, but for the places of dataset and run,
    which an export does not know. Raises :class:`DataError` for a description of another version.
    """
    config, state = _read(described, where)
    return build_model(config.model, Features.from_dataset(state["dataset"]), config.tread), config, state


def _read(described: Mapping[str, Any], where: str) -> tuple[TrainConfig, dict[str, Any]]:
    if described.get("schema") != SCHEMA:
        raise DataError(f"{where}: its schema is {described.get('schema')}, but this version reads {SCHEMA}")
    try:
        config = TrainConfig(
            dataset="the dataset that an export does not have", output="the run that an export does not have",
            conditioning={"preset": None, "table": dict(described["conditioning"])},
            **{name: dict(described[name]) for name in SECTIONS},
        )  # fmt: skip
        Features.from_dataset(described["dataset"])
        state = {name: described[name] for name in ("step", "dataset", "source")}
        if not isinstance(state["source"]["weights"], str):
            raise TypeError("source.weights is not text")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: not the description of a model of this version: {error}") from None
    return config, state


def is_exported(folder: Path) -> bool:
    """Whether ``folder`` is one that :func:`train.draw.export.export` wrote, or that diffusers saved again."""
    return (folder / INDEX).is_file() and (folder / CONFIG).is_file()


def load_exported(folder: Path, weights: str = "ema") -> tuple[NanoDiT, TrainConfig, dict[str, Any]]:
    """Load an exported folder without diffusers: (model, config, state) as of
    :func:`train.checkpoint.open.load_model`.

    The model is on the CPU, in float32 and in eval mode. ``ema``, the default everywhere, stands for the weights that
    the folder holds; :class:`ConfigError` for any others. Raises :class:`DataError` for files that are damaged, or are
    not what this version writes.
    """
    described = read_json(folder / CONFIG)
    if not isinstance(described, dict):
        raise DataError(f"{folder / CONFIG}: not the description of a model")
    config, state = _read(described, str(folder / CONFIG))
    if weights not in ("ema", held := state["source"]["weights"]):
        raise ConfigError(f"{folder}: this export holds only the weights {held}, not {weights}")
    if not (folder / WEIGHTS).is_file():
        found = ", ".join(sorted(path.name for path in (folder / COMPONENT).glob("*.safetensors*")))
        raise DataError(
            f"{folder / WEIGHTS}: does not exist{f' (there: {found})' if found else ''}. Weights of a variant or in "
            "several files are not read: save again without `variant`, and with `max_shard_size='100GB'`"
        )
    tensors = read_tensors(folder / WEIGHTS)
    model = build_as(tensors, config, state["dataset"], folder / WEIGHTS)
    load_weights(model, {name.removeprefix(PREFIX): value for name, value in tensors.items()}, folder / WEIGHTS)
    return model.eval(), config, state
